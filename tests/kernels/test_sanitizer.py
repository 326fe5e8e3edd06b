"""The sanitizer sees what the interpreter forgives: planted faults, and none in their repair."""

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

if torch.cuda.is_available():
    pytest.skip("a GPU compiles kernels instead", allow_module_level=True)

BLOCK = 8


@triton.jit
def copy_kernel(x, y, left, BLOCK: tl.constexpr):
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + entry, tl.load(x + entry, mask=entry < left), mask=entry < left)


@triton.jit
def pass_on_kernel(x, DISTANCE: tl.constexpr, SIZE: tl.constexpr):
    program = tl.program_id(0)
    tl.store(x + (program + DISTANCE) % SIZE, tl.load(x + program) + 1)


@triton.jit
def same_place_kernel(y, SHARED: tl.constexpr):
    tl.store(y + (0 if SHARED else tl.program_id(0)), 1.0)


@triton.jit
def turn_kernel(x, AFTER_STORE: tl.constexpr, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    entry = tl.arange(0, BLOCK)
    if AFTER_STORE:
        tl.store(x + entry, entry.to(tl.float32))
    value = tl.load(x + BLOCK - 1 - entry)
    if BARRIER:
        tl.debug_barrier()
    if not AFTER_STORE:
        tl.store(x + entry, value)


@triton.jit
def add_one_kernel(x, BLOCK: tl.constexpr):
    entry = tl.arange(0, BLOCK)
    tl.store(x + entry, tl.load(x + entry) + 1)


@triton.jit
def half_asked_kernel(x, y, left, AS_BLOCK: tl.constexpr, BLOCK: tl.constexpr):
    entry = tl.arange(0, BLOCK)
    some = tl.program_id(0) < left
    if AS_BLOCK:
        mask = entry < tl.where(some, left, 0)
    else:
        mask = (entry < left) & some
    tl.store(y + entry, tl.load(x + entry), mask=mask)


@triton.jit
def arithmetic_kernel(x, OPERATION: tl.constexpr):
    value = tl.load(x)
    if OPERATION == "add":
        value = value + value
    elif OPERATION == "mul":
        value = value * value
    else:
        value = value - 7
    tl.store(x, value)


def refused(what: str):
    return pytest.raises(Exception, match=f"kernel: program .* {what}")


def test_sees_an_address_beyond_a_tensor():
    x, y = torch.zeros(2 * BLOCK)[:10], torch.zeros(10)
    copy_kernel[(2,)](x, y, 10, BLOCK=BLOCK)
    with refused("reads beyond every tensor"):
        copy_kernel[(2,)](x, torch.zeros(16), 11, BLOCK=BLOCK)
    with refused("writes beyond every tensor"):
        copy_kernel[(2,)](torch.zeros(16), y, 11, BLOCK=BLOCK)


@pytest.mark.parametrize(
    ("operation", "most"), [("add", (1 << 30) - 1), ("mul", 46_340), ("sub", 7 - (1 << 31))]
)
def test_sees_integers_overflow(operation, most):
    arithmetic_kernel[(1,)](torch.tensor([most], dtype=torch.int32), OPERATION=operation)
    beyond = torch.tensor([most + (1 if most > 0 else -1)], dtype=torch.int32)
    with pytest.raises(Exception, match=f"int32 overflows by {operation}"):
        arithmetic_kernel[(1,)](beyond, OPERATION=operation)
    arithmetic_kernel[(1,)](beyond.to(torch.int64), OPERATION=operation)


def test_sees_an_empty_tensor_read():
    with refused("reads beyond every tensor"):
        copy_kernel[(1,)](torch.empty(0), torch.empty(0), 1, BLOCK=BLOCK)


def test_sees_programs_that_meet():
    pass_on_kernel[(4,)](torch.zeros(8), DISTANCE=4, SIZE=8)
    with refused("reads what another one wrote"):
        pass_on_kernel[(4,)](torch.zeros(8), DISTANCE=1, SIZE=8)
    same_place_kernel[(4,)](torch.zeros(4), SHARED=False)
    with refused("writes what another one wrote"):
        same_place_kernel[(4,)](torch.zeros(4), SHARED=True)


def test_sees_a_program_write_what_another_read():
    with refused("writes what another one read"):
        pass_on_kernel[(4,)](torch.zeros(4), DISTANCE=3, SIZE=4)


def test_sees_threads_that_meet_without_a_barrier():
    add_one_kernel[(1,)](torch.zeros(BLOCK), BLOCK=BLOCK)
    turn_kernel[(1,)](torch.zeros(BLOCK), AFTER_STORE=False, BARRIER=True, BLOCK=BLOCK)
    with refused("writes what its threads read without a barrier"):
        turn_kernel[(1,)](torch.zeros(BLOCK), AFTER_STORE=False, BARRIER=False, BLOCK=BLOCK)
    with refused("reads what its threads wrote without a barrier"):
        turn_kernel[(1,)](torch.zeros(BLOCK), AFTER_STORE=True, BARRIER=False, BLOCK=BLOCK)


def test_sees_a_mask_that_is_no_condition():
    half_asked_kernel[(1,)](torch.zeros(BLOCK), torch.zeros(BLOCK), 3, AS_BLOCK=True, BLOCK=BLOCK)
    with refused("writes by a mask that is no condition"):
        half_asked_kernel[(1,)](
            torch.zeros(BLOCK), torch.zeros(BLOCK), 3, AS_BLOCK=False, BLOCK=BLOCK
        )
