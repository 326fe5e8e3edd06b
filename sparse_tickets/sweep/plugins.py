"""Users' own Python files, which register what they define, here and where tasks run."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

__all__ = ["load_plugins", "load_source", "place_of", "places_told"]

_PLACE = "sparse_tickets_place"


def load_plugins(files: Sequence[str | Path]) -> None:
    """Run Python files, each once.

    Raises:
        ValueError: there is no such file.
    """
    for file in map(Path, files):
        if not file.is_file() or file.suffix != ".py":
            raise ValueError(f"--plugin must be a Python file, got {file}")
        load_source(str(file.resolve()), file.read_bytes())


def load_source(place: str, source: bytes) -> None:
    """Run the contents of a Python file as a module named by its place, unless that was done."""
    if place in sys.modules:
        return
    module = ModuleType(place)
    module.__file__ = place
    sys.modules[place] = module
    try:
        exec(compile(source, place, "exec", dont_inherit=True), module.__dict__)
    except BaseException:
        del sys.modules[place]
        raise


def place_of(error: BaseException, places: Collection[str]) -> str | None:
    """File and line of the plugin that an error comes from; None for one of ours."""
    if isinstance(error, SyntaxError):
        passed = [(error.filename, error.lineno)]
    else:
        frames = traceback.extract_tb(error.__traceback__)
        passed = [(frame.filename, frame.lineno) for frame in reversed(frames)]
        # Of an environment in another process.
        passed = [*reversed(getattr(error, "frames", [])), *passed]
    found = (f"{file}, line {line}" for file, line in passed if file in places)
    return next(found, getattr(error, _PLACE, None))


@contextmanager
def places_told(places: Collection[str]) -> Iterator[None]:
    """Let errors remember the plugin they come from where they leave their traceback behind."""
    try:
        yield
    except Exception as error:
        setattr(error, _PLACE, place_of(error, places))
        raise
