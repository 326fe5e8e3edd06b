"""How Numba kernels share the machine: on the very threads that torch computes with.

A second pool on the same cores would fight with torch's, whose workers spin for a while after
every operation. So a launch goes to the OpenMP runtime that torch has loaded: its workers are
awake where a sparse product stands between dense ones, and nobody spins against anybody.

    @njit(nogil=True)
    def _item(thread, item, x, y): ...

    @njit(nogil=True)
    def _kernel(threads, x, y):
        share(_item, threads, len(x), (x, y))

    _kernel(count_threads(len(x), work), x, y)

Threads claim items from a counter until none is left, so which thread works on an item is not
fixed: its result must not depend on that. Several Python threads may launch at once.

OpenMP's threads do not survive a fork, and what waits for them hangs. So in a child started by
"fork" kernels run on the calling thread, and torch is told to do the same if its threads were used
here. Where torch's runtime has no `GOMP_parallel` (Windows), threads of Python's help instead.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import llvmlite.binding as llvm
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.extending import intrinsic

WORTH_A_THREAD = 1 << 19
"""Multiply-adds (or floats moved) per thread below which waking one costs more than it saves."""

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_FORK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)


@_FORK
def _run_alone(body: int, data: int, threads: int, flags: int) -> None:
    """Call ``body(data)`` on this thread."""
    _BODY(body)(data)


@_FORK
def _run_in_python(body: int, data: int, threads: int, flags: int) -> None:
    """Call ``body(data)`` on this thread and on those that wake up before it is done."""
    call = _BODY(body)
    helpers = [_helpers().submit(call, data) for _ in range(1, threads)]
    call(data)
    for helper in helpers:
        if not helper.cancel():
            helper.result()


@cache
def _helpers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "sparse_tickets")


def _find_fork() -> Any:
    """`GOMP_parallel` of the OpenMP runtime that torch is linked to, by whatever name."""
    try:
        return ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return _run_in_python


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


# Compiled kernels read it from memory by this name: an address in their code would be cached.
_CELL = "sparse_tickets_fork"
_fork = ctypes.c_void_p(_address(_find_fork()))
llvm.add_symbol(_CELL, ctypes.addressof(_fork))
used_threads = ctypes.c_bool(False)
"""Whether a launch had more than one thread in this process."""


def _after_fork() -> None:
    _fork.value = _address(_run_alone)
    if used_threads.value:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def count_threads(items: int, work: float) -> int:
    """How many threads a launch is worth: at most torch's, and one per item.

    Args:
        items: what can be done at the same time.
        work: multiply-adds, or floats moved, of all items together.
    """
    if items <= 1 or work < 2 * WORTH_A_THREAD:
        return 1
    threads = int(min(torch.get_num_threads(), items, work / WORTH_A_THREAD))
    if threads > 1:
        used_threads.value = True
    return threads


@cache
def _find_pause() -> Callable[[], object]:
    """Frees what OpenMP's runtime holds for this thread; does nothing where it cannot."""
    try:
        library = ctypes.CDLL(torch._C.__file__)
        return partial(library.omp_pause_resource, 1, library.omp_get_initial_device())
    except (OSError, AttributeError):
        return int


def end_idle_threads() -> None:
    """End torch's idle threads, which would spin on cores that other processes wait for.

    What needs several threads next starts them again, which takes tens of microseconds.
    """
    _find_pause()()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on the calling thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_INDEX, _POINTER = ir.IntType(64), ir.IntType(8).as_pointer()
_CODE = ir.IntType(32)
# Places in a launch's memory; the counter everybody claims from has two cache lines of its own.
_CLAIMED, _, _ENTERED, _ITEMS, _FAILED, _ERROR, _ARGUMENTS = range(7)


def _borrow(context, builder, kind, value):
    """A value whose arrays are not counted: threads would contend for the counters."""
    if isinstance(kind, types.Array):
        array = context.make_array(kind)(context, builder, value)
        array.meminfo = cgutils.get_null_value(array.meminfo.type)
        return array._getvalue()
    if isinstance(kind, types.BaseTuple):
        parts = cgutils.unpack_tuple(builder, value)
        borrowed = [_borrow(context, builder, *part) for part in zip(kind, parts, strict=True)]
        return context.make_tuple(builder, kind, borrowed)
    return value


@intrinsic
def share(typingctx, function, threads, items, arguments):
    """Call ``function(thread, item, *arguments)`` for every item, on up to ``threads`` threads.

    Args:
        function: compiled by Numba; returns nothing. ``thread`` counts from 0 and tells apart what
            runs at once, e.g. for scratch. What it raises, `share` raises once all have ended.
        threads: int64, see `count_threads`.
        items: int64.
        arguments: a tuple.
    """
    inner = (types.int64, types.int64, *(types.unliteral(kind) for kind in arguments))
    called = function.get_call_type(typingctx, inner, {})
    outer = types.void(function, types.int64, types.int64, types.Tuple(inner[2:]))

    def generate(context, builder, signature, values):
        compiled = function.dispatcher.get_compile_result(called)
        context.add_linking_libs([compiled.library])
        _, count, total, packed = values
        packed = _borrow(context, builder, signature.args[3], packed)
        given = cgutils.unpack_tuple(builder, packed)
        error = context.call_conv.get_function_type(types.none, ()).args[1].pointee
        memory = ir.LiteralStructType(
            [_INDEX, ir.ArrayType(_INDEX, 16), _INDEX, _INDEX, _CODE, error]
            + [value.type for value in given]
        )
        task = cgutils.alloca_once(builder, memory)

        def place(builder, task, index):
            return cgutils.gep_inbounds(builder, task, 0, index)

        zero, one = ir.Constant(_INDEX, 0), ir.Constant(_INDEX, 1)
        for index, value in (
            (_CLAIMED, zero),
            (_ENTERED, zero),
            (_ITEMS, total),
            (_FAILED, ir.Constant(_CODE, 0)),
            *enumerate(given, _ARGUMENTS),
        ):
            builder.store(value, place(builder, task, index))

        body = ir.Function(
            builder.module,
            ir.FunctionType(ir.VoidType(), [_POINTER]),
            builder.module.get_unique_name(f"{builder.function.name}.share"),
        )
        body.linkage = "internal"
        work = ir.IRBuilder(body.append_basic_block("entry"))
        mine = work.bitcast(body.args[0], memory.as_pointer())
        thread = work.atomic_rmw("add", place(work, mine, _ENTERED), one, "monotonic")
        end = work.load(place(work, mine, _ITEMS))
        own = [work.load(place(work, mine, _ARGUMENTS + index)) for index in range(len(given))]
        loop, take, leave = map(body.append_basic_block, ("loop", "take", "leave"))
        work.branch(loop)
        work.position_at_end(loop)
        item = work.atomic_rmw("add", place(work, mine, _CLAIMED), one, "monotonic")
        work.cbranch(work.icmp_signed("<", item, end), take, leave)
        work.position_at_end(take)
        status, _ = context.call_internal_no_propagate(
            work, compiled.fndesc, called, [thread, item, *own]
        )
        with cgutils.if_unlikely(work, status.is_error):
            work.store(status.excinfoptr, place(work, mine, _ERROR))
            work.store(status.code, place(work, mine, _FAILED))
            # Nobody claims any more.
            work.store_atomic(end, place(work, mine, _CLAIMED), "monotonic", 8)
        work.branch(loop)
        work.position_at_end(leave)
        work.ret_void()

        data = builder.bitcast(task, _POINTER)
        several = builder.icmp_signed(">", count, one)
        with builder.if_else(several) as (parallel, alone):
            with parallel:
                flags = ir.IntType(32)
                kind = ir.FunctionType(
                    ir.VoidType(), [body.type, _POINTER, flags, flags]
                ).as_pointer()
                cell = builder.module.globals.get(_CELL)
                if cell is None:
                    cell = ir.GlobalVariable(builder.module, kind, _CELL)
                wanted = builder.trunc(count, flags)
                builder.call(builder.load(cell), [body, data, wanted, ir.Constant(flags, 0)])
            with alone:
                builder.call(body, [data])
        code = builder.load(place(builder, task, _FAILED))
        with cgutils.if_unlikely(builder, cgutils.is_not_null(builder, code)):
            error = builder.load(place(builder, task, _ERROR))
            status = context.call_conv._get_return_status(builder, code, error)
            context.call_conv.return_status_propagate(builder, status)
        return context.get_dummy_value()

    return outer, generate
