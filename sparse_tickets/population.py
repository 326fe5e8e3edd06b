"""A population of policies: one arena, its parameters, named initialisations, forward."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_tickets.envs import EnvSpec
from sparse_tickets.kernels.arena import Arena, Net, Parameters, chain
from sparse_tickets.kernels.mlp import mlp
from sparse_tickets.kernels.random import Stream, normal

__all__ = ["INITIALISATIONS", "Population", "initialise", "policy_arena"]

INITIALISATIONS = ("lecun", "kaiming", "orthogonal", "rescaled")


def policy_arena(
    env: EnvSpec,
    hidden: tuple[int, ...] = (64, 64),
    *,
    activation: str = "tanh",
    architecture: str = "mlp",
    critic: bool = True,
    prune_critic: bool = False,
    squashed: bool = False,
) -> Arena:
    """The arena of an actor (and critic) of equal hidden sizes for an environment's spaces.

    What hidden sizes are of an architecture, `kernels.arena.chain` says.

    Raises:
        ValueError: an unknown activation or architecture, a hidden size below 1 or none where the
            architecture needs one, or a squashed policy for actions that are discrete or have no
            bounds.
    """
    if squashed:
        _check_bounded(env)
    inputs, outputs = env.observation_dim, env.action_dim
    actor_sizes = chain(architecture, inputs, hidden, 2 * outputs if squashed else outputs)
    critic_sizes = chain(architecture, inputs + outputs if squashed else inputs, hidden, 1)
    return Arena.build(
        actor_sizes,
        critic_sizes if critic else None,
        activation=activation,
        architecture=architecture,
        continuous=not (env.discrete or squashed),
        prune_critic=prune_critic,
        squashed=squashed,
    )


def _check_bounded(env: EnvSpec) -> None:
    if env.discrete:
        raise ValueError(
            f"a squashed policy, as sac trains, needs continuous actions, {env.name} has discrete "
            "ones: train by ppo or dqn"
        )
    if not all(map(math.isfinite, env.action_low + env.action_high)):
        raise ValueError(
            f"a squashed policy, as sac trains, needs actions with bounds, {env.name} has "
            f"{env.action_low} and {env.action_high}: give its action space finite ones, or train "
            "by ppo"
        )


def initialise(arena: Arena, key: Tensor, scheme: str = "lecun", log_std: float = 0.0) -> Tensor:
    """Initial weights ``[P, size]`` float32, one Philox key per ticket; biases zero.

    ``lecun`` (Klambauer et al., 2017) and ``kaiming`` (He et al., 2015) draw normals of variance
    1/in and 2/in for every layer, heads included; ``orthogonal`` (Saxe et al., 2014) has gain
    sqrt(2), 0.01 for the actor's head and 1 for the critic's, as PPO codebases use it. No scheme
    asks for the activation: 1/in is made for tanh, 2/in for relu, and suits elu, silu and gelu: of
    a unit normal's second moment relu passes on 0.50, they 0.64, 0.36 and 0.43.

    ``rescaled`` is ``lecun`` with layer l multiplied by c_l = s / s_l, where s_l = in_l^(-1/2) is
    its standard deviation and s the geometric mean of them all. Every layer then has the standard
    deviation s, so magnitudes are drawn from one distribution and a global ranking of them keeps
    the same share of each, 0.8^k at level k, where lecun's favours layers of few inputs. The
    product of the c_l is 1: biases being zero, a relu network computes what it did, and a tanh
    network does to first order. LayerNorm undoes the factors before it: there the layers still
    prune alike, but a network computes c_L times what it did, L being its head, and in a residual
    one each block adds c_1 c_2 / c_0 of what it did to the stream. (Vischer et al., 2022, propose
    to rescale, without a formula that we could read; this one is ours.)

    Args:
        arena: the layout.
        key: ``[P]`` int64, one key per ticket.
        scheme: one of `INITIALISATIONS`.
        log_std: log standard deviation of continuous actions.

    Raises:
        ValueError: an unknown scheme.
    """
    if scheme not in INITIALISATIONS:
        raise ValueError(f"scheme must be one of {INITIALISATIONS}, got {scheme!r}")
    flat = torch.zeros(len(key), arena.size, dtype=torch.float32, device=key.device)
    for index, net in enumerate(arena.nets):
        common = math.prod(net.sizes[:-1]) ** (-0.5 / net.depth)
        for layer in range(net.depth):
            out, inp = net.shape(layer)
            draw = normal(key, out * inp, stream=Stream.INIT, step=64 * index + layer)
            draw = draw.unflatten(1, (out, inp))
            if scheme == "orthogonal":
                head_gain = 0.01 if net is arena.actor else 1.0
                gain = head_gain if layer == net.depth - 1 else math.sqrt(2.0)
                weight = gain * _orthogonal(draw)
            elif scheme == "rescaled":
                weight = draw * common
            else:
                weight = draw * math.sqrt((1.0 if scheme == "lecun" else 2.0) / inp)
            net.weight(flat, layer).copy_(weight)
    if arena.log_std is not None:
        flat[:, arena.log_std : arena.log_std + arena.actor.sizes[-1]] = log_std
    return flat


def _orthogonal(draw: Tensor) -> Tensor:
    tall = draw if draw.shape[1] >= draw.shape[2] else draw.mT
    q, r = torch.linalg.qr(tall.double())
    # The sign of R's diagonal makes the distribution uniform (Mezzadri, 2007).
    q = q * torch.diagonal(r, dim1=1, dim2=2).sign().unsqueeze(1)
    return (q if tall is draw else q.mT).to(draw.dtype)


@dataclass
class Population:
    """P policies of one architecture, every mask different, trained together.

    Attributes:
        arena: where each parameter lies in a row.
        parameters: weights, masks, Adam moments and step counts (changed in place by training).
        density: the level's nominal density; with the shapes it fixes which kernels run.
    """

    arena: Arena
    parameters: Parameters
    density: float = 1.0

    @classmethod
    def create(
        cls, arena: Arena, weight: Tensor, mask: Tensor | None = None, density: float = 1.0
    ) -> Population:
        """A population at the start of training: moments and step counts zero.

        Args:
            arena: the layout.
            weight: ``[P, size]`` float32, copied; zeroed off the mask.
            mask: ``[P, prunable]`` bool, or None for dense.
            density: the nominal density of the masks, in [0, 1].

        Raises:
            ValueError: shapes that do not fit the arena, or a density outside [0, 1].
        """
        if weight.ndim != 2 or weight.shape[1] != arena.size:
            raise ValueError(f"weight must have shape (P, {arena.size}), got {tuple(weight.shape)}")
        if not 0.0 <= density <= 1.0:
            raise ValueError(f"density must be in [0, 1], got {density}")
        shape = (weight.shape[0], arena.prunable)
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=weight.device)
        if tuple(mask.shape) != shape or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be bool of shape {shape}, got {mask.dtype} {tuple(mask.shape)}"
            )
        weight = weight.clone(memory_format=torch.contiguous_format)
        weight[:, : arena.prunable].masked_fill_(~mask, 0.0)
        parameters = Parameters(
            weight=weight,
            mask=mask.clone(memory_format=torch.contiguous_format),
            m=torch.zeros_like(weight),
            v=torch.zeros_like(weight),
            step=torch.zeros(shape[0], dtype=torch.int64, device=weight.device),
        )
        return cls(arena, parameters, density)

    def to(self, device: torch.device | str) -> Population:
        """The same policies on a device; tensors that are there already are not copied."""
        parameters = Parameters(*(value.to(device) for value in self.parameters))
        return Population(self.arena, parameters, self.density)

    def __len__(self) -> int:
        return self.parameters.weight.shape[0]

    def actor(self, obs: Tensor) -> Tensor:
        """Action logits (discrete) or means (continuous): ``[P, B, obs] -> [P, B, act]``.

        A squashed policy's means are followed by as many log standard deviations.
        """
        return self._forward(self.arena.actor, obs)

    def critic(self, obs: Tensor) -> Tensor:
        """State values: ``[P, B, obs] -> [P, B]``; a squashed policy's of observation and action.

        Raises:
            ValueError: the arena has no critic.
        """
        if self.arena.critic is None:
            raise ValueError("this population has no critic: build its arena with critic=True")
        return self._forward(self.arena.critic, obs).squeeze(2)

    def _forward(self, net: Net, obs: Tensor) -> Tensor:
        weight, mask = self.parameters.weight, self.parameters.mask
        return mlp(obs, weight, net, mask, density=self.density)

    def with_weight(self, weight: Tensor) -> Parameters:
        """The parameters with other weights ``[P, size]``, e.g. a checkpoint to evaluate."""
        return self.parameters._replace(weight=weight)
