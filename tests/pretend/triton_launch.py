"""Triton's interpreter on the pretended device: arguments checked, launches recorded."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.runtime import interpreter

from . import host
from .faults import DeviceFault, capture, counts
from .ops import to_host

_launch = interpreter.GridExecutor.__call__


def _on_host(self: Any, args: Any, kwargs: Any) -> Any:
    """The arguments as the interpreter takes them, checked as a launch does."""

    def turn(value: Any) -> Any:
        if isinstance(value, tuple):
            return interpreter._tuple_create(value, map(turn, value))
        if not isinstance(value, Tensor):
            return value
        if not value.is_cuda:
            raise DeviceFault(f"{self.fn.__name__}: a pointer to the host's memory")
        if value.device.index != host.current_device():
            raise DeviceFault(f"{self.fn.__name__}: launched beside its tensors' device")
        return to_host(value.detach())

    return [turn(value) for value in args], {name: turn(value) for name, value in kwargs.items()}


def _run(self: Any, *args: Any, **kwargs: Any) -> None:
    if not capture:
        counts.launches += 1
        _launch(self, *args, **kwargs)
        return
    device = host.current_device()

    def step() -> None:
        before = host.exchange_device(device)
        # Looked up anew: somebody may watch launches by now.
        interpreter.GridExecutor.__call__(self, *args, **kwargs)
        host.exchange_device(before)

    capture[-1].steps.append(step)


interpreter.GridExecutor.__call__ = _run
interpreter.GridExecutor._init_args_hst = _on_host
interpreter.GridExecutor._restore_args_dev = lambda *_: None
