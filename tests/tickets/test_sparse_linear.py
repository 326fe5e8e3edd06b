"""SparseLinear keeps its contract: zero off the mask whatever trains it, an nn.Linear otherwise."""

import copy
import gc
import inspect
import io
import pickle
import shutil
import threading
import weakref
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as torch_prune
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sparse_tickets.kernels.linear.layer as implementation
from sparse_tickets import hooks
from sparse_tickets.kernels.dispatch import Plan, use_backend
from sparse_tickets.kernels.linear.unpruned import Unpruned
from sparse_tickets.kernels.policy import layout
from sparse_tickets.linear import SparseLinear, count_kept

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, foreach=False),
    "adam-l2": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adam-amsgrad-foreach": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "sgd-nesterov-foreach": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1, foreach=True
    ),
    "sgd-fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
}


# Nothing pruned; torch's product over zeros; wide and sparse enough for a sparse format.
PATHS = {"dense": (6, 5, 1.0), "masked": (6, 5, 0.4), "sparse": (48, 40, 0.1)}


def pruned_layer(density: float = 0.4, seed: int = 0, **kwargs) -> SparseLinear:
    torch.manual_seed(seed)
    return SparseLinear(6, 5, **kwargs).prune_(density)


@pytest.fixture(params=PATHS)
def layer(request) -> SparseLinear:
    torch.manual_seed(0)
    inputs, outputs, density = PATHS[request.param]
    return SparseLinear(inputs, outputs).prune_(density)


def assert_zero_off_mask(layer: SparseLinear, *optimizers: torch.optim.Optimizer) -> None:
    tensors = [layer._parameters["weight"].detach()]
    if layer.weight.grad is not None:
        tensors.append(layer.weight.grad)
    for optimizer in optimizers:
        state = optimizer.state.get(layer.weight, {}).values()
        tensors += [t for t in state if torch.is_tensor(t) and t.shape == layer.mask.shape]
    for tensor in tensors:
        assert not tensor[~layer.mask].any()


def train(layer: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(7, 6)).square().sum().backward()
        optimizer.step()


def dense_twin(layer: SparseLinear) -> nn.Linear:
    twin = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    with torch.no_grad():
        twin.weight.copy_(layer.weight * layer.mask)
        if layer.bias is not None:
            twin.bias.copy_(layer.bias)
    return twin


# Construction


def test_constructor_is_that_of_linear_plus_mask():
    parameters = inspect.signature(SparseLinear).parameters
    expected = ["in_features", "out_features", "bias", "device", "dtype"]
    assert list(parameters) == [*expected, "mask"]
    assert parameters["mask"].kind is inspect.Parameter.KEYWORD_ONLY
    assert isinstance(SparseLinear(2, 3), nn.Linear)


def test_initialises_like_linear():
    torch.manual_seed(3)
    dense = nn.Linear(4, 3)
    torch.manual_seed(3)
    sparse = SparseLinear(4, 3)
    assert torch.equal(sparse.weight, dense.weight)
    assert torch.equal(sparse.bias, dense.bias)
    assert sparse.mask.all()
    assert sparse.mask.dtype == torch.bool
    assert set(sparse.state_dict()) == {"weight", "bias", "mask"}


def test_constructor_copies_and_applies_the_mask():
    mask = torch.eye(3, dtype=torch.bool)
    layer = SparseLinear(3, 3, bias=False, dtype=torch.float64, mask=mask)
    mask.fill_(True)
    assert torch.equal(layer.mask, torch.eye(3, dtype=torch.bool))
    assert layer.weight.dtype == torch.float64
    assert layer.bias is None
    assert_zero_off_mask(layer)


def test_rejects_a_wrong_mask():
    with pytest.raises(TypeError, match="mask must be bool, got float32"):
        SparseLinear(3, 2, mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"mask must have shape \(2, 3\), got \(3, 2\)"):
        SparseLinear(3, 2, mask=torch.ones(3, 2, dtype=torch.bool))


def test_from_linear_shares_parameters():
    dense = nn.Linear(6, 5).eval()
    optimizer = torch.optim.AdamW(dense.parameters(), lr=0.1, weight_decay=0.5)
    before = torch.random.get_rng_state()
    layer = SparseLinear.from_linear(dense, torch.rand(5, 6) < 0.5)
    assert layer.weight is dense.weight
    assert layer.bias is dense.bias
    assert not layer.training
    assert_zero_off_mask(layer)
    train(layer, optimizer)
    assert_zero_off_mask(layer, optimizer)
    torch.random.set_rng_state(before)
    SparseLinear.from_linear(nn.utils.skip_init(nn.Linear, 2, 2, bias=False))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_from_linear_of_a_sparse_layer_keeps_its_mask():
    layer = pruned_layer()
    assert torch.equal(SparseLinear.from_linear(layer).mask, layer.mask)


def test_from_linear_rejects_a_recomputed_weight():
    pruned = torch_prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5)
    with pytest.raises(ValueError, match="own its weight"):
        SparseLinear.from_linear(pruned)


def test_meta_device():
    layer = SparseLinear(4, 3, device="meta")
    assert layer.mask.is_meta
    assert layer(torch.empty(2, 4, device="meta")).shape == (2, 3)
    assert "kept" not in repr(layer)
    assert "kept=12/12" in repr(SparseLinear(4, 3))


# Pruning


@pytest.mark.parametrize(
    ("density", "total", "kept"), [(0.5, 5, 3), (0.5, 4, 2), (0, 9, 0), (1, 9, 9), (0.1, 4, 0)]
)
def test_count_rounds_half_up(density, total, kept):
    assert count_kept(density, total) == kept


@pytest.mark.parametrize("density", [-0.1, 1.2, float("nan")])
def test_density_out_of_range(density):
    with pytest.raises(ValueError, match=r"density must be in \[0, 1\], got"):
        SparseLinear(2, 2).prune_(density)


def test_prune_keeps_exactly_k_of_largest_magnitude():
    layer = SparseLinear(6, 5)
    weight = layer.weight.detach().clone()
    assert layer.prune_(density=0.25) is layer
    assert int(layer.mask.sum()) == 8
    assert weight[layer.mask].abs().min() > weight[~layer.mask].abs().max()
    assert torch.equal(layer.weight, weight * layer.mask)
    assert layer.density == 8 / 30
    assert layer.sparsity == 1 - 8 / 30


def test_prune_breaks_ties_by_position_and_takes_scores():
    layer = SparseLinear(4, 2)
    nn.init.constant_(layer.weight, 1.0)
    assert layer.prune_(0.5).mask.tolist() == [[True] * 4, [False] * 4]
    layer = SparseLinear(4, 2).prune_(0.25, scores=torch.arange(8.0).reshape(2, 4))
    assert layer.mask.flatten().tolist() == [False] * 6 + [True] * 2
    with pytest.raises(ValueError, match="scores must have shape"):
        layer.prune_(0.25, scores=torch.ones(8))


def test_prune_never_revives():
    layer = pruned_layer(0.3)
    before = layer.mask.clone()
    layer.prune_(0.9)
    assert torch.equal(layer.mask, before)
    layer.prune_(0.1, scores=(~before).float())
    assert not (layer.mask & ~before).any()
    assert int(layer.mask.sum()) == 3


def test_mask_is_one_tensor_for_life():
    layer = SparseLinear(6, 5)
    mask = layer.mask
    layer.prune_(0.5).set_mask_(torch.rand(5, 6) < 0.5)
    layer.load_state_dict(pruned_layer().state_dict())
    assert layer.mask is mask


def test_revived_weights_start_at_zero():
    layer = pruned_layer(0.4)
    before = layer.mask.clone()
    layer.set_mask_(torch.ones(5, 6, dtype=torch.bool))
    assert not layer.weight[~before].any()
    assert layer.weight[before].all()


# The invariant


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_invariant_under_optimizer(name):
    """Pruning in the middle leaves moments and gradients that would move pruned weights."""
    torch.manual_seed(0)
    layer = SparseLinear(6, 5)
    optimizer = OPTIMIZERS[name](layer.parameters())
    for density in (1.0, 0.6, 0.2, 0.0):
        layer.prune_(density)
        assert_zero_off_mask(layer, optimizer)
        for _ in range(3):
            train(layer, optimizer, steps=1)
            assert_zero_off_mask(layer, optimizer)


def test_matches_masked_dense_training():
    """Kept weights train as if the others did not exist."""
    layer = pruned_layer().double()
    twin = dense_twin(layer).double()
    twin.load_state_dict({k: v for k, v in layer.state_dict().items() if k != "mask"})
    twin.weight.register_hook(lambda g: g * layer.mask)
    ours = torch.optim.Adam(layer.parameters(), lr=0.1)
    theirs = torch.optim.Adam(twin.parameters(), lr=0.1)
    for _ in range(5):
        x = torch.randn(7, 6, dtype=torch.float64)
        for module, optimizer in ((layer, ours), (twin, theirs)):
            optimizer.zero_grad()
            module(x).tanh().sum().backward()
            optimizer.step()
    torch.testing.assert_close(layer.weight, twin.weight)
    torch.testing.assert_close(layer.bias, twin.bias)


def test_two_layers_on_one_weight_are_zero_off_both_masks():
    dense = nn.Linear(6, 5)
    a = SparseLinear.from_linear(dense, torch.rand(5, 6) < 0.5)
    b = SparseLinear.from_linear(dense, torch.rand(5, 6) < 0.5)
    optimizer = torch.optim.AdamW(dense.parameters(), weight_decay=0.5)
    optimizer.zero_grad()
    (a(torch.ones(6)) + b(torch.ones(6))).sum().backward()
    optimizer.step()
    assert not dense.weight[~(a.mask & b.mask)].any()


def test_hook_learns_a_mask_that_the_user_wrote():
    layer = pruned_layer()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    train(layer, optimizer)
    layer.mask[0] = False
    train(layer, optimizer, steps=1)
    assert_zero_off_mask(layer, optimizer)


MOVES = {
    "nothing": lambda layer, optimizer: None,
    "weight": lambda layer, optimizer: setattr(layer.weight, "data", layer.weight.detach().clone()),
    "weight turned": lambda layer, optimizer: setattr(
        layer.weight, "data", layer.weight.detach().t().contiguous().t()
    ),
    "Parameter": lambda layer, optimizer: (
        setattr(layer, "weight", nn.Parameter(layer.weight.detach().clone())),
        optimizer.add_param_group({"params": [layer.weight]}),
    ),
    "mask": lambda layer, optimizer: setattr(layer, "mask", layer.mask.clone()),
    "mask's data": lambda layer, optimizer: setattr(layer.mask, "data", layer.mask.clone()),
    "state": lambda layer, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "dtype": lambda layer, optimizer: layer.double().float(),
}


@pytest.mark.parametrize("name", MOVES)
def test_hook_sees_what_moved_since_the_last_step(name):
    layer = pruned_layer()
    optimizer = torch.optim.Adam(layer.parameters())
    train(layer, optimizer)
    MOVES[name](layer, optimizer)
    layer.mask.data[:2] = False
    train(layer, optimizer)
    # Momentum of what the mask no longer keeps, and what somebody wrote.
    optimizer.state[layer.weight]["exp_avg"].fill_(1.0)
    layer.weight.data.fill_(1.0)
    optimizer.step()
    assert_zero_off_mask(layer, optimizer)


def test_weight_of_a_layer_that_is_gone_is_free():
    layer = pruned_layer()
    weight = layer.weight
    optimizer = torch.optim.SGD([weight], lr=0.1)
    train(layer, optimizer)
    del layer
    gc.collect()
    weight.data.fill_(1.0)
    optimizer.step()
    assert weight.all()


def test_hook_leaves_other_parameters_and_optimizers_alone():
    layer = pruned_layer()
    other = nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    before = layer.weight._version
    other(torch.ones(3)).sum().backward()
    optimizer.step()
    assert layer.weight._version == before
    assert optimizer not in hooks.stepped_optimizers()


def test_layers_and_optimizers_are_not_kept_alive():
    layer = pruned_layer()
    optimizer = torch.optim.Adam(layer.parameters())
    train(layer, optimizer, steps=1)
    references = weakref.ref(layer), weakref.ref(optimizer)
    del layer, optimizer
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_one_hook_for_all_layers():
    from torch.optim.optimizer import _global_optimizer_post_hooks as registered

    SparseLinear(2, 2), SparseLinear(2, 2), copy.deepcopy(SparseLinear(2, 2))
    assert list(registered.values()).count(hooks._after_any_step) == 1


def test_zero_even_where_the_pruned_entry_is_not_finite():
    layer = pruned_layer()
    with torch.no_grad():
        layer.weight.fill_(float("nan"))
    layer.apply_mask_()
    assert not layer.weight[~layer.mask].any()


# Someone else writes the weight


WRITERS = {
    "state_dict": lambda layer: layer.state_dict(),
    "apply_mask_": lambda layer: layer.apply_mask_(),
    "prune_": lambda layer: layer.prune_(0.3),
    "set_mask_": lambda layer: layer.set_mask_(layer.mask.clone()),
    "load_state_dict": lambda layer: layer.load_state_dict(
        nn.Linear(6, 5).state_dict(), strict=False
    ),
    "from_linear": SparseLinear.from_linear,
}
READERS = {
    "density": lambda layer: layer.density,
    "sparsity": lambda layer: layer.sparsity,
    "plan": lambda layer: layer.plan(batch=4),
    "forward": lambda layer: layer(torch.ones(3, 6)),
    "repr": repr,
}


@pytest.mark.parametrize("name", WRITERS)
def test_public_calls_after_reinitialisation(name):
    layer = pruned_layer()
    nn.init.orthogonal_(layer.weight)
    WRITERS[name](layer)
    assert_zero_off_mask(layer)
    layer.weight.data.normal_()
    WRITERS[name](layer)
    assert_zero_off_mask(layer)


@pytest.mark.parametrize("name", READERS)
def test_reading_writes_nothing(name):
    layer = pruned_layer()
    layer.weight.data.normal_()
    before, version = layer.weight.detach().clone(), layer.weight._version
    READERS[name](layer)
    assert torch.equal(layer.weight, before)
    assert layer.weight._version == version


def test_forward_after_reinitialisation_is_right_and_does_not_write():
    layer = pruned_layer()
    x = torch.randn(3, 6)
    nn.init.orthogonal_(layer.weight)
    weight = layer.weight.detach().clone()
    version = layer.weight._version
    first, second = layer(x), layer(2 * x)
    torch.testing.assert_close(first, F.linear(x, weight * layer.mask, layer.bias))
    assert layer.weight._version == version
    assert torch.equal(layer.weight, weight)
    (first + second).sum().backward()
    assert not layer.weight.grad[~layer.mask].any()


@pytest.mark.parametrize("how", ["assign data", "replace", "user writes mask", "to"])
def test_forward_notices(how):
    layer = pruned_layer()
    x = torch.randn(3, 6)
    if how == "assign data":
        layer.weight.data = torch.randn(5, 6)
    elif how == "replace":
        layer.weight = nn.Parameter(torch.randn(5, 6))
    elif how == "user writes mask":
        layer.mask.logical_and_(torch.rand(5, 6) < 0.5)
    else:
        layer, x = layer.double(), x.double()
        layer.weight.data.add_(0)
    want = F.linear(x, layer.weight * layer.mask, layer.bias)
    torch.testing.assert_close(layer(x), want)


def test_clean_forward_takes_the_weight_itself(monkeypatch):
    """In a training loop no masked copy is made, by whatever way."""
    copies = []
    monkeypatch.setattr(implementation, "keep", lambda *addresses: copies.append(addresses))
    for inputs, outputs, density in PATHS.values():
        for most in (layout._LONE_DENSE, 0):
            monkeypatch.setattr(layout, "_LONE_DENSE", most)
            layer = SparseLinear(inputs, outputs).prune_(density)
            optimizer = torch.optim.Adam(layer.parameters())
            for _ in range(3):
                layer(torch.randn(32, inputs)).sum().backward()
                optimizer.step()
    assert not copies


def copy_t(layer):
    layer.weight.data = layer.weight.data.t()


def recycle(layer):
    """New data, at the very address of the old."""
    at, kept = layer.weight.data_ptr(), layer.weight.data
    new = torch.empty(0).set_(kept.untyped_storage(), 0, kept.shape).normal_()
    layer.weight.data = new
    assert layer.weight.data_ptr() == at


UNANNOUNCED = {
    "polyak": lambda layer: torch.add(
        layer.weight.data, torch.randn(40, 40), out=layer.weight.data
    ),
    "hard copy": lambda layer: layer.weight.data.copy_(torch.randn(40, 40)),
    "init": lambda layer: nn.init.orthogonal_(layer.weight.data),
    "assign": lambda layer: setattr(layer.weight, "data", torch.randn(40, 40)),
    "recycled": recycle,
    "transposed": copy_t,
    "numpy": lambda layer: layer.weight.detach().numpy().fill(0.5),
    "mask through data": lambda layer: layer.mask.data.copy_(torch.rand(40, 40) < 0.5),
    "mask by numpy": lambda layer: layer.mask.numpy().fill(True),
    "not a number": lambda layer: layer.weight.data.masked_fill_(~layer.mask, float("nan")),
    "cast and back": lambda layer: layer.double().float().weight.data.normal_(),
}


@pytest.mark.parametrize("way", ["torch's product", "one call"])
@pytest.mark.parametrize("write", UNANNOUNCED)
def test_a_write_that_nobody_announces(write, way, monkeypatch):
    if way == "torch's product":
        monkeypatch.setattr(layout, "_DENSE_FROM", -1)
        monkeypatch.setattr(layout, "_LONE_DENSE", 0)
    torch.manual_seed(0)
    layer = SparseLinear(40, 40).prune_(0.2)
    assert way in layer.plan(batch=8).reason
    for after in (UNANNOUNCED[write], SparseLinear.apply_mask_):
        for batch in (1, 8, 64):
            layer(torch.randn(batch, 40))
        with torch.no_grad():
            layer(torch.randn(1, 40))
        after(layer)
        weight = layer.weight.detach().masked_fill(~layer.mask, 0).requires_grad_()
        for batch in (1, 8, 64):
            x = torch.randn(batch, 40, requires_grad=True)
            expected = F.linear(x, weight, layer.bias)
            output = layer(x)
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
            with torch.no_grad():
                torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)
            ours = torch.autograd.grad(output.sum(), (x, layer.weight))
            dx, dw = torch.autograd.grad(expected.sum(), (x, weight))
            torch.testing.assert_close(ours[0], dx, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(ours[1], dw * layer.mask, atol=1e-5, rtol=1e-4)


def test_a_mask_written_by_another_thread(monkeypatch):
    """Each product is of some mask; before, the interpreter crashed."""
    monkeypatch.setenv("SPARSE_TICKETS_CROSSOVER", "1")
    layer, stop = SparseLinear(64, 64), threading.Event()

    def write():
        while not stop.is_set():
            layer.mask.bernoulli_(0.3)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        with torch.no_grad():
            for batch in (1, 16, 64) * 60:
                assert layer(torch.randn(batch, 64)).isfinite().all()
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("batch", [1, 8, 64])
def test_a_bias_of_another_shape_is_as_in_linear(acting, batch):
    acting.bias = nn.Parameter(torch.ones(1), requires_grad=False)
    x = torch.randn(batch, 48)
    torch.testing.assert_close(acting(x), F.linear(x, acting.weight, torch.ones(1)))


def test_a_negative_view_keeps_its_sign(acting):
    x = torch.randn(1, 48, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    torch.testing.assert_close(acting(x), acting(x.resolve_neg()))


def test_a_mask_of_another_kind_is_refused():
    layer = pruned_layer()
    with pytest.raises(TypeError, match="set_mask_"):
        layer.mask = layer.mask.float()
    with pytest.raises(ValueError, match="mask must have shape"):
        layer.mask = layer.mask.t()


def test_to_empty_prunes_nothing_until_a_mask_comes():
    state = pruned_layer().state_dict()
    for device in ("meta", "cpu"):
        layer = nn.Sequential(SparseLinear(6, 5, device=device)).to_empty(device="cpu")[0]
        assert layer.mask.all()
        assert layer.density == 1
        layer.load_state_dict(state)
        assert torch.equal(layer.mask, state["mask"])
    layer = pruned_layer().type(torch.float64)
    assert torch.equal(layer.mask, state["mask"])


def test_prune_compares_float64_as_such():
    layer = SparseLinear(2, 1, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 1.0 + 1e-12]], dtype=torch.float64))
    assert layer.prune_(0.5).mask.tolist() == [[False, True]]


@pytest.mark.parametrize("name", ["linear", "linear_dx", "linear_dw"])
def test_ops_called_by_name_check_their_shapes(name):
    op, mask = getattr(torch.ops.sparse_tickets, name), torch.rand(1, 64, 64) < 0.1
    bias = (None,) if name == "linear" else ()
    with pytest.raises(ValueError, match="must have shape"):
        op(torch.randn(1, 80, 64), torch.randn(1, 80, 3), mask, *bias, None, 0, "ieee")


# Forward and backward


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("path", [*PATHS.values(), (6, 5, 0.0), (48, 40, 0.0)])
@pytest.mark.parametrize("shape", [(), (1,), (33,), (2, 3), (4, 8), (0,), (2, 0), (1, 1, 1)])
def test_forward_and_gradients_match_dense(shape, path, bias):
    inputs, outputs, density = path
    layer = SparseLinear(inputs, outputs, bias).prune_(density)
    twin = dense_twin(layer)
    x = torch.randn(*shape, inputs, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    ours, theirs = layer(x), twin(y)
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    ours.backward(grad)
    theirs.backward(grad)
    torch.testing.assert_close(x.grad, y.grad)
    # float32 sums over at most 33 rows
    torch.testing.assert_close(
        layer.weight.grad, twin.weight.grad * layer.mask, atol=1e-5, rtol=1e-5
    )
    assert_zero_off_mask(layer)
    if bias:
        torch.testing.assert_close(layer.bias.grad, twin.bias.grad, atol=1e-5, rtol=1e-5)


def test_strided_input_and_inplace_activation():
    layer = pruned_layer()
    twin = dense_twin(layer)
    x = torch.randn(6, 9, 2).permute(2, 1, 0)[:, ::2]
    torch.testing.assert_close(F.relu(layer(x), inplace=True), F.relu(twin(x)))
    dense = SparseLinear(6, 5)
    F.relu(dense(x), inplace=True).sum().backward()


@pytest.mark.parametrize("shape", [(), (5,), (6, 5)])
def test_rejects_a_wrong_input(shape):
    with pytest.raises(ValueError, match=r"input must have shape \[\.\.\., 6\]"):
        pruned_layer()(torch.ones(shape))


@pytest.mark.parametrize("inputs_need_grad", [True, False])
def test_mask_changed_between_forward_and_backward_raises(layer, inputs_need_grad):
    y = layer(torch.randn(32, layer.in_features, requires_grad=inputs_need_grad))
    layer.prune_(layer.density / 2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace|between forward and backward"):
        y.sum().backward()


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.prune_(0.5),
        lambda layer: layer.mask.data[1, 2:4].fill_(False),
        lambda layer: layer.mask.zero_(),
        lambda layer: setattr(layer.mask, "data", torch.ones(2, 3, dtype=torch.bool)),
    ],
    ids=["pruned", "written unseen", "written", "given other memory"],
)
def test_a_full_mask_runs_by_torchs_own_node_and_may_not_change_either(change):
    layer, x = SparseLinear(6, 5), torch.randn(3, 6)
    twin = dense_twin(layer)
    y = layer(x)
    assert y.grad_fn.name() == twin(x).grad_fn.name()
    seen = []
    y.register_hook(seen.append)
    y.sum().backward(retain_graph=True)
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(5, 6))
    assert len(seen) == 1
    change(layer)
    with pytest.raises(RuntimeError, match="must not change between forward and backward"):
        y.sum().backward()


def test_two_forwards_one_backward_and_reads_between(layer):
    x = torch.randn(32, layer.in_features, requires_grad=True)
    loss = layer(x).sum() + layer(x.tanh()).sum()
    layer.state_dict(), layer.density, layer.apply_mask_(), layer.plan(batch=3)
    loss.backward()
    assert_zero_off_mask(layer)


def test_double_backward(layer):
    twin = dense_twin(layer)
    penalties = []
    for module in (layer, twin):
        x = torch.linspace(-1, 1, 32 * layer.in_features).reshape(32, -1).requires_grad_()
        (grad,) = torch.autograd.grad(module(x).tanh().sum(), x, create_graph=True)
        penalties.append(grad.square().sum())
        penalties[-1].backward()
    torch.testing.assert_close(*penalties)
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad * layer.mask)


def test_no_grad_and_inference_mode():
    layer = pruned_layer()
    x = torch.randn(3, 6)
    want = dense_twin(layer)(x)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), want)
        inside = SparseLinear(6, 5).prune_(0.5)
        torch.testing.assert_close(inside(x), dense_twin(inside)(x))
        assert inside.density == 0.5


def test_zero_width():
    with pytest.warns(UserWarning, match="zero-element"):
        layer = SparseLinear(0, 3)
    assert layer.density == 1.0
    torch.testing.assert_close(layer(torch.ones(2, 0)), layer.bias.expand(2, 3))


# State


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


def clone_by_torch_save(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


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


# torch around it


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


# Plan


def test_plan_names_the_dense_path_and_the_reason():
    dense = SparseLinear(6, 5).plan(batch=8)
    assert isinstance(dense, Plan)
    assert dense.format == "dense"
    assert "nothing is pruned" in dense.reason
    assert pruned_layer(0.9).double().plan(batch=8).format == "dense+mask"
    inputs, outputs, density = PATHS["sparse"]
    assert SparseLinear(inputs, outputs).prune_(density).plan(batch=32).format == "csr"
    with pytest.raises(ValueError, match="batch must be >= 0, got -1"):
        pruned_layer().plan(batch=-1)


# In the style of the libraries that hold policies


def create_mlp(sizes, layer_class=nn.Linear, device=None):
    layers = []
    for inputs, outputs in pairwise(sizes):
        takes_device = "device" in inspect.signature(layer_class).parameters
        kwargs = {"device": device} if takes_device else {}
        layers += [layer_class(inputs, outputs, bias=True, **kwargs), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def test_torchrl_style_layer_class():
    net = create_mlp((4, 8, 2), layer_class=SparseLinear, device=torch.device("cpu"))
    assert [type(layer) for layer in net] == [SparseLinear, nn.Tanh, SparseLinear]
    assert net(torch.ones(3, 4)).shape == (3, 2)


@pytest.mark.parametrize("shape", [(1, 48), (48,), (1, 1, 48), (2, 48)])
def test_a_frozen_row_with_gradients_enabled(shape, monkeypatch):
    """Acting outside `no_grad` is acting still: no gradient is wanted, whatever the mode."""
    monkeypatch.setenv("SPARSE_TICKETS_CROSSOVER", "1")
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


# Acting: one row without gradients, in one call


@pytest.fixture
def acting() -> SparseLinear:
    """A frozen layer that has acted, in one call."""
    torch.manual_seed(0)
    layer = SparseLinear(48, 40, mask=torch.rand(40, 48) > 0.8).requires_grad_(False)
    layer(torch.randn(1, 48))
    assert layer._prepared._compiled is not None
    return layer


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
