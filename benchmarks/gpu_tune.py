"""Tune launches on a GPU: what ops ask `kernels.tuning` for, answered by measurement.

A subject runs once, and every question its ops ask is heard. For each, one number of the launch at
a time is doubled, halved or moved by one from the configuration the op was built with; a candidate
that fails to compile, gives a wrong result or gains less than noise is dropped. Winners are kept
under shapes and nominal density, so a plan never depends on what is pruned or who shares a batch.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_tickets.files import write_atomic
from sparse_tickets.kernels import tuning
from sparse_tickets.kernels.tuning import Question
from sparse_tickets.timing import Contender

from . import gpu_ours, gpu_packed, ours
from .gpu_clock import Timer, make_timer
from .gpu_problems import LayerProblem
from .gpu_table import Sizes
from .problems import PolicyProblem

__all__ = ["Subject", "candidates", "subjects", "tune", "write_configurations"]

_MARGIN = 1.03
"""A candidate must gain this much: less is within the noise of two runs of the same kernel."""
_ROUNDS = 5
_LIMITS = {"warps": (1, 16), "stages": (1, 6)}
_SMALLEST, _LARGEST = 16, 256


@dataclass(frozen=True)
class Subject:
    """Something that launches kernels worth tuning.

    Attributes:
        name: for the log.
        build: makes inputs and the contender.
    """

    name: str
    build: Callable[[], Contender]


def subjects(sizes: Sizes, device: torch.device) -> Iterator[Subject]:
    """What the table of targets measures, those asked for first."""
    tickets, batch, width = sizes.tickets, sizes.batch, sizes.width

    def packed() -> Contender:
        problem = LayerProblem(tickets, batch, width, width, 90.0, device=device)
        return gpu_packed.step(problem)

    def blocked() -> Contender:
        problem = LayerProblem(
            1, sizes.wide_batch, sizes.wide, sizes.wide, 90.0, device=device, block=32
        )
        return gpu_ours.backward_blocked(problem, 32)

    def masked() -> Contender:
        problem = LayerProblem(
            sizes.policies, sizes.policy_batch, width, width, 90.0, device=device
        )
        return gpu_ours.backward_masked(problem)

    yield Subject("packed layer, step", packed)
    yield Subject("blocked layer, forward+backward", blocked)
    yield Subject("dense+mask layer, forward+backward", masked)
    for hidden in sizes.policy_widths:
        network = (4, hidden, hidden, 2)
        yield Subject(
            f"policy of width {hidden}, forward+backward",
            lambda network=network: ours.policy(
                PolicyProblem(sizes.policies, sizes.policy_batch, network, 90.0, device=device)
            ),
        )


def candidates(default: Any) -> Iterator[dict[str, int]]:
    """Neighbours of a launch, one number changed: warps and tile sides by 2, stages by one."""
    fields = asdict(default)
    for name, value in fields.items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        low, high = _LIMITS.get(name, (_SMALLEST, _LARGEST))
        tried = (value - 1, value + 1) if name == "stages" else (value // 2, value * 2)
        for other in tried:
            if low <= other <= high:
                yield {**fields, name: other}


def tune(
    sizes: Sizes,
    device: torch.device,
    deadline: float,
    found: dict[str, Any],
    save: Callable[[], None],
    report: Callable[[str], None] = print,
) -> None:
    """Tune every subject until the deadline.

    Args:
        sizes: see `gpu_table.Sizes`.
        device: a GPU, or for a rehearsal the CPU.
        deadline: by `time.monotonic`.
        found: takes ``configurations`` as `kernels.tuning` reads them, and a log of what was tried.
        save: called whenever `found` changed.
        report: takes a line per question.
    """
    timer = make_timer(device)
    found |= {"configurations": {}, "asked": [], "tried": [], "failed": {}, "left_out": []}
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for subject in subjects(sizes, device):
            if time.monotonic() > deadline:
                found["left_out"].append(subject.name)
                continue
            try:
                _tune_subject(subject, timer, deadline, found, save, report)
            except Exception as error:  # One subject must not take the others with it.
                found["failed"][subject.name] = f"{type(error).__name__}: {error}"
                report(f"{subject.name}: failed: {type(error).__name__}: {error}")
            save()
    finally:
        torch.set_float32_matmul_precision(before)


def _tune_subject(
    subject: Subject,
    timer: Timer,
    deadline: float,
    found: dict[str, Any],
    save: Callable[[], None],
    report: Callable[[str], None],
) -> None:
    contender = subject.build()
    with tuning.listen() as heard:
        _check(contender)
    asked = list({(q.op, q.shapes): q for q in heard}.values())
    known = found["configurations"]
    for question in asked:
        densities = known.get(question.op, {}).get(question.shapes, {})
        if f"{question.density}" in densities:
            continue
        if time.monotonic() > deadline:
            found["left_out"].append(f"{question.op} {question.shapes}")
            continue
        best, gain = _best(contender, question, timer, deadline, found)
        found["asked"].append([question.op, question.shapes, f"{question.density}"])
        if best is not None:
            classes = known.setdefault(question.op, {}).setdefault(question.shapes, {})
            classes[f"{question.density}"] = best
        report(f"{question.op} {question.shapes}: {gain:.2f}x with {best or 'the default'}")
        save()


def _best(
    contender: Contender, question: Question, timer: Timer, deadline: float, found: dict[str, Any]
) -> tuple[dict[str, int] | None, float]:
    """The candidate that makes the whole subject fastest, and how many times as fast as it was."""
    # Not what the file of an earlier run says.
    with tuning.override(question.op, question.shapes, asdict(question.default)):
        default = _seconds(contender, timer)
    best, gain = None, 1.0
    for candidate in candidates(question.default):
        if time.monotonic() > deadline:
            break
        entry = {"op": question.op, "shapes": question.shapes, "candidate": candidate}
        try:
            with tuning.override(question.op, question.shapes, candidate):
                _check(contender)
                entry["gain"] = default / _seconds(contender, timer)
        except Exception as error:  # Does not compile, does not fit or is wrong: no candidate.
            entry["failed"] = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        found["tried"].append(entry)
        if entry.get("gain", 0.0) > max(gain, _MARGIN):
            best, gain = candidate, entry["gain"]
    return best, gain


def _check(contender: Contender) -> None:
    error = contender.error() if contender.error is not None else 0.0
    if not error <= 1:
        raise ValueError(f"the result must match the reference, its error is {error:.3g}")


def _seconds(contender: Contender, timer: Timer) -> float:
    """Median seconds of a replayed call, or of a direct one if it cannot be captured."""
    try:
        run = timer.capture(contender.run)
    except RuntimeError:
        run = contender.run
    once = timer.seconds(run, 2)
    count = max(1, min(200, round(0.005 / max(once, 1e-7))))
    return sorted(timer.seconds(run, count) for _ in range(_ROUNDS))[_ROUNDS // 2]


def write_configurations(path: Path, found: dict[str, Any], about: dict[str, Any]) -> None:
    """The file that `kernels.tuning` reads; entries of earlier runs that were not tuned now stay.

    Args:
        path: see `tuning.configuration_file`.
        found: see `tune`.
        about: device, commit and versions.
    """
    merged = tuning.read(path)
    for op, shapes, density in found["asked"]:
        merged.get(op, {}).get(shapes, {}).pop(density, None)
    for op, classes in found["configurations"].items():
        for shapes, densities in classes.items():
            merged.setdefault(op, {}).setdefault(shapes, {}).update(densities)
    data = {"layout": tuning.LAYOUT, **about, "configurations": merged}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())
