"""Every registered op on every backend: does it keep to its schema, and foretell its results?

`EXAMPLES` holds arguments for each op under ``torch.ops.sparse_tickets``; one without an example
fails. `torch.library.opcheck` then compares an op with what was registered of it: what it writes
and shares, its autograd, the shapes, dtypes and strides of its results, alone and compiled.
"""

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from sparse_tickets import kernels
from sparse_tickets.kernels.arena import Arena, Net
from sparse_tickets.kernels.dispatch import has_triton, use_backend
from sparse_tickets.kernels.linear import block_pattern

needs_triton = pytest.mark.skipif(not has_triton(), reason="triton is not installed")

Arguments = tuple[Any, ...]

# Ops are registered where their folder is imported.
for folder in pkgutil.iter_modules(kernels.__path__):
    if folder.ispkg:
        importlib.import_module(f"{kernels.__name__}.{folder.name}")

TICKETS, BATCH = 2, 3
# Prunable weights of 3 x 4 and 2 x 3, and a tail of biases.
STUDENT = Arena.build((4, 3, 2))
NET, DENSITY, PRECISION = STUDENT.actor, 0.6, "ieee"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    return draw(*shape, seed=seed).requires_grad_()


def draw_mask(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape))) < DENSITY


def weights_of(arena: Arena) -> tuple[torch.Tensor, torch.Tensor]:
    """A population's rows, zero off the mask, and its mask."""
    weight, mask = 0.1 * draw(TICKETS, arena.size), draw_mask(TICKETS, arena.prunable)
    weight[:, : arena.prunable] *= mask
    return weight, mask


KEY = torch.tensor([5, -3])
LR = torch.full((TICKETS,), 1e-3)
STEP = torch.tensor([0, 4])
ADAM = (0.5, 0.9, 0.999, 1e-5)


def linear() -> Iterator[Arguments]:
    x, bias = leaf(TICKETS, BATCH, 5), leaf(TICKETS, 4)
    mask = draw_mask(TICKETS, 4, 5)
    weight = (draw(TICKETS, 4, 5) * mask).requires_grad_()
    yield x, weight, mask, bias, None, 0, PRECISION
    yield x, weight, mask, None, None, 0, PRECISION
    x, weight, mask, table = blocked()
    yield x, weight, mask, leaf(TICKETS, 16), table, 16, PRECISION


def blocked() -> Arguments:
    """Two blocks of 16 x 16 in a row, of each ticket a different one."""
    mask = torch.eye(2, dtype=torch.bool)[:, None, :].expand(TICKETS, 16, 2)
    mask = mask.repeat_interleave(16, 2).contiguous()
    weight = (draw(TICKETS, 16, 32) * mask).requires_grad_()
    return leaf(TICKETS, BATCH, 32), weight, mask, block_pattern(mask, 16).table


def linear_dx() -> Iterator[Arguments]:
    mask = draw_mask(TICKETS, 4, 5)
    weight = (draw(TICKETS, 4, 5) * mask).requires_grad_()
    yield leaf(TICKETS, BATCH, 4), weight, mask, None, 0, PRECISION
    _, weight, mask, table = blocked()
    yield leaf(TICKETS, BATCH, 16), weight, mask, table, 16, PRECISION


def linear_dw() -> Iterator[Arguments]:
    mask = draw_mask(TICKETS, 4, 5)
    yield leaf(TICKETS, BATCH, 4), leaf(TICKETS, BATCH, 5), mask, None, 0, PRECISION
    x, _, mask, table = blocked()
    yield leaf(TICKETS, BATCH, 16), x, mask, table, 16, PRECISION


def mlp() -> Iterator[Arguments]:
    weight, mask = weights_of(STUDENT)
    x, form = leaf(TICKETS, BATCH, 4), (NET.code, DENSITY, PRECISION)
    yield x, weight.requires_grad_(), mask, *form
    yield x.detach(), weight.detach(), None, *form


def mlp_keep() -> Iterator[Arguments]:
    yield draw(TICKETS, BATCH, 4), *weights_of(STUDENT), NET.code, DENSITY, PRECISION


def mlp_backward() -> Iterator[Arguments]:
    """With activations, and without them recomputed."""
    tensors = draw(TICKETS, BATCH, 4), *weights_of(STUDENT)
    form = NET.code, DENSITY, PRECISION
    hidden = draw(TICKETS, BATCH, NET.sizes[1]).tanh()
    for kept, *asked in ((hidden, True, True), (None, False, True), (None, True, False)):
        yield draw(TICKETS, BATCH, 2), *tensors, kept, *form, *asked


# Rows of seven weights, five of them prunable.


def rows() -> dict[str, torch.Tensor]:
    mask = draw_mask(TICKETS, 5)
    found = {name: draw(TICKETS, 7, seed=i) for i, name in enumerate(("weight", "m", "v"))}
    for row in found.values():
        row[:, :5] *= mask
    return found | {"mask": mask, "other": draw(TICKETS, 7, seed=9), "v": found["v"].abs()}


def prune() -> Iterator[Arguments]:
    for magnitude in (False, True):
        yield draw(TICKETS, 5), draw_mask(TICKETS, 5), torch.tensor([1, 2]), magnitude


def rewind_() -> Iterator[Arguments]:
    given = rows()
    tensors = tuple(given[name] for name in ("weight", "other", "m", "v"))
    yield *tensors, given["mask"], None, None
    yield *tensors, None, draw(TICKETS, 7, seed=3), draw(TICKETS, 7, seed=4)


def adam_() -> Iterator[Arguments]:
    given = rows()
    tensors = (*(given[name] for name in ("weight", "other", "m", "v")), STEP, LR)
    yield *tensors, given["mask"], *ADAM
    yield *tensors, None, *ADAM


def draws() -> Iterator[Arguments]:
    yield KEY, 10, 1, 2**40


def draws_on_device() -> Iterator[Arguments]:
    yield KEY, 10, 1, torch.tensor(2**40)
    yield KEY, 10, 1, KEY.abs()


def categorical() -> Iterator[Arguments]:
    yield draw(TICKETS, BATCH, 4).softmax(-1), draw(TICKETS, BATCH).sigmoid()


def gae() -> Iterator[Arguments]:
    shape = (TICKETS, 5, BATCH)
    numbers = (draw(*shape, seed=seed) for seed in range(3))
    yield *numbers, draw_mask(*shape), ~draw_mask(*shape), 0.99, 0.95


def dynamics_initial() -> Iterator[Arguments]:
    yield draw(TICKETS, BATCH, 4).sigmoid(), "CartPole-v1"


def dynamics_step() -> Iterator[Arguments]:
    yield 0.1 * draw(TICKETS, BATCH, 4).double(), (KEY > 0).long()[:, None] + WHOLE, "Acrobot-v1"
    yield draw(TICKETS, BATCH, 2).double(), draw(TICKETS, BATCH, 1), "Pendulum-v1"


def dynamics_observe() -> Iterator[Arguments]:
    yield draw(TICKETS, BATCH, 2).double(), "Pendulum-v1"


WHOLE = torch.zeros(TICKETS, BATCH, dtype=torch.int64)


EXAMPLES: dict[str, Callable[[], Iterator[Arguments]]] = {
    "linear": linear,
    "linear_dx": linear_dx,
    "linear_dw": linear_dw,
    "mlp": mlp,
    "mlp_keep": mlp_keep,
    "mlp_backward": mlp_backward,
    "prune": prune,
    "rewind_": rewind_,
    "adam_": adam_,
    **{
        f"random_{name}{overload}": examples
        for name in ("bits", "uniform", "normal", "permutation")
        for overload, examples in (("", draws), (".on_device", draws_on_device))
    },
    "random_categorical": categorical,
    "gae": gae,
    "dynamics_initial": dynamics_initial,
    "dynamics_step": dynamics_step,
    "dynamics_observe": dynamics_observe,
}


def test_every_op_has_an_example() -> None:
    prefix = "sparse_tickets::"
    names = torch._C._dispatch_get_all_op_names()
    assert {name.removeprefix(prefix) for name in names if name.startswith(prefix)} == set(EXAMPLES)


@pytest.mark.parametrize("critic", [None, (4, 5, 1)])
def test_networks_come_back_from_their_codes(critic: tuple[int, ...] | None) -> None:
    arena = Arena.build((4, 3, 2), critic, activation="relu", prune_critic=critic is not None)
    assert all(Net.decode(net.code) == net for net in arena.nets)


def move(argument: Any, device: str) -> Any:
    if not isinstance(argument, torch.Tensor):
        return argument
    moved = argument.detach().clone().to(device)
    return moved.requires_grad_(argument.requires_grad)


every_op = pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, "reference") for name in EXAMPLES),
        *((name, "cpu") for name in EXAMPLES),
        *(pytest.param(name, "triton", marks=needs_triton) for name in EXAMPLES),
    ],
)


def find_op(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.sparse_tickets, packet), overload or "default")


@every_op
def test_opcheck(name: str, backend: str) -> None:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    with use_backend(backend):
        for arguments in EXAMPLES[name]():
            torch.library.opcheck(find_op(name), tuple(move(each, device) for each in arguments))


# Of one ticket or copy, or one axis of copies more.
FITTING = {(name, "key", (1,)) for name in EXAMPLES if name.startswith("random")} | {
    ("dynamics_initial", "u", (1, TICKETS, BATCH, 4)),
    ("dynamics_observe", "state", (1, TICKETS, BATCH, 2)),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_misfits_are_refused_by_the_op_itself(name: str) -> None:
    """Whoever calls an op by its name, on data or on shapes alone, gets an error and no crash."""
    op = find_op(name)
    for arguments in EXAMPLES[name]():
        call = [move(argument, "cpu") for argument in arguments]
        call = [a.detach() if isinstance(a, torch.Tensor) else a for a in call]
        for at, tensor in enumerate(call):
            if not isinstance(tensor, torch.Tensor):
                continue
            for misfit in (tensor.new_zeros((1,) * tensor.dim()), tensor[None]):
                place = name, op._schema.arguments[at].name, tuple(misfit.shape)
                if misfit.shape == tensor.shape or place in FITTING:
                    continue
                for device in ("cpu", "meta"):
                    spoiled = [*call[:at], misfit, *call[at + 1 :]]
                    with pytest.raises(ValueError, match="must have shape"):
                        op(*(move(argument, device) for argument in spoiled))


@contextmanager
def defaults(dtype: torch.dtype, device: str) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def call(name: str, arguments: Arguments) -> list[torch.Tensor]:
    """Results, gradients, and the arguments, some of which an op writes."""
    leaves = [each for each in arguments if isinstance(each, torch.Tensor) and each.requires_grad]
    results = [each for each in tree_leaves(find_op(name)(*arguments)) if each is not None]
    differentiable = [each for each in results if each.requires_grad]
    if differentiable:
        seeds = [torch.ones_like(each) for each in differentiable]
        results += torch.autograd.grad(differentiable, leaves, seeds, allow_unused=True)
    return [each for each in (*results, *arguments) if isinstance(each, torch.Tensor)]


@every_op
def test_no_result_depends_on_a_default(name: str, backend: str) -> None:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    # Triton's interpreter makes tensors on the default device itself.
    other = device if backend == "triton" else "meta"
    with use_backend(backend):
        for arguments in EXAMPLES[name]():
            expected = call(name, tuple(move(each, device) for each in arguments))
            for dtype in (torch.float64, torch.bfloat16):
                copies = tuple(move(each, device) for each in arguments)
                with defaults(dtype, other):
                    found = call(name, copies)
                for ours, theirs in zip(found, expected, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
