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
from converting import train
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_layers import kept, sparse_layers
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

import sparse_tickets.convert as convert
import sparse_tickets.linear as linear
import sparse_tickets.selection as selection
from sparse_tickets.convert import (
    SparsifyWarning,
    densify_,
    from_torch_prune,
    sparsify_,
)
from sparse_tickets.coverage import summary
from sparse_tickets.linear import SparseLinear
from sparse_tickets.selection import keep_largest


def assert_zero_off_masks(module: nn.Module) -> None:
    for layer in sparse_layers(module):
        assert not layer.weight.detach()[~layer.mask].any()


@pytest.mark.parametrize("module", [linear, convert])
def test_docstring_examples(module):
    torch.manual_seed(0)
    names = {"torch": torch, "nn": nn, **vars(convert)}
    assert doctest.testmod(module, extraglobs=names).failed == 0


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
