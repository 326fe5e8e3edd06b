"""Where a sweep's units are trained: in this process, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sparse_tickets.algos.teaching import ExpertError
from sparse_tickets.envs import use_workers
from sparse_tickets.sweep import run as local
from sparse_tickets.sweep.plugins import load_plugins
from sparse_tickets.tracking import Tracker, open_tracker

if TYPE_CHECKING:
    from sparse_tickets.sweep.run import Progress
    from sparse_tickets.sweep.spec import Sweep
    from sparse_tickets.sweep.store import Store

__all__ = ["ENGINES", "run", "run_study"]

ENGINES = ("local", "ray")


def run(
    spec: Sweep,
    out: str | Path,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    engine: str = "local",
    address: str | None = None,
    gpus_per_chunk: float = 0.0,
    workers: int | None = None,
    plugins: Sequence[str | Path] = (),
    track: str | Tracker | None = None,
    on_progress: Progress | None = None,
) -> Store:
    """Train every cell of a sweep that the store does not hold yet.

    May be stopped at any moment and started again, with either engine; several processes may share
    one store. The table is the same whatever the engine, on like machines.

    Args:
        spec: what to run.
        out: folder of the store.
        overwrite: throw away the run that the folder holds, of whatever specification.
        device: where to train; for the local engine.
        engine: ``local`` trains in this process; ``ray`` on a Ray cluster (extra ``ray``), whose
            machines need this library and no shared folder.
        address: of the Ray cluster, or ``auto``; None starts one on this machine.
        gpus_per_chunk: share of a GPU that a unit takes on Ray; 0 trains on CPUs.
        workers: processes that step environments which are not built in, see
            `sparse_tickets.envs.use_workers`; for the local engine.
        plugins: Python files that register your own environments, criteria, conditions or
            algorithms, run here and wherever units are trained.
        track: ``tensorboard``, ``wandb`` or ``trackio`` (extras of these names) shows curves and
            levels as they come, or a `sparse_tickets.tracking.Tracker` of your own, which is not
            closed.
        on_progress: called as work advances, with a description and the agent-steps just done; a
            negative number takes back those that have to be done again.

    Returns:
        The store, complete.

    Raises:
        ValueError: an unknown engine, tracker or environment, a setting of the other engine, Ray, a
            tracker or a device that is not there, or an environment to clone experts in that does
            not say when it is solved.
        StoreError: the folder belongs to another specification, or the disk is full.
        ExpertError: behavioural cloning found too few experts.
        MemoryError: there is too little for a single ticket.
    """
    found = run_study(
        {"": spec},
        out,
        overwrite=overwrite,
        device=device,
        engine=engine,
        address=address,
        gpus_per_chunk=gpus_per_chunk,
        workers=workers,
        plugins=plugins,
        track=track,
        on_progress=on_progress,
    )
    store = found[""]
    if isinstance(store, ExpertError):
        raise store
    return store


def run_study(
    study: Mapping[str, Sweep],
    out: str | Path,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    engine: str = "local",
    address: str | None = None,
    gpus_per_chunk: float = 0.0,
    workers: int | None = None,
    plugins: Sequence[str | Path] = (),
    track: str | Tracker | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Store | ExpertError]:
    """Run several sweeps: here one after the other, on Ray side by side on one cluster.

    Args:
        study: the sweeps by name, those that matter most first.
        out: folder of the study, with one folder for each sweep, of its name.
        overwrite: see `run`, as all the rest.
        device: see `run`.
        engine: see `run`.
        address: see `run`.
        gpus_per_chunk: see `run`.
        workers: see `run`.
        plugins: see `run`.
        track: see `run`; each sweep has a tracker of its own, but yours has all.
        on_progress: see `run`; descriptions begin with the sweep's name.

    Returns:
        Of each sweep its store, complete; or that cloning found too few experts, where all else is.

    Raises:
        ValueError, StoreError, MemoryError: see `run`.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "local" and (address is not None or gpus_per_chunk):
        raise ValueError("address and gpus_per_chunk need engine='ray', got engine='local'")
    if engine == "ray" and device != "cpu":
        raise ValueError(
            f"device must be left out with engine='ray', got {device!r}: gpus_per_chunk says what "
            "part of a GPU a unit takes"
        )
    if engine == "ray" and workers is not None:
        raise ValueError(
            f"workers must be left out with engine='ray', got {workers}: a unit has one core"
        )
    if not gpus_per_chunk >= 0:
        raise ValueError(f"gpus_per_chunk must be >= 0, got {gpus_per_chunk}")
    load_plugins(plugins)
    folders = {name: Path(out) / name for name in study}
    notify = on_progress or (lambda description, steps: None)
    with _trackers(track, study, folders) as trackers:
        if engine == "ray":
            from sparse_tickets.sweep import ray

            return ray.run(
                study,
                folders,
                overwrite=overwrite,
                address=address,
                gpus_per_chunk=gpus_per_chunk,
                plugins=plugins,
                trackers=trackers,
                on_progress=notify,
            )
        found: dict[str, Store | ExpertError] = {}
        with use_workers(workers):
            for name, spec in study.items():
                try:
                    found[name] = local.run(
                        spec,
                        folders[name],
                        overwrite=overwrite,
                        device=device,
                        tracker=trackers[name],
                        on_progress=partial(_named, name, notify),
                    )
                except ExpertError as error:
                    found[name] = error
        return found


@contextmanager
def _trackers(
    track: str | Tracker | None, study: Mapping[str, Sweep], folders: Mapping[str, Path]
) -> Iterator[dict[str, Tracker | None]]:
    """The tracker of each sweep; those opened here are closed at the end."""
    if not isinstance(track, str):
        yield dict.fromkeys(study, track)
        return
    with ExitStack() as stack:
        trackers: dict[str, Tracker | None] = {}
        for name, spec in study.items():
            tracker = trackers[name] = open_tracker(track, folders[name], spec.to_dict())
            stack.callback(tracker.close)
        yield trackers


def _named(name: str, notify: Progress, description: str, steps: int) -> None:
    notify(f"{name}: {description}" if name else description, steps)
