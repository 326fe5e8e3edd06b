"""SparseLab (`sparselab` on PyPI): true sparse layers for CPUs, in C++ over compressed rows.

It brings an OpenMP runtime of its own, so it wants a process of its own beside torch's threads.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor, nn

from . import Unavailable

NAME = "SparseLab"

# It remembers transposed matrices by `id`, so that one made in the place of one that is gone gets
# the other's (its `ops._cached_transpose` says so): whatever was made stays.
_made: list[object] = []


def layer(linear: nn.Linear, mask: Tensor) -> nn.Module:
    """A layer of its own on the weights on the mask, without room for others to grow.

    Raises:
        Unavailable: it is not installed.
    """
    try:
        import sparselab
    except ImportError:
        raise Unavailable("SparseLab is not installed: pip install sparselab") from None
    weight = linear.weight.detach().masked_fill(~mask, 0)
    with warnings.catch_warnings():
        # Torch's on its own compressed rows, of which SparseLab makes its.
        warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
        twin = sparselab.SparseLinear(linear.in_features, linear.out_features)
        twin._csr = sparselab.layout.from_dense(weight, padding_ratio=0.0)
    _made.append(twin._csr)
    # The layer's own way to share the values with torch.
    twin._values = nn.Parameter(torch.from_numpy(np.asarray(twin._csr.values)))
    twin.bias = nn.Parameter(linear.bias.detach().clone())
    return twin


def follow_torch() -> None:
    """Give its OpenMP runtime, loaded with its first layer, torch's number of threads."""
    from threadpoolctl import threadpool_limits

    threadpool_limits(torch.get_num_threads(), user_api="openmp")
