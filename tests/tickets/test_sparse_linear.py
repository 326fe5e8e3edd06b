"""SparseLinear keeps its contract: zero off the mask whatever trains it, an nn.Linear otherwise."""

import inspect
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as torch_prune
from sparse_layers import PATHS, assert_zero_off_mask, dense_twin, pruned_layer, train
from torch import nn

from sparse_tickets.kernels.dispatch import Plan
from sparse_tickets.linear import SparseLinear, count_kept


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
