"""Sequences whose layers run as one, and all that must make them run one by one."""

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from sparse_layers import written_meanwhile
from torch import nn

from sparse_tickets import densify_, sparsify_
from sparse_tickets.kernels.policy import native
from sparse_tickets.runs import Run, find_runs
from sparse_tickets.sequential import Chain, SparseSequential


def make(density=0.4, activation=nn.Tanh, seed=0) -> nn.Sequential:
    torch.manual_seed(seed)
    policy = nn.Sequential(
        nn.Linear(4, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 2)
    )
    return sparsify_(policy, density)


def truth(policy: nn.Module, x: torch.Tensor) -> torch.Tensor:
    for module in policy:
        if isinstance(module, nn.Linear):
            weight = torch.where(module.mask, module.weight, 0).double()
            x = nn.functional.linear(x.double(), weight, module.bias.double())
        else:
            x = module(x)
    return x


@pytest.fixture(autouse=True, params=["C++", "Python"])
def node(request, monkeypatch):
    """Calls go by either node of autograd."""
    native.start()
    if request.param == "Python":
        monkeypatch.setattr(native, "module", None)


@pytest.fixture
def fused(monkeypatch):
    """Counts the calls that kernels took whole."""
    calls = []
    original = Run._fused

    def count(self, input):
        output = original(self, input)
        if output is not None:
            calls.append(tuple(input.shape))
        return output

    monkeypatch.setattr(Run, "_fused", count)
    return calls


def test_only_the_class_changes():
    plain = nn.Sequential(OrderedDict(body=nn.Linear(4, 8), act=nn.ReLU(), head=nn.Linear(8, 2)))
    inside = list(plain)
    names = list(plain.state_dict())
    assert sparsify_(plain, 0.5) is plain
    assert type(plain) is SparseSequential
    assert isinstance(plain, nn.Sequential)
    assert list(plain) == inside
    assert plain.head is inside[2]
    assert len(plain[:2]) == 2
    assert set(names) < set(plain.state_dict())
    densify_(plain)
    assert type(plain) is nn.Sequential
    assert list(plain.state_dict()) == names


@pytest.mark.parametrize("shape", [(4,), (1, 4), (3, 4), (0, 4), (64, 4), (2, 5, 4)])
@pytest.mark.parametrize("grad", [False, True])
def test_one_call_for_any_batch(fused, shape, grad):
    policy, x = make(), torch.randn(shape)
    with torch.set_grad_enabled(grad):
        output = policy(x)
    assert fused == [shape]
    torch.testing.assert_close(output.double(), truth(policy, x), atol=1e-6, rtol=1e-5)
    assert output.requires_grad == grad


@pytest.mark.parametrize("grad", [False, True])
def test_negative_views(grad):
    policy, x = make(), torch.randn(5, 4)
    with torch.set_grad_enabled(grad):
        policy(x)
        output = policy(torch._neg_view(x))
    torch.testing.assert_close(output.double(), truth(policy, -x), atol=1e-6, rtol=1e-5)
    ones = torch.ones(5, 2)
    found = torch.autograd.grad(policy(x), list(policy.parameters()), torch._neg_view(ones))
    expected = torch.autograd.grad(policy(x), list(policy.parameters()), -ones)
    assert all(map(torch.equal, found, expected))
    policy[0].weight.data = torch._neg_view(policy[0].weight.data)
    torch.testing.assert_close(policy(x).double(), truth(policy, x), atol=1e-6, rtol=1e-5)


def test_strided_inputs(fused):
    policy, x = make(), torch.randn(4, 30).t()
    torch.testing.assert_close(policy(x).double(), truth(policy, x), atol=1e-6, rtol=1e-5)
    assert fused


def test_training_equals_module_by_module():
    policy = make()
    other = copy.deepcopy(policy)
    other[0].register_forward_hook(lambda *_: None)
    for _ in range(5):
        x = torch.randn(32, 4)
        for net in (policy, other):
            optimizer = torch.optim.Adam(net.parameters())
            optimizer.zero_grad()
            net(x).pow(2).mean().backward()
            optimizer.step()
    for a, b in zip(policy.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for layer in policy[::2]:
        assert not layer.weight[~layer.mask].any()


def test_writes_through_data_never_count_off_the_mask(fused):
    policy, x = make(), torch.randn(20, 4)
    for layer in policy[::2]:
        layer.weight.data.add_(torch.randn_like(layer.weight))
        layer.weight.data[~layer.mask] = torch.nan
    for batch in (x, x[:1]):
        output = policy(batch)
        torch.testing.assert_close(output.double(), truth(policy, batch), atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(policy(batch), output, atol=1e-6, rtol=1e-5)
    assert len(fused) == 4


def replaced_data(policy):
    policy[2].weight.data = torch.randn(32, 32)


def new_mask(policy):
    policy[2].set_mask_(torch.rand(32, 32) < 0.2)


def new_parameter(policy):
    policy[2].weight = nn.Parameter(torch.randn(32, 32))
    policy[2].bias = nn.Parameter(torch.randn(32))


def new_module(policy):
    policy[3] = nn.ReLU()


def appended(policy):
    policy.append(nn.Softplus())


@pytest.mark.parametrize("change", [replaced_data, new_mask, new_parameter, new_module, appended])
def test_changes_are_seen(change):
    policy, x = make(), torch.randn(20, 4)
    policy(x)
    change(policy)
    for _ in range(2):
        torch.testing.assert_close(policy(x).double(), truth(policy, x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("density", [1.0, 0.4])
@pytest.mark.parametrize(
    "write",
    [
        lambda mask: mask.data.bernoulli_(0.5),
        lambda mask: mask.numpy().fill(False),
        lambda mask: setattr(mask, "data", mask.data.t()),
    ],
    ids=["data", "numpy", "transposed"],
)
def test_a_mask_that_nobody_announced(write, density):
    policy = make(density)
    for batch in (1, 8, 256):
        x = torch.randn(batch, 4)
        policy(x)
        with torch.no_grad():
            policy(x)
    write(policy[2].mask)
    for batch in (1, 8, 256):
        x = torch.randn(batch, 4)
        expected = truth(policy, x).float()
        torch.testing.assert_close(policy(x), expected, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(policy(x), expected, atol=1e-5, rtol=1e-4)


def test_a_mask_written_by_another_thread():
    policy = make()
    with written_meanwhile(policy[2].mask), torch.no_grad():
        for batch in (1, 16, 300) * 20:
            assert policy(torch.randn(batch, 4)).isfinite().all()


def test_a_mask_of_bytes_goes_layer_by_layer():
    policy = make()
    policy[2].mask.view(torch.uint8).mul_(121)
    x = torch.randn(3, 4)
    torch.testing.assert_close(policy(x), truth(policy, x).float(), atol=1e-5, rtol=1e-4)


def test_settings_of_activations_are_seen():
    policy, x = make(activation=nn.LeakyReLU), torch.randn(20, 4)
    policy(x)
    policy[1].negative_slope = -0.7
    torch.testing.assert_close(policy(x).double(), truth(policy, x), atol=1e-5, rtol=1e-4)


def make_normed() -> nn.Sequential:
    torch.manual_seed(0)
    policy = nn.Sequential(
        *(nn.Linear(4, 32), nn.LayerNorm(32), nn.ReLU()),
        *(nn.Linear(32, 32), nn.LayerNorm(32, elementwise_affine=False), nn.Tanh()),
        nn.Linear(32, 2),
    )
    return sparsify_(policy, 0.4)


def test_layernorm_between_layers_is_part_of_the_call(fused):
    policy, plain = make_normed(), densify_(make_normed())
    x = torch.randn(50, 4)
    for module in (policy, plain):
        loss = module(x).square().mean()
        loss.backward()
    assert fused == [(50, 4)]
    for module, other in zip(policy, plain, strict=True):
        for name, parameter in module.named_parameters():
            expected = getattr(other, name).grad
            if name == "weight" and isinstance(module, nn.Linear):
                expected = torch.where(module.mask, expected, 0)
            torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4)
    assert len(policy.plan(50, training=True)) == 1


def test_settings_of_layernorm_are_seen(fused):
    policy, x = make_normed(), torch.randn(9, 4)
    policy(x)
    policy[1].eps = 0.5
    assert_equals_its_modules(policy, x)
    policy[1].weight = nn.Parameter(torch.rand(32))
    assert_equals_its_modules(policy, x)
    assert set(fused) == {(9, 4)}
    policy[1].double()
    with pytest.raises(RuntimeError, match="dtype"):
        policy(x)


def assert_equals_its_modules(policy, x):
    expected = x
    for module in policy:
        expected = module(expected)
    torch.testing.assert_close(policy(x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shape", [(8,), (2, 16)])
def test_layernorm_of_another_shape_splits_runs(shape):
    policy = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(shape), nn.ReLU(), nn.Linear(16, 2))
    assert len(find_runs(sparsify_(policy, 1.0))) == 4


def test_double_precision_and_back(fused):
    policy, x = make(), torch.randn(20, 4)
    before = policy(x)
    policy.double()
    assert policy(x.double()).dtype == torch.float64
    policy.float()
    torch.testing.assert_close(policy(x), before)
    assert len(fused) == 2


@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("kind", ["forward", "forward_pre", "full_backward"])
def test_hooks_on_layers_are_called(fused, where, kind):
    policy, calls = make(), []
    hook = getattr(policy[where], f"register_{kind}_hook")(lambda *_: calls.append(1))
    policy(torch.randn(3, 4, requires_grad=True)).sum().backward()
    assert calls
    assert not fused
    assert "hook" in policy.plan(3)[0].reason
    hook.remove()
    policy(torch.randn(3, 4))
    assert fused


def test_hooks_on_the_sequence_are_called(fused):
    policy, calls = make(), []
    policy.register_forward_hook(lambda *_: calls.append(1))
    policy(torch.randn(3, 4))
    assert calls
    assert fused


def test_autocast_goes_layer_by_layer(fused):
    policy = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert policy(torch.randn(3, 4)).dtype == torch.bfloat16
    assert not fused


def test_transforms_go_layer_by_layer(fused):
    policy, x = make(), torch.randn(6, 4)
    rows = torch.func.vmap(policy)(x)
    assert not fused
    torch.testing.assert_close(rows, policy(x), atol=1e-6, rtol=1e-5)
    jacobian = torch.func.vmap(torch.func.jacrev(policy))(x)
    assert jacobian.shape == (6, 2, 4)


def test_functional_call_uses_its_parameters():
    policy, x = make(), torch.randn(6, 4)
    policy(x)
    other = {name: p.detach() * 2 for name, p in policy.named_parameters()}
    found = torch.func.functional_call(policy, other, (x,))
    doubled = copy.deepcopy(policy)
    with torch.no_grad():
        for p in doubled.parameters():
            p *= 2
    torch.testing.assert_close(found, doubled(x), atol=1e-6, rtol=1e-5)


def test_compiles_in_one_graph():
    policy, x = make(), torch.randn(6, 4)
    compiled = torch.compile(policy, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), policy(x), atol=1e-6, rtol=1e-5)
    exported = torch.export.export(policy, (x,)).module()
    torch.testing.assert_close(exported(x), policy(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies(fused, copied):
    policy, x = make(), torch.randn(6, 4)
    expected = policy(x)
    other = copied(policy)
    assert type(other) is SparseSequential
    assert other[0] is not policy[0]
    with torch.no_grad():
        policy[0].weight.zero_()
    torch.testing.assert_close(other(x), expected)
    assert len(fused) == 2


class Named(nn.Sequential):
    """A sequence of the user's own class."""

    def greet(self) -> str:
        return "hello"


class Own(nn.Sequential):
    """One that does something else."""

    def forward(self, x):
        return super().forward(x) + 1


def test_subclasses(fused):
    named = sparsify_(Named(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), 0.5)
    x = torch.randn(5, 4)
    assert isinstance(named, Named)
    assert isinstance(named, SparseSequential)
    named(x)
    assert named.greet() == "hello"
    assert len(fused) == 1
    for other in (copy.deepcopy(named), pickle.loads(pickle.dumps(named))):
        assert type(other) is type(named)
        torch.testing.assert_close(other(x), named(x))
    densify_(named)
    assert type(named) is Named
    own = sparsify_(Own(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), 0.5)
    assert type(own) is Own


def test_unknown_modules_split_runs(fused):
    torch.manual_seed(0)
    policy = nn.Sequential(
        nn.Linear(4, 16),
        nn.Softplus(),
        nn.ReLU(),
        nn.Linear(16, 16),
        nn.ReLU(),
        nn.Linear(16, 2),
    )
    x = torch.randn(5, 4)
    sparsify_(policy, 0.5)
    by_module = x
    for module in policy:
        by_module = module(by_module)
    torch.testing.assert_close(policy(x), by_module, atol=1e-6, rtol=1e-5)
    assert fused == [(5, 16)]


def test_chains(fused):
    torch.manual_seed(0)
    policy = nn.Module()
    policy.body = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
    policy.head = nn.Linear(16, 2)
    sparsify_(policy, 0.5)
    policy.chain = Chain(policy.body, policy.head)
    x = torch.randn(5, 4)
    expected = policy.head(policy.body(x))
    fused.clear()
    torch.testing.assert_close(policy.chain(x), expected, atol=1e-6, rtol=1e-5)
    assert fused == [(5, 4)]
    other = copy.deepcopy(policy)
    assert other.chain.modules[1] is other.head
    torch.testing.assert_close(other.chain(x), expected, atol=1e-6, rtol=1e-5)
    policy.body.register_forward_hook(lambda *_: calls.append(1))
    calls = []
    policy.chain(x)
    assert calls
    policy.body[0] = nn.Linear(4, 16)
    torch.testing.assert_close(policy.chain(x), policy.head(policy.body(x)))


def test_plan_names_formats():
    policy = make(0.1)
    (plan,) = policy.plan(64, training=True)
    assert (plan.op, plan.backend, plan.format) == ("policy", "cpu", "csr/csr/csr")
    with pytest.raises(ValueError, match="batch must be >= 0"):
        policy.plan(-1)
    policy.double()
    assert "float32" in policy.plan(64)[0].reason


def test_layers_that_do_not_match_raise_as_torch_does():
    policy = make()
    with pytest.raises((RuntimeError, ValueError)):
        policy(torch.randn(3, 5))
    policy[2] = nn.Linear(31, 32)
    with pytest.raises(RuntimeError):
        policy(torch.randn(3, 4))
