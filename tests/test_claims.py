"""`koff claims`: the runs it makes, resumes, refuses and survives. A stub stands for `koff fit` and `koff baseline`."""

import json
import math
import sys

import pytest
from tiny_models import tiny_model
from tiny_run import tiny_module
from toy_text import toy_documents, toy_tokenizer, write_jsonl

from koff_lightning.cli import main
from koff_lightning.commands import training_cli
from koff_lightning.commands.claims import keep_config, resolved_config
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.studies.claims import runs as arm_runs
from koff_lightning.studies.claims.arms import ARMS, Run, chosen, command, equal_memories
from koff_lightning.training.run_folder import alone_in

# Writes what a run leaves, with bits per byte that tell arm and seed; fails where its folder's name holds FAIL.
STUB = """
import json, math, os, pathlib, sys, time
since = time.time()
words = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
folder = pathlib.Path(words.get("out") or words["trainer.default_root_dir"])
with open(folder.parent / "calls.txt", "a") as calls:
    calls.write(folder.name + "\\n")
if os.environ.get("FAIL", "nothing") in folder.name:
    folder.mkdir(exist_ok=True)  # a run that was cut short leaves something
    (folder / "half").touch()
    sys.exit("Traceback\\nkoff: the disk is full")
if "method" in words:
    time.sleep(0.3)
elif not pathlib.Path(words.get("model.mask", words.get("model.prior", folder.parent))).exists():
    sys.exit("koff: no mask yet")
arm, sparsity, seed = folder.name.rsplit("-", 2)
own = {"koff": 1.0, "dense_memory": 0.995, "no_memory": 1.1, "flap_memory": 1.04}.get(arm, 1.05)
bpb = {"dense": 1.0, "koff": own, "memory_off": 1.12, "swapped": 1.2}
bpb = {name: value + 1e-4 * int(seed) * (name != "dense") + float(sparsity) - 0.12 for name, value in bpb.items()}
documents = {"bytes": [10, 20, 30], "nats": {a: [b * math.log(2) * n for n in (10, 20, 30)] for a, b in bpb.items()}}
row = {f"{name}_bpb": value for name, value in bpb.items()}
size = {"dense_total": 1000, "backbone_kept": 900, "active": 950, "stored": 1000}
figures = {"mean": row, "domains": {"x": row}, "sparsity": {"body": float(sparsity)}, "parameters": size}
figures |= {"config": {"model": {"backbone": "toy"}}, "seconds": 2.0, "tokens": 10}
folder.mkdir(exist_ok=True)
(folder / "words.json").write_text(json.dumps(sys.argv[1:]))
(folder / "gpu.json").write_text(json.dumps([os.environ.get("CUDA_VISIBLE_DEVICES"), since, time.time()]))
if "method" in words:
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
else:
    (folder / "documents.json").write_text(json.dumps({"x": documents}))
(folder / "results.json").write_text(json.dumps(figures))
"""


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Folder of the runs, and a function that makes them by the stub."""
    stub = tmp_path / "stub.py"
    stub.write_text(STUB)
    monkeypatch.setattr(arm_runs, "PROGRAM", [sys.executable, "-S", str(stub)])
    out = tmp_path / "claims"

    def go(*options):
        status = main(["claims", "--out", str(out), *options])
        calls = out / "calls.txt"
        made = calls.read_text().split() if calls.exists() else []
        calls.unlink(missing_ok=True)
        return status, made

    return out, go


def report(out):
    return json.loads((out / "claims.json").read_text())


def as_of_an_older_release(folder):
    """A run's folder without a word about the file that its config came from."""
    done = folder / "options.json"
    done.write_text(json.dumps(json.loads(done.read_text())[:-1]))


def test_all_arms_run_at_the_first_sparsity_and_few_at_the_others(runs, capsys):
    out, go = runs
    status, made = go("--seeds=2", "--sparsity=0.12,0.5", "--jobs=2")
    assert status == 0
    first = {f"{arm}-0.12-{seed}" for arm in ARMS for seed in (0, 1)}
    few = ("koff", "no_memory", "two_stage", "flap", "flap_memory")  # flap is best after memories
    others = {f"{arm}-0.5-{seed}" for arm in few for seed in (0, 1)}
    assert len(made) == len(set(made)) and set(made) == first | others
    assert made.index("flap-0.12-1") < made.index("flap_memory-0.12-1")
    found = report(out)
    assert found["best_one_shot"] == "flap"
    shown = {row["arm"]: row for row in found["arms"] if row["sparsity"] == 0.12}
    assert set(shown) == {*ARMS, "dense", "memory_off", "swapped"}
    assert shown["koff"]["bpb"] == pytest.approx([1.0, 1.0001])
    assert shown["koff"]["gc_star"] == pytest.approx(1.0, abs=1e-3)
    assert shown["dense"]["active"] == 1000 and shown["memory_off"]["active"] == 900
    assert shown["koff"]["net"] == pytest.approx(-0.05)
    assert (shown["dense"]["removed"], shown["koff"]["removed"]) == (0, 0.12)
    assert {row["name"]: row["verdict"] for row in found["verdicts"]}["c"] == "supported"
    page, said = (out / "claims.md").read_text(), capsys.readouterr().out
    assert "| flap_memory |" in page and "## The curve" in page
    curve = page.split("## The curve")[1].split("\n\n")[2].splitlines()
    assert curve[0] == "| arm | 12 % | 50 % |"
    assert {line.split()[1] for line in curve[2:]} == {*few, "memory_off", "swapped"}
    assert "10/10  " in said and "left" in said and "\x1b" not in said


@pytest.mark.parametrize(
    ("curve", "on_it"),
    [
        ("all", ("koff", "flap", "flap_memory", "kv_equal")),
        ("kv_equal,wanda_sp_memory", ("kv_equal", "wanda_sp", "wanda_sp_memory")),
    ],
)
def test_the_arms_of_the_curve_can_be_chosen(runs, curve, on_it):
    _, go = runs
    status, made = go(
        "--seeds=1", "--sparsity=0.12,0.5", "--arms=koff,flap_memory,kv_equal,dense_memory", f"--curve={curve}"
    )
    first = {f"{arm}-0.12-0" for arm in ("koff", "flap", "flap_memory", "kv_equal", "dense_memory")}
    assert (status, set(made)) == (0, first | {f"{arm}-0.5-0" for arm in on_it})
    assert go("--seeds=1", "--sparsity=0.12,0.5", "--curve=kv_equl")[0] == 2


def test_what_is_not_decided_says_why_once(runs, capsys):
    _, go = runs
    go("--seeds=1", "--arms=koff,no_memory", "--sparsity=0.12")
    told = capsys.readouterr().out.splitlines()
    reasons = [line for line in told if line.startswith("not decided ")]
    assert reasons[0].endswith(": one seed tells nothing about the next")
    assert reasons[0].startswith("not decided (a), ")
    assert any(line.startswith("not decided (c): no common seed of koff, lora_equal") for line in reasons)
    assert len({line.split(": ", 1)[1] for line in reasons}) == len(reasons)
    (dense,) = (line for line in told if line.startswith("dense "))
    assert dense.split()[1] == "1.0000" and " 12 % " not in dense, "nothing is removed from it"


def test_what_is_done_is_not_repeated(runs):
    _, go = runs
    go("--seeds=1", "--arms=koff")
    assert go("--seeds=2", "--arms=koff,no_memory")[1] == ["no_memory-0.12-0", "koff-0.12-1", "no_memory-0.12-1"]
    assert go("--seeds=2", "--arms=koff,no_memory") == (0, [])


def test_tasks_come_into_the_report(runs, monkeypatch):
    out, go = runs
    asked = []

    def answer(folder, suites):
        asked.append((folder.name, [*suites], [*suites["koff_cloze_{domain}"]]))
        right = {"dense": [1, 1, 1, 0], "koff": [1, 1, 0, 0], "memory_off": [1, 0, 0, 0]}
        rows = {arm: {"en": row * 25} for arm, row in right.items()}
        return {"koff_cloze_{domain}": {"chance": {"en": 0.25}} | rows}

    monkeypatch.setattr("koff_lightning.commands.claims.answer", answer)
    domains = ["en", "de", "fr", "es", "ru", "zh", "python"]
    assert go("--seeds=2", "--arms=koff,no_memory", "--tasks=koff_cloze_{domain}")[0] == 0
    assert asked == [(f"koff-0.12-{seed}", ["koff_cloze_{domain}"], domains) for seed in (0, 1)]
    assert report(out)["retention"][0]["retention"]["koff"]["value"] == pytest.approx(0.5)
    page = (out / "claims.md").read_text()
    assert "| koff_cloze_{domain} | 100 | 0.250 | 0.7500 ± 0.0000 | 0.5000 ± 0.0000 | 0.2500 ± 0.0000 | 0.50 [" in page


def test_tasks_that_cannot_be_asked_lose_nothing_of_the_report(runs, monkeypatch, capsys):
    """The stub's runs have no checkpoint; a run that breaks in another way does not stop the others."""
    out, go = runs
    asked = ("--seeds=2", "--arms=koff,no_memory", "--tasks=koff_cloze_{domain}")
    assert go(*asked)[0] == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "2 of 4 runs failed, first koff-0.12-0: tasks: " in err
    assert "koff-0.12-0 has no checkpoint to ask: remove this folder and run again with checkpoints" in err
    found = report(out)
    assert {row["arm"] for row in found["arms"]} >= {"koff", "no_memory"} and found["retention"] == []
    assert [failure["run"] for failure in found["failures"]] == ["koff-0.12-0", "koff-0.12-1"]
    monkeypatch.setattr("koff_lightning.commands.claims.answer", lambda *_: 1 / 0)
    assert go(*asked) == (2, [])
    assert "first koff-0.12-0: ZeroDivisionError: division by zero (log: " in capsys.readouterr().err
    assert "Traceback" in (out / "logs" / "koff-0.12-0-tasks.txt").read_text()

    def stopped(*_):
        raise KeyboardInterrupt

    (out / "claims.json").unlink()
    monkeypatch.setattr("koff_lightning.commands.claims.answer", stopped)
    assert go(*asked)[0] == 130
    assert report(out)["retention"] == []


def test_remote_code_that_was_asked_for_reaches_every_run(runs):
    """A config alone may not let it run, and the runs read theirs from a config."""
    out, go = runs
    trust = "--model.trust_remote_code=true"
    for made in (["koff-0.12-0"], []):
        assert go("--seeds=1", "--arms=koff", "--", trust) == (0, made)
    assert trust in json.loads((out / "koff-0.12-0" / "options.json").read_text())


def test_two_at_once_on_one_folder_are_refused(runs, capsys):
    out, go = runs
    with alone_in(out):
        assert go("--seeds=1", "--arms=koff") == (2, [])
    assert f"another run is going on in {out}: wait for it, or give --out another folder" in capsys.readouterr().err
    assert not (out / "config.yaml").exists()


def test_any_learned_run_tells_the_dense_model(runs):
    out, go = runs
    assert go("--seeds=2", "--arms=no_memory,flap")[0] == 0
    shown = {row["arm"]: row for row in report(out)["arms"]}
    assert set(shown) == {"no_memory", "flap", "dense"}
    assert shown["dense"]["bpb"] == [1.0, 1.0] and shown["dense"]["active"] == 1000
    assert shown["no_memory"]["against_dense"] == pytest.approx(0.10005)
    part = next(verdict for verdict in report(out)["verdicts"] if verdict["name"] == "b")["parts"][0]
    assert part["found"]["value"] == pytest.approx(0.10005)


def test_runs_of_other_options_are_refused(runs, capsys):
    out, go = runs
    go("--seeds=1", "--arms=koff")
    assert go("--seeds=1", "--arms=koff", "--", "--trainer.max_steps=7") == (2, [])
    assert "(trainer.max_steps is 300 there, 7 here): give another --out" in capsys.readouterr().err
    done = out / "koff-0.12-0" / "options.json"
    done.write_text(done.read_text().replace("seed_everything=0", "seed_everything=9"))
    assert go("--seeds=1", "--arms=koff") == (2, [])
    assert "other options (first: --seed_everything=9): give another --out" in capsys.readouterr().err
    first, second, *rest = json.loads(done.read_text().replace("seed_everything=9", "seed_everything=0"))
    done.write_text(json.dumps([second, first, *rest]))
    assert go("--seeds=1", "--arms=koff") == (2, [])
    assert "other options (first: their order): give another --out" in capsys.readouterr().err


def test_a_folder_is_the_same_however_it_is_named(runs, monkeypatch):
    out, go = runs
    out.mkdir()
    monkeypatch.chdir(out)
    assert main(["claims", "--out=.", "--seeds=1", "--arms=koff"]) == 0
    (out / "calls.txt").unlink()
    assert go("--seeds=1", "--arms=koff") == (0, [])


def test_runs_of_another_config_file_are_refused(runs, capsys):
    """Their commands are alike: all name `config.yaml` in this folder."""
    out, go = runs
    go("--seeds=1", "--arms=koff")
    (out / "config.yaml").unlink()
    assert go("--seeds=1", "--arms=koff", "--", "--trainer.max_steps=7") == (2, [])
    assert "a run with other options (first: config.yaml of sha256 " in capsys.readouterr().err
    as_of_an_older_release(out / "koff-0.12-0")
    assert go("--seeds=1", "--arms=koff", "--", "--trainer.max_steps=7") == (0, []), "older runs do not tell"


def test_an_option_that_is_new_since_then_stands_at_its_default(runs, capsys):
    out, go = runs
    go("--seeds=1", "--arms=koff")
    kept = out / "config.yaml"
    older = "".join(line for line in kept.read_text().splitlines(True) if line != "  cache: null\n")
    assert older != kept.read_text()
    kept.write_text(older)
    as_of_an_older_release(out / "koff-0.12-0")
    assert go("--seeds=1", "--arms=koff,no_memory") == (0, ["no_memory-0.12-0"])
    assert kept.read_text() == older, "the new runs have the config of the old ones"
    assert go("--seeds=1", "--arms=koff", "--", "--data.cache=elsewhere") == (2, [])
    assert "(data.cache is None there, 'elsewhere' here): give another --out" in capsys.readouterr().err
    kept.write_text(older + "flux: 1\n")
    assert go("--seeds=1", "--arms=koff") == (2, [])
    assert "config.yaml was written by another release" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(runs, capsys):
    out, go = runs
    (out / "koff-0.12-0").mkdir(parents=True)
    (out / "koff-0.12-0" / "thesis.txt").touch()
    assert go("--seeds=1", "--arms=koff") == (2, [])
    assert "is no run of koff claims: give another --out" in capsys.readouterr().err
    assert (out / "koff-0.12-0" / "thesis.txt").exists()


def test_a_failing_arm_leaves_the_others_and_is_run_again(runs, capsys, monkeypatch):
    out, go = runs
    monkeypatch.setenv("FAIL", "flap-")
    status, made = go("--seeds=2", "--arms=koff,flap_memory,two_stage")
    assert status == 2
    assert "flap_memory-0.12-0" not in made and "two_stage-0.12-1" in made
    err = capsys.readouterr().err
    assert "4 of 8 runs failed, first flap-0.12-0: the disk is full" in err and "repeats only what is missing" in err
    assert [failure["run"] for failure in report(out)["failures"]].count("flap_memory-0.12-1") == 1
    page = (out / "claims.md").read_text()
    assert "Traceback" in page and "whose mask it needs, failed: the disk is full" in page
    monkeypatch.delenv("FAIL")
    status, made = go("--seeds=2", "--arms=koff,flap_memory,two_stage")
    assert status == 0 and set(made) == {f"{arm}-0.12-{seed}" for arm in ("flap", "flap_memory") for seed in (0, 1)}
    assert not report(out)["failures"]


@pytest.mark.parametrize("change", ["none", "other steps", "no checkpoint", "a one-shot mask"])
def test_a_run_that_was_cut_short_goes_on_if_it_is_the_same(runs, capsys, monkeypatch, change):
    out, go = runs
    arm = "flap" if change == "a one-shot mask" else "koff"
    folder, further = out / f"{arm}-0.12-0", ["--", "--trainer.max_steps=6"]
    monkeypatch.setenv("FAIL", arm)
    go("--seeds=1", f"--arms={arm}", *further)
    if change != "no checkpoint":
        (folder / "version_0" / "checkpoints").mkdir(parents=True)
        (folder / "version_0" / "checkpoints" / "last.ckpt").touch()
    if change == "other steps":
        (out / "config.yaml").unlink()
        further = ["--", "--trainer.max_steps=9"]
    monkeypatch.setenv("FAIL", f"{arm}-")
    go("--seeds=1", f"--arms={arm}", *further)
    kept = change == "none"
    assert (folder / "version_0").is_dir() == kept, "what another command has left is removed"
    said = capsys.readouterr().err.splitlines()[-1]
    assert (f"remove {folder} to begin it anew" in said) == kept
    monkeypatch.delenv("FAIL")
    assert go("--seeds=1", f"--arms={arm}", *further)[0] == 0
    begun = json.loads((folder / "words.json").read_text())
    assert ("--ckpt_path=last" in begun) == kept
    assert "--ckpt_path=last" not in (folder / "options.json").read_text(), "else it would be another run's"


@pytest.mark.parametrize(
    ("count", "visible", "jobs", "shares"),
    [
        (0, None, 2, [None, None]),
        (8, None, 1, [None]),
        (1, None, 2, ["0", "0"]),
        (4, None, 4, ["0", "1", "2", "3"]),
        (8, None, 3, ["0,1", "2,3", "4,5"]),
        (2, None, 3, ["0", "1", "0"]),
        (2, "5,GPU-8932f937", 2, ["5", "GPU-8932f937"]),
        (2, "6,7,99", 2, ["6", "7"]),
        (2, " 6, 7 ", 2, ["6", "7"]),
        (1, "MIG-a,MIG-b,", 2, ["MIG-a", "MIG-b"]),
    ],
)
def test_runs_side_by_side_share_the_gpus(monkeypatch, count, visible, jobs, shares):
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [one.get("CUDA_VISIBLE_DEVICES") for one in arm_runs.gpu_shares(jobs)] == shares


def test_each_run_is_told_its_gpu_and_no_two_at_one_time_the_same(runs, monkeypatch):
    out, go = runs
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert go("--seeds=4", "--arms=flap", "--jobs=2")[0] == 0
    told = [json.loads((out / f"flap-0.12-{seed}" / "gpu.json").read_text()) for seed in range(4)]
    assert {gpu for gpu, _, _ in told} == {"0", "1"}
    at_once = [(one, two) for one in told for two in told if one is not two and one[1] < two[2] and two[1] < one[2]]
    assert at_once and all(one[0] != two[0] for one, two in at_once)


def unscored(out, run, *figures):
    """Take figures out of what a run has left, as where they were no numbers."""
    path = out / run / "results.json"
    found = json.loads(path.read_text())
    for row in (found["mean"], found["domains"]["x"]):
        row |= dict.fromkeys((f"{figure}_bpb" for figure in figures), None)
    path.write_text(json.dumps(found))


def test_a_run_whose_scores_are_no_numbers_is_told_like_a_failed_one(runs, capsys):
    out, go = runs
    asked = ("--seeds=2", "--arms=koff,no_memory,flap_memory", "--sparsity=0.12")
    go(*asked)
    unscored(out, "no_memory-0.12-1", "koff", "memory_off")
    unscored(out, "flap_memory-0.12-0", "koff")
    unscored(out, "koff-0.12-0", "memory_off")  # a figure beside its own: it has no gap to close
    assert go(*asked) == (2, [])
    err = capsys.readouterr().err
    assert "2 of 8 runs failed, first flap_memory-0.12-0: its held-out scores are not all numbers" in err
    shown = {row["arm"]: row for row in report(out)["arms"]}
    assert (shown["no_memory"]["seeds"], shown["flap_memory"]["seeds"]) == ([0], [1])
    assert shown["memory_off"]["seeds"] == [1] and shown["koff"]["seeds"] == [0, 1]
    assert shown["koff"]["gc"] == pytest.approx((1.1201 - 1.0001) / 0.1201), "of the seed that has one"
    assert "remove its folder" in (out / "claims.md").read_text()


def test_when_every_run_fails_that_is_the_message(runs, capsys, monkeypatch):
    monkeypatch.setenv("FAIL", "-")
    assert runs[1]("--seeds=1", "--arms=koff")[0] == 2
    assert "every run failed, first koff-0.12-0: the disk is full (log: " in capsys.readouterr().err


def test_runs_on_other_documents_are_not_compared(runs, capsys):
    out, go = runs
    go("--seeds=1", "--arms=koff,no_memory")
    path = out / "no_memory-0.12-0" / "documents.json"
    path.write_text(path.read_text().replace("[10, 20, 30]", "[10, 20, 31]"))
    assert go("--seeds=1", "--arms=koff,no_memory")[0] == 2
    assert "scored on other documents than the other runs" in capsys.readouterr().err


def test_within_texts_the_tokens_there_are_what_is_judged(runs):
    """Of two documents, since the third has none; what stands before them does not count."""
    out, go = runs
    go("--seeds=1", "--arms=koff")
    path = out / "koff-0.12-0" / "documents.json"
    scores = json.loads(path.read_text())
    for row in scores.values():
        row["tokens"] = [[9, 9, 9]] * 3 + [[10, 20, 0]]
        nats = {"dense": [[1, 2, 0]], "koff": [[1.1, 2.2, 0]], "memory_off": [[1, 2, 0]], "swapped": [[1, 2, 0]]}
        row["nats_by_context"] = {arm: [[7, 8, 9]] * 3 + last for arm, last in nats.items()}
    path.write_text(json.dumps(scores))
    go("--seeds=1", "--arms=koff")
    found = {verdict["name"]: verdict["parts"][0]["found"] for verdict in report(out)["verdicts"]}
    assert found["a, within"]["value"] == pytest.approx(0.1)
    assert found["a"]["value"] != pytest.approx(0.1)


def test_runs_that_read_the_text_otherwise_are_not_compared(runs, capsys):
    """Those of releases whose rows began otherwise: the dense model then scores otherwise too."""
    out, go = runs
    go("--seeds=1", "--arms=koff,no_memory")
    path = out / "no_memory-0.12-0" / "documents.json"
    scores = json.loads(path.read_text())
    for row in scores.values():
        row["nats"]["dense"] = [1.01 * nats for nats in row["nats"]["dense"]]
    path.write_text(json.dumps(scores))
    assert go("--seeds=1", "--arms=koff,no_memory")[0] == 2
    assert "they read the text otherwise (rows of earlier releases began otherwise)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arms=koff,no_memry"], "no arm 'no_memry'. Did you mean 'no_memory'? There are koff, "),
        (["--arms=koff,dense"], "arm 'dense' needs no run of its own: the run of koff scores it"),
        (["--seeds=0"], "seeds must be 1 or more, got 0"),
        (["--jobs=0"], "jobs must be 1 or more, got 0"),
        (["--seeds=three"], "seeds must be int; got 'three'"),
        (["--sparsity=0.12,1.5"], "sparsity must be different numbers between 0 and 1 with commas"),
        (["--sparsity=0.12,0.5", "--curve=dense_memory"], "dense_memory removes nothing, whatever the sparsity"),
        (["--curve=all"], "curve names the arms of the further sparsities: give --sparsity more than one"),
        (["--sparsity=twelve"], "as 0.12,0.25; got 'twelve'"),
        (["--sparsity=0.12,0.12"], "must be different numbers"),
        (["--tasks=koff_cloze"], "tasks must name a task for every domain, as koff_cloze_{domain}; got 'koff_cloze'"),
        (["--tasks=,"], "tasks must name a task for every domain, as koff_cloze_{domain}; got ','"),
        (["--tasks=koff_cloze_{domain}", "--arms=no_memory"], "tasks are asked of the runs of koff, which arms leaves"),
        (["--config=tiny.yaml"], "config 'tiny.yaml' is neither a file here nor one that ships with the package"),
        (["--", "--model.sparsty.target=1"], "Did you mean 'model.sparsity.target'?"),
        (["--", "--data.domains={Stra\u00dfe: bundled:de}"], "domain name 'Stra\u00dfe' is not safe as a file name"),
        (["--", "--ckpt_path=last"], "starts every arm anew: leave ckpt_path out"),
        (["--", "--model.kv=null"], "lora_equal and kv_equal need a config with model.lora and model.kv"),
    ],
)
def test_bad_input_is_one_line_before_any_run(runs, capsys, options, message):
    out, go = runs
    assert go(*options) == (2, [])
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not list(out.glob("*-*"))


def test_an_arm_brings_what_it_needs():
    assert chosen("flap_memory,koff") == ["koff", "flap", "flap_memory"]
    assert Run("flap_memory", 0.25, 1).needs == Run("flap", 0.25, 1)
    assert Run("koff", 0.25, 1).needs is None


@pytest.mark.parametrize(("rank", "slots"), [(2, 4), (3, 5)])
def test_equal_memories_have_the_parameters_that_are_said(tmp_path, rank, slots):
    def size(lora, kv):
        module = tiny_module(tmp_path, lora=lora, kv=kv)
        module.configure_model()
        return module.model.memories.size("en")

    both = LoraSpec(rank, 2 * rank), KVSpec(slots)
    module = tiny_module(tmp_path)
    options = {"backbone": module.source, "revision": None, "trust_remote_code": False}
    found = equal_memories(options | {"lora": {"rank": rank, "alpha": 2 * rank}, "kv": {"slots": slots}})
    assert found["both"] == size(*both)
    lora, kv = found["lora_equal"], found["kv_equal"]
    assert lora["parameters"] == size(LoraSpec(lora["rank"]), None) >= found["both"]
    assert kv["parameters"] == size(None, KVSpec(kv["slots"])) >= found["both"]
    assert size(LoraSpec(lora["rank"] - 1), None) < found["both"] > size(None, KVSpec(kv["slots"] - 1))
    assert lora["alpha"] / lora["rank"] == 2 and kv["ratio"] == kv["parameters"] / found["both"]


@pytest.mark.parametrize("config", ["tiny_12pct.yaml", "paper/tiny_languages.yaml"])
def test_every_fit_of_an_arm_is_one_that_koff_fit_takes(tmp_path, config):
    """The paper's recipe has a temperature, and the arm of ddp gates none."""
    shared = resolved_config(config, None, [])
    keep_config(tmp_path / "config.yaml", shared)
    for arm in ("koff", "dense_memory", "ddp"):
        words = command(Run(arm, 0.2, 0), tmp_path, {}, shared["model"]["sparsity"])
        found = training_cli.resolved(words)["model"]["sparsity"]
        assert SparsitySpec(**found).gate == ("ddp" if arm == "ddp" else "hc")
    named = "tiny_languages" in config
    flap = command(Run("flap", 0.2, 0), tmp_path, {}, shared["model"]["sparsity"])
    assert ("--compensate=false" in flap) == named, "output channels have no place for its biases"
    assert ("--model.sparsity.beta_end=null" in words) == named, "else runs of earlier releases are still these"


def toy_study(tmp_path, **trainer):
    """Options of `koff claims` for real runs of four steps."""
    model = tmp_path / "backbone"
    tiny_model("llama", hidden_size=32, intermediate_size=24, head_dim=8, vocab_size=400).save_pretrained(model)
    toy_tokenizer(tmp_path / "tokenizer")
    for place, name in enumerate(("a", "b")):
        write_jsonl(tmp_path / f"{name}.jsonl", toy_documents(120, seed=place))
    config = tmp_path / "toy.yaml"
    domains = {name: str(tmp_path / f"{name}.jsonl") for name in ("a", "b")}
    data = {"domains": domains, "tokenizer": str(tmp_path / "tokenizer"), "seq_len": 32, "batch_size": 2}
    sizes = {"backbone": str(model), "lora": {"rank": 2}, "kv": {"slots": 4}, "sparsity": {"min_channels": 4}}
    trainer = {"max_steps": 4, "logger": False, "accelerator": "cpu"} | trainer
    config.write_text(json.dumps({"model": sizes, "data": data, "trainer": trainer}))
    return ["claims", f"--config={config}", "--seeds=1", "--sparsity=0.2", f"--out={tmp_path / 'out'}"]


@pytest.mark.slow
@pytest.mark.parametrize("left", ["some of its steps", "all of its steps"])
def test_a_real_run_that_goes_on_ends_as_one_in_one_go(tmp_path, capsys, left):
    asked = [*toy_study(tmp_path), "--arms=koff", "--", "--checkpoint.every_n_train_steps=2"]
    assert main(asked) == 0, capsys.readouterr()
    folder = tmp_path / "out" / "koff-0.2-0"
    whole = {name: json.loads((folder / name).read_text()) for name in ("results.json", "documents.json")}
    for name in (*whole, "options.json"):
        (folder / name).unlink()
    early = next(folder.rglob("*step=2.ckpt"))
    for checkpoint in folder.rglob("*.ckpt"):
        if left == "some of its steps" and checkpoint != early:
            checkpoint.unlink()
    assert main(asked) == 0, capsys.readouterr()
    assert "going on from" in (tmp_path / "out" / "logs" / "koff-0.2-0.txt").read_text()
    again = {name: json.loads((folder / name).read_text()) for name in whole}
    assert again["documents.json"] == whole["documents.json"]
    for name in ("mean", "domains", "sparsity", "parameters", "tokens"):
        assert again["results.json"][name] == whole["results.json"][name], name


@pytest.mark.slow
def test_real_runs_of_a_tiny_model_on_toy_text(tmp_path, capsys):
    options = [*toy_study(tmp_path), "--arms=koff,magnitude_memory", "--jobs=2"]
    assert main(options) == 0, capsys.readouterr()
    found = report(tmp_path / "out")
    shown = {row["arm"]: row for row in found["arms"]}
    assert set(shown) == {"koff", "dense", "memory_off", "swapped", "magnitude", "magnitude_memory"}
    assert shown["koff"]["removed"] == pytest.approx(0.2, abs=0.01) == shown["magnitude_memory"]["removed"]
    assert shown["magnitude"]["active"] < shown["magnitude_memory"]["active"]
    assert {row["verdict"] for row in found["verdicts"]} == {"not decided"}  # of one seed
    part = found["verdicts"][0]["parts"][0]["found"]
    ratio = shown["koff"]["mean"] / shown["dense"]["mean"] - 1
    assert part["value"] == pytest.approx(ratio, rel=1e-6) and part["low"] < ratio < part["high"]
    assert {file.name for file in (tmp_path / "out" / "plots").iterdir()} == {"arms.png", "arms.svg"}, "no curve of one"
    assert math.isfinite(shown["koff"]["seconds"])


@pytest.mark.parametrize("way", [["--backbone=some/model", "--"], ["--", "--model.backbone=some/model"]])
def test_another_backbone_with_the_settings_of_koff_tiny_is_warned_of(runs, capsys, way):
    _, go = runs
    assert go("--seeds=1", "--arms=koff", *way, "--data.seq_len=64")[0] == 0
    err = capsys.readouterr().err
    assert err.startswith("koff: warning: some/model runs with the settings of tiny_12pct.yaml, which were chosen for ")
    assert "(model.loss.kl 0.0, model.optim.kv_lr 0.01, model.lora.rank 4, " in err and "data.seq_len 64, " in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "options", [["--backbone=koff-tiny"], ["--config=smollm2_12pct.yaml", "--backbone=some/model"]]
)
def test_a_config_of_its_own_is_no_cause_for_a_warning(runs, capsys, options):
    assert runs[1]("--seeds=1", "--arms=koff", *options)[0] == 0
    assert not capsys.readouterr().err


def test_options_after_a_lone_dash_reach_the_runs():
    assert resolved_config("tiny_12pct.yaml", None, ["--data.seq_len=64"])["data"]["seq_len"] == 64
    assert resolved_config("tiny_12pct.yaml", "some/model", [])["model"]["backbone"] == "some/model"
