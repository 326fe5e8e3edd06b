"""Two runs side by side: what became slower by more than the noise of either."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sparse_tickets.timing import Spread

from .results import Run

__all__ = ["THRESHOLD", "Change", "compare"]

THRESHOLD = 0.05
"""Changes of times below this share are not reported, however quiet the machine was."""
COUNT_THRESHOLD = 0.01
"""The same for counts, which two runs of the same code repeat to half a percent."""

Verdict = Literal["slower", "faster", "same"]


@dataclass(frozen=True)
class Change:
    """One configuration in both runs.

    Attributes:
        label: op, sizes, sparsity.
        measure: ``speed-up over PEER``, ``cold speed-up over PEER``, ``time`` where no peer ran in
            both, or ``instructions``.
        old: of the first run.
        new: of the second.
        verdict: see `compare`.
    """

    label: str
    measure: str
    old: Spread
    new: Spread
    verdict: Verdict


def compare(old: Run, new: Run) -> list[Change]:
    """Every configuration the two runs share, regressions first.

    Speed-ups are compared where a peer ran in both: they were paired with the peer in time, so a
    busy or another machine moves them less than times. ``slower`` means that the two p20-p80
    spreads do not touch and the medians differ by more than `THRESHOLD`.

    Raises:
        ValueError: the runs have no configuration in common.
    """
    before = {record.key: record for record in old.records}
    changes = []
    for record in new.records:
        earlier = before.get(record.key)
        if earlier is None:
            continue
        shared = [peer for peer in record.speedup if peer in earlier.speedup]
        for kind, earlier_ratios, ratios in (
            ("speed-up", earlier.speedup, record.speedup),
            ("cold speed-up", earlier.cold_speedup, record.cold_speedup),
            ("replayed speed-up", earlier.replay_speedup, record.replay_speedup),
        ):
            for peer in (peer for peer in ratios if peer in earlier_ratios):
                was, now = earlier_ratios[peer], ratios[peer]
                verdict = _verdict(was, now, larger_is_better=True)
                changes.append(Change(record.label, f"{kind} over {peer}", was, now, verdict))
        if not shared:
            was = earlier.contenders[earlier.subject].wall
            now = record.contenders[record.subject].wall
            verdict = _verdict(was, now, larger_is_better=False)
            changes.append(Change(record.label, "time", was, now, verdict))
    for name, count in new.counts.items():
        if name in old.counts:
            was, now = (Spread(value, value, value, 1) for value in (old.counts[name], count))
            verdict = _verdict(was, now, larger_is_better=False, threshold=COUNT_THRESHOLD)
            changes.append(Change(name, "instructions", was, now, verdict))
    if not changes:
        raise ValueError("the two runs must share a configuration, they have none in common")
    order = {"slower": 0, "faster": 1, "same": 2}
    return sorted(changes, key=lambda change: order[change.verdict])


def _verdict(
    old: Spread, new: Spread, *, larger_is_better: bool, threshold: float = THRESHOLD
) -> Verdict:
    if abs(new.median / old.median - 1) <= threshold:
        return "same"
    if new.p20 > old.p80:
        return "faster" if larger_is_better else "slower"
    if new.p80 < old.p20:
        return "slower" if larger_is_better else "faster"
    return "same"
