"""Break the method's code on purpose, one small fault at a time, and see whether a test notices.

    python recipes/reliability/mutate.py --count 40 --seed 0 --out runs/mutate.jsonl [FILE ...] [--tests NAME ...]

Faults: another comparison, another operator, a number that is off by one, a truth value, a condition or a `not` turned
round, an argument or a statement left out, `min` for `max`. Drawn at random from each file, with the same seed the same
ones. Left alone: what is said in errors, and `strict` of zip, which guards and decides nothing.

A fault is killed when a test fails, or takes 10 s and three times the processor time that it takes otherwise. Those
tests run, of the method or of --tests, that execute the broken statement, or all of a module where one of its fixtures
does: the cheapest, up to --seconds of processor time, so the score is a lower bound. What lives is printed with its
line; so is what no test executes, such as the ways that only a GPU takes. A run that was stopped goes on where it was:
delete both files of --out to begin anew, as after any change of tests or files.

One process imports and collects all; each fault runs in a fork of it, put into the functions and constants that are
there already. So it costs its tests alone, some seconds.
"""

import argparse
import ast
import builtins
import copy
import importlib
import json
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "koff_lightning"
FILES = [
    "gates.py",
    "sparsity.py",
    "tracking.py",
    "attention.py",
    "merged_attention.py",
    "kv_memory.py",
    "lora.py",
    "memory.py",
    "losses.py",
    "penalties.py",
    "surgery.py",
    "studies/analysis/lape.py",
    "training/optim.py",
]
# The tests of the method; --more names others, for what lives, and --tests those of other files in place of these.
TESTS = ["gates", "sparsity", "tracking", "uniform", "channels", "penalties", "losses", "optim", "lape", "attention"]
TESTS += ["kv_memory", "memory", "memory_files", "surgery", "layouts", "equivalences", "bounds"]
# Of files whose other tests are whole runs.
TESTS += [
    "general_text::test_settled_is_the_gradient_of_the_loss_by_its_inputs_alone",
    "placement::test_a_gate_that_is_closed_is_a_layer_that_is_not_there",
    "placement::test_slots_of_noise_need_no_text_and_may_all_be_trained",
    "precision::test_the_head_is_multiplied_in_fp32_where_half_precision_is_slow",
]
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
Change = Callable[[ast.AST], object]


def faults(tree: ast.Module) -> Iterator[tuple[int, int, str, Change]]:
    """Yield every fault of a file: line, number of the node, what is done to it, and the function that does it."""
    nodes = list(ast.walk(tree))
    inside = {id(part) for node in nodes if isinstance(node, ast.Raise) for part in ast.walk(node)}  # words of errors
    guards = [
        word.value for node in nodes if isinstance(node, ast.Call) for word in node.keywords if word.arg == "strict"
    ]
    inside |= {id(value) for value in guards}
    for number, node in enumerate(nodes):
        if id(node) not in inside and hasattr(node, "lineno"):
            yield from ((node.lineno, number, what, change) for what, change in _changes(node))


def _changes(node: ast.AST) -> Iterator[tuple[str, Change]]:
    """Yield what can be done to a node, each in words and as a function that does it to its twin."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield type(node.ops[0]).__name__, lambda twin: twin.ops.__setitem__(0, SWAPS[type(twin.ops[0])]())
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.UnaryOp | ast.AugAssign) and type(node.op) in SWAPS:
        yield type(node.op).__name__, lambda twin: setattr(twin, "op", SWAPS[type(twin.op)]())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not left out", lambda twin: setattr(twin, "operand", ast.UnaryOp(ast.Not(), twin.operand))
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "truth turned", lambda twin: setattr(twin, "value", not twin.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "number", lambda twin: setattr(twin, "value", _other_number(twin.value))
    elif isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in NAMES:
            key = "id" if isinstance(node.func, ast.Name) else "attr"
            yield f"{name} -> {NAMES[name]}", lambda twin: setattr(twin.func, key, NAMES[name])
        if node.keywords and node.keywords[-1].arg != "strict":
            yield f"argument {node.keywords[-1].arg} left out", lambda twin: twin.keywords.pop()
    elif isinstance(node, ast.If | ast.IfExp) and isinstance(node.test, ast.Name | ast.Attribute | ast.Call):
        yield "condition turned", lambda twin: setattr(twin, "test", ast.UnaryOp(ast.Not(), twin.test))
    elif (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)) or isinstance(node, ast.AugAssign):
        yield "statement left out", lambda twin: setattr(twin, "value", ast.Constant(0))


def _other_number(value: float) -> float:
    return value + 1 if isinstance(value, int) or value == 0 else 0.0


def broken(tree: ast.Module, number: int, change: Change) -> ast.Module:
    """The file with one fault in it."""
    other = copy.deepcopy(tree)
    change(list(ast.walk(other))[number])
    return ast.fix_missing_locations(other)


def _module(file: str) -> str:
    return "koff_lightning." + file.removesuffix(".py").replace("/", ".")


def put(file: str, tree: ast.Module) -> None:
    """Let the module of a file that is imported already do what another tree of it says."""
    for node in tree.body:  # lm-eval takes a model of one name once in a process
        if isinstance(node, ast.ClassDef):
            node.decorator_list = [one for one in node.decorator_list if "register" not in ast.unparse(one)]
    live = sys.modules[_module(file)]
    other = ModuleType(live.__name__)
    other.__file__ = live.__file__
    sys.modules[live.__name__] = other  # dataclasses look their module up
    exec(compile(tree, str(SOURCE / file), "exec"), other.__dict__)
    sys.modules[live.__name__] = live
    _put(live, other, live.__name__)
    for name, new in vars(other).items():  # constants, also where they were imported
        old = vars(live).get(name)
        if isinstance(new, int | float | str | tuple | set | dict) and old is not new and not name.startswith("__"):
            for module in [m for key, m in sys.modules.items() if key.startswith(("koff_lightning", "test_"))]:
                if vars(module).get(name) is old:
                    setattr(module, name, new)


def _put(live: object, other: object, module: str) -> None:
    """Give the functions and plain values of one module or class to another."""
    for name, new in list(vars(other).items()):
        old = vars(live).get(name)
        if isinstance(new, type):
            if new.__module__ == module and isinstance(old, type):
                _put(old, new, module)
            continue
        pairs = _functions(old, new)
        if not pairs and isinstance(live, type) and isinstance(new, int | float | tuple):
            setattr(live, name, new)
        for mine, its in pairs:
            if mine.__module__ != module:
                continue
            if len(mine.__code__.co_freevars) != len(its.__code__.co_freevars):  # a call of super() was left out
                setattr(live, name, new)
                continue
            mine.__code__, mine.__defaults__, mine.__kwdefaults__ = its.__code__, its.__defaults__, its.__kwdefaults__


def _functions(old: object, new: object) -> list[tuple[FunctionType, FunctionType]]:
    """The plain functions in two objects of one kind: themselves, or below decorators and properties."""
    for kind, inner in ((property, "fget"), (cached_property, "func"), (classmethod | staticmethod, "__func__")):
        if isinstance(old, kind):
            return _functions(getattr(old, inner), getattr(new, inner))
    if not isinstance(old, FunctionType) or not isinstance(new, FunctionType):
        return []
    while hasattr(old, "__wrapped__") and hasattr(new, "__wrapped__"):
        old, new = old.__wrapped__, new.__wrapped__
    return [(old, new)]


class _Hits(ast.NodeTransformer):
    """Has every statement inside of functions say that it is executed."""

    def __init__(self, file: str) -> None:
        self.file = file

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:
        for inner in ast.walk(node):
            for field in ("body", "orelse", "finalbody"):
                if isinstance(block := getattr(inner, field, None), list):
                    setattr(inner, field, [part for statement in block for part in (self._hit(statement), statement)])
        return node

    def _hit(self, statement: ast.stmt) -> ast.stmt:
        return ast.parse(f"__hit__({self.file!r}, {statement.lineno})").body[0]


def _fork(work: Callable[[int], None]) -> tuple[int, str]:
    """Run `work`, which writes to a pipe, in a child; returns its exit status and what it wrote."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        status = 99
        try:
            work(write)
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(status)
    os.close(write)
    with open(read, encoding="utf-8") as pipe:
        said = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), said


class Mutants:
    """In place of pytest's loop over the tests: a fork of it for each fault."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.trees = {file: ast.parse((SOURCE / file).read_text(encoding="utf-8")) for file in options.files}
        self.failed: list[str] = []
        self.now = ""
        self.hits: dict[tuple[str, int], set[str]] = {}
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what failed."""
        if report.failed:
            self.failed.append(report.nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Say whose statements are executed now, and what they cost."""
        self.now, start = item.nodeid, time.process_time()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.process_time() - start
            self.now = item.nodeid.partition("::")[0]  # fixtures count for all tests of a module

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """In place of running the tests."""
        self.items = {item.nodeid: item for item in session.items}
        for file in self.options.files:
            importlib.import_module(_module(file))
        self.look()
        for start in range(0, self.options.count, 4):  # all files alike, should there be no time for the rest
            for file in self.options.files:
                self.judge(file, start, min(start + 4, self.options.count))
        rows = self.rows()
        print(f"killed {sum(bool(row['by']) for row in rows)} of {len(rows)}", flush=True)
        return True

    def look(self) -> None:
        """Run the tests on the sound files: which statements each executes, and its seconds."""
        kept = self.options.out.with_suffix(".tests.json")
        if not kept.exists():

            def work(said: int) -> None:
                builtins.__hit__ = lambda *at: self.hits.setdefault(at, set()).add(self.now)
                for file, tree in self.trees.items():
                    put(file, ast.fix_missing_locations(_Hits(file).visit(copy.deepcopy(tree))))
                self.run(list(self.items), stop=False)
                hits = [[*at, sorted(tests)] for at, tests in self.hits.items()]
                with open(said, "w", encoding="utf-8") as pipe:
                    json.dump({"failed": self.failed, "hits": hits, "seconds": self.seconds}, pipe)

            kept.write_text(_fork(work)[1], encoding="utf-8")
        seen = json.loads(kept.read_text(encoding="utf-8"))
        if seen["failed"]:
            sys.exit(f"tests fail as they are, see to that first: {seen['failed'][:9]}")
        self.hits = {(file, line): set(tests) for file, line, tests in seen["hits"]}
        self.seconds = seen["seconds"]
        print(f"{len(self.seconds)} tests, {sum(self.seconds.values()):.0f} s of the processor", flush=True)

    def run(self, names: list[str], stop: bool = True) -> None:
        """Run tests in this process, up to the first that fails or all."""
        for name, following in zip(names, [*names[1:], None], strict=True):
            after = None if following is None else self.items[following]
            if not name.startswith(self.now):
                self.now = name.partition("::")[0]
            self.items[name].config.hook.pytest_runtest_protocol(item=self.items[name], nextitem=after)
            if stop and self.failed:
                return

    def covering(self, file: str, line: int) -> list[str]:
        """The tests that execute a line, the cheapest first within modules, the cheapest module first."""
        statements = [node for node in ast.walk(self.trees[file]) if isinstance(node, ast.stmt)]
        above = {node: [one.lineno for one in getattr(node, "decorator_list", [])] for node in statements}
        around = [node for node in statements if min([node.lineno, *above[node]]) <= line <= node.end_lineno]
        inner = min(around, key=lambda node: node.end_lineno - node.lineno)
        names = self.hits.get((file, inner.lineno), set())
        # Outside of functions: whatever executes anything of the file.
        if not any(isinstance(node, ast.FunctionDef) and node.lineno < inner.lineno for node in around):
            names = set().union(*(tests for (at, _), tests in self.hits.items() if at == file))
        chosen, left = [], self.options.seconds
        for test in sorted(self.seconds, key=self.seconds.get):
            if test in self.items and (test in names or test.partition("::")[0] in names) and left > 0:
                chosen.append(test)
                left -= self.seconds[test]
        cost: dict[str, float] = {}
        for test in chosen:
            cost[test.partition("::")[0]] = cost.get(test.partition("::")[0], 0.0) + self.seconds[test]
        return sorted(chosen, key=lambda t: (cost[t.partition("::")[0]], t.partition("::")[0], self.seconds[t]))

    def killed(self, file: str, tree: ast.Module, tests: list[str]) -> str:
        """Which test notices a fault in a file; "" if none does."""

        def work(said: int) -> None:
            limit = int(time.process_time() + 10 + 3 * sum(self.seconds[test] for test in tests))
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            signal.alarm(1200)  # one that sleeps for ever
            try:
                put(file, tree)
            except Exception as error:
                self.failed.append(f"import: {type(error).__name__}")
            else:
                self.run(tests)
            os.write(said, "".join(self.failed[:1]).encode())

        if not tests:
            return ""
        status, said = _fork(work)
        if status == 99:
            sys.exit("this script has failed, which kills nothing: see above")
        return said or (f"status {status}" if status else "")

    def rows(self) -> list[dict[str, object]]:
        """What was judged so far."""
        return [json.loads(line) for line in self.options.out.read_text(encoding="utf-8").splitlines()]

    def judge(self, file: str, start: int, end: int) -> None:
        """Draw a file's faults from `start` to `end` and write a row for each that has none yet."""
        drawn = list(faults(self.trees[file]))
        random.Random(self.options.seed).shuffle(drawn)
        done = {(row["file"], row["line"], row["node"], row["what"]) for row in self.rows()}
        for line, number, what, change in drawn[start:end]:
            if (file, line, number, what) in done:
                continue
            tests = self.covering(file, line)
            by = self.killed(file, broken(self.trees[file], number, change), tests)
            row = {"file": file, "line": line, "node": number, "what": what, "tests": len(tests), "by": by}
            with self.options.out.open("a", encoding="utf-8") as out:
                out.write(json.dumps(row) + "\n")
            if not by:
                print(f"lives: {file}:{line} {what} ({len(tests)} tests execute it)", flush=True)
        own = [row for row in self.rows() if row["file"] == file]
        print(f"{file}: {sum(bool(r['by']) for r in own)} of {len(own)} killed ({len(drawn)} possible)", flush=True)


def main() -> int:
    """Draw, run, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=FILES, help="below src/koff_lightning; by default the method's")
    parser.add_argument("--count", type=int, default=20, help="faults drawn from each file")
    parser.add_argument("--seconds", type=float, default=60, help="of tests for a fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/mutate.jsonl"), help="a row for each fault")
    parser.add_argument(
        "--more", nargs="*", default=[], help="further tests, NAME as in tests/test_NAME.py, or NAME::TEST"
    )
    parser.add_argument("--tests", nargs="*", default=TESTS, help="tests in place of the method's, named likewise")
    options = parser.parse_args()
    options.out = options.out.absolute()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.touch()
    os.chdir(ROOT)
    import torch

    torch.set_num_threads(1)
    names = [name.partition("::") for name in [*options.tests, *options.more]]
    tests = [str(ROOT / "tests" / f"test_{file}.py{mark}{one}") for file, mark, one in names]
    return int(
        pytest.main(["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", *tests], plugins=[Mutants(options)])
    )


if __name__ == "__main__":
    sys.exit(main())
