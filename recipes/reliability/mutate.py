"""Break the method's code on purpose, one small fault at a time, and see whether a test notices.

    python recipes/reliability/mutate.py --count 20 --seed 0 --out runs/mutate.json [FILE ...]

Faults: another comparison, another operator, a number that is off by one, a truth value or a `not` turned round, an
argument or a statement left out, `min` for `max`. Drawn at random from each file, with the same seed the same ones.
A fault is killed when one of the file's tests fails, or hangs for two minutes. What lives is printed with its line.

Each fault runs in a fork of one process that has imported torch and transformers, so that it costs the tests alone.
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "koff_lightning"
LIMIT = 120  # seconds
# File of the method -> its tests, the quickest first.
TESTS = {
    "gates.py": ["test_gates.py", "test_sparsity.py", "test_equivalences.py", "test_training.py"],
    "sparsity.py": ["test_sparsity.py", "test_uniform.py", "test_gates.py", "test_training.py"],
    "tracking.py": ["test_gates.py", "test_sparsity.py"],
    "attention.py": ["test_attention.py", "test_memory.py", "test_decomposed.py"],
    "merged_attention.py": ["test_attention.py"],
    "lora.py": ["test_memory.py", "test_equivalences.py", "test_decomposed.py"],
    "kv_memory.py": ["test_kv_memory.py", "test_memory.py", "test_memory_files.py"],
    "memory.py": ["test_memory.py", "test_training.py"],
    "losses.py": ["test_losses.py", "test_training.py"],
    "surgery.py": ["test_surgery.py", "test_layouts.py", "test_memory_files.py"],
    "studies/analysis/lape.py": ["test_lape.py"],
    "training/optim.py": ["test_optim.py", "test_training.py"],
}
SWAPS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.USub: ast.UAdd,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "float": "int", "round": "int", "floor": "ceil"}


def faults(tree: ast.Module) -> Iterator[tuple[int, str, ast.Module]]:
    """Yield every fault of a file: line, what was done, and the file with it."""
    nodes = list(ast.walk(tree))
    inside = {id(part) for node in nodes if isinstance(node, ast.Raise) for part in ast.walk(node)}  # words of errors
    for number, node in enumerate(nodes):
        if id(node) in inside or not hasattr(node, "lineno"):
            continue
        for what, change in _changes(node):
            other = copy.deepcopy(tree)
            twin = list(ast.walk(other))[number]
            change(twin)
            yield node.lineno, what, ast.fix_missing_locations(other)


def _changes(node: ast.AST) -> Iterator[tuple[str, object]]:
    """Yield what can be done to a node, each in words and as a function that does it to its twin."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield type(node.ops[0]).__name__, lambda twin: twin.ops.__setitem__(0, SWAPS[type(twin.ops[0])]())
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.UnaryOp | ast.AugAssign) and type(node.op) in SWAPS:
        yield type(node.op).__name__, lambda twin: setattr(twin, "op", SWAPS[type(twin.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not left out", lambda twin: (setattr(twin, "op", ast.Not()), setattr(twin, "operand", _negated(twin)))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "truth turned", lambda twin: setattr(twin, "value", not twin.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "number", lambda twin: setattr(twin, "value", twin.value + 1 if isinstance(twin.value, int) else 0.0)
    elif isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in NAMES:
            key = "id" if isinstance(node.func, ast.Name) else "attr"
            yield f"{name} -> {NAMES[name]}", lambda twin: setattr(twin.func, key, NAMES[name])
        if node.keywords:
            yield f"argument {node.keywords[-1].arg} left out", lambda twin: twin.keywords.pop()
    elif (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)) or isinstance(node, ast.AugAssign):
        yield "statement left out", lambda twin: setattr(twin, "value", ast.Constant(0))


def _negated(twin: ast.UnaryOp) -> ast.expr:
    return ast.UnaryOp(ast.Not(), twin.operand)


class _Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module of ours with a fault in it."""

    def __init__(self, module: str, file: Path, tree: ast.Module) -> None:
        self.module, self.file, self.tree = module, file, tree

    def find_spec(self, name: str, path: object, target: object = None) -> object:
        if name != self.module:
            return None
        return importlib.util.spec_from_file_location(name, self.file, loader=self)

    def create_module(self, spec: object) -> None:
        return None

    def exec_module(self, module: object) -> None:
        exec(compile(self.tree, str(self.file), "exec"), module.__dict__)


def lives(file: str, tree: ast.Module) -> bool:
    """Whether no test of a file notices a fault in it."""
    child = os.fork()
    if child == 0:
        import pytest

        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        name = "koff_lightning." + file.removesuffix(".py").replace("/", ".")
        sys.meta_path.insert(0, _Broken(name, SOURCE / file, tree))
        tests = [str(ROOT / "tests" / test) for test in TESTS[file] if (ROOT / "tests" / test).is_file()]
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *tests])))
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def main() -> None:
    """Draw, run, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(TESTS), help="of the method; by default all")
    parser.add_argument("--count", type=int, default=20, help="faults drawn from each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/mutate.json"))
    options = parser.parse_args()
    os.chdir(ROOT)
    import lightning.pytorch  # noqa: F401
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    rows = []
    for file in options.files:
        tree = ast.parse((SOURCE / file).read_text(encoding="utf-8"))
        if not lives(file, tree):
            sys.exit(f"{file}: its tests fail, or take over {LIMIT} s, as they are: see to that first")
        every = list(faults(tree))
        drawn = random.Random(options.seed).sample(every, min(options.count, len(every)))
        for line, what, broken in sorted(drawn, key=lambda fault: fault[0]):
            row = {"file": file, "line": line, "what": what, "lives": lives(file, broken)}
            rows.append(row)
            if row["lives"]:
                print(f"lives: {file}:{line} {what}", flush=True)
        killed = sum(not row["lives"] for row in rows if row["file"] == file)
        print(f"{file}: {killed} of {len(drawn)} killed ({len(every)} possible)", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"killed {sum(not row['lives'] for row in rows)} of {len(rows)}")


if __name__ == "__main__":
    main()
