"""Formulas written once, as plain functions, and compiled by Numba and Triton."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any


def compile_formulas(
    formulas: Iterable[Callable[..., Any]], compiler: Callable[[Any], Any], **names: Any
) -> dict[str, Any]:
    """The same text for another compiler: its functions by name.

    Args:
        formulas: without branches, loops and types, which would need a compiler's own words; they
            may call each other.
        compiler: decorates a function.
        **names: what else they mention, ``__name__`` included, as a module of that compiler has it.
    """
    bound = dict(names)
    for formula in formulas:
        name = formula.__name__
        bound[name] = compiler(FunctionType(formula.__code__, bound, name))
    return bound
