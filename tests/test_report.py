import csv
import json
import math
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_artifact import tiny_decomposition
from tiny_run import BYTES, DOMAINS, Batches, RandomText, tiny_module, tiny_trainer

from koff_lightning import KoffError, SparsitySpec
from koff_lightning.callbacks import RunReport
from koff_lightning.callbacks import report as report_module
from koff_lightning.callbacks.report import MOST, MaskHistory, score
from koff_lightning.decomposition import Decomposition
from koff_lightning.reports import plots, results
from koff_lightning.specs.training import LossSpec
from koff_lightning.support.files import write_atomically

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")  # the backbone lies in it
ARMS = {f"{arm}_{unit}" for arm in ("dense", "koff", "memory_off", "swapped") for unit in ("bpb", "ppl")}


def fit(folder, *callbacks, data=None, steps=8, **options):
    module = tiny_module(folder, **options)
    trainer = tiny_trainer(folder, [RunReport(), *callbacks], steps=steps)
    trainer.fit(module, data or RandomText())
    return trainer, module


@pytest.fixture(autouse=True)
def drawn(monkeypatch):
    """Plots take a second, so only their names are taken down; `run` draws them."""
    names = []
    save = plots.save
    monkeypatch.setattr(
        "koff_lightning.reports.plots.save",
        lambda figure, folder, name: names.append(name) if figure else save(None, folder, name),
    )
    return names


def read(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, drawn_pictures):
    """Folder, module and output of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("koff_lightning.callbacks.report.print_figures", lambda _, figures: lines.append(figures))
        seed_everything(3, verbose=False)
        _, module = fit(folder)
        del os.environ["PL_GLOBAL_SEED"]
    assert len(lines) == 1
    return folder, module


def test_results_hold_what_the_docs_promise(run):
    figures = read(run[0])
    assert set(figures["domains"]) == set(DOMAINS)
    assert all(set(row) == ARMS for row in (*figures["domains"].values(), figures["mean"]))
    assert figures["heldout_bytes"] == {domain: 4 * BYTES for domain in DOMAINS}
    assert figures["seed"] == 3
    assert figures["steps"] == 8
    assert figures["tokens"] == 8 * 2 * 11
    assert figures["seconds"] > 0
    assert figures["config"]["model"]["sparsity"]["target"] == 0.2
    assert {"python", "torch", "lightning", "transformers", "peft", "koff_lightning"} == set(figures["versions"])


def test_perplexity_is_that_of_a_token(run):
    """exp of the mean nats of all predicted tokens, here counted from the losses themselves."""
    figures, module = read(run[0]), run[1]
    batches = RandomText().test_dataloader()
    for domain in DOMAINS:
        nats = torch.cat([module.model.token_nats(b, "koff").flatten() for b in batches if b["domains"][0] == domain])
        assert figures["heldout_tokens"][domain] == len(nats) == 4 * 11
        assert figures["domains"][domain]["koff_ppl"] == pytest.approx(float(nats.double().mean().exp()), rel=1e-6)
    mean = sum(figures["domains"][domain]["koff_ppl"] for domain in DOMAINS) / len(DOMAINS)
    assert figures["mean"]["koff_ppl"] == pytest.approx(mean)


def test_figures_are_those_of_the_hardened_mask(run):
    figures, module = read(run[0]), run[1]
    assert module.model.gates.hardened and figures["sparsity"]["hardened"]
    assert figures["sparsity"]["body"] == pytest.approx(0.2, abs=0.01)
    assert {"target", "denominator", "body", "total", "units", "ffn", "attention"} <= set(figures["sparsity"])
    assert sum(unit["kept"] for unit in figures["kept_units"]) == int(module.model.gates.kept.sum())


def test_the_target_is_the_schedules_until_the_mask_is_fixed_and_that_of_the_options_after_it(tmp_path):
    model = tiny_decomposition(tmp_path)
    assert model.gates.hardened and model.target == model.sparsity.target > 0, "nobody has to write it"
    model.target = 0.01
    assert model.target == model.sparsity.target
    model.gates.hardened.fill_(False)
    model.target = 0.01
    assert model.target == 0.01
    assert int((~model.hard_mask()).sum()) < int((~model.gates.kept).sum()), "where it stood, the mask would be smaller"


def test_parameters_add_up(run):
    size, module = read(run[0])["parameters"], run[1]
    gone = size["dense_total"] - size["backbone_kept"]
    assert gone == pytest.approx(module.model.budget.report(module.model.gates.kept)["total"] * size["dense_total"])
    assert size["active"] == size["backbone_kept"] + max(size["memory"].values())
    assert size["stored"] == size["backbone_kept"] + sum(size["memory"].values())


def test_bits_per_byte_are_those_of_the_model(run):
    figures, module = read(run[0]), run[1]
    batches = [batch for batch in RandomText().test_dataloader() if batch["domains"][0] == "law"]
    for arm in ("dense", "koff", "memory_off", "swapped"):
        nats = sum(module.model.row_nats(batch, arm).sum().item() for batch in batches)
        expected = nats / torch.log(torch.tensor(2.0)).item() / (4 * BYTES)
        assert figures["domains"]["law"][f"{arm}_bpb"] == pytest.approx(expected, rel=1e-5)
    assert figures["mean"]["koff_bpb"] == pytest.approx(
        sum(row["koff_bpb"] for row in figures["domains"].values()) / len(DOMAINS)
    )


class Numbered(RandomText):
    """Every row holds the end of one document and the beginning of the next."""

    def test_dataloader(self):
        batches = Batches()
        for place, batch in enumerate(super().test_dataloader()):
            documents = torch.tensor([[0] * 5 + [1] * 7, [1] * 5 + [2] * 7]) + 2 * (place // 2)
            sizes = torch.zeros(2, 12)
            sizes[:, 0], sizes[:, 5] = 15, BYTES - 15
            batches.append(batch | {"documents": documents, "document_bytes": sizes})
        return batches


def test_scores_by_document_add_up_to_the_figures(tmp_path):
    data = Numbered()
    _, module = fit(tmp_path, data=data)
    figures, documents = read(tmp_path), json.loads((tmp_path / "documents.json").read_text())
    assert list(documents) == DOMAINS
    for domain, scores in documents.items():
        assert scores["bytes"] == [15, BYTES, BYTES, BYTES, BYTES - 15]
        assert sum(scores["bytes"]) == figures["heldout_bytes"][domain]
        for arm in ("dense", "koff", "memory_off", "swapped"):
            bits = sum(scores["nats"][arm]) / math.log(2) / sum(scores["bytes"])
            assert bits == pytest.approx(figures["domains"][domain][f"{arm}_bpb"], rel=1e-12)
        assert np.sum(scores["tokens"]) == figures["heldout_tokens"][domain]
        for arm, classes in scores["nats_by_context"].items():
            assert np.sum(classes, 0) == pytest.approx(scores["nats"][arm], rel=1e-12)
    batches = [batch for batch in data.test_dataloader() if batch["domains"][0] == "law"]
    rows = torch.cat([module.model.token_nats(batch, "koff") for batch in batches])  # [4, 11]
    assert documents["law"]["nats"]["koff"][0] == pytest.approx(rows[0, :4].sum().item(), rel=1e-5)
    second = rows[0, 4:].sum() + rows[1, :4].sum()
    assert documents["law"]["nats"]["koff"][1] == pytest.approx(second.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "computed"),
    [
        ({"lora": None, "kv": None}, {"dense", "koff"}),
        ({"shared_memory": True}, {"dense", "koff", "memory_off"}),
        ({"lora": None}, {"dense", "koff", "memory_off", "swapped"}),
    ],
)
def test_arms_that_are_the_same_are_computed_once(tmp_path, monkeypatch, options, computed):
    asked, compute = set(), Decomposition.token_nats
    monkeypatch.setattr(
        Decomposition, "token_nats", lambda self, batch, arm: asked.add(arm) or compute(self, batch, arm)
    )
    data = Numbered()
    _, module = fit(tmp_path, data=data, **options)
    assert asked == computed
    documents = json.loads((tmp_path / "documents.json").read_text())
    batches = list(data.test_dataloader())
    for arm in documents["en"]["nats"]:
        nats = sum(module.model.token_nats(batch, arm).sum() for batch in batches)
        assert sum(sum(row["nats"][arm]) for row in documents.values()) == pytest.approx(nats.item(), rel=1e-5)


def test_plots_are_written(run):
    names = {file.name for file in (run[0] / "plots").iterdir()}
    stems = ("bits_per_byte", "sparsity", "sparsity_by_layer")
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}


def test_nothing_half_written_stays(run):
    assert not [file for file in run[0].iterdir() if file.name.startswith(".")]


def test_the_table_reads_well_without_a_terminal(tmp_path, capsys):
    fit(tmp_path)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    rows = [line.split() for line in text.splitlines()]
    assert ["domain", "bytes", "dense", "koff", "koff/dense", "memory", "off", "swapped"] in rows
    (law,) = [row for row in rows if row[:1] == ["law"]]
    assert law[1] == "160" and float(law[4]) == pytest.approx(float(law[3]) / float(law[2]), abs=1e-3)
    assert "of body" in text and "active (with one memory)" in text and "results.json" in text


def test_what_is_set_and_does_nothing_is_told_before_the_first_step(tmp_path, capsys):
    fit(tmp_path, steps=1, loss=LossSpec(kl=0.0, top_k=5, tail="bucket"))
    lines = capsys.readouterr().out.splitlines()
    assert "set, but without effect: model.loss.top_k 5 (loss.kl is 0), model.loss.tail bucket (loss.kl is 0)" in lines


def test_scoring_leaves_modes_and_random_state_alone(tmp_path):
    class Check(Callback):
        def on_train_end(self, trainer, pl_module):
            pl_module.model.gates.train()
            before = torch.get_rng_state(), [part.training for part in pl_module.modules()]
            score(trainer, pl_module)
            assert torch.equal(before[0], torch.get_rng_state())
            assert before[1] == [part.training for part in pl_module.modules()]
            assert not any(p.grad is not None for p in pl_module.model.backbone.parameters() if not p.requires_grad)

    fit(tmp_path, Check())


def test_the_mask_is_hardened_before_scoring_wherever_the_report_stands(tmp_path):
    trainer = tiny_trainer(tmp_path, [RunReport()], steps=5)
    trainer.callbacks[-1].fractions = {"warmup": 0.2, "ramp": 0.4, "hold": 0.4}  # nothing left to consolidate
    trainer.fit(tiny_module(tmp_path), RandomText())
    assert read(tmp_path)["sparsity"]["hardened"]


@pytest.mark.parametrize(("limit", "batches"), [(1.0, 4), (0.6, 2), (3, 3), (9, 4)])
def test_scoring_shows_how_far_it_is_and_scores_what_koff_test_would(tmp_path, monkeypatch, capsys, limit, batches):
    monkeypatch.setattr(report_module, "LINE_SECONDS", -1.0)
    trainer = tiny_trainer(tmp_path, [RunReport()], steps=2)
    trainer.limit_test_batches = limit
    trainer.fit(tiny_module(tmp_path), RandomText())
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("scor")]
    assert said[0] == "scoring held-out text: dense, koff, memory_off, swapped"
    assert said[1:] == [f"scored {number} of {batches} batches" for number in range(1, batches + 1)]


def test_a_run_stopped_early_says_so(tmp_path, capsys):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 3

    fit(tmp_path, Stop())
    assert not read(tmp_path)["sparsity"]["hardened"]
    assert "before its mask was fixed" in capsys.readouterr().out


def test_without_a_mask_there_are_no_sparsity_plots_nor_those_of_a_run_before(tmp_path, drawn):
    (tmp_path / "plots").mkdir()
    for name in ("sparsity.png", "sparsity_by_layer.svg"):
        (tmp_path / "plots" / name).touch()
    fit(tmp_path, sparsity=SparsitySpec(target=0.0, min_channels=4))
    assert drawn == ["bits_per_byte"]
    assert not list((tmp_path / "plots").iterdir())


def test_a_shared_memory_is_stored_once_and_cannot_be_swapped(tmp_path):
    fit(tmp_path, shared_memory=True)
    size = read(tmp_path)["parameters"]
    assert size["stored"] == size["active"]
    assert read(tmp_path)["mean"]["swapped_bpb"] is None
    assert not (tmp_path / "documents.json").exists()  # its text has no documents


def test_a_domain_without_text_has_no_figure(tmp_path):
    module = tiny_module(tmp_path)
    trainer = tiny_trainer(tmp_path, [RunReport()], limit_test_batches=1)
    trainer.fit(module, RandomText())
    figures = read(tmp_path)
    assert figures["domains"]["law"]["koff_bpb"] is None
    assert figures["mean"]["koff_bpb"] == figures["domains"]["en"]["koff_bpb"]


def test_a_full_disk_is_one_line_after_the_table(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(KoffError, match=r"^cannot write .*results\.json: No space left on device$"):
        fit(tmp_path)
    assert "koff/dense" in capsys.readouterr().out
    assert not [file for file in tmp_path.iterdir() if file.suffix == ".part"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomically(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "write_text", lambda self, *_, **__: (self.touch(), (_ for _ in ()).throw(OSError(28, "full")))
        )
        with pytest.raises(KoffError, match="full"):
            write_atomically(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_resumed_run_goes_on_counting(tmp_path):
    checkpoint = ModelCheckpoint(
        tmp_path, filename="half", every_n_train_steps=4, save_top_k=-1, save_on_train_epoch_end=False
    )

    def go(steps, path=None):
        trainer = tiny_trainer(tmp_path, [RunReport(), checkpoint], steps=steps, enable_checkpointing=True)
        trainer.fit(tiny_module(tmp_path), RandomText(batches=4), ckpt_path=path)
        return next(c for c in trainer.callbacks if isinstance(c, RunReport))

    go(4)
    whole = go(8, tmp_path / "half.ckpt")
    assert read(tmp_path)["tokens"] == 8 * 2 * 11
    assert [point["step"] for point in whole.history.points] == list(range(1, 9))


def test_history_is_thinned_evenly(tmp_path):
    module = tiny_module(tmp_path)
    module.configure_model()
    history = MaskHistory()
    for step in range(1, 1001):
        history.record(step, module)
        history.record(step, module)  # a second micro-batch of the same step
    steps = [point["step"] for point in history.points]
    assert MOST / 2 <= len(steps) <= MOST
    assert len({b - a for a, b in pairwise(steps)}) == 1
    again = MaskHistory()
    again.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert again.points == history.points and again.every == history.every


def test_test_prints_the_same_table(tmp_path, capsys):
    trainer = tiny_trainer(tmp_path, [RunReport()])
    trainer.test(tiny_module(tmp_path), RandomText(), verbose=False)
    assert "koff/dense" in capsys.readouterr().out
    assert not (tmp_path / "results.json").exists()


def test_predictions_are_written_a_line_each(tmp_path):
    trainer = tiny_trainer(tmp_path, [RunReport()])
    trainer.predict(tiny_module(tmp_path), RandomText(), return_predictions=False)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row["domain"] for row in rows] == ["en", "en", "law", "law"] * 2
    assert all(row["bits_per_byte"] > 0 for row in rows)


@pytest.mark.filterwarnings("ignore:The ..compute.. method of metric")  # one batch has one domain
def test_fast_dev_run_writes_nothing(tmp_path):
    trainer = tiny_trainer(tmp_path, [RunReport()], fast_dev_run=True)
    trainer.fit(tiny_module(tmp_path), RandomText())
    assert not (tmp_path / "results.json").exists()


def test_final_scores_reach_every_logger(tmp_path):
    loggers = [CSVLogger(tmp_path, name="", version="csv"), TensorBoardLogger(tmp_path, name="", version="board")]
    report = RunReport()
    tiny_trainer(tmp_path, [report], logger=loggers).fit(tiny_module(tmp_path), RandomText())
    expected = {"test/dense_bpb": report.results["mean"]["dense_bpb"]}
    expected |= {f"test/koff_bpb/{name}": row["koff_bpb"] for name, row in report.results["domains"].items()}
    with (tmp_path / "csv" / "metrics.csv").open(newline="", encoding="utf-8") as lines:
        last = [row for row in csv.DictReader(lines) if row["test/dense_bpb"]][-1]
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    for name, value in expected.items():
        assert float(last[name]) == pytest.approx(value)
        assert [scalar.step for scalar in board.Scalars(name)] == [7], "of the last step, which counts from 0"
        assert board.Scalars(name)[0].value == pytest.approx(value)


def test_an_interrupted_run_names_its_checkpoint(tmp_path, capsys):
    class Fail(Callback):
        def on_train_batch_start(self, trainer, *_):
            if trainer.global_step == 3:
                raise KoffError("broken")

    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_last=True)
    trainer = tiny_trainer(tmp_path, [RunReport(), checkpoint, Fail()], enable_checkpointing=True)
    with pytest.raises(KoffError, match="broken"):
        trainer.fit(tiny_module(tmp_path), RandomText())
    assert f"--ckpt_path {tmp_path / 'last.ckpt'}" in capsys.readouterr().out
    with pytest.raises(KoffError, match="broken"):
        tiny_trainer(tmp_path, [RunReport(), Fail()]).fit(tiny_module(tmp_path), RandomText())
    assert "no checkpoint had been saved" in capsys.readouterr().out


def test_held_out_text_is_asked_for_before_the_run(tmp_path):
    with pytest.raises(KoffError, match="datamodule"):
        batches = RandomText().train_dataloader()
        tiny_trainer(tmp_path, [RunReport()]).fit(tiny_module(tmp_path, kv=None), batches, batches)


class TrainingAlone(LightningDataModule):
    """Data of one's own, without a test_dataloader."""

    def train_dataloader(self):
        return RandomText().train_dataloader()

    def val_dataloader(self):
        return RandomText().val_dataloader()


class Unbounded(TrainingAlone):
    def test_dataloader(self):
        return iter(RandomText().test_dataloader())


class WithoutBytes(TrainingAlone):
    def test_dataloader(self):
        return Batches([{k: v for k, v in b.items() if k != "num_bytes"} for b in RandomText().test_dataloader()])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (TrainingAlone, "there is no TrainingAlone.test_dataloader: write one"),
        (Unbounded, "Unbounded.test_dataloader must give a loader of known length"),
        (WithoutBytes, "each batch a dictionary with .*; the first batch has no num_bytes"),
    ],
)
def test_what_cannot_be_scored_at_the_end_is_told_before_the_run(tmp_path, data, said):
    module = tiny_module(tmp_path, kv=None)
    module.training_step = lambda *_: pytest.fail("it trains")
    with pytest.raises(KoffError, match=said):
        tiny_trainer(tmp_path, [RunReport()]).fit(module, data())


@pytest.mark.parametrize(("rank", "kept"), [(0, 12), (1, 0)])
def test_tokens_of_all_ranks_are_saved_and_counted_on_from_by_the_first(monkeypatch, rank, kept):
    """Ranks predict different numbers of tokens, and a checkpoint is read by all of them."""
    report = RunReport()
    report._tokens = torch.tensor(5)
    monkeypatch.setattr("koff_lightning.support.ranks.gather", lambda mine: [mine, 7])
    state = report.state_dict()
    assert state["tokens"] == 12
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", rank)
    report.load_state_dict(state)
    assert report._tokens == kept


def test_an_arm_without_a_figure_in_one_domain_has_no_mean():
    """Over the domain that is left it would be set beside the others' mean over both; a domain without text is none."""
    held_out = {
        "en": {"dense": 1.0, "koff": 1.1, "memory_off": 1.2, "swapped": 1.3},
        "de": {"dense": 2.0, "koff": math.nan, "memory_off": math.inf, "swapped": 2.3},
        "fr": dict.fromkeys(("dense", "koff", "memory_off", "swapped"), math.nan),
    }
    found = results.held_out_figures(held_out, {"en": 10, "de": 10, "fr": 0}, {"en": 5, "de": 5, "fr": 0}, 3)
    mean = {name: value for name, value in found["mean"].items() if name.endswith("_bpb")}
    assert mean == {"dense_bpb": 1.5, "koff_bpb": None, "memory_off_bpb": None, "swapped_bpb": pytest.approx(1.8)}
    assert found["mean"]["koff_ppl"] is None and found["mean"]["dense_ppl"] == pytest.approx((2**2 + 2**4) / 2)
    assert results.table(found | {"general": None}).row_count == 4


def test_documents_of_an_earlier_run_do_not_stay_beside_a_later_one(tmp_path):
    row = {"nats": [1.0], "bytes": [2.0], "nats_by_context": [[1.0]] * 4, "tokens": [[1]] * 4}
    figures = {"domains": {"de": {"koff_bpb": 1.0}}, "general": {"texts": {"web": {"koff_bpb": 1.0}}}}
    results.write_documents(tmp_path, {"de": {"koff": row}, "general/web": {"koff": row}}, figures)
    assert {path.name for path in tmp_path.iterdir()} == {"documents.json", "general_documents.json"}
    results.write_documents(tmp_path, {"de": {"koff": row}}, {"domains": figures["domains"]})
    assert {path.name for path in tmp_path.iterdir()} == {"documents.json"}, "this run had no general text"
