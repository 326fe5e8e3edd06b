"""A whole policy in one call on the CPU: forward, backward, on the Parameters where they lie."""

from __future__ import annotations

from . import native
from .activations import Activation, find_activation
from .layout import Layer, Norm
from .network import Network
from .squashed import can_squash, squash

__all__ = [
    "Activation",
    "Layer",
    "Network",
    "Norm",
    "can_squash",
    "find_activation",
    "native",
    "squash",
]
