"""What a run of isolated calls says in short: speed-ups, losses, and what a population gains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from sparse_tickets.ceilings import BUSY
from sparse_tickets.timing import Spread

from .cases import FUSED_DENSE
from .measure import Record
from .peers import (
    jax_ppo,
    masked_bmm,
    sb3,
    scipy_csr,
    sparseprop,
    torch_bsr,
    torch_csr,
    torch_dense,
)
from .results import SuiteRun, versions_in_words
from .tables import NOISY, grid, groups, shape_of

_COLUMNS = (50.0, 80.0, 90.0, 95.0, 99.0)
_LAYER = {"P": 1, "B": 2048, "I": 256, "O": 256}
_POLICY = {"P": 60, "B": 128, "width": 64}
_JOB = {"P": 60}
_OVER_DENSE = (f"vs {torch_dense.NAME}", (torch_dense.NAME,))
_OVER_SPARSE = (
    "vs fastest sparse peer",
    (torch_csr.NAME, torch_bsr.NAME, scipy_csr.NAME, sparseprop.NAME),
)
_OVER_MASKED = (f"vs {masked_bmm.NAME}", (masked_bmm.NAME,))
_OVER_ITSELF = ("vs itself dense", (FUSED_DENSE,))
_ROWS = (
    ("layer 256 x 256, batch 2048, forward", "linear forward", _LAYER, _OVER_DENSE),
    ("layer 256 x 256, batch 2048, forward", "linear forward", _LAYER, _OVER_SPARSE),
    ("the layer, forward+backward", "linear forward+backward", _LAYER, _OVER_DENSE),
    ("the layer, forward+backward", "linear forward+backward", _LAYER, _OVER_SPARSE),
    ("the layer inside a policy, forward", "layer inside a policy, forward", {}, _OVER_DENSE),
    ("60 policies 4-64-64-2, forward+backward", "policy forward+backward", _POLICY, _OVER_MASKED),
    ("60 policies 4-64-64-2, forward+backward", "policy forward+backward", _POLICY, _OVER_ITSELF),
)
# Cold calls are in the tables of benchmarks/README.md: nearly all of a small layer's is waking up.
_KINDS = {
    "speedup": "",
    "replay_speedup": ", CUDA graph",
}


def widest(runs: Mapping[str, Sequence[SuiteRun]]) -> SuiteRun | None:
    """The run that fills most cells of `speedups`, of two the longer, then newer; None without."""

    def filled(run: SuiteRun) -> tuple[int, int, str]:
        cells = sum(1 for _, op, shape, _ in _ROWS for _ in _matching(run, op, shape))
        return cells, len(run.records), run.date

    timed = (run for several in runs.values() for run in several if run.records)
    return max(timed, key=filled, default=None)


def speedups(run: SuiteRun) -> str:
    """By sparsity, as Markdown."""
    rows = []
    for title, op, shape, (said, peers) in _ROWS:
        records = {record.sparsity: record for record in _matching(run, op, shape)}
        cells = [_closest(records.get(sparsity), peers) for sparsity in _COLUMNS]
        rows.append([f"{title}, {said}", *cells])
    return grid(["speed-up, weights pruned", *(f"{s:g}%" for s in _COLUMNS)], rows)


def losses(run: SuiteRun) -> str:
    """Every configuration in which a peer was faster, warm and beyond noise, by op and sizes."""
    rows, configurations = [], set()
    for records in groups(run):
        for kind, title in _KINDS.items():
            known = {record.sparsity: getattr(record, kind) for record in records}
            peers = dict.fromkeys(peer for speedup in known.values() for peer in speedup)
            lost = {peer: _lost(known, peer) for peer in peers}
            said = [f"{peer} {text}" for peer, text in lost.items() if text]
            if said:
                rows.append([f"{records[0].op}{title}, {shape_of(records[0])}", "; ".join(said)])
        configurations |= {
            record.key
            for record in records
            if any(_is_lost(s) for kind in _KINDS for s in getattr(record, kind).values())
        }
    if not rows:
        return f"No peer was faster in any of the {len(run.records)} configurations measured."
    heads = ["configuration", "faster than we are: our speed-up over it, weights pruned"]
    return (
        f"In {len(configurations)} of the {len(run.records)} configurations measured at least one "
        "peer was faster on warm caches, by more than the spread (p20-p80).\n\n"
        f"{grid(heads, rows, text=2)}"
    )


def _lost(speedups: Mapping[float, Mapping[str, Spread]], peer: str) -> str:
    """``0.61-0.93x at 0-50%``: runs of neighbouring levels at which the peer was faster."""
    known = [(sparsity, spreads[peer]) for sparsity, spreads in speedups.items() if peer in spreads]

    parts = []
    for lost, items in groupby(known, lambda item: _is_lost(item[1])):
        if lost:
            levels, spreads = zip(*items, strict=True)
            ratios = _range([spread.median for spread in spreads], ".2f")
            parts.append(f"{ratios}x at {_range(levels, 'g')}%")
    return " and ".join(parts)


def _is_lost(spread: Spread) -> bool:
    return spread.p80 < 1


def _range(values: Sequence[float], form: str) -> str:
    low, high = (format(value, form) for value in (min(values), max(values)))
    return low if low == high else f"{low}-{high}"


def population(run: SuiteRun) -> str:
    """Throughput of sixty tickets, and over others, as Markdown."""
    heads = ["PPO on CartPole, 60 tickets", "agent-steps/s", "vs itself dense"]
    peers = {"vs JAX, w*mask": jax_ppo.NAME, "vs SB3, one agent": sb3.NAME}
    jobs = {r.sparsity: r for r in _matching(run, "PPO iteration", _JOB)}
    rows = []
    for title, sparsity in (("level 0, dense", 0.0), ("actor at 10% density", 90.0)):
        record = jobs.get(sparsity)
        rate = "not measured" if record is None else f"{record.per_second:,.0f}"
        itself = _closest(record, (FUSED_DENSE,))
        rows.append([title, rate, itself, *(_closest(record, (name,)) for name in peers.values())])
    return grid([*heads, *peers], rows)


def origin(run: SuiteRun) -> str:
    """Where a run's numbers come from."""
    versions = versions_in_words(run.versions)
    absent = {
        f" Not run - {name}: {why}."
        for record in run.records
        for name, why in record.skipped.items()
        if name in (jax_ppo.NAME, sb3.NAME, sparseprop.NAME)
    }
    load = ""
    if run.busy > BUSY:
        load = (
            f" **Other processes used {run.busy:.0%} of the cores: neither times nor ratios can be "
            "trusted.**"
        )
    return (
        f"Measured on {run.hardware}, {run.threads} threads; {versions}; commit {run.commit}; "
        f"{run.date[:10]}. A ratio is the peer's time over ours, median of paired rounds; ~ marks "
        f"a spread (p20-p80) above {NOISY:.0%}. Sparse peers: {', '.join(_OVER_SPARSE[1])}."
        f"{''.join(sorted(absent))}{load}"
    )


def _matching(run: SuiteRun, op: str, shape: Mapping[str, int]) -> Iterable[Record]:
    """Of an op at these sizes, on the threads of the run."""
    for record in run.records:
        fits = record.op == op and shape.items() <= record.shape.items()
        if fits and "threads" not in record.shape:
            yield record


def _closest(record: Record | None, names: Iterable[str]) -> str:
    """The smallest speed-up over any of the peers: over the fastest of them."""
    ratios = [] if record is None else [record.speedup[n] for n in names if n in record.speedup]
    if not ratios:
        return "-"
    closest = min(ratios, key=lambda spread: spread.median)
    return f"{'~' if closest.noise > NOISY else ''}{closest.median:.2f}x"
