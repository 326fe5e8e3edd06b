"""Settings hold what they promise: every field of its type, finite and in its range."""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

__all__ = ["Range", "above", "at_least", "check_fields", "inside", "within"]

_WORDS = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}
_MANY = {int: "integers", float: "numbers", bool: "True and False", str: "strings"}


class Range(NamedTuple):
    """Which numbers a field takes, in words and as a test."""

    words: str
    allows: Callable[[float], bool]


def at_least(low: float) -> Range:
    """Numbers from ``low`` on."""
    return Range(f"at least {low:,}", lambda value: value >= low)


def above(low: float) -> Range:
    """Numbers greater than ``low``."""
    return Range(f"above {low:,}", lambda value: value > low)


def within(low: float, high: float) -> Range:
    """Numbers from ``low`` to ``high``, both included."""
    return Range(f"in [{low:,}, {high:,}]", lambda value: low <= value <= high)


def inside(low: float, high: float) -> Range:
    """Numbers from ``low`` to ``high``, neither included."""
    return Range(f"in ({low:,}, {high:,})", lambda value: low < value < high)


def check_fields(
    settings: Any,
    ranges: Mapping[str, Range],
    *,
    prefix: str = "",
    infinite: Collection[str] = (),
) -> None:
    """Hold every field of a frozen dataclass to its annotation and range.

    Numbers of other libraries become Python's, integers become floats where floats are wanted, and
    lists become tuples, so that equal settings are stored and hashed alike. Knows int, float, bool,
    str, dataclasses, tuples of any length, and None beside one of them.

    Args:
        settings: the dataclass; to be called in its ``__post_init__``.
        ranges: of fields by name; of tuples, of each number.
        prefix: of the fields' names in messages.
        infinite: fields that may be infinite; none may be NaN.

    Raises:
        TypeError: a value of another type.
        ValueError: a number that is not finite or out of range.
    """
    hints = get_type_hints(type(settings))
    for name in (field.name for field in fields(settings)):
        given = getattr(settings, name)
        value = _converted(hints[name], given, f"{prefix}{name}")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, bool) or not isinstance(number, int | float):
                continue
            who = f"each of {prefix}{name}" if isinstance(value, tuple) else f"{prefix}{name}"
            if math.isnan(number) or (math.isinf(number) and name not in infinite):
                raise ValueError(f"{who} must be finite, got {given!r}")
            if name in ranges and not ranges[name].allows(number):
                raise ValueError(f"{who} must be {ranges[name].words}, got {given!r}")
        object.__setattr__(settings, name, value)


def _converted(kind: Any, given: Any, name: str) -> Any:
    """A value as its annotation wants it."""
    if get_origin(kind) is types.UnionType:
        if given is None:
            return None
        (kind,) = (part for part in get_args(kind) if part is not types.NoneType)
        return _single(kind, given, name, f"{_words(kind)} or None")
    if get_origin(kind) is tuple:
        element = get_args(kind)[0]
        wanted = f"a tuple of {_MANY[element]}"
        if not isinstance(given, list | tuple):
            raise TypeError(f"{name} must be {wanted}, got {given!r}")
        return tuple(_single(element, value, name, wanted, given) for value in given)
    return _single(kind, given, name, _words(kind))


def _single(kind: type, value: Any, name: str, wanted: str, given: Any = None) -> Any:
    isbool = isinstance(value, bool)
    if kind is int and isinstance(value, Integral) and not isbool:
        return int(value)
    if kind is float and isinstance(value, Real) and not isbool:
        return float(value)
    if kind not in (int, float) and isinstance(value, kind):
        return value
    raise TypeError(f"{name} must be {wanted}, got {(value if given is None else given)!r}")


def _words(kind: type) -> str:
    return _WORDS.get(kind, f"a {kind.__name__}")
