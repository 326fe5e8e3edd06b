"""2:4 export and compaction where they are used: on an NVIDIA GPU."""

import copy

import pytest
import torch
from torch import nn

from sparse_tickets.compaction import compact
from sparse_tickets.convert import sparsify_, to_semi_structured
from sparse_tickets.linear import SparseLinear
from sparse_tickets.structure import n_m_mask

pytestmark = pytest.mark.gpu


def two_of_four(inputs: int, outputs: int) -> SparseLinear:
    layer = SparseLinear(inputs, outputs, device="cuda")
    return layer.set_mask_(n_m_mask(layer.weight.detach().abs(), 2, 4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_semi_structured_equals_the_policy(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    policy = nn.Sequential(
        two_of_four(128, 256), nn.ReLU(), two_of_four(256, 128), nn.Linear(128, 5)
    )
    policy = policy.cuda()
    small = to_semi_structured(policy, dtype=dtype)
    assert isinstance(small[0].weight, torch.sparse.SparseSemiStructuredTensor)
    assert torch.equal(small[0].weight.to_dense(), policy[0].weight.to(dtype))
    x = torch.randn(64, 128, device="cuda")
    expected = copy.deepcopy(policy).double()(x.double())
    actual = small(x.to(dtype)).double()
    # Three products, each rounding factors and result.
    unit = torch.finfo(dtype).eps
    assert ((actual - expected).abs().max() <= 20 * unit * expected.abs().max()).item()


def test_semi_structured_takes_one_row() -> None:
    """Torch pads batches that its kernels do not take."""
    layer = two_of_four(128, 256)
    row = torch.randn(1, 128, device="cuda", dtype=torch.float16)
    expected = layer(row.float())
    torch.testing.assert_close(
        to_semi_structured(layer)(row).float(), expected, rtol=1e-2, atol=1e-2
    )


def test_compact_on_a_gpu() -> None:
    torch.manual_seed(0)
    policy = nn.Sequential(
        SparseLinear(40, 256), nn.Tanh(), SparseLinear(256, 256), nn.Tanh(), SparseLinear(256, 4)
    ).cuda()
    sparsify_(policy, density=0.005)
    small = compact(policy)
    assert {t.device.type for t in (*small.parameters(), *small.buffers())} == {"cuda"}
    assert small.net[0].out_features < 256
    x = torch.randn(33, 40, device="cuda")
    torch.testing.assert_close(small(x), policy(x), rtol=1e-4, atol=1e-5)
