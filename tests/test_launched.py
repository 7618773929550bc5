"""Commands that `torchrun` starts several times: the processes share the work, and say and write things once."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_artifact import tiny_artifact
from tiny_tasks import toy_tasks

from koff_lightning import KoffError
from koff_lightning.cli import main
from koff_lightning.evaluation.harness import KoffLM
from koff_lightning.support import launched

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture
def fourth(monkeypatch):
    """This is process 3 of 4 on two machines, process 1 on its own, which has two GPUs."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(("named", "its"), [(None, "cuda:1"), ("cuda", "cuda:1"), ("cpu", "cpu")])
def test_each_process_has_a_gpu_of_its_own(fourth, named, its):
    assert launched.device_of(named) == its
    assert (launched.rank(), launched.count()) == (3, 4)


def test_a_gpu_that_is_named_or_missing_is_one_line(fourth, monkeypatch):
    with pytest.raises(
        KoffError, match="each of 4 processes has a device of its own, so 'cuda:0' cannot be all theirs"
    ):
        launched.device_of("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(KoffError, match="3 processes on this machine have 2 GPUs between them: start as many as GPUs"):
        launched.device_of(None)


def test_one_process_is_alone_whatever_something_else_has_left(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert (launched.rank(), launched.count()) == (0, 1)
    assert launched.device_of("cuda:3") == "cuda:3"
    with launched.joined("cuda:3"):
        assert not torch.distributed.is_initialized()


def test_the_first_process_speaks_for_all_and_the_others_only_if_it_has_nothing_to_tell(fourth, monkeypatch):
    waited = []
    monkeypatch.setattr(launched.time, "sleep", waited.append)
    for number, waits in (("3", [launched.GRACE]), ("0", [])):
        monkeypatch.setenv("RANK", number)
        with pytest.raises(KoffError, match="no such task"), launched.first_speaks():
            raise KoffError("no such task")
        assert waited == waits
        waited.clear()


@pytest.mark.parametrize("verb", ["claims", "reproduce"])
def test_what_starts_its_own_processes_is_started_once(fourth, monkeypatch, tmp_path, capsys, verb):
    """Several would remove each other's runs: their folder is held by the first alone."""
    monkeypatch.setenv("RANK", "0")
    assert main([verb, f"--out={tmp_path / 'out'}"]) == 2
    said = f"koff: koff {verb} starts its runs itself, --jobs at one time: start it once, without torchrun\n"
    assert capsys.readouterr().err == said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["claims", "reproduce", "lm-eval"])
def test_tasks_of_srun_do_not_all_do_the_same(monkeypatch, tmp_path, capsys, verb):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    asked = {"lm-eval": ["--model=model", "--tasks=arc_easy"]}.get(verb, [f"--out={tmp_path / 'out'}", "--seeds=0"])
    assert main([verb, *asked]) == 2  # for no seeds, which come next, if not for this
    said = {"lm-eval": "koff: srun has started 4 tasks, each of which would do all that koff lm-eval does: "}
    assert capsys.readouterr().err.startswith(said.get(verb, f"koff: koff {verb} starts its runs itself, --jobs at"))
    assert not list(tmp_path.iterdir())


def test_a_task_of_srun_may_start_torchrun(fourth, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")  # one on each machine
    launched.refuse_copies("lm-eval")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launched")
    return SimpleNamespace(artifact=tiny_artifact(folder).folder, tasks=toy_tasks(folder / "tasks"))


def words(place, out, *options):
    asked = ["--tasks", "toy_write,toy_choose,koff_bpb_en", "--include_path", place.tasks, "--device=cpu"]
    asked += ["--limit=3", "--log_samples", "--output_path", str(out), "--domain=law", "--memory_off", "--dense"]
    return ["lm-eval", "--model", str(place.artifact), *asked, *options]


def two_processes(*command, **variables):
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "koff_lightning", *command]
    return subprocess.run(program, env=environment, capture_output=True, text=True, check=False)


def answer(task, given):
    """Log-likelihoods, which the files hold as text, or what the model wrote."""
    return given[0] if "write" in task else [float(one[0] if isinstance(one, list) else one) for one in given]


def written(out):
    """By column and file: scores, and the answers to each question."""
    found = {}
    for path in out.rglob("*.json*"):
        text = path.read_text(encoding="utf-8")
        name = path.relative_to(out).parts[0], path.name.rpartition("_")[0]
        assert name not in found, "written once"
        if path.suffix == ".json":
            for task, scores in json.loads(text)["results"].items():
                found[name] = found.get(name, {}) | {f"{task}/{key}": value for key, value in scores.items()}
        else:
            rows = sorted(map(json.loads, text.splitlines()), key=lambda row: row["doc_id"])
            found[name] = {row["doc_id"]: answer(path.name, row["filtered_resps"]) for row in rows}
    return found


@pytest.mark.slow
def test_lm_eval_on_two_processes_finds_and_says_what_one_does(place, tmp_path, capsys, monkeypatch):
    """Three questions for two processes: their shares do not come out even."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    assert main(words(place, tmp_path / "one")) == 0
    said, bar = capsys.readouterr()
    done = two_processes(*words(place, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == said.strip()
    assert done.stderr.count("--limit SHOULD ONLY") == 1
    asked = [int(text.split(" [")[-2].rpartition("/")[2]) for text in (bar, done.stderr)]
    assert 1 / 2 < asked[1] / asked[0] < 1, "of three questions the first process has two"
    one, two = written(tmp_path / "one"), written(tmp_path / "two")
    assert one.keys() == two.keys() and len(one) == 3 * 4
    for name, found in one.items():
        assert found.keys() == two[name].keys()
        for key, value in found.items():  # log-likelihoods differ by how rows are batched
            same = two[name][key] == value
            assert same or two[name][key] == pytest.approx(value, rel=1e-5), (name, key)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit=3"], "task 'toy_write' has 4 samples, of which limit 3.0 leaves 3 for 4 processes: each needs one"),
        (['--samples={"toy_write": [0, 2]}'], "--samples has 2 of task 'toy_write' for 4 processes: each needs one"),
        (["--use_cache=answers"], "--use_cache keeps answers by process, and here are 4: leave it out, or start one"),
        (["--device=cuda:0"], "each of 4 processes has a device of its own"),
    ],
)
def test_what_several_processes_cannot_do_is_one_line(fourth, monkeypatch, place, capsys, options, message):
    monkeypatch.setenv("RANK", "0")
    asked = ["--tasks=toy_write", "--include_path", place.tasks, *options]
    assert main(["lm-eval", "--model", str(place.artifact), *asked]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_what_all_processes_refuse_is_told_once_even_if_the_first_is_the_slowest(place, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import os, time\ntime.sleep(5 * (os.environ.get('RANK') == '0'))")
    modules = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = two_processes(*words(place, tmp_path, "--limit=1"), PYTHONPATH=modules)
    assert done.returncode
    said = [line for line in done.stderr.splitlines() if line.startswith("koff: ")]
    assert said == ["koff: task 'toy_write' has 4 samples, of which limit 1.0 leaves 1 for 2 processes: each needs one"]


def test_one_process_has_the_scores_whatever_local_rank_something_else_has_left(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    asked = ["--tasks=toy_choose", "--include_path", place.tasks, "--device=cpu", "--limit=1"]
    assert main(["lm-eval", "--model", str(place.artifact), *asked]) == 0
    assert "toy_choose" in capsys.readouterr().out
    assert os.environ["LOCAL_RANK"] == "1"


def test_ranks_with_unequal_numbers_of_requests_do_not_wait_for_each_other_to_measure(place, monkeypatch):
    """Requests that read the same are asked once, so one rank may measure batch sizes less often than the other."""
    lm = KoffLM(str(place.artifact), device="cpu", batch_size="auto:2", max_batch_size=2)
    lm._world_size = 2
    monkeypatch.setattr(torch.distributed, "all_gather", lambda *_: pytest.fail("the other rank may not come"))
    asked = [(("", ""), [5, 6], [last]) for last in (7, 8)] + [(("", ""), [6, 6], [9])]
    assert len(lm._loglikelihood_tokens(asked)) == 3
    assert lm.world_size == 2
