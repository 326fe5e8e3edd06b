"""Torch's 2:4 tensors: two weights of every four in a row, on a GPU's sparse tensor cores."""

from __future__ import annotations

import warnings

import torch

from sparse_tickets.timing import Contender

from ..problems import LinearProblem
from . import Unavailable
from .torch_csr import compressed_forward

NAME = "torch 2:4"


def linear_forward(problem: LinearProblem) -> Contender:
    """One ticket, float16 or bfloat16.

    Raises:
        Unavailable: not on CUDA, more than one ticket, a mask of another pattern, or a dtype or
            shape that torch refuses.
    """
    if problem.device.type != "cuda":
        raise Unavailable("torch's 2:4 tensors are for CUDA only")
    if len(problem.x) != 1:
        raise Unavailable("2:4 tensors in a batch have no linear: one ticket only")
    mask = problem.mask[0]
    if mask.shape[1] % 4 or bool((mask.unflatten(1, (-1, 4)).sum(2) > 2).any()):
        raise Unavailable("the mask keeps more than two of some four neighbouring weights")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "in prototype stage"
            weight = torch.sparse.to_sparse_semi_structured(problem.weight[0])
    except RuntimeError as refused:
        raise Unavailable(f"torch refuses this weight: {refused}") from refused
    return compressed_forward(NAME, problem, weight)
