"""Packed weights of a population: bits and values in tile order, one copy for every product."""
