"""One layer of a population trained for one step, forward, backward and Adam: ours and torch's.

Also Adam's step alone. A `Trained` is one way of doing it; nothing clips. Weights are packed, dense
under a mask, or plain torch: dense, times the mask, or that under `torch.compile`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparse_tickets.kernels import adam_, use_backend
from sparse_tickets.kernels.cost import Cost
from sparse_tickets.kernels.linear import linear
from sparse_tickets.kernels.packed import (
    build_pattern,
    linear_packed,
    pack,
    unpack,
    write_gradient_,
)
from sparse_tickets.kernels.packed import cost as packed_cost
from sparse_tickets.kernels.update import cost as update_cost
from sparse_tickets.timing import Contender

from .ours import OURS
from .peers import Unavailable, masked_bmm, torch_compile, torch_dense
from .problems import LinearProblem, distance

__all__ = [
    "DENSE_MASK",
    "Compiled",
    "Dense",
    "Masked",
    "Packed",
    "Step",
    "StepProblem",
    "Times",
    "adam",
    "step",
    "step_cost",
]

DENSE_MASK = "sparse_tickets, dense+mask"
"""Our own kernels on the dense weight: what sparsity alone gains is over this."""

_RATE, _BETAS, _EPS = 1e-3, (0.9, 0.999), 1e-5
_OURS: dict[str, Any] = {"max_norm": None, "beta1": _BETAS[0], "beta2": _BETAS[1], "eps": _EPS}
# Where a gradient is smaller than this share of the largest, its sign, and so Adam's first step,
# may be rounding.
_CLEAR = 0.05


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


class StepProblem(LinearProblem):
    """A layer, without its bias, and what training it for one step gives in float64."""

    @property
    def rate(self) -> Tensor:
        """``[P]`` learning rates."""
        return torch.full((len(self.x),), _RATE, device=self.device)

    @cached_property
    def step(self) -> Step:
        """In float64."""
        x, weight, dy = self.x.double(), self.weight.double(), self.dy.double()
        y, dx = x @ weight.mT, dy @ weight
        grad = (dy.mT @ x).masked_fill_(~self.mask, 0).flatten(1)
        row, m, v = weight.flatten(1).clone(), torch.zeros_like(grad), torch.zeros_like(grad)
        count = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        with use_backend("reference"):
            adam_(row, grad, m, v, count, self.rate.double(), self.mask.flatten(1), **_OURS)
        return Step(y, dx, *(t.view_as(weight) for t in (row, m, v)))

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
        return max(worst, moved / (0.02 * _RATE), math.inf if pruned else 0.0)


class Trained(ABC):
    """A layer with Adam's state; what depends on the mask alone is made before the clock starts."""

    name: str
    plan: str = ""

    def __init__(self, problem: StepProblem) -> None:
        self.problem = problem
        self.restart()

    @abstractmethod
    def restart(self) -> None:
        """Back to the weights of the problem and zero moments."""

    @abstractmethod
    def products(self) -> tuple[Tensor, Tensor]:
        """``(y, dx)``; keeps the weight's gradient."""

    @abstractmethod
    def update(self) -> None:
        """Adam's step with the gradient kept."""

    @abstractmethod
    def state(self) -> tuple[Tensor, ...]:
        """Weight and moments ``[P, O, I]``, as a masked network would have them."""

    def step(self) -> tuple[Tensor, Tensor]:
        """All of it; returns ``(y, dx)``."""
        found = self.products()
        self.update()
        return found


def step(layer: Trained) -> Contender:
    """Forward, backward and one Adam step."""

    def error() -> float:
        layer.restart()
        y, dx = layer.step()
        return layer.problem.step_error(Step(y.detach(), dx, *layer.state()))

    return Contender(layer.name, layer.step, error, plan=layer.plan)


def adam(layer: Trained) -> Contender:
    """Adam's step alone."""
    layer.products()

    def error() -> float:
        layer.restart()
        layer.products()
        layer.update()
        want = layer.problem.step
        return layer.problem.step_error(Step(want.y, want.dx, *layer.state()))

    return Contender(layer.name, layer.update, error, plan=layer.plan)


class Packed(Trained):
    """Ours: products and Adam read and write the kept weights alone."""

    name, plan = OURS, "linear_packed; adam_ on packed values"

    def __init__(self, problem: StepProblem) -> None:
        shape, kept = (0, *problem.weight.shape[1:]), int(problem.mask[0].sum())
        self.pattern = build_pattern(problem.mask.flatten(1), [shape], width=kept)
        super().__init__(problem)

    def restart(self) -> None:
        problem, weight = self.problem, self.problem.weight
        self.x, self.rate = problem.x.clone().requires_grad_(), problem.rate
        self.values = pack(weight.flatten(1), self.pattern)
        self.m, self.v = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self.gradient = torch.full_like(self.values, torch.nan)
        self.count = torch.zeros(len(self.x), dtype=torch.int64, device=problem.device)

    def products(self) -> tuple[Tensor, Tensor]:
        """The packed dW goes to a buffer, as in a trainer's own backward pass."""
        precision, dy = self.problem.precision, self.problem.dy
        y = linear_packed(self.x, self.values, self.pattern, 0, precision=precision)
        (dx,) = torch.autograd.grad(y, self.x, dy)
        write_gradient_(self.gradient, dy, self.x, self.pattern, 0, precision=precision)
        return y.detach(), dx

    def update(self) -> None:
        rows = self.values, self.gradient, self.m, self.v
        adam_(*rows, self.count, self.rate, None, count=self.pattern.count, **_OURS)

    def state(self) -> tuple[Tensor, ...]:
        packed = (t.detach() for t in (self.values, self.m, self.v))
        return tuple(unpack(t, self.pattern).view_as(self.problem.weight) for t in packed)


def step_cost(problem: LinearProblem) -> Cost:
    """Of `Packed`'s products and Adam; without clipping the norm is nobody's work."""
    tickets, batch, inp = problem.x.shape
    out, kept = problem.weight.shape[1], int(problem.mask[0].sum())
    cost = update_cost.adam(tickets, kept, partials=True)
    for product in (packed_cost.forward, packed_cost.dx, packed_cost.dw):
        cost = cost.plus(product(tickets, batch, out, inp, kept))
    return cost


class Masked(Trained):
    """Ours on the dense weight, with the mask in the epilogue of dW and in Adam."""

    name, plan = DENSE_MASK, "linear: dense+mask; adam_: masked"

    def restart(self) -> None:
        problem = self.problem
        self.x, self.rate = problem.x.clone().requires_grad_(), problem.rate
        self.row, self.mask = problem.weight.flatten(1).clone(), problem.mask.flatten(1)
        self.weight = self.row.view_as(problem.weight).requires_grad_()
        self.m, self.v = torch.zeros_like(self.row), torch.zeros_like(self.row)
        self.count = torch.zeros(len(self.row), dtype=torch.int64, device=problem.device)

    def products(self) -> tuple[Tensor, Tensor]:
        problem = self.problem
        y = linear(self.x, self.weight, problem.mask, precision=problem.precision)
        dx, dw = torch.autograd.grad(y, (self.x, self.weight), problem.dy)
        self.gradient = dw.flatten(1)
        return y.detach(), dx

    def update(self) -> None:
        rows = self.row, self.gradient, self.m, self.v
        adam_(*rows, self.count, self.rate, self.mask, **_OURS)

    def state(self) -> tuple[Tensor, ...]:
        return tuple(t.view_as(self.problem.weight) for t in (self.row, self.m, self.v))


class Dense(Trained):
    """Torch's dense products and fused Adam; no mask anywhere, and no autograd to wait for.

    Autograd's gradient of a transposed weight would be transposed as well, and so copied.
    """

    name = torch_dense.NAME

    def restart(self) -> None:
        self.weight = self.problem.weight.clone().requires_grad_()
        self.optimizer = torch.optim.Adam(
            [self.weight],
            lr=_RATE,
            betas=_BETAS,
            eps=_EPS,
            fused=True,
            capturable=self.problem.device.type == "cuda",
        )

    def products(self) -> tuple[Tensor, Tensor]:
        x, dy, weight = self.problem.x, self.problem.dy, self.weight.detach()
        y, dx = torch.bmm(x, weight.mT), torch.bmm(dy, weight)
        self.weight.grad = torch.bmm(dy.mT, x)
        return y, dx

    def update(self) -> None:
        self.optimizer.step()

    def state(self) -> tuple[Tensor, ...]:
        """A dense layer trains pruned weights too: those do not count."""
        state = self.optimizer.state[self.weight]
        parts = (self.weight.detach(), state["exp_avg"], state["exp_avg_sq"])
        return tuple(map(self.problem.on_mask, parts))


class Times(Dense):
    """The same with the mask multiplied in, into weight and gradient."""

    name = masked_bmm.NAME

    def products(self) -> tuple[Tensor, Tensor]:
        x, dy, mask = self.problem.x, self.problem.dy, self.problem.mask
        weight = self.weight.detach() * mask
        y, dx = torch.bmm(x, weight.mT), torch.bmm(dy, weight)
        self.weight.grad = torch.bmm(dy.mT, x).mul_(mask)
        return y, dx


def _adam(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, count: Tensor) -> None:
    """One step in place, for a compiler to fuse."""
    beta1, beta2 = _BETAS
    count.add_(1)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (v / (1 - beta2**count)).sqrt() + _EPS
    weight.sub_(_RATE / (1 - beta1**count) * m / root)


class Compiled(Trained):
    """``w*mask``, its gradients and Adam in one function under `torch.compile`.

    Raises:
        Unavailable: not on a GPU, where alone it is measured.
    """

    name = torch_compile.NAME

    def __init__(self, problem: StepProblem) -> None:
        if problem.device.type != "cuda":
            raise Unavailable("torch.compile is measured on a GPU only")
        super().__init__(problem)
        self._whole = torch.compile(_whole_step, fullgraph=True)
        self._update = torch.compile(_masked_adam, fullgraph=True)

    def restart(self) -> None:
        self.weight = self.problem.weight.clone()
        self.m, self.v = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.count = torch.zeros((), device=self.weight.device)

    def products(self) -> tuple[Tensor, Tensor]:
        """Adam's contender needs the gradient alone."""
        self.gradient = torch.bmm(self.problem.dy.mT, self.problem.x)
        return self.problem.x, self.problem.dy

    def update(self) -> None:
        self._update(self.problem.mask, self.gradient, *self.state(), self.count)

    def step(self) -> tuple[Tensor, Tensor]:
        problem = self.problem
        return self._whole(problem.x, problem.dy, problem.mask, *self.state(), self.count)

    def state(self) -> tuple[Tensor, ...]:
        return self.weight, self.m, self.v


def _masked_adam(mask: Tensor, grad: Tensor, *state: Tensor) -> None:
    _adam(state[0], grad * mask, *state[1:])


def _whole_step(
    x: Tensor, dy: Tensor, mask: Tensor, weight: Tensor, *state: Tensor
) -> tuple[Tensor, Tensor]:
    masked = weight * mask
    y, dx = torch.bmm(x, masked.mT), torch.bmm(dy, masked)
    _adam(weight, torch.bmm(dy.mT, x) * mask, *state)
    return y, dx
