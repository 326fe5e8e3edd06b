"""One compiled step of an optimiser over all of its parameters; `optim` has the optimisers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import optimizer as torch_optimizer

from sparse_tickets.hooks import count_changes, follow, keep_owned_
from sparse_tickets.kernels.dispatch import Plan
from sparse_tickets.kernels.policy import native
from sparse_tickets.kernels.threads import count_threads
from sparse_tickets.kernels.update import tensors

if TYPE_CHECKING:
    from sparse_tickets.linear import SparseLinear

__all__ = ["FusedOptimizer"]

# Where fewer of a tensor's entries are kept, they are updated one by one.
_LISTED = 0.25
_compiled, _address = cache(tensors.compiled), cache(tensors.address)
# Work from which a step gives back the GIL: another thread may do much meanwhile.
_LONG = 1 << 22
_params_of = itemgetter("params")
_is_contiguous = Tensor.is_contiguous


class _Listed(NamedTuple):
    """A sparse layer as the table was made for it."""

    layer: SparseLinear
    weight: Tensor
    mask: Tensor
    version: int
    support: tuple[Any, Any]


class _Table:
    """Where everything that one step reads and writes lies, and what has to be as it was then."""

    def __init__(self, optimizer: FusedOptimizer, groups: list[dict[str, Any]]) -> None:
        self.changes = count_changes()
        self.params = _params(optimizer.param_groups)
        self.states = _state_ids(optimizer)
        self.groups = groups
        self.fused = [p for group in groups for p in group["params"] if p.grad is not None]
        self.without = [p for group in groups for p in group["params"] if p.grad is None]
        of_group = [
            row for row, group in enumerate(groups) for p in group["params"] if p.grad is not None
        ]
        owned = follow(optimizer)
        self.layers: list[_Listed] = []
        self.versions: list[int] = []
        self.held: list[Tensor] = []
        n = len(self.fused)
        places = np.zeros((n, tensors.PLACES), np.int64)
        for row, (p, group) in enumerate(zip(self.fused, of_group, strict=True)):
            place = places[row]
            state = optimizer.state[p]
            self._hold(place, tensors.PARAM, p)
            for column, name in optimizer._moments(groups[group]):
                self._hold(place, column, state[name])
            if "step" in state:
                self._hold(place, tensors.STEP, state["step"])
            place[tensors.SIZE] = place[tensors.LENGTH] = p.numel()
            place[tensors.GROUP] = group
            if id(p) in owned:
                self._mask(place, owned[id(p)][0], p)
        self.fresh = optimizer._start_momentum(self.fused, of_group, places)
        self.at = [tensor.data_ptr() for tensor in self.held]
        lengths = places[:, tensors.LENGTH].tolist()
        chunks = tensors.cut(lengths)
        self.threads_work = tensors.WORK * sum(lengths), len(chunks)
        self.numbers = np.zeros((max(len(groups), 1), tensors.NUMBERS))
        self.moments = [optimizer._moments(group) for group in groups]
        self.hypers: list[Any] = [None] * len(groups)
        # In memory that was freed and taken again may lie a tensor of another size.
        self.sizes = 2 * [p.nbytes for p in self.fused]
        self.squares = np.zeros(len(chunks) + 1)
        # Held: the compiled call is given addresses.
        self.arrays = places, chunks
        self.gradients = places[:, tensors.GRAD]
        self.call = (
            *(places.ctypes.data, n, self.numbers.ctypes.data, len(groups)),
            *(chunks.ctypes.data, len(chunks), self.squares.ctypes.data),
        )
        self.compiled = None if native.module is None else self._compile(optimizer)

    def _compile(self, optimizer: FusedOptimizer) -> Any:
        """What looks and runs in C++."""
        layers = [(ref(each.layer), each.weight, each.mask) for each in self.layers]
        compiled = native.module.Fused(
            self.changes, optimizer.param_groups, self.held, layers, True
        )
        for p, state in optimizer.state.items():
            compiled.expect(p, [*state.values()])
        work = self.threads_work[0]
        weights, masks = ([layer[i] for layer in layers] for i in (1, 2))
        gradients_at = self.gradients.ctypes.data
        compiled.set_up(
            *(self.fused, gradients_at, tensors.PLACES, self.without, weights, masks),
            *(self.groups, optimizer._names, _address(optimizer._kernel), self.call),
            *(len(self.arrays[1]), work, work > _LONG),
        )
        return compiled

    def is_outdated(self) -> bool:
        """Whether by now there is C++ that the table was made without."""
        return self.compiled is None and native.module is not None

    def _hold(self, place: np.ndarray, column: int, tensor: Tensor) -> None:
        place[column] = tensor.data_ptr()
        self.held.append(tensor)

    def _mask(self, place: np.ndarray, layer: SparseLinear, p: Tensor) -> None:
        layer.apply_mask_()
        mask = layer.mask
        kept, support, picked = int(mask.count_nonzero()), None, None
        if kept < _LISTED * mask.numel():
            support = tensors.find_support(mask.numpy().reshape(-1))
            picked = np.empty(kept, np.float32)
            place[tensors.LENGTH], place[tensors.SUPPORT] = kept, support.ctypes.data
            place[tensors.PICKED] = picked.ctypes.data
        elif kept < mask.numel():
            self._hold(place, tensors.MASK, mask)
        self.layers.append(_Listed(layer, p, mask, mask._version, (support, picked)))
        self.versions.append(p._version)

    def is_valid(self, optimizer: FusedOptimizer) -> bool:
        """Whether the step may go on with these addresses; takes up the gradients' if so."""
        if self.compiled is not None:
            found = self.compiled.look(optimizer.param_groups, optimizer.state, count_changes())
            if found != 1:
                return bool(found)
            taken = self._take_up_numbers(optimizer)
            self.compiled.took_numbers()
            return taken
        if (
            self.changes != count_changes()
            or self.params != _params(optimizer.param_groups)
            or self.states != _state_ids(optimizer)
            or self.at != [tensor.data_ptr() for tensor in self.held]
        ):
            return False
        for (layer, weight, mask, version, _), written in zip(
            self.layers, self.versions, strict=True
        ):
            if (
                layer._parameters.get("weight") is not weight
                or layer._buffers.get("mask") is not mask
                or mask._version != version
                # Somebody wrote the weight, maybe where it is pruned.
                or weight._version != written
            ):
                return False
        gradients = [p.grad for p in self.fused]
        for p in self.without:
            if p.grad is not None:
                return False
        try:
            self.gradients[:] = [gradient.data_ptr() for gradient in gradients]
            sizes = [tensor.nbytes for tensor in chain(self.fused, gradients)]
        except (AttributeError, RuntimeError):
            # Among them is a None, or one without memory of this kind.
            return False
        return (
            sizes == self.sizes
            and all(map(_is_contiguous, gradients))
            and self._take_up_numbers(optimizer)
        )

    def _take_up_numbers(self, optimizer: FusedOptimizer) -> bool:
        """Read the groups' hyper-parameters; False if they ask for state that is not there."""
        for row, group in enumerate(self.groups):
            hyper = optimizer._hyper(group)
            # A tensor of learning rates may have been written.
            if hyper != self.hypers[row] or type(hyper[0]) is Tensor:
                if optimizer._moments(group) != self.moments[row]:
                    return False
                self.numbers[row] = optimizer._numbers(group)
                self.hypers[row] = hyper
        return True

    def run(self, optimizer: FusedOptimizer) -> float:
        """The step of all tensors; returns the norm of their gradients, or 0 without clipping."""
        work, parts = self.threads_work
        limit = _limit(optimizer)
        if self.compiled is not None:
            return self.compiled.run(limit)
        norm = _compiled(optimizer._kernel)(count_threads(parts, work), *self.call, limit)
        torch.autograd.graph.increment_version(self.fused)
        self.versions = [layer.weight._version for layer in self.layers]
        return norm


def _limit(optimizer: FusedOptimizer) -> float:
    """The largest norm of all gradients together, as kernels take it."""
    return -1.0 if optimizer.max_grad_norm is None else optimizer.max_grad_norm


def _params(groups: list[dict[str, Any]]) -> list[int]:
    return [*map(id, chain.from_iterable(map(_params_of, groups)))]


def _state_ids(optimizer: torch.optim.Optimizer) -> list[int]:
    """Which tensors the state consists of."""
    return [*map(id, chain.from_iterable(map(dict.values, optimizer.state.values())))]


def _is_plain(tensor: Any) -> bool:
    """Whether a kernel may read a tensor by its address."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
    )


def _is_plain_mask(mask: Tensor, weight: Tensor) -> bool:
    return (
        type(mask) is Tensor
        and mask.dtype is torch.bool
        and mask.is_cpu
        and mask.is_contiguous()
        and not mask.is_inference()
        and mask.shape == weight.shape
    )


def _fits(p: Tensor) -> bool:
    """Whether the compiled pass can update a parameter where it lies."""
    gradient = p.grad
    return (
        _is_plain(p)
        and not p.is_inference()
        and (
            gradient is None
            or (
                type(gradient) in (Tensor, torch.nn.Parameter)
                and gradient.layout is torch.strided
                and gradient.dtype is torch.float32
                and not gradient.is_neg()
            )
        )
    )


class FusedOptimizer(torch.optim.Optimizer):
    """What the four optimisers share; a mixin in front of torch's own class."""

    keeps_masks = True
    """Pruned weights and their state stay zero: the hook for other optimisers passes by."""

    max_grad_norm: float | None = None
    _table: _Table | None = None
    _norm: float | Tensor = 0.0
    _kernel: str
    _names: tuple[str, ...]
    _hyper: Callable[[dict[str, Any]], tuple]

    def _set_up(self, max_grad_norm: float | None) -> None:
        for name in ("capturable", "differentiable"):
            if any(group.get(name) for group in self.param_groups):
                raise ValueError(
                    f"{name} must be False, got True: a fused step runs on the CPU without "
                    f"autograd; use torch.optim.{type(self).__name__} for that"
                )
        if max_grad_norm is not None and not max_grad_norm >= 0:
            raise ValueError(f"max_grad_norm must be >= 0 or None, got {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        # torch's ``fused=True`` has a GradScaler leave unscaling to the step.
        self.__dict__.pop("_step_supports_amp_scaling", None)

    @property
    def grad_norm(self) -> float:
        """Norm of all gradients before the last step's clipping, over the masks; without, 0."""
        return float(self._norm)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm}

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.
        """
        # torch would wrap this in hooks and a profiler's range, at half the cost of a small step.
        args: Any = (self,) if closure is None else (self, closure)
        kwargs: Any = {}
        before, after = self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks
        if before or torch_optimizer._global_optimizer_pre_hooks:
            for hook in (
                *torch_optimizer._global_optimizer_pre_hooks.values(),
                *before.values(),
            ):
                changed = hook(self, args, kwargs)
                if changed is not None:
                    args, kwargs = changed
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        table, norm = self._table, None
        if table is not None and table.compiled is not None:
            limit = _limit(self)
            norm = table.compiled.step(self.param_groups, self.state, count_changes(), limit)
        if norm is not None:
            self._norm = norm
        elif table is not None and not table.is_outdated() and table.is_valid(self):
            self._norm = table.run(self)
        else:
            self._step_anew()
        for hook in (*after.values(), *torch_optimizer._global_optimizer_post_hooks.values()):
            hook(self, args, kwargs)
        return loss

    # So that torch does not wrap it: see there.
    step.hooked = True  # type: ignore[attr-defined]

    @torch.no_grad()
    def _step_anew(self) -> None:
        """A step that the last table is not valid for; leaves a new one if it is for all groups."""
        self._table = None
        if torch.compiler.is_compiling():
            self._step_by_torch(self.param_groups, clips=True)
            return
        mine: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for group in self.param_groups:
            (others if self._hindrance(group) else mine).append(group)
        for group in mine:
            for p in group["params"]:
                if p.grad is not None and not p.grad.is_contiguous():
                    p.grad = p.grad.contiguous()
            self._start_state(group)
        if others:
            self._step_by_torch(others, clips=True)
        if not mine:
            return
        table = _Table(self, mine)
        if not table.is_valid(self):
            raise RuntimeError("parameters must not change while they are updated")
        if others and self.max_grad_norm is not None:
            # Clipped already, all of them by one norm.
            norm, limit = self._norm, self.max_grad_norm
            self.max_grad_norm = None
            table.run(self)
            self.max_grad_norm, self._norm = limit, norm
        else:
            self._norm = table.run(self)
        if not (others or table.fresh):
            self._table = table

    def _step_by_torch(self, groups: list[dict[str, Any]], clips: bool) -> None:
        """torch's own step on some of the groups, and zeros where their weights are pruned."""
        if clips and self.max_grad_norm is not None:
            everything = [p for group in self.param_groups for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(everything, self.max_grad_norm)
            self._norm = norm if torch.compiler.is_compiling() else float(norm)
        step: Any = self._torch.step
        # Without its hooks, which ours has called.
        step = step.__wrapped__ if getattr(step, "hooked", False) else step
        every = self.param_groups
        self.param_groups = groups
        try:
            step(self)
            keep_owned_(self)
        finally:
            self.param_groups = every

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients, or zero them in place."""
        if not set_to_none:
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def _hindrance(self, group: dict[str, Any]) -> str | None:
        """Why torch's own step has to update a group, if so."""
        owned = follow(self)
        names = [name for _, name in self._moments(group)]
        if len(set(group["params"])) < len(group["params"]):
            return "lists a parameter twice"
        for p in group["params"]:
            if is_lazy(p):
                return "has a lazy parameter"
            if not _fits(p):
                return f"has a {p.dtype} parameter on {p.device}, shape {tuple(p.shape)}"
            if len(owned.get(id(p), ())) > 1:
                return "has a weight that several sparse layers share"
            if id(p) in owned and not _is_plain_mask(owned[id(p)][0].mask, p):
                return "has a mask that is not contiguous or no plain tensor"
            state = self.state.get(p, {})
            for moment in (state[name] for name in names if state.get(name) is not None):
                if not (_is_plain(moment) and moment.shape == p.shape):
                    return (
                        f"has {p.dtype} state of shape {tuple(moment.shape)} for {tuple(p.shape)}"
                    )
        return None

    def plan(self) -> tuple[Plan, ...]:
        """What runs for each parameter group, and why."""
        plans = []
        owned = follow(self)
        for group in self.param_groups:
            reason = self._hindrance(group)
            if reason is not None:
                plans.append(Plan(self._kernel, "reference", "torch", reason))
                continue
            params = group["params"]
            masked = sum(id(p) in owned and owned[id(p)][0].density < 1 for p in params)
            reason = f"one pass over {len(params)} tensors, {masked} of them on their masks"
            plans.append(Plan(self._kernel, "cpu", "fused", reason))
        return tuple(plans)

    _torch: type[torch.optim.Optimizer]

    def _start_state(self, group: dict[str, Any]) -> None:
        """State of parameters that take part for the first time, as torch lays it out."""
        lists: list[list] = [[] for _ in range(self._lists)]
        self._init_group(group, *lists)  # type: ignore[attr-defined]
        for p in group["params"]:
            state = self.state.get(p, {})
            # float64 where that is torch's default dtype.
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].to("cpu", torch.float32)

    _lists: int

    def _moments(self, group: dict[str, Any]) -> list[tuple[int, str]]:
        """Columns and names of the state a group's parameters have."""
        raise NotImplementedError

    def _numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        """A group's hyper-parameters in the order in which the kernel takes them."""
        raise NotImplementedError

    def _start_momentum(self, params: list[Tensor], groups: list[int], places: np.ndarray) -> bool:
        """Mark whose momentum starts with this step; whether there is any."""
        return False
