"""A run's experts and their demonstrations: made once, kept beside the units, the same for all."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch

from sparse_tickets.algos import bc, teaching
from sparse_tickets.algos.algorithm import Demonstrations, Taught
from sparse_tickets.algos.evaluation import Evaluation
from sparse_tickets.files import StoreError, leftovers, remove_leftovers
from sparse_tickets.sweep.data import checksum, data_file, read_data, write_data
from sparse_tickets.sweep.memory import memory_explained
from sparse_tickets.sweep.spec import Sweep, Track
from sparse_tickets.sweep.store import Store
from sparse_tickets.sweep.unit import DATA, Unit

__all__ = [
    "DEMONSTRATIONS",
    "EXPERTS",
    "POLL_S",
    "Teacher",
    "assigned",
    "check_teachers",
    "expert_gate",
    "make_experts",
    "refuse_guessing",
    "stored_demonstrations",
    "write_demonstrations",
]

DEMONSTRATIONS = "demonstrations"
POLL_S = 0.5
"""Seconds between two looks at what another process is working on."""

EXPERTS = Unit("experts", 0, 0)
"""Claimed, like a unit, by the process that trains the experts; it never has files of its own."""


class Teacher:
    """The experts' data set, from the store or made now: the one all cells are trained on.

    Args:
        spec: the sweep.
        store: where experts and demonstrations are kept.
        device: where to train.
        notify: called with what is under way and the agent-steps just done.
    """

    def __init__(
        self, spec: Sweep, store: Store, device: torch.device, notify: Callable[[str, int], None]
    ) -> None:
        self._spec, self._store, self._device, self._notify = spec, store, device, notify
        self._dataset: Taught | None = None
        self._checksum = ""
        self._checked: set[tuple[str, int]] = set()

    @property
    def inputs(self) -> dict[str, str]:
        """The checksum that a unit records, once there are demonstrations."""
        return {DEMONSTRATIONS: self._checksum} if self._checksum else {}

    def dataset(self, algo: str, level: int) -> Taught:
        """The demonstrations an algorithm's level is to be trained on.

        Raises:
            StoreError: the algorithm's finished units were trained on others; looked for once a
                level, since it means to look at them all.
            ExpertError: too few experts reach their gate.
        """
        if self._dataset is None:
            self._dataset = self.make()
        if (algo, level) not in self._checked:
            self._store.check_inputs(algo, DEMONSTRATIONS, self._checksum)
            self._checked.add((algo, level))
        return self._dataset

    def check(self, algo: str) -> None:
        """Look at the data sets too once training is done: `verify` and other runs need them."""
        read_data(self._store, "experts")
        if read_data(self._store, DEMONSTRATIONS) is None:
            self.make()
        self._store.check_inputs(algo, DEMONSTRATIONS)

    def make(self) -> Taught:
        """Read the data set; train the experts first if nobody has."""
        spec, store = self._spec, self._store
        while (stored := read_data(store, DEMONSTRATIONS)) is None:
            with store.claim(EXPERTS) as mine:
                # Another process may have finished it a moment ago.
                if mine and read_data(store, DEMONSTRATIONS) is None:
                    left = leftovers(store.data)
                    for name in DATA:
                        remove_leftovers(left.get(data_file(store, name).name, ()))
                    refuse_guessing(spec, store)
                    dataset = self._demonstrations()._asdict()
                    # Other hardware or libraries make others, which must not be mixed in.
                    for algo in spec.imitating:
                        store.check_inputs(algo, DEMONSTRATIONS, checksum(dataset))
                    write_data(store, DEMONSTRATIONS, dataset)
            if not mine:
                owner = store.claimed_by(EXPERTS) or "another process"
                self._notify(f"experts: waiting for {owner}", 0)
                time.sleep(POLL_S)
        self._checksum = checksum(stored)
        for algo in spec.imitating:
            silent = store.check_inputs(algo, DEMONSTRATIONS, self._checksum)
            if silent:
                warnings.warn(
                    f"{len(silent)} units, {silent[0].name} first, were written by a version that "
                    "did not record their demonstrations: taken to be those of "
                    f"{store.data / DEMONSTRATIONS}.safetensors",
                    stacklevel=2,
                )
        kind = bc.TAUGHT[spec.bc.states]
        return kind(**{name: part.to(self._device) for name, part in stored.items()})

    def _demonstrations(self) -> Taught:
        spec = self._spec
        if spec.bc.dataset:
            with memory_explained("reading demonstrations"):
                return bc.Dataset(*minari().read(spec.bc.dataset, spec.env_spec, spec.ppo.steps))
        with memory_explained("training experts"):
            experts = self._experts()
        with memory_explained("drawing demonstrations"):
            return self._shown(experts)

    def _shown(self, experts: teaching.Experts) -> Taught:
        spec, arena = self._spec, self._spec.expert_arena
        if spec.bc.states == "student":
            return teaching.networks(experts, arena, temperature=spec.bc.temperature)
        if spec.bc.states == "replay":
            return teaching.history(
                experts,
                spec.ppo,
                spec.env,
                arena,
                scheme=spec.init,
                log_std=spec.log_std,
                on_iteration=lambda steps: self._notify("experts", steps),
            )
        return teaching.demonstrations(
            experts, spec.env, arena, spec.ppo.steps, temperature=spec.bc.temperature
        )

    def _experts(self) -> teaching.Experts:
        stored = read_data(self._store, "experts")
        if stored is not None:
            experts = teaching.Experts(**stored)
            return experts._replace(weight=experts.weight.to(self._device))
        experts = make_experts(
            self._spec,
            on_iteration=lambda steps: self._notify("experts", steps),
            device=self._device,
        )
        write_data(self._store, "experts", experts._asdict())
        return experts


def refuse_guessing(spec: Sweep, store: Store) -> None:
    """Raise where demonstrations made anew could not be compared with those of finished units."""
    for algo in spec.imitating:
        silent = store.check_inputs(algo, DEMONSTRATIONS)
        if silent:
            raise StoreError(
                f"{store.data / DEMONSTRATIONS}.safetensors is gone, and {silent[0].name}, written "
                "by an earlier version, did not record it: new ones could differ. Restore the "
                f"file, delete units/{algo}-* to train all of {algo} again, or choose another --out"
            )


def assigned(tracks: Sequence[Track], dataset: Taught) -> Demonstrations:
    """Demonstrations by seed: student s imitates expert s mod experts."""
    device = dataset[0].device
    experts = [track.seed % len(dataset[0]) for track in tracks]
    return Demonstrations(dataset, torch.tensor(experts, dtype=torch.int64, device=device))


def stored_demonstrations(spec: Sweep, store: Store, algo: str) -> Taught:
    """The demonstrations an algorithm's finished units were trained on.

    Raises:
        StoreError: they are not there, or are others.
    """
    stored = read_data(store, DEMONSTRATIONS)
    if stored is None:
        raise StoreError(
            f"{store.data} has no intact demonstrations: run the sweep again, which makes them "
            "again and trains nothing that is finished"
        )
    store.check_inputs(algo, DEMONSTRATIONS, checksum(stored))
    return bc.TAUGHT[spec.bc.states](**stored)


def make_experts(
    spec: Sweep,
    on_iteration: Callable[[int], None] | None = None,
    device: torch.device | str = "cpu",
) -> teaching.Experts:
    """Train the experts that the sweep's students imitate."""
    return teaching.train_experts(
        spec.bc,
        spec.expert_budget,
        spec.env,
        spec.expert_arena,
        expert_gate(spec),
        scheme=spec.init,
        log_std=spec.log_std,
        # An expert is judged by its final weights alone.
        evaluation=Evaluation(1, 1, spec.evaluation.final_episodes),
        on_iteration=on_iteration,
        device=device,
    )


def check_teachers(spec: Sweep) -> None:
    """Raise ``ValueError`` where there cannot be experts or data sets to imitate."""
    if not spec.bc.dataset:
        _ = spec.expert_budget, expert_gate(spec)
        return
    for dataset in spec.bc.dataset:
        minari().load(dataset, spec.env_spec)


def minari() -> ModuleType:
    """What reads and writes Minari's data sets.

    Raises:
        ValueError: it is not installed.
    """
    try:
        from sparse_tickets.integrations import minari
    except ImportError as error:
        raise ValueError(f"bc.dataset needs Minari: {error}") from error
    return minari


def write_demonstrations(
    run: str | Path, datasets: Sequence[str], steps: int | None = None
) -> None:
    """Let a run's experts act as they did for its students, and write what they do for Minari.

    Args:
        run: folder of a run that clones experts.
        datasets: ids to write, one for each expert, such as ``cartpole/expert-0-v0``.
        steps: transitions of each, rounded up to a multiple of 16; default: as students had.

    Raises:
        StoreError: there is no run, or it has no experts.
        ValueError: Minari is not installed, not as many ids as experts, or an id that is taken.
    """
    store = Store(run)
    spec = Sweep.from_dict(store.spec)
    stored = read_data(store, "experts")
    if stored is None:
        raise StoreError(f"{store.data} has no intact experts: run a sweep that clones some")
    experts = teaching.Experts(**stored)
    minari().write(
        datasets,
        teaching.demonstrators(experts, spec.expert_arena, spec.bc.temperature),
        spec.env,
        teaching.dataset_keys(experts, spec.env),
        spec.ppo.steps if steps is None else steps,
        algorithm_name=spec.bc.expert.upper(),
    )


def expert_gate(spec: Sweep) -> float:
    """The return an expert must reach.

    Raises:
        ValueError: neither the sweep nor its environment says.
    """
    gate = spec.env_spec.solved if spec.bc.expert_gate is None else spec.bc.expert_gate
    if gate is None:
        raise ValueError(
            f"bc.expert_gate must be given for {spec.env}: nobody says when it counts as solved"
        )
    return gate
