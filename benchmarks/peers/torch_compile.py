"""The masked policy of `masked_bmm` under `torch.compile`, forward and backward both compiled."""

from __future__ import annotations

import shutil

import torch

from sparse_tickets.timing import Contender

from ..problems import PolicyProblem
from . import Unavailable
from .torch_dense import network, trained

NAME = "torch.compile w*mask"


def policy(problem: PolicyProblem) -> Contender:
    """Compiled before the clock starts.

    Raises:
        Unavailable: torch.compile needs a C++ compiler on the CPU, or Triton on a GPU.
    """
    if torch.device(problem.device).type == "cpu" and not any(
        map(shutil.which, ("g++", "clang++"))
    ):
        raise Unavailable("torch.compile needs g++ or clang++ on the CPU, neither was found")
    leaves, forward = network(problem, masked=True)
    return trained(NAME, problem, leaves, torch.compile(forward, fullgraph=True))
