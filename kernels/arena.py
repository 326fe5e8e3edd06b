"""The flat arena: every parameter of a ticket in one row, a population in one ``[P, size]`` tensor.

A row holds, in this order, the prunable weight matrices (the actor's, and the critic's if asked)
layer by layer, row-major; then the actor's biases, the critic's weights and biases where these are
not prunable, and `log_std`. So a mask is a plain ``[P, prunable]`` prefix of the row, pruning is
global over layers without copying, and clipping and Adam are one pass over one tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from numbers import Integral
from typing import NamedTuple

from torch import Tensor

from .activations import ACTIVATIONS

__all__ = ["Arena", "Net", "Parameters"]


@dataclass(frozen=True)
class Net:
    """Where one multi-layer perceptron lies in a row of the arena.

    Attributes:
        sizes: features from input to output, e.g. ``(4, 64, 64, 2)``.
        activation: between the layers: ``tanh`` or ``relu``; the output layer is linear.
        weights: offset of each weight matrix ``[out, in]``, row-major.
        biases: offset of each bias vector ``[out]``.
    """

    sizes: tuple[int, ...]
    activation: str
    weights: tuple[int, ...]
    biases: tuple[int, ...]

    @property
    def code(self) -> tuple[int, ...]:
        """These attributes as integers, the form in which a registered op takes a network."""
        kind = list(ACTIVATIONS).index(self.activation)
        return kind, *self.sizes, *self.weights, *self.biases

    @staticmethod
    @cache
    def decode(code: tuple[int, ...]) -> Net:
        """The network of a `code`."""
        activation, *numbers = code
        depth = len(numbers) // 3
        sizes, offsets = tuple(numbers[: depth + 1]), tuple(numbers[depth + 1 :])
        return Net(sizes, list(ACTIVATIONS)[activation], offsets[:depth], offsets[depth:])

    @property
    def depth(self) -> int:
        """Number of linear layers."""
        return len(self.weights)

    def shape(self, layer: int) -> tuple[int, int]:
        """``(out, in)`` of a layer's weight."""
        return self.sizes[layer + 1], self.sizes[layer]

    def weight(self, flat: Tensor, layer: int) -> Tensor:
        """View ``[P, out, in]`` of a layer's weight in ``flat [P, size]`` (or a mask's prefix)."""
        out, inp = self.shape(layer)
        begin = self.weights[layer]
        return flat[:, begin : begin + out * inp].unflatten(1, (out, inp))

    def bias(self, flat: Tensor, layer: int) -> Tensor:
        """View ``[P, out]`` of a layer's bias."""
        begin = self.biases[layer]
        return flat[:, begin : begin + self.sizes[layer + 1]]

    def layers(self, flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(weight [P, out, in], bias [P, out])`` views from input to output."""
        for layer in range(self.depth):
            yield self.weight(flat, layer), self.bias(flat, layer)


@dataclass(frozen=True)
class Arena:
    """The layout of one ticket's parameters in a row of ``size`` entries.

    Attributes:
        actor: the policy (or Q-network, or cloned student).
        critic: the value network, or None.
        log_std: offset of the state-independent log standard deviations, or None if discrete.
        prunable: N, the length of the maskable prefix.
        size: length of a row.
    """

    actor: Net
    critic: Net | None
    log_std: int | None
    prunable: int
    size: int

    @staticmethod
    def build(
        actor: tuple[int, ...],
        critic: tuple[int, ...] | None = None,
        *,
        activation: str = "tanh",
        continuous: bool = False,
        prune_critic: bool = False,
    ) -> Arena:
        """Lay out a policy.

        Args:
            actor: features from observation to action head.
            critic: features from observation to value, or None for no critic.
            activation: ``tanh`` or ``relu``.
            continuous: reserve ``actor[-1]`` entries for ``log_std``.
            prune_critic: count the critic's weights among the prunable ones.

        Raises:
            TypeError: a size that is no integer.
            ValueError: fewer than two sizes, a size below 1, an unknown activation, or
                `prune_critic` without a critic.
        """
        if activation not in ACTIVATIONS:
            names = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation must be one of {names}, got {activation!r}")
        for name, sizes in (("actor", actor), ("critic", critic)):
            if sizes is None:
                continue
            if not all(isinstance(size, Integral) for size in sizes):
                raise TypeError(f"{name} must be sizes that are integers, got {sizes}")
            if len(sizes) < 2 or min(sizes) < 1:
                raise ValueError(f"{name} must be at least two sizes >= 1, got {sizes}")
        if prune_critic and critic is None:
            raise ValueError("prune_critic needs a critic, got critic=None")

        cursor = 0

        def take(count: int) -> int:
            nonlocal cursor
            cursor += count
            return cursor - count

        def take_weights(sizes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(take(inp * out) for inp, out in pairwise(sizes))

        def take_biases(sizes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(take(out) for out in sizes[1:])

        critic_weights: tuple[int, ...] | None = None
        actor_weights = take_weights(actor)
        if critic is not None and prune_critic:
            critic_weights = take_weights(critic)
        prunable = cursor
        actor_net = Net(actor, activation, actor_weights, take_biases(actor))
        critic_net = None
        if critic is not None:
            critic_weights = critic_weights or take_weights(critic)
            critic_net = Net(critic, activation, critic_weights, take_biases(critic))
        log_std = take(actor[-1]) if continuous else None
        return Arena(actor_net, critic_net, log_std, prunable, cursor)

    @property
    def nets(self) -> tuple[Net, ...]:
        """The actor, and the critic if there is one."""
        return (self.actor,) if self.critic is None else (self.actor, self.critic)

    def prunable_layers(self) -> list[tuple[int, int, int]]:
        """``(offset, out, in)`` of every weight matrix under the mask, in order of offset."""
        return [
            (offset, *net.shape(layer))
            for net in self.nets
            for layer, offset in enumerate(net.weights)
            if offset < self.prunable
        ]


class Parameters(NamedTuple):
    """What training changes: weights, Adam moments and step counts of a population, and its mask.

    Attributes:
        weight: ``[P, size]`` float32; exactly zero where the mask is False.
        mask: ``[P, prunable]`` bool.
        m: ``[P, size]`` float32, Adam's first moment.
        v: ``[P, size]`` float32, Adam's second moment.
        step: ``[P]`` int64, optimiser steps taken.
    """

    weight: Tensor
    mask: Tensor
    m: Tensor
    v: Tensor
    step: Tensor
