"""Tune launches on a GPU: what ops ask `kernels.tuning` for, answered by measurement.

A subject runs once, and every question its ops ask is heard. Some questions name what may be
launched; for the others one number of the launch at a time is doubled, halved or moved by one from
the configuration the op was built with. A candidate that fails to compile, gives a wrong result or
gains less than noise is dropped. Winners are kept under shapes, so a plan never depends on
what is pruned or who shares a batch. Each subject has its share of the time, and what
those before it left. A candidate that ends its process, or spoils it, is dropped too: `tune` goes
on behind it in another.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparse_tickets.algos.ppo import PPO
from sparse_tickets.files import write_atomic
from sparse_tickets.kernels import tuning
from sparse_tickets.kernels.rollout import rollout
from sparse_tickets.kernels.tuning import Question
from sparse_tickets.timing import Budget, Contender, Spread, interleave

from .. import ours
from ..clock import GpuTimer, is_lost, make_timer
from ..clone_job import CloneJob, clone_contender
from ..measure import precision_of_torch
from ..ppo_job import PPOJob
from ..problems import LinearProblem, PolicyProblem, PruneProblem
from ..suites import REAL, TINY, Sizes
from .process import DIED, Work, say, watched

_MARGIN = 1.03
"""A candidate must gain this much: less is within the noise of two runs of the same kernel."""
_BUDGET = Budget(rounds=5, sample_seconds=0.005, warmup_seconds=0.0, settle_seconds=0.0)
_HANG_S = 60.0
"""A candidate that takes longer never ends; a subject with all its kernels, twice as long."""
_LIMITS = {"warps": (1, 16), "stages": (1, 6)}
_SMALLEST, _LARGEST = 16, 256


@dataclass(frozen=True)
class Subject:
    """Something that launches kernels worth tuning.

    Attributes:
        name: for the log.
        build: makes inputs and the contender.
        share: of the time, in relation to the others'.
    """

    name: str
    build: Callable[[], Contender]
    share: float = 1.0


def subjects(sizes: Sizes, device: torch.device) -> Iterator[Subject]:
    """What the table of targets measures, those asked for first."""
    width = sizes.width
    on_device: dict[str, Any] = {"device": device, "precision": "tf32"}

    def blocked() -> Contender:
        shape = 1, sizes.wide_batch, sizes.wide, sizes.wide
        return ours.backward_blocked(LinearProblem(*shape, 90.0, block=32, **on_device), 32)

    def masked() -> Contender:
        shape = sizes.policies, sizes.policy_batch, width, width
        return ours.linear_backward(LinearProblem(*shape, 90.0, **on_device))

    def policy(hidden: int) -> PolicyProblem:
        network = (4, hidden, hidden, 2)
        return PolicyProblem(sizes.policies, sizes.policy_batch, network, 90.0, device=device)

    def job() -> PPOJob:
        settings = PPO(horizon=-(-sizes.policy_batch // PPO.copies), epochs=1, minibatches=1)
        return PPOJob(sizes.policies, 90.0, settings, device=str(device))

    def cloning() -> CloneJob:
        return CloneJob(sizes.policies, 90.0, sizes.policy_batch, 4, device)

    yield Subject("blocked layer, forward+backward", blocked, 3.0)
    yield Subject("dense+mask layer, forward+backward", masked, 2.0)
    for hidden in sizes.policy_widths:
        name = f"policy of width {hidden}, forward+backward"
        yield Subject(name, lambda hidden=hidden: ours.policy(policy(hidden)))
    yield Subject("rollout", lambda: _act(job()))
    yield Subject("PPO update", lambda: _update(job()))
    yield Subject("cloning", lambda: clone_contender(cloning()))
    tickets, prunable = sizes.pruned
    problem = partial(PruneProblem, tickets, prunable, 50.0, round(0.4 * prunable), device)
    yield Subject("prune", lambda: ours.prune_to(problem()))
    yield Subject(f"policy of width {width}, forward+backward", lambda: ours.policy(policy(width)))


def _act(job: PPOJob) -> Contender:
    """A rollout alone."""

    def run() -> Any:
        parameters, steps = job.population.parameters, job.settings.horizon
        return rollout(parameters, job.arena, job.env, job.obs, job.key, steps, density=job.density)

    return Contender("rollout", run, job.acting_error)


def _update(job: PPOJob) -> Contender:
    """An update on one batch, over and over."""
    batch = job.prepare(job.act())
    return Contender("PPO update", lambda: job.update(batch), job.error)


def candidates(question: Question) -> Iterator[dict[str, int]]:
    """What the op says it can be launched with, or neighbours of its default.

    A neighbour has one number changed: warps and tile sides by 2, stages by one.
    """
    fields = question.default.numbers
    if question.among:
        yield from (other.numbers for other in question.among if other != question.default)
        return
    for name, value in fields.items():
        low, high = _LIMITS.get(name, (_SMALLEST, _LARGEST))
        tried = (value - 1, value + 1) if name == "stages" else (value // 2, value * 2)
        for other in tried:
            if low <= other <= high:
                yield {**fields, name: other}


def questions(contender: Contender) -> list[Question]:
    """What the timed call asks for; the check of its result may ask more."""
    with tuning.listen() as heard:
        contender.run()
    return list({(q.op, q.shapes): q for q in heard}.values())


def part(work: Work) -> bool:
    """All subjects of the table of targets."""
    sizes = TINY if work.rehearse else REAL
    return tune(sizes, work.device, work.deadline, work.found, work.keep, say)


def tune(
    sizes: Sizes,
    device: torch.device,
    deadline: float,
    found: dict[str, Any],
    save: Callable[[], None],
    report: Callable[[str], None] = print,
) -> bool:
    """Tune every subject until the deadline.

    Args:
        sizes: see `suites.Sizes`.
        device: a GPU, or for a rehearsal the CPU.
        deadline: by `time.monotonic`.
        found: takes ``configurations`` as `kernels.tuning` reads them, and a log of what was tried;
            goes on with what is there.
        save: called whenever `found` changed.
        report: takes a line per question.

    Returns:
        Whether there are subjects left that only another process can tune: see `clock`.
    """
    tuner = _Tuner(device, make_timer(device), found, save, report)
    tuner.take_up()
    with precision_of_torch("tf32"):
        chosen = [each for each in subjects(sizes, device) if each.name not in found["done"]]
        for place, subject in enumerate(chosen):
            left = deadline - time.monotonic()
            if left < 0:
                found["left_out"].append(subject.name)
                continue
            share = subject.share / sum(each.share for each in chosen[place:])
            try:
                tuner.tune(subject, time.monotonic() + share * left)
            except _Spoiled:
                save()
                return True
    save()
    return False


class _Spoiled(Exception):
    """What is left to do needs another process."""


@dataclass
class _Tuner:
    """Tunes one subject after the other; keeps in ``found["at"]`` what it tries."""

    device: torch.device
    timer: GpuTimer
    found: dict[str, Any]
    save: Callable[[], None]
    report: Callable[[str], None]

    def take_up(self) -> None:
        """Go on behind what ended the process before, if one did."""
        found = self.found
        for name in ("asked", "tried", "done"):
            found.setdefault(name, [])
        for name in ("configurations", "failed"):
            found.setdefault(name, {})
        at = found.get("at")
        if at and at["candidate"]:
            found["tried"].append({**at["candidate"], "failed": DIED})
        elif at:
            found["failed"][at["subject"]] = DIED
            found["done"].append(at["subject"])
        found |= {"at": None, "left_out": []}

    def tune(self, subject: Subject, deadline: float) -> None:
        """Answer what a subject asks.

        Raises:
            _Spoiled: this process can time nothing more.
        """
        found = self.found
        self._is_at(subject=subject.name, candidate=None)
        try:
            self._answer(subject, deadline)
        except _Spoiled:
            # Unlike the candidate that did it, the subject is not done.
            raise
        except Exception as error:  # One subject must not take the others with it.
            found["failed"][subject.name] = f"{type(error).__name__}: {error}"
            self.report(f"{subject.name}: failed: {type(error).__name__}: {error}")
        finally:
            found["at"] = None
        found["done"].append(subject.name)
        self.save()
        self._go_on()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _answer(self, subject: Subject, deadline: float) -> None:
        found = self.found
        with watched(2 * _HANG_S):
            contender = subject.build()
            _check(contender)
            asked = questions(contender)
        for question in asked:
            name = [question.op, question.shapes]
            if name in found["asked"]:
                continue
            if time.monotonic() > deadline:
                found["left_out"].append(f"{question.op} {question.shapes}")
                continue
            best, gain = self._best(subject, contender, question, deadline)
            found["asked"].append(name)
            if best is not None:
                found["configurations"].setdefault(question.op, {})[question.shapes] = best
            told = best or "the default"
            self.report(f"{question.op} {question.shapes}: {gain:.2f}x with {told}")
            self.save()

    def _best(
        self, subject: Subject, contender: Contender, question: Question, deadline: float
    ) -> tuple[dict[str, int] | None, float]:
        """The candidate that makes the whole subject fastest, and how many times as fast."""
        # Not what the file of an earlier run says.
        default = question.default.numbers
        with tuning.override(question.op, question.shapes, default), watched(_HANG_S):
            seconds = _seconds(contender, self.timer)
        if self.timer.spoiled:
            raise RuntimeError("its capture in a CUDA graph broke off")
        best, gain = None, 1.0
        for candidate in candidates(question):
            if time.monotonic() > deadline:
                break
            entry = {"op": question.op, "shapes": question.shapes}
            entry = self._try(subject, contender, entry | {"candidate": candidate}, seconds)
            if entry.get("gain", 0.0) > max(gain, _MARGIN):
                best, gain = candidate, entry["gain"]
        return best, gain

    def _try(
        self, subject: Subject, contender: Contender, entry: dict[str, Any], default: float
    ) -> dict[str, Any]:
        """The entry with what a candidate gains, or why it is none; found out once."""
        for tried in self.found["tried"]:
            if tried | entry == tried:
                return tried
        self._is_at(subject=subject.name, candidate=entry)
        try:
            launch = entry["op"], entry["shapes"], entry["candidate"]
            with tuning.override(*launch), watched(_HANG_S):
                _check(contender)
                entry = entry | {"gain": default / _seconds(contender, self.timer)}
        except Exception as error:  # Does not compile, does not fit or is wrong: no candidate.
            reason = str(error).partition("\n")[0][:200]
            entry = entry | {"failed": f"{type(error).__name__}: {reason}"}
        self.found["tried"].append(entry)
        self._is_at(subject=subject.name, candidate=None)
        self._go_on()
        return entry

    def _is_at(self, **at: Any) -> None:
        self.found["at"] = at
        self.save()

    def _go_on(self) -> None:
        if self.timer.spoiled or is_lost(self.device):
            raise _Spoiled


def _check(contender: Contender) -> None:
    error = contender.error() if contender.error is not None else 0.0
    if not error <= 1:
        raise ValueError(f"the result must match the reference, its error is {error:.3g}")


def _seconds(contender: Contender, timer: GpuTimer) -> float:
    """Median seconds of a replayed call, or of a direct one if it cannot be captured."""
    try:
        run = timer.capture(contender.run)
    except RuntimeError:
        run = contender.run
    timing = interleave([Contender(contender.name, run, None)], _BUDGET, timer.clock)
    return Spread.of(timing[contender.name].wall).median


def write_configurations(path: Path, found: dict[str, Any], about: dict[str, Any]) -> None:
    """The file that `kernels.tuning` reads; entries of earlier runs that were not tuned now stay.

    Args:
        path: see `tuning.configuration_file`.
        found: see `tune`.
        about: device, commit and versions.
    """
    merged = tuning.read(path)
    for op, shapes in found["asked"]:
        merged.get(op, {}).pop(shapes, None)
    for op, classes in found["configurations"].items():
        merged.setdefault(op, {}).update(classes)
    data = {"layout": tuning.LAYOUT, **about, "configurations": merged}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())
