"""Registers of other processors: AVX2 code runs here, NEON code is compiled and read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FEATURES = {
    "haswell": "+sse4.2,+popcnt,+avx,+avx2,+fma,+bmi,+bmi2,+f16c",
    # The narrowest there is: registers of four lanes, multiply-adds in two steps.
    "x86-64": "+sse2",
}

NEON = """
import llvmlite.binding as llvm
import numpy as np
from sparse_tickets.kernels.mlp import products
from sparse_tickets.kernels.vector import LANES

space, index = np.zeros(8 * products.PANEL, np.float32), np.zeros(5, np.int32)
products.sparse_product(space, index, index, index, 4, space, 0, 0, LANES, space, 0)
code = next(iter(products.sparse_product.inspect_llvm().values()))
llvm.initialize_all_targets()
llvm.initialize_all_asmprinters()
# Reference counts are already in terms of this processor: any name will do, nothing is run.
module = llvm.parse_assembly(code.replace("@llvm.x86.", "@x86."))
target = llvm.Target.from_triple("aarch64-linux-gnu").create_target_machine("cortex-a72", opt=3)
print(LANES)
print(target.emit_assembly(module))
"""


def _run(command: list[str], features: str, cpu: str, tmp_path: Path) -> str:
    environment = os.environ | {
        "NUMBA_CPU_NAME": cpu,
        "NUMBA_CPU_FEATURES": features,
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.fail(f"{done.stdout}\n{done.stderr}")
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("cpu", FEATURES)
def test_narrow_registers_compute_the_same(cpu, tmp_path) -> None:
    tests = Path(__file__).parent
    names = "test_linear_cpu.py", "test_mlp.py", "test_residual.py", "test_policy.py"
    files = [str(tests / name) for name in names]
    out = _run(["-m", "pytest", "-q", "-x", *files], FEATURES[cpu], cpu, tmp_path)
    assert " passed" in out


@pytest.mark.slow
def test_neon_registers_hold_fused_multiply_adds(tmp_path) -> None:
    # Four lanes, as NEON has; Numba's code is LLVM's own language until a target is chosen.
    out = _run(["-c", NEON], FEATURES["x86-64"], "x86-64", tmp_path)
    assert out.startswith("4\n")
    assert "fmla" in out
