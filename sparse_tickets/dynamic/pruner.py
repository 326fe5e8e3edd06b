"""`Pruner`: a method of sparse training in a training loop of one's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sparse_tickets.convert import sparsify_
from sparse_tickets.coverage import group_shared
from sparse_tickets.kernels.random import derive_key
from sparse_tickets.linear import SparseLinear, count_kept

from .course import Course, find_method
from .distributions import Layer, layer_counts
from .method import Method
from .scores import DROP_SCORES, GROW_SCORES, Moment
from .update import update_mask

__all__ = ["Pruner"]


class Pruner:
    """Prunes and regrows the linear layers of a module while it trains.

    ::

        pruner = Pruner(policy, "rigl", density=0.1, steps=100_000)
        for batch in batches:
            optimizer.zero_grad()
            loss(policy, batch).backward()
            optimizer.step()
            pruner.step()

    Exactly ``floor(density * N + 0.5)`` of the N weights of its layers are kept at every moment, by
    the method's distribution over layers. Grown weights and their optimiser state start at zero. A
    dense gradient is computed in the backward passes before an update alone, and only if a score
    reads it. An actor and a critic under different methods take a pruner each.

    Args:
        module: any module; its linear layers become `SparseLinear` here, in place.
        method: a `Method`, or one of `METHODS`.
        density: of the finished network, in [0, 1].
        steps: gradient steps of the whole training, which the schedule is laid over.
        exclude: names of layers, or of modules whose layers, stay as they are.
        seed: of random scores.

    Attributes:
        count: gradient steps so far.

    Raises:
        ValueError: an unknown method, a density outside [0, 1], steps below 1, or a module that
            `sparsify_` refuses.
    """

    def __init__(
        self,
        module: nn.Module,
        method: Method | str,
        density: float,
        steps: int,
        *,
        exclude: Iterable[str] = (),
        seed: int = 0,
    ) -> None:
        method = find_method(method)
        # Before anything is changed.
        Course(method, steps, 1.0, density)
        self._layers = _sparse_layers(module, [exclude] if isinstance(exclude, str) else [*exclude])
        self._places = _places(layer for layer, *_ in self._layers.values())
        self._size = sum(layer.weight.numel() for layer, *_ in self._layers.values())
        self._key = torch.tensor([derive_key("pruner", seed)], dtype=torch.int64, device="cpu")
        self._course = Course(method, steps, self.density, density)
        self._initial = self._gather("weight")
        self._gradients: dict[str, Tensor] = {}
        self._passes: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []
        # Whether an update waits for a gradient that is finite.
        self._late = False
        self.count = 0
        if method.schedule == "constant":
            self._update_(replace(method, drop="random", grow="none"))
        self._arm()

    @property
    def density(self) -> float:
        """Of the layers under this pruner, all together."""
        kept = sum(int(layer.mask.count_nonzero()) for layer, *_ in self._layers.values())
        return kept / self._size if self._size else 1.0

    def step(self) -> bool:
        """Count a gradient step, to be called after the optimiser's; update the masks if due.

        Where a score reads a gradient that is not finite, as that of a scaled loss may be, the
        update waits for the next step.

        Returns:
            Whether the masks were updated.

        Raises:
            RuntimeError: a layer had no part in the backward pass whose gradient is asked for.
        """
        self.count += 1
        due = self._late or self._course.is_due(self.count)
        updated = due and self._update_(self._course.method)
        self._late = due and not updated
        self._arm()
        return updated

    def state_dict(self) -> dict[str, Any]:
        """What goes on from a checkpoint; the masks are in the module's own."""
        return {
            "count": self.count,
            "late": self._late,
            "initial_density": self._course.initial,
            "initial": self._initial,
            "key": self._key,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, whose module must be loaded too.

        Raises:
            ValueError: the state is no pruner's, or of a module with another number of weights.
        """
        if missing := self.state_dict().keys() - state.keys():
            raise ValueError(
                f"state must be a pruner's, got one without {', '.join(sorted(missing))}"
            )
        if state["initial"].shape != self._initial.shape:
            raise ValueError(
                f"state must be of a module with {self._size} weights in its sparse layers, got "
                f"one with {state['initial'].shape[1]}"
            )
        self.count, self._late = state["count"], state["late"]
        self._course = replace(self._course, initial=state["initial_density"])
        self._initial = state["initial"].to(self._initial)
        self._key = state["key"].clone()
        self._arm()

    @torch.no_grad()
    def _update_(self, method: Method) -> bool:
        """Update the masks; False, and nothing done, where the gradient is not finite."""
        gradient = self._take_gradient() if method.needs_gradient else None
        if gradient is not None and not gradient.isfinite().all():
            return False
        mask, growing = self._gather("mask"), GROW_SCORES[method.grow]
        k = count_kept(self._course.density(self.count), self._size)
        if growing is None:
            k = min(k, int(mask.count_nonzero()))
        kept = [int(mask[:, at].count_nonzero()) for at in map(_slice, self._places)]
        available = kept if growing is None else None
        counts = layer_counts(method.distribution, self._places, k, available, method.shares)
        moment = Moment(self._gather("weight"), self._initial, gradient, self._key, self.count)
        updated = update_mask(
            mask,
            DROP_SCORES[method.drop](moment),
            None if growing is None else growing(moment),
            k,
            replaced=self._course.replaced(self.count),
            layers=self._places,
            counts=counts,
        )
        for place, layers in zip(self._places, self._layers.values(), strict=True):
            for layer in layers:
                layer.set_mask_(updated[0, _slice(place)].view(layer.mask.shape))
        return True

    def _gather(self, name: str) -> Tensor:
        """A tensor of every layer in one row on the CPU, ``[1, N]``."""
        layers = [layer for layer, *_ in self._layers.values()]
        rows = [getattr(layer, name).detach().flatten().cpu() for layer in layers]
        row = torch.cat(rows)[None]
        return row if row.dtype in (torch.bool, torch.float64) else row.float()

    def _arm(self) -> None:
        """Have the next backward passes leave dense gradients, if an update follows them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._gradients.clear()
        next_is_due = self._late or self._course.is_due(self.count + 1)
        if self._course.method.needs_gradient and next_is_due:
            self._handles += [
                layer.register_forward_hook(partial(self._listen, name), with_kwargs=True)
                for name, layers in self._layers.items()
                for layer in layers
                if layer.weight is layers[0].weight
            ]

    def _listen(
        self, name: str, layer: nn.Module, args: tuple[Any, ...], named: Any, output: Tensor
    ) -> None:
        if output.requires_grad:
            input = args[0] if args else named["input"]
            output.register_hook(partial(self._add_gradient, name, input.detach()))

    @torch.no_grad()
    def _add_gradient(self, name: str, input: Tensor, gradient: Tensor) -> None:
        """Add a backward pass's dense gradient by a layer's weight, ``[out, in]``.

        What ``zero_grad`` dropped from the weight is dropped here too: an actor's loss passes
        through a critic, whose own loss alone is to tell where it grows.
        """
        rows, columns = (x.reshape(-1, x.shape[-1]) for x in (gradient, input))
        wide = torch.promote_types(rows.dtype, torch.float32)
        found = (rows.mT.to(wide) @ columns.to(wide)).cpu()
        # A pass leaves its gradient at the weight when it is through all calls of the layer.
        this = torch._C._current_graph_task_id()
        dropped = self._passes.get(name) != this and _is_zero(self._layers[name][0].weight.grad)
        self._passes[name] = this
        if name in self._gradients and not dropped:
            found += self._gradients[name]
        self._gradients[name] = found

    def _take_gradient(self) -> Tensor:
        missing = [name for name in self._layers if name not in self._gradients]
        if missing:
            raise RuntimeError(
                "every layer must take part in the backward pass before an update, got "
                f"none through {', '.join(map(repr, missing))} before step {self.count}: exclude "
                "them, call step only after the optimiser steps that train them, and train the "
                "module itself where torch.compile would leave out its hooks"
            )
        return torch.cat([self._gradients[name].flatten() for name in self._layers])[None]


def _sparse_layers(module: nn.Module, exclude: list[str]) -> dict[str, list[SparseLinear]]:
    """Every linear layer that is not excluded, sparse now, with those that follow its mask."""
    sparsify_(module, 1.0, exclude=exclude)
    left = {part for name in exclude for part in module.get_submodule(name).modules()}
    names = {
        layer: name
        for name, layer in module.named_modules()
        if isinstance(layer, SparseLinear) and layer not in left
    }
    return {names[group[0]]: group for group in group_shared(names)}


def _is_zero(gradient: Tensor | None) -> bool:
    return gradient is None or not gradient.any()


def _places(layers: Iterable[SparseLinear]) -> list[Layer]:
    places, offset = [], 0
    for layer in layers:
        places.append((offset, *layer.weight.shape))
        offset += layer.weight.numel()
    return places


def _slice(place: Layer) -> slice:
    offset, out, inp = place
    return slice(offset, offset + out * inp)
