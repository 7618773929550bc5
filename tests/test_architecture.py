"""The house rules that a machine can check: one-way imports, names of model internals in one place, sizes."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
FILES = sorted((SOURCE / "koff_lightning").rglob("*.py"))
MODEL_INTERNALS = re.compile(r"\b[qkvo]_proj\b|\b(gate|up|down)_proj\b|\bself_attn\b|\.mlp\b")


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def imported(file: Path, modules: set[str]) -> set[str]:
    """Our modules that `file` imports anywhere, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return (names & modules) - {module_name(file)}


def import_graph() -> dict[str, set[str]]:
    """Module -> modules it imports; a package's door stands for the package and may be entered by its own files."""
    modules = {module_name(file) for file in FILES}
    graph = {module_name(file): imported(file, modules) for file in FILES}
    graph["koff_lightning"] = set()  # holds the version and opens the rest lazily
    for name, others in graph.items():
        graph[name] = {o for o in others if not name.startswith(f"{o}.")}
    return graph


def test_imports_flow_one_way():
    try:
        TopologicalSorter(import_graph()).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_only_backbone_names_the_inside_of_a_model(file):
    if file.name != "backbone.py":
        lines = file.read_text(encoding="utf-8").splitlines()
        assert not [f"{i}: {line}" for i, line in enumerate(lines, 1) if MODEL_INTERNALS.search(line)]


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_files_and_functions_are_short(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300, "a file of more than 300 lines holds more than one idea"
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 60}
    assert not long, "functions of more than 60 lines"


def test_no_utils():
    assert not [file for file in FILES if file.stem in ("utils", "helpers", "misc", "common")]
