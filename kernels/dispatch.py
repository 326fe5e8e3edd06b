"""Which backend runs an op, and why: `use_backend`, `resolve_backend` and the `Plan` record."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Literal

import torch

from .arena import Net, Processor

__all__ = [
    "BACKENDS",
    "CHOSEN",
    "PLAIN_TORCH",
    "Backend",
    "Plan",
    "differentiating",
    "has_triton",
    "implementation",
    "interpreting",
    "is_chosen",
    "resolve_backend",
    "resume",
    "use_backend",
]

Backend = Literal["reference", "cpu", "triton"]
BACKENDS = ("auto", "reference", "cpu", "triton")

PLAIN_TORCH = (
    "plain torch ops: the reference was chosen, no kernels run on this device, or none has what "
    "stands between the layers"
)
"""Why an op runs on the reference backend."""

CHOSEN: ContextVar[str | None] = ContextVar("sparse_tickets_backend", default=None)
"""The backend of the innermost `use_backend` context, or None."""


@dataclass(frozen=True)
class Plan:
    """What an op does on a given input, and why.

    Attributes:
        op: name of the op.
        backend: ``reference`` (plain torch), ``cpu`` (Numba) or ``triton``.
        format: how the weight lies in memory: ``dense``, ``dense+mask``, ``csr``, ``blocked``...
        reason: one sentence a user can act on.
    """

    op: str
    backend: Backend
    format: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.backend}/{self.format} ({self.reason})"


def has_triton() -> bool:
    """Whether the Triton compiler is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op in this context on the backend ``name``.

    Args:
        name: ``auto``, ``reference``, ``cpu`` or ``triton``. The environment variable
            ``SPARSE_TICKETS_BACKEND`` sets the same outside any such context.

    Raises:
        ValueError: the name is none of these.
    """
    token = CHOSEN.set(_check(name, "backend"))
    try:
        yield
    finally:
        CHOSEN.reset(token)


def resume(backend: Backend, device: torch.device) -> AbstractContextManager[None]:
    """Context to compute a derivative as its function was: on its backend, and in its dtype.

    The backward pass may run in another thread, or under an autocast that the forward pass did not
    know.
    """
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return use_backend(backend)
    return _without_autocast(backend, device.type)


@contextmanager
def _without_autocast(backend: Backend, kind: str) -> Iterator[None]:
    with use_backend(backend), torch.autocast(kind, enabled=False):
        yield


def is_chosen() -> bool:
    """Whether a `use_backend` context is open here."""
    return CHOSEN.get() is not None


@contextmanager
def differentiating() -> Iterator[None]:
    """Let torch differentiate inside a registered op, whose caller asks for no gradient.

    Under a dispatch mode, `torch.library.opcheck`'s for one, an op runs where autograd is past.
    """
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch.enable_grad(), torch._C._SetExcludeDispatchKeyGuard(key, False):
        yield


def resolve_backend(device: torch.device, *nets: Net) -> Backend:
    """The backend an op uses for tensors on ``device``.

    Args:
        device: of the tensors.
        *nets: its networks. Unless a backend is chosen, one that the kernels do not have makes it
            the reference; those that are chosen refuse it by name.

    Raises:
        ValueError: the chosen backend cannot run on ``device``; the message says what can.
    """
    name = CHOSEN.get()
    if name is None:
        name = _check(os.environ.get("SPARSE_TICKETS_BACKEND", "auto"), "SPARSE_TICKETS_BACKEND")
    if name == "auto":
        backend: Backend = "cpu"
        if device.type != "cpu":
            backend = "triton" if device.type == "cuda" and has_triton() else "reference"
        processor = Processor.CPU if backend == "cpu" else Processor.GPU
        return "reference" if any(net.obstacle(processor) for net in nets) else backend
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"backend 'cpu' needs CPU tensors, got {device}")
    if name == "triton":
        if not has_triton():
            raise ValueError("backend 'triton' needs the triton package, which is not installed")
        if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
            raise ValueError(
                f"backend 'triton' needs CUDA tensors, got {device} "
                "(on CPU tensors set TRITON_INTERPRET=1 before the first import)"
            )
    return name  # type: ignore[return-value]


def implementation(package: str, device: torch.device, *nets: Net) -> ModuleType:
    """The module of an op's package that computes on ``device``: `reference`, `cpu` or `gpu`.

    Raises:
        ValueError: see `resolve_backend`.
    """
    return _module(package, resolve_backend(device, *nets))


@cache
def _module(package: str, backend: Backend) -> ModuleType:
    return importlib.import_module(f"{package}.{'gpu' if backend == 'triton' else backend}")
