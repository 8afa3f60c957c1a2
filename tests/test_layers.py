"""Imports go one way: a module imports only modules above it, and only the top imports the techniques."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import lowrank_onnx

PACKAGE = Path(lowrank_onnx.__file__).parent

# From the bottom up; what stands on one line does not see each other. A new module takes its place here.
ORDER = """
    version errors threads accelerator
    workers
    linalg
    decompositions
    selectors
    data cache labels structures
    metrics runtime unpack
    model
    base
    shapes quantized
    sites.weights
    sites
    cost batches feeds chains patches lookups recurrent_statistics attention_statistics softmax_statistics
    block_chains conv_chains head_chains recurrent_chains
    statistics stream rewrite kept composing short_names
    cascade levels stddev
    coding packing
    level_files
    allocation target plans weighing
    validation memory
    augment mirror trimming
    problem proposals
    latency building probes grids
    probe_cache refine budget forms waves crossovers felt
    rivals
    search reporting cascading nesting leveling adaptive run spread maps judging
    posteriors
    report
    frontiers deciding
    finishing sweeping
    multilevel unsure
    passes
    pipeline
    cli
    __main__
"""

LEVELS = [line.split() for line in ORDER.splitlines() if line.strip()]
TOP = {"pipeline", "cli"}


def modules() -> dict[str, Path]:
    """Every module by its name inside the package; a technique is ``passes.x``."""
    found = {}
    for path in sorted({*PACKAGE.rglob("*.py"), *(PACKAGE / "passes").glob("*.py")}):  # passes/ may be a link
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, at_load: bool = False) -> set[str]:
    """Modules of this package that a file imports: wherever in the file, or when it is loaded."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_load else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} uses a relative import"
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in named if name.removeprefix("lowrank_onnx.") in MODULES}
            found |= submodules if len(submodules) == len(named) else {node.module or "", *submodules}
    return {name.removeprefix("lowrank_onnx.") for name in found} & set(MODULES)


MODULES = {name: path for name, path in modules().items() if name}


def level(module: str) -> int:
    """Where a module stands; one inside a folder stands where the folder does, unless it is named."""
    for name in (module, module.split(".")[0]):
        for place, names in enumerate(LEVELS):
            if name in names:
                return place
    raise AssertionError(f"'{module}' has no place in ORDER of {Path(__file__).name}")


def test_the_order_names_what_exists() -> None:
    missing = [name for names in LEVELS for name in names if name not in MODULES]
    assert not missing


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module: str) -> None:
    package = module.split(".")[0]
    for other in imports(MODULES[module]) - {module}:
        if other.split(".")[0] == package and level(other) == level(module):
            continue  # neighbours in one folder; cycles are looked for below
        assert level(other) < level(module), f"{module} imports {other}, which stands above it"


@pytest.mark.parametrize("module", MODULES)
def test_only_the_top_imports_the_techniques(module: str) -> None:
    if module not in TOP and not module.startswith("passes"):
        assert not [other for other in imports(MODULES[module]) if other.startswith("passes")]


def test_no_module_imports_itself_by_a_detour() -> None:
    graph = {name: imports(path, at_load=True) - {name} for name, path in MODULES.items()}
    tuple(TopologicalSorter(graph).static_order())


def test_decompositions_know_nothing_of_onnx() -> None:
    for name, path in MODULES.items():
        if name.startswith("decompositions") or name == "linalg":
            text = path.read_text(encoding="utf-8")
            names = {
                alias.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for alias in node.names
            }
            names |= {n.module or "" for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)}
            assert not [entry for entry in names if entry.startswith(("onnx", "onnxruntime"))], name


def test_onnxruntime_is_imported_in_one_place() -> None:
    users = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            named += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            users += [name for entry in named if entry.split(".")[0] == "onnxruntime"]
    assert set(users) == {"runtime", "quantized"}  # the second takes its quantizer


def test_importing_the_package_does_not_need_onnxruntime() -> None:
    import subprocess
    import sys

    code = "import sys; sys.modules['onnxruntime'] = None; import lowrank_onnx, lowrank_onnx.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
