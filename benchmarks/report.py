"""The newest results of each device as README.md: tables, crossovers, figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sparse_tickets.ceilings import BUSY
from sparse_tickets.files import write_atomic

from .brief import losses, origin, speedups, widest
from .figures import draw
from .gpu.report import gpu_tables
from .results import SuiteRun, share_out, versions_in_words
from .steps import left
from .tables import Table, grid, tables

_INTRODUCTION = """\
# Benchmarks

Written by `python -m benchmarks report` from `results/`; do not edit. Predictions, and how they
fared, are in [NOTES.md](NOTES.md).

Which number answers your question?

- *Does my training program get faster?* Whole steps in plain loops: the first table of the
  [top README](../README.md), every time in `results/steps/`. `python -m benchmarks steps` measures
  them here, `python -m benchmarks jobs` whole programs of Stable-Baselines3.
- *What can the kernels do?* The tables below: the same call again and again, with pauses of 5 ms
  between turns, caches warm or cold, as no program calls them. A program gains less.
- *Where is it slower than something else?* In both: below 1 we lose.

How a number below comes about:

- Contenders take turns within each round; a ratio is the peer's time over ours in the same round:
  median (p20-p80). Above 1 we are faster, below 1 slower.
- Nothing is timed before the same process compared its result, in this very configuration, with the
  float64 reference.
- Times are warm: a call finds in the caches what the one before it left. Tables of cold caches, and
  on a GPU of CUDA graphs, follow the warm one.
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
| torch.func, vmap of w*mask | `vmap` of `functional_call` and its `vjp` on an `nn.Sequential` |
| torch CSR | `F.linear` with a CSR weight |
| torch BSR | `F.linear` with a BSR weight, in the largest blocks the mask fills, or 2 x 2 |
| torch 2:4 | `F.linear` with a semi-structured weight, CUDA only |
| torch.topk | the scores inside the mask, scattered into a new one |
| scipy CSR | `scipy.sparse.csr_array @ x`, one thread |
| SparseProp | Nikdan et al., 2023: AVX2 kernels on compressed rows |
| loop of torch dense | one policy after the other |
| torch.compile w*mask | the mask multiplied in, compiled |
| sparse_tickets, run dense | our own fused kernels told that nothing is pruned |
| torch, all tickets at once | our reference backend: the population as plain batched torch |
| JAX PPO, vmap of w*mask | one compiled [program](peers/jax_trainer.py) in PureJaxRL's style |
| SB3 PPO (1 agent, 1 core) | Stable-Baselines3 as installed; one such process per core adds up |

- All of this again: `make bench`, or `python -m benchmarks run --suite curves` for the scaling
  curves, `--suite full` for everything. A run that was stopped goes on with the same command.
- A layer of your size: `sparse-tickets bench --width 256 --batch 2048`.
- One case and one contender under pytest-benchmark: `pytest benchmarks -m bench -k "policy and 90"
  --contender "torch w*mask"`. Speed-ups come from the former alone: here nobody takes turns.
- Two versions of the code: `python -m benchmarks compare OLD.json NEW.json`; peers are its control
  group, and it says which changes it cannot see. On one machine, take runs in turn and give several
  pairs: `compare OLD1 NEW1 OLD2 NEW2`.
"""


def markdown(
    runs: Mapping[str, Sequence[SuiteRun]],
    figures: Mapping[str, list[Path]],
    whole_steps: Path | None = None,
) -> str:
    """The page.

    Args:
        runs: newest runs by device.
        figures: pictures by device, relative to the page.
        whole_steps: the newest file of `steps`, if there is one.
    """
    parts = [_INTRODUCTION]
    if whole_steps is not None and (table := left(whole_steps)):
        parts.append(f"## What torch's optimiser leaves\n\n{table}")
    if not runs:
        parts.append("No results yet.\n")
    if run := widest(runs):
        parts += [
            f"## Kernels alone, warm\n\n{speedups(run)}\n\n{origin(run)}\n",
            f"## Where a peer is faster\n\n{losses(run)}\n",
        ]
    for device, several in runs.items():
        parts.append(f"## {device}\n")
        parts += [f"![{path.stem}]({path.as_posix()})\n" for path in figures.get(device, [])]
        for run in share_out(several):
            parts.append(_origin(run))
            parts += [_grid(table) for table in gpu_tables(run)]
            parts += [_grid(table) for table in tables(run)]
    if not any(device.startswith("nvidia") for device in runs):
        parts.append(
            "## GPU\n\nNot yet measured. On a machine with one: `make gpu`, then "
            "`python -m benchmarks report`.\n"
        )
    return "\n".join(parts)


def write_report(
    folder: Path, runs: Mapping[str, Sequence[SuiteRun]], whole_steps: Path | None = None
) -> Path:
    """Write ``README.md`` and ``figures/`` into ``folder``; returns the page's path."""
    figures = {
        device: [path.relative_to(folder) for path in draw(several, folder / "figures")]
        for device, several in runs.items()
    }
    page = folder / "README.md"
    write_atomic(page, markdown(runs, figures, whole_steps).encode())
    return page


def _origin(run: SuiteRun) -> str:
    versions = versions_in_words(run.versions)
    load = f"other processes used {run.busy:.0%} of the cores"
    if run.busy > BUSY:
        load = f"**{load}: neither times nor ratios can be trusted**"
    stopped = "" if run.complete else ", stopped before its end"
    return (
        f"{run.hardware}; {run.threads} threads; {versions}; "
        f"commit {run.commit}; {run.date[:10]}; suite {run.suite}{stopped}, "
        f"{run.seconds:.0f} s; {load}.\n"
    )


def _grid(table: Table) -> str:
    notes = "".join(f"- {note}\n" for note in table.notes)
    return f"### {table.title}\n\n{grid(table.columns, table.rows)}\n\n{notes}"
