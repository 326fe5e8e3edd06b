"""Back to dense, from `torch.nn.utils.prune`, and 2:4 packing."""

import copy
import math

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from converting import (
    ActorCritic,
    random_stack,
    train,
)
from sparse_layers import sparse_layers
from torch import nn

import sparse_tickets.convert as convert
from sparse_tickets.compaction import compact
from sparse_tickets.convert import (
    densify_,
    from_torch_prune,
    sparsify_,
    to_semi_structured,
)
from sparse_tickets.linear import SparseLinear
from sparse_tickets.structure import n_m_mask


def test_densify_is_plain_and_equal(policy):
    parameters = list(policy.parameters())
    obs = torch.randn(5, 4)
    sparsify_(policy, 0.3)
    policy.init_weights()
    want = policy(obs)
    assert densify_(policy) is policy
    assert not sparse_layers(policy)
    assert type(policy.actor[0]) is nn.Linear
    assert all(a is b for a, b in zip(parameters, policy.parameters(), strict=True))
    assert set(policy.state_dict()) == set(ActorCritic().state_dict())
    torch.testing.assert_close(policy(obs), want)
    assert kept_nonzero(policy) == math.floor(0.3 * 432 + 0.5)
    train(policy, torch.optim.Adam(policy.parameters()))
    assert kept_nonzero(policy) > math.floor(0.3 * 432 + 0.5)


def kept_nonzero(policy: nn.Module) -> int:
    return sum(int(p.count_nonzero()) for p in policy.parameters() if p.dim() == 2)


def test_from_torch_prune(policy):
    weight = policy.actor[0].weight
    targets = [(policy.actor[0], "weight"), (policy.actor[2], "weight")]
    torch_prune.global_unstructured(targets, torch_prune.L1Unstructured, amount=0.6)
    torch_prune.random_unstructured(policy.actor[2], "weight", amount=0.5)
    obs = torch.randn(5, 4)
    want = policy(obs)
    masks = [layer.weight_mask.bool() for layer, _ in targets]
    assert from_torch_prune(policy) is policy
    assert policy.actor[0].weight is weight
    for (layer, _), mask in zip(targets, masks, strict=True):
        assert type(layer) is SparseLinear
        assert torch.equal(layer.mask, mask)
        assert not layer._forward_pre_hooks
    assert type(policy.actor[4]) is nn.Linear
    torch.testing.assert_close(policy(obs), want)
    copy.deepcopy(policy)


def test_from_torch_prune_errors():
    with pytest.raises(ValueError, match=r"torch\.nn\.utils\.prune has pruned"):
        from_torch_prune(nn.Sequential(nn.Linear(4, 4)))
    module = nn.Sequential(nn.Linear(4, 4))
    torch_prune.l1_unstructured(module[0], "weight", amount=0.5)
    torch_prune.l1_unstructured(module[0], "bias", amount=0.5)
    with pytest.raises(ValueError, match="layer '0' must have an unpruned bias"):
        from_torch_prune(module)
    module = nn.Sequential(torch_prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5))
    with torch.inference_mode():
        module.append(torch_prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5))
    with pytest.raises(ValueError, match="layer '1' must have a weight that can be written"):
        from_torch_prune(module)
    assert type(module[0]) is nn.Linear


def test_compact_stays_on_its_device():
    """Whatever it makes, it makes where the module is: nothing lands on the default device."""
    module = random_stack(0, 0.2, True)
    x = torch.randn(5, module[0].in_features)
    with torch.device("meta"):
        small = compact(module)
    assert {t.device.type for t in (*small.parameters(), *small.buffers())} == {"cpu"}
    torch.testing.assert_close(small(x), module(x))


def two_of_four(inputs: int, outputs: int, seed: int = 0) -> SparseLinear:
    torch.manual_seed(seed)
    layer = SparseLinear(inputs, outputs)
    return layer.set_mask_(n_m_mask(layer.weight.detach().abs(), 2, 4))


@pytest.fixture
def packing(monkeypatch):
    """As on a GPU: torch's CUTLASS packing and unpacking, which are plain torch operations."""
    from torch.sparse._semi_structured_conversions import (
        sparse_semi_structured_from_dense_cutlass,
        sparse_semi_structured_to_dense_cutlass,
    )

    packed = []

    def pack(weight: torch.Tensor) -> torch.Tensor:
        values, places = sparse_semi_structured_from_dense_cutlass(weight)
        assert values.numel() == weight.numel() // 2
        packed.append(values)
        return sparse_semi_structured_to_dense_cutlass(values, places)

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", pack)
    check = convert._check_semi_structured

    def check_elsewhere(name: str, layer: SparseLinear, dtype: torch.dtype) -> None:
        with pytest.raises(ValueError, match="must be on a CUDA device"):
            check(name, layer, dtype)

    monkeypatch.setattr(convert, "_check_semi_structured", check_elsewhere)
    return packed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_semi_structured_packs_what_the_mask_keeps(packing, dtype):
    first, second = two_of_four(64, 32), two_of_four(32, 64)
    module = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), SparseLinear(64, 2))
    result = to_semi_structured(module, dtype=dtype, exclude=["4"])
    assert [type(layer) for layer in result] == [
        nn.Linear,
        nn.Tanh,
        nn.Linear,
        nn.Tanh,
        SparseLinear,
    ]
    assert len(packing) == 2
    for new, old in zip(result[::2], module[::2], strict=True):
        assert torch.equal(new.weight, old.weight.to(dtype))
        assert torch.equal(new.bias, old.bias.to(dtype))
    assert not any(p.requires_grad or p.dtype != dtype for p in result.parameters())
    # The module itself is as it was.
    assert isinstance(module[0], SparseLinear)
    assert module[0].weight.requires_grad
    assert module[0].weight.dtype == torch.float32
    x = torch.randn(3, 64)
    torch.testing.assert_close(result(x.to(dtype)).float(), module(x), rtol=0.05, atol=0.05)


def test_semi_structured_takes_a_layer_and_packs_a_shared_weight_once(packing):
    layer = two_of_four(32, 32)
    assert type(to_semi_structured(layer)) is nn.Linear
    other = SparseLinear.from_linear(layer)
    result = to_semi_structured(nn.Sequential(layer, other))
    assert len(packing) == 2
    assert result[0].weight is result[1].weight


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (lambda: two_of_four(64, 32), {"dtype": torch.float32}, "dtype must be torch.float16 or"),
        (lambda: nn.Linear(4, 4), {}, "module must hold a SparseLinear to convert, got none"),
        (lambda: two_of_four(64, 32), {}, r"layer '' must be on a CUDA device, got cpu"),
        (lambda: two_of_four(64, 30), {}, r"positive multiple of \d+ x \d+ \(out x in\).*30 x 64"),
        (lambda: two_of_four(4, 32), {}, "got 32 x 4; exclude it to leave it as it is"),
        (lambda: SparseLinear(64, 32), {}, "at most 2 of every 4 neighbouring inputs, got 4"),
        (
            lambda: nn.Sequential(two_of_four(64, 32), SparseLinear(64, 32).prune_(0.5)),
            {"exclude": ["0"]},
            "layer '1' must keep at most 2 of every 4",
        ),
        (
            lambda: nn.Sequential(two_of_four(64, 32)),
            {"exclude": ["1"]},
            "exclude must name modules among",
        ),
    ],
)
def test_semi_structured_errors(module, arguments, message):
    with pytest.raises(ValueError, match=message):
        to_semi_structured(module(), **arguments)


def test_a_layer_in_several_places_is_converted():
    """Used twice by a sequence, or registered before the layer that it reads."""
    shared = nn.Linear(8, 8)
    twice = sparsify_(nn.Sequential(shared, nn.Tanh(), shared), 0.5)
    assert twice[0] is twice[2]
    assert twice[0].density == 0.5

    class Policy(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 2)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), self.head)

    policy = sparsify_(Policy(), 0.5)
    assert policy.head is policy.net[2]
    assert isinstance(policy.head, SparseLinear)
