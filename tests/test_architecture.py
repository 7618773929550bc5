"""The house rules that a machine can check: floors of imports, names of model internals in one place, sizes."""

import ast
import re
import symtable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
FILES = sorted((SOURCE / "koff_lightning").rglob("*.py"))
MODEL_INTERNALS = re.compile(r"\b[qkvo]_proj\b|\b(gate|up|down)_proj\b|\bself_attn\b|\.mlp\b")

# From the ground up. A file imports from its own floor and those below; a line is one floor, and what stands on it side
# by side. CONTRIBUTING.md tells what each is for.
FLOORS = """
support
units placement
specs
backbone
gguf_files model_files listed_files
loading
tracking merged_attention attention losses metrics surgery lora penalties
gates sparsity kv_memory
memory
decomposition
data router
artifact
training
reports
evaluation
callbacks
studies
serving
commands
cli
notebook __main__
"""

# Imports upwards, each inside a function. transformers must know the koff_* model types before it loads one, and they
# are written in a file that ships with artifacts.
LAZY_DOORS = {("koff_lightning.loading", "koff_lightning.artifact.modeling_koff")}


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


def floor_of(module: str) -> int:
    """Number of the floor that a module stands on."""
    room = module.split(".")[1]
    found = [number for number, line in enumerate(FLOORS.split("\n")) if room in line.split()]
    assert len(found) == 1, f"{module} stands on {len(found)} floors: give {room} its place in FLOORS"
    return found[0]


def test_a_file_imports_from_its_own_floor_and_those_below():
    graph = {name: others - {"koff_lightning"} for name, others in import_graph().items() if name != "koff_lightning"}
    up = {(name, other) for name, others in graph.items() for other in others if floor_of(other) > floor_of(name)}
    assert up == LAZY_DOORS, f"imports upwards: {sorted(up - LAZY_DOORS)}; doors that nobody uses: {LAZY_DOORS - up}"


def test_contributing_shows_the_house_that_stands():
    """Every file and folder of the root has its place in CONTRIBUTING, in the order of the floors."""
    text = (SOURCE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    house = text[text.index("## The house") : text.index("## Four ways")]
    here = {path.name for path in (SOURCE / "koff_lightning").iterdir()} - {"__pycache__", "py.typed"}
    rooms = {name for name in here if not name.startswith("__") and name != "notebook.py"}
    shown = re.findall(r"(?<![\w/])(\w+)(?:\.py|/)(?=\s)", house)
    assert {name.removesuffix(".py") for name in rooms} <= set(shown)
    floors = [floor_of(f"koff_lightning.{name}") for name in shown if name in FLOORS.split()]
    assert floors == sorted(floors)
    named = re.findall(r"\b([a-z_]+/[a-z_]+\.py)\b", text)
    assert named
    assert [
        name
        for name in named
        if not any((base / name).is_file() for base in (SOURCE / "koff_lightning", SOURCE.parent))
    ] == []


def test_the_four_ways_stop_at_what_is_there():
    """Each name in them is defined in the file that the same stop names."""
    text = (SOURCE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    ways = text[text.index("## Four ways") : text.index("## Ten rules")]
    stops = re.findall(r"`([A-Za-z_.]+)`\s+\(([a-z_/]+\.py)\)", ways)
    assert len(stops) > 8
    for name, file in stops:
        tree = ast.parse((SOURCE / "koff_lightning" / file).read_text(encoding="utf-8"))
        for part in name.split("."):
            found = [node for node in tree.body if getattr(node, "name", None) == part]
            assert found, f"CONTRIBUTING names {name} in {file}, which has no such thing"
            tree = found[0]


def test_lazy_doors_are_inside_functions():
    for name, other in LAZY_DOORS:
        file = next(file for file in FILES if module_name(file) == name)
        outside = [node for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.Import)]
        assert other not in {alias.name for node in outside for alias in node.names}


def test_no_import_cycles_within_a_floor():
    graph = import_graph()
    for name, other in LAZY_DOORS:
        graph[name] = graph[name] - {other}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def defined(file: Path) -> set[str]:
    """Names that a module makes itself, outside of its functions and classes."""
    symbols = symtable.symtable(file.read_text(encoding="utf-8"), str(file), "exec").get_symbols()
    return {symbol.get_name() for symbol in symbols if symbol.is_assigned() and not symbol.is_imported()}


def test_a_name_is_imported_from_the_module_that_defines_it():
    """Not from one that has imported it too. Packages are doors: their own file may pass names on."""
    own = {module_name(file): defined(file) for file in FILES if file.name != "__init__.py"}
    others = [file for folder in ("recipes", "tests") for file in sorted((SOURCE.parent / folder).rglob("*.py"))]
    borrowed = []
    for file in (*FILES, *others):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in own:
                names = {alias.name for alias in node.names} - own[node.module]
                borrowed += [f"{file.name}:{node.lineno}: {name} is not of {node.module}" for name in sorted(names)]
    assert borrowed == []


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_only_backbone_and_units_name_the_inside_of_a_model(file):
    if file.name not in ("backbone.py", "units.py"):
        lines = file.read_text(encoding="utf-8").splitlines()
        assert not [f"{i}: {line}" for i, line in enumerate(lines, 1) if MODEL_INTERNALS.search(line)]


@pytest.mark.parametrize("file", FILES, ids=module_name)
def test_files_and_functions_are_short(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400, "a file of more than 400 lines holds more than one idea"
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 60}
    assert not long, "functions of more than 60 lines"


def test_no_utils():
    assert not [file for file in FILES if file.stem in ("utils", "helpers", "misc", "common")]
