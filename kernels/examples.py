"""What a compiler needs to know of a launch, recorded from the launchers themselves.

Each ``gpu.py`` (and ``*_gpu.py``) lists calls of its launchers on `meta` tensors in ``EXAMPLES``;
`record` notes what they launch, with every launch that the op may be tuned to::

    EXAMPLES = [Example("gae", lambda: gae(*(meta(2, 9, 3) for _ in range(5)), 0.99, 0.95))]
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

from . import tuning

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


class CompileCase(NamedTuple):
    """One launch of a kernel, as far as the compiler needs to know it.

    Attributes:
        name: unique within its op.
        kernel: the function, decorated with `jit_kernel`.
        signature: Triton type of every runtime argument, e.g. ``"i32"``; it ends in ``:16`` where
            the launch sees a multiple of 16, as pointers from torch's allocator are. A tuple has
            one of each entry.
        constexprs: value of every ``tl.constexpr`` argument, and of what is None at launch.
        options: launch options, e.g. ``{"num_warps": 4, "num_stages": 3}``.
    """

    name: str
    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[str, Any]
    options: dict[str, Any]


class Example(NamedTuple):
    """A call whose launches are compiled.

    Attributes:
        name: of the call; that of a case begins with its kernel's.
        run: makes the call, on `meta` tensors.
        exact: whether integers count as the launch sees them: 1 is a constant, a multiple of 16
            known to be one. Else a case stands for all sizes, of which nothing is known.
        tuned: whether what the op may be tuned to is launched as well.
    """

    name: str
    run: Callable[[], object]
    exact: bool = False
    tuned: bool = True


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def record(examples: Iterable[Example], op: str) -> Iterator[CompileCase]:
    """The launches of an op's own kernels, and of what is its own as a constant, each once."""
    known: set[tuple[object, ...]] = set()
    names: Counter[str] = Counter()
    for example in examples:
        for kernel, arguments, options, suffix in _launches(example):
            types, constants, others = _describe(kernel, arguments, options, example.exact)
            functions = (kernel, *constants.values())
            if not any(f".kernels.{op}." in _module(function) for function in functions):
                continue
            launch = (kernel, *map(str, (types, constants, others)))
            if launch in known:
                continue
            known.add(launch)
            short = kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")
            name = f"{short}_{example.name}{suffix}"
            names[name] += 1
            full = name if names[name] == 1 else f"{name}_{names[name]}"
            yield CompileCase(full, kernel, types, constants, others)


def _launches(example: Example) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any], str]]:
    """Kernel, arguments, options and what the launch adds to the name, the defaults first."""
    with tuning.listen() as asked, _noting() as launched:
        example.run()
    yield from ((*launch, "") for launch in launched)
    questions = {(question.op, question.shapes): question for question in asked}
    for question in questions.values() if example.tuned else ():
        for other in question.among:
            if other == question.default:
                continue
            with (
                tuning.override(question.op, question.shapes, other.numbers),
                _noting() as launched,
            ):
                example.run()
            yield from ((*launch, f"_{other.label}") for launch in launched)


@contextmanager
def _noting() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Note launches instead of making them, interpreted or not."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launched: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def note(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: launched.append((kernel, arguments, options))

    with ExitStack() as patches:
        for kind in (JITFunction, InterpretedFunction):
            patches.enter_context(patch.object(kind, "__getitem__", note))
        yield launched


def _module(value: Any) -> str:
    """Where a function of Triton's is defined; nowhere if this is none."""
    return getattr(getattr(value, "fn", None), "__module__", "")


def _describe(
    kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], exact: bool
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Types, constants and launch options of a launch."""
    parameters = inspect.signature(kernel.fn).parameters
    bound = dict(zip(parameters, arguments, strict=False)) | {
        name: value for name, value in options.items() if name in parameters
    }
    others = {name: value for name, value in options.items() if name not in parameters}
    types, constants = {}, {}
    for name, value in bound.items():
        constant = "constexpr" in str(parameters[name].annotation) or value is None
        if constant or (exact and type(value) is int and value == 1):
            constants[name] = value
        else:
            types[name] = _type_of(value, exact)
    return types, constants, others


def _type_of(value: Any, exact: bool) -> Any:
    if isinstance(value, tuple):
        types = [_type_of(entry, exact) for entry in value]
        return type(value)._make(types) if hasattr(value, "_make") else tuple(types)
    if isinstance(value, Tensor):
        aligned = value.storage_offset() * value.itemsize % 16 == 0
        return f"*{_TYPES[value.dtype]}{':16' if aligned else ''}"
    if isinstance(value, float):
        return "fp32"
    return "i32:16" if exact and value and value % 16 == 0 else "i32"
