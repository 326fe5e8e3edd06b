"""A whole policy in one call: equal to plain torch in float64, whatever lies around it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from sparse_tickets.kernels.dispatch import CHOSEN
from sparse_tickets.kernels.policy import Layer, Network, Norm, find_activation, native
from sparse_tickets.kernels.policy import network as module
from sparse_tickets.kernels.policy.blas import find_sgemm
from sparse_tickets.kernels.vector import LANES

ACTIVATIONS = [
    nn.Tanh(), nn.ReLU(), nn.Sigmoid(), nn.ELU(), nn.ELU(-0.5), nn.LeakyReLU(), nn.LeakyReLU(-0.1),
    nn.SiLU(), nn.GELU(), nn.GELU("tanh"),
]  # fmt: skip


EPS = 0.01
"""Of LayerNorm. Where the features of a row are nearly equal, little else fits float32."""

BOTH, WEIGHT, NEITHER = (True, True), (True, False), (False, False)
"""The parameters of a LayerNorm."""


class NetworkProblem:
    """A network with drawn masks, its tensors, and the truth in float64."""

    def __init__(
        self,
        widths,
        density,
        activation,
        *,
        bias=True,
        last=None,
        norm=None,
        last_norm=None,
        seed=0,
    ):
        draw = torch.Generator().manual_seed(seed)
        self.activations = [activation] * (len(widths) - 2) + [last]
        self.norms = [norm] * (len(widths) - 2) + [last_norm]
        self.masks, self.parameters = [], []
        for inp, out, norm in zip(widths, widths[1:], self.norms, strict=False):
            mask = torch.rand(out, inp, generator=draw) < density
            self.masks.append(mask if density < 1 else None)
            # What lies off the mask must never be read.
            weight = torch.randn(out, inp, generator=draw) / inp**0.5
            weight = weight if density == 1 else weight.masked_fill(~mask, torch.nan)
            self.parameters.append(weight.requires_grad_())
            shift = torch.randn(out, generator=draw).requires_grad_() if bias else None
            self.parameters.append(shift)
            for there in () if norm is None else norm:
                drawn = torch.randn(out, generator=draw).requires_grad_()
                self.parameters.append(drawn if there else None)
        layers = [
            Layer(out, inp, mask, None if act is None else find_activation(act), norm and Norm(EPS))
            for inp, out, mask, act, norm in zip(
                widths, widths[1:], self.masks, self.activations, self.norms, strict=False
            )
        ]
        self.network = Network(layers)
        self.draw = draw

    def train(self, x: Tensor) -> Tensor:
        masks = [mask for mask in self.masks if mask is not None]
        return self.network.train(x, masks, self.parameters, self.addresses())

    def infer(self, x: Tensor) -> Tensor:
        return self.network.infer(x, x.shape[0], self.addresses())

    def addresses(self) -> list[int]:
        return [at for p in self.parameters for at in (0 if p is None else p.data_ptr(), 0)]

    def compiled(self):
        """The same network as C++ calls it, on modules' dictionaries of the same tensors."""
        native.start()
        assert native.module is not None, native.status()
        layers, self.places = [], []
        given = iter(self.parameters)
        for layer, mask in zip(self.network.layers, self.masks, strict=True):
            at = 0 if mask is None else mask.data_ptr()
            layers.append((layer.out, layer.inp, at, at, mask is not None))
            self.place(next(given), next(given), mask)
            if layer.norm is not None:
                layers.append((layer.out, 1, 0, 0, False))
                self.place(next(given), next(given), None)
        nobody = native.module.Watch([], [], forward_ad.__dict__, CHOSEN)
        return native.module.Run(layers, self.network.form, self.places, nobody)

    def place(self, weight, bias, mask):
        self.places.append(({"weight": weight, "bias": bias}, {"mask": mask}, weight, bias, mask))

    def truth(self, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """The output in float64, and the leaves that it was made of."""
        leaves = [
            None if p is None else p.detach().double().requires_grad_() for p in self.parameters
        ]
        given = iter(leaves)
        for mask, act, norm in zip(self.masks, self.activations, self.norms, strict=True):
            weight = next(given)
            weight = weight if mask is None else torch.where(mask, weight, 0)
            x = F.linear(x, weight, next(given))
            if norm is not None:
                x = F.layer_norm(x, x.shape[-1:], next(given), next(given), EPS)
            x = x if act is None else act(x)
        return x, leaves


def assert_equal(found: Tensor, truth: Tensor) -> None:
    assert found.dtype == torch.float32
    scale = max(truth.abs().max().item(), 1.0) if truth.numel() else 1.0
    torch.testing.assert_close(found.double(), truth, atol=1e-5 * scale, rtol=0)


def check(problem: NetworkProblem, batch: int) -> None:
    """Forward by both ways, and all gradients, against float64."""
    x = torch.randn(batch, problem.network.layers[0].inp, generator=problem.draw)
    dy = torch.randn(batch, problem.network.out, generator=problem.draw)
    exact = x.double().requires_grad_()
    truth, leaves = problem.truth(exact)
    x.requires_grad_()
    seen = problem.infer(x.detach())
    assert_equal(seen, truth)
    output = problem.train(x)
    assert_equal(output, truth)
    present = [p for p in (x, *problem.parameters) if p is not None]
    found = torch.autograd.grad(output, present, dy)
    compiled = problem.compiled()
    with torch.no_grad():
        assert torch.equal(compiled(x), seen)
    again = compiled(x)
    assert torch.equal(again, output)
    assert all(map(torch.equal, torch.autograd.grad(again, present, dy), found))
    wanted = torch.autograd.grad(truth, [e for e in (exact, *leaves) if e is not None], dy.double())
    for gradient, expected in zip(found, wanted, strict=True):
        assert_equal(gradient, expected)
    weights = [g for g, p in zip(found, present, strict=True) if p.dim() == 2][1:]
    for gradient, mask in zip(weights, problem.masks, strict=True):
        assert mask is None or not gradient[~mask].any()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Whatever a kernel is to write holds NaN before, and so does its scratch."""

    def empty(*shape):
        return torch.full(shape, torch.nan)

    def empty_like(tensor):
        return empty(*tensor.shape)

    monkeypatch.setattr(module, "_empty", empty)
    monkeypatch.setattr(module, "_empty_like", empty_like)
    monkeypatch.setattr(module.reused_memory, "empty", empty)
    for call in module._calls:
        call.scratch.fill(float("nan"))
    yield
    for call in module._calls:
        call.scratch.fill(float("nan"))


@pytest.mark.parametrize("batch", [0, 1, 2, 5, 16, 37, 64, 150])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 0.8, 1.0])
def test_forward_and_gradients_equal_float64(batch, density):
    check(NetworkProblem((5, 64, 33, 2), density, nn.Tanh()), batch)


@pytest.mark.parametrize("widths", [(1, 1), (1, 1, 1), (17, 256, 256, 6), (3, 300, 16), (40, 7)])
@pytest.mark.parametrize("density", [0.1, 0.9, 1.0])
def test_all_shapes(widths, density):
    check(NetworkProblem(widths, density, nn.ReLU()), 70)


@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_activations_between_layers_and_at_the_end(activation, density):
    check(NetworkProblem((6, 32, 20, 3), density, activation, last=activation), 41)


@pytest.mark.parametrize("batch", [5, 64, 150])
@pytest.mark.parametrize("out", [1, 6, 7, 15, 16])
@pytest.mark.parametrize("density", [0.6, 1.0])
def test_few_outputs(out, batch, density):
    check(NetworkProblem((9, 2 * LANES + 3, out), density, nn.ReLU()), batch)
    check(NetworkProblem((LANES, out), density, None), batch)


@pytest.mark.parametrize("batch", [0, 1, 3, 5, 37, 150, 300])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize("norm", [BOTH, WEIGHT, NEITHER])
def test_layernorm_between_layers(norm, density, batch):
    check(NetworkProblem((5, 64, 33, 2), density, nn.ReLU(), norm=norm), batch)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS], ids=str)
@pytest.mark.parametrize("widths", [(1, 1), (3, 1, 2), (7, 300, 13)])
def test_layernorm_before_each_activation_and_at_the_end(widths, activation):
    problem = NetworkProblem(
        widths, 0.4, activation, last=activation, norm=BOTH, last_norm=BOTH, bias=False
    )
    check(problem, 21)


def test_second_derivatives_through_layernorm():
    problem = NetworkProblem((4, 16, 3), 0.4, nn.Tanh(), norm=BOTH)
    x = torch.randn(6, 4, generator=problem.draw).requires_grad_()
    exact = x.detach().double().requires_grad_()
    for output, leaf in ((problem.train(x), x), (problem.truth(exact)[0], exact)):
        (slope,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
        slope.square().sum().backward()
    assert_equal(x.grad, exact.grad)


def test_relu_lets_through_what_its_output_says():
    """A NaN as in torch, also where the product after it is of another kind."""
    for out in (6, 40):
        problem = NetworkProblem((20, 40, 40, out), 1.0, nn.ReLU())
        x = torch.randn(70, 20, generator=problem.draw)
        x[3, 2] = torch.nan
        x.requires_grad_()
        exact = x.detach().double().requires_grad_()
        problem.train(x).sum().backward()
        problem.truth(exact)[0].sum().backward()
        torch.testing.assert_close(x.grad.double(), exact.grad, atol=1e-4, rtol=0, equal_nan=True)


def test_without_bias():
    check(NetworkProblem((6, 32, 20, 3), 0.3, nn.Tanh(), bias=False), 41)
    check(NetworkProblem((6, 32, 20, 3), 1.0, nn.Tanh(), bias=False), 1)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_activations_of_large_and_special_inputs(activation):
    problem = NetworkProblem((1, 1, 1), 1.0, activation)
    with torch.no_grad():
        for p in problem.parameters:
            p.fill_(1.0 if p.dim() == 2 else 0.0)
    values = [0.0, -0.0, 1e-8, -1e-8, 1e-3, -1e-3, 0.3, -0.4, 3.0, -3.0, 20.0, -20.0, 80.0, -80.0]
    x = torch.tensor(values)[:, None].requires_grad_()
    output = problem.train(x)
    truth, _ = problem.truth(x.detach().double().requires_grad_())
    torch.testing.assert_close(output.double(), truth, atol=3e-7, rtol=1e-6)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(problem.truth(exact)[0].sum(), exact)
    torch.testing.assert_close(gradient.double(), expected, atol=2e-6, rtol=1e-6)
    assert problem.infer(torch.full((1, 1), torch.nan)).isnan().all()
    assert problem.train(torch.full((9, 1), torch.nan)).isnan().all()


def test_a_bias_that_is_not_finite_reaches_no_gradient_of_absent_rows():
    problem = NetworkProblem((4, 16, 1), 0.5, nn.ReLU())
    with torch.no_grad():
        problem.parameters[1][0] = torch.inf
    problem.train(torch.randn(3, 4)).backward(torch.zeros(3, 1))
    weight = problem.parameters[2]
    # Rows that are there give 0 * inf; this unit alone may be NaN.
    assert not weight.grad[:, 1:].isnan().any()


def test_only_what_is_asked_for():
    problem = NetworkProblem((4, 16, 16, 3), 0.4, nn.Tanh())
    for i in (0, 1, 3):
        problem.parameters[i].requires_grad_(False)
    x = torch.randn(20, 4)
    problem.train(x).pow(2).sum().backward()
    truth, leaves = problem.truth(x.double())
    truth.pow(2).sum().backward()
    for i, (parameter, exact) in enumerate(zip(problem.parameters, leaves, strict=True)):
        if i in (0, 1, 3):
            assert parameter.grad is None
        else:
            assert_equal(parameter.grad, exact.grad)


@pytest.mark.parametrize("asked", [(4,), (5,), (8, 9), (4, 6)])
def test_only_what_is_asked_for_of_layernorms(asked):
    problem = NetworkProblem((4, 16, 16, 3), 0.4, nn.ReLU(), norm=BOTH)
    for i, parameter in enumerate(problem.parameters):
        parameter.requires_grad_(i in asked)
    x = torch.randn(20, 4, generator=problem.draw)
    problem.train(x).pow(2).sum().backward()
    truth, leaves = problem.truth(x.double())
    truth.pow(2).sum().backward()
    for i, (parameter, exact) in enumerate(zip(problem.parameters, leaves, strict=True)):
        if i in asked:
            assert_equal(parameter.grad, exact.grad)
        else:
            assert parameter.grad is None


def test_second_derivatives():
    problem = NetworkProblem((3, 16, 8, 2), 0.5, nn.Tanh())
    x = torch.randn(7, 3, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    found = torch.autograd.grad(problem.train(x).pow(2).sum(), x, create_graph=True)[0]
    truth, leaves = problem.truth(exact)
    wanted = torch.autograd.grad(truth.pow(2).sum(), exact, create_graph=True)[0]
    found.pow(2).sum().backward()
    wanted.pow(2).sum().backward()
    assert_equal(x.grad, exact.grad)
    for i, mask in zip((0, 2, 4), problem.masks, strict=True):
        assert_equal(problem.parameters[i].grad, leaves[i].grad)
        assert not problem.parameters[i].grad[~mask].any()


def test_backward_twice_gives_the_same():
    problem = NetworkProblem((3, 16, 2), 0.5, nn.Tanh())
    x = torch.randn(7, 3)
    loss = problem.train(x).sum()
    first = torch.autograd.grad(loss, problem.parameters, retain_graph=True)
    problem.train(x)
    second = torch.autograd.grad(loss, problem.parameters)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_a_layer_used_twice_sums_its_gradients():
    problem = NetworkProblem((8, 8, 8), 0.5, nn.Tanh())
    problem.parameters[2:] = problem.parameters[:2]
    problem.masks[1] = problem.masks[0]
    layer = problem.network.layers[0]
    problem.network = Network([layer, layer._replace(activation=None)])
    x = torch.randn(9, 8)
    weight, bias = problem.parameters[:2]
    problem.train(x).sum().backward()
    w = weight.detach().double().requires_grad_()
    kept = torch.where(layer.mask, w, 0)
    hidden = F.linear(x.double(), kept, bias.detach().double()).tanh()
    F.linear(hidden, kept, bias.detach().double()).sum().backward()
    assert_equal(weight.grad, w.grad)


@pytest.mark.parametrize("which", [0, 1, "mask", "x"])
def test_writes_between_forward_and_backward_raise(which):
    problem = NetworkProblem((4, 16, 3), 0.4, nn.Tanh())
    x = torch.randn(20, 4)
    loss = problem.train(x).sum()
    with torch.no_grad():
        if which == "mask":
            problem.masks[0][0] = False
        elif which == "x":
            x += 1
        else:
            problem.parameters[which] += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("density", [0.05, 0.8, 1.0])
def test_parts_of_the_batch_add_up(density):
    check(NetworkProblem((17, 64, 80, 6), density, nn.SiLU()), 700)


@pytest.mark.parametrize("density", [0.2, 1.0])
def test_results_depend_neither_on_other_calls_nor_on_threads(density):
    problem = NetworkProblem((17, 64, 64, 6), density, nn.Tanh())
    x = torch.randn(3000, 17)

    def gradients() -> list[Tensor]:
        output = problem.train(x)
        return [output, *torch.autograd.grad(output.sum(), problem.parameters)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gradients()
        torch.set_num_threads(2)
        two = gradients()
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not find_sgemm(), reason="torch has no sgemm to call")
def test_a_narrow_layer_runs_dense_from_a_higher_density_than_a_wide_one():
    """sgemm is slow on few features, unless torch's own product takes a layer that is alone."""
    some = NetworkProblem((17, 64, 64, 6), 0.46, nn.ReLU())
    assert some.network.describe(64, training=True)[0] == "csr/dense+mask/csr"
    most = NetworkProblem((17, 64, 64, 6), 0.8, nn.ReLU())
    assert most.network.describe(64, training=True)[0] == "dense+mask/dense+mask/dense+mask"
    alone = NetworkProblem((17, 64), 0.46, nn.ReLU())
    assert alone.network.describe(64, training=True)[0] == "dense+mask"
