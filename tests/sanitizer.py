"""Look over the shoulder of Triton's interpreter: strays, overflows, and races it cannot show.

The interpreter runs programs one after the other, each as a single thread. So it hides what a GPU
does not forgive: an address beyond a tensor, one program's result depending on another's, and
threads of a program that meet at an address without a barrier between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

__all__ = ["MemoryFault", "watched"]

_WIDE = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


class MemoryFault(RuntimeError):
    """A kernel touched memory in a way that a GPU would not forgive."""


class _Shadow:
    """What one launch did to each byte of some memory.

    Attributes:
        writer: the program that wrote it, counted from 1, or 0.
        written: when it did.
        reader: the program that read it, 0, or -1 if several did.
        read: when it last did.
        pattern: by what addresses, as a hash.
    """

    def __init__(self, size: int) -> None:
        self.writer, self.written = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.reader, self.read = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.pattern = np.zeros(size, np.int64)


class _Launch:
    """One launch of a kernel: memory it was given, and where it stands.

    Attributes:
        program: that runs, counted from 1.
        time: goes on where all threads of a program wait for each other.
        patched: the modules of Triton's language that the interpreter has put its own into.
    """

    def __init__(self, name: str, tensors: list[torch.Tensor]) -> None:
        self.name = name
        spans: list[tuple[int, int]] = []
        for begin, end in sorted(_span(tensor) for tensor in tensors if tensor.numel()):
            if spans and begin < spans[-1][1]:
                spans[-1] = spans[-1][0], max(end, spans[-1][1])
            else:
                spans.append((begin, end))
        self._begins, self._ends = np.array(spans, np.int64).reshape(-1, 2).T
        self._shadows = [_Shadow(end - begin) for begin, end in spans]
        self.program, self.time = 0, 0
        self.patched: set[Any] = set()

    def load(self, pointers: Any, mask: Any) -> None:
        """Check what is read, and note it."""
        pattern = hash(pointers.data.tobytes())
        for shadow, at in self._places("reads", pointers, mask):
            mine = self._check_writer("reads", shadow, at)
            self._refuse(mine & (shadow.written[at] == self.time), "reads what its threads wrote")
            reader = shadow.reader[at]
            shadow.reader[at] = np.where((reader == 0) | (reader == self.program), self.program, -1)
            shadow.read[at], shadow.pattern[at] = self.time, pattern

    def store(self, pointers: Any, mask: Any) -> None:
        """Check what is written, and note it."""
        pattern = hash(pointers.data.tobytes())
        for shadow, at in self._places("writes", pointers, mask):
            self._check_writer("writes", shadow, at)
            reader = shadow.reader[at]
            self._refuse((reader != 0) & (reader != self.program), "writes what another one read")
            # By the same addresses it is the same thread that reads and writes.
            other = (shadow.read[at] == self.time) & (shadow.pattern[at] != pattern)
            self._refuse((reader == self.program) & other, "writes what its threads read")
            shadow.writer[at], shadow.written[at] = self.program, self.time

    def _check_writer(self, verb: str, shadow: _Shadow, at: np.ndarray) -> np.ndarray:
        """Where the program itself wrote before; no other may have."""
        writer = shadow.writer[at]
        self._refuse((writer != 0) & (writer != self.program), f"{verb} what another one wrote")
        return writer == self.program

    def _refuse(self, wrong: np.ndarray, what: str) -> None:
        if wrong.any():
            barrier = " without a barrier" if "its threads" in what else ""
            raise MemoryFault(f"{self.name}: program {self.program - 1} {what}{barrier}")

    def _places(self, verb: str, pointers: Any, mask: Any) -> Iterator[tuple[_Shadow, np.ndarray]]:
        """The shadows of an access, and the bytes in them."""
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        # The interpreter makes a block & a scalar condition an integer; newer ones refuse it here.
        integers = np.array(mask.data.dtype != np.bool_)
        self._refuse(integers, f"{verb} by a mask that is no condition")
        taken = np.broadcast_to(mask.data, pointers.data.shape)
        address = pointers.data[taken].astype(np.int64)
        span = np.searchsorted(self._begins, address, side="right") - 1
        stray = span < 0
        stray[~stray] = address[~stray] + size > self._ends[span[~stray]]
        self._refuse(stray, f"{verb} beyond every tensor it was given")
        for number in np.unique(span):
            here = address[span == number] - self._begins[number]
            yield self._shadows[number], (here[:, None] + np.arange(size)).ravel()


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Addresses of a tensor, from its first byte to past its last."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    entries = 1 + sum((size - 1) * stride for size, stride in pairs)
    return tensor.data_ptr(), tensor.data_ptr() + entries * tensor.element_size()


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, tuple):
            yield from _tensors(value)
        elif isinstance(value, torch.Tensor):
            yield value


@contextmanager
def watched() -> Iterator[None]:
    """Inside, an interpreted kernel that does such a thing raises `MemoryFault`."""
    builder, executor = type(interpreter.interpreter_builder), interpreter.GridExecutor
    kept = {
        (owner, name): getattr(owner, name)
        for owner, name in (
            (builder, "create_masked_load"),
            (builder, "create_masked_store"),
            (builder, "create_barrier"),
            (builder, "set_grid_idx"),
            (executor, "__call__"),
            (interpreter, "_patch_lang"),
            (TritonSemantic, "binary_op_sanitize_overflow_impl"),
        )
    }
    load, store, barrier, place, call, patch, _ = kept.values()
    launches: list[_Launch] = []

    def watch_load(self, ptrs, mask, *rest, **options):
        launches[-1].load(ptrs, mask)
        return load(self, ptrs, mask, *rest, **options)

    def watch_store(self, ptrs, value, mask, *rest, **options):
        launches[-1].store(ptrs, mask)
        return store(self, ptrs, value, mask, *rest, **options)

    def watch_barrier(self):
        launches[-1].time += 1
        return barrier(self)

    def watch_place(self, *index):
        launches[-1].program += 1
        launches[-1].time += 1
        return place(self, *index)

    def watch_call(self, *args, **kwargs):
        launches.append(_Launch(self.fn.__name__, list(_tensors([*args, *kwargs.values()]))))
        try:
            return call(self, *args, **kwargs)
        finally:
            launches.pop()

    def patch_once(function):
        """What a kernel calls finds the language patched already, which takes a third of a test."""
        used = {value for value in function.__globals__.values() if value is tl or value is tl.core}
        if used <= launches[-1].patched:
            return None
        launches[-1].patched |= used
        return patch(function)

    def check_overflow(self, lhs, rhs, operation):
        """Triton's own check computes in its language, a third of the time, and raises nothing."""
        kind = lhs.type.scalar
        # What is unsigned may wrap around: random bits do.
        if kind.int_bitwidth < 64 and kind.is_int_signed():
            wide = _WIDE[operation.__name__](
                lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64)
            )
            if (wide < kind.get_int_min_value()).any() or (wide > kind.get_int_max_value()).any():
                raise MemoryFault(f"{launches[-1].name}: {kind} overflows by {operation.__name__}")

    watching = (
        watch_load,
        watch_store,
        watch_barrier,
        watch_place,
        watch_call,
        patch_once,
        check_overflow,
    )
    try:
        for (owner, name), watch in zip(kept, watching, strict=True):
            setattr(owner, name, watch)
        yield
    finally:
        for (owner, name), function in kept.items():
            setattr(owner, name, function)
