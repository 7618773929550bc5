"""What the scores cost inside a run, against the same tasks by `koff lm-eval` on its checkpoint."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from tiny_artifact import tiny_decomposition
from tiny_run import RandomText, tiny_trainer

from koff_lightning import KOFFModule, KVSpec, LoraSpec, SparsitySpec
from koff_lightning.callbacks import LMEval, LMEvalTask
from koff_lightning.commands import lm_eval_cli
from koff_lightning.evaluation.harness import Reader
from koff_lightning.evaluation.rolling import windows_of


@pytest.mark.parametrize("length", [2, 8])
@pytest.mark.parametrize("opening", [None, 7])
@pytest.mark.parametrize("count", [1, 2, 8, 9, 15, 40])
def test_windows_predict_each_token_once_and_begin_with_what_was_asked_for(count, opening, length):
    ids = list(range(100, 100 + count))
    windows = windows_of(ids, 3, length, opening)
    assert [token for _, predicted in windows for token in predicted] == ids
    read = [len(context) + len(predicted) - 1 for context, predicted in windows]
    assert read[0] <= length and read[1:] == [length] * (len(windows) - 1), "no window is shorter than it may be"
    for place, (context, predicted) in enumerate(windows):
        head, rest = ([3], context[1:]) if not place else ([opening] * (opening is not None), context)
        rest = rest[len(head) :] if place else rest
        assert context[: len(head)] == head
        assert rest + predicted == list(range(predicted[-1] + 1 - len(rest + predicted), predicted[-1] + 1))
        assert bool(rest) == bool(place)


TASKS = [("koff_cloze_en", "en"), ("koff_continuation_de", "de")]


class Text(RandomText):
    @property
    def domain_names(self):
        return ["en", "de"]


def train(backbone, folder, limit, *callbacks, **sizes):
    """A run of two steps with scores after each; its checkpoint."""
    sizes = {"lora": LoraSpec(rank=4), "kv": KVSpec(slots=16)} | sizes
    torch.manual_seed(0)
    module = KOFFModule(str(backbone), domains=["en", "de"], **sizes)
    scores = LMEval([LMEvalTask(task, domain, limit=limit) for task, domain in TASKS], every_n_steps=1)
    run = tiny_trainer(folder, [scores, *callbacks], steps=2)
    run.fit(module, Text(domains=["en", "de"]))
    run.save_checkpoint(folder / "run.ckpt")
    return folder / "run.ckpt", scores


def outside(path, limit):
    """The same by the command."""
    for task, domain in TASKS:
        words = ["--model", str(path), "--domain", domain, "--tasks", task, "--limit", str(limit), "--device", "cpu"]
        lm_eval_cli.lm_eval(words)


@pytest.fixture(autouse=True)
def no_questions(monkeypatch):
    """lm-eval asks pip and the compiler about the machine: seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)


def test_the_model_is_asked_as_often_and_for_as_many_tokens(tmp_path, monkeypatch):
    tiny_decomposition(tmp_path)  # writes dense/
    asked, call = [], Reader.__call__
    monkeypatch.setattr(Reader, "__call__", lambda self, ids: (asked.append(tuple(ids.shape)), call(self, ids))[1])
    path, _ = train(tmp_path / "dense", tmp_path, 4, sparsity=SparsitySpec(target=0.2, min_channels=4))
    inside, asked[:] = sorted(asked), []
    outside(path, 4)
    assert asked
    assert inside == sorted(asked * 2), "after each of two steps"


@pytest.mark.slow
def test_the_callback_costs_within_a_tenth_of_the_command(tmp_path, monkeypatch, capsys):
    """CPU time of evaluating, without the loading of model and tasks; after a first look that warms caches up."""
    clock = SimpleNamespace(perf_counter=time.process_time)
    monkeypatch.setattr(sys.modules["koff_lightning.callbacks.lm_eval"], "time", clock)
    spent, score = [0.0], lm_eval_cli.score_column

    def timed(*options):
        since = time.process_time()
        found = score(*options)
        spent[0] += time.process_time() - since
        return found

    class Note(Callback):
        after = 0.0

        def on_train_batch_end(self, trainer, *_):
            self.after = self.after or scores_of(trainer).seconds

    def scores_of(trainer):
        return next(callback for callback in trainer.callbacks if isinstance(callback, LMEval))

    monkeypatch.setattr(lm_eval_cli, "score_column", timed)
    path, scores = train("koff-tiny", tmp_path, 40, note := Note())
    outside(path, 40)
    inside = scores.seconds - note.after
    with capsys.disabled():
        print(f"\nin the run {inside:.2f} s, by the command {spent[0]:.2f} s: {inside / spent[0]:.3f}")
    assert inside <= 1.1 * spent[0]
