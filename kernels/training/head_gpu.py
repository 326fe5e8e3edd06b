"""What an algorithm puts into the training step on a GPU: two Triton functions and what they read.

`fused_gpu` calls them on outputs in registers, `loss_gpu` on outputs in memory, as constants of
their kernels. A head's file says what it minimises, and nothing of how samples come to it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class GPUHead(NamedTuple):
    """A loss on the outputs of one or two networks, and the tensors it reads.

    Attributes:
        name: of the op, as `kernels.tuning` is asked about it.
        prepare: ``prepare(NUMBER, data, numbers, minibatch, OPTIONS, WALK)``, a ``@triton.jit``
            function, returns what `loss` needs to know of a ticket's whole minibatch, a tuple, and
            the gradient by `log_std` that is no sample's. ``minibatch`` is pointers to its first
            index, where the ticket's samples begin in a field, and how many it draws; ``WALK`` of
            them may be read at once.
        loss: ``loss(NUMBER, output, log_std, known, data, numbers, place, count, OPTIONS, OUT,
            WIDE)`` of some samples: ``output [ROWS, WIDE]``, of which ``OUT`` columns are there.
            ``place`` is where each lies in the fields, and whether it is there. Returns the
            gradient by the output, zero where nothing is; that by `log_std [WIDE]`, summed over
            the samples; and a tuple of ``[ROWS]``, what the network adds to the statistics of
            each, zero outside.
        measured: for each network, which of the statistics these are.
        data: tensors, contiguous; a named tuple, whose fields the functions name.
        numbers: the same, of numbers.
        options: of the loss, which the compiler knows.
    """

    name: str
    prepare: Any
    loss: Any
    measured: tuple[tuple[int, ...], ...]
    data: tuple[Tensor, ...]
    numbers: tuple[float, ...]
    options: tuple[bool | str, ...]

    @property
    def statistics(self) -> int:
        """How many there are."""
        return sum(map(len, self.measured))

    @property
    def constants(self) -> dict[str, Any]:
        """What the kernels know of the head when they are compiled."""
        return {
            "MEASURED": self.measured,
            "PREPARE": self.prepare,
            "LOSS": self.loss,
            "OPTIONS": self.options,
        }


class Minibatch(NamedTuple):
    """Samples of every ticket: ``apart * p + index[p, first : first + count]`` of ticket p.

    Attributes:
        index: ``[P, .]`` int64, contiguous; -1 is a sample that does not exist, all of it NaN.
        first: of it.
        count: how many.
        apart: how far tickets lie apart in the fields; 0 where all share one.
    """

    index: Tensor
    first: int
    count: int
    apart: int


@triton.jit
def place_samples(minibatch, begin, ROWS: tl.constexpr):
    """Of ``ROWS`` samples from the ``begin``-th on; see `GPUHead`."""
    index, base, count = minibatch
    position = begin + tl.arange(0, ROWS)
    inside = position < count
    return base + tl.load(index + position, mask=inside, other=0), inside


@triton.jit
def no_sums(COUNT: tl.constexpr, ROWS: tl.constexpr):
    """As many sums as there are statistics, each with an entry per sample of a tile."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums += (tl.zeros([ROWS], tl.float32),)
    return sums


@triton.jit
def add_sums(sums, of_samples):
    total = ()
    for entry in tl.static_range(len(sums)):
        total += (sums[entry] + of_samples[entry],)
    return total


@triton.jit
def store_sums(target, sums, MEASURED: tl.constexpr, NUMBER: tl.constexpr):
    for entry in tl.static_range(len(sums)):
        tl.store(target + MEASURED[NUMBER][entry], tl.sum(sums[entry], 0))


@triton.jit
def load_log_std(log_std, OUT: tl.constexpr, WIDE: tl.constexpr):
    """A ticket's log standard deviations, or as many zeros where actions are discrete."""
    values = tl.zeros([WIDE], tl.float32)
    if log_std is not None:
        a = tl.arange(0, WIDE)
        values = tl.load(log_std + a, mask=a < OUT, other=0.0)
    return values
