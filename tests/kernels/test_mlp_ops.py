"""Networks as registered ops, on every backend: traced, differentiated, refused."""

import pytest
import torch
from torch.autograd import forward_ad

from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.dispatch import has_triton, use_backend
from sparse_tickets.kernels.mlp import mlp, mlp_packed
from sparse_tickets.kernels.packed import build_pattern, pack

needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")
BACKENDS = ["reference", "cpu", pytest.param("triton", marks=needs_triton)]
OPS = torch.ops.sparse_tickets


def device_of(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


class Population:
    """A small network in both forms, its input and a gradient."""

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
        self.pattern = build_pattern(self.mask, self.arena.prunable_layers())
        self.values = pack(self.weight, self.pattern)
        self.rest = self.weight[:, prunable:].clone()
        self.precision = precision

    def rows(self, to_input=False, to_weight=False, mask=True):
        """Arguments of ``mlp``."""
        x = self.x.clone().requires_grad_(to_input)
        weight = self.weight.clone().requires_grad_(to_weight)
        return x, weight, self.mask if mask else None, self.net.code, 1.0, self.precision

    def packed(self, to_input=False, to_weight=False):
        """Arguments of ``mlp_packed``."""
        x = self.x.clone().requires_grad_(to_input)
        values, rest = (t.clone().requires_grad_(to_weight) for t in (self.values, self.rest))
        places = self.pattern.bits, self.pattern.start
        return x, values, *places, rest, self.net.code, self.pattern.shapes, self.precision


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_where_activations_are_kept(backend, packed):
    """In tf32, which the interpreter multiplies exactly; `test_opcheck` has the other route."""
    given = Population(backend, precision="tf32")
    op = OPS.mlp_packed.default if packed else OPS.mlp.default
    with use_backend(backend):
        torch.library.opcheck(op, given.packed(True, True) if packed else given.rows(True, True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tickets", "samples"), [(0, 3), (2, 0)])
def test_shapes_are_foretold_of_nothing(backend, tickets, samples):
    given = Population(backend, tickets=tickets, samples=samples)
    with use_backend(backend):
        for op, arguments in (
            (OPS.mlp.default, given.rows(True, True)),
            (OPS.mlp_keep.default, given.rows()),
            (OPS.mlp_packed.default, given.packed(True, True)),
            (OPS.mlp_packed_keep.default, given.packed()),
        ):
            torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_to_one_graph(backend, precision, packed):
    given = Population(backend)

    def rows(x, weight):
        return mlp(x, weight, given.net, given.mask, density=0.5, precision=precision).square()

    def tiles(x, values, rest):
        y = mlp_packed(x, values, given.pattern, rest, given.net, precision=precision)
        return y.square()

    function = tiles if packed else rows
    weights = (given.values, given.rest) if packed else (given.weight,)

    def differentiate(function):
        leaves = [t.clone().requires_grad_() for t in (given.x, *weights)]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]

    torch._dynamo.reset()
    with use_backend(backend):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        found, expected = differentiate(compiled), differentiate(function)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_the_op_and_the_function_agree(backend, packed):
    given = Population(backend)
    arguments = given.packed(True, True) if packed else given.rows(True, True)
    leaves = [arguments[i] for i in ((0, 1, 4) if packed else (0, 1))]
    with use_backend(backend):
        if packed:
            y = mlp_packed(arguments[0], arguments[1], given.pattern, arguments[4], given.net)
            again = OPS.mlp_packed.default(*arguments)
        else:
            y = mlp(*arguments[:2], given.net, given.mask)
            again = OPS.mlp.default(*arguments)
        found = [torch.autograd.grad(result, leaves, given.dy) for result in (y, again)]
    assert torch.equal(y, again)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_the_op_is_differentiable_in_reverse_mode(backend, packed):
    given = Population(backend)
    op = OPS.mlp_packed.default if packed else OPS.mlp.default
    arguments = given.packed(True, True) if packed else given.rows(True, True)
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
    given = Population(backend)
    with use_backend(backend):
        for packed in (False, True):
            op = OPS.mlp_packed.default if packed else OPS.mlp.default
            x, *others = given.packed() if packed else given.rows()
            with pytest.raises(TypeError, match="x must be float32, got float64"):
                op(x.double(), *others)
