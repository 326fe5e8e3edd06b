"""Where a sweep's units are trained: in this process, or on a Ray cluster."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparse_tickets.sweep import run as local

if TYPE_CHECKING:
    from sparse_tickets.sweep.run import Progress
    from sparse_tickets.sweep.spec import Sweep
    from sparse_tickets.sweep.store import Store

__all__ = ["ENGINES", "run"]

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
        on_progress: called as work advances, with a description and the agent-steps just done; a
            negative number takes back those that have to be done again.

    Returns:
        The store, complete.

    Raises:
        ValueError: an unknown engine or environment, a setting of the other engine, Ray or a device
            that is not there, or an environment to clone experts in that does not say when it is
            solved.
        StoreError: the folder belongs to another specification, or the disk is full.
        ExpertError: behavioural cloning found too few experts.
        MemoryError: there is too little for a single ticket.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if engine == "local":
        if address is not None or gpus_per_chunk:
            raise ValueError("address and gpus_per_chunk need engine='ray', got engine='local'")
        return local.run(spec, out, overwrite=overwrite, device=device, on_progress=on_progress)
    if device != "cpu":
        raise ValueError(
            f"device must be left out with engine='ray', got {device!r}: gpus_per_chunk says what "
            "part of a GPU a unit takes"
        )
    if not gpus_per_chunk >= 0:
        raise ValueError(f"gpus_per_chunk must be >= 0, got {gpus_per_chunk}")
    from sparse_tickets.sweep import ray

    return ray.run(
        spec,
        out,
        overwrite=overwrite,
        address=address,
        gpus_per_chunk=gpus_per_chunk,
        on_progress=on_progress,
    )
