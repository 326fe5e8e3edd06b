"""What we are compared with: one module per peer, each the best that peer can do with a mask.

A peer gets what helps it for free: weights that are zero off the mask already, sparse formats built
before the clock starts, weight gradients masked after it stopped. A peer that cannot run here
raises `Unavailable`, and tables give its reason.
"""

from __future__ import annotations

__all__ = ["Unavailable"]


class Unavailable(Exception):
    """This peer cannot run here, or does not know the op; the message says why."""
