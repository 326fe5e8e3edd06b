"""Every op on every backend against what it was not made for: a clear error or the right answer.

`CASES` says how to call each op on small tensors by name. The tests then spoil one tensor at a
time: its dtype, device, shape or strides, or whom it shares its memory with. A spoiled call must
raise a ValueError or TypeError that names an argument, and leave alone what it would have written;
or it must give what it gives on sound copies of the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from bad_input import (
    CASES,
    OTHER_DTYPES,
    assert_refused,
    assert_right_or_refused,
    columns_first,
    flatten,
    of_each_op,
    on_device,
    on_each_backend,
    other_shapes,
    run,
    spoiling,
)
from torch import Tensor

from sparse_tickets.kernels.dispatch import use_backend

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@on_each_backend
@of_each_op
def test_other_dtypes(name: str, backend: str) -> None:
    tensors = on_device(backend, CASES[name].make(2, 3, 0.6))
    for argument, tensor in tensors.items():
        for dtype in OTHER_DTYPES[tensor.dtype]:
            spoiled = {n: t.clone() for n, t in tensors.items()} | {argument: tensor.to(dtype)}
            with spoiling(argument):
                assert_right_or_refused(name, backend, spoiled, tensors, tolerance=1e-2)


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@of_each_op
def test_all_of_another_precision(name: str, dtype: torch.dtype, backend: str) -> None:
    tensors = on_device(backend, CASES[name].make(2, 3, 0.6))
    cast = {n: t.to(dtype) if t.dtype == torch.float32 else t for n, t in tensors.items()}
    assert_right_or_refused(name, backend, cast, tensors, tolerance=1e-2)


@on_each_backend
@of_each_op
def test_another_device(name: str, backend: str) -> None:
    tensors = on_device(backend, CASES[name].make(2, 3, 0.6))
    for argument, tensor in tensors.items():
        with spoiling(argument):
            try:
                with use_backend(backend):
                    result = CASES[name].call(**(tensors | {argument: tensor.to("meta")}))
            except (ValueError, TypeError) as error:
                assert_refused(error, tensors)
            else:
                # An op of one tensor is where that is.
                assert len(tensors) == 1
                assert all(tensor.is_meta for tensor in flatten(result))


@on_each_backend
@of_each_op
def test_other_shapes(name: str, backend: str) -> None:
    tensors = on_device(backend, CASES[name].make(2, 3, 0.6))
    for argument, tensor in tensors.items():
        for other in other_shapes(tensor):
            spoiled = {n: t.clone() for n, t in tensors.items()} | {argument: other.contiguous()}
            with spoiling(f"{argument} {tuple(other.shape)}"):
                assert_right_or_refused(name, backend, spoiled)


def read_together(test: Callable[..., None]) -> Any:
    """An op's tensors to spoil: each that it writes by itself, and all that it reads together."""
    spoils = [
        pytest.param(
            name, spoiled, id=f"{name}-{spoiled[0] if spoiled[0] in case.written else 'read'}"
        )
        for name, case in CASES.items()
        for spoiled in (
            *((written,) for written in case.written),
            tuple(n for n in case.make(1, 1, 0.5) if n not in case.written),
        )
        if spoiled
    ]
    return pytest.mark.parametrize(("name", "spoiled"), spoils)(test)


def every_other(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, tensor], -1).flatten(-2)[..., ::2]


def in_longer_rows(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, tensor], -1)[..., : tensor.shape[-1]]


def all_tickets_one(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor)


def all_columns_one(tensor: Tensor) -> Tensor:
    return tensor[..., :1].expand_as(tensor)


def rows_overlap(tensor: Tensor) -> Tensor:
    return tensor.contiguous().as_strided(tensor.shape, (1, *tensor.stride()[1:]))


LAYOUTS = [
    columns_first,
    every_other,
    in_longer_rows,
    all_tickets_one,
    all_columns_one,
    rows_overlap,
]


@on_each_backend
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@read_together
def test_other_strides(
    name: str, spoiled: tuple[str, ...], layout: Callable[[Tensor], Tensor], backend: str
) -> None:
    tensors = on_device(backend, CASES[name].make(2, 2, 0.6))
    strided = {argument: layout(tensors[argument]) for argument in spoiled}
    if "mask" in strided:
        # What is updated in place has to be zero off the mask beforehand.
        for rows in (tensors[written] for written in CASES[name].written):
            if rows.dim() == 2 and rows.shape[1] >= strided["mask"].shape[1]:
                rows[:, : strided["mask"].shape[1]] *= strided["mask"]
    assert_right_or_refused(name, backend, tensors | strided)


@on_each_backend
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.written])
def test_tensors_that_overlap(name: str, backend: str) -> None:
    """One that is written begins where another does, or in its middle."""
    tensors = on_device(backend, CASES[name].make(2, 3, 0.6))
    for target, other in product(CASES[name].written, tensors):
        one, two = tensors[target], tensors[other]
        if other == target or one.dtype != two.dtype:
            continue
        for begin in (0, one.numel() // 2):
            memory = torch.cat([one.flatten(), two.flatten()])
            shared = {
                target: memory[: one.numel()].view_as(one),
                other: memory[begin : begin + two.numel()].view_as(two),
            }
            spoiled = {n: t.clone() for n, t in tensors.items()} | shared
            with spoiling(f"{target} at {begin} {other}"):
                assert_right_or_refused(name, backend, spoiled)


@on_each_backend
@pytest.mark.parametrize("sizes", [(0, 3, 0.6), (2, 0, 0.6), (0, 0, 0.6), (2, 3, 0.0), (1, 1, 1.0)])
@of_each_op
def test_nothing_to_do(name: str, sizes: tuple[int, int, float], backend: str) -> None:
    """No tickets, no rows, masks with no ones; and one of each."""
    tensors = on_device(backend, CASES[name].make(*sizes))
    assert_right_or_refused(name, backend, tensors)


# What trains or acts is no op of torch's; tests/kernels/test_opcheck.py asks the same of those.
EAGER = ("rollout", "demonstrate", "evaluate", "ppo_update_", "clone_update_")


@on_each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EAGER)
def test_no_result_depends_on_a_default(name: str, dtype: torch.dtype, backend: str) -> None:
    case = CASES[name]
    tensors = on_device(backend, case.make(2, 3, 0.6))
    copies = {n: t.clone() for n, t in tensors.items()}
    expected = run(case, backend, tensors)
    torch.set_default_dtype(dtype)
    try:
        # Triton's interpreter makes tensors on the default device itself.
        with torch.device(copies["key"].device if backend == "triton" else "meta"):
            found = run(case, backend, copies)
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_a_compiler_leaves_training_alone() -> None:
    case = CASES["clone_update_"]
    tensors = case.make(2, 3, 0.6)
    copies = {n: t.clone() for n, t in tensors.items()}

    def train(**tensors: Tensor) -> Tensor:
        return 2 * case.call(**tensors).loss

    found = torch.compile(train, backend="eager")(**copies)
    assert torch.equal(found, train(**tensors))
    assert all(torch.equal(copies[n], tensors[n]) for n in case.written)
