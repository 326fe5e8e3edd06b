"""Ops on populations of sparse networks. This floor knows tensors, not policies or tickets."""
