"""What runs unattended on a GPU, tried whole on the CPU with small shapes: no typo costs the first minute there."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/gpu"
CHECKS = {
    "rows together and alone",
    "packed and apart",
    "padded and whole",
    "gated and sliced",
    "generated with a cache and computed without",
    "greedy tokens with and without a cache",
    "device and CPU",
    "gradients recomputed and kept",
    "gradients on device and CPU",
}


@pytest.fixture
def parts(monkeypatch):
    """A function that imports a file of the recipe, as a script there does."""
    names = {file.stem for file in RECIPE.glob("*.py")}
    monkeypatch.syspath_prepend(RECIPE)
    yield importlib.import_module
    for name in names & sys.modules.keys():
        del sys.modules[name]


@pytest.fixture
def run(parts, monkeypatch, tmp_path):
    """A function that runs a part on small shapes: its rows, and what it ended with."""
    rows = tmp_path / "rows.jsonl"

    def run_part(part):
        words = ["parts.py", part, "--tiny", "--device", "cpu", "--out", str(rows)]
        monkeypatch.setattr(sys, "argv", words)
        ended = None
        try:
            parts("parts").main()
        except SystemExit as error:
            ended = error.code
        return read(rows), ended

    return run_part


def read(rows):
    return [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]


def all_sh(*words, **environment):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    command = ["bash", str(RECIPE / "all.sh"), *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("factor", [1.0, 1.5, math.nan])
def test_a_way_that_attends_wrongly_is_flagged(run, parts, monkeypatch, factor):
    attending = parts("attending")
    merged = attending.WAYS["merged"]
    monkeypatch.setitem(attending.WAYS, "merged", lambda *a: merged(*a) * factor if factor != 1 else merged(*a))
    found, ended = run("attention")
    assert {row["what"] for row in found} == {f"attention, {way}" for way in ("reference", "merged", "flex")}
    assert {row["what"] for row in found if row.get("wrong")} == (set() if factor == 1 else {"attention, merged"})
    assert (ended is None) == (factor == 1)


@pytest.mark.parametrize("dtype", ["fp32", "float32", "bf16", "bfloat16"])
def test_a_gap_is_held_against_the_bound_of_its_dtype(parts, dtype):
    bound = {"f": 2e-4, "b": 6e-2}[dtype[0]]
    is_wrong = parts("findings").is_wrong
    assert not is_wrong({"dtype": dtype, "gap": 0.9 * bound})
    assert is_wrong({"dtype": dtype, "gap": 1.1 * bound})
    assert is_wrong({"dtype": dtype, "gap": math.nan})
    assert not is_wrong({"dtype": dtype, "seconds": 1.0})


def test_what_fails_is_a_row_and_the_rest_goes_on(run, parts, monkeypatch):
    monkeypatch.setattr(parts("decoding"), "cut_shape", lambda *_: 1 / 0)
    found, ended = run("decode")
    assert {row["removed"] for row in found if "error" not in row} == {0.0}
    assert {row["removed"] for row in found if row.get("wrong")} == {0.12, 0.25}
    assert "ZeroDivisionError" in ended


def test_small_shapes_are_correct_and_decoded(run, parts, monkeypatch):
    monkeypatch.setattr(parts("correctness"), "FAMILIES", ("llama",))
    found, ended = run("correct")
    assert ended is None
    assert {(row["what"], row["dtype"]) for row in found} == {(what, d) for what in CHECKS for d in ("fp32", "bf16")}
    assert all(row["removed"] > 0.05 for row in found if row["what"] == "gated and sliced")
    found, ended = run("decode")
    assert ended is None
    assert {(row["what"], row["removed"]) for row in found if row["part"] == "decode"} == {
        (what, share) for what in ("prefill", "decode") for share in (0.0, 0.12, 0.25)
    }


def test_the_cut_model_is_not_the_gated_one_by_chance(parts, monkeypatch):
    """The check sees a memory that was cut for another domain."""
    correctness, made = parts("correctness"), parts("random_models")
    monkeypatch.setattr(correctness, "FAMILIES", ("llama",))
    found = []

    def swapped(module, device):
        cut, bank = made.sliced(module, device)
        plain = bank.routes_of
        bank.routes_of = lambda domains: plain(domains[::-1])
        return cut, bank

    monkeypatch.setattr(correctness, "sliced", swapped)
    say = parts("findings").Findings(Path(os.devnull), "cpu", wrong=found)
    correctness.correct(say, "cpu", True)
    assert {row["what"] for row in found} == {"gated and sliced"}


def test_limits_are_as_the_head_says():
    text = (RECIPE / "all.sh").read_text(encoding="utf-8")
    limits = {
        name: int(seconds)
        for names, seconds in re.findall(r"^ +([a-z |]+)\) limit=(\d+) ;;", text, re.MULTILINE)
        for name in names.split(" | ")
    }
    assert set(limits) == set(re.search(r'^known="(.*)"', text, re.MULTILINE)[1].split())
    assert sum(limits.values()) <= 25 * 60
    assert max(limits.values()) <= 600
    head = text.partition("set -u")[0].replace("\n# ", " ")
    assert all(f"{name} {seconds}" in head for name, seconds in limits.items())


def test_one_line_where_nothing_can_be_run(tmp_path):
    done = all_sh(tmp_path / "rows.jsonl", "correct", DEVICE="cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert re.fullmatch(r"all.sh: no CUDA device is here; .*\n", done.stderr)


@pytest.mark.slow
def test_every_part_runs_on_small_shapes(tmp_path):
    rows = tmp_path / "rows.jsonl"
    done = all_sh(rows, DEVICE="cpu", TINY="--tiny", LIMIT="600", SMOLLM2="")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = read(rows)
    assert not [row for row in found if "error" in row]
    assert {row["what"] for row in found if row["part"] == "correct"} == CHECKS
    steps = [row for row in found if row["what"] == "step"]
    assert [row["kind"] for row in steps] == ["peft", "no KL", "live", "stored"]
    assert all(row["planned_gib"] > 0 for row in steps[1:])
    assert [row["compile"] for row in found if row["part"] == "compile"] == [None, None, "eager", "eager"]
    assert {row["removed"] for row in found if row["part"] == "decode"} == {0.0, 0.12, 0.25}
    runs = [row for row in found if row["what"] in ("demo", "train")]
    assert [row.get("precision") for row in runs] == ["32-true", "bf16-mixed", None]
    assert all(row["proof_passed"] and row["scores"]["koff_bpb"] > 0 for row in runs)
