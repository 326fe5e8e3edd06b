"""The GPU's table of targets: `suites.targets`, measured as far as time and the device allow.

What this machine can do at best is measured in the same run. A case may end the process that
measures it: `fill` goes on in another, with the cases that are left.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sparse_tickets.ceilings import measure_ceilings
from sparse_tickets.timing import Budget, Contender, Spread, interleave

from ..clock import GpuTimer, is_lost, make_timer
from ..measure import Case, Record, Refusal, measure, precision_of_torch
from ..results import SuiteRun, load, provenance, save
from ..suites import REAL, TINY, targets
from .process import DIED, Work, say, watched

_HANG_S = 120.0
"""A case that takes longer never ends. Compilers have taken half of it."""
_KINDS = 3
"""Of timing: a case has a share of the time for each."""
_KIND_S = 15.0
PRECISIONS = {"ieee": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}


def part(work: Work) -> bool:
    """The table, kept in a file like any other run's."""
    sizes, inner = TINY if work.rehearse else REAL, work.folder / "table-run.json"
    device, found = str(work.device), work.found
    run = load(inner) if inner.exists() and found else provenance("gpu", device, None)

    def keep() -> None:
        save(run, inner)
        found.update(run=str(inner), at=run.parts["table"]["at"])
        work.keep()

    rest = {"rounds": sizes.rounds, "matrix": sizes.matrix}
    return fill(run, targets(device, sizes), work.device, work.deadline, keep, say, **rest)


def fill(
    run: SuiteRun,
    cases: Sequence[Case],
    device: torch.device,
    deadline: float,
    save: Callable[[], None],
    report: Callable[[str], None] = print,
    *,
    rounds: int = 9,
    matrix: int = 8192,
) -> bool:
    """Measure case after case into ``run``, saving after each; stops at the deadline.

    Args:
        run: takes records, refusals and ``parts["table"]``; goes on with what is there.
        cases: with labels of their own.
        device: a GPU, or for a rehearsal the CPU.
        deadline: by `time.monotonic`.
        save: called before and after every case.
        report: takes a line per case.
        rounds: samples per contender.
        matrix: side of the product that shows what is possible.

    Returns:
        Whether there are cases left that only another process can measure: see `clock`.
    """
    timer = make_timer(device)
    if not run.products:
        ceilings = measure_ceilings(Budget(rounds=5, limit_seconds=2.0), device)
        run.sgemm, run.copies = ceilings.sgemm, ceilings.copies
        run.products = measure_products(matrix, device, timer)
    table = run.parts.setdefault("table", {"failed": {}, "at": ""})
    if table["at"]:
        table["failed"][table["at"]] = DIED
    table |= {"at": "", "left_out": []}
    done = {each.label for each in (*run.records, *run.refused)}.union(table["failed"])
    for case in (case for case in cases if case.label not in done):
        left = deadline - time.monotonic()
        if left < 0:
            table["left_out"].append(case.label)
            continue
        table["at"] = case.label
        save()
        budget = Budget(rounds, 0.005, 0.005, min(_KIND_S, left / _KINDS), settle_seconds=0.0)
        try:
            with watched(_HANG_S):
                outcome = measure(case, budget, str(device), timer)
        except Exception as error:  # A case that fails must not take the others with it.
            table["failed"][case.label] = f"{type(error).__name__}: {error}"
            report(f"{case.label}: failed: {type(error).__name__}: {error}")
        else:
            _keep(run, outcome, report)
        table["at"] = ""
        save()
        if timer.spoiled or is_lost(device):
            return True
        forget_compiled(device)
    save()
    return False


def _keep(run: SuiteRun, outcome: Record | Refusal, report: Callable[[str], None]) -> None:
    if isinstance(outcome, Refusal):
        run.refused.append(outcome)
        report(f"{outcome.label}: refused: {outcome.reason}")
    else:
        run.records.append(outcome)
        speedup = outcome.replay_speedup or outcome.speedup
        ratios = ", ".join(f"{spread.median:.2f}x {peer}" for peer, spread in speedup.items())
        report(f"{outcome.label}: {ratios or 'no peer'}")


def forget_compiled(device: torch.device) -> None:
    """Free what was measured; the next shapes are then compiled as if they were the first.

    For a second shape `torch.compile` would make slower code that fits any.
    """
    if device.type == "cuda":
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def measure_products(side: int, device: torch.device, timer: GpuTimer) -> dict[str, Spread]:
    """Operations per second of a large product on random data, by precision."""
    found = {}
    for precision, dtype in PRECISIONS.items():
        left, right = torch.randn(2, side, side, device=device).to(dtype).unbind()
        out = torch.empty_like(left)

        def multiply(left=left, right=right, out=out) -> Any:
            return torch.mm(left, right, out=out)

        contender = Contender(precision, multiply, None, 2.0 * side**3)
        with precision_of_torch(precision):
            timing = interleave([contender], Budget(5, settle_seconds=0.0), timer.clock)
        found[precision] = Spread.of([1 / seconds for seconds in timing[precision].wall])
    return found
