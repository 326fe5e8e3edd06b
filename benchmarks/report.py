"""The newest result of each device as README.md: tables, crossovers, figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sparse_tickets.files import write_atomic

from .figures import draw
from .results import BUSY, Run
from .tables import Table, grid, tables

__all__ = ["markdown", "write_report"]

_INTRODUCTION = """\
# Benchmarks

Written by `python -m benchmarks report` from `results/`; do not edit. Predictions, and how they
fared, are in [NOTES.md](NOTES.md).

- Contenders take turns within each round; a ratio is the peer's time over ours in the same round:
  median (p20-p80). Above 1 we are faster, below 1 slower.
- Nothing is timed before the same process compared its result, in this very configuration, with the
  float64 reference.
- All contenders have the same threads (SciPy knows one only; SparseProp and JAX take every core
  they may run on) and the same inputs, row-major. Peers get sparse formats built, programs
  compiled, and weight gradients masked, outside the clock.
- JAX and Stable-Baselines3 are systems with random numbers of their own: no float64 reference
  corresponds. `tests/test_peers.py` holds the JAX program's equations to ours.
- Three gains are kept apart: batching and fusion (against a loop of dense policies), sparsity
  (against the same code run dense), and the whole job.

| peer | what it is |
|---|---|
| torch dense | `F.linear` / `torch.baddbmm` on the weight with its zeros: MKL or cuBLAS |
| torch w*mask | the mask multiplied in on every call, then `torch.baddbmm` |
| torch CSR | `F.linear` with a CSR weight |
| scipy CSR | `scipy.sparse.csr_array @ x`, one thread |
| SparseProp | Nikdan et al., 2023: AVX2 kernels on compressed rows |
| loop of torch dense | one policy after the other |
| torch.compile w*mask | the mask multiplied in, compiled |
| sparse_tickets, run dense | our own fused kernels told that nothing is pruned |
| JAX PPO, vmap of w*mask | one compiled [program](peers/jax_trainer.py) in PureJaxRL's style |
| SB3 PPO (1 agent, 1 core) | Stable-Baselines3 as installed; one such process per core adds up |

Run it: `make bench`, or `python -m benchmarks run --suite full`.
"""


def markdown(runs: Mapping[str, Run], figures: Mapping[str, list[Path]]) -> str:
    """The page.

    Args:
        runs: newest run by device.
        figures: pictures by device, relative to the page.
    """
    parts = [_INTRODUCTION]
    if not runs:
        parts.append("No results yet.\n")
    for device, run in runs.items():
        parts.append(_device(run))
        parts += [f"![{path.stem}]({path.as_posix()})\n" for path in figures.get(device, [])]
        parts += [_grid(table) for table in tables(run)]
    if not any(device.startswith("nvidia") for device in runs):
        parts.append(
            "## GPU\n\nNot yet measured. On a machine with one: "
            "`python -m benchmarks run --suite quick --device cuda`.\n"
        )
    return "\n".join(parts)


def write_report(folder: Path, runs: Mapping[str, Run]) -> Path:
    """Write ``README.md`` and ``figures/`` into ``folder``; returns the page's path."""
    figures = {
        device: [path.relative_to(folder) for path in draw(run, folder / "figures")]
        for device, run in runs.items()
    }
    page = folder / "README.md"
    write_atomic(page, markdown(runs, figures).encode())
    return page


def _device(run: Run) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    load = f"other processes used {run.busy:.0%} of the cores"
    if run.busy > BUSY:
        load = f"**{load}: neither times nor ratios can be trusted**"
    return (
        f"## {run.device}\n\n{run.hardware}; {run.threads} threads; {versions}; "
        f"commit {run.commit}; {run.date[:10]}; suite {run.suite}, {run.seconds:.0f} s; {load}.\n"
    )


def _grid(table: Table) -> str:
    notes = "".join(f"- {note}\n" for note in table.notes)
    return f"### {table.title}\n\n{grid(table.columns, table.rows)}\n\n{notes}"
