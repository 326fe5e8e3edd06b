"""Where a sweep keeps its results: one folder per run, atomic, resumable, safe to share.

    spec.json                               what the run is, and its hash
    units/ppo-level-03-chunk-00.parquet     one row per track
    units/ppo-level-03-chunk-00.safetensors its tickets
    units/ppo-level-03-chunk-00.json        manifest with checksums, written last
    units/ppo-level-03-chunk-00.lock        held while a process works on the unit
    data/                                   experts and data sets

A unit is finished when its manifest is there and matches both files: a process killed at any moment
leaves the unit finished or to be redone, never half used.
"""

from __future__ import annotations

import hashlib
import io
import json
import numbers
import re
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import (
    StoreError,
    is_alive,
    is_here,
    process_token,
    remove_leftovers,
    write_atomic,
)
from ..ticket import Ticket, dump_tickets, load_tickets

if TYPE_CHECKING:
    import polars
    import pyarrow

__all__ = ["COLUMNS", "Store", "StoreError", "Unit", "load_results", "spec_hash"]

COLUMNS = {
    "env": "string",
    "algo": "string",
    "condition": "string",
    "controls": "string",
    "seed": "int64",
    "level": "int64",
    "density": "double",
    "effective_density": "double",
    "has_path": "bool",
    "dead_inputs": "int64",
    "dead_units": "int64",
    "reachable_actions": "int64",
    "return_initial": "double",
    "return_initial_sampled": "double",
    "return_final": "double",
    "return_best": "double",
    "return_final_sampled": "double",
    "return_auc": "double",
    "curve": "list<double>",
    "train_steps": "int64",
    "wall_s": "double",
    "random_return": "double",
    "diverged": "bool",
}
SORTED_BY = ("env", "algo", "condition", "controls", "seed", "level")

_DATA_FILES = ("parquet", "safetensors")
# After this long an empty lock or a takeover file was left by a process killed on the spot.
_GRACE_S = 60.0
# Locks this process holds; a lock file in its name that is not here outlived a reused pid.
_held: set[Path] = set()
_guard = threading.Lock()


@dataclass(frozen=True, order=True)
class Unit:
    """What is computed and stored at once: some tracks of one algorithm at one level.

    Raises:
        ValueError: an algo that cannot be a file name, or a negative level or chunk.
    """

    algo: str
    level: int
    chunk: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", self.algo):
            raise ValueError(f"algo must be letters, digits and _.+-, got {self.algo!r}")
        if self.level < 0 or self.chunk < 0:
            raise ValueError(f"level and chunk must be >= 0, got {self.level} and {self.chunk}")

    @property
    def name(self) -> str:
        """Stem of the unit's files."""
        return f"{self.algo}-level-{self.level:02d}-chunk-{self.chunk:02d}"


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
        self.spec, self.spec_hash = _read_spec(self.path)

    @staticmethod
    def open(path: str | Path, spec: Mapping[str, Any], *, overwrite: bool = False) -> Store:
        """Create a run's folder, or resume the run of the same spec in it.

        Args:
            path: the folder.
            spec: what defines the run; anything JSON can hold.
            overwrite: start anew: discard the units and data of the run that is there.

        Raises:
            StoreError: the folder holds a run of another spec, or a process is working in it that
                `overwrite` would pull the floor from under.
        """
        folder = Path(path)
        if folder.exists() and not folder.is_dir():
            raise StoreError(f"{folder} is a file: choose another --out")
        for sub in (folder, folder / "units", folder / "data"):
            sub.mkdir(parents=True, exist_ok=True)
            remove_leftovers(sub)
        with _exclusive(folder / "spec.lock"):
            file = folder / "spec.json"
            if not file.exists() and any(
                child for sub in ("units", "data") for child in (folder / sub).iterdir()
            ):
                raise StoreError(
                    f"{folder} has files in units/ or data/ but no {file.name}, so they are not "
                    "known to be a run's: choose another --out, or restore or move them"
                )
            if overwrite and file.exists():
                _discard(folder)
            if overwrite or not file.exists():
                content = {"spec_hash": spec_hash(spec), "spec": json.loads(_canonical(spec))}
                write_atomic(file, (json.dumps(content, indent=2) + "\n").encode())
        store = Store(folder)
        if store.spec_hash != spec_hash(spec):
            asked = json.loads(_canonical(spec))
            differences = list(_differences(store.spec, asked))
            shown = "; ".join(differences[:4])
            more = f"; and {len(differences) - 4} more" if len(differences) > 4 else ""
            raise StoreError(
                f"{folder} holds another run ({store.spec_hash}, asked for {spec_hash(spec)}): "
                f"{shown}{more}. Choose another --out, or discard that run with --overwrite"
            )
        return store

    @property
    def data(self) -> Path:
        """Folder of experts and data sets."""
        return self.path / "data"

    def units(self) -> list[Unit]:
        """Units that have a manifest, in order; `has` tells whether their files are intact."""
        found = []
        for manifest in (self.path / "units").glob("*.json"):
            match = re.fullmatch(r"(.+)-level-(\d+)-chunk-(\d+)", manifest.stem)
            if match:
                found.append(Unit(match[1], int(match[2]), int(match[3])))
        return sorted(found)

    def has(self, unit: Unit) -> bool:
        """Whether a unit is finished and its files are, to the bit, what was written.

        Damaged files are named in a warning and in `damaged`, renamed to ``*.damaged``, and the
        unit counts as unfinished. While another process works on it, it is left alone.
        """
        if self._problems(unit):
            self._move_aside(unit)
            return False
        return self._file(unit, "json").exists()

    @contextmanager
    def claim(self, unit: Unit) -> Iterator[bool]:
        """Work on a unit alone: yields False where another live process is working on it.

        The claim of a process that died on this host is taken over. Ask `has` after claiming: the
        unit may just have been finished.
        """
        lock = self._file(unit, "lock")
        mine = _acquire(lock)
        try:
            yield mine
        finally:
            if mine:
                _release(lock)

    def claimed_by(self, unit: Unit) -> str | None:
        """``pid-start@host`` of the process that claims a unit, or None."""
        owner = _owner(self._file(unit, "lock"))
        return owner or None

    def unknowable_claim(self, unit: Unit) -> str | None:
        """What to do about a claim of another host, whose process cannot be looked up from here.

        Containers count as hosts: one restarted under another name finds its own claims foreign.
        """
        owner = self.claimed_by(unit)
        if owner is None or is_here(owner):
            return None
        lock = self._file(unit, "lock")
        return f"unit {unit.name} is claimed by {owner}: if that process is gone, delete {lock}"

    def write(
        self,
        unit: Unit,
        rows: Sequence[Mapping[str, Any]],
        tickets: Sequence[Ticket],
        inputs: Mapping[str, str] | None = None,
    ) -> None:
        """Store a finished unit: rows, tickets, then the manifest that makes it count.

        Args:
            unit: which.
            rows: one mapping per track with every column of `COLUMNS`; more columns are kept.
            tickets: the trained tickets, of one architecture.
            inputs: checksum of each data set the unit was trained on, by name, for `check_inputs`.

        Raises:
            ValueError: no rows, a missing column, or a value that does not fit its column.
            StoreError: the disk is full, or another live process claims the unit.
        """
        contents = {"parquet": _to_parquet(rows), "safetensors": dump_tickets(tickets)}
        files = {
            suffix: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for suffix, data in contents.items()
        }
        manifest = {
            "unit": unit.name,
            "spec_hash": self.spec_hash,
            "rows": len(rows),
            "tickets": len(tickets),
            "inputs": dict(inputs or {}),
            "files": files,
        }
        contents["json"] = (json.dumps(manifest, indent=2) + "\n").encode()
        needed = sum(map(len, contents.values()))
        with self._claimed(unit):
            self._file(unit, "json").unlink(missing_ok=True)
            for suffix, data in contents.items():
                write_atomic(self._file(unit, suffix), data, needed)

    def read_rows(self, unit: Unit) -> list[dict[str, Any]]:
        """The rows of a finished unit.

        Raises:
            StoreError: the unit is not finished.
        """
        import pyarrow.parquet

        self._require(unit)
        data = self._file(unit, "parquet").read_bytes()
        return pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()

    def read_tickets(self, unit: Unit) -> list[Ticket]:
        """The tickets of a finished unit, in the order they were written.

        Raises:
            StoreError: the unit is not finished.
        """
        self._require(unit)
        return load_tickets(self._file(unit, "safetensors"))

    def inputs(self, unit: Unit) -> dict[str, str] | None:
        """Checksums of the data sets a unit was trained on, by name.

        Empty where none was recorded; None where the manifest is damaged or has just gone.
        """
        try:
            return json.loads(self._file(unit, "json").read_bytes()).get("inputs", {})
        except (FileNotFoundError, ValueError, AttributeError):
            return None

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

    def _file(self, unit: Unit, suffix: str) -> Path:
        return self.path / "units" / f"{unit.name}.{suffix}"

    @contextmanager
    def _claimed(self, unit: Unit) -> Iterator[None]:
        """Hold the claim, one this process already has or a new one."""
        if self._file(unit, "lock").absolute() in _held:
            yield
            return
        with self.claim(unit) as mine:
            if not mine:
                raise StoreError(
                    f"unit {unit.name} is claimed by process {self.claimed_by(unit)}: if that is "
                    f"gone, delete {self._file(unit, 'lock')}"
                )
            yield

    def _problems(self, unit: Unit, suffixes: Sequence[str] = _DATA_FILES) -> dict[str, str]:
        """What is wrong with a unit that has a manifest, by suffix; empty without a manifest."""
        try:
            manifest = json.loads(self._file(unit, "json").read_bytes())
            expected = {suffix: manifest["files"][suffix]["sha256"] for suffix in suffixes}
            owner = manifest["spec_hash"]
        except FileNotFoundError:
            return {}
        except (ValueError, KeyError, TypeError):
            return {"json": "is not a manifest"}
        if owner != self.spec_hash:
            return {"json": f"belongs to another run ({owner})"}
        problems = {}
        for suffix, digest in expected.items():
            try:
                data = self._file(unit, suffix).read_bytes()
            except FileNotFoundError:
                problems[suffix] = "is missing"
                continue
            if hashlib.sha256(data).hexdigest() != digest:
                problems[suffix] = "does not match its checksum"
        return problems

    def _move_aside(self, unit: Unit) -> None:
        """Rename what is damaged, the manifest first, unless another process has the unit."""
        try:
            with self._claimed(unit):
                problems = self._problems(unit)
                for suffix in ("json", *problems) if problems else ():
                    file = self._file(unit, suffix)
                    if file.exists():
                        file.replace(file.with_name(file.name + ".damaged"))
        except StoreError:
            return
        for suffix, reason in problems.items():
            line = f"{self._file(unit, suffix)} {reason}"
            self.damaged.append(line)
            warnings.warn(f"{line}: moved aside, the unit will be redone", stacklevel=4)


def load_results(path: str | Path) -> polars.DataFrame:
    """Every finished unit of a run as one frame, sorted by `SORTED_BY`.

    A unit whose table does not match its checksum is left out with a warning that names it. Units
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
        problems = store._problems(unit, suffixes=("parquet",))
        if problems:
            reason = "; ".join(f"{unit.name}.{suffix} {what}" for suffix, what in problems.items())
            warnings.warn(f"left out: {reason}. Run the sweep again to redo it", stacklevel=2)
            continue
        frames.append(polars.read_parquet(store._file(unit, "parquet").read_bytes()))
    if not frames:
        raise StoreError(f"{store.path} has no finished unit yet: run the sweep")
    return polars.concat(frames, how="diagonal_relaxed").sort(SORTED_BY)


def spec_hash(spec: Mapping[str, Any]) -> str:
    """First 12 hexadecimal digits of the SHA-256 of a spec's canonical JSON.

    Raises:
        TypeError: something JSON cannot hold.
        ValueError: a number that is not finite.
    """
    return hashlib.sha256(_canonical(spec).encode()).hexdigest()[:12]


def _canonical(spec: Mapping[str, Any]) -> str:
    return json.dumps(spec, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _read_spec(folder: Path) -> tuple[dict[str, Any], str]:
    file = folder / "spec.json"
    if not file.is_file():
        raise StoreError(f"{folder} holds no run: there is no {file}")
    try:
        content = json.loads(file.read_bytes())
        spec, recorded = content["spec"], content["spec_hash"]
        if spec_hash(spec) == recorded:
            return spec, recorded
        reason = "the spec does not match its hash"
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error)
    raise StoreError(
        f"{file} is damaged ({reason}): restore it, choose another --out, or discard the run with "
        "--overwrite"
    )


def _differences(stored: Any, asked: Any, field: str = "") -> Iterator[str]:
    """Name each field in which two JSON values differ."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        for key in sorted({*stored, *asked}):
            name = f"{field}.{key}" if field else key
            if key not in asked:
                yield f"{name} is {stored[key]!r} there, absent here"
            elif key not in stored:
                yield f"{name} is absent there, {asked[key]!r} here"
            else:
                yield from _differences(stored[key], asked[key], name)
    elif stored != asked:
        yield f"{field} is {stored!r} there, {asked!r} here"


def _discard(folder: Path) -> None:
    """Delete a run's results and data, the manifests first; the spec stays to be replaced."""
    if b'"spec_hash"' not in (folder / "spec.json").read_bytes():
        raise StoreError(f"{folder / 'spec.json'} is not a run's: nothing was overwritten")
    for lock in (folder / "units").glob("*.lock"):
        owner = _owner(lock)
        if owner is not None and not _is_stale(lock, owner):
            raise StoreError(
                f"process {owner} is working in {folder}: stop it before --overwrite "
                f"(if it is gone, delete {lock})"
            )
    files = [file for sub in ("units", "data") for file in (folder / sub).rglob("*")]
    for file in sorted(files, key=lambda file: (file.suffix != ".json", -len(file.parts))):
        if file.is_dir() and not file.is_symlink():
            file.rmdir()
        else:
            file.unlink(missing_ok=True)


def _to_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    if not rows:
        raise ValueError("rows must not be empty")
    missing = sorted({column for row in rows for column in COLUMNS if column not in row})
    if missing:
        raise ValueError(f"rows must have every column, missing {', '.join(missing)}")
    names = list(dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)]))
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        if COLUMNS.get(name) == "int64":
            # Arrow would drop the fraction of a Python float.
            wrong = [v for v in values if not isinstance(v, numbers.Integral | None)]
            if wrong:
                raise ValueError(f"column {name!r} must hold integers, got {wrong[0]!r}")
        try:
            columns[name] = pyarrow.array(values, type=_arrow_type(name))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError) as error:
            raise ValueError(f"column {name!r}: {error}") from error
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, compression="zstd")
    return sink.getvalue()


def _arrow_type(column: str) -> pyarrow.DataType | None:
    """The type of a known column; None lets arrow infer it."""
    import pyarrow

    name = COLUMNS.get(column)
    if name == "list<double>":
        return pyarrow.list_(pyarrow.float64())
    return None if name is None else pyarrow.type_for_alias(name)


@contextmanager
def _exclusive(lock: Path) -> Iterator[None]:
    """Hold a lock that is only ever held for a moment."""
    deadline = time.monotonic() + 30
    while not _acquire(lock):
        if time.monotonic() > deadline:
            raise StoreError(f"{lock} is held by process {_owner(lock)}: delete it if that is gone")
        time.sleep(0.02)
    try:
        yield
    finally:
        _release(lock)


def _acquire(lock: Path) -> bool:
    """Create a lock file, taking over one whose process is dead; whether it is ours now."""
    with _guard:
        return _create(lock) or _take_over(lock)


def _take_over(lock: Path) -> bool:
    owner = _owner(lock)
    if owner is None:
        return _create(lock)
    if not _is_stale(lock, owner):
        return False
    # Two processes may find the same lock stale: only the one that holds the takeover file may
    # replace it, and only after looking again.
    takeover = lock.with_name(lock.name + ".takeover")
    if _age(takeover) > _GRACE_S:
        takeover.unlink(missing_ok=True)
    try:
        takeover.open("x").close()
    except FileExistsError:
        return False
    try:
        owner = _owner(lock)
        if owner is not None and _is_stale(lock, owner):
            lock.unlink(missing_ok=True)
        return _create(lock)
    finally:
        takeover.unlink(missing_ok=True)


def _create(lock: Path) -> bool:
    try:
        with lock.open("x") as file:
            file.write(process_token())
    except FileExistsError:
        return False
    _held.add(lock.absolute())
    return True


def _release(lock: Path) -> None:
    with _guard:
        _held.discard(lock.absolute())
        if _owner(lock) == process_token():
            lock.unlink(missing_ok=True)


def _owner(lock: Path) -> str | None:
    """What a lock file says, empty while it is being written; None without a lock."""
    try:
        return lock.read_text()
    except FileNotFoundError:
        return None


def _is_stale(lock: Path, owner: str) -> bool:
    if owner == process_token():
        return lock.absolute() not in _held
    if owner:
        return not is_alive(owner)
    return _age(lock) > _GRACE_S


def _age(file: Path) -> float:
    """Seconds since a file was written; 0 if it has just gone."""
    try:
        return time.time() - file.stat().st_mtime
    except FileNotFoundError:
        return 0.0
