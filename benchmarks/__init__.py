"""Benchmarks: our ops beside named peers, verified in the run that times them.

python -m benchmarks run --suite quick     the table of targets, about five minutes
python -m benchmarks run --suite curves    cost against population, width, batch, density, threads
python -m benchmarks run --suite full      both, and more shapes; all of them go on when stopped
python -m benchmarks steps                 whole training steps in plain loops
python -m benchmarks jobs                  whole programs of Stable-Baselines3
python -m benchmarks report                results -> README.md and figures
python -m benchmarks compare OLD NEW       regressions beyond noise
python -m benchmarks.gpu                   what `make gpu` does: tests, tuning, targets, a sweep
pytest benchmarks -m bench                 every case and op, one by one, by pytest-benchmark

From a question to a number, on a CPU and on a GPU alike:

problems.py, *_job.py                  inputs, drawn on their device, and the float64 reference
ours.py, peers/                        contenders: who computes a result, each verified
cases.py, suites.py                    who meets whom, and at which sizes
measure.py                             a case -> a record: verified, then timed in turns
  sparse_tickets/timing.py             turns, warm and cold calls (users' `bench` runs on it too)
  clock.py                             on a GPU besides: CUDA graphs, and triton's do_bench
results.py                             a run of records as JSON: device, versions, commit
tables.py, scaling.py, figures.py      a run as tables and pictures
console.py, report.py, first_screen.py tables in the terminal, in README.md, in the top README
runner.py, gpu/                        a suite that goes on when stopped; a GPU's hour
steps.py, jobs.py, job_returns.py       whole steps and programs, with tables of their own;
apart.py                               their peers in processes of their own
"""
