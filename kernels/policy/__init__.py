"""A whole policy in one call on the CPU: forward, backward, on the Parameters where they lie."""

from __future__ import annotations

from .activations import Activation, find_activation
from .layout import Layer
from .network import Network

__all__ = ["Activation", "Layer", "Network", "find_activation"]
