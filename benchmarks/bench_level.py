"""One level of iterative magnitude pruning for a population: prune and rewind, then train."""

import pytest

from benchmarks.backends import device_of, swept
from benchmarks.level_job import LevelJob, level_contender, sparsity_of

pytestmark = [pytest.mark.bench, pytest.mark.benchmark(max_time=1.0, min_rounds=3, warmup=True)]

# Levels of iterative pruning next to 50, 80, 90, 95, 98 and 99% pruned, and the first.
LEVELS = [1, 3, 7, 10, 13, 18, 21]


@pytest.mark.parametrize(("backend", "level"), swept(LEVELS))
@pytest.mark.parametrize("tickets", [1, 8, 60])
@pytest.mark.parametrize("iterations", [0, 4], ids=["prune+rewind", "whole"])
def bench_level(timed, backend, iterations, tickets, level):
    timed(
        lambda: level_contender(
            LevelJob(
                tickets,
                level,
                iterations=iterations,
                backend=backend,
                device=device_of(backend),
            )
        ),
        sparsity=sparsity_of(level),
        tickets=tickets,
    )
