"""LMEval in a run, KoffLM against stock HFLM, and bad input; offline tasks alone."""

import importlib
import logging
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lm_eval.models.huggingface import HFLM
from tiny_artifact import tiny_artifact, tiny_decomposition
from tiny_run import RandomText, tiny_module, tiny_trainer
from transformers import AutoModelForCausalLM, AutoTokenizer

from koff_lightning import KoffError, KOFFModule, KVSpec, LoraSpec, SparsitySpec
from koff_lightning.artifact.export import export
from koff_lightning.callbacks import LMEval, LMEvalTask
from koff_lightning.callbacks.lm_eval import _Part, score_names
from koff_lightning.cli import main
from koff_lightning.evaluation import lm_tasks
from koff_lightning.evaluation.harness import KoffLM, score
from koff_lightning.evaluation.lm_tasks import quiet
from koff_lightning.loading import load_tokenizer
from koff_lightning.support import ranks
from koff_lightning.support.ending import Ended
from koff_lightning.training.eval_mode import eval_mode

TASK = "koff_cloze_en"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """Folder of a random dense model with a tokenizer."""
    folder = tmp_path_factory.mktemp("dense")
    tiny_decomposition(folder)
    return folder / "dense"


def load(*names):
    with quiet():
        return lm_tasks.load_tasks(list(names))


class Losses(Callback):
    def __init__(self):
        self.values, self.seen = [], {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append((float(outputs["loss"]), torch.get_rng_state().sum().item()))
        self.seen = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("lm_eval/")}


def run(dense, folder, *evals, steps=4):
    torch.manual_seed(0)
    options = {"lora": LoraSpec(rank=2), "kv": KVSpec(slots=4), "sparsity": SparsitySpec(target=0.2, min_channels=4)}
    module = KOFFModule(str(dense), domains=["en", "law"], **options)
    losses = Losses()
    tiny_trainer(folder, [*evals, losses], steps).fit(module, RandomText())
    return losses, module


def test_a_run_is_the_same_with_and_without_and_monitors_see_the_scores(dense, tmp_path):
    evaluation = LMEval([LMEvalTask(TASK, "en", limit=4)], every_n_steps=2, dense=True, memory_off=True)
    (plain, one), (watched, other) = run(dense, tmp_path), run(dense, tmp_path, evaluation)
    assert plain.values == watched.values
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    assert {f"lm_eval/{c}/{TASK}/acc_bytes" for c in ("en", "dense", "memory_off")} <= watched.seen.keys()
    assert evaluation.scores["en"][TASK]["acc"] == watched.seen[f"lm_eval/en/{TASK}/acc"]


def test_the_dense_model_scores_exactly_as_with_stock_hflm(dense, tmp_path):
    """A rolling likelihood as the stock model's that is told not to put a second start token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(dense), AutoTokenizer.from_pretrained(dense)
    with quiet():
        wanted = {}
        for task, own in ((TASK, {}), ("koff_bpb_en", {"add_bos_token": False})):
            stock = HFLM(model, tokenizer=tokenizer, batch_size=8, **own)
            stock.check_finite = lambda: None
            wanted |= score(stock, load(task), limit=3)
        tasks = load(TASK, "koff_bpb_en")
        assert score(KoffLM(str(dense), batch_size=8, device="cpu"), tasks, limit=3) == wanted
        _, module = run(dense, tmp_path)
        stock_rows = {"open_with_start": False}  # windows inside a text begin as HFLM's
        assert (
            score(KoffLM(module.model, dense=True, tokenizer=tokenizer, batch_size=8, **stock_rows), tasks, limit=3)
            == wanted
        )
        export(module.model.eval(), tmp_path / "artifact", prove=False)
        lm = KoffLM(str(tmp_path / "artifact"), dense=True, batch_size=8, device="cpu", **stock_rows)
        assert score(lm, tasks, limit=3) == wanted


@pytest.mark.filterwarnings("always:lm_eval")
def test_a_failed_evaluation_does_not_lose_the_run_unless_strict(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(LMEval, "_score", lambda *_: 1 / 0)
    with pytest.warns(match="failed at step 4, training goes on: ZeroDivisionError"):
        assert len(run(dense, tmp_path, LMEval([LMEvalTask(TASK, "en", limit=2)]))[0].values) == 4
    with pytest.raises(ZeroDivisionError):
        run(dense, tmp_path, LMEval([LMEvalTask(TASK, "en", limit=2)], strict=True))


@pytest.mark.filterwarnings("always:lm_eval")
def test_an_error_of_one_of_several_ranks_ends_the_run_and_one_that_all_see_does_not(monkeypatch):
    """The others would wait in lm-eval's collectives for one that has gone on. Sharded ones have no group."""
    trainer = SimpleNamespace(world_size=2, global_step=4, callback_metrics={}, callbacks=[], loggers=[])
    evaluation = LMEval([LMEvalTask(TASK, "en")])
    evaluation._parts = [_Part("en", "en", evaluation.tasks[0], {"tasks": {}})]
    monkeypatch.setattr(LMEval, "_score", lambda *_: 1 / 0)
    for group, meet in ((None, True), ("all", False)):
        evaluation._group, evaluation._seen = group, 0
        monkeypatch.setattr(ranks, "all_meet", lambda _, meet=meet: meet)
        with pytest.raises(ZeroDivisionError):
            evaluation._evaluate(trainer, None)
    evaluation._seen = 0
    monkeypatch.setattr(ranks, "all_meet", lambda _: True)
    with pytest.warns(match="failed at step 4, training goes on: ZeroDivisionError"):
        evaluation._evaluate(trainer, None)
    monkeypatch.setattr(LMEval, "_score", lambda *_: (_ for _ in ()).throw(KoffError("not finite")))
    evaluation._seen = 0
    with pytest.warns(match="failed at step 4, training goes on: not finite"):
        evaluation._evaluate(trainer, None)


def test_an_evaluation_that_a_signal_ends_is_made_up_for_by_the_run_that_goes_on(monkeypatch):
    trainer = SimpleNamespace(global_step=4, estimated_stepping_batches=4, world_size=1, callback_metrics={})
    trainer.callbacks = trainer.loggers = []
    first, second = LMEval([LMEvalTask(TASK, "en")]), LMEval([LMEvalTask(TASK, "en")])
    first._parts = second._parts = [_Part("en", "en", first.tasks[0], {"tasks": {}})]
    monkeypatch.setattr(LMEval, "_score", lambda *_: (_ for _ in ()).throw(Ended(143)))
    first.on_train_batch_end(trainer, None)
    second.load_state_dict(first.state_dict())
    monkeypatch.setattr(LMEval, "_score", lambda *_: {TASK: {"acc": 0.5}})
    second.on_train_start(trainer, None)
    assert second.scores == {"en": {TASK: {"acc": 0.5}}}


def test_what_would_stand_in_one_place_twice_is_refused_and_shared_arms_score_each_task_once(dense, tmp_path):
    twice = [LMEvalTask(TASK, "en"), LMEvalTask(TASK, "en", limit=2)]
    with pytest.raises(KoffError, match="task 'koff_cloze_en' is named twice for domain 'en': leave one out"):
        run(dense, tmp_path, LMEval(twice))
    unlike = [LMEvalTask(TASK, "en", limit=3), LMEvalTask(TASK, "law", limit=2)]
    for arm in ("dense", "memory_off"):
        with pytest.raises(KoffError, match=rf"lm_eval\.{arm}: task 'koff_cloze_en' has another limit or num_fewshot"):
            run(dense, tmp_path, LMEval(unlike, **{arm: True}))
    evaluation = LMEval([LMEvalTask(TASK, name, limit=2) for name in ("en", "law")], dense=True, memory_off=True)
    run(dense, tmp_path, evaluation, steps=1)
    assert sorted(part.column for part in evaluation._parts) == ["dense", "en", "law", "memory_off"]
    assert evaluation.scores.keys() == {"dense", "en", "law", "memory_off"}


def test_bad_input_is_refused_before_training(dense, tmp_path, monkeypatch):
    index = lm_tasks._index
    with monkeypatch.context() as patch:  # what begins as ours is looked for among ours
        patch.setattr(lm_tasks, "_index", lambda *a: pytest.fail("it reads all of lm-eval's") if a[2] else index(*a))
        with pytest.raises(KoffError, match="has no task 'koff_clze'. Did you mean 'koff_cloze'"):
            run(dense, tmp_path, LMEval([LMEvalTask("koff_clze", "en")]))
    monkeypatch.setattr(lm_tasks, "_index", lambda path, metadata, _: index(path, metadata, False))
    with pytest.raises(KoffError, match="domain 'fr', but this run has memories for en, law"):
        run(dense, tmp_path, LMEval([LMEvalTask(TASK, "fr")]))
    with pytest.raises(KoffError, match="limit must be a number of samples"):
        run(dense, tmp_path, LMEval([LMEvalTask(TASK, "en", limit=0)]))
    with pytest.raises(KoffError, match="leaves 1 for 2 processes: each needs one"):
        lm_tasks.check_counts(load(TASK), 1, None, 2)
    with pytest.raises(KoffError, match="num_fewshot must be 0 or more; got -1"):
        run(dense, tmp_path, LMEval([LMEvalTask(TASK, "en", limit=2, num_fewshot=-1)]))
    monkeypatch.setattr(lm_tasks, "version", lambda _: "0.4.9")
    with pytest.raises(KoffError, match="lm-eval 0.4.9 is installed, but >=0.4.13,<0.5 is needed"):
        lm_tasks.load_tasks([TASK])


def test_log_likelihoods_that_are_no_numbers(dense):
    model = AutoModelForCausalLM.from_pretrained(dense)
    model.get_input_embeddings().weight.data.fill_(float("nan"))
    with pytest.raises(KoffError, match="log-likelihoods are not finite"):
        score(KoffLM(model, batch_size=4), load(TASK), limit=2)


FILTERED = """task: filtered
custom_dataset: !function koff_lightning.evaluation.lm_tasks.documents
dataset_kwargs: {suite: cloze, domain: en}
test_split: test
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 2}
filter_list:
  - {name: strict, filter: [{function: take_first}]}
  - {name: small, filter: [{function: lowercase}, {function: take_first}]}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
GROUPS = """group: {name}
task: [filtered, koff_cloze_en, koff_cloze_de]
aggregate_metric_list: [{{metric: exact_match{filters}}}, {{metric: acc}}, {{metric: f1}}]
"""


@pytest.mark.parametrize(
    ("group", "averages"),
    [
        ("koff_bpb", {"bits_per_byte"}),
        ("every", {"exact_match.strict", "exact_match.small", "acc"}),
        ("strict", {"exact_match.strict", "acc"}),
    ],
)
def test_what_monitors_may_name_is_what_an_evaluation_gives(dense, tmp_path, group, averages):
    """Of tasks their metrics by filter; of groups those that they average, as far as a task below has them."""
    (tmp_path / "filtered.yaml").write_text(FILTERED)
    for name, filters in (("every", ""), ("strict", ", filter_list: strict")):
        (tmp_path / f"{name}.yaml").write_text(GROUPS.format(name=name, filters=filters))
    with quiet():
        tasks = lm_tasks.load_tasks([group], str(tmp_path))
        found = score(KoffLM(str(dense), batch_size=8, device="cpu"), tasks, limit=1)
    given = {f"{name}/{metric}" for name, row in found.items() for metric in row if "_stderr" not in metric}
    assert score_names(tasks) == given
    assert {name for name in given if name.startswith(f"{group}/")} == {f"{group}/{metric}" for metric in averages}


@pytest.mark.parametrize("name", ["koff_cloze/acc", "koff_cloze_en/acc.strict", "koff_cloze_en/acc_stderr"])
def test_a_monitor_that_would_never_have_a_value_is_refused(dense, tmp_path, name):
    watch = EarlyStopping(monitor=f"lm_eval/en/{name}")
    with pytest.raises(KoffError, match=f"monitors 'lm_eval/en/{name}', which this run does not score: .*bytes, .*acc"):
        run(dense, tmp_path, LMEval([LMEvalTask("koff_cloze", "en")]), watch)


def test_the_dense_model_scores_a_group_whose_tasks_it_has_scored(dense, tmp_path):
    tasks = [LMEvalTask("koff_cloze_de", "en", limit=1), LMEvalTask("toy", "law", limit=1)]
    (tmp_path / "toy.yaml").write_text("group: toy\ntask: [koff_cloze_de]\naggregate_metric_list: [{metric: acc}]\n")
    evaluation = LMEval(tasks, dense=True, include_path=str(tmp_path))
    run(dense, tmp_path, evaluation, steps=1)
    assert evaluation.scores["dense"]["toy"]["acc"] == evaluation.scores["dense"]["koff_cloze_de"]["acc"]


def test_another_lm_eval_is_told_before_its_insides_are_imported(monkeypatch):
    """Another release may have moved what the harness imports."""
    for name in ("lm_eval.evaluator", "lm_eval.api.registry", "lm_eval.models.huggingface"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    monkeypatch.delitem(sys.modules, "koff_lightning.evaluation.harness")
    monkeypatch.setattr(lm_tasks, "version", lambda _: "0.5.0")
    with pytest.raises(KoffError, match="lm-eval 0.5.0 is installed, but >=0.4.13,<0.5 is needed"):
        importlib.import_module("koff_lightning.evaluation.harness")


def test_tokenizers_say_nothing_of_long_text_that_lm_eval_cuts():
    said, listener = [], logging.Handler()
    listener.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("transformers").addHandler(listener)
    try:
        with lm_tasks.quiet():
            load_tokenizer("koff-tiny").encode("text " * 2000)
        assert not said
        load_tokenizer("koff-tiny").encode("text " * 2000)
        assert "longer than the specified maximum" in said[0], "without it they speak"
    finally:
        logging.getLogger("transformers").removeHandler(listener)


def test_the_command_scores_an_artifact_by_domain(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # asks pip and the compiler: seconds
    made = tiny_artifact(tmp_path)
    options = ["--tasks", TASK, "--limit", "3", "--output_path", str(tmp_path / "out"), "--log_samples"]
    assert main(["lm-eval", "--model", str(made.folder), "--domains", "de,law", "--memory-off", *options]) == 0
    head, row = (line for line in capsys.readouterr().out.splitlines() if "metric" in line or TASK in line)
    assert head.split() == ["task", "metric", "de", "law", "none"]
    assert row.split()[:2] == [TASK, "acc_bytes"] and row.count("±") == 3
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"de", "law", "none"}
    assert list((tmp_path / "out" / "de").rglob("samples_*.jsonl"))
    assert main(["lm-eval", "--model", str(made.folder), "--domain", "xx", *options]) == 2
    assert "has no memory for 'xx'; it has de, fr, law" in capsys.readouterr().err


def test_the_data_are_what_the_script_makes(tmp_path):
    sys.path.insert(0, str(Path(__file__).parents[1] / "recipes/koff_tiny"))
    import build_tasks

    build_tasks.build(tmp_path)
    for made in tmp_path.glob("*.xz"):
        assert lm_tasks._rows(made) == lm_tasks._rows(lm_tasks.FOLDER / "data" / made.name)


def test_looking_at_a_module_leaves_no_trace_even_when_it_fails(tmp_path):
    """lm-eval seeds all generators, puts the model in eval mode, and reads with other gates and memories."""
    module = tiny_module(tmp_path)
    module.configure_model()
    module.train()
    module.model.gates.set(torch.rand(2, len(module.model.gates.logits)))
    module.model.memories.activate(["en", None])

    def state():
        modes = [part.training for part in module.modules()]
        return modes, id(module.model.gates._columns), id(module.model.memories.routes)

    before = state()
    draws = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
    with pytest.raises(ZeroDivisionError), eval_mode(module):
        seed_everything(1234, verbose=False)
        module.model.gates.set(None)
        module.model.memories.activate(["law"] * 3)
        assert not module.training and not torch.is_grad_enabled()
        raise ZeroDivisionError
    assert state() == before and torch.is_grad_enabled()
    assert draws == [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
