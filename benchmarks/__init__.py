"""Benchmarks: our ops beside named peers, verified in the run that times them.

python -m benchmarks run --suite quick     the table of targets, about five minutes
python -m benchmarks run --suite curves    cost against population, width, batch, density, threads
python -m benchmarks run --suite full      both, and more shapes; all of them go on when stopped
python -m benchmarks report                results -> README.md and figures
python -m benchmarks compare OLD NEW       regressions beyond noise
python -m benchmarks instructions          instructions per call, free of noise
pytest benchmarks -m bench                 every op, one by one, under pytest-benchmark
"""
