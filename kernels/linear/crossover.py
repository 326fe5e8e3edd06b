"""When a sparse layer on the CPU beats torch's dense product: measured once per machine, and kept.

The time of compressed rows grows about linearly with density, so two densities and the dense
product say where they cross. A class of layers is its shape and the batch rounded up to a power of
two; the first layer of a class is measured in well under a second, and the result is stored under
the user's cache directory for this processor and number of threads.

``SPARSE_TICKETS_CROSSOVER`` is ``measure`` (the default), ``fixed`` (a constant of this file: the
same choice on every machine) or a density below which every layer runs sparse. It is read when a
mask is first met. Sweeps use none of this: they run `mlp`, whose plan is a function of shapes.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..caching import cache_folder
from ..dispatch import use_backend
from ..vector import LANES

__all__ = [
    "Choice",
    "bucket",
    "cache_file",
    "choose",
    "crossover_mode",
    "forced_format",
    "is_forced",
]

Format = Literal["csr", "blocked"]
Pass = Literal["forward", "training"]

# `fixed`: what AVX-512 machines measured, on the safe side. A panel's rows amortise their packing.
_FIXED_DENSITY = {"csr": 0.3, "blocked": 0.6}
_FIXED_SMALLEST = 32 * 32

_LOW, _HIGH = 0.05, 0.6
# The least gain for which compressed rows are chosen: less is within the noise of a measurement.
_MARGIN = 1.05
# Below this many weights the overhead of a call decides, and torch has the least of it.
_SMALLEST = 16 * 16
# Up to this many multiply-adds of several rows the Python around a sparse call costs what it saves;
# a measurement in a tight loop would not see it.
_SMALLEST_WORK = 1 << 22
# The largest batch measured, and the most multiply-adds: times grow in proportion beyond.
_LARGEST_BATCH = 4096
_MOST_WORK = 1 << 27
# Of one pass: at least so long, and so many rounds.
_SECONDS, _ROUNDS = 0.15, 5
_VERSION = 3


class Choice(NamedTuple):
    """Whether a layer runs sparse, and why."""

    sparse: bool
    reason: str


class _Times(NamedTuple):
    """Seconds of one pass: torch's dense layer, and the sparse one at two densities."""

    dense: float
    low: float
    high: float

    def gain(self, density: float) -> float:
        """How many times as fast as dense the sparse layer is."""
        slope = (self.high - self.low) / (_HIGH - _LOW)
        return self.dense / max(self.low + slope * (density - _LOW), 0.5 * self.low)


def crossover_mode() -> Literal["measure", "fixed"] | float:
    """The setting: ``measure``, ``fixed`` or a density.

    Raises:
        ValueError: ``SPARSE_TICKETS_CROSSOVER`` is none of these.
    """
    text = os.environ.get("SPARSE_TICKETS_CROSSOVER", "measure")
    if text == "measure":
        return "measure"
    if text == "fixed":
        return "fixed"
    try:
        density = float(text)
    except ValueError:
        density = math.nan
    if not 0 <= density <= 1:
        raise ValueError(
            f"SPARSE_TICKETS_CROSSOVER must be measure, fixed or a density in [0, 1], got {text!r}"
        )
    return density


def bucket(batch: int) -> int:
    """The batch that stands for this one: rounded up to a power of two, at most 4096."""
    return min(1 << max(batch - 1, 0).bit_length(), _LARGEST_BATCH)


def choose(format: Format, pass_: Pass, out: int, inp: int, batch: int, density: float) -> Choice:
    """Whether a layer runs in a sparse format rather than dense.

    Args:
        format: ``csr``, or ``blocked`` where the mask allows it.
        pass_: ``forward`` alone, or ``training``: forward and backward.
        out: O.
        inp: I.
        batch: B.
        density: share of nonzeros.
    """
    forced = getattr(_forced, "format", None)
    if forced is not None:
        return Choice(forced == "sparse", "forced")
    if not batch or out * inp < _SMALLEST:
        return Choice(False, f"{out} x {inp} weights are too few to pay for {format}")
    mode = crossover_mode()
    if mode == "measure" and batch > 1 and batch * out * inp <= _SMALLEST_WORK:
        return Choice(False, f"batch {batch}, {out} x {inp}: too little work to pay for a call")
    if mode == "measure":
        gain = _times(format, out, inp, bucket(batch))[pass_].gain(density)
        sparse = gain >= _MARGIN
        seen = f"{pass_} {gain:.2g}x dense measured at this shape and density {density:.3g}"
        return Choice(sparse, seen if sparse else f"{format} would lose: {seen}")
    if mode == "fixed":
        if bucket(batch) < LANES or out * inp < _FIXED_SMALLEST:
            few = f"batch {batch}, {out} x {inp} weights: too few to pay for {format}"
            return Choice(False, few)
        mode = _FIXED_DENSITY[format]
    sparse = density < mode
    side = "below" if sparse else "not below"
    return Choice(sparse, f"density {density:.3g} is {side} {mode:.3g}, where {format} wins")


_forced = threading.local()


@contextmanager
def forced_format(format: Literal["dense", "sparse"] | None) -> Iterator[None]:
    """Every choice of this thread is ``dense``, or sparse in the format the mask allows."""
    before = getattr(_forced, "format", None)
    _forced.format = format
    try:
        yield
    finally:
        _forced.format = before


def is_forced() -> bool:
    """Whether `forced_format` rules this thread, so that no choice may be remembered."""
    return getattr(_forced, "format", None) is not None


# The table: in memory, on disk, measured.

_lock = threading.RLock()
_table: dict[tuple[Path, str], dict[Pass, _Times]] = {}


def _times(format: Format, out: int, inp: int, batch: int) -> dict[Pass, _Times]:
    path = cache_file()
    name = f"{format} {out}x{inp} batch {batch}"
    key = (path, name)
    with _lock:
        if key not in _table:
            stored = _read(path)
            for stored_name, times in stored.items():
                _table.setdefault((path, stored_name), times)
            if key not in _table:
                # A new thread knows nothing of the caller's autograd, autocast or inference mode.
                with ThreadPoolExecutor(1) as pool:
                    threads = torch.get_num_threads()
                    measured = pool.submit(_measure, format, out, inp, batch, threads)
                    _table[key] = measured.result()
                # Read again: another process may have added to it meanwhile.
                _write(path, _read(path) | {name: _table[key]})
        return _table[key]


def cache_file() -> Path:
    """Where this processor's table for the present number of threads is kept."""
    name = re.sub(r"[^a-z0-9]+", "-", _processor().lower()).strip("-")
    file = f"crossover-{name}-{torch.get_num_threads()}.json"
    return cache_folder() / file


def _processor() -> str:
    global _name
    if _name is None:
        _name = platform.processor() or platform.machine()
        try:
            text = Path("/proc/cpuinfo").read_text()
        except OSError:
            text = ""
        parts = [re.search(rf"^{field}\s*: (.+)$", text, re.M) for field in _CPU_FIELDS]
        _name = " ".join([_name, f"{LANES}", *(part[1] for part in parts if part)])
    return _name


_name: str | None = None
# The name alone may say no more than the maker.
_CPU_FIELDS = ("model name", "cpu family", "model", "stepping")


def _read(path: Path) -> dict[str, dict[Pass, _Times]]:
    """What is stored; a damaged or older file counts as empty, since it can be measured again."""
    try:
        content = json.loads(path.read_text())
        if content["version"] != _VERSION:
            return {}
        table: dict[str, dict[Pass, _Times]] = {}
        for name, passes in content["seconds"].items():
            times: dict[Pass, _Times] = {
                "forward": _Times(*map(float, passes["forward"])),
                "training": _Times(*map(float, passes["training"])),
            }
            if all(math.isfinite(t) and t > 0 for each in times.values() for t in each):
                table[str(name)] = times
        return table
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write(path: Path, table: dict[str, dict[Pass, _Times]]) -> None:
    """Replace the file in one step; where nothing can be written, this process alone knows."""
    content = {"version": _VERSION, "seconds": dict(sorted(table.items()))}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=path.parent, prefix=path.name, suffix=".tmp", delete=False
        ) as file:
            json.dump(content, file, indent=1)
        os.replace(file.name, path)
    except OSError:
        return


def _measure(format: Format, out: int, inp: int, batch: int, threads: int) -> dict[Pass, _Times]:
    """Time both passes. Torch's random generator is left alone."""
    torch.set_num_threads(threads)
    batch = min(batch, max(64, _MOST_WORK // (out * inp)))
    generator = torch.Generator().manual_seed(0)
    with use_backend("cpu"):
        draw = partial(torch.randn, generator=generator, dtype=torch.float32, device="cpu")
        x, dy = draw(batch, inp), draw(batch, out)
        weight, bias = draw(out, inp), torch.zeros(out, dtype=torch.float32, device="cpu")
        layers = [(F.linear, weight)]
        for density in (_LOW, _HIGH):
            layer, mask = _sparse_layer(format, out, inp, batch, density, generator)
            layers.append((layer, weight * mask))
        forward = [partial(_forward, layer, x, kept, bias) for layer, kept in layers]
        training = [partial(_train, layer, x, kept, bias, dy) for layer, kept in layers]
        return {"forward": _Times(*_best(forward)), "training": _Times(*_best(training))}


def _sparse_layer(
    format: Format, out: int, inp: int, batch: int, density: float, generator: torch.Generator
) -> tuple[Callable[..., Tensor], Tensor]:
    from . import linear

    size = 16 if format == "blocked" else 1
    shape = (out // size, inp // size)
    draw = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    mask = draw < density
    mask = mask.repeat_interleave(size, 0).repeat_interleave(size, 1)

    def layer(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with forced_format("sparse"):
            return linear(x[None], weight[None], mask[None], bias[None])[0]

    return layer, mask


def _forward(layer: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        layer(x, weight, bias)


def _train(
    layer: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor
) -> None:
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
    with forced_format("sparse"):
        torch.autograd.grad(layer(*leaves), leaves, dy)


def _best(works: Sequence[Callable[[], None]]) -> list[float]:
    """The least seconds of one call of each, taken in turns so that all meet the same noise."""
    for work in works:
        work()
    best = [math.inf] * len(works)
    end, rounds = time.perf_counter() + _SECONDS, 0
    while rounds < _ROUNDS or time.perf_counter() < end:
        for i, work in enumerate(works):
            begin = time.perf_counter()
            work()
            best[i] = min(best[i], time.perf_counter() - begin)
        rounds += 1
    return best
