"""The rules of ARCHITECTURE.md, kept by reading the source: who may import what, and when."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest
from setuptools import find_packages

import sparse_tickets
from sparse_tickets import kernels

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"sparse_tickets": ROOT / "sparse_tickets", "sparse_tickets.kernels": ROOT / "kernels"}

# A module imports from its own layer and those before it; every module has a layer.
LAYERS = (
    ("kernels",),
    (
        "casting",
        "conditions",
        "files",
        "fused",
        "hooks",
        "linear",
        "optim",
        "provenance",
        "prune",
        "runs",
        "selection",
        "sequential",
        "settings",
        "structure",
        "ticket",
        "timing",
        "tracking",
    ),
    ("connectivity", "coverage"),
    ("compaction", "convert", "envs", "population", "targets"),
    ("diagnostics", "dynamic", "export", "integrations"),
    ("algos",),
    ("imp",),
    ("sweep",),
    ("analysis", "bench", "ceilings", "inspect"),
    ("commands",),
    ("cli",),
)
KERNEL_LIBRARIES = {"torch", "triton", "numba", "llvmlite", "numpy"}
# Slow to import, or needed by a few features only: where each may be imported at all.
CONFINED = {
    "matplotlib": ("sparse_tickets.analysis",),
    "polars": ("sparse_tickets.analysis", "sparse_tickets.sweep.store"),
    "pyarrow": ("sparse_tickets.sweep.rows",),
    "gymnasium": ("sparse_tickets.envs", "sparse_tickets.integrations.minari"),
    "minari": ("sparse_tickets.integrations.minari",),
    "tyro": ("sparse_tickets.cli", "sparse_tickets.commands"),
    "triton": ("sparse_tickets.kernels",),
    "stable_baselines3": (
        "sparse_tickets.integrations.sb3",
        "sparse_tickets.integrations.squashed",
    ),
    "tensorboard": (),
    "wandb": ("sparse_tickets.tracking",),
    "trackio": ("sparse_tickets.tracking",),
    "numba": ("sparse_tickets.kernels",),
    "llvmlite": ("sparse_tickets.kernels",),
}


class Import(NamedTuple):
    """One import statement's module: ``eager`` if it runs when the importing module loads."""

    importer: str
    line: int
    module: str
    eager: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.module}"


@cache
def modules() -> dict[str, Path]:
    """Import name and file of every module of the library."""
    found = {}
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def targets(node: ast.AST, importer: str) -> Iterator[str]:
    """Absolute names of the modules an import statement loads."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            is_package = modules()[importer].name == "__init__.py"
            ancestors = importer.split(".")
            ancestors = ancestors[: len(ancestors) - node.level + is_package]
            base = ".".join([*ancestors, *([node.module] if node.module else [])])
        for alias in node.names:
            full = f"{base}.{alias.name}"
            yield full if full in modules() else base


def is_type_checking(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


@cache
def imports(importer: str) -> list[Import]:
    """Every import of a module, wherever it stands."""
    found = []

    def visit(node: ast.AST, eager: bool) -> None:
        found.extend(
            Import(importer, node.lineno, target, eager) for target in targets(node, importer)
        )
        if is_type_checking(node):
            for child in node.body:
                visit(child, False)
            for child in node.orelse:
                visit(child, eager)
            return
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, eager and not deferred)

    visit(tree(importer), True)
    return found


def all_imports() -> Iterator[Import]:
    for name in modules():
        yield from imports(name)


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def layer(module: str) -> int:
    top = module.split(".")[1]
    return next(index for index, names in enumerate(LAYERS) if top in names)


def report(violations: Iterator[object]) -> None:
    listed = [str(violation) for violation in violations]
    assert not listed, "\n" + "\n".join(listed)


def test_imports_are_read_in_every_form() -> None:
    """The reader itself: absolute, relative, lazy, and only for the type checker."""
    in_linear = {(i.module, i.eager) for i in imports("sparse_tickets.kernels.linear.registration")}
    assert ("sparse_tickets.kernels.dispatch", True) in in_linear
    assert ("sparse_tickets.kernels.linear.gpu", False) in in_linear
    in_mlp = {(i.module, i.eager) for i in imports("sparse_tickets.kernels.mlp")}
    assert ("sparse_tickets.kernels.dispatch", True) in in_mlp
    assert ("sparse_tickets.kernels.mlp.gpu", False) in in_mlp
    in_store = {(i.module, i.eager) for i in imports("sparse_tickets.sweep.store")}
    assert ("sparse_tickets.files", True) in in_store
    assert ("polars", False) in in_store
    assert ("polars", True) not in in_store


@pytest.mark.long
def test_kernels_know_nothing_above_them() -> None:
    report(
        i
        for i in all_imports()
        if inside(i.importer, "sparse_tickets.kernels")
        and inside(i.module, "sparse_tickets")
        and not inside(i.module, "sparse_tickets.kernels")
    )


def test_kernels_use_few_libraries() -> None:
    allowed = KERNEL_LIBRARIES | sys.stdlib_module_names | {"sparse_tickets"}
    report(
        i
        for i in all_imports()
        if inside(i.importer, "sparse_tickets.kernels") and i.module.split(".")[0] not in allowed
    )


def test_triton_is_only_imported_when_a_kernel_runs() -> None:
    report(
        i
        for i in all_imports()
        if i.eager
        and not i.importer.endswith((".gpu", "_gpu"))
        and (inside(i.module, "triton") or i.module.endswith((".gpu", "_gpu")))
    )


def test_every_module_has_a_layer() -> None:
    known = {name for names in LAYERS for name in names}
    tops = {name.split(".")[1] for name in modules() if "." in name}
    assert tops == known


def test_layers_import_downwards() -> None:
    report(
        i
        for i in all_imports()
        if inside(i.module, "sparse_tickets")
        and i.importer != "sparse_tickets"
        and (i.module == "sparse_tickets" or layer(i.module) > layer(i.importer))
    )


def test_no_module_imports_itself_through_others() -> None:
    graph = {
        name: {i.module for i in imports(name) if i.eager and i.module in modules()} - {name}
        for name in modules()
    }
    TopologicalSorter(graph).prepare()


def test_confined_libraries() -> None:
    report(
        i
        for i in all_imports()
        for library, homes in CONFINED.items()
        if inside(i.module, library) and not any(inside(i.importer, home) for home in homes)
    )


def test_the_store_imports_table_libraries_late() -> None:
    late = ("polars", "pyarrow")
    report(
        i for i in imports("sparse_tickets.sweep.store") if i.eager and i.module.startswith(late)
    )


def test_nothing_is_validated_by_assert() -> None:
    report(
        f"{path.relative_to(ROOT)}:{node.lineno} asserts"
        for folder in ("kernels", "sparse_tickets", "experiments")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assert)
    )


# What makes a tensor of the dtype and on the device that torch's global defaults say.
FACTORIES = re.compile(
    r"torch\.(as_tensor|asarray|empty|empty_strided|eye|full|linspace|logspace|ones|rand|randn"
    r"|scalar_tensor|tensor|zeros|Tensor|FloatTensor)|nn\.Linear|nn\.utils\.skip_init|SparseLinear"
)
INTEGER_FACTORIES = re.compile(r"torch\.(arange|randint|randperm|tril_indices|triu_indices)")


def unnamed(call: ast.Call) -> set[str]:
    """Which of dtype and device a call leaves to the defaults, which a program may change."""
    name = ast.unparse(call.func)
    required = {"dtype", "device"} if FACTORIES.fullmatch(name) else set()
    required |= {"device"} if INTEGER_FACTORIES.fullmatch(name) else set()
    named = {keyword.arg for keyword in call.keywords}
    return set() if None in named else required - named


def test_factories_are_read_in_every_form() -> None:
    read = lambda code: unnamed(ast.parse(code, mode="eval").body)  # noqa: E731
    assert read("torch.zeros(3)") == {"dtype", "device"}
    assert read("torch.arange(3, dtype=torch.int32)") == {"device"}
    assert read("torch.Tensor(3)")
    assert not read("torch.zeros_like(x)")
    assert not read("torch.zeros(3, dtype=torch.bool, device=x.device)")


def test_no_tensor_depends_on_the_default_dtype_or_device() -> None:
    report(
        f"{name}:{node.lineno} leaves {sorted(unnamed(node))} to torch's defaults"
        for name in modules()
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Call) and unnamed(node)
    )


def test_every_module_says_what_it_is() -> None:
    # An empty __init__.py only marks a folder as a package.
    report(
        f"{name} has no docstring"
        for name, path in modules().items()
        if path.stat().st_size and not ast.get_docstring(tree(name))
    )


def test_every_package_is_found() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    found = find_packages(ROOT, **project["tool"]["setuptools"]["packages"]["find"])
    assert set(found) == packages
    parents = {name.rpartition(".")[0] for name in modules() if "." in name}
    assert parents <= packages


@pytest.mark.parametrize("face", [sparse_tickets, kernels], ids=lambda face: face.__name__)
def test_lazy_exports_agree(face) -> None:
    """``__all__``, the imports the type checker sees and what an attribute gives are the same."""
    checked = {"__version__": None} if face is sparse_tickets else {}
    for node in tree(face.__name__).body:
        if is_type_checking(node):
            for statement in node.body:
                if isinstance(statement, ast.ImportFrom):
                    (module,) = set(targets(statement, face.__name__))
                    checked |= {a.asname or a.name: (module, a.name) for a in statement.names}
    assert set(face.__all__) == set(checked)
    assert set(face.__all__) <= set(dir(face))
    for name, origin in checked.items():
        value = getattr(face, name)
        if origin is not None:
            module, attribute = origin
            assert value is getattr(importlib.import_module(module), attribute)
        assert f"{face.__name__}.{name}" not in modules(), "an export would hide a module"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = face.nothing


def test_every_op_has_a_reference() -> None:
    report(
        f"{name} has no reference.py"
        for name, path in modules().items()
        if path.match("kernels/*/__init__.py") and f"{name}.reference" not in modules()
    )


LARGEST_FILE, LARGEST_FUNCTION = 500, 100
# Of one algorithm each, and named alike on purpose: `ppo.Iteration`, `dqn.Iteration`.
SHARED_CLASSES = {"Iteration"}


@cache
def sources() -> dict[str, str]:
    """Every Python file of the repository that git knows, by its path."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "*.py"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("not in a checkout")
    paths = [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]
    return {name: (ROOT / name).read_text(encoding="utf-8") for name in paths}


def test_no_two_files_share_the_name_of_a_class() -> None:
    homes: dict[str, list[str]] = {}
    for path, text in sources().items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.ClassDef) and node.name not in SHARED_CLASSES:
                homes.setdefault(node.name, []).append(path)
    report(f"{name}: {', '.join(found)}" for name, found in homes.items() if len(found) > 1)


def test_files_and_functions_stay_short() -> None:
    report(
        f"{path} has {lines} lines"
        for path, text in sources().items()
        if (lines := text.count("\n")) > LARGEST_FILE
    )
    report(
        f"{path}:{node.lineno} {node.name} has {lines} lines"
        for path, text in sources().items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := node.end_lineno - node.lineno + 1) > LARGEST_FUNCTION
    )


def test_folders_of_ops_stay_modules() -> None:
    for op in ("linear", "mlp", "prune", "rollout"):
        folder = importlib.import_module(f"sparse_tickets.kernels.{op}")
        assert getattr(kernels, op) is folder
        assert callable(getattr(folder, op))


def run_alone(code: str) -> None:
    """Run code in a fresh interpreter, which sees the installed library only."""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_importing_loads_only_what_is_used() -> None:
    run_alone(
        """
import sys

def loaded(*libraries):
    return [library for library in libraries if library in sys.modules]

import sparse_tickets
early = loaded("torch", "numba", "triton", "gymnasium", "matplotlib", "polars", "pyarrow", "rich")
if early:
    sys.exit(f"import sparse_tickets loads {early}")
sparse_tickets.SparseLinear, sparse_tickets.sparsify_
early = loaded("gymnasium", "matplotlib", "polars", "pyarrow", "rich", "safetensors", "tyro")
if early:
    sys.exit(f"SparseLinear loads {early}")
sparse_tickets.Sweep, sparse_tickets.load_results
early = loaded("matplotlib", "polars", "pyarrow", "tyro")
if early:
    sys.exit(f"Sweep loads {early}")
# As torch.optim is there after import torch.
sparse_tickets.optim.Adam, sparse_tickets.targets.tie_masks_
"""
    )


@pytest.mark.long
def test_works_without_triton() -> None:
    """On systems for which Triton has no wheel, everything runs on the CPU."""
    run_alone(
        """
import importlib.util, sys

class WithoutTriton:
    "A finder that finds all that another finds, but no Triton."
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [WithoutTriton(finder) for finder in sys.meta_path]
if importlib.util.find_spec("triton") is not None:
    sys.exit("triton is still in sight")

import torch
from sparse_tickets import SparseLinear, use_backend
from sparse_tickets.kernels.prune import prune

layer = SparseLinear(8, 4).prune_(density=0.25)
layer(torch.randn(3, 8)).sum().backward()
if layer.weight.grad[~layer.mask].any() or int(layer.mask.sum()) != 8:
    sys.exit("SparseLinear is wrong")
mask = prune(torch.arange(6.0).view(2, 3), torch.ones(2, 3, dtype=torch.bool), 1)
if mask.nonzero().tolist() != [[0, 2], [1, 2]]:
    sys.exit("prune is wrong")
try:
    with use_backend("triton"):
        prune(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), 1)
except ValueError as error:
    if "not installed" not in str(error):
        raise
else:
    sys.exit("the triton backend ran without triton")
if "triton" in sys.modules:
    sys.exit("triton was imported")
"""
    )
