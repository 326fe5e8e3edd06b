"""Every kernel says how it rounds sums of products; launches and the compiler follow."""

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sparse_tickets import kernels
from sparse_tickets.kernels.compile import cases, ops_with_kernels
from sparse_tickets.kernels.jit import jit_kernel, options_of

triton = pytest.importorskip("triton")
tl = triton.language

# Run with the name of this file, from which Triton reads the kernel.
PROBE = """
import sys; sys.path.insert(0, sys.argv[1])
import triton
from test_jit import multiply_add
from triton.backends.compiler import GPUTarget
from sparse_tickets.kernels.jit import jit_kernel, options_of

for fuses in (True, False):
    kernel = jit_kernel(fp_fusion=fuses)(multiply_add)
    types = {"x": "*fp32", "y": "*fp32", "BLOCK": "constexpr"}
    source = triton.compiler.ASTSource(kernel, types, {"BLOCK": 128})
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options_of(kernel))
    print("fma.rn.f32" in made.asm["ptx"])
"""


def multiply_add(x, y, BLOCK: tl.constexpr):
    entry = tl.arange(0, BLOCK)
    tl.store(y + entry, tl.load(x + entry) * tl.load(y + entry) + 1.5)


def test_every_kernel_that_is_launched_says_it() -> None:
    launched = 0
    for path in Path(kernels.__file__).parent.rglob("*gpu.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path}:{getattr(node, 'lineno', '')}"
            if isinstance(node, ast.FunctionDef) and node.name.endswith("kernel"):
                assert ast.unparse(node.decorator_list[0]).startswith("jit_kernel("), where
                launched += 1
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                assert ast.unparse(node.func.value).endswith("kernel"), f"{where} launches what?"
    assert launched > 20


@pytest.mark.parametrize("op", ops_with_kernels())
def test_only_the_physics_is_rounded_apart(op: str) -> None:
    """It equals other backends' bit for bit; the rest is faster and closer to exact if fused."""
    fused = op not in ("dynamics", "rollout")
    for case in cases(op):
        assert options_of(case.kernel) == {"enable_fp_fusion": fused}, case.name


@pytest.mark.parametrize("fuses", [False, True])
def test_a_launch_carries_it(fuses: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[dict[str, Any]] = []
    kind = type(triton.jit(multiply_add))
    monkeypatch.setattr(kind, "run", lambda self, *arguments, **options: launches.append(options))
    jit_kernel(fp_fusion=fuses)(multiply_add)[(3,)](None, None, BLOCK=16)
    assert [each["enable_fp_fusion"] for each in launches] == [fuses]
    assert launches[0]["grid"] == (3,)


@pytest.mark.long
@pytest.mark.parametrize("default", ["0", "1"])
def test_machine_code_follows_it_whatever_the_default(default: str) -> None:
    environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE, str(Path(__file__).parent)],
        env=environment | {"TRITON_DEFAULT_FP_FUSION": default},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_another_decorator_is_refused() -> None:
    with pytest.raises(TypeError, match="multiply_add must be declared with @jit_kernel"):
        options_of(triton.jit(multiply_add))
    with pytest.raises(TypeError, match="must be declared with @jit_kernel"):
        options_of(SimpleNamespace())
