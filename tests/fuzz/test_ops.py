"""Every op on drawn sizes with several things wrong at once: right, or refused by name."""

import bad_input
import pytest
import torch
from fuzzing import drawn
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def other_dtype(tensor, draw):
    known = bad_input.OTHER_DTYPES.get(tensor.dtype)
    return tensor.to(draw(st.sampled_from(known))) if known else tensor


def other_shape(tensor, draw):
    if tensor.dim() == 0 or 0 in tensor.shape:
        return tensor[None]
    return draw(st.sampled_from(list(bad_input.other_shapes(tensor)))).contiguous()


def columns_first(tensor, draw):
    return bad_input.columns_first(tensor)


def gapped(tensor, draw):
    """The same numbers, with others between them."""
    if tensor.dim() == 0:
        return tensor
    axis = draw(st.integers(0, tensor.dim() - 1))
    return tensor.repeat_interleave(2, axis).index_select(
        axis, torch.arange(2 * tensor.shape[axis])
    )[(slice(None),) * axis + (slice(None, None, 2),)]


def repeated(tensor, draw):
    """One row for all tickets, in one place."""
    return tensor[:1].expand_as(tensor) if tensor.dim() and tensor.shape[0] else tensor


def offset(tensor, draw):
    """Not where an allocation begins."""
    flat = torch.cat([tensor.reshape(-1)[:1], tensor.reshape(-1)])
    return flat[min(1, tensor.numel()) :].reshape(tensor.shape)


def far_integers(tensor, draw):
    """Indices, counts and keys beyond anything that fits."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        return tensor
    return tensor + draw(st.sampled_from((-1, 3, 1 << 20, -(1 << 20))))


SPOILS = (other_dtype, other_shape, columns_first, gapped, repeated, offset, far_integers)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", bad_input.CASES)
@drawn(2)
@given(data=st.data())
def test_op(name, backend, data):
    draw = data.draw
    sizes = draw(st.integers(1, 5)), draw(st.integers(0, 9)), draw(st.sampled_from((0, 0.3, 1)))
    case = bad_input.CASES[name]
    tensors = case.make(*sizes)
    for argument in draw(st.lists(st.sampled_from(sorted(tensors)), max_size=3)):
        spoil = draw(st.sampled_from(SPOILS))
        # What is written and lies in one place for several is refused, not compared.
        if not (argument in case.written and spoil is repeated):
            tensors[argument] = spoil(tensors[argument], draw)
    bad_input.assert_right_or_refused(name, backend, tensors, tolerance=1e-2)
