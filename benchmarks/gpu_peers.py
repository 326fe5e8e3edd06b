"""What a layer, an optimiser step and pruning on a GPU are compared with: plain torch at its best.

Every peer runs captured in a CUDA graph too (`gpu_clock`), and with the same precision of products
as ours: `torch.set_float32_matmul_precision` is the caller's. Weights hold their zeros already.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparse_tickets.timing import Contender

from .gpu_problems import ADAM, LayerProblem, Step, distance
from .peers import Unavailable

__all__ = [
    "COMPILED",
    "DENSE",
    "MASKED",
    "adam_compiled",
    "adam_dense",
    "backward_dense",
    "backward_masked",
    "can_compile",
    "step_compiled",
    "step_dense",
    "step_masked",
    "topk_prune",
]

DENSE = "torch dense"
MASKED = "torch w*mask"
COMPILED = "torch.compile w*mask"


def can_compile(device: torch.device) -> None:
    """Raise where `torch.compile` is of no use.

    Raises:
        Unavailable: not on a GPU.
    """
    if device.type != "cuda":
        raise Unavailable("torch.compile is measured on a GPU only")


class _Dense:
    """A dense layer with torch's fused Adam, its gradients by hand: no autograd to wait for.

    Autograd's gradient of a transposed weight would be transposed as well, and so copied.
    """

    def __init__(self, problem: LayerProblem, masked: bool) -> None:
        self.problem, self.masked = problem, masked
        self.restart()

    def restart(self) -> None:
        self.weight = self.problem.weight.clone().requires_grad_()
        on_gpu = self.problem.device.type == "cuda"
        self.optimizer = torch.optim.Adam([self.weight], fused=True, capturable=on_gpu, **ADAM)

    def step(self) -> tuple[Tensor, Tensor]:
        """``(y, dx)``, and the weight trained."""
        x, dy, weight = self.problem.x, self.problem.dy, self.weight.detach()
        if self.masked:
            weight = weight * self.problem.mask
        y, dx = torch.bmm(x, weight.mT), torch.bmm(dy, weight)
        grad = torch.bmm(dy.mT, x)
        self.update(grad.mul_(self.problem.mask) if self.masked else grad)
        return y, dx

    def update(self, grad: Tensor) -> None:
        self.weight.grad = grad
        self.optimizer.step()

    def found(self, y: Tensor, dx: Tensor) -> Step:
        """The result as a masked network would have it: a dense layer trains pruned weights too."""
        state = self.optimizer.state[self.weight]
        parts = (self.weight.detach(), state["exp_avg"], state["exp_avg_sq"])
        return Step(y, dx, *(part.masked_fill(~self.problem.mask, 0) for part in parts))


def _step(problem: LayerProblem, name: str, masked: bool) -> Contender:
    layer = _Dense(problem, masked)

    def error() -> float:
        layer.restart()
        return problem.step_error(layer.found(*layer.step()))

    return Contender(name, layer.step, error)


def step_dense(problem: LayerProblem) -> Contender:
    """`torch.bmm` forward and backward, then `torch.optim.Adam(fused=True)`; no mask anywhere."""
    return _step(problem, DENSE, masked=False)


def step_masked(problem: LayerProblem) -> Contender:
    """The same with the mask multiplied in, into weight and gradient."""
    return _step(problem, MASKED, masked=True)


def _adam(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, count: Tensor) -> None:
    """One step in place, for a compiler to fuse."""
    beta1, beta2 = ADAM["betas"]
    count.add_(1)
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (v / (1 - beta2**count)).sqrt() + ADAM["eps"]
    weight.sub_(ADAM["lr"] / (1 - beta1**count) * m / root)


class _State:
    """Weight, moments and number of steps at the start of training."""

    def __init__(self, problem: LayerProblem) -> None:
        self.problem = problem
        self.restart()

    def restart(self) -> None:
        self.weight = self.problem.weight.clone()
        self.m, self.v = torch.zeros_like(self.weight), torch.zeros_like(self.weight)
        self.count = torch.zeros((), device=self.weight.device)

    def parts(self) -> tuple[Tensor, ...]:
        return self.weight, self.m, self.v, self.count


def step_compiled(problem: LayerProblem) -> Contender:
    """`w*mask`, its gradients and Adam in one `torch.compile`d function, compiled before the clock.

    Raises:
        Unavailable: not on a GPU.
    """
    can_compile(problem.device)
    state, mask = _State(problem), problem.mask

    @torch.compile(fullgraph=True)
    def step(
        x: Tensor, dy: Tensor, weight: Tensor, m: Tensor, v: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor]:
        masked = weight * mask
        y, dx = torch.bmm(x, masked.mT), torch.bmm(dy, masked)
        _adam(weight, torch.bmm(dy.mT, x) * mask, m, v, count)
        return y, dx

    def run() -> tuple[Tensor, Tensor]:
        return step(problem.x, problem.dy, *state.parts())

    def error() -> float:
        state.restart()
        y, dx = run()
        return problem.step_error(Step(y, dx, state.weight, state.m, state.v))

    return Contender(COMPILED, run, error)


def adam_compiled(problem: LayerProblem) -> Contender:
    """Adam with the mask multiplied into the gradient, compiled before the clock starts.

    Raises:
        Unavailable: not on a GPU.
    """
    can_compile(problem.device)
    state, mask = _State(problem), problem.mask
    grad = torch.bmm(problem.dy.mT, problem.x)

    @torch.compile(fullgraph=True)
    def step(weight: Tensor, m: Tensor, v: Tensor, count: Tensor) -> None:
        _adam(weight, grad * mask, m, v, count)

    def error() -> float:
        state.restart()
        step(*state.parts())
        found = Step(problem.step.y, problem.step.dx, state.weight, state.m, state.v)
        return problem.step_error(found)

    return Contender(COMPILED, lambda: step(*state.parts()), error)


def backward_dense(problem: LayerProblem) -> Contender:
    """``(y, dx, dW, db)`` by `torch.baddbmm` (cuBLAS); dW is masked untimed."""
    x, weight, bias = problem.leaves()
    return _backward(problem, DENSE, (x, weight, bias), weight=lambda: weight)


def backward_masked(problem: LayerProblem) -> Contender:
    """The same with the mask multiplied in."""
    x, weight, bias = problem.leaves()
    return _backward(problem, MASKED, (x, weight, bias), weight=lambda: weight * problem.mask)


def _backward(
    problem: LayerProblem, name: str, leaves: tuple[Tensor, ...], weight: Callable[[], Tensor]
) -> Contender:
    x, _, bias = leaves

    def run() -> tuple[Tensor, ...]:
        if len(x) == 1:
            y = torch.nn.functional.linear(x[0], weight()[0], bias[0])[None]
        else:
            y = torch.baddbmm(bias[:, None], x, weight().mT)
        return (y.detach(), *torch.autograd.grad(y, leaves, problem.dy))

    def error() -> float:
        y, dx, dw, db = run()
        found = (y, dx, dw.masked_fill(~problem.mask, 0), db)
        return distance(found, problem.forward_backward, problem.terms, problem.precision)

    return Contender(name, run, error)


def adam_dense(problem: LayerProblem) -> Contender:
    """Torch's fused Adam on the whole dense weight."""
    layer = _Dense(problem, masked=False)
    grad = torch.bmm(problem.dy.mT, problem.x)

    def error() -> float:
        layer.restart()
        layer.update(grad)
        return problem.step_error(layer.found(problem.step.y, problem.step.dx))

    return Contender(DENSE, lambda: layer.update(grad), error)


def topk_prune(scores: Tensor, mask: Tensor, kept: int, expected: Tensor) -> Contender:
    """`torch.topk` of the scores inside the mask, scattered into a new mask."""

    def run() -> Tensor:
        best = torch.where(mask, scores, -1.0).topk(kept, dim=1, sorted=False).indices
        return torch.zeros_like(mask).scatter_(1, best, True)

    # Wrong entries: none are allowed; the scores are all different.
    return Contender("torch.topk", run, lambda: 2.0 * float((run() != expected).sum()))
