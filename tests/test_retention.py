"""Retention against its formula, and the answers that it is computed from."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_artifact import tiny_decomposition
from tiny_run import RandomText, tiny_trainer
from torch import nn

from koff_lightning import KoffError, KOFFModule, KVSpec, LoraSpec, SparsitySpec
from koff_lightning.evaluation import lm_tasks
from koff_lightning.evaluation.harness import KoffLM, score
from koff_lightning.studies.claims import retention
from koff_lightning.studies.claims.retention import SCORED, answer, figures, load_suites


def answers(dense, koff, off, chance=0.25):
    """Of one suite, one run and one domain, by how many of 100 questions are answered right."""
    right = {arm: {"en": [1.0] * n + [0.0] * (100 - n)} for arm, n in zip(SCORED, (dense, koff, off), strict=True)}
    return {"suite_{domain}": {"chance": {"en": chance}} | right}


def test_retention_is_the_distance_from_chance_that_is_left():
    (row,) = figures([answers(75, 65, 50), answers(75, 67, 50), answers(75, 63, 50)])
    assert row["accuracy"]["koff"] == pytest.approx([0.65, 0.67, 0.63])
    assert row["retention"]["koff"]["value"] == pytest.approx(0.4 / 0.5)
    assert row["retention"]["memory_off"]["value"] == pytest.approx(0.25 / 0.5)
    assert row["questions"] == 100
    for found in row["retention"].values():
        assert found["low"] < found["value"] < found["high"]


def test_domains_count_alike_however_many_questions_they_have():
    (one,) = figures([answers(75, 65, 50)])
    two = answers(75, 65, 50)
    for arm in SCORED:
        two["suite_{domain}"][arm]["zh"] = [1.0, 0.0] * 20
    two["suite_{domain}"]["chance"]["zh"] = 0.5
    (row,) = figures([two])
    assert row["chance"] == pytest.approx((0.25 + 0.5) / 2)
    assert row["accuracy"]["koff"] == pytest.approx([(one["accuracy"]["koff"][0] + 0.5) / 2])


def test_the_same_answers_are_kept_in_full_with_no_doubt():
    (row,) = figures([answers(75, 75, 50)] * 3)
    kept = row["retention"]["koff"]
    assert [kept[key] for key in ("value", "low", "high")] == pytest.approx([1, 1, 1])


def test_a_model_no_better_than_chance_keeps_nothing():
    assert figures([answers(30, 25, 25)] * 3)[0]["retention"] is None
    assert figures([]) == []


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a run whose memories say something of their own."""
    folder = tmp_path_factory.mktemp("run")
    tiny_decomposition(folder)  # writes dense/
    sizes = {"lora": LoraSpec(rank=2), "kv": KVSpec(slots=4), "sparsity": SparsitySpec(target=0.2, min_channels=4)}
    module, trainer = (
        KOFFModule(str(folder / "dense"), domains=["en", "de"], **sizes),
        tiny_trainer(folder, [], steps=4),
    )
    trainer.fit(module, RandomText(domains=["en", "de"]))
    torch.manual_seed(0)
    for tensor in (*module.model.memories.lora_parameters(), *module.model.memories.kv_parameters()):
        nn.init.normal_(tensor, std=0.3)
    trainer.save_checkpoint(folder / "version_0" / "checkpoints" / "last.ckpt")
    return folder


def test_answers_are_those_that_lm_eval_counts_and_are_kept(run, monkeypatch):
    suites = load_suites("koff_cloze_{domain}", ["en", "de"])
    for tasks in suites["koff_cloze_{domain}"].values():
        for task in tasks["tasks"].values():
            short = task.dataset["test"].select(range(12))
            task.dataset = {"test": short}
    found = answer(run, suites)["koff_cloze_{domain}"]
    assert found["chance"] == {"en": 0.25, "de": 0.25}
    model = retention.newest_checkpoint([run])
    for arm, domain, dense in (("koff", "de", False), ("memory_off", None, False), ("dense", None, True)):
        lm = KoffLM(str(model), domain, dense, device="cpu", batch_size=4)
        row = score(lm, suites["koff_cloze_{domain}"]["de"])["koff_cloze_de"]
        assert np.mean(found[arm]["de"]) == pytest.approx(row["acc_bytes"])
        assert len(found[arm]["de"]) == 12
    assert len({tuple(found[arm]["de"]) for arm in SCORED}) > 1
    monkeypatch.setattr(retention, "newest_checkpoint", lambda _: 1 / 0)
    assert answer(run, suites)["koff_cloze_{domain}"] == found, "from the file"
    path = run / retention.ANSWERS
    kept = json.loads(path.read_text())
    assert set(kept) == set(suites)
    older = {suite: {key: rows for key, rows in row.items() if key != "questions"} for suite, row in kept.items()}
    path.write_text(json.dumps(older))
    assert answer(run, suites) == older, "an earlier release told no more than the answers"
    other = json.loads(json.dumps(kept))
    other["koff_cloze_{domain}"]["questions"]["de"] = "of a task that was changed since"
    shorter = json.loads(json.dumps(older))
    shorter["koff_cloze_{domain}"]["dense"]["en"].pop()
    for stale in (other, shorter):
        path.write_text(json.dumps(stale))
        with pytest.raises(ZeroDivisionError):  # it is asked again
            answer(run, suites)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("koff_cloze_en", r"must name a task for every domain, as koff_cloze_\{domain\}; got 'koff_cloze_en'"),
        ("koff_bpb_{domain}", "task 'koff_bpb_en' is no choice between answers"),
        ("koff_clze_{domain}", "has no task 'koff_clze_en'. Did you mean 'koff_cloze_en'"),
    ],
)
def test_tasks_that_cannot_be_asked_are_named(names, message, monkeypatch):
    index = lm_tasks._index
    monkeypatch.setattr(lm_tasks, "_index", lambda path, metadata, _: index(path, metadata, False))
    with pytest.raises(KoffError, match=message):
        load_suites(names, ["en"])


def test_a_draw_at_chance_widens_the_interval_and_is_no_nan():
    draws = np.array([[0.2, 0.1], [0.0, 0.0], [-0.1, 0.1], [0.1, 0.1], [0.3, 0.2]])
    kept = retention._kept(np.array([0.2, 0.1, 0.1]), np.hstack([draws, draws[:, 1:]]))
    assert not any(math.isnan(bound) for arm in kept.values() for bound in (arm["low"], arm["high"]))
