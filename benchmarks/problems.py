"""Inputs of the benchmarks, what the float64 reference makes of them, and who is held to that.

A problem lives on its device and is drawn there. `contender` of a problem turns a call into a
`Contender` whose result is verified before it is timed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparse_tickets.kernels import use_backend
from sparse_tickets.kernels.arena import Arena
from sparse_tickets.kernels.linear import reference as linear_reference
from sparse_tickets.kernels.mlp import reference as mlp_reference
from sparse_tickets.kernels.prune import prune
from sparse_tickets.timing import Contender, mismatch

SPARSITIES = (0.0, 50.0, 80.0, 90.0, 95.0, 98.0, 99.0)
"""Percent of weights pruned."""

# A factor in TF32 keeps 10 bits of its mantissa, and may be truncated to them: each product is off
# by up to 2^-9, a sum of them by less in relation to its largest entry. A wrong index is off by 1.
_TF32 = 2.0**-8


def density_of(sparsity: float) -> float:
    """Share of weights kept, free of the rounding of ``1 - 0.99``."""
    return round((100.0 - sparsity) / 100.0, 6)


def random_masks(
    tickets: int, prunable: int, sparsity: float, generator: torch.Generator
) -> Tensor:
    """``[P, N]`` bool, where the generator draws: a mask per ticket, equally many kept in each."""
    scores = torch.rand(tickets, prunable, generator=generator, device=generator.device)
    best = scores.topk(round(density_of(sparsity) * prunable), dim=1, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, best, True)


def distance(
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    terms: Sequence[int] | int,
    precision: str = "ieee",
) -> float:
    """Largest error of any tensor as a share of what is allowed; see `timing.mismatch`.

    Args:
        actual: results.
        expected: the same in float64.
        terms: length of the sums behind each tensor.
        precision: ``tf32`` allows what its factors lose; others what their dtype does.
    """
    if precision != "tf32":
        return mismatch(actual, expected, terms)
    worst = 0.0
    for got, want in zip(actual, expected, strict=True):
        if got.shape != want.shape:
            raise ValueError(f"results must have shape {tuple(want.shape)}, got {tuple(got.shape)}")
        if want.numel() == 0:
            continue
        error = float((got.double() - want).abs().max()) / (float(want.abs().max()) or 1.0)
        if not math.isfinite(error):
            return math.inf
        worst = max(worst, error / _TF32)
    return worst


class LinearProblem:
    """One linear layer of P tickets: ``x [P, B, I]``, ``weight [P, O, I]``, masks all different.

    Masks are unstructured, made of full ``block`` x ``block`` squares, or ``2:4``. ``precision`` is
    that of float32 products: ``ieee``, or ``tf32`` on a GPU.
    """

    def __init__(
        self,
        tickets: int,
        batch: int,
        inp: int,
        out: int,
        sparsity: float,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        precision: str = "ieee",
        seed: int = 0,
        block: int = 1,
        two_four: bool = False,
    ) -> None:
        if out % block or inp % block:
            raise ValueError(f"block must divide {out} and {inp}, got {block}")
        if two_four and (sparsity != 50.0 or inp % 4 or block != 1):
            raise ValueError("two_four needs sparsity 50, inputs in fours and no block")
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

        self.sparsity, self.dtype, self.device = sparsity, dtype, torch.device(device)
        self.precision = precision
        self.x = draw(tickets, batch, inp)
        if two_four:
            scores = torch.rand(tickets, out, inp // 4, 4, generator=generator, device=device)
            mask = torch.zeros_like(scores, dtype=torch.bool)
            self.mask = mask.scatter_(3, scores.topk(2, dim=3).indices, True).flatten(2)
        else:
            blocks = random_masks(tickets, out * inp // block**2, sparsity, generator)
            mask = blocks.unflatten(1, (out // block, inp // block))
            self.mask = mask.repeat_interleave(block, 1).repeat_interleave(block, 2)
        self.weight = draw(tickets, out, inp, scale=inp**-0.5).masked_fill_(~self.mask, 0)
        self.bias = draw(tickets, out)
        self.dy = draw(tickets, batch, out)

    @property
    def density(self) -> float:
        """Nominal share of weights kept."""
        return density_of(self.sparsity)

    @property
    def terms(self) -> tuple[int, ...]:
        """Lengths of the sums behind y, dx, dW and db."""
        _, batch, inp = self.x.shape
        return inp, self.weight.shape[1], batch, batch

    @cached_property
    def forward(self) -> tuple[Tensor, ...]:
        """``(y,)`` in float64."""
        x, weight, bias = self.x.double(), self.weight.double(), self.bias.double()
        return (linear_reference.linear(x, weight, self.mask, bias),)

    @cached_property
    def forward_backward(self) -> tuple[Tensor, ...]:
        """``(y, dx, dW, db)`` in float64; dW is zero off the mask."""
        x, weight, dy = self.x.double(), self.weight.double(), self.dy.double()
        dx = linear_reference.linear_dx(dy, weight, self.mask)
        return (*self.forward, dx, linear_reference.linear_dw(dy, x, self.mask), dy.sum(1))

    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(x, weight, bias)`` as fresh leaves that want gradients."""
        x, weight, bias = (t.clone().requires_grad_() for t in (self.x, self.weight, self.bias))
        return x, weight, bias

    def on_mask(self, dw: Tensor) -> Tensor:
        """A dense gradient of the weight without what a masked layer has no use for."""
        return dw.view_as(self.mask).masked_fill(~self.mask, 0)

    def contender(
        self,
        name: str,
        run: Callable[[], Any],
        *,
        plan: str = "",
        dw: Callable[[Tensor], Tensor] = lambda dw: dw,
    ) -> Contender:
        """Whose call gives y, or ``(y, dx, dW, db)``, of a lone ticket or of all.

        Args:
            name: see `Contender`.
            run: see `Contender`.
            plan: see `Contender`.
            dw: makes dW dense and zero off the mask, which is not timed.
        """

        def error() -> float:
            found = run()
            found = [found] if isinstance(found, Tensor) else list(found)
            if len(found) == 1:
                wanted = self.forward
            else:
                wanted, found[2] = self.forward_backward, dw(found[2])
            pairs = zip(found, wanted, strict=True)
            alike = [result.detach().view_as(exact) for result, exact in pairs]
            return distance(alike, wanted, self.terms[: len(wanted)], self.precision)

        return Contender(name, run, error, plan=plan)


@dataclass
class PolicyProblem:
    """Policies of P tickets, global masks all different, forward and backward to the weights."""

    tickets: int = 60
    batch: int = 128
    sizes: tuple[int, ...] = (4, 64, 64, 2)
    sparsity: float = 90.0
    activation: str = "tanh"
    device: torch.device | str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator(self.device).manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device)

        self.arena = Arena.build(self.sizes, activation=self.activation)
        size, prunable = self.arena.size, self.arena.prunable
        self.mask = random_masks(self.tickets, prunable, self.sparsity, generator)
        self.weight = draw(self.tickets, size)
        for matrix, bias in self.arena.actor.layers(self.weight):
            matrix.mul_(matrix.shape[2] ** -0.5)
            bias.mul_(0.1)
        self.weight[:, :prunable].masked_fill_(~self.mask, 0)
        self.x = draw(self.tickets, self.batch, self.sizes[0])
        self.dy = draw(self.tickets, self.batch, self.sizes[-1])

    @property
    def density(self) -> float:
        """Nominal share of weights kept."""
        return density_of(self.sparsity)

    @property
    def terms(self) -> tuple[int, ...]:
        """Lengths of the sums behind the output and the gradients, over all layers."""
        return sum(self.sizes), self.batch + sum(self.sizes)

    @property
    def activate(self) -> Callable[[Tensor], Tensor]:
        """The activation between layers."""
        return torch.tanh if self.activation == "tanh" else torch.relu

    @cached_property
    def forward_backward(self) -> tuple[Tensor, ...]:
        """``(y [P, B, O], dweight [P, size])`` in float64."""
        weight = self.weight.double().requires_grad_()
        y = mlp_reference.mlp(self.x.double(), weight, self.arena.actor, self.mask)
        (grad,) = torch.autograd.grad(y, weight, self.dy.double())
        return y.detach(), grad

    def layers(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Per layer ``(weight [P, O, I], bias [P, O], mask)`` as leaves of their own."""
        net = self.arena.actor
        return [
            (
                weight.clone().requires_grad_(),
                bias.clone().requires_grad_(),
                net.weight(self.mask, layer).contiguous(),
            )
            for layer, (weight, bias) in enumerate(net.layers(self.weight))
        ]

    def gather(self, gradients: Sequence[Tensor]) -> Tensor:
        """Gradients of `layers` (weight, bias, weight, ...) as an arena row, zero off the mask."""
        flat = torch.zeros_like(self.weight)
        pairs = zip(gradients[::2], gradients[1::2], strict=True)
        for (weight, bias), (dw, db) in zip(self.arena.actor.layers(flat), pairs, strict=True):
            weight.copy_(dw)
            bias.copy_(db)
        flat[:, : self.arena.prunable].masked_fill_(~self.mask, 0)
        return flat

    def contender(
        self,
        name: str,
        run: Callable[[], Any],
        row: Callable[[Any], tuple[Tensor, Tensor]] | None = None,
        plan: str = "",
    ) -> Contender:
        """Whose call gives y and the gradients of `layers`, or what ``row`` makes ``(y, dW)`` of.

        Args:
            name: see `Contender`.
            run: see `Contender`.
            row: untimed, from the call's result to y and the gradient as an arena row.
            plan: see `Contender`.
        """

        def error() -> float:
            found = run()
            found = (found[0], self.gather(found[1:])) if row is None else row(found)
            return mismatch(found, self.forward_backward, self.terms)

        return Contender(name, run, error, plan=plan)


def difference(
    name: str,
    problems: tuple[PolicyProblem, PolicyProblem],
    networks: Sequence[Callable[[], Tensor]],
    plan: str = "",
) -> Contender:
    """The layers that a deep network has beyond a shallow one; times are per layer.

    Args:
        name: see `Contender`.
        problems: the deep one, and the shallow one.
        networks: of each, forward.
        plan: see `Contender`.
    """

    def error() -> float:
        return max(
            mismatch([run()], problem.forward_backward[:1], problem.terms[:1])
            for run, problem in zip(networks, problems, strict=True)
        )

    deep, shallow = (problem.arena.actor.depth for problem in problems)
    run, without = networks
    return Contender(name, run, error, units=deep - shallow, plan=plan, without=without)


class PruneProblem:
    """The next masks of P tickets: exactly ``kept`` of the largest scores inside each mask."""

    def __init__(
        self,
        tickets: int,
        prunable: int,
        sparsity: float,
        kept: int,
        device: torch.device | str = "cpu",
    ) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.mask = random_masks(tickets, prunable, sparsity, generator)
        # All different, so that no tie leaves a choice.
        draws = torch.rand(tickets, prunable, generator=generator, device=device)
        self.scores = draws.argsort(1).float()
        self.kept, self.k = kept, torch.full((tickets,), kept, device=device)

    @cached_property
    def expected(self) -> Tensor:
        """The masks that plain torch finds."""
        with use_backend("reference"):
            return prune(self.scores, self.mask, self.k)

    def contender(self, name: str, run: Callable[[], Tensor], plan: str = "") -> Contender:
        """Whose call gives the masks; no entry may be wrong."""
        return Contender(name, run, lambda: 2.0 * float((run() != self.expected).sum()), plan=plan)
