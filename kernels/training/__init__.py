"""One training step with a head, on each backend: the frame that every update shares.

Draw a minibatch, run the networks forward, let a *head* turn their outputs into a loss and its
derivative, run them backward, clip and step Adam. PPO and cloning are heads; another algorithm is
one more, in an op of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..arena import Arena, Net, Parameters
from ..dispatch import PLAIN_TORCH, Backend, Plan, resolve_backend
from ..errors import check_density, check_untransformed
from ..mlp import describe_layers
from ..mlp.checks import check_counter, check_parameters

__all__ = ["Update", "plan_update"]

_Config = TypeVar("_Config")


class Update(NamedTuple, Generic[_Config]):
    """What the updates of every algorithm take beside what they learn from.

    Attributes:
        parameters: of P tickets; all but the mask are written.
        arena: their layout.
        key: ``[P]`` int64.
        first: number of the first update, or of PPO's iteration; on a GPU also a 0-dim tensor.
        lr: ``[P]`` float32 or float64.
        config: the algorithm's, with Adam's ``max_norm``, ``beta1``, ``beta2`` and ``eps``.
        density: nominal density of the level.
    """

    parameters: Parameters
    arena: Arena
    key: Tensor
    first: int | Tensor
    lr: Tensor
    config: _Config
    density: float

    def written(self) -> tuple[Tensor, ...]:
        """The parameters that updates write."""
        weight, _, m, v, step = self.parameters
        return weight, m, v, step

    def check(
        self,
        op: str,
        data: Mapping[str, Tensor],
        *,
        double: tuple[Backend, ...] = ("reference",),
        counter: str = "first_update",
        limit: int = 1 << 62,
    ) -> Update[_Config]:
        """The same as backends take it: without gradients, contiguous what they only read.

        Args:
            op: its name.
            data: what it learns from, of which only whose memory it is counts here.
            double: the backends that take float64 too.
            counter: what the op calls ``first``.
            limit: of it.

        Raises:
            ValueError: a shape, a device, a number out of range, or a tensor that is written and
                not contiguous or shares memory with another.
            TypeError: a dtype, or ``first`` no integer.
        """
        parameters, arena, key, first, lr, config, density = self
        check_untransformed(op, *parameters, lr, *data.values())
        first = check_counter(counter, first, limit, parameters.weight)
        check_density(density)
        takes_double = resolve_backend(parameters.weight.device, arena.actor) in double
        floats = (torch.float32, torch.float64) if takes_double else (torch.float32,)
        check_parameters(parameters, arena, key, lr, floats, data)
        weight, mask, m, v, step = (tensor.detach() for tensor in parameters)
        parameters = Parameters(weight, mask.contiguous(), m, v, step)
        lr = lr.detach().contiguous()
        return Update(parameters, arena, key.contiguous(), first, lr, config, float(density))


def plan_update(
    op: str,
    arena: Arena,
    nets: tuple[Net, ...],
    device: torch.device,
    density: float,
    on_gpu: str | None = None,
) -> Plan:
    """What an update does on ``device``, and why.

    Args:
        op: its name.
        arena: of the population.
        nets: those that take part.
        device: where.
        density: nominal, of the networks that are pruned.
        on_gpu: what Triton's backend does, if its step is not `training.gpu`'s by a head.
    """
    check_density(density)
    backend = resolve_backend(device, arena.actor)
    if backend == "triton":
        if on_gpu is None:
            from .gpu import describe

            on_gpu = describe(nets)
        return Plan(op, backend, "dense+mask", on_gpu)
    if backend == "reference":
        return Plan(op, backend, "dense+mask", PLAIN_TORCH)
    densities = tuple(density if net.weights[0] < arena.prunable else 1.0 for net in nets)
    return Plan(op, backend, *describe_layers(nets, densities))
