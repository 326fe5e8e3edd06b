"""`torch.cuda` of the pretended device: one stream in order, and graphs that record and replay."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch

from . import host
from .faults import DeviceFault, capture, counts, set_waiting, wait

NAME = "Pretended GPU"

_PROPERTIES = SimpleNamespace(
    name=NAME,
    major=9,
    minor=0,
    multi_processor_count=132,
    L2_cache_size=50 << 20,
    total_memory=80 << 30,
    warp_size=32,
)


class OnlyStream:
    """The only one there is: everything happens in order."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda", host.current_device())

    def wait_stream(self, other: OnlyStream) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """As on a device."""
        wait("synchronize")


class Event:
    """A moment on the host's clock."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.moment = 0.0

    def record(self, stream: OnlyStream | None = None) -> None:
        """Now."""
        self.moment = time.perf_counter()

    def synchronize(self) -> None:
        """As on a device."""
        wait("synchronize")

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds, never zero."""
        return max(1e-4, 1e3 * (end.moment - self.moment))


class CUDAGraph:
    """Steps that were recorded instead of done."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.steps: list[Callable[[], None]] = []
        self.captured = False

    def capture_begin(self, *_: Any, **__: Any) -> None:
        """Record from now on."""
        if capture or self.captured:
            raise DeviceFault("a capture inside a capture, or a second one")
        capture.append(self)

    def capture_end(self) -> None:
        """Record no more."""
        capture.remove(self)
        self.captured = True

    def replay(self) -> None:
        """Do what was recorded."""
        if capture or not self.captured:
            raise DeviceFault("a replay before the end of a capture")
        for step in self.steps:
            step()

    def pool(self) -> tuple[int, int]:
        """Of its memory."""
        return 0, 0

    def reset(self) -> None:
        """Forget all."""
        self.steps, self.captured = [], False


@contextlib.contextmanager
def _stream(stream: OnlyStream) -> Iterator[None]:
    yield


@contextlib.contextmanager
def _graph(graph: CUDAGraph, *_: Any, **__: Any) -> Iterator[None]:
    graph.capture_begin()
    try:
        yield
    finally:
        graph.capture_end()


_only = OnlyStream()
for _name, _value in {
    "_lazy_init": lambda: None,
    "_exchange_device": host.exchange_device,
    "_maybe_exchange_device": host.exchange_device,
    "current_device": host.current_device,
    "current_stream": lambda device=None: _only,
    "default_stream": lambda device=None: _only,
    "device_count": lambda: 1,
    "empty_cache": lambda: None,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: NAME,
    "get_device_properties": lambda device=None: _PROPERTIES,
    "get_sync_debug_mode": lambda: counts.waiting,
    "graph": _graph,
    "is_available": lambda: True,
    "is_current_stream_capturing": lambda: bool(capture),
    "is_initialized": lambda: True,
    "manual_seed_all": lambda seed: None,
    "set_sync_debug_mode": set_waiting,
    "stream": _stream,
    "synchronize": lambda device=None: wait("synchronize"),
    "CUDAGraph": CUDAGraph,
    "Event": Event,
    "Stream": OnlyStream,
}.items():
    setattr(torch.cuda, _name, _value)
# Asked for by torch.compile, past `torch.cuda`.
torch._C._cuda_getDevice = host.current_device
