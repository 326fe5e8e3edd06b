"""`SparseLinear` in state dicts, copies, other dtypes, transforms, compilers and DDP."""

import copy
import pickle
import shutil

import pytest
import torch
import torch.nn.functional as F
from sparse_layers import (
    OPTIMIZERS,
    assert_zero_off_mask,
    clone_by_torch_save,
    dense_twin,
    pruned_layer,
    train,
)
from torch import nn

from sparse_tickets import hooks
from sparse_tickets.linear import SparseLinear


def test_a_dense_state_that_loses_nothing_loads_strictly():
    layer, dense = pruned_layer(), nn.Linear(6, 5)
    mask = layer.mask.clone()
    with torch.no_grad():
        dense.weight.mul_(mask)
    nn.Sequential(layer).load_state_dict(nn.Sequential(dense).state_dict(), strict=True)
    assert torch.equal(layer.mask, mask)
    assert torch.equal(layer.weight, dense.weight)
    unpruned = SparseLinear(6, 5)
    unpruned.load_state_dict(nn.Linear(6, 5).state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": dense.bias}, strict=True)


def test_a_dense_state_that_loses_weights_is_refused_strictly():
    layer, dense = pruned_layer(), nn.Linear(6, 5)
    mask = layer.mask.clone()
    with pytest.raises(RuntimeError, match=r"0\.mask \(.* 18 weights .*strict=False.*densify_"):
        nn.Sequential(layer).load_state_dict(nn.Sequential(dense).state_dict())
    missing = (
        nn.Sequential(layer)
        .load_state_dict(nn.Sequential(dense).state_dict(), strict=False)
        .missing_keys
    )
    assert missing == ["0.mask"]
    assert torch.equal(layer.mask, mask)
    assert torch.equal(layer.weight, dense.weight * mask)


@pytest.mark.parametrize("assign", [False, True])
def test_sparse_state_dict_round_trip(assign):
    layer, other = pruned_layer(), SparseLinear(6, 5)
    optimizer = torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.5)
    state = copy.deepcopy(layer.state_dict())
    other.load_state_dict(state, strict=True, assign=assign)
    assert torch.equal(other.mask, layer.mask)
    assert torch.equal(other.weight, layer.weight)
    if assign:
        optimizer = torch.optim.AdamW(other.parameters(), lr=0.1, weight_decay=0.5)
    train(other, optimizer)
    assert_zero_off_mask(other, optimizer)


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), clone_by_torch_save],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_are_independent_and_keep_the_invariant(clone):
    layer = pruned_layer()
    train(layer, torch.optim.Adam(layer.parameters()), steps=1)
    other = clone(layer)
    assert torch.equal(other.mask, layer.mask)
    assert other.mask is not layer.mask
    x = torch.randn(3, 6)
    torch.testing.assert_close(other(x), layer(x))
    optimizer = OPTIMIZERS["sgd-momentum"](other.parameters())
    train(other, optimizer)
    assert_zero_off_mask(other, optimizer)
    other.prune_(0.1)
    assert layer.density == 0.4


def test_unpickled_in_a_fresh_process_registers_the_hook(monkeypatch):
    data = pickle.dumps(pruned_layer())
    monkeypatch.setattr(hooks, "_hook", None)
    monkeypatch.setattr(hooks, "_owners", {})
    layer = pickle.loads(data)
    handle = hooks._hook
    try:
        assert handle is not None
        assert layer in hooks._owners[id(layer.weight)]
    finally:
        handle.remove()


def test_polyak_target_and_sequential_use():
    online = nn.Sequential(pruned_layer(), nn.Tanh())
    target = copy.deepcopy(online)
    with torch.no_grad():
        for slow, fast in zip(target.parameters(), online.parameters(), strict=True):
            slow.lerp_(fast + 1, 0.5)
    x = torch.randn(3, 6)
    want = F.linear(x, target[0].weight * target[0].mask, target[0].bias).tanh()
    torch.testing.assert_close(target(x), want)


def test_autocast(layer):
    twin = dense_twin(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.5)
    x = torch.randn(32, layer.in_features)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = layer(x), twin(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    ours.float().square().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    optimizer.step()
    assert_zero_off_mask(layer, optimizer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype):
    layer = pruned_layer().to(dtype)
    twin = dense_twin(layer).to(dtype)
    x = torch.randn(4, 6, dtype=dtype)
    torch.testing.assert_close(layer(x), twin(x))
    layer(x).sum().backward()
    assert_zero_off_mask(layer)


def test_functional_call_and_grad(layer):
    x = torch.randn(32, layer.in_features)
    foreign = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    want = F.linear(x, foreign["weight"] * layer.mask, foreign["bias"])
    torch.testing.assert_close(torch.func.functional_call(layer, foreign, (x,)), want)

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    def masked(parameters):
        weight = parameters["weight"] * layer.mask
        return F.linear(x, weight, parameters["bias"]).square().sum()

    ours, theirs = torch.func.grad(loss)(foreign), torch.func.grad(masked)(foreign)
    torch.testing.assert_close(ours, theirs)
    own = dict(layer.named_parameters())
    torch.testing.assert_close(torch.func.grad(loss)(own), torch.func.grad(masked)(own))
    twin = dense_twin(layer)
    for transform in (torch.func.vmap, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(transform(layer)(x[:2]), transform(twin)(x[:2]))


def test_ensemble_by_vmap():
    layers = [pruned_layer(0.4, seed) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(4, 6)

    def call(parameters, buffers):
        return torch.func.functional_call(layers[0], (parameters, buffers), (x,))

    want = torch.stack([layer(x) for layer in layers])
    torch.testing.assert_close(torch.func.vmap(call)(parameters, buffers), want)


def test_compiled_functorch():
    torch._dynamo.reset()
    layer = pruned_layer()

    def sensitivity(x):
        return torch.func.grad(lambda x: layer(x).square().sum())(x)

    x = torch.randn(3, 6)
    compiled = torch.compile(sensitivity, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), sensitivity(x))


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        assert SparseLinear(6, 5)(torch.ones(3, 6)).shape == (3, 5)


def test_compile_fullgraph_and_no_recompile_over_levels():
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    layer = SparseLinear(48, 40)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.05, weight_decay=0.5)
    x = torch.randn(32, 48)
    compiled(x).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for level in range(22):
            layer.prune_(0.8**level)
            optimizer.zero_grad()
            y = compiled(x)
            torch.testing.assert_close(y, dense_twin(layer)(x))
            y.square().sum().backward()
            assert_zero_off_mask(layer)
            optimizer.step()
            assert_zero_off_mask(layer, optimizer)
        nn.init.orthogonal_(layer.weight)
        torch.testing.assert_close(compiled(x), dense_twin(layer)(x))
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_compile_inductor():
    torch._dynamo.reset()
    layer = pruned_layer()
    compiled = torch.compile(nn.Sequential(layer, nn.Tanh()), fullgraph=True)
    x = torch.randn(4, 6)
    y = compiled(x)
    torch.testing.assert_close(y, dense_twin(layer)(x).tanh())
    y.sum().backward()
    assert_zero_off_mask(layer)


def test_compiled_mask_change_between_forward_and_backward_raises():
    torch._dynamo.reset()
    layer = pruned_layer()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(3, 6))
    layer.prune_(0.2)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()


def test_compiled_optimizer_step():
    torch._dynamo.reset()
    layer = SparseLinear(6, 5)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    train(layer, optimizer, steps=1)
    layer.prune_(0.4)
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(2):
        optimizer.zero_grad()
        layer(torch.randn(7, 6)).square().sum().backward()
        step()
        assert_zero_off_mask(layer, optimizer)


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    layer = pruned_layer()
    x = torch.randn(4, 6)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(
        nn.Sequential(layer, nn.Tanh()), (x,), dynamic_shapes=({0: batch},), strict=strict
    )
    for rows in (4, 9):
        x = torch.randn(rows, 6)
        torch.testing.assert_close(program.module()(x), dense_twin(layer)(x).tanh())


def test_ddp(tmp_path):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        layer = pruned_layer()
        mask = layer.mask
        parallel = DistributedDataParallel(layer)
        optimizer = torch.optim.AdamW(parallel.parameters(), lr=0.1, weight_decay=0.5)
        train(parallel, optimizer)
        layer.prune_(0.2)
        train(parallel, optimizer)
        assert_zero_off_mask(layer, optimizer)
        assert layer.mask is mask
        assert layer.density == 0.2
    finally:
        dist.destroy_process_group()
