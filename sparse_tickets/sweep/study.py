"""Studies: several sweeps from one TOML file, validated as a whole before anything runs.

seeds = 10                        # settings of every sweep; the rest is the protocol's

[[sweep]]
name = "cartpole"
env = "CartPole-v1"

[[sweep]]
name = "acrobot"
env = "Acrobot-v1"
ppo.learning_rate = 1e-3

[sweep.grid]                      # a sweep for each combination
hidden = [[64, 64], [256, 256]]
"""

from __future__ import annotations

import itertools
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from sparse_tickets.sweep.protocols import protocol
from sparse_tickets.sweep.run import check
from sparse_tickets.sweep.spec import Sweep

__all__ = ["load_study"]

_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"


def load_study(file: str | Path) -> dict[str, Sweep]:
    """The sweeps of a study by name, in the order of the file.

    Settings of one sweep come before those of all, and those before the protocol's for its
    environment. A grid's values are named in its sweeps' names.

    Raises:
        ValueError: it is no TOML file, or not one of a study; every problem is named.
    """
    file = Path(file)
    try:
        content = tomllib.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"study must be a TOML file, got {file} ({error})") from error
    tables = content.pop("sweep", None)
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ValueError(f"{file} must have a [[sweep]] for each sweep of the study")
    study: dict[str, Sweep] = {}
    problems = []
    for number, table in enumerate(tables, 1):
        name = table.pop("name", None)
        if not isinstance(name, str) or not re.fullmatch(_NAME, name):
            problems.append(
                f"sweep {number}: name must be letters, digits and _.+-, since a folder is called "
                f"by it, got {name!r}"
            )
            continue
        try:
            points = list(_grid(table.pop("grid", {})))
        except ValueError as error:
            problems.append(f"sweep {name}: {error}")
            continue
        for suffix, point in points:
            try:
                spec = _sweep(content, table, point)
            except (TypeError, ValueError) as error:
                problems.append(f"sweep {name}{suffix}: {error}")
                continue
            if f"{name}{suffix}" in study:
                problems.append(f"sweep {name}{suffix}: there are two of this name")
            study[f"{name}{suffix}"] = spec
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise ValueError(f"{file} cannot be run as a study:{listed}")
    if not study:
        raise ValueError(f"{file} must have at least one sweep")
    return study


def _grid(grid: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each combination of a grid's values, and what it adds to a name."""
    if not isinstance(grid, dict):
        raise ValueError(f"grid must be a table of lists, got {grid!r}")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"grid.{name} must be a list of values, got {values!r}")
    for combination in itertools.product(*grid.values()):
        point = dict(zip(grid, combination, strict=True))
        suffix = "".join(f"-{name.replace('_', '-')}-{_short(v)}" for name, v in point.items())
        yield suffix, point


def _short(value: Any) -> str:
    """A value as part of a folder's name."""
    parts = value if isinstance(value, list) else [value]
    return "x".join(re.sub(r"[^A-Za-z0-9_.+-]", "-", str(part)) for part in parts)


def _sweep(*settings: Mapping[str, Any]) -> Sweep:
    """The protocol's sweep of an environment with settings, the later ones first."""
    envs = [each["env"] for each in settings if "env" in each]
    spec = protocol(envs[-1] if envs else Sweep.env)
    for each in settings:
        spec = _changed(spec, each, "")
    check(spec)
    return spec


def _changed(settings: Any, changes: Mapping[str, Any], prefix: str) -> Any:
    """Frozen settings with some changed, and those inside them too."""
    known = [field.name for field in fields(settings)]
    new = {}
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"{prefix}{name} is no setting, there are: {', '.join(known)}")
        before = getattr(settings, name)
        if is_dataclass(before):
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{name} must be a table of settings, got {value!r}")
            value = _changed(before, value, f"{prefix}{name}.")
        new[name] = tuple(value) if isinstance(value, list) else value
    return replace(settings, **new)
