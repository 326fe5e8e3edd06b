"""Launch configurations measured on a device, which ops prefer to their own: `prefer`.

``configs/<device>.json`` is written by `make gpu` and read once per process. An entry belongs to an
op and a class of shapes, never to a density or a number of tickets: with the same file a track runs
the same kernels in the same order of summation, whoever shares its batch.
Without a file, or without an entry, an op takes the configuration it was built with::

    tiles = prefer(default_tiles(...), "linear", x.device, rows=64, cols=256, dtype=x.dtype)

An op whose kernels registers hold barely names what it can be launched with (``among``): what its
`EXAMPLES` compile, so that nothing is tried, or read from a file, that spills.

    {"layout": 2, "device": "NVIDIA H100 80GB HBM3", ...,
     "configurations": {"linear": {"cols=256 dtype=float32 rows=64": {"rows": 64, ...}}}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .launch import Launch

CONFIGS = Path(__file__).parent / "configs"
LAYOUT = 2

Configuration = Mapping[str, int]
"""Of one launch: tile sizes, warps, stages, by the names the op gives them."""


class Question(NamedTuple):
    """What an op asked for.

    Attributes:
        op: as the op names itself.
        shapes: see `shape_class`.
        default: the configuration it was built with.
        among: what it can be launched with; empty if any neighbour of the default may be tried.
    """

    op: str
    shapes: str
    default: Launch
    among: Sequence[Launch] = ()


# Not context variables: backward passes ask from threads of their own.
_tried: dict[tuple[str, str], Configuration] = {}
_heard: list[Question] | None = None


def shape_class(**sizes: Any) -> str:
    """A name for shapes that share a configuration: integers count rounded up to a power of two.

    Args:
        **sizes: what an op's choice depends on: sizes, and names such as the dtype. Never P.

    Raises:
        ValueError: a negative size.
    """
    parts = []
    for name, value in sorted(sizes.items()):
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 0:
                raise ValueError(f"{name} must not be negative, got {value}")
            value = 1 << max(value - 1, 0).bit_length()
        parts.append(f"{name}={str(value).removeprefix('torch.')}")
    return " ".join(parts)


def configuration(op: str, shape_class: str, device: torch.device) -> dict[str, int] | None:
    """What was measured to be best, or None: the op's own choice then holds.

    Args:
        op: as the op names itself, e.g. ``linear``.
        shape_class: see `shape_class`.
        device: a CUDA device; for others nothing is measured.

    Raises:
        ValueError: the file is damaged; the message names it.
    """
    if _tried and (op, shape_class) in _tried:
        return dict(_tried[op, shape_class])
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    chosen = _read_once(configuration_file(_device_name(index))).get(op, {}).get(shape_class)
    return dict(chosen) if chosen else None


def prefer(
    default: Launch,
    op: str,
    device: torch.device,
    *,
    among: Sequence[Launch] = (),
    **sizes: Any,
) -> Launch:
    """``default``, or what was measured for the same type of launch.

    Args:
        default: what the op was built with.
        op: see `configuration`.
        device: see `configuration`.
        among: all that counts, a function of ``sizes`` rounded as `shape_class` does; empty if
            anything that fits ``default`` does.
        **sizes: see `shape_class`.

    Raises:
        ValueError: the file is damaged, or names what the op does not have.
    """
    if _heard is None and not _tried and not _measured(device):
        return default
    shapes = shape_class(**sizes)
    if _heard is not None:
        _heard.append(Question(op, shapes, default, tuple(among)))
    chosen = configuration(op, shapes, device)
    if chosen is None:
        return default
    try:
        launch = default.replace(**chosen)
    except TypeError as error:
        raise ValueError(f"configuration of {op!r} for {shapes!r} does not fit: {error}") from error
    if among and launch not in among:
        allowed = "; ".join(map(str, among))
        raise ValueError(
            f"configuration of {op!r} for {shapes!r} must be one of {allowed}; got {launch}"
        )
    return launch


def configuration_file(device_name: str) -> Path:
    """Where the configurations of a GPU of this name are kept, measured or not."""
    return CONFIGS / f"{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


@contextmanager
def override(op: str, shapes: str, candidate: Configuration) -> Iterator[None]:
    """Let a candidate count for one op and class of shapes, in all threads; for tuning alone."""
    before = _tried.get((op, shapes))
    _tried[op, shapes] = candidate
    try:
        yield
    finally:
        del _tried[op, shapes]
        if before is not None:
            _tried[op, shapes] = before


@contextmanager
def listen() -> Iterator[list[Question]]:
    """Collect what ops ask for, in all threads; for tuning alone."""
    global _heard
    before, _heard = _heard, []
    try:
        yield _heard
    finally:
        _heard = before


def read(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    """Configurations by op and class of shapes; empty if there is no file.

    Raises:
        ValueError: the file is not of this layout; the message names it.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is not a file of configurations: {error}") from error
    try:
        if data["layout"] != LAYOUT:
            raise ValueError(f"layout must be {LAYOUT}, got {data['layout']!r}")
        return {
            op: {
                shapes: {name: int(value) for name, value in chosen.items()}
                for shapes, chosen in classes.items()
            }
            for op, classes in data["configurations"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file of configurations: {error!r}") from error


def forget() -> None:
    """Read files anew, after one was written; kernels already chosen elsewhere stay chosen."""
    _read_once.cache_clear()


def _measured(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return bool(_read_once(configuration_file(_device_name(index))))


@cache
def _device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


@cache
def _read_once(path: Path) -> dict[str, dict[str, dict[str, int]]]:
    return read(path)
