"""Where a sweep keeps its results: one folder per run, atomic, resumable, safe to share.

    spec.json                      what the run is, its hash, and the columns of its rows
    units/ppo-level-03-chunk-00/   a finished unit
        rows.parquet               one row per track
        tickets.safetensors        its tickets
        rewind.safetensors         at level 0, what later levels rewind to, if not to the start
        manifest.json              whose they are, with checksums
    units/ppo-level-03-chunk-00.lock   held while a process works on the unit
    data/                          experts and demonstrations

A unit's folder takes its name in one step, complete, and only if no other process was first: it is
there once and whole, or not at all, whatever happens to the processes and their claims.
"""

from __future__ import annotations

import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparse_tickets.files import (
    StoreError,
    explained,
    leftovers,
    make_folder,
    remove_leftovers,
    write_folder,
)
from sparse_tickets.sweep import locks
from sparse_tickets.sweep.identity import check_same, read_spec, spec_hash, write_spec
from sparse_tickets.sweep.integrity import (
    Damaged,
    Manifest,
    read_regular,
    report_damage,
    set_aside,
)
from sparse_tickets.sweep.overwrite import discard, refuse_strangers
from sparse_tickets.sweep.rows import COLUMNS, SORTED_BY, from_parquet, to_parquet
from sparse_tickets.sweep.tensors import dump_tensors, parse_tensors
from sparse_tickets.sweep.unit import MANIFEST, REWIND, ROWS, TICKETS, UNIT, Unit
from sparse_tickets.ticket import Ticket, dump_tickets, load_tickets

if TYPE_CHECKING:
    import polars
    from torch import Tensor

__all__ = ["COLUMNS", "Store", "StoreError", "load_results", "spec_hash"]

# Earlier versions kept a unit's files side by side: NAME.json, NAME.parquet, NAME.safetensors.
_EARLIER = {MANIFEST: "json", ROWS: "parquet", TICKETS: "safetensors"}


class Store:
    """The folder of one run.

    ``Store(path)`` reads a run that is there; `Store.open` creates or resumes one.

    Attributes:
        path: the folder.
        spec: the spec as JSON holds it.
        spec_hash: its hash.
        damaged: what was found damaged and moved aside, one line each.

    Raises:
        StoreError: there is no run, or its spec.json is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.damaged: list[str] = []
        # What units said: each is read once, however often all are asked.
        self._inputs: dict[Unit, dict[str, str]] = {}
        self._leftovers: dict[str, list[Path]] | None = None
        self._identity = read_spec(self.path / "spec.json")
        self.spec, self.spec_hash = self._identity.spec, self._identity.spec_hash
        for sub in (self._units, self.data):
            if os.path.lexists(sub) and not sub.is_dir():
                raise _no_folder(sub)

    @staticmethod
    def open(path: str | Path, spec: Mapping[str, Any], *, overwrite: bool = False) -> Store:
        """Create a run's folder, or resume the run of the same spec in it.

        Args:
            path: the folder.
            spec: what defines the run; anything JSON can hold.
            overwrite: start anew: discard the units and data of the run that is there.

        Raises:
            StoreError: the folder holds a run of another spec, or one that another version of this
                library began with other columns, or cannot be written, or a process is working in
                it that `overwrite` would pull the floor from under.
        """
        folder = Path(path)
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder} is a file: choose another --out")
        with explained(folder):
            for sub in (folder, folder / "units", folder / "data"):
                try:
                    make_folder(sub)
                except FileExistsError:
                    raise _no_folder(sub) from None
        file = folder / "spec.json"
        if overwrite or not file.exists():
            with _alone(folder / "spec.lock"):
                remove_leftovers(leftovers(folder).get(file.name, ()))
                if not os.path.lexists(file):
                    refuse_strangers(folder)
                elif overwrite:
                    discard(folder)
                if overwrite or not file.exists():
                    write_spec(file, spec, tuple(COLUMNS))
        store = Store(folder)
        check_same(folder, store._identity, spec, tuple(COLUMNS))
        return store

    @property
    def _units(self) -> Path:
        return self.path / "units"

    @property
    def data(self) -> Path:
        """Folder of experts and data sets."""
        return self.path / "data"

    def units(self) -> list[Unit]:
        """Units that are there, in order; `has` tells whether their files are intact."""
        found = set()
        for entry in os.scandir(self._units) if self._units.exists() else ():
            match = re.fullmatch(UNIT, entry.name.removesuffix(".json"))
            if match:
                unit = Unit(match[1], int(match[2]), int(match[3]))
                if unit.name == match[0]:
                    found.add(unit)
        return sorted(found)

    def has(self, unit: Unit) -> bool:
        """Whether a unit is finished and its files are, to the bit, what was written.

        Damaged files are named in a warning and in `damaged`, renamed to ``*.damaged``, and the
        unit counts as unfinished.

        Raises:
            StoreError: damaged files cannot be renamed.
        """
        try:
            self._read(unit)
        except FileNotFoundError:
            return False
        except Damaged as damage:
            self._set_aside(unit, damage)
            report_damage(self.damaged, damage, "the unit will be redone")
            return False
        return True

    @contextmanager
    def claim(self, unit: Unit) -> Iterator[bool]:
        """Work on a unit alone: yields False where another live process is working on it.

        The claim of a process that died is taken over, at once on its machine, and elsewhere
        `locks.LEASE_S` after it was first asked for. Ask `has` after claiming: the unit may just
        have been finished.
        """
        claim = locks.acquire(self._lock(unit))
        if claim is None:
            yield False
            return
        try:
            self._clear(unit, someone_died=claim.inherited)
            yield True
        finally:
            claim.release()

    def _clear(self, unit: Unit, someone_died: bool) -> None:
        """Delete what killed processes left of writing a unit.

        It is looked for at first and where a claim says that there was a death: not for each of so
        many units.
        """
        if self._leftovers is None or someone_died:
            self._leftovers = leftovers(self._units)
        for place in (self._folder(unit), self._lock(unit)):
            remove_leftovers(self._leftovers.pop(place.name, ()))

    def claimed_by(self, unit: Unit) -> str | None:
        """``process PID on HOST`` that claims a unit, or None."""
        return locks.owner(self._lock(unit))

    def write(
        self,
        unit: Unit,
        rows: Sequence[Mapping[str, Any]],
        tickets: Sequence[Ticket],
        inputs: Mapping[str, str] | None = None,
        rewind: Mapping[str, Tensor] | None = None,
    ) -> bool:
        """Store a finished unit, unless another process stored it first.

        Args:
            unit: which.
            rows: one mapping per track with every column of `COLUMNS`; more columns are kept.
            tickets: the trained tickets, of one architecture, one per row.
            inputs: checksum of each data set the unit was trained on, by name, for `check_inputs`.
            rewind: what later levels are rewound to, where that is not the start.

        Returns:
            Whether these are the results that are stored now.

        Raises:
            ValueError: no rows, a missing column, a value that does not fit its column, or rows or
                tickets of another unit.
            StoreError: the disk is full, or the folder cannot be written.
        """
        _check_belong(unit, rows, tickets)
        files = {ROWS: to_parquet(rows), TICKETS: dump_tickets(tickets)}
        if rewind is not None:
            files[REWIND] = dump_tensors(rewind, f"{unit.name}-rewind", self.spec_hash)
        manifest = Manifest.of(
            unit.name,
            self.spec_hash,
            rows=len(rows),
            tickets=len(tickets),
            inputs=inputs or {},
            files=files,
        )
        return self.adopt(unit, files | {MANIFEST: manifest.to_bytes()})

    def files(self, unit: Unit) -> dict[str, bytes]:
        """The files of a finished unit by name, for `adopt` of another copy of the run.

        Raises:
            StoreError: the unit is not finished.
        """
        self._require(unit)
        manifest, files = self._read(unit)
        return files | {MANIFEST: manifest.to_bytes()}

    def adopt(self, unit: Unit, files: Mapping[str, bytes]) -> bool:
        """Store the files of a unit, unless another process stored it first; whether these are."""
        while not write_folder(self._folder(unit), files):
            if self.has(unit):
                return False
        return True

    def read_rows(self, unit: Unit) -> list[dict[str, Any]]:
        """The rows of a finished unit.

        Raises:
            StoreError: the unit is not finished.
        """
        self._require(unit)
        return from_parquet(self._path(unit, ROWS).read_bytes())

    def read_tickets(self, unit: Unit) -> list[Ticket]:
        """The tickets of a finished unit, in the order they were written.

        Raises:
            StoreError: the unit is not finished.
        """
        self._require(unit)
        return load_tickets(self._path(unit, TICKETS))

    def read_rewind(self, unit: Unit) -> dict[str, Tensor] | None:
        """What a level-0 unit left for later levels to rewind to; None where it left nothing.

        Raises:
            StoreError: the unit is not finished.
        """
        self._require(unit)
        path = self._path(unit, REWIND)
        try:
            return parse_tensors(path, read_regular(path), f"{unit.name}-rewind", self.spec_hash)
        except FileNotFoundError:
            return None
        except Damaged as damage:
            # Only of an earlier version: otherwise the manifest vouches for it.
            set_aside(path, is_damaged=lambda aside: True)
            report_damage(self.damaged, damage, "the unit will be redone")
            return None

    def inputs(self, unit: Unit) -> dict[str, str] | None:
        """Checksums of the data sets a unit was trained on, by name.

        Empty where none was recorded; None where the manifest is damaged or has just gone.
        """
        if unit not in self._inputs:
            try:
                self._inputs[unit] = self._manifest(unit).inputs
            except (FileNotFoundError, Damaged):
                return None
        return self._inputs[unit]

    def check_inputs(self, algo: str, name: str, checksum: str | None = None) -> list[Unit]:
        """Refuse a run whose units were trained on different versions of one data set.

        Args:
            algo: the algorithm whose finished units are asked.
            name: the data set.
            checksum: of the version at hand; None compares the units with each other alone.

        Returns:
            The units that record no checksum, as those written before there was one do.

        Raises:
            StoreError: two versions; the message names a unit of each and the ways out.
        """
        found: dict[str, str] = {} if checksum is None else {checksum: "the one at hand"}
        silent = []
        for unit in self.units():
            if unit.algo != algo:
                continue
            inputs = self.inputs(unit)
            if inputs is None:
                continue
            if name in inputs:
                found.setdefault(inputs[name], f"that of {unit.name}")
            else:
                silent.append(unit)
        if len(found) > 1:
            versions = ", ".join(f"{which} ({digest[:12]})" for digest, which in found.items())
            raise StoreError(
                f"{self.path} mixes different {name}: {versions}. Restore data/{name}.safetensors "
                f"and units/{algo}-* from one copy of the run; or delete both, to train every unit "
                f"of {algo} again; or choose another --out"
            )
        return silent

    def _require(self, unit: Unit) -> None:
        if not self.has(unit):
            raise StoreError(f"unit {unit.name} is not finished in {self.path}: run the sweep")

    def _folder(self, unit: Unit) -> Path:
        return self._units / unit.name

    def _lock(self, unit: Unit) -> Path:
        return self._units / f"{unit.name}.lock"

    def _is_earlier(self, unit: Unit) -> bool:
        """Whether a unit is kept as earlier versions did: files side by side, no folder."""
        folder = self._folder(unit)
        return not os.path.lexists(folder) and os.path.lexists(f"{folder}.json")

    def _path(self, unit: Unit, name: str) -> Path:
        """Where a file of a unit is."""
        folder = self._folder(unit)
        if not self._is_earlier(unit):
            return folder / name
        if name == REWIND:
            return self.data / f"{unit.name}-rewind.safetensors"
        return folder.with_name(f"{unit.name}.{_EARLIER[name]}")

    def _manifest(self, unit: Unit, folder: Path | None = None) -> Manifest:
        """A unit's manifest; by ``folder`` where the unit's folder was moved.

        Raises:
            FileNotFoundError: there is no such unit.
            Damaged: there is, but its manifest is not what was written for it.
        """
        earlier = folder is None and self._is_earlier(unit)
        path = self._path(unit, MANIFEST) if folder is None else folder / MANIFEST
        if not earlier:
            home = path.parent
            if not os.path.lexists(home):
                raise FileNotFoundError(home)
            if home.is_symlink() or not home.is_dir():
                raise Damaged({home: "is not a folder"})
            if not os.path.lexists(path):
                raise Damaged({path: "is missing"})
        manifest = Manifest.from_bytes(path, read_regular(path), signed=not earlier)
        manifest.check_owner(path, unit.name, self.spec_hash)
        listed = [_EARLIER[name] if earlier else name for name in (ROWS, TICKETS)]
        if set(manifest.files) - {REWIND} != set(listed):
            raise Damaged({path: f"does not list {' and '.join(listed)} alone"})
        return manifest

    def _read(
        self, unit: Unit, *names: str, folder: Path | None = None
    ) -> tuple[Manifest, dict[str, bytes]]:
        """A unit's manifest and some of its files, all by default, as they were written.

        Raises:
            FileNotFoundError: there is no such unit.
            Damaged: there is, but not what was written.
        """
        manifest = self._manifest(unit, folder)
        contents: dict[str, bytes] = {}
        problems: dict[Path, str] = {}
        for listed in manifest.files:
            name = next((new for new, old in _EARLIER.items() if old == listed), listed)
            if names and name not in names:
                continue
            try:
                path = self._path(unit, name) if folder is None else folder / name
                contents[name] = manifest.read(path, listed)
            except Damaged as damage:
                problems |= damage.problems
        if problems:
            raise Damaged(problems)
        return manifest, contents

    def _set_aside(self, unit: Unit, damage: Damaged) -> None:
        """Rename what is damaged: a unit's whole folder, or files of an earlier version."""
        self._inputs.pop(unit, None)
        if self._is_earlier(unit):
            for path in {self._path(unit, MANIFEST): "", **damage.problems}:
                set_aside(path, is_damaged=lambda aside: True)
            return

        def is_damaged(aside: Path) -> bool:
            try:
                self._read(unit, folder=aside)
            except (FileNotFoundError, Damaged):
                return True
            return False

        set_aside(self._folder(unit), is_damaged)


def load_results(path: str | Path) -> polars.DataFrame:
    """Every finished unit of a run as one frame, sorted by `SORTED_BY`.

    A unit whose table is not what was written is left out with a warning that names it. Units
    trained on different versions of a data set are named in a warning too.

    Raises:
        StoreError: there is no run, or it has no finished unit.
    """
    import polars

    store = Store(path)
    frames = []
    units = store.units()
    used = {(unit.algo, name) for unit in units for name in store.inputs(unit) or ()}
    for algo, name in sorted(used):
        try:
            store.check_inputs(algo, name)
        except StoreError as error:
            warnings.warn(str(error), stacklevel=2)
    for unit in units:
        try:
            manifest, files = store._read(unit, ROWS)
            frame = polars.read_parquet(files[ROWS])
            if len(frame) != manifest.rows:
                raise Damaged({store._path(unit, ROWS): f"has {len(frame)} rows"})
        except FileNotFoundError:
            continue
        except Damaged as damage:
            warnings.warn(f"left out: {damage}. Run the sweep again to redo it", stacklevel=2)
            continue
        frames.append(frame)
    if not frames:
        raise StoreError(f"{store.path} has no finished unit yet: run the sweep")
    return polars.concat(frames, how="diagonal_relaxed").sort(SORTED_BY)


def _check_belong(unit: Unit, rows: Sequence[Mapping[str, Any]], tickets: Sequence[Ticket]) -> None:
    """Raise ``ValueError`` unless rows and tickets are those of a unit, one for one."""
    if len(rows) != len(tickets):
        raise ValueError(f"rows must be one per ticket, got {len(rows)} and {len(tickets)}")
    for index, (row, ticket) in enumerate(zip(rows, tickets, strict=True)):
        origins = {(row.get("algo"), row.get("level")), (ticket.algo, ticket.level)}
        if origins != {(unit.algo, unit.level)}:
            raise ValueError(f"rows and tickets must be of {unit.name}, got {origins} at {index}")


def _no_folder(path: Path) -> StoreError:
    return StoreError(f"{path} is not a folder: move it away, or choose another --out")


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Hold a lock that is only ever held for a moment."""
    deadline = time.monotonic() + locks.LEASE_S + 30
    while (claim := locks.acquire(lock)) is None:
        if time.monotonic() > deadline:
            raise StoreError(f"{lock} is held by {locks.owner(lock)}: delete it if that is gone")
        time.sleep(0.02)
    try:
        yield
    finally:
        claim.release()
