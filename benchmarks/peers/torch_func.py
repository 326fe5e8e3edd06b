"""`torch.func`: a plain `nn.Sequential` with masked weights, vmapped over the population."""

from __future__ import annotations

from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from sparse_tickets.timing import Contender

from ..problems import PolicyProblem

NAME = "torch.func, vmap of w*mask"


def policy(problem: PolicyProblem) -> Contender:
    """`vmap` of `functional_call` and its `vjp`: the documented way to train an ensemble."""
    activation = nn.Tanh if problem.activation == "tanh" else nn.ReLU
    parts: list[nn.Module] = []
    for inp, out in zip(problem.sizes, problem.sizes[1:], strict=False):
        parts += [nn.Linear(inp, out, device="meta"), activation()]
    network = nn.Sequential(*parts[:-1])
    names = [name for name, _ in network.named_parameters()]
    layers = problem.layers()
    leaves = [leaf.detach() for weight, bias, _ in layers for leaf in (weight, bias)]
    masks = [mask for _, _, mask in layers]

    def one(
        weights: list[Tensor], masks: list[Tensor], x: Tensor, dy: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        def apply(leaves: list[Tensor]) -> Tensor:
            masked = list(leaves)
            masked[::2] = [w * m for w, m in zip(leaves[::2], masks, strict=True)]
            return functional_call(network, dict(zip(names, masked, strict=True)), (x,))

        y, pull_back = vjp(apply, weights)
        (gradients,) = pull_back(dy)
        return y, gradients

    population = vmap(one)

    def run() -> tuple[Tensor, list[Tensor]]:
        return population(leaves, masks, problem.x, problem.dy)

    return problem.contender(NAME, run, lambda found: (found[0], problem.gather(found[1])))
