"""`sparse-tickets bench`: what sparsity gains on this machine, in whole steps and by the layer."""
