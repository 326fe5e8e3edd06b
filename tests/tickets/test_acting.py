"""A frozen layer that acts on single rows, and everything that must change what it computes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from sparse_layers import clone_by_torch_save, dense_twin
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_tickets.kernels.dispatch import use_backend
from sparse_tickets.kernels.linear.unpruned import Unpruned
from sparse_tickets.kernels.policy import layout
from sparse_tickets.linear import SparseLinear


@pytest.mark.parametrize("shape", [(1, 48), (48,), (1, 1, 48), (2, 48)])
def test_a_frozen_row_with_gradients_enabled(shape):
    """Acting outside `no_grad` is acting still: no gradient is wanted, whatever the mode."""
    layer = SparseLinear(48, 40, mask=torch.rand(40, 48) > 0.8).requires_grad_(False)
    layer.apply_mask_()
    x = torch.randn(shape)
    expected = torch.nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    for _ in range(2):
        y = layer(x)
        assert not y.requires_grad
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = x.clone().requires_grad_()
    layer(wanted).sum().backward()
    gradient = layer.weight.sum(0).expand(shape)
    torch.testing.assert_close(wanted.grad, gradient, rtol=1e-5, atol=1e-5)


@pytest.fixture
def ready(acting) -> SparseLinear:
    """One that will fail where it acts again by the shortest way."""
    compiled = acting._prepared._compiled

    def refuse(*tensors):
        if compiled(*tensors) is not None:
            raise AssertionError("multiplied without a look")

    acting._prepared._compiled = refuse
    return acting


def assert_looks(layer: SparseLinear, x: torch.Tensor) -> None:
    torch.testing.assert_close(layer(x), dense_twin(layer)(x).detach())


def test_an_unchanged_row_is_multiplied_at_once(ready):
    with pytest.raises(AssertionError, match="without a look"):
        ready(torch.randn(1, 48))


class Sees(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen = True
        return func(*args, **(kwargs or {}))


class SeesFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen = True
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Sees, SeesFunctions])
def test_acting_under_a_mode_is_seen(ready, mode):
    with mode() as watcher:
        ready(torch.randn(1, 48))
    assert watcher.seen


def test_acting_under_use_backend_and_autocast(ready):
    x = torch.randn(1, 48)
    with use_backend("reference"):
        assert_looks(ready, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert ready(x).dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_acting_under_transforms_and_tracers(ready):
    x, twin = torch.randn(3, 1, 48), dense_twin(ready).requires_grad_(False)
    torch.testing.assert_close(torch.func.vmap(ready)(x), twin(x))
    row = x[0]
    primal, tangent = torch.func.jvp(ready, (row,), (row,))
    torch.testing.assert_close(primal, twin(row))
    torch.testing.assert_close(tangent, F.linear(row, twin.weight))
    with forward_ad.dual_level():
        primal, tangent = forward_ad.unpack_dual(ready(forward_ad.make_dual(row, row)))
    torch.testing.assert_close(primal, twin(row))
    torch.testing.assert_close(tangent, F.linear(row, twin.weight))
    traced = torch.jit.trace(ready, (row,), check_trace=False)
    torch.testing.assert_close(traced(x[1]), twin(x[1]))
    torch._dynamo.reset()
    compiled = torch.compile(ready, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(row), twin(row))
    for strict in (True, False):
        program = torch.export.export(ready, (row,), strict=strict)
        torch.testing.assert_close(program.module()(x[1]), twin(x[1]))


@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_acting_with_a_gradient_wanted(acting, name):
    x = torch.randn(1, 48)
    tensors = {"input": x, "weight": acting.weight, "bias": acting.bias}
    tensors[name].requires_grad_()
    acting(x).sum().backward()
    assert tensors[name].grad is not None
    with torch.no_grad():
        assert not acting(x).requires_grad


def unmasked(layer: SparseLinear) -> nn.Parameter:
    return nn.Parameter(torch.randn_like(layer.weight), requires_grad=False)


CHANGES = {
    "weight written": lambda layer: layer.weight.normal_(),
    "weight replaced": lambda layer: setattr(layer, "weight", unmasked(layer)),
    "weight's storage replaced": lambda layer: setattr(layer.weight, "data", unmasked(layer).data),
    "mask written": lambda layer: layer.mask.logical_not_(),
    "mask replaced": lambda layer: setattr(layer, "mask", ~layer.mask),
    "mask set": lambda layer: layer.set_mask_(~layer.mask),
    "bias replaced": lambda layer: setattr(layer, "bias", nn.Parameter(torch.randn(40))),
    "bias strided": lambda layer: setattr(layer, "bias", nn.Parameter(torch.randn(40, 3)[:, 1])),
    "bias's storage replaced": lambda layer: setattr(layer.bias, "data", torch.randn(40, 2)[:, 0]),
    "bias gone": lambda layer: setattr(layer, "bias", None),
    "pruned": lambda layer: layer.prune_(0.05),
    "state loaded": lambda layer: layer.load_state_dict(
        nn.Linear(48, 40).state_dict(), strict=False
    ),
    "vector to parameters": lambda layer: nn.utils.vector_to_parameters(
        torch.randn(40 * 48 + 40), layer.parameters()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_acting_sees_every_change(acting, change):
    x = torch.randn(1, 48)
    CHANGES[change](acting)
    acting.requires_grad_(False)
    for _ in range(2):
        assert_looks(acting, x)


@pytest.mark.parametrize("change", CHANGES)
def test_acting_unpruned_sees_every_change(change):
    layer, x = SparseLinear(48, 40).requires_grad_(False), torch.randn(1, 48)
    assert_looks(layer, x)
    assert isinstance(layer._prepared, Unpruned)
    CHANGES[change](layer)
    layer.requires_grad_(False)
    for _ in range(2):
        assert_looks(layer, x)


def test_the_dense_product_sees_a_written_weight(monkeypatch):
    monkeypatch.setattr(layout, "_LONE_DENSE", 0)
    layer, x = SparseLinear(48, 40).prune_(0.9).requires_grad_(False), torch.randn(5, 48)
    assert_looks(layer, x)
    assert "torch's product" in layer.plan(5).reason
    assert layer._prepared._compiled is None
    layer.weight.normal_()
    for _ in range(2):
        assert_looks(layer, x)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(48),
        torch.randn(1, 1, 48),
        torch.randn(2, 48),
        torch.randn(48, 2).t()[:1],
        nn.Parameter(torch.randn(1, 48), requires_grad=False),
    ],
    ids=["vector", "three dimensions", "two rows", "strided", "parameter"],
)
def test_acting_on_other_inputs(acting, x):
    assert_looks(acting, x)


def test_acting_on_what_is_no_float32(ready):
    with pytest.raises(RuntimeError, match="dtype"):
        ready(torch.randn(1, 48, dtype=torch.float64))
    assert ready.double()(torch.randn(1, 48, dtype=torch.float64)).dtype == torch.float64


def test_acting_calls_hooks_and_recomputes_the_weight(ready):
    x, calls = torch.randn(1, 48), []
    handle = ready.register_forward_pre_hook(lambda *args: calls.append(args))
    with pytest.raises(AssertionError, match="without a look"):
        ready(x)
    assert len(calls) == 1
    handle.remove()
    parametrize.register_parametrization(ready, "weight", nn.Tanh())
    torch.testing.assert_close(ready(x), F.linear(x, ready.weight * ready.mask, ready.bias))


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, clone_by_torch_save])
def test_copies_act_by_themselves(ready, clone):
    other = clone(ready)
    x = torch.randn(1, 48)
    for _ in range(2):
        assert_looks(other, x)


@pytest.mark.parametrize("density", [0.1, 1.0])
@pytest.mark.parametrize("inside", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_acting_returns_fresh_tensors(density, inside):
    layer = SparseLinear(48, 40).prune_(density).requires_grad_(False)
    x = torch.randn(2, 1, 48)
    with inside():
        layer(x[0])
    torch.set_default_dtype(torch.float64)
    try:
        first = layer(x[0])
    finally:
        torch.set_default_dtype(torch.float32)
    kept = first.clone()
    second = layer(x[1])
    assert first.dtype == torch.float32
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(first, kept)
    assert first.untyped_storage().nbytes() == 160
    assert not first.is_inference()
    assert not first._is_view()
    first.requires_grad_().square().sum().backward()
