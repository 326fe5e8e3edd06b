"""Two runs side by side: what of ours became slower by more than the machine did.

A machine's speed wanders between runs, and within one, by more than most regressions. But peers ran
in turn with us, and their code did not change: they are a control group. What the peers of a
configuration took longer (their median) is the machine's doing; what we took longer beyond that is
our *deviation*. Each peer also has a deviation from the other peers, which nothing but noise
explains: these placebos say how far ours must stray before it means anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, median
from typing import Literal

from .cases import is_ours
from .measure import Record
from .results import SuiteRun

THRESHOLD = 0.05
"""Changes of times below this share are not reported, however quiet the machine was."""
FALSE_ALARMS = 0.05
"""How often two runs of the same code may raise an alarm among ops, and among configurations."""

Verdict = Literal["slower", "faster", "same", "unknown"]

_KINDS = {"wall": "warm", "cold": "cold caches", "replay": "CUDA graph"}
_PEERS, _DENSE = "peers", "our own dense run"
# Placebos of one op are few: they are weighed against this many of the average op's.
_PRIOR = 4.0
_FEWEST_PLACEBOS = 6


@dataclass(frozen=True)
class Change:
    """An op at all its levels, or one configuration, in both runs. Factors on times: 2 is twice.

    Attributes:
        label: op and sizes, and for one configuration its sparsity.
        kind: ``warm``, ``cold caches`` or ``CUDA graph``.
        count: of configurations, or pairs of runs, that it is the mean of.
        against: whose change was taken for the machine's: ``peers``, or where none ran ``our own
            dense run``, which hides what slows both.
        machine: factor on their times.
        ours: factor on our times beyond that.
        visible: the smallest factor that would have been told from noise; infinite if too few
            peers ran to know.
        verdict: ``slower`` or ``faster`` beyond ``visible``; ``unknown`` if that is infinite.
    """

    label: str
    kind: str
    count: int
    against: str
    machine: float
    ours: float
    visible: float
    verdict: Verdict


@dataclass(frozen=True)
class RunComparison:
    """What `compare` found.

    Attributes:
        ops: every op at its sizes, all levels together: the sharper test.
        configurations: every configuration by itself: sees a single level that broke.
        left_out: configurations in which nobody ran beside us: times alone say nothing.
    """

    ops: tuple[Change, ...]
    configurations: tuple[Change, ...]
    left_out: tuple[str, ...] = ()

    @property
    def slower(self) -> list[Change]:
        """Every regression."""
        return [each for each in (*self.ops, *self.configurations) if each.verdict == "slower"]


@dataclass(frozen=True)
class _Sample:
    """One configuration in one pair of runs; logarithms of factors.

    ``deviation`` and ``placebos`` are in units of what one contender's time changes by at random:
    a difference from the median of k others varies 1 + 1/k times as much, and was divided by it.
    """

    op: str
    label: str
    kind: str
    against: str
    machine: float
    deviation: float
    unit: float
    placebos: Mapping[str, float]
    apart: bool


def compare(pairs: Sequence[tuple[SuiteRun, SuiteRun]]) -> RunComparison:
    """Every configuration that both runs of each pair share.

    An op is flagged if its mean deviation exceeds what noise explains: z times the placebos'
    root mean square, z being such that any alarm among all of them has the chance `FALSE_ALARMS`,
    and the largest placebo, since their tails are longer than a normal distribution's. One
    configuration must also have p20-p80 spreads that do not touch.

    Args:
        pairs: old and new runs; several pairs, taken in turn, see smaller changes than one.

    Raises:
        ValueError: no pair has a configuration in common.
    """
    shared = [both for pair in pairs for both in _shared(*pair)]
    samples = [sample for both in shared for sample in _samples(*both)]
    if not shared:
        raise ValueError("the two runs must share a configuration, they have none in common")
    return RunComparison(
        tuple(_judge(samples, lambda sample: sample.op, alone=False)),
        tuple(_judge(samples, lambda sample: sample.label, alone=True)),
        tuple(sorted({new.label for _, new in shared} - {sample.label for sample in samples})),
    )


def _shared(old: SuiteRun, new: SuiteRun) -> list[tuple[Record, Record]]:
    before = {record.key: record for record in old.records}
    both = [(before[record.key], record) for record in new.records if record.key in before]
    return [(was, now) for was, now in both if was.subject == now.subject]


def _samples(old: Record, new: Record) -> Iterable[_Sample]:
    """One per kind of timing that both have and somebody else took part in."""
    for kind in _KINDS:
        others = _changes(old, new, kind)
        ours = others.pop(new.subject, None)
        peers = {name: x for name, x in others.items() if not is_ours(name)}
        references = peers or others
        if ours is None or not references:
            continue
        machine = median(references.values())
        unit = math.sqrt(1 + 1 / len(references))
        yield _Sample(
            op=new.label.removesuffix(f" {new.sparsity:g}%"),
            label=new.label,
            kind=kind,
            against=_PEERS if peers else _DENSE,
            machine=machine,
            deviation=(ours - machine) / unit,
            unit=unit,
            placebos=_placebos(peers),
            apart=_apart(old, new, kind, math.exp(machine)),
        )


def _changes(old: Record, new: Record, kind: str) -> dict[str, float]:
    found = {}
    for name in new.contenders.keys() & old.contenders.keys():
        was, now = (getattr(record.contenders[name], kind) for record in (old, new))
        if was is not None and now is not None:
            found[name] = math.log(now.median / was.median)
    return dict(sorted(found.items()))


def _placebos(peers: Mapping[str, float]) -> dict[str, float]:
    """Of each peer the deviation from the others, in the unit of `_Sample`."""
    found = {}
    for name, change in peers.items():
        others = [x for other, x in peers.items() if other != name]
        if others:
            found[name] = (change - median(others)) / math.sqrt(1 + 1 / len(others))
    return found


def _apart(old: Record, new: Record, kind: str, machine: float) -> bool:
    """Whether the subject's spreads do not touch once the machine's change is taken out."""
    was, now = (getattr(record.contenders[record.subject], kind) for record in (old, new))
    return now.p20 / machine > was.p80 or now.p80 / machine < was.p20


def _judge(
    samples: Sequence[_Sample], name: Callable[[_Sample], str], *, alone: bool
) -> list[Change]:
    groups: dict[tuple[str, str, str], list[_Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.kind, sample.against, name(sample)), []).append(sample)
    z = NormalDist().inv_cdf(1 - FALSE_ALARMS / (2 * max(1, len(groups))))
    placebos = {key: _means(group) for key, group in groups.items()}
    changes = []
    for (kind, against, label), group in groups.items():
        known = [x for key, some in placebos.items() if key[0] == kind for x in some]
        unit = fmean(sample.unit for sample in group)
        limit = unit * _limit(known, placebos[kind, against, label], z)
        machine = fmean(sample.machine for sample in group)
        ours = unit * fmean(sample.deviation for sample in group)
        visible = max(limit, math.log1p(THRESHOLD))
        verdict: Verdict = "unknown" if math.isinf(limit) else "same"
        if abs(ours) > visible and (not alone or all(sample.apart for sample in group)):
            verdict = "slower" if ours > 0 else "faster"
        factors = (math.exp(x) for x in (machine, ours, visible))
        changes.append(Change(label, _KINDS[kind], len(group), against, *factors, verdict))
    return changes


def _means(group: Sequence[_Sample]) -> list[float]:
    """Of each peer the mean placebo over a group, as the subject's deviation is a mean."""
    found: dict[str, list[float]] = {}
    for sample in group:
        for peer, deviation in sample.placebos.items():
            found.setdefault(peer, []).append(deviation)
    return [fmean(deviations) for deviations in found.values()]


def _limit(known: Sequence[float], own: Sequence[float], z: float) -> float:
    """What noise explains: placebos of this group, steadied by those of all."""
    if len(known) < _FEWEST_PLACEBOS:
        return math.inf
    average = fmean(x * x for x in known)
    variance = (_PRIOR * average + sum(x * x for x in own)) / (_PRIOR + len(own))
    return max(z * math.sqrt(variance), max(map(abs, known)))
