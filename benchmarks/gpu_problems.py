"""Inputs of the GPU benchmarks, drawn on the device, and how far a result may lie off in TF32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_tickets.kernels import adam_, use_backend
from sparse_tickets.timing import mismatch

from .problems import LinearProblem, density_of

__all__ = ["ADAM", "LayerProblem", "Step", "distance", "random_masks_on"]

# A factor in TF32 keeps 10 bits of its mantissa, and may be truncated to them: each product is off
# by up to 2^-9, a sum of them by less in relation to its largest entry. A wrong index is off by 1.
_TF32 = 2.0**-8
ADAM: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-5}
"""Of every contender; none clips."""
# Where a gradient is smaller than this share of the largest, its sign, and so Adam's first step,
# may be rounding.
_CLEAR = 0.05


def distance(
    actual: Sequence[Tensor], expected: Sequence[Tensor], terms: Sequence[int] | int, precision: str
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


def random_masks_on(
    device: torch.device, tickets: int, prunable: int, sparsity: float, seed: int = 0
) -> Tensor:
    """``[P, N]`` bool: a mask of its own per ticket, equally many kept in each, drawn there."""
    generator = torch.Generator(device).manual_seed(seed)
    scores = torch.rand(tickets, prunable, generator=generator, device=device)
    kept = round(density_of(sparsity) * prunable)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter_(1, scores.topk(kept, dim=1).indices, True)


class Step(NamedTuple):
    """What forward, backward and one Adam step from zero moments give, dense.

    Attributes:
        y: ``[P, B, O]``.
        dx: ``[P, B, I]``.
        weight: ``[P, O, I]`` after the step.
        m: ``[P, O, I]`` first moment, a tenth of the gradient.
        v: ``[P, O, I]`` second moment.
    """

    y: Tensor
    dx: Tensor
    weight: Tensor
    m: Tensor
    v: Tensor


class LayerProblem(LinearProblem):
    """`LinearProblem` for as many weights as a GPU takes, which a host is too slow to draw."""

    def __init__(
        self,
        tickets: int,
        batch: int,
        inp: int,
        out: int,
        sparsity: float,
        *,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        precision: str = "tf32",
        block: int = 1,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, generator=generator, device=device)).to(dtype)

        self.sparsity, self.dtype, self.device, self.precision = sparsity, dtype, device, precision
        self.x, self.dy = draw(tickets, batch, inp), draw(tickets, batch, out)
        blocks = random_masks_on(device, tickets, out * inp // block**2, sparsity, seed)
        mask = blocks.unflatten(1, (out // block, inp // block))
        self.mask = mask.repeat_interleave(block, 1).repeat_interleave(block, 2)
        self.weight = draw(tickets, out, inp, scale=inp**-0.5).masked_fill_(~self.mask, 0)
        self.bias = draw(tickets, out)

    @cached_property
    def step(self) -> Step:
        """What training the layer for one step gives, in float64; the layer has no bias there."""
        x, weight, dy = self.x.double(), self.weight.double(), self.dy.double()
        y, dx = x @ weight.mT, dy @ weight
        grad = (dy.mT @ x).masked_fill_(~self.mask, 0).flatten(1)
        weight, m, v = weight.flatten(1).clone(), torch.zeros_like(grad), torch.zeros_like(grad)
        step = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        rate = torch.full((len(x),), ADAM["lr"], dtype=torch.float64, device=x.device)
        beta1, beta2 = ADAM["betas"]
        mask = self.mask.flatten(1)
        with use_backend("reference"):
            adam_(
                weight, grad, m, v, step, rate, mask,
                max_norm=None, beta1=beta1, beta2=beta2, eps=ADAM["eps"],
            )  # fmt: skip
        out, inp = self.weight.shape[1:]
        return Step(y, dx, *(t.unflatten(1, (out, inp)) for t in (weight, m, v)))

    def step_error(self, found: Step) -> float:
        """Distance of one trained step from `step`; see `distance`."""
        want = self.step
        _, batch, inp = self.x.shape
        terms = (inp, self.weight.shape[1], batch, batch)
        parts = (found.y, found.dx, found.m, found.v)
        worst = distance(parts, (want.y, want.dx, want.m, want.v), terms, self.precision)
        # Adam divides the gradient by its own size: only where that is not rounding is the step
        # itself comparable, and it moves a weight by about the learning rate.
        clear = want.m.abs() > _CLEAR * want.m.abs().amax()
        moved = float(torch.where(clear, found.weight.double() - want.weight, 0).abs().max())
        pruned = float(found.weight.masked_fill(self.mask, 0).abs().max())
        return max(worst, moved / (0.02 * ADAM["lr"]), math.inf if pruned else 0.0)
