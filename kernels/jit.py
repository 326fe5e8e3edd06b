"""`jit_kernel`: a Triton kernel that says itself how its sums of products are rounded.

Whether ``a * b + c`` is rounded once or twice is the launch option ``enable_fp_fusion``, on by
default in Triton up to 3.9 and off from 3.10 on. Left to the default, numbers would change with the
version; so every kernel says it where it is defined, and launches and cross-compilation follow.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from .caching import keep_triton_cache


def jit_kernel(*, fp_fusion: bool, **options: Any) -> Callable[[Callable[..., None]], Any]:
    """Decorate a kernel that is launched; the functions it calls are plain ``@triton.jit``.

    Args:
        fp_fusion: round ``a * b + c`` once: faster, and closer to the exact result. False where it
            must equal another backend's bit for bit.
        **options: of ``triton.jit``, e.g. ``do_not_specialize``.
    """

    def decorate(function: Callable[..., None]) -> Any:
        keep_triton_cache()
        import triton

        made = triton.jit(function, **options)
        # ``made[grid](...)`` calls ``run``, and so does ``warmup``.
        made.run = partial(made.run, enable_fp_fusion=fp_fusion)
        return made

    return decorate


def options_of(made: Any) -> dict[str, Any]:
    """The launch options that `jit_kernel` gave a kernel.

    Raises:
        TypeError: it is decorated with something else.
    """
    if not isinstance(getattr(made, "run", None), partial):
        name = getattr(made, "__name__", repr(made))
        raise TypeError(f"{name} must be declared with @jit_kernel(fp_fusion=...), which it is not")
    return dict(made.run.keywords)
