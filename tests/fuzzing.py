"""How many cases the drawn tests of tests/fuzz take: a few, always the same, or many new ones.

`make fuzz` sets SPARSE_TICKETS_FUZZ to the cases of each test.
"""

import os

from hypothesis import HealthCheck, settings

__all__ = ["drawn"]

_CASES = int(os.environ.get("SPARSE_TICKETS_FUZZ", "0"))


def drawn(few: int, steps: int = 12) -> settings:
    """Settings of a drawn test: ``few`` fixed cases, or as many new ones as were asked for."""
    return settings(
        max_examples=_CASES or few,
        derandomize=not _CASES,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
