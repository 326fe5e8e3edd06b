"""Networks that tests of the CPU kernels draw: every activation, LayerNorm, residual blocks."""

from hypothesis import strategies as st

from sparse_tickets.kernels.activations import KNOWN, LAYERNORM
from sparse_tickets.kernels.arena import ARCHITECTURES, chain

KINDS = {
    "activation": st.sampled_from([*KNOWN, *(LAYERNORM + name for name in KNOWN)]),
    "architecture": st.sampled_from(ARCHITECTURES),
}
"""Arguments of `Arena.build`."""


def any_chain(architecture, inputs, hidden, outputs):
    """A `chain`; a residual one has a stream at least."""
    if architecture == "residual" and not hidden:
        hidden = (1,)
    return chain(architecture, inputs, tuple(hidden), outputs)
