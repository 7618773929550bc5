"""Retention: general text in every so-manyth step, under a memory drawn at random (eq. 2 of the KOFF paper)."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from test_teacher import DOMAINS, SIZES, K, words
from tiny_models import tiny_model
from toy_text import toy_documents, toy_tokenizer, write_jsonl

from koff_lightning import DomainDataModule, KoffError, KOFFModule, KVSpec, LoraSpec, LossSpec, SparsitySpec
from koff_lightning.callbacks import AnnealSparsity, GradientCoverage, RunReport
from koff_lightning.cli import main
from koff_lightning.data.loader import HeldoutLoader
from koff_lightning.decomposition import Decomposition
from koff_lightning.specs.training import RetentionSpec
from koff_lightning.training import recomputation, retention
from koff_lightning.training.settled import settled

STEPS, EVERY = 20, 3
PHASES = {"warmup": 0.2, "ramp": 0.3, "hold": 0.1}  # steps 0-3, 4-9, 10-11; hardened from 12
DUE = [2, 5, 8, 11, 14, 17]
LEARNS = [5, 8, 11]  # of these the steps in which a mask is learned


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KOFF_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama with a tokenizer, text of two domains and two kinds of general text."""
    path = tmp_path_factory.mktemp("general")
    toy_tokenizer(path / "model")
    tiny_model("llama", **SIZES).save_pretrained(path / "model")
    for i, name in enumerate((*DOMAINS, "web", "sums")):
        write_jsonl(path / f"{name}.jsonl", toy_documents(30, seed=i, longest=30))
    return path


def text(folder, general=("web", "sums"), **options):
    files = {name: str(folder / f"{name}.jsonl") for name in (*DOMAINS, *general)}
    more = {name: files.pop(name) for name in general}
    defaults = {"seq_len": 16, "batch_size": 4, "heldout_fraction": 0.2}
    return DomainDataModule(files, retention=more or None, **defaults | options)


def module(folder, spec=RetentionSpec(EVERY), **options):  # noqa: B008
    torch.manual_seed(0)
    parts = {"lora": LoraSpec(rank=2), "kv": KVSpec(slots=4), "sparsity": SparsitySpec(target=0.2, min_channels=4)}
    return KOFFModule(str(folder / "model"), domains=list(DOMAINS), retention=spec, **parts | options)


class Retained(Logger):
    """Keeps what is logged of general text, by step."""

    name = version = "retained"

    def __init__(self):
        super().__init__()
        self.seen = {}

    def log_metrics(self, metrics, step=None):
        if "train/retention" in metrics:
            self.seen[step] = metrics

    def log_hyperparams(self, *_, **__):
        pass


class Recorder(Callback):
    """After every optimizer step: what was logged, and all that is trained."""

    def __init__(self):
        self.logged, self.values = {}, {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step - 1
        self.logged[step] = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")}
        self.logged[step] |= trainer.logger.seen.get(step, {})
        self.values[step] = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}


def trainer(*callbacks, steps=STEPS, **options):
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[AnnealSparsity(**PHASES), *callbacks],
        limit_val_batches=0,
        logger=Retained(),
        log_every_n_steps=1,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
        **options,
    )


def fit(folder, *callbacks, data=None, resume=None, running=None, **options):
    seen, model = Recorder(), module(folder, **options)
    run = trainer(*callbacks, seen, **running or {})
    run.fit(model, data or text(folder), ckpt_path=resume, weights_only=True)
    return model, seen


@pytest.fixture(scope="module")
def plain(folder):
    """What a run without general text recorded."""
    return fit(folder, spec=None, data=text(folder, general=()))[1]


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """What a run with general text recorded, and its checkpoint after 7 steps."""
    path = tmp_path_factory.mktemp("whole")
    _, run = fit(folder, ModelCheckpoint(path, "{step}", save_top_k=-1, every_n_train_steps=7))
    return run, path / "step=7.ckpt"


@pytest.fixture
def taken(monkeypatch):
    """What the steps took of general text: (step, number of the micro-batch, memory of the rows)."""
    found = []
    original = retention.general_text

    def noted(trainer, every, step, batch_idx):
        batch = original(trainer, every, step, batch_idx)
        found.append((step, batch["input_ids"]))
        return batch

    monkeypatch.setattr(retention, "general_text", noted)
    return found


# ----------------------------------------------------------------------------------------------- when, and of what


def test_what_general_text_holds_counts_where_activations_may_be_kept(folder, monkeypatch):
    steps = []
    monkeypatch.setattr(recomputation, "_at_most", lambda step: steps.append(step) or 0)
    monkeypatch.setattr(recomputation, "free_memory", lambda _: 2**40)
    spec = RetentionSpec(EVERY, updates="both")
    fit(folder, spec=spec, activation_checkpointing="auto", running={"steps": 4})
    assert [step.retention for step in steps] == [spec]


@pytest.mark.parametrize(("updates", "steps"), [("mask", LEARNS), ("both", DUE)])
def test_general_text_is_taken_in_every_third_step_that_it_can_move_something_in(folder, taken, updates, steps):
    _, run = fit(folder, GradientCoverage(), spec=RetentionSpec(EVERY, updates=updates))
    assert [step for step, _ in taken] == steps
    assert [step for step, logged in run.logged.items() if "train/retention" in logged] == steps


def test_a_step_that_takes_none_is_the_step_without_retention(plain, whole):
    run, _ = whole
    for step in range(LEARNS[0]):
        assert run.logged[step] == plain.logged[step]
        assert all(torch.equal(value, plain.values[step][name]) for name, value in run.values[step].items())


def test_rows_follow_each_other_through_all_of_the_general_text(folder, taken):
    data = text(folder)
    fit(folder, data=data, spec=RetentionSpec(1, updates="both"))
    packed = data.general._train.values()
    # Without the first token, in whose place the start token may stand.
    rows = {tuple(row[1:]) for part in packed for row in part.tokens.tolist()}
    seen = Counter(tuple(row[1:]) for _, ids in taken for row in ids.tolist())
    assert len(taken) == STEPS
    assert set(seen) <= rows
    assert len(seen) == min(len(rows), sum(seen.values())), "no row twice before all were there"


def test_each_micro_batch_of_a_step_has_its_own(folder, taken):
    fit(folder, spec=RetentionSpec(EVERY), running={"accumulate_grad_batches": 2})
    assert [step for step, _ in taken] == [step for step in LEARNS for _ in "12"]
    assert all(not torch.equal(one, other) for (_, one), (_, other) in zip(taken[::2], taken[1::2], strict=True))


@pytest.mark.parametrize(("every", "many"), [(1, 1), (3, 1), (3, 2)])
def test_micro_batches_are_read_one_behind_the_other_without_a_gap(every, many):
    asked = []
    general = SimpleNamespace(batch_number=asked.append)
    strategy = SimpleNamespace(batch_to_device=lambda batch: batch)
    run = SimpleNamespace(accumulate_grad_batches=many, datamodule=SimpleNamespace(general=general), strategy=strategy)
    for step in filter(RetentionSpec(every).is_due, range(12)):
        for micro in range(many):
            retention.general_text(run, every, step, many * step + micro)
    assert asked == list(range(12 // every * many))


def test_the_memory_is_drawn_evenly_and_by_the_seed_alone():
    domains = ["a", "b", "c"]

    def drawn(seed):
        model = SimpleNamespace(domains=domains, gates=SimpleNamespace(seed=torch.tensor(seed)))
        return [retention.drawn(model, step) for step in range(3000)]

    counts = Counter(drawn(1))
    assert all(abs(counts[name] - 1000) < 4 * (3000 * 2 / 9) ** 0.5 for name in domains)
    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize("domains", [2, 4, 6, 8])
def test_the_few_draws_of_a_short_run_are_as_even_as_chance_has_them(domains):
    """Of 15 draws by each of 400 seeds: chi squared against even shares, whose mean is its degrees of freedom."""
    names = [str(number) for number in range(domains)]

    def unevenness(seed):
        model = SimpleNamespace(domains=names, gates=SimpleNamespace(seed=torch.tensor(seed)))
        counts = Counter(retention.drawn(model, step) for step in range(19, 300, 20))
        return sum((counts[name] - 15 / domains) ** 2 for name in names) * domains / 15

    mean = sum(map(unevenness, range(400))) / 400
    assert abs(mean - (domains - 1)) < 4 * (2 * (domains - 1) / 400) ** 0.5


# ----------------------------------------------------------------------------------------------- what it computes


class Gradients(Callback):
    """Gradients of one step, before the optimizer takes them."""

    def __init__(self, step):
        self.step, self.found = step, {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == self.step:
            parts = pl_module.named_parameters()
            self.found = {name: p.grad.clone() for name, p in parts if p.requires_grad and p.grad is not None}


def gradients(folder, spec, step=5, general=("web", "sums"), **options):
    seen = Gradients(step)
    model, run = fit(folder, seen, spec=spec, data=text(folder, general), running={"steps": STEPS}, **options)
    return model, seen.found, run


def by_itself(monkeypatch, seen):
    """Notes the gradient of the loss on general text as plain autograd gives it, in the state of its step."""

    def noted(loss, inputs, scale):
        seen.append((inputs, torch.autograd.grad(loss, inputs, retain_graph=True)))
        return settled(loss, inputs, scale)

    monkeypatch.setattr(retention, "settled", noted)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("updates", ["mask", "both"])
def test_the_step_is_the_gradient_of_the_whole_equation(folder, updates, checkpointing, monkeypatch):
    """Of eq. 1 as it is without retention, plus mu times that of eq. 2: of the mask, and of the drawn memory or not."""
    spec, options = RetentionSpec(6, 0.7, updates), {"activation_checkpointing": checkpointing}
    _, without, plain = gradients(folder, None, general=(), **options)
    by_itself(monkeypatch, general := [])
    model, found, run = gradients(folder, spec, **options)
    names, drawn = {p: name for name, p in model.named_parameters()}, retention.drawn(model.model, 5)
    added = {names[p]: slope for p, slope in zip(*general[0], strict=True)}
    own = {name for name in found if f".koff_{drawn}" in name} if updates == "both" else set()
    assert added.keys() == {"model.gates.logits"} | own
    for name, slope in found.items():
        torch.testing.assert_close(slope, without[name] + 0.7 * added.get(name, torch.zeros(())), rtol=1e-4, atol=1e-7)
    assert sum(bool(slope.any()) for slope in added.values()) > len(added) / 3  # of LoRA's A it is zero while B is
    value = plain.logged[5]["train/loss"] + 0.7 * run.logged[5]["train/retention"]
    assert run.logged[5]["train/loss"] == pytest.approx(value)


def test_settled_is_the_gradient_of_the_loss_by_its_inputs_alone():
    a, b = torch.randn(5, requires_grad=True), torch.randn(5, requires_grad=True)
    unused = torch.randn(2, requires_grad=True)
    found = 3 * settled((a * b.exp()).square().sum(), [a, unused], scale=1024.0)
    (found + b.sum()).backward()
    torch.testing.assert_close(a.grad, 6 * a.detach() * b.detach().exp().square())
    assert torch.equal(b.grad, torch.ones(5))
    assert unused.grad is None


def test_mask_only_leaves_memories_as_the_domains_alone_move_them(folder, plain):
    """In the one step that takes general text, from the same state."""
    _, run = fit(folder, spec=RetentionSpec(6))
    for name, value in run.values[5].items():
        assert torch.equal(value, plain.values[5][name]) == (name != "model.gates.logits")


def test_with_memories_off_general_text_has_none(folder, monkeypatch):
    seen = []
    original = Decomposition.hidden
    monkeypatch.setattr(
        Decomposition, "hidden", lambda self, b: (seen.append(self.memories.routes.names), original(self, b))[1]
    )
    _, run = fit(folder, joint=False, spec=RetentionSpec(EVERY, updates="both"), loss=LossSpec(kl=0.0))
    assert [step for step, logged in run.logged.items() if "train/retention" in logged] == [5, 8, 11, 14, 17]
    assert not any(seen[:15])  # 12 steps on the domains' rows, 3 on general text


# ------------------------------------------------------------------------------------------- going on, stored teacher


@pytest.mark.parametrize("updates", ["mask", "both"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_that_goes_on_is_the_one_that_was_not_cut(folder, tmp_path, updates, accumulate):
    spec, running = RetentionSpec(EVERY, updates=updates), {"accumulate_grad_batches": accumulate}
    savers = [ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, every_n_train_steps=7) for name in "ab"]
    _, whole = fit(folder, savers[0], spec=spec, running=running)
    _, rest = fit(folder, savers[1], spec=spec, running=running, resume=tmp_path / "a" / "step=7.ckpt")
    assert list(rest.values) == list(range(7, STEPS))
    for step, values in rest.values.items():
        assert rest.logged[step] == whole.logged[step]
        assert all(torch.equal(value, whole.values[step][name]) for name, value in values.items())


@pytest.mark.parametrize(
    ("spec", "general", "message"),
    [
        (RetentionSpec(4), ("web", "sums"), "keeps its course, but retention.every is 3 there and 4 here"),
        (None, (), "keeps its course, but retention is "),
        (RetentionSpec(EVERY), ("web",), "the general text of this run is not the checkpoint's"),
    ],
)
def test_a_run_goes_on_with_the_same_retention_only(folder, whole, tmp_path, spec, general, message):
    path = shutil.copy(whole[1], tmp_path / "step=7.ckpt")
    again = ModelCheckpoint(tmp_path / "b", "{step}", save_top_k=-1, every_n_train_steps=7)
    with pytest.raises(KoffError, match=message):
        fit(folder, again, spec=spec, data=text(folder, general), resume=path)


def test_general_text_has_a_stored_teacher_too(folder, monkeypatch, capsys):
    general = {"data.retention": f"{{web: {folder}/web.jsonl, sums: {folder}/sums.jsonl}}"}
    assert main(["prepare", *words(folder, **general), "--model.retention.every=3", "--teacher"]) == 0
    said = capsys.readouterr().out
    assert "retention web: tokenised" in said
    assert "teacher of retention sums: stored" in said
    live, stored = (LossSpec(0.0, top_k=K, teacher=kind) for kind in ("live", "stored"))
    spec = RetentionSpec(EVERY, updates="both")
    _, expected = fit(folder, spec=spec, loss=live, sparsity=SparsitySpec(target=0.0))
    monkeypatch.setattr(Decomposition, "dense_hidden", lambda *_: pytest.fail("a teacher pass that nobody needs"))
    _, run = fit(folder, spec=spec, loss=stored, sparsity=SparsitySpec(target=0.0))
    for step in DUE:
        assert run.logged[step]["train/retention"] == pytest.approx(expected.logged[step]["train/retention"], rel=2e-3)


def test_the_command_trains_with_general_text(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    general = {"data.retention.web": folder / "web.jsonl", "data.max_retention_bytes": 900}
    options = words(folder, **general, **{"model.retention.every": 1, "trainer.max_steps": 3})
    options += ["--trainer.accelerator=cpu", "--export.enabled=false", "--trainer.default_root_dir=run"]
    options += ["--trainer.log_every_n_steps=1", "--model.retention.updates=both", "--model.sparsity.min_channels=4"]
    assert main(["fit", *options]) == 0
    assert "train/retention" in (tmp_path / "run" / "version_0" / "metrics.csv").read_text().splitlines()[0]


# ------------------------------------------------------------------------------------------------------- its scores


def scored(folder, root, *, general=("web", "sums"), spec=None, running=None, **options):
    """Fit with a report in `root`: the model, its data, results and documents."""
    model, data = module(folder, spec, **options), text(folder, general)
    trainer(RunReport(), steps=3, default_root_dir=root, **running or {}).fit(model, data)
    read = {name: root / f"{name}.json" for name in ("results", "documents", "general_documents")}
    return model, data, {name: json.loads(path.read_text()) if path.exists() else None for name, path in read.items()}


def by_hand(model, rows, memory_of_row):
    """Bits per byte of held-out rows, each under the memory that `memory_of_row` names."""
    batches = list(HeldoutLoader({"x": rows}, 4))
    with torch.no_grad():
        nats = sum(model._nats(b, [memory_of_row(r) for r in b["labels"]], model.hard_gates()).sum() for b in batches)
    return float(nats) / math.log(2) / int(sum(b["num_bytes"].sum() for b in batches))


def test_general_text_is_scored_bare_and_under_all_memories(folder, tmp_path, capsys, caplog):
    module_, data, found = scored(folder, tmp_path)
    assert "general text (data.retention) is scored and part of no step" in caplog.text
    said = capsys.readouterr().out
    model, figures = module_.model.eval(), found["results"]["general"]
    assert figures["texts"].keys() == {"web", "sums"} and found["results"]["domains"].keys() == set(DOMAINS)
    for name, rows in data.general._heldout.items():
        row = figures["texts"][name]
        assert row["koff_bpb"] is None and row["koff_ppl"] is None
        assert row["memory_off_bpb"] == pytest.approx(by_hand(model, rows, lambda _: None), rel=1e-5)
        drawn = by_hand(model, rows, lambda labels: DOMAINS[int(labels.clamp(min=0).sum()) % len(DOMAINS)])
        assert row["swapped_bpb"] == pytest.approx(drawn, rel=1e-5)
        kept = found["general_documents"][name]
        assert sum(kept["bytes"]) == figures["heldout_bytes"][name] == sum(b["num_bytes"].sum() for b in batches(rows))
        bits = {arm: sum(nats) / math.log(2) / sum(kept["bytes"]) for arm, nats in kept["nats"].items()}
        assert bits == pytest.approx({arm: row[f"{arm}_bpb"] for arm in ("dense", "memory_off", "swapped")})
    assert figures["mean"]["dense_bpb"] == pytest.approx(sum(r["dense_bpb"] for r in figures["texts"].values()) / 2)
    assert found["documents"].keys() == set(DOMAINS)
    (shown,) = (line.split() for line in said.splitlines() if "general/sums" in line)
    sums = figures["texts"]["sums"]
    assert shown[2:] == [
        f"{sums['dense_bpb']:.4f}",
        "-",
        "-",
        *(f"{sums[k]:.4f}" for k in ("memory_off_bpb", "swapped_bpb")),
    ]


def batches(rows):
    return list(HeldoutLoader({"x": rows}, 4))


def test_the_domains_are_scored_as_without_general_text(folder, tmp_path):
    _, _, one = scored(folder, tmp_path / "a")
    _, _, other = scored(folder, tmp_path / "b", general=())
    assert other["general_documents"] is None and "general" not in other["results"]
    same = ("domains", "mean", "heldout_bytes", "heldout_tokens", "by_context")
    assert {key: one["results"][key] for key in same} == {key: other["results"][key] for key in same}
    assert one["documents"] == other["documents"]


@pytest.mark.parametrize(
    ("options", "alike"),
    [
        ({"lora": None, "kv": None}, True),  # no memory
        ({"shared_memory": True}, False),  # one for all, which is another's to general text
    ],
)
def test_general_text_where_there_are_fewer_than_two_memories(folder, tmp_path, options, alike):
    model, data, found = scored(folder, tmp_path, **options)
    assert found["results"]["mean"]["swapped_bpb"] is None
    for name, row in found["results"]["general"]["texts"].items():
        one = by_hand(model.model.eval(), data.general._heldout[name], lambda _: DOMAINS[0])
        assert row["swapped_bpb"] == (None if alike else pytest.approx(one, rel=1e-5))
        bare = by_hand(model.model, data.general._heldout[name], lambda _: None)
        assert row["memory_off_bpb"] == pytest.approx(bare, rel=1e-5)
        assert math.isclose(bare, one, rel_tol=1e-6) == alike
    own = batches(data._heldout[DOMAINS[1]])[0] | {"domains": [DOMAINS[1]] * 4}
    assert torch.equal(model.model.token_nats(own, "swapped"), model.model.token_nats(own, "koff"))


def test_validation_and_prediction_read_the_domains_alone(folder):
    data = text(folder, tokenizer=str(folder / "model"))
    data.setup()
    loaders = {"val": data.val_dataloader(), "predict": data.predict_dataloader(), "test": data.test_dataloader()}
    names = {kind: {name for batch in loader for name in batch["domains"]} for kind, loader in loaders.items()}
    assert names["val"] == names["predict"] == set(DOMAINS)
    assert names["test"] == {*DOMAINS, "general/web", "general/sums"}


@pytest.mark.parametrize("ranks", [3, 5, 7])
def test_ranks_come_to_general_text_together(folder, ranks):
    """Sharded models take each forward together, and a batch of general text takes one less."""
    data = text(folder, tokenizer=str(folder / "model"))
    data.setup()
    general = {f"general/{name}": rows for name, rows in data.general._heldout.items()}
    loaders = [HeldoutLoader(data._heldout, 4, rank, ranks, general=general) for rank in range(ranks)]
    kinds = [[batch["domains"][0].startswith("general/") for batch in loader] for loader in loaders]
    assert all(kind == kinds[0] for kind in kinds) and sorted(kinds[0]) == kinds[0]
    assert [len(loader) for loader in loaders] == [len(kinds[0])] * ranks
    whole = data.test_dataloader()
    for key in ("num_bytes", "document_bytes"):
        assert sum(b[key].sum() for loader in loaders for b in loader) == sum(b[key].sum() for b in whole)
    assert sum(len(kind) for kind in kinds) > len(whole)  # some were blank


def test_the_test_command_scores_other_general_text(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    options = words(folder, **{"trainer.max_steps": 3})
    options += ["--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", "--model.sparsity.min_channels=4"]
    assert main(["fit", *options, "--export.enabled=false", "--trainer.default_root_dir=run"]) == 0
    (checkpoint,) = (tmp_path / "run").rglob("last.ckpt")
    capsys.readouterr()
    more = [f"--data.retention.web={folder}/web.jsonl", f"--ckpt_path={checkpoint}"]
    assert main(["test", *options, *more]) == 0
    assert "general/web" in capsys.readouterr().out
    assert main(["export", f"--ckpt={checkpoint}", "--out=art"]) == 0
    results = json.loads(Path("run/results.json").read_text())
    for name, row in results["domains"].items():
        cells = [
            f"{results['heldout_bytes'][name]:,}",
            *(f"{row[arm]:.4f}" for arm in ("dense_bpb", "koff_bpb", "memory_off_bpb")),
        ]
        assert f"| {name} | {' | '.join(cells)} |" in Path("art/backbone/README.md").read_text()


def test_a_run_goes_on_with_other_text_that_is_only_scored(folder, tmp_path):
    savers = [ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, every_n_train_steps=7) for name in "ab"]
    fit(folder, savers[0], spec=None)
    web = text(folder, ("web",))
    _, rest = fit(folder, savers[1], spec=None, data=web, resume=tmp_path / "a" / "step=7.ckpt")
    assert list(rest.values) == list(range(7, STEPS))


def test_text_that_is_only_scored_needs_no_stored_teacher(folder, capsys):
    general = {"data.retention": f"{{web: {folder}/web.jsonl}}"}
    assert main(["prepare", *words(folder, **general), "--model.retention=null", "--teacher"]) == 0
    assert "teacher of retention" not in capsys.readouterr().out
    fit(folder, spec=None, loss=LossSpec(0.0, top_k=K, teacher="stored"))
    with pytest.raises(KoffError, match="no stored teacher"):
        fit(folder, spec=RetentionSpec(EVERY), loss=LossSpec(0.0, top_k=K, teacher="stored"))


# ----------------------------------------------------------------------------------------------------- bad input


def test_retention_without_text(folder):
    with pytest.raises(KoffError, match=r"there is none: name some in data\.retention, as in data\.domains, or set"):
        fit(folder, data=text(folder, general=()))


def test_a_validation_before_takes_nothing_from_a_fit(folder):
    spec = RetentionSpec(1, updates="both")
    data, model, run = text(folder), module(folder, spec), trainer(seen := Recorder(), steps=2)
    run.limit_val_batches = 1
    run.validate(model, data, verbose=False)
    run.fit(model, data)
    assert all(logged["train/retention"] > 0 for logged in seen.logged.values())
    assert len(seen.logged) == 2
    model = module(folder, None)
    run.validate(model, data, verbose=False)
    trainer(steps=2).fit(model, data)
    assert data.general._train


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "retention.every must be at least 1 step; got 0"),
        ({"weight": 0.0}, "retention.weight must be positive and finite; got 0.0"),
        ({"weight": float("inf")}, "retention.weight must be positive and finite; got inf"),
        ({"updates": "memory"}, "retention.updates must be mask or both; got 'memory'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(KoffError, match=message):
        RetentionSpec(**options)


def test_a_general_text_that_is_not_there_is_one_line(folder, capsys):
    general = {"data.retention.web": folder / "gone.jsonl", "model.retention.every": 2, "trainer.max_steps": 1}
    assert main(["fit", *words(folder, **general), "--trainer.accelerator=cpu", "--trainer.logger=false"]) == 2
    assert "no file matches" in capsys.readouterr().err.splitlines()[-1]


def test_a_limit_that_is_none(folder):
    with pytest.raises(KoffError, match="data.max_retention_bytes must be 1 or more"):
        text(folder, max_retention_bytes=0)
