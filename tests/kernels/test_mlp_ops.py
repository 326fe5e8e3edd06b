"""Networks as registered ops, on every backend: traced, differentiated, refused."""

import pytest
import torch
from torch.autograd import forward_ad

from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.dispatch import has_triton, use_backend
from sparse_tickets.kernels.mlp import mlp

needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")
BACKENDS = ["reference", "cpu", pytest.param("triton", marks=needs_triton)]
OPS = torch.ops.sparse_tickets


def device_of(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


class SmallNetwork:
    """A small network, its input and a gradient."""

    def __init__(self, backend, sizes=(3, 5, 2), *, tickets=2, samples=4, precision="ieee"):
        generator, device = torch.Generator().manual_seed(0), device_of(backend)
        self.arena = Arena.build(sizes)
        self.net = self.arena.actor
        prunable = self.arena.prunable
        weight = 0.3 * torch.randn(tickets, self.arena.size, generator=generator)
        mask = torch.rand(tickets, prunable, generator=generator) < 0.5
        weight[:, :prunable].masked_fill_(~mask, 0)
        x = torch.randn(tickets, samples, sizes[0], generator=generator)
        dy = torch.randn(tickets, samples, sizes[-1], generator=generator)
        self.x, self.dy, self.weight, self.mask = (t.to(device) for t in (x, dy, weight, mask))
        self.precision = precision

    def arguments(self, to_input=False, to_weight=False, mask=True):
        """Arguments of ``mlp``."""
        x = self.x.clone().requires_grad_(to_input)
        weight = self.weight.clone().requires_grad_(to_weight)
        return x, weight, self.mask if mask else None, self.net.code, 1.0, self.precision


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck_where_activations_are_kept(backend):
    """In tf32, which the interpreter multiplies exactly; `test_opcheck` has the other route."""
    given = SmallNetwork(backend, precision="tf32")
    with use_backend(backend):
        torch.library.opcheck(OPS.mlp.default, given.arguments(True, True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tickets", "samples"), [(0, 3), (2, 0)])
def test_shapes_are_foretold_of_nothing(backend, tickets, samples):
    given = SmallNetwork(backend, tickets=tickets, samples=samples)
    with use_backend(backend):
        for op, arguments in (
            (OPS.mlp.default, given.arguments(True, True)),
            (OPS.mlp_keep.default, given.arguments()),
        ):
            torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_compiles_to_one_graph(backend, precision):
    given = SmallNetwork(backend)

    def function(x, weight):
        return mlp(x, weight, given.net, given.mask, density=0.5, precision=precision).square()

    def differentiate(function):
        leaves = [t.clone().requires_grad_() for t in (given.x, given.weight)]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]

    torch._dynamo.reset()
    with use_backend(backend):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        found, expected = differentiate(compiled), differentiate(function)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_op_and_the_function_agree(backend):
    given = SmallNetwork(backend)
    arguments = given.arguments(True, True)
    with use_backend(backend):
        y = mlp(*arguments[:2], given.net, given.mask)
        again = OPS.mlp.default(*arguments)
        found = [torch.autograd.grad(result, arguments[:2], given.dy) for result in (y, again)]
    assert torch.equal(y, again)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_a_gradient_alone_is_what_it_is_beside_the_other(backend, precision):
    given = SmallNetwork(backend, precision=precision)

    def gradients(*asked):
        arguments = given.arguments(*asked)
        leaves = [leaf for leaf, wanted in zip(arguments, asked, strict=False) if wanted]
        return torch.autograd.grad(OPS.mlp.default(*arguments), leaves, given.dy)

    with use_backend(backend):
        both = gradients(True, True)
        alone = *gradients(True, False), *gradients(False, True)
    for one, other in zip(alone, both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_op_is_differentiable_in_reverse_mode(backend):
    given, op = SmallNetwork(backend), OPS.mlp.default
    arguments = given.arguments(True, True)
    with use_backend(backend):
        (gradient,) = torch.autograd.grad(
            op(*arguments).square().sum(), arguments[1], create_graph=True
        )
        again = torch.autograd.grad(gradient.square().sum(), arguments[1])[0]
        assert again.shape == arguments[1].shape
        assert again.any()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(given.x, given.x)
            with pytest.raises(NotImplementedError, match="jvp"):
                op(dual, *arguments[1:])
        y = op(*arguments)
        arguments[0].detach().add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=needs_triton)])
def test_the_op_refuses_other_floats(backend):
    given = SmallNetwork(backend)
    with use_backend(backend):
        x, *others = given.arguments()
        with pytest.raises(TypeError, match="x must be float32, got float64"):
            OPS.mlp.default(x.double(), *others)
