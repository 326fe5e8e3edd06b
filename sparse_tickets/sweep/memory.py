"""Running out of memory: known by whoever says it, and said with a way out."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["free_memory", "is_out_of_memory", "memory_explained"]

# How torch's CPU allocator, Triton and the CUDA runtime say it, each by a RuntimeError.
_SAID = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on the host or on a device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(said in str(error).lower() for said in _SAID)


def free_memory() -> None:
    """Give back what a failed attempt left behind."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def memory_explained(what: str) -> Iterator[None]:
    """Turn running out of memory into a `MemoryError` that says at what, and what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise MemoryError(
            f"out of memory: {what} ({reason}). Finished units are safe. Free some memory or run "
            "on a device with more; a run of its own with smaller networks (--hidden), fewer "
            "copies of the environment (--ppo.envs) or evaluation episodes needs less"
        ) from error
