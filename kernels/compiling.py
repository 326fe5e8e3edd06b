"""Numba, with a cache that never stops a program: `njit`; and what it compiles: `on_compile`.

A kernel is compiled once per machine, which takes seconds. Numba alone cannot be imported where
neither the package nor the user's home can be written, and raises on every call of a kernel whose
file in the cache is damaged; here that costs the seconds again.
"""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core import caching, event
from numba.core.dispatcher import Dispatcher

from .caching import cache_folder, warn_once

_PROCESS = f"_{uuid.uuid4().hex}"
"""In the symbols of what a factory makes, which Numba numbers from 1 in each process.

Kernels compiled by two processes and loaded into a third would call each other's functions of
equal name: SGD's step did Adam's.
"""
_IMPORT = re.compile(r"^from (\.+)([\w.]*) import (\([^)]*\)|[^\n]*)", re.MULTILINE)
_NAME = re.compile(r"\w+")


def njit(function: Callable[..., Any] | None = None, *, cache: bool = False, **options: Any) -> Any:
    """``numba.njit``, whose cache is wherever something can be written.

    Args:
        function: to decorate.
        cache: keep what is compiled: in ``NUMBA_CACHE_DIR``, beside the source or in
            `cache_folder`, whichever of these can be written first.
        **options: of ``numba.njit``.

    Raises:
        TypeError: ``cache`` of a function that closes over compiled ones. Numba files it by what it
            closes over, and each process has names of its own for these: it would never be found.
    """
    if function is None:
        return lambda function: njit(function, cache=cache, **options)
    dispatcher = numba.njit(**options)(function)
    if cache:
        held = [cell.cell_contents for cell in function.__closure__ or ()]
        if any(isinstance(value, Dispatcher) for value in held):
            raise TypeError(f"{function.__name__} must not be cached: it closes over kernels")
        # Raised where none can be written, and by the stamp; then each process compiles.
        with suppress(RuntimeError):
            dispatcher._cache = _Cache(function)
    if function.__closure__:
        function.__qualname__ += _PROCESS
    return dispatcher


class _Stamp:
    """Stamps a kernel's file by what it and all it imports relatively say.

    Numba's own stamp is of the file alone, and helpers are compiled into their callers: after a
    ``git pull`` old machine code would meet new layouts. What changes while a process runs, as by
    ``pip install --upgrade``, may differ from what the process has imported, so that it neither
    reads nor writes the cache of a kernel made of it.
    """

    _py_file: str

    def get_source_stamp(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for path in sorted(_sources(Path(self._py_file))):
            if has_changed(path):
                raise RuntimeError(f"{path} has changed since it may have been imported")
            digest.update(_content(path))
        return digest.hexdigest()


_started = time.time_ns()


def has_changed(file: Path) -> bool:
    """Whether a file was written since this process began to import kernels."""
    found = file.stat()
    # Of a file that was linked here the second tells. Another machine's clock may be ahead.
    return any(_started < at <= time.time_ns() for at in (found.st_mtime_ns, found.st_ctime_ns))


@cache
def _sources(file: Path) -> frozenset[Path]:
    """A file and what it imports relatively, and so on."""
    found, waiting = {file}, [file]
    while waiting:
        new = _imported(waiting.pop()) - found
        found |= new
        waiting += new
    return frozenset(found)


@cache
def _imported(file: Path) -> frozenset[Path]:
    paths = set()
    for dots, module, names in _IMPORT.findall(_content(file).decode()):
        base = file.parents[len(dots) - 1].joinpath(*filter(None, module.split(".")))
        modules = [base, *(base / name for name in _NAME.findall(names))]
        paths |= {path.with_name(f"{path.name}.py") for path in modules}
        paths |= {path / "__init__.py" for path in modules}
    return frozenset(path for path in paths if path.is_file())


@cache
def _content(file: Path) -> bytes:
    return file.read_bytes()


class _Locator(_Stamp, caching._SourceFileBackedLocatorMixin, caching._CacheLocator):
    """In `cache_folder`, a folder for each folder of sources."""

    def __init__(self, function: Callable[..., Any], file: str) -> None:
        self._py_file = file
        self._lineno = function.__code__.co_firstlineno
        self._folder = cache_folder() / "numba" / self.get_suitable_cache_subpath(file)

    def get_cache_path(self) -> str:
        return str(self._folder)


class _Implementation(caching.CompileResultCacheImpl):
    # The first two are NUMBA_CACHE_DIR and beside the source.
    _locator_classes = (
        *(
            type(locator.__name__, (_Stamp, locator), {})
            for locator in caching.CompileResultCacheImpl._locator_classes[:2]
        ),
        _Locator,
    )


class _File(caching.IndexDataCacheFile):
    """Files that say which kernel they hold.

    Numba numbers the files of a function, and its index alone tells whose each is: two processes
    that begin with an empty cache give two kernels one number, and one could end as the other.
    """

    def save(self, key: Any, data: Any) -> None:
        super().save(key, (self._source_stamp, key, data))

    def load(self, key: Any) -> Any:
        stamp, held, data = super().load(key) or (None, None, None)
        return data if (stamp, held) == (self._source_stamp, key) else None


class _Cache(caching.FunctionCache):
    """What cannot be read is compiled again, and what cannot be written is not kept."""

    _impl_class = _Implementation

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _File(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception as error:
            # Whatever unpickling a damaged file may raise. Without its index it is overwritten.
            # A class that is gone is none: other sources than today's wrote the file.
            if not isinstance(error, (AttributeError, ImportError)):
                warn_once(f"compiling again what is damaged in {self.cache_path}", error)
            try:
                self.flush()
            except OSError:
                self.disable()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as error:
            warn_once(f"what is compiled cannot be kept in {self.cache_path}", error)
            self.disable()


class _Listener(event.Listener):
    """Reports the outermost kernel of this library under compilation; a load from cache is none."""

    def __init__(self, notify: Callable[[str | None], None]) -> None:
        self._notify = notify
        self._depth = 0

    def on_start(self, event: Any) -> None:
        self._depth += 1
        if self._depth == 1:
            function = event.data["dispatcher"].py_func
            module = function.__module__.removeprefix("sparse_tickets.kernels.")
            self._notify(f"{module.removesuffix('.cpu')}{function.__name__}".replace("_", " "))

    def on_end(self, event: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._notify(None)


@contextmanager
def on_compile(notify: Callable[[str | None], None]) -> Iterator[None]:
    """Call ``notify`` with a kernel's name when its compilation starts, and with None when it ends.

    Compiled kernels are cached on disk, so this happens on a machine's first run of each kernel.
    """
    listener = _Listener(notify)
    event.register("numba:compile", listener)
    try:
        yield
    finally:
        event.unregister("numba:compile", listener)
