"""The flat arena: every parameter of a ticket in one row, a population in one ``[P, size]`` tensor.

A row holds, in this order, the prunable weight matrices (the actor's, and the critic's if asked)
layer by layer, row-major; then the actor's biases, the critics' weights and biases where these are
not prunable, and `log_std` or the temperature. So a mask is a plain ``[P, prunable]`` prefix of the
row, pruning is global over layers without copying, and clipping and Adam are one pass over one
tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import cache
from itertools import pairwise
from numbers import Integral
from typing import NamedTuple

from torch import Tensor

from .activations import ACTIVATIONS, KNOWN, LAYERNORM

__all__ = ["ARCHITECTURES", "Arena", "Net", "Parameters", "Processor", "chain"]

ARCHITECTURES = ("mlp", "residual")
"""How layers follow each other; see `chain`."""


class Processor(Enum):
    """Where kernels run, which do not have the same networks everywhere; as errors say it."""

    CPU = "a CPU"
    GPU = "a GPU"


def chain(architecture: str, inputs: int, hidden: tuple[int, ...], outputs: int) -> tuple[int, ...]:
    """The features of a network from input to output, as `Arena.build` takes them.

    ``mlp``: layer after layer, with the activation after each but the last. ``residual``, SimBa's
    network (Lee et al., 2024): a linear layer to a stream h of ``w = hidden[0]`` features; a block
    ``h + W2 act(W1 LN(h) + b1) + b2`` for every further size d, W1 ``[d, w]`` and W2 ``[w, d]``;
    and a linear head of LN(h). LN brings the features of a sample to mean 0 and variance 1. It has
    no factors and offsets: only linear layers read it, and their weights and biases say the same.

    Args:
        architecture: one of `ARCHITECTURES`.
        inputs: features of the input.
        hidden: sizes.
        outputs: features of the output.

    Raises:
        ValueError: an unknown architecture, or a residual one without hidden sizes.
    """
    _check_architecture(architecture)
    if architecture == "mlp":
        return (inputs, *hidden, outputs)
    if not hidden:
        raise ValueError(
            "hidden must name a width, and the inner size of every block, for the architecture "
            f"residual, got {hidden}"
        )
    width, *inner = hidden
    blocks = (size for each in inner for size in (each, width))
    return (inputs, width, *blocks, outputs)


def _check_architecture(name: str) -> None:
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {name!r}")


@dataclass(frozen=True)
class Net:
    """Where one network lies in a row of the arena, and what each of its layers does.

    Layer l reads the output of layer l - 1, through LayerNorm where it `normalises`, adds to its
    product the output of an earlier layer where there is one that it `adds`, and hands the sum
    through the activation where it `activates`.

    Attributes:
        sizes: features from input to output, e.g. ``(4, 64, 64, 2)``.
        activation: between the layers, one of `ACTIVATIONS`; the output layer is linear.
        weights: offset of each weight matrix ``[out, in]``, row-major.
        biases: offset of each bias vector ``[out]``.
        architecture: one of `ARCHITECTURES`; see `chain`.
    """

    sizes: tuple[int, ...]
    activation: str
    weights: tuple[int, ...]
    biases: tuple[int, ...]
    architecture: str = "mlp"

    @property
    def code(self) -> tuple[int, ...]:
        """These attributes as integers, the form in which a registered op takes a network."""
        kind = list(ACTIVATIONS).index(self.activation)
        architecture = ARCHITECTURES.index(self.architecture)
        return kind, architecture, *self.sizes, *self.weights, *self.biases

    @staticmethod
    @cache
    def decode(code: tuple[int, ...]) -> Net:
        """The network of a `code`."""
        kind, architecture, *numbers = code
        depth = len(numbers) // 3
        sizes, offsets = tuple(numbers[: depth + 1]), tuple(numbers[depth + 1 :])
        activation, name = list(ACTIVATIONS)[kind], ARCHITECTURES[architecture]
        return Net(sizes, activation, offsets[:depth], offsets[depth:], name)

    @property
    def depth(self) -> int:
        """Number of linear layers."""
        return len(self.weights)

    @property
    def kept(self) -> int:
        """Entries of a sample that a backward pass reads of the hidden layers.

        Their outputs, layer by layer; then their sums of products too, where the activation's
        derivative is read off these.
        """
        hidden = sum(self.sizes[1:-1])
        return hidden if ACTIVATIONS[self.activation].by_output else 2 * hidden

    def normalises(self, layer: int) -> bool:
        """Whether LayerNorm stands before a layer: the blocks' first ones, and the head."""
        return self.architecture == "residual" and layer % 2 == 1

    def adds(self, layer: int) -> int | None:
        """The earlier layer whose output joins a layer's own: a block's second adds the stream."""
        ends_block = self.architecture == "residual" and layer > 0 and layer % 2 == 0
        return layer - 2 if ends_block else None

    def activates(self, layer: int) -> bool:
        """Whether the activation follows a layer: the blocks' first, or all but the last."""
        inside = self.architecture == "mlp" or layer % 2 == 1
        return inside and layer < self.depth - 1

    @property
    def function(self) -> str:
        """The activation alone, without the LayerNorm before it."""
        return self.activation.removeprefix(LAYERNORM)

    def is_normalised(self, layer: int) -> bool:
        """Whether LayerNorm follows a layer: before its activation, or as the next one's input."""
        if self.activates(layer):
            return self.activation != self.function
        return layer < self.depth - 1 and self.normalises(layer + 1)

    @property
    def has_layernorm(self) -> bool:
        """Whether units depend on each other through LayerNorm, those without weights too."""
        return any(map(self.is_normalised, range(self.depth)))

    def obstacle(self, processor: Processor) -> str | None:
        """What the kernels of a processor lack of it, as an error says it; or None."""
        on_cpu = processor is Processor.CPU
        if (self.function if on_cpu else self.activation) not in KNOWN:
            names = ", ".join(KNOWN)
            return (
                f"activation must be one of {names} on {processor.value}, got {self.activation!r}"
            )
        if self.architecture != "mlp" and not on_cpu:
            return f"architecture must be mlp on {processor.value}, got {self.architecture!r}"
        return None

    def check_kernels(self, processor: Processor) -> None:
        """Raise ``ValueError`` of an `obstacle`."""
        if obstacle := self.obstacle(processor):
            raise ValueError(obstacle)

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
        critic: the value network, or None; of a squashed policy the first of two, which value an
            observation followed by an action.
        log_std: offset of the state-independent log standard deviations, or None if discrete or
            squashed.
        prunable: N, the length of the maskable prefix.
        size: length of a row.
        squashed: whether actions are the hyperbolic tangents of a Gaussian's samples, the actor's
            outputs the means and log standard deviations of it.
        twin: the second critic of a squashed policy, of the first one's sizes, or None.
        temperature: offset of the logarithm of a squashed policy's temperature, or None without
            critics.
    """

    actor: Net
    critic: Net | None
    log_std: int | None
    prunable: int
    size: int
    squashed: bool = False
    twin: Net | None = None
    temperature: int | None = None

    @staticmethod
    def build(
        actor: tuple[int, ...],
        critic: tuple[int, ...] | None = None,
        *,
        activation: str = "tanh",
        architecture: str = "mlp",
        continuous: bool = False,
        prune_critic: bool = False,
        squashed: bool = False,
    ) -> Arena:
        """Lay out a policy.

        Args:
            actor: features from observation to action head, a `chain`.
            critic: features from observation (a squashed policy's: and action) to value, or None
                for no critic.
            activation: one of `ACTIVATIONS`: tanh, relu, elu, silu or gelu.
            architecture: one of `ARCHITECTURES`: mlp or residual.
            continuous: reserve ``actor[-1]`` entries for ``log_std``.
            prune_critic: count the critic's weights among the prunable ones.
            squashed: the actor's outputs are means, then as many log standard deviations, and a
                critic comes with its twin and a temperature.

        Raises:
            TypeError: a size that is no integer.
            ValueError: fewer than two sizes, a size below 1, sizes that are no residual network's,
                an unknown activation or architecture, `prune_critic` without a critic, or
                `squashed` with `continuous` or an odd number of outputs.
        """
        _check_architecture(architecture)
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
            stream = sizes[1:-1:2]
            if architecture == "residual" and (len(sizes) % 2 == 0 or len(set(stream)) > 1):
                raise ValueError(
                    f"{name} must be inputs, width, then (inner, width) for every block, and "
                    f"outputs, for the architecture residual, got {sizes}"
                )
        if prune_critic and critic is None:
            raise ValueError("prune_critic needs a critic, got critic=None")

        if squashed and (continuous or actor[-1] % 2):
            raise ValueError(
                "squashed needs an even number of outputs and continuous=False, got "
                f"actor={actor}, continuous={continuous}"
            )

        cursor = 0

        def take(count: int) -> int:
            nonlocal cursor
            cursor += count
            return cursor - count

        def take_weights(sizes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(take(inp * out) for inp, out in pairwise(sizes))

        def take_biases(sizes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(take(out) for out in sizes[1:])

        critics = () if critic is None else (critic, critic) if squashed else (critic,)
        actor_weights = take_weights(actor)
        weights = [take_weights(sizes) for sizes in critics if prune_critic]
        prunable = cursor
        actor_net = Net(actor, activation, actor_weights, take_biases(actor), architecture)
        nets = []
        for index, sizes in enumerate(critics):
            own = weights[index] if prune_critic else take_weights(sizes)
            nets.append(Net(sizes, activation, own, take_biases(sizes), architecture))
        first, twin, *_ = *nets, None, None
        log_std = take(actor[-1]) if continuous else None
        temperature = take(1) if twin is not None else None
        return Arena(actor_net, first, log_std, prunable, cursor, squashed, twin, temperature)

    @property
    def continuous(self) -> bool:
        """Whether actions are numbers."""
        return self.squashed or self.log_std is not None

    @property
    def actions(self) -> int:
        """How many actions there are, or of how many numbers one is."""
        return self.actor.sizes[-1] // (2 if self.squashed else 1)

    @property
    def critics(self) -> tuple[Net, ...]:
        """The critic, and its twin; none, or one of them, where there is no more."""
        return tuple(net for net in (self.critic, self.twin) if net is not None)

    @property
    def nets(self) -> tuple[Net, ...]:
        """The actor, and the critics if there are any."""
        return (self.actor, *self.critics)

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
