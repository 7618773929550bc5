"""lm-eval's scores in a real `koff fit`: what monitors do with them, and what goes wrong without losing the run."""

import csv
import json
import math

import pytest
import yaml
from tiny_artifact import tiny_decomposition
from tiny_tasks import toy_tasks
from toy_text import toy_documents, write_jsonl

from koff_lightning.callbacks import LMEval, LMEvalTask
from koff_lightning.cli import main
from koff_lightning.commands.parsing.class_names import SWITCH
from koff_lightning.evaluation import lm_tasks

DOMAINS = ["en", "law"]
SCORE = "lm_eval/law/toy_choose/acc"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A config of `koff fit` over toy text that scores toy tasks, and its folder."""
    folder = tmp_path_factory.mktemp("fit")
    tiny_decomposition(folder)  # writes dense/
    toy_tasks(folder / "tasks")
    for seed, domain in enumerate(DOMAINS):
        write_jsonl(folder / f"{domain}.jsonl", toy_documents(60, seed=seed, longest=30))
    files = {domain: str(folder / f"{domain}.jsonl") for domain in DOMAINS}
    sizes = {"lora": {"rank": 2}, "kv": {"slots": 4}, "sparsity": {"target": 0.2, "min_channels": 4}}
    config = {
        "model": {"backbone": str(folder / "dense")} | sizes,
        "data": {"domains": files, "seq_len": 16, "batch_size": 4, "heldout_fraction": 0.1},
        "trainer": {"max_steps": 6, "accelerator": "cpu", "num_sanity_val_steps": 0, "limit_val_batches": 0}
        | {"log_every_n_steps": 1},
        "lm_eval": {
            "include_path": str(folder / "tasks"),
            "every_n_steps": 2,
            "tasks": [{"task": "toy_choose", "domain": "law"}],
        },
        "export": {"enabled": False},
    }
    (folder / "toy.yaml").write_text(yaml.safe_dump(config))
    return folder


def fit(place, out, *options, **sections):
    """Run the command with some sections of the config changed; returns its exit status."""
    over = out.with_suffix(".yaml")
    over.write_text(yaml.safe_dump(sections))
    words = ["--config", str(place / "toy.yaml"), "--config", str(over), f"--trainer.default_root_dir={out}"]
    return main(["fit", *words, "--seed_everything=0", SWITCH, *options])


def monitors(out, **stopping):
    """A checkpoint by the score, and a stop when it gets no better."""
    watch = {"monitor": SCORE, "mode": "max"}
    saver = {"dirpath": str(out / "best"), "filename": "{step}", "every_n_train_steps": 2, "save_top_k": 1} | watch
    path = "lightning.pytorch.callbacks."
    stopper = {"class_path": path + "EarlyStopping", "init_args": watch | stopping}
    return [{"class_path": path + "ModelCheckpoint", "init_args": saver}, stopper]


def test_checkpoints_and_early_stopping_go_by_the_scores(place, tmp_path):
    """The toy score does not get better by itself, so that the first is best and the run stops at the second look."""
    out = tmp_path / "run"
    stopping = {"patience": 1, "check_on_train_epoch_end": True, "min_delta": 1.0}
    trainer = {"callbacks": monitors(out, **stopping), "max_epochs": 9, "limit_train_batches": 2, "max_steps": 18}
    fixed = {"warmup": 0.0, "ramp": 0.1, "hold": 0.0}  # the mask, after step 2: early stopping waits for it
    assert fit(place, out, trainer=trainer, anneal=fixed) == 0
    found = json.loads((out / "results.json").read_text())
    assert found["steps"] == 4
    assert found["lm_eval"]["law"]["toy_choose"]["acc"] in (0, 0.25, 0.5, 0.75, 1)
    (best,) = (out / "best").iterdir()
    assert best.name == "step=2.ckpt"
    metrics = (out / "version_0" / "metrics.csv").read_text().splitlines()
    column = metrics[0].split(",").index(SCORE)
    assert sum(row.split(",")[column] != "" for row in metrics[1:]) == 2


def test_a_group_without_an_average_shows_its_parts(place, tmp_path, capsys):
    parts = {"tasks": [{"task": "toy_parts", "domain": "law"}]}
    assert fit(place, tmp_path / "run", trainer={"callbacks": monitors(tmp_path)[:1]}, lm_eval=parts) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())["lm_eval"]["law"]
    assert found["toy_choose"]["acc"] >= 0 and not found["toy_parts"]
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "toy_" in line]
    assert rows == [["toy_choose", "acc"]]


def test_monitors_that_look_before_the_first_score(place, tmp_path, capsys):
    """A checkpoint takes any score for better than nan; early stopping, which would end the run, is refused."""
    out = tmp_path / "run"
    saver, stopper = monitors(out, check_on_train_epoch_end=True, patience=9)
    late = {"lm_eval": {"every_n_steps": 4}}
    trainer = {"max_epochs": 9, "limit_train_batches": 2, "limit_val_batches": 1}
    assert fit(place, out, trainer={"callbacks": [saver, stopper]} | trainer, **late) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"EarlyStopping looks at '{SCORE}' at step 2, but the first score comes at step 4" in said
    assert "set lm_eval.every_n_steps to 2 or less" in said
    stopper["init_args"]["check_finite"] = False
    assert fit(place, out, trainer={"callbacks": [saver, stopper]} | trainer, **late) == 0
    assert json.loads((out / "results.json").read_text())["steps"] == 6
    (best,) = (out / "best").iterdir()
    assert best.name == "step=4.ckpt"


def test_a_resumed_run_goes_on_with_the_scores(place, tmp_path, monkeypatch):
    out = tmp_path / "run"
    alone = {"trainer": {"max_steps": 3}, "checkpoint": {"every_n_train_steps": 1}}
    assert fit(place, out, **alone) == 0
    (out / "results.json").unlink()  # killed between its last evaluation and its report
    seen = []
    monkeypatch.setattr(LMEval, "_score", lambda *_: 1 / 0)
    assert fit(place, out, "--ckpt_path=last", **alone) == 0
    assert json.loads((out / "results.json").read_text())["lm_eval"]["law"]["toy_choose"]["acc"] >= 0
    start = LMEval.on_train_start

    def on_train_start(self, trainer, module):
        start(self, trainer, module)
        seen.append((float(trainer.callback_metrics[SCORE]), self._seen))

    monkeypatch.setattr(LMEval, "on_train_start", on_train_start)
    monkeypatch.setattr(LMEval, "_score", lambda *_: {"toy_choose": {"acc": 0.5}})
    longer = {"trainer": {"max_steps": 6, "callbacks": monitors(out)[:1]}, "checkpoint": {"every_n_train_steps": 1}}
    assert fit(place, out, "--ckpt_path=last", **longer) == 0
    assert len(seen) == 1 and seen[0][0] >= 0 and seen[0][1] == 3
    other = LMEval([LMEvalTask("toy_choose", "law", limit=2)])
    other.load_state_dict(LMEval([LMEvalTask("toy_choose", "law")]).state_dict() | {"scores": {"law": {}}})
    assert not other.scores, "scores of other questions are not taken over"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": []}, f"monitors '{SCORE}', which this run does not score: lm_eval.tasks gives nothing."),
        ({"tasks": [{"task": "toy_write", "domain": "law"}]}, "gives lm_eval/law/toy_write/exact_match."),
        ({"tasks": [{"task": "toy_choose", "domain": "en"}]}, "Did you mean 'lm_eval/en/toy_choose/acc'?"),
        ({"tasks": [{"task": "toy_parts", "domain": "en"}]}, "gives lm_eval/en/toy_choose/acc. Did you mean"),
    ],
)
def test_a_monitor_of_what_is_not_scored_is_refused_at_once(place, tmp_path, capsys, changed, message):
    out = tmp_path / "run"
    assert fit(place, out, trainer={"callbacks": monitors(out)}, lm_eval=changed) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("koff: ") and message in said
    assert not list(out.rglob("*.ckpt"))


@pytest.mark.filterwarnings("always:lm_eval")
def test_a_score_is_logged_once_and_stands_for_monitors_when_the_next_evaluation_fails(place, tmp_path, monkeypatch):
    """Measured at step 2; the evaluation of step 4 fails; a monitor reads the old score and the log has none."""
    score, seen = LMEval._score, []

    def fails_at_4(self, part, trainer, module):
        return score(self, part, trainer, module) if trainer.global_step != 4 else 1 / 0

    publish = LMEval._publish
    monkeypatch.setattr(LMEval, "_score", fails_at_4)
    monkeypatch.setattr(
        LMEval, "_publish", lambda self, trainer: publish(self, trainer) or seen.append(trainer.callback_metrics[SCORE])
    )
    out = tmp_path / "run"
    with pytest.warns(match="failed at step 4, training goes on: ZeroDivisionError"):
        assert fit(place, out, lm_eval={"dense": True}, trainer={"callbacks": monitors(out)[:1]}) == 0
    before, first, failed, last = (float(value) for value in seen)
    assert math.isnan(before) and first == failed >= 0 and last >= 0
    lines = (out / "version_0" / "metrics.csv").read_text().splitlines()
    logged = [row for row in csv.DictReader(lines) if row["lm_eval/seconds"]]
    assert [row["step"] for row in logged] == ["1", "3", "5"]
    assert [bool(row[SCORE]) for row in logged] == [True, False, True]
    assert [bool(row["lm_eval/dense/toy_choose/acc"]) for row in logged] == [True, False, False], "scored once"


NAN = "koff_lightning.evaluation.harness.HFLM._loglikelihood_tokens"


@pytest.mark.filterwarnings("always:lm_eval")
@pytest.mark.parametrize("strict", [False, True])
def test_scores_that_are_no_numbers_are_a_warning_unless_strict(place, tmp_path, capsys, monkeypatch, strict):
    monkeypatch.setattr(NAN, lambda self, requests, *_, **__: [(float("nan"), False)] * len(requests))
    out = tmp_path / "run"
    words = "12 log-likelihoods are not finite, so the scores mean nothing"
    if strict:
        assert fit(place, out, lm_eval={"strict": True}) == 2
        assert words in capsys.readouterr().err
        return
    with pytest.warns(match=rf"toy_choose \(law\) failed at step [246], training goes on: .*{words}"):
        assert fit(place, out, trainer={"callbacks": monitors(out)[:1]}) == 0  # a checkpoint by the score that fails
    found = json.loads((out / "results.json").read_text())
    assert found["steps"] == 6
    assert not found.get("lm_eval")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": [{"task": "toy_chose", "domain": "law"}]}, "has no task 'toy_chose'. Did you mean 'toy_choose'"),
        ({"tasks": [{"task": "toy_choose", "domain": "fr"}]}, "domain 'fr', but this run has memories for en, law"),
        ({"tasks": [{"task": "toy_choose", "domain": "law", "limit": 0}]}, "limit must be a number of samples"),
        ({"tasks": [{"task": "nowhere", "domain": "law"}]}, "'nowhere' has no data here: dataset 'json'"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_first_step(place, tmp_path, capsys, monkeypatch, changed, message):
    index = lm_tasks._index
    monkeypatch.setattr(lm_tasks, "_index", lambda path, metadata, _: index(path, metadata, False))
    (place / "tasks" / "nowhere.yaml").write_text(
        "task: nowhere\ndataset_path: json\ndataset_kwargs: {data_files: {test: missing.jsonl}}\ntest_split: test\n"
        'output_type: multiple_choice\ndoc_to_text: ""\ndoc_to_choice: [a, b]\ndoc_to_target: 0\n'
    )
    index.cache_clear()
    assert fit(place, tmp_path / "run", lm_eval=changed) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("koff: ") and message in said
    assert not list((tmp_path / "run").rglob("*.ckpt"))
