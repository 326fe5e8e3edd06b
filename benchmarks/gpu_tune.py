"""Tune launches on a GPU: what ops ask `kernels.tuning` for, answered by measurement.

A subject runs once, and every question its ops ask is heard. Some questions name what may be
launched; for the others one number of the launch at a time is doubled, halved or moved by one from
the configuration the op was built with. A candidate that fails to compile, gives a wrong result or
gains less than noise is dropped. Winners are kept under shapes and nominal density, so a plan never
depends on what is pruned or who shares a batch. Each subject has its share of the time, and what
those before it left.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_tickets.algos.ppo import PPO
from sparse_tickets.files import write_atomic
from sparse_tickets.kernels import tuning, use_backend
from sparse_tickets.kernels.mlp import mlp_packed
from sparse_tickets.kernels.packed import build_pattern, pack, unpack
from sparse_tickets.kernels.prune import prune
from sparse_tickets.kernels.rollout import rollout
from sparse_tickets.kernels.tuning import Question
from sparse_tickets.timing import Contender

from . import gpu_ours, gpu_packed, ours
from .clone_job import CloneJob, clone_contender
from .gpu_clock import Timer, make_timer
from .gpu_problems import LayerProblem, distance, random_masks_on
from .gpu_table import Sizes
from .ppo_job import PPOJob
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
        share: of the time, in relation to the others'.
    """

    name: str
    build: Callable[[], Contender]
    share: float = 1.0


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

    def policy(hidden: int) -> PolicyProblem:
        network = (4, hidden, hidden, 2)
        return PolicyProblem(sizes.policies, sizes.policy_batch, network, 90.0, device=device)

    def job() -> PPOJob:
        settings = PPO(horizon=-(-sizes.policy_batch // PPO.copies), epochs=1, minibatches=1)
        return PPOJob(sizes.policies, 90.0, settings, device=str(device))

    def cloning() -> CloneJob:
        return CloneJob(sizes.policies, 90.0, sizes.policy_batch, 4, device)

    yield Subject("packed layer, step", packed, 3.0)
    yield Subject("blocked layer, forward+backward", blocked, 3.0)
    yield Subject("dense+mask layer, forward+backward", masked, 2.0)
    for hidden in sizes.policy_widths:
        name = f"policy of width {hidden}, forward+backward"
        yield Subject(name, lambda hidden=hidden: ours.policy(policy(hidden)))
    yield Subject("rollout", lambda: _act(job()))
    yield Subject("PPO update", lambda: _update(job()))
    yield Subject("cloning", lambda: clone_contender(cloning()))
    yield Subject("prune", lambda: _prune(*sizes.pruned, device))
    yield Subject(
        "Adam, dense+mask",
        lambda: gpu_ours.adam_masked(
            LayerProblem(tickets, batch, width, width, 90.0, device=device)
        ),
    )
    hidden = sizes.policy_widths[0]
    name = f"packed policy of width {hidden}, forward+backward"
    yield Subject(name, lambda: _packed_policy(policy(hidden), "ieee"))
    yield Subject(f"policy of width {width}, forward+backward", lambda: ours.policy(policy(width)))
    widest = sizes.policy_widths[-1]
    name = f"packed policy of width {widest}, forward+backward, tf32"
    yield Subject(name, lambda: _packed_policy(policy(widest), "tf32"))


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


def _prune(tickets: int, prunable: int, device: torch.device) -> Contender:
    mask = random_masks_on(device, tickets, prunable, 50.0)
    # All different, so that there is one right answer.
    scores = torch.rand(tickets, prunable, device=device).argsort(1).float()
    kept = round(0.4 * prunable)
    with use_backend("reference"):
        expected = prune(scores, mask, kept)
    return gpu_ours.prune_to(scores, mask, kept, expected)


def _packed_policy(problem: PolicyProblem, precision: str) -> Contender:
    """A whole network by its packed weights, and the gradient."""
    arena, mask = problem.arena, problem.mask
    pattern = build_pattern(mask, arena.prunable_layers())
    values = pack(problem.weight, pattern).requires_grad_()
    rest = problem.weight[:, arena.prunable :].clone().requires_grad_()

    def run() -> tuple[Tensor, ...]:
        y = mlp_packed(problem.x, values, pattern, rest, arena.actor, precision=precision)
        return (y.detach(), *torch.autograd.grad(y, (values, rest), problem.dy))

    def error() -> float:
        y, of_values, of_rest = run()
        grad = torch.cat([unpack(of_values, pattern), of_rest], 1)
        return distance([y, grad], problem.forward_backward, problem.terms, precision)

    return Contender("packed policy", run, error)


def candidates(question: Question) -> Iterator[dict[str, int]]:
    """What the op says it can be launched with, or neighbours of its default.

    A neighbour has one number changed: warps and tile sides by 2, stages by one.
    """
    fields = asdict(question.default)
    if question.among:
        yield from (asdict(other) for other in question.among if other != question.default)
        return
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
        chosen = list(subjects(sizes, device))
        for place, subject in enumerate(chosen):
            left = deadline - time.monotonic()
            if left < 0:
                found["left_out"].append(subject.name)
                continue
            share = subject.share / sum(each.share for each in chosen[place:])
            until = time.monotonic() + share * left
            try:
                _tune_subject(subject, timer, until, found, save, report)
            except Exception as error:  # One subject must not take the others with it.
                found["failed"][subject.name] = f"{type(error).__name__}: {error}"
                report(f"{subject.name}: failed: {type(error).__name__}: {error}")
            if device.type == "cuda":
                torch.cuda.empty_cache()
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
    _check(contender)
    # Of what is timed alone: the check may run more.
    with tuning.listen() as heard:
        contender.run()
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
    for candidate in candidates(question):
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
