"""Conversion keeps the policy: same Parameters, same function, exactly the weights asked for."""

import copy
import doctest
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import polars as pl
import pytest
import torch
import torch.nn.utils.prune as torch_prune
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import sparse_tickets.convert as convert
import sparse_tickets.linear as linear
import sparse_tickets.selection as selection
from sparse_tickets.compaction import Compact, compact
from sparse_tickets.convert import (
    SparsifyWarning,
    densify_,
    from_torch_prune,
    sparsify_,
    to_semi_structured,
)
from sparse_tickets.coverage import summary
from sparse_tickets.linear import SparseLinear
from sparse_tickets.prune import erk_counts
from sparse_tickets.selection import keep_largest
from sparse_tickets.structure import n_m_mask


class ActorCritic(nn.Module):
    """As libraries build it: two bodies from a helper, two heads, orthogonal initialisation."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = create_mlp(4, 2, [16, 16])
        self.critic = create_mlp(4, 1, [16])

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.actor(obs), self.critic(obs)

    def init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight, gain=math.sqrt(2))
                module.bias.data.fill_(0.0)


def create_mlp(inputs: int, outputs: int, hidden: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.Tanh()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


@pytest.fixture
def policy() -> ActorCritic:
    torch.manual_seed(0)
    return ActorCritic()


def sparse_layers(module: nn.Module) -> list[SparseLinear]:
    return [layer for layer in module.modules() if isinstance(layer, SparseLinear)]


def kept(module: nn.Module) -> int:
    return sum(int(layer.mask.sum()) for layer in sparse_layers(module))


def assert_zero_off_masks(module: nn.Module) -> None:
    for layer in sparse_layers(module):
        assert not layer.weight.detach()[~layer.mask].any()


@pytest.mark.parametrize("module", [linear, convert])
def test_docstring_examples(module):
    torch.manual_seed(0)
    names = {"torch": torch, "nn": nn, **vars(convert)}
    assert doctest.testmod(module, extraglobs=names).failed == 0


# sparsify_


@pytest.mark.parametrize("density", [0.0, 0.013, 0.2, 0.5, 1.0])
def test_global_pruning_keeps_exactly_k_of_largest_magnitude(policy, density):
    parameters = list(policy.parameters())
    weights = [p.detach().clone() for p in parameters if p.dim() == 2]
    total = sum(w.numel() for w in weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsifyWarning)
        assert sparsify_(policy, density, scope="global") is policy
    assert len(sparse_layers(policy)) == 5
    assert all(a is b for a, b in zip(parameters, policy.parameters(), strict=True))
    k = math.floor(total * density + 0.5)
    assert kept(policy) == k
    magnitudes = torch.cat([w.abs().flatten() for w in weights]).sort(descending=True).values
    masks = torch.cat([layer.mask.flatten() for layer in sparse_layers(policy)])
    chosen = torch.cat([w.abs().flatten() for w in weights])[masks].sort(descending=True).values
    assert torch.equal(chosen, magnitudes[:k])
    assert_zero_off_masks(policy)


def test_layer_scope_keeps_k_of_each(policy):
    sparsify_(policy, 0.3, scope="layer")
    for layer in sparse_layers(policy):
        assert int(layer.mask.sum()) == math.floor(0.3 * layer.mask.numel() + 0.5)


def test_exclude_by_layer_and_by_module(policy):
    sparsify_(policy, 0.2, exclude=["critic", "actor.4"])
    assert [type(layer) for layer in policy.critic] == [nn.Linear, nn.Tanh, nn.Linear]
    assert type(policy.actor[4]) is nn.Linear
    assert kept(policy) == math.floor(0.2 * (4 * 16 + 16 * 16) + 0.5)


def test_again_prunes_inside_the_masks(policy):
    sparsify_(policy, 0.5)
    before = [layer.mask.clone() for layer in sparse_layers(policy)]
    sparsify_(policy, 0.3)
    for layer, mask in zip(sparse_layers(policy), before, strict=True):
        assert not (layer.mask & ~mask).any()
    count = kept(policy)
    sparsify_(policy, 0.9)
    assert kept(policy) == count


def test_optimizer_and_hooks_of_the_dense_policy_stay_valid(policy):
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1, weight_decay=0.5)
    calls = []
    policy.actor[0].register_forward_hook(lambda *args: calls.append(1))
    held = policy.actor[0]
    train(policy, optimizer)
    sparsify_(policy, 0.2)
    train(policy, optimizer)
    assert isinstance(held, SparseLinear)
    assert held is policy.actor[0]
    assert len(calls) == 6
    assert_zero_off_masks(policy)
    for layer in sparse_layers(policy):
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not optimizer.state[layer.weight][moment][~layer.mask].any()
            assert optimizer.state[layer.weight][moment].any() or not layer.mask.any()


def train(policy: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> float:
    obs = torch.linspace(-1, 1, 32).reshape(8, 4)
    for _ in range(steps):
        logits, value = policy(obs)
        loss = nn.functional.cross_entropy(logits, torch.arange(8) % 2) + value.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(policy.parameters(), 0.5)
        optimizer.step()
    return loss.item()


def test_orthogonal_init_after_sparsify_and_training(policy):
    sparsify_(policy, 0.3)
    policy.init_weights()
    twin = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    first = train(policy, optimizer, steps=1)
    assert_zero_off_masks(policy)
    assert train(policy, optimizer, steps=30) < first
    assert_zero_off_masks(policy)
    twin.load_state_dict(policy.state_dict())
    obs = torch.randn(3, 4)
    torch.testing.assert_close(twin(obs), policy(obs))


def test_one_layer_under_two_names():
    shared = nn.Linear(4, 4)
    module = nn.ModuleDict({"a": nn.Sequential(shared), "b": shared})
    sparsify_(module, 0.5)
    assert module["a"][0] is module["b"] is shared
    assert kept(module) == 8
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(4, 4)})
    module["c"] = module["b"]
    sparsify_(module, 0.5, exclude=["c"])
    assert type(module["b"]) is nn.Linear


def test_two_layers_on_one_weight_count_once():
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    sparsify_(module, 0.5)
    assert torch.equal(module[0].mask, module[1].mask)
    assert int(module[0].mask.sum()) == 8


def test_a_linear_itself_and_subclasses():
    layer = nn.Linear(4, 4)
    assert sparsify_(layer, 0.5) is layer
    assert type(layer) is SparseLinear
    with pytest.warns(UserWarning, match="nested"):  # torch on its own fast path
        attention = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 1, 8), 1)
    sparsify_(attention, 0.5)
    assert len(sparse_layers(attention)) == 2
    assert type(attention.layers[0].self_attn.out_proj) is not SparseLinear


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 1.2}, r"density must be in \[0, 1\], got 1.2"),
        ({"density": 0.5, "scope": "unit"}, "scope must be one of erk, layer, global, got 'unit'"),
        ({"density": 0.5, "exclude": ["actor.9"]}, "exclude must name modules .* got 'actor.9'"),
        ({"density": 0.5, "exclude": ["actor.1"]}, "exclude must name linear .* got 'actor.1'"),
        ({"density": 0.5, "exclude": ["actor", "critic"]}, "exclude must leave a linear layer"),
    ],
)
def test_sparsify_errors_change_nothing(policy, arguments, message):
    with pytest.raises(ValueError, match=message):
        sparsify_(policy, **arguments)
    assert not sparse_layers(policy)


@pytest.mark.parametrize("call", [lambda x: sparsify_(x, 0.5), densify_, from_torch_prune, summary])
def test_what_is_no_module_is_refused(call):
    """As a model of Stable-Baselines3, which holds its policy and is none."""
    model = SimpleNamespace(policy=nn.Linear(2, 2))
    words = r"module must be an nn\.Module, got SimpleNamespace.*integrations\.sb3"
    with pytest.raises(TypeError, match=words):
        call(model)
    assert type(model.policy) is nn.Linear


@pytest.mark.parametrize("density", ["0.5", None])
def test_density_that_is_no_number(policy, density):
    with pytest.raises(TypeError, match="density must be a number, got"):
        sparsify_(policy, density)


def test_sparsify_needs_a_linear_layer_that_owns_its_weight():
    with pytest.raises(ValueError, match=r"must hold an nn\.Linear, got Sequential with none"):
        sparsify_(nn.Sequential(nn.Tanh()), 0.5)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    torch_prune.l1_unstructured(module[1], "weight", amount=0.5)
    with pytest.raises(ValueError, match="layer '1' must own its weight"):
        sparsify_(module, 0.5)
    assert type(module[0]) is nn.Linear


# what a fresh policy keeps, and what a user is told


def fresh_policy(inputs: int = 4, outputs: int = 2) -> nn.Module:
    """As PPO implementations initialise it: orthogonal, the action head 100 times smaller."""
    torch.manual_seed(0)
    policy = nn.Module()
    policy.body = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    policy.head = nn.Linear(64, outputs)
    for layer in (policy.body[0], policy.body[2]):
        nn.init.orthogonal_(layer.weight, 2**0.5)
    nn.init.orthogonal_(policy.head.weight, 0.01)
    return policy


@pytest.mark.parametrize("density", [0.5, 0.2, 0.1, 0.05])
def test_the_default_keeps_every_action_of_a_fresh_policy(density):
    policy = sparsify_(fresh_policy(), density)
    assert kept(policy) == math.floor(density * 4480 + 0.5)
    assert policy.head.mask.any(1).all()
    assert policy.head.density >= density


@pytest.mark.parametrize("density", [0.013, 0.1, 0.33, 0.8, 1.0])
def test_erk_is_exact_and_nested_and_keeps_the_largest_of_each_layer(density):
    policy = fresh_policy()
    sizes = [(0, 64, 4), (0, 64, 64), (0, 2, 64)]
    before = [layer.weight.detach().abs() for layer in (*policy.body[::2], policy.head)]
    sparsify_(policy, 0.9)
    first = [layer.mask.clone() for layer in sparse_layers(policy)]
    sparsify_(policy, density, exclude=[])
    k = math.floor(min(density, 0.9) * 4480 + 0.5)
    assert kept(policy) == k
    for layer, weight, mask, count in zip(
        sparse_layers(policy), before, first, erk_counts(sizes, k), strict=True
    ):
        assert not (layer.mask & ~mask).any()
        assert abs(int(layer.mask.sum()) - count) <= 1
        out = weight[~layer.mask]
        assert not layer.mask.any() or not len(out) or weight[layer.mask].min() >= out.max()


def test_global_scope_names_the_head_that_it_prunes_away():
    with pytest.warns(SparsifyWarning, match="layer 'head' keeps none of its weights.*scope='erk'"):
        sparsify_(fresh_policy(), 0.1, scope="global")


def test_a_dead_row_of_an_output_layer_and_a_broken_path_are_named():
    policy = fresh_policy(outputs=3)
    with torch.no_grad():
        policy.head.weight[1] *= 1e-3
    message = r"rows 1 of output layer 'head' depend on no input"
    with pytest.warns(SparsifyWarning, match=message):
        sparsify_(policy, 0.3, scope="layer")
    chain = nn.Sequential(nn.Linear(2, 2, False), nn.ReLU(), nn.Linear(2, 2, False))
    with torch.no_grad():
        chain[0].weight.copy_(torch.tensor([[1.0, 0.9], [0.0, 0.0]]))
        chain[2].weight.copy_(torch.tensor([[0.0, 0.9], [0.0, 1.0]]))
    with pytest.warns(SparsifyWarning, match="no path reaches through layer '2'"):
        sparsify_(chain, 0.5, scope="layer")


def test_a_residual_block_and_hidden_rows_are_no_cut():
    """Nothing is said of a layer whose inputs are not known, nor of hidden units without inputs."""
    module = nn.Module()
    module.a = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6))
    module.b = nn.Linear(6, 1)
    with torch.no_grad():
        module.a[0].weight[:5] *= 1e-3
        module.a[2].weight[:5] *= 1e-3
        module.b.weight[0, 5] = 1
    sparsify_(module, 0.17, scope="layer")
    assert not module.a[2].mask[:5].any()


@pytest.mark.filterwarnings("ignore::sparse_tickets.convert.SparsifyWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scope", ["erk", "layer", "global"])
def test_magnitudes_are_compared_in_their_own_dtype(dtype, scope):
    """In float64 the larger of two that float32 rounds alike stays, wherever it is."""
    layer = nn.Linear(3000, 100, dtype=dtype)
    with torch.no_grad():
        step = torch.finfo(dtype).eps
        layer.weight.fill_(1.0)
        layer.weight[7, 11] = 1 + step
        layer.weight[99, 2999] = -(1 + 2 * step)
    sparsify_(layer, 2 / 300_000, scope=scope)
    assert layer.mask.nonzero().tolist() == [[7, 11], [99, 2999]]


@pytest.mark.long
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_keep_largest_equals_a_stable_sort(data):
    """Ties, infinities, half precision beside float64, transposed weights, many blocks of rows."""
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    weights, masks = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        out, inp = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 300))
        dtype = data.draw(st.sampled_from([torch.float16, torch.float32, torch.float64]))
        weight = torch.randn(inp, out).mul(4).round().div(4).to(dtype).T
        weight[torch.rand(out, inp) < 0.05] = torch.inf
        weights.append(weight)
        masks.append(torch.rand(out, inp) < data.draw(st.sampled_from([0.1, 0.9, 1.0])))
    inside = torch.cat([mask.flatten() for mask in masks])
    k = data.draw(st.integers(0, len(inside)))
    keys = torch.cat([weight.double().abs().reshape(-1) for weight in weights])
    want = torch.zeros_like(inside)
    want[keys.masked_fill(~inside, -1).argsort(descending=True, stable=True)[:k]] = True
    with mock.patch.object(selection, "_BLOCK", 512):
        got = keep_largest(weights, masks, k)
    assert torch.equal(torch.cat([mask.flatten() for mask in got]), want & inside)
    assert [mask.shape for mask in got] == [weight.shape for weight in weights]


class Conv1D(nn.Module):
    """GPT-2's: a linear layer with a transposed weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))


def language_model() -> nn.Module:
    # Seeded, or now and then a row loses all its inputs, of which sparsify_ warns.
    torch.manual_seed(0)
    module = nn.Module()
    module.wte = nn.Embedding(20, 8)
    module.attn = nn.MultiheadAttention(8, 2)
    module.c_attn = Conv1D(8, 24)
    module.up, module.lm_head = nn.Linear(8, 32), nn.Linear(8, 20, bias=False)
    module.lm_head.weight = module.wte.weight
    return module


def test_a_tied_embedding_is_pruned_only_when_asked():
    module = language_model()
    message = (
        r"layer 'lm_head' .* got that of 'wte' \(Embedding\).*exclude=\['lm_head'\].*tied=True"
    )
    with pytest.raises(ValueError, match=message):
        sparsify_(module, 0.5)
    assert not sparse_layers(module)
    with pytest.warns(SparsifyWarning, match="converted 256 of the module's 704 matrix weights"):
        sparsify_(module, 0.5, exclude=["lm_head"])
    assert type(module.lm_head) is nn.Linear
    assert module.wte.weight.count_nonzero() == 160
    module = language_model()
    sparsify_(module, 0.5, tied=True, exclude=["attn", "c_attn"])
    assert kept(module) == module.lm_head.weight.count_nonzero() + module.up.mask.sum() == 208


@pytest.mark.filterwarnings("ignore::sparse_tickets.convert.SparsifyWarning")
def test_what_is_left_dense_is_logged_and_summarised(caplog):
    module = language_model()
    module.sub = NamedLinear(8, 3)
    with caplog.at_level("INFO", "sparse_tickets"):
        sparsify_(module, 0.25, tied=True, exclude=["up"])
    (line,) = caplog.messages
    assert "converted 1 layers, kept 40 of 160 weights; excluded: up; left dense: 'attn'" in line
    table = {matrix.name: matrix for matrix in summary(module).matrices}
    assert list(table) == ["lm_head", "attn", "attn.out_proj", "c_attn", "up", "sub"]
    assert table["lm_head"].dense is None
    assert (table["lm_head"].kept, table["lm_head"].weights) == (40, 160)
    assert table["up"].dense == "not converted"
    assert "attention" in table["attn"].dense
    assert "subclass" in table["attn.out_proj"].dense
    assert "subclass" in table["sub"].dense
    assert table["c_attn"].dense == "not an nn.Linear"
    lines = str(summary(module)).splitlines()
    assert lines[4].split() == [
        "c_attn",
        "Conv1D",
        "8",
        "x",
        "24",
        "192",
        "of",
        "192",
        "dense:",
        "not",
        "an",
        "nn.Linear",
    ]
    assert lines[-1].startswith("density 0.8649 over 888 weights, 18% of them in sparse layers")


class NamedLinear(nn.Linear):
    pass


def test_excluding_what_is_no_linear_layer_silences_the_warning():
    module = nn.Sequential(nn.Embedding(50, 4), nn.Linear(4, 4))
    sparsify_(module, 1.0, exclude=["0"])
    with pytest.warns(SparsifyWarning, match=r"left dense: '0' \(Embedding 50x4\)"):
        sparsify_(module, 1.0)


def test_parametrized_layers_in_a_summary():
    module = nn.Sequential(spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    sparsify_(module, 1.0, exclude=["0"])
    (first, second) = summary(module).matrices
    assert (first.name, first.dense) == ("0", "recomputed by a parametrization")
    assert second.dense is None


def broken(kind: str) -> nn.Module:
    """A module whose second layer cannot be converted."""
    layer = nn.Linear(4, 4)
    if kind == "lazy":
        layer = nn.LazyLinear(4)
    elif kind == "parametrized":
        layer = spectral_norm(layer)
    elif kind == "weight_norm":
        layer = weight_norm(layer)
    elif kind == "meta":
        layer = nn.Linear(4, 4, device="meta")
    elif kind == "complex":
        layer = nn.Linear(4, 4, dtype=torch.complex64)
    elif kind == "integer":
        layer.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int32), requires_grad=False)
    elif kind == "NaN":
        layer.weight.data[1, 2] = torch.nan
    elif kind == "inference":
        with torch.inference_mode():
            layer = nn.Linear(4, 4)
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(layer), nn.Linear(4, 4))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("lazy", "has seen no input: run one batch"),
        ("parametrized", "remove_parametrizations"),
        ("weight_norm", "remove_parametrizations"),
        ("meta", "on the meta device: sparsify after"),
        ("complex", "got torch.complex64: convert or exclude"),
        ("integer", "got torch.int32: convert or exclude"),
        ("NaN", "without NaN"),
        ("inference", "got an inference tensor: build the module outside"),
    ],
)
def test_refusals_name_the_layer_and_come_before_the_first_change(kind, message):
    module = broken(kind)
    layers = module[0], module[2]
    values = [layer.weight.detach().clone() for layer in layers]
    with pytest.raises(ValueError, match=f"layer '1.0' must .*{message}"):
        sparsify_(module, 0.5)
    assert not sparse_layers(module)
    assert all(
        torch.equal(a.weight, b) for a, b in zip((module[0], module[2]), values, strict=True)
    )
    sparsify_(module, 1.0, exclude=["1"])
    assert len(sparse_layers(module)) == 2


def test_conversion_under_inference_mode_makes_plain_masks():
    module = nn.Sequential(nn.Linear(4, 400), nn.Linear(400, 4))
    with torch.inference_mode():
        sparsify_(module, 0.5)
    assert not module[0].mask.is_inference()
    module(torch.ones(2, 4)).sum().backward()
    sparsify_(module, 0.25)
    assert kept(module) == 800


PEAK = """
import sys, torch
from torch import nn
from sparse_tickets.convert import sparsify_

def high_water():
    status = open("/proc/self/status").read()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])

width = int(sys.argv[1])
sparsify_(nn.Sequential(nn.Linear(width, width)), 0.3, scope=sys.argv[2])  # warm
module = nn.Sequential(*(nn.Linear(width, width) for _ in range(int(sys.argv[3]))))
size = sum(p.numel() * p.element_size() for p in module.parameters())
open("/proc/self/clear_refs", "w").write("5")  # the mark falls to what is used now
before = high_water()
sparsify_(module, 0.1, scope=sys.argv[2])
print(1 + (high_water() - before) / size)
"""


@pytest.mark.long
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("width", "layers", "scope"),
    [
        (1024, 4, "erk"),
        (1024, 4, "global"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (3072, 1, "global"),
                (3072, 1, "erk"),
                (2048, 6, "erk"),
                (2048, 6, "global"),
            ]
        ),
    ],
)
def test_memory_at_the_peak_is_at_most_twice_the_parameters(width, layers, scope):
    """In a process of its own, as the operating system counts it: 24 to 100 MB."""
    command = [sys.executable, "-c", PEAK, str(width), scope, str(layers)]
    # Freed memory goes back at once, instead of being kept for the next allocation.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    run = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=120, env=environment
    )
    assert 1.2 < float(run.stdout) < 2.0


# densify_, from_torch_prune


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


# compact


ACTIVATIONS = [
    nn.Tanh(),
    nn.ReLU(inplace=True),
    nn.Sigmoid(),
    nn.Softplus(),
    nn.ELU(),
    nn.GELU(),
    nn.PReLU(),
    nn.Identity(),
]


def random_stack(seed: int, density: float, bias: bool, sparse: bool = True) -> nn.Sequential:
    """A stack with weights so rare that dead inputs, dead units and constants all occur."""
    torch.manual_seed(seed)
    activation = ACTIVATIONS[seed % len(ACTIVATIONS)]
    module = nn.Sequential(
        nn.Linear(9, 12, bias=bias),
        activation,
        nn.Sequential(nn.Linear(12, 11, bias=bias), nn.Tanh(), activation),
        nn.Linear(11, 7, bias=bias),
        nn.Linear(7, 3, bias=bias),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SparsifyWarning)
        sparsify_(module, density, scope="global")
    return module if sparse else densify_(module)


def assert_minimal(small: Compact) -> None:
    """Every unit has a path of weights in and out; every kept input a path out."""
    layers = [layer for layer in small.net if isinstance(layer, nn.Linear)]
    for index, layer in enumerate(layers):
        assert type(layer) is nn.Linear
        support = layer.weight != 0
        if layer.weight.shape[1]:
            assert support.any(0).all()
            assert index == len(layers) - 1 or support.any(1).all()
    assert layers[0].in_features == small.kept_inputs.numel()


@pytest.mark.long
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10_000),
    density=st.sampled_from([0.0, 0.01, 0.03, 0.08, 0.15, 0.4, 1.0]),
    bias=st.booleans(),
    sparse=st.booleans(),
)
def test_compact_equals_the_original(seed, density, bias, sparse):
    module = random_stack(seed, density, bias, sparse)
    small = compact(module)
    for shape in [(9,), (5, 9), (2, 3, 9), (0, 9)]:
        x = torch.randn(shape)
        torch.testing.assert_close(small(x), module(x), rtol=1e-5, atol=1e-5)
    assert_minimal(small)
    if density == 1:
        assert small.kept_inputs.tolist() == list(range(9))


def test_compact_folds_constants_and_drops_what_is_dead():
    """Input 1 is dead, unit 0 constant, unit 1 has no reader: unit 2 alone remains."""
    module = nn.Sequential(
        SparseLinear(3, 3, mask=torch.tensor([[0, 0, 0], [0, 1, 0], [1, 0, 1]]).bool()),
        nn.Tanh(),
        SparseLinear(3, 2, mask=torch.tensor([[1, 0, 1], [1, 0, 0]]).bool()),
    )
    small = compact(module)
    assert small.kept_inputs.tolist() == [0, 2]
    assert [tuple(p.shape) for p in small.net.parameters()] == [(1, 2), (1,), (2, 1), (2,)]
    constant = module[0].bias[0].tanh()
    want = module[2].bias + module[2].weight[:, 0] * constant
    torch.testing.assert_close(small.net[2].bias, want)
    assert "kept_inputs=2/3" in repr(small)


def test_compact_cascades():
    """A unit whose only source is a constant is one too; so is an input read by a dead unit."""
    first = torch.tensor([[1, 0], [0, 0]]).bool()
    second = torch.tensor([[0, 1], [1, 0]]).bool()
    third = torch.tensor([[1, 0]]).bool()
    module = nn.Sequential(
        SparseLinear(2, 2, mask=first),
        nn.Tanh(),
        SparseLinear(2, 2, mask=second),
        nn.Tanh(),
        SparseLinear(2, 1, mask=third),
        nn.Softmax(-1),
    )
    small = compact(module)
    assert small.kept_inputs.numel() == 0
    assert [type(layer) for layer in small.net] == [nn.Linear, nn.Softmax]
    x = torch.randn(4, 2)
    torch.testing.assert_close(small(x), module(x))


def test_compact_with_everything_pruned_without_biases():
    module = sparsify_(nn.Sequential(nn.Linear(4, 8, bias=False), nn.Sigmoid()), 0.0)
    torch.testing.assert_close(compact(module)(torch.ones(2, 4)), torch.full((2, 8), 0.5))
    module = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Sigmoid(), nn.Linear(8, 2, bias=False))
    module[0].weight.data.zero_()
    x = torch.randn(3, 4)
    small = compact(module)
    torch.testing.assert_close(small(x), module(x))
    assert small.net[-1].bias is not None


def test_compact_keeps_a_zero_weight_under_the_mask():
    module = nn.Sequential(SparseLinear(3, 2))
    nn.init.zeros_(module[0].weight)
    assert compact(module).kept_inputs.tolist() == [0, 1, 2]
    assert compact(densify_(module)).kept_inputs.numel() == 0


def test_compact_is_a_copy_that_trains_saves_and_compiles():
    module = random_stack(0, 0.2, bias=True)
    before = copy.deepcopy(module.state_dict())
    small = compact(module)
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    small(torch.randn(5, 9)).sum().backward()
    optimizer.step()
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    twin = copy.deepcopy(small)
    twin.load_state_dict(small.state_dict())
    x = torch.randn(5, 9)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), small(x))
    with pytest.raises(ValueError, match=r"input must have shape \[\.\.\., 9\]"):
        small(torch.ones(8))


def test_compact_activation_before_the_first_layer_and_own_activation():
    class Sine(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin()

    module = nn.Sequential(nn.Tanh(), nn.Linear(6, 6), Sine(), nn.Linear(6, 2))
    sparsify_(module, 0.15)
    with pytest.raises(TypeError, match="got Sine"):
        compact(module)
    x = torch.randn(5, 6)
    torch.testing.assert_close(compact(module, elementwise=(Sine,))(x), module(x))


def test_compact_errors():
    with pytest.raises(TypeError, match=r"must be an nn\.Sequential, got Linear"):
        compact(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="must hold a linear layer"):
        compact(nn.Sequential(nn.Tanh()))
    for module in (nn.LayerNorm(2), nn.Softmax(-1), nn.PReLU(2), nn.Dropout()):
        with pytest.raises(TypeError, match=f"got {type(module).__name__}"):
            compact(nn.Sequential(nn.Linear(2, 2), module, nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="matching widths"):
        compact(nn.Sequential(nn.Linear(2, 3), nn.Linear(2, 2)))


def test_compact_stays_on_its_device():
    """Whatever it makes, it makes where the module is: nothing lands on the default device."""
    module = random_stack(0, 0.2, True)
    x = torch.randn(5, module[0].in_features)
    with torch.device("meta"):
        small = compact(module)
    assert {t.device.type for t in (*small.parameters(), *small.buffers())} == {"cpu"}
    torch.testing.assert_close(small(x), module(x))


# to_semi_structured


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


def test_the_default_scope_is_what_the_experiment_says():
    path = Path(__file__).parents[2] / "experiments" / "results" / "sparsify_default.parquet"
    runs = pl.read_parquet(path).filter(pl.col("share").is_in(["erk", "layer", "global"]))
    cells = runs.group_by("system", "density", "share").agg(pl.col("return_final").mean())
    best = cells.sort("return_final").group_by("system", "density").last()
    found = {(row["system"], row["density"]): row["share"] for row in best.to_dicts()}
    others = {cell: share for cell, share in found.items() if share != "erk"}
    assert len(found) == 16
    assert others == {("SB3 DQN, CartPole", 0.5): "layer"}
    seeds = runs.group_by("system", "density", "share").agg(pl.col("seed").n_unique())
    assert set(seeds["seed"]) == {5}
