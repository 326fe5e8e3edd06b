"""Learning curves and levels as they come, in TensorBoard, Weights & Biases or trackio.

A tracker has `log` and `close`, so that one of your own takes as many lines. A *track* is what a
viewer draws as a line of one colour, such as ``ppo mask/weights own``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

__all__ = ["TRACKERS", "Tracker", "open_tracker"]

_PROJECT = "sparse-tickets"


class Tracker(Protocol):
    """Where numbers are shown while they come."""

    def log(self, track: str, values: Mapping[str, float], step: int) -> None:
        """Show some numbers.

        Args:
            track: whose they are.
            values: by name; names with a common beginning up to a slash have a common axis.
            step: their place on it.
        """
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class _TensorBoard:
    """Event files in ``FOLDER/tracking``, a TensorBoard run for each track."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._open = SummaryWriter
        self._folder = folder / "tracking"
        self._writers: dict[str, Any] = {}

    def log(self, track: str, values: Mapping[str, float], step: int) -> None:
        if track not in self._writers:
            place = self._folder / track.replace("/", "-")
            self._writers[track] = self._open(str(place), flush_secs=5)
        for name, value in values.items():
            self._writers[track].add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()


class _WandB:
    """One run of the project ``sparse-tickets``, named after the folder; see its own settings."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import wandb

        self._init = wandb.init
        self._folder, self._config = folder, dict(config)
        self._run: Any = None
        self._known: set[str] = set()

    def log(self, track: str, values: Mapping[str, float], step: int) -> None:
        if self._run is None:
            name, place = self._folder.resolve().name, str(self._folder)
            self._run = self._init(
                project=_PROJECT, name=name, config=self._config, dir=place, reinit="create_new"
            )
        axes = {f"{track}/{name}": f"{name.partition('/')[0]}/step" for name in values}
        for key in axes.keys() - self._known:
            self._run.define_metric(key, step_metric=axes[key])
        self._known |= axes.keys()
        shown = dict(zip(axes, values.values(), strict=True))
        self._run.log(shown | dict.fromkeys(axes.values(), step))

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


class _Trackio:
    """One run of the project ``sparse-tickets``, named after the folder."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        import trackio

        self._init = trackio.init
        self._folder, self._config = folder, dict(config)
        self._run: Any = None

    def log(self, track: str, values: Mapping[str, float], step: int) -> None:
        if self._run is None:
            name = self._folder.resolve().name
            self._run = self._init(
                project=_PROJECT, name=name, config=self._config, embed=False, resume="allow"
            )
        self._run.log({f"{track}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "trackio": _Trackio,
}


def open_tracker(kind: str, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """A tracker of a run, which writes nothing before its first number.

    Args:
        kind: one of `TRACKERS`.
        folder: of the run.
        config: its settings, shown beside the numbers where the tracker shows any.

    Raises:
        ValueError: an unknown kind, or its package is not installed.
    """
    if kind not in TRACKERS:
        raise ValueError(f"track must be one of {', '.join(TRACKERS)}, got {kind!r}")
    try:
        return TRACKERS[kind](folder, config)
    except ImportError as error:
        raise ValueError(
            f"track={kind!r} needs its package: pip install 'sparse-tickets[{kind}]' ({error})"
        ) from error
