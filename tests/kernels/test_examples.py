"""What is recorded of a launcher's launches is what they are launched with."""

from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from sparse_tickets.kernels import tuning
from sparse_tickets.kernels.examples import Example, meta, record
from sparse_tickets.kernels.jit import jit_kernel
from sparse_tickets.kernels.launch import Launch

LAUNCHES = Launch(block=16, warps=2), Launch(block=32, warps=4)


@jit_kernel(fp_fusion=True)
def _scale_kernel(x, y, mask, size, stride, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at * stride, tl.load(x + at, mask=at < size) * factor, mask=at < size)


_scale_kernel.fn.__module__ = "sparse_tickets.kernels.scale.gpu"


def scale(x, mask=None):
    launch = tuning.prefer(LAUNCHES[0], "scale", x.device, among=LAUNCHES, size=x.shape[0])
    _scale_kernel[(triton.cdiv(x.shape[0], launch.block),)](
        x, x, mask, x.shape[0], x.stride(0), 0.5, **launch.constexprs, **launch.options
    )


def test_types_constants_and_options_are_those_of_the_launch():
    (case, tuned) = record([Example("long", lambda: scale(meta(48)), exact=True)], "scale")
    assert case.name == "scale_long"
    assert case.kernel is _scale_kernel
    assert case.signature == {"x": "*fp32:16", "y": "*fp32:16", "size": "i32:16", "factor": "fp32"}
    assert case.constexprs == {"mask": None, "stride": 1, "BLOCK": 16}
    assert case.options == {"num_warps": 2}
    assert (tuned.name, tuned.constexprs["BLOCK"]) == ("scale_long_block32_warps4", 32)


def test_an_example_stands_for_all_sizes_unless_it_is_exact():
    mask = meta(48, dtype=torch.bool)
    (case,) = record([Example("any", lambda: scale(meta(49)[1:], mask), tuned=False)], "scale")
    assert case.signature == {
        "x": "*fp32",
        "y": "*fp32",
        "mask": "*i1:16",
        "size": "i32",
        "stride": "i32",
        "factor": "fp32",
    }


def test_the_same_launch_counts_once_and_others_are_told_apart():
    def both():
        scale(meta(48))
        scale(meta(47), meta(47, dtype=torch.bool))

    examples = [Example("one", both, tuned=False), Example("two", both, tuned=False)]
    assert [case.name for case in record(examples, "scale")] == ["scale_one", "scale_one_2"]


def test_kernels_of_another_op_are_its_own_affair():
    assert list(record([Example("any", lambda: scale(meta(48)))], "other")) == []


class _ScaledValues(NamedTuple):
    values: Any
    scale: Any


@triton.jit
def _double(value):
    return 2 * value


_double.fn.__module__ = "sparse_tickets.kernels.double.gpu"


@jit_kernel(fp_fusion=True)
def _apply_kernel(pair, y, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, FUNCTION(tl.load(pair.values + at)) * pair.scale)


_apply_kernel.fn.__module__ = "sparse_tickets.kernels.frame.gpu"


def test_what_is_handed_over_together_keeps_its_names_and_types():
    def apply():
        _apply_kernel[(1,)](_ScaledValues(meta(16), 0.5), meta(16), _double, BLOCK=16)

    (case,) = record([Example("any", apply)], "double")
    assert case.signature == {"pair": _ScaledValues("*fp32:16", "fp32"), "y": "*fp32:16"}
    assert case.constexprs == {"FUNCTION": _double, "BLOCK": 16}
    (of_frame,) = record([Example("any", apply)], "frame")
    assert of_frame == case
    assert list(record([Example("any", apply)], "other")) == []
