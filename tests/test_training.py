"""Whole runs through Lightning's Trainer: phases, who moves when, resuming to the bit, checkpoints, what stops it."""

import copy
import math
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from tiny_cases import cut_model
from tiny_models import tiny_model
from tiny_run import Batches, RandomText
from toy_text import toy_documents, toy_tokenizer, write_jsonl

from koff_lightning import (
    DomainDataModule,
    KoffError,
    KOFFModule,
    KVSpec,
    LoraSpec,
    LossSpec,
    OptimSpec,
    SparsitySpec,
)
from koff_lightning.backbone import parameter_counts
from koff_lightning.callbacks import AnnealSparsity
from koff_lightning.decomposition import Decomposition
from koff_lightning.gates import BackboneGates
from koff_lightning.penalties import LagrangianPenalty
from koff_lightning.support import ranks
from koff_lightning.training import strategies
from koff_lightning.training.nonfinite import NonFiniteGuard

DOMAINS = ["en", "law"]
STEPS = 20
SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 24, "head_dim": 8}
PHASES = {"warmup": 0.2, "ramp": 0.3, "hold": 0.1}  # steps 0-3, 4-9, 10-11; hardened from 12


class Recorder(Callback):
    """Notes after every step what was in force in it, what was logged and where the trained tensors stand."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._phase = pl_module.phase

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        values = {name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad}
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        expected, target = float(pl_module.model.expected_sparsity().detach()), pl_module.model.target
        now = {"phase": self._phase, "hardened": bool(pl_module.model.gates.hardened)}
        self.steps.append(now | {"values": values, "logged": logged, "expected": expected, "target": target})

    def moved(self, name_part, steps):
        """Whether any tensor of that name moved in any of `steps` (the first step cannot tell)."""
        return any(
            not torch.equal(value, self.steps[step - 1]["values"][name])
            for step in steps
            for name, value in self.steps[step]["values"].items()
            if name_part in name
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama with a tokenizer, and text of two domains."""
    path = tmp_path_factory.mktemp("backbone")
    toy_tokenizer(path)
    tiny_model("llama", **SIZES).save_pretrained(path)
    for i, domain in enumerate(DOMAINS):
        write_jsonl(path / "text" / f"{domain}.jsonl", toy_documents(60, seed=i, longest=30))
    return path


def text(folder):
    files = {domain: str(folder / "text" / f"{domain}.jsonl") for domain in DOMAINS}
    return DomainDataModule(files, seq_len=16, batch_size=4, heldout_fraction=0.1)


def module(folder, **options):
    torch.manual_seed(0)
    sparsity = {"target": 0.2, "min_channels": 4} | options.pop("sparsity", {})
    defaults = {
        "domains": DOMAINS,
        "lora": LoraSpec(rank=2),
        "kv": KVSpec(slots=4),
        "sparsity": SparsitySpec(**sparsity),
    }
    return KOFFModule(str(folder), **defaults | options)


def saver(tmp_path, every):
    return ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=every)


def trainer(tmp_path, *callbacks, steps=STEPS, anneal=None, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
    }
    checkpointing = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=steps,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[AnnealSparsity(**anneal or PHASES), *callbacks],
        **quiet | {"enable_checkpointing": checkpointing} | options,
    )


def fit(folder, tmp_path, *callbacks, data=None, **options):
    """Run; returns the module and what was recorded."""
    recorder = Recorder()
    running = {
        key: options.pop(key) for key in ("steps", "anneal", "accumulate_grad_batches", "plugins") if key in options
    }
    model = module(folder, **options)
    trainer(tmp_path, recorder, *callbacks, **running).fit(model, data or text(folder))
    return model, recorder


# ---------------------------------------------------------------------------------------------- who moves when


@pytest.mark.parametrize("gate", ["hc", "ddp"])
def test_phases_come_in_order_and_the_mask_is_fixed_once(folder, tmp_path, monkeypatch, gate):
    hardened, ordered = [], []
    harden = Decomposition.harden
    monkeypatch.setattr(Decomposition, "harden", lambda self: (hardened.append(1), harden(self)))
    order = BackboneGates.order_by_prior
    monkeypatch.setattr(BackboneGates, "order_by_prior", lambda *args: (ordered.append(1), order(*args)))
    model, run = fit(folder, tmp_path, sparsity={"gate": gate})
    assert ordered == [1]
    assert [s["phase"] for s in run.steps] == ["warmup"] * 4 + ["ramp"] * 6 + ["hold"] * 2 + ["consolidate"] * 8
    assert hardened == [1]
    assert [s["hardened"] for s in run.steps] == [False] * 11 + [True] * 9, "after the twelfth step"
    assert not run.moved("gates.logits", range(1, 4))
    assert not run.moved("penalty.", range(1, 4))
    assert all(run.moved("gates.logits", [step]) for step in range(4, 12))
    assert all(run.moved("penalty.", [step]) for step in range(5, 12))
    assert not run.moved("gates.logits", range(12, STEPS)), "after hardening neither momentum nor gradient moves it"
    assert not run.moved("penalty.", range(12, STEPS))
    assert all(run.moved(part, [step]) for step in range(1, STEPS) for part in ("lora_B", "memories.kv"))
    budget = model.model.budget
    assert 0 <= 0.2 - budget.report(model.model.gates.kept)["body"] < 3 * 32 / budget.denominators["body"]


def test_what_is_trained_is_the_mask_the_multipliers_and_the_memories(folder, tmp_path):
    model, run = fit(folder, tmp_path, steps=1)
    kinds = ("model.gates.logits", "penalty.linear", "penalty.quadratic")
    layers = {f"{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")}
    names = set(run.steps[0]["values"])
    lora = {n for n in names if ".lora_A.koff_" in n or ".lora_B.koff_" in n}
    kv = {n for n in names if n.startswith("model.memories.kv.koff_")}
    assert names == {*kinds, *lora, *kv}
    assert len(lora) == 2 * 2 * 7 * 2  # layers, domains, linears, A and B
    assert len(kv) == 2 * 2 * 2  # layers, domains, key and value
    assert all(any(layer in n for n in lora) for layer in layers)
    optimized = {id(p) for group in model.trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimized == {id(p) for p in model.parameters() if p.requires_grad}
    frozen = tiny_model("llama", **SIZES)
    for name, value in frozen.state_dict().items():
        prefix, _, last = name.rpartition(".")
        own = dict(model.model.backbone.named_parameters())
        assert torch.equal(own.get(name, own.get(f"{prefix}.base_layer.{last}")), value)


class Scheduled(RandomText):
    """Training batches whose rows have given domains."""

    def __init__(self, *domains):
        super().__init__()
        self.rows = domains

    def train_dataloader(self):
        return Batches([self.batch(rows, seed) for seed, rows in enumerate(self.rows)])


class AdamStates(Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._phase = pl_module.phase

    def on_train_batch_end(self, trainer, pl_module, *_):
        state = trainer.optimizers[0].state
        self.steps.append({d: copy.deepcopy([state.get(p) for p in tensors(pl_module, d)]) for d in DOMAINS})


def tensors(model, domain):
    return model.model.memories.lora_parameters(domain) + model.model.memories.kv_parameters(domain)


def test_a_step_moves_only_the_domains_present(folder, tmp_path):
    both, alone = ["en", "law"], ["en", None]
    data, states = Scheduled(both, both, both, alone, alone, ["law", "law"], both), AdamStates()
    _, run = fit(folder, tmp_path, states, data=data, steps=7)
    for step in (3, 4):
        assert run.moved("koff_en", [step])
        assert not run.moved("koff_law", [step])
    assert run.moved("koff_law", [5])
    assert not run.moved("koff_en", [5])
    for before, after, absent in ((2, 4, "law"), (4, 5, "en")):
        for one, other in zip(states.steps[before][absent], states.steps[after][absent], strict=True):
            assert all(torch.equal(one[key], other[key]) for key in ("exp_avg", "exp_avg_sq", "step"))


@pytest.mark.parametrize("prior", ["fisher", "none"])
def test_two_stages_leave_the_memories_alone_until_the_mask_is_fixed(folder, tmp_path, prior):
    _, run = fit(folder, tmp_path, joint=False, sparsity={"prior": prior})
    assert not run.moved("koff_", range(1, 12))
    assert all(run.moved(f"koff_{domain}", [12]) for domain in DOMAINS)
    assert all(step["logged"]["train/kl"] == 0 for step in run.steps[:4]), "the student is the teacher, to the bit"
    assert all(step["logged"]["train/kl"] > 0 for step in run.steps[4:])


def test_dense_memory_runs_without_a_mask(folder, tmp_path):
    model, run = fit(folder, tmp_path, sparsity={"target": 0.0})
    assert not run.moved("gates.logits", range(1, STEPS))
    assert run.moved("koff_en", range(1, STEPS))
    assert model.model.gates.kept.all()
    assert model.draw_gates(2, 0) is None


@pytest.mark.parametrize(("prior", "hold"), [("fisher", 0.4), ("none", 0.4), ("fisher", None)])
def test_no_memory_runs_and_hardens_at_the_end(folder, tmp_path, prior, hold):
    anneal = {"warmup": 0.1, "ramp": 0.5, "hold": hold}
    model, run = fit(
        folder, tmp_path, saver(tmp_path, STEPS), lora=None, kv=None, anneal=anneal, sparsity={"prior": prior}
    )
    assert set(run.steps[0]["values"]) == {"model.gates.logits", "penalty.linear", "penalty.quadratic"}
    assert model.model.gates.hardened
    assert 0 <= 0.2 - model.model.budget.report(model.model.gates.kept)["body"] < 0.01
    saved = torch.load(tmp_path / f"step={STEPS}.ckpt", weights_only=True)["state_dict"]
    assert bool(saved["model.gates.hardened"]), "what is left on disk is the finished model"
    assert torch.equal(saved["model.gates.kept"], model.model.gates.kept)


def test_accumulated_batches_make_one_step(folder, tmp_path):
    model, run = fit(folder, tmp_path, accumulate_grad_batches=2, steps=10)
    assert [s["phase"] for s in run.steps] == ["warmup"] * 4 + ["ramp"] * 6 + ["hold"] * 2 + ["consolidate"] * 8
    assert not run.moved("gates.logits", range(12, 20))
    assert model.model.gates.hardened


def test_a_fixed_penalty_runs_and_still_ends_at_the_exact_budget(folder, tmp_path):
    model, run = fit(folder, tmp_path, sparsity={"penalty": "fixed", "weight": 3.0})
    assert run.moved("gates.logits", range(4, 12))
    assert 0 <= 0.2 - model.model.budget.report(model.model.gates.kept)["body"] < 0.01


# ------------------------------------------------------------------------------------------- what a run says


@pytest.mark.parametrize("gate", ["hc", "ddp"])
def test_every_step_logs_the_mask_and_sparsity_follows_the_ramp(folder, tmp_path, gate):
    _, run = fit(folder, tmp_path, sparsity={"gate": gate}, steps=60)
    names = {"sparsity/target", "sparsity/expected", "sparsity/realised", "penalty/linear", "penalty/quadratic"}
    names |= {"train/loss", "train/ce", "train/kl", "train/penalty"} | {"sparsity/temperature"}
    one_group = 0.03  # of the body: in a model this small a kv head more or less is a jump
    for step in run.steps:
        assert names <= set(step["logged"])
        assert step["logged"]["sparsity/target"] == pytest.approx(step["target"])
        if step["phase"] in ("ramp", "hold"):
            assert abs(step["expected"] - step["target"]) < 0.02 + one_group
    assert run.steps[-1]["logged"]["sparsity/realised"] == pytest.approx(0.2, abs=0.01)


def test_the_loss_is_the_equation(folder, tmp_path):
    _, run = fit(folder, tmp_path, loss=LossSpec(ce=0.5, kl=1.5))
    for logged in (step["logged"] for step in run.steps):
        data = 0.5 * logged["train/ce"] + 1.5 * logged["train/kl"]
        assert logged["train/loss"] == pytest.approx(data + logged["train/penalty"], rel=1e-5)


def test_without_kl_there_is_no_teacher(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Decomposition, "dense_hidden", lambda *_: pytest.fail("a teacher pass that nobody needs"))
    _, run = fit(folder, tmp_path, loss=LossSpec(kl=0.0), steps=6)
    assert run.steps[-1]["logged"]["train/kl"] == 0


def test_activation_checkpointing_recomputes_and_changes_nothing(folder, tmp_path):
    runs, calls = [], []
    for flag in (False, True):
        model, recorder, count = module(folder, activation_checkpointing=flag), Recorder(), []
        model.configure_model()
        model.model.backbone.model.layers[0].mlp.register_forward_pre_hook(lambda *_, count=count: count.append(1))
        trainer(tmp_path, recorder, steps=6).fit(model, text(folder))
        runs.append([step["logged"]["train/loss"] for step in recorder.steps])
        calls.append(len(count))
    assert calls[1] - calls[0] == 6, "one more forward of each layer in each step"
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)


def test_test_arms_are_the_dense_the_cut_and_the_swapped_model(folder, tmp_path):
    model, _ = fit(folder, tmp_path)
    batch = RandomText.batch(["en", "law", "en"], seed=3)
    nats = {arm: model.model.row_nats(batch, arm) for arm in ("dense", "koff", "memory_off", "swapped")}
    plain = tiny_model("llama", **SIZES).requires_grad_(False)

    def score(backbone):
        logits = backbone(batch["input_ids"], use_cache=False).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.mT, batch["labels"][:, 1:], reduction="none")
        return losses.sum(1)

    torch.testing.assert_close(nats["dense"], score(plain), rtol=1e-5, atol=1e-4)
    plain = cut_model(plain, model.model.gates.groups, model.model.gates.kept)
    torch.testing.assert_close(nats["memory_off"], score(plain), rtol=1e-5, atol=1e-4)
    assert parameter_counts(plain)["total"] == model.model.budget.kept_parameters(model.model.gates.kept)
    other = model.model.row_nats(batch | {"domains": ["law", "en", "law"]}, "koff")
    torch.testing.assert_close(nats["swapped"], other, rtol=1e-5, atol=1e-4)
    assert (nats["koff"] - nats["memory_off"]).abs().min() > 1e-3


def test_a_swapped_row_reads_one_of_the_other_memories_the_same_in_any_batch(folder):
    model = module(folder, domains=["en", "law", "med", "chat"])
    model.configure_model()
    domains = ["en", "law", None, "med", "chat"] * 8
    batch = RandomText.batch(domains, seed=5)
    chosen = model.model.another(batch)
    pairs = set(zip(domains, chosen, strict=True))
    assert pairs == {(a, b) for a in model.model.domains for b in model.model.domains if a != b} | {(None, None)}
    alone = [{key: value[i : i + 1] for key, value in batch.items()} for i in range(len(domains))]
    assert [model.model.another(row)[0] for row in alone] == chosen
    longer = torch.nn.functional.pad(batch["labels"], (0, 3), value=-100)  # padded as beside a longer row
    assert model.model.another(batch | {"labels": longer}) == chosen


# ------------------------------------------------------------------------------------- resuming, checkpoints


@pytest.mark.parametrize(
    ("at", "gate"),
    [(2, "hc"), (7, "hc"), (7, "ddp"), (15, "hc"), (15, "ddp")],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(folder, tmp_path, at, gate):
    """Interrupted in the warm-up, in mid-ramp and in the consolidation."""
    model, straight = fit(folder, tmp_path, saver(tmp_path, at), sparsity={"gate": gate})
    resumed, recorder = module(folder, sparsity={"gate": gate}), Recorder()
    torch.manual_seed(12345)  # the random state of another process
    path = tmp_path / f"step={at}.ckpt"
    again = trainer(tmp_path, recorder, saver(tmp_path / "again", at))
    again.fit(resumed, text(folder), ckpt_path=path, weights_only=True)
    assert len(recorder.steps) == STEPS - at
    for one, other in zip(recorder.steps, straight.steps[at:], strict=True):
        assert one["phase"] == other["phase"]
        assert one["logged"] == other["logged"]
        assert all(torch.equal(value, other["values"][name]) for name, value in one["values"].items())
    assert torch.equal(resumed.model.gates.kept, model.model.gates.kept)


class Rates(Callback):
    """Notes the rates of each step, by group."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.seen.append({group["name"]: group["lr"] for group in optimizer.param_groups})


def test_a_resumed_run_takes_the_rates_that_it_is_given(folder, tmp_path):
    """From its first step on, at the place of that step in their course."""
    old, new = OptimSpec(), OptimSpec(mask_lr=0.3, multiplier_lr=0.4, lora_lr=1e-5, kv_lr=2e-5, final=0.5)
    straight, resumed = Rates(), Rates()
    fit(folder, tmp_path, straight, optim=new)
    fit(folder, tmp_path, saver(tmp_path, 7), optim=old)
    again = trainer(tmp_path, resumed, saver(tmp_path / "again", 7))
    again.fit(module(folder, optim=new), text(folder), ckpt_path=tmp_path / "step=7.ckpt", weights_only=True)
    assert resumed.seen == straight.seen[7:]
    (course,) = (config.scheduler for config in again.lr_scheduler_configs)
    assert course.base_lrs == [0.3, 0.4, 1e-5, 2e-5]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """A checkpoint of a whole run, one of its mid-ramp, and the module."""
    path = tmp_path_factory.mktemp("finished")
    model, _ = fit(folder, path, saver(path, 4))
    return path / f"step={STEPS}.ckpt", path / "step=8.ckpt", model


def test_a_checkpoint_holds_what_was_trained_and_little_else(finished):
    checkpoint = torch.load(finished[0], weights_only=True)
    model, state = finished[2], checkpoint["state_dict"]
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    buffers = {n for n, _ in model.named_buffers() if n.startswith(("model.gates.", "model.memories."))}
    assert set(state) == trained | buffers
    assert not any(name.startswith("model.backbone.") and "lora_" not in name for name in state)
    assert checkpoint["koff"]["backbone_hash"] == model.model.backbone_hash
    backbone = parameter_counts(tiny_model("llama", **SIZES))
    assert sum(v.numel() for k, v in state.items() if k not in trained) < backbone["total"] / 10


def test_a_module_comes_back_from_its_checkpoint_alone(finished):
    path, _, model = finished
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Lightning lists the frozen weights as not in the checkpoint
        loaded = KOFFModule.load_from_checkpoint(path, weights_only=True)
    assert loaded.hparams == model.hparams
    batch = RandomText.batch(["en", "law", "en"], seed=3)
    for arm in ("dense", "koff", "memory_off"):
        assert torch.equal(loaded.model.row_nats(batch, arm), model.model.row_nats(batch, arm))


def test_a_checkpoint_of_mid_ramp_is_not_measured_as_the_dense_model(finished, folder, tmp_path):
    loaded = module(folder)
    loaded.configure_model()
    tester = trainer(tmp_path, saver(tmp_path, 4), limit_test_batches=0)
    tester.test(loaded, text(folder), ckpt_path=finished[1], weights_only=True, verbose=False)
    assert not loaded.model.gates.hardened
    assert not loaded.model.hard_mask().all(), "at that step two thirds of the target were reached"


def test_the_mask_of_now_is_chosen_again_where_logits_or_target_have_moved(folder, monkeypatch):
    loaded = module(folder)
    loaded.configure_model()
    model, calls = loaded.model, []
    chosen = model.chosen_mask
    monkeypatch.setattr(model, "chosen_mask", lambda target: calls.append(target) or chosen(target))
    for target, moved, due in ((0.1, 0, 1), (0.1, 0, 1), (0.2, 0, 2), (0.2, 1, 3), (0.2, 0, 3)):
        model.gates.logits.data[:7] -= moved
        model.target = target
        assert torch.equal(model.hard_mask(), chosen(target))
        assert len(calls) == due


def test_sharded_weights_are_never_gathered_into_buffers_for_inference(monkeypatch):
    """FSDP2 keeps those of its first forward, and with NCCL, not with gloo, Lightning validates in inference mode."""
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    monkeypatch.setattr(strategies.ModelParallelStrategy, "setup", lambda *_: None)
    monkeypatch.setattr(strategies.ShardedStrategy, "world_size", 1)
    strategy = strategies.ShardedStrategy()
    strategy._lightning_module = SimpleNamespace(model=SimpleNamespace(backbone=None))
    assert trainer.validate_loop.inference_mode
    strategy.setup(trainer)
    loops = trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop
    assert not any(loop.inference_mode for loop in loops)


def test_a_checkpoint_of_another_backbone_is_refused(finished, folder, tmp_path):
    toy_tokenizer(tmp_path)
    tiny_model("llama", seed=1, **SIZES).save_pretrained(tmp_path)
    with pytest.raises(KoffError, match="belongs to backbone .* hash .*: give --model.backbone .*, or the config"):
        trainer(tmp_path, saver(tmp_path / "again", 4)).fit(
            module(tmp_path), text(folder), ckpt_path=finished[0], weights_only=True
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domains": [*DOMAINS, "medicine"]}, r"make: domains is \[en, law\] there and \[en, law, medicine\] here"),
        ({"domains": ["en"]}, r"make: domains is \[en, law\] there and \[en\] here"),
        ({"shared_memory": True}, "make: shared_memory is False there and True here"),
        ({"lora": LoraSpec(rank=3)}, "make: lora.rank is 2 there and 3 here"),
        ({"lora": LoraSpec(rank=2, alpha=3)}, "make: lora.alpha is 16.0 there and 3 here"),
        ({"lora": None}, "make: lora is .*rank.* there and null here"),
        ({"kv": KVSpec(slots=5)}, "make: kv.slots is 4 there and 5 here"),
        ({"sparsity": {"units": ["channel"]}}, r"make: units is \[channel, kv_group\] there and \[channel\] here"),
        ({"sparsity": {"gate": "ddp"}}, "make: gate is hc there and ddp here"),
    ],
)
def test_a_checkpoint_of_another_make_is_refused(finished, folder, tmp_path, options, message):
    model = module(folder, **options)
    model.configure_model()
    with pytest.raises(KoffError, match=message):
        trainer(tmp_path, saver(tmp_path / "again", 4)).fit(
            model, text(folder), ckpt_path=finished[0], weights_only=True
        )


def test_options_of_a_mask_that_is_fixed_are_those_of_its_run(folder, tmp_path):
    """In a run that goes on, and where a checkpoint is scored: else the old mask would be reported as the new one."""
    fit(folder, tmp_path, saver(tmp_path, STEPS), sparsity={"units": ["channel"]})
    path = tmp_path / f"step={STEPS}.ckpt"
    here = {"target": 0.1, "denominator": "units", "layout": "uniform", "multiple_of": 2}
    for option, value in (here | {"min_channels": 5, "min_kv_groups": 2}).items():
        model = module(folder, sparsity={"units": ["channel"], option: value})
        for verb in ("fit", "test"):
            run = getattr(trainer(tmp_path, saver(tmp_path / "again", STEPS), limit_test_batches=0), verb)
            with pytest.raises(
                KoffError, match=f"mask is fixed already, and its {option} is .* there and {value} here"
            ):
                run(model, text(folder), ckpt_path=path, weights_only=True)


@pytest.mark.parametrize("which", [0, 1], ids=["after hardening", "in mid-ramp"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"joint": False}, "joint is True there and False here"),
        (
            {"sparsity": {"target": 0.0}},
            r"mask is learned there and none \(sparsity.target 0\)|its target is 0.2",
        ),
        ({"sparsity": {"penalty": "fixed"}}, "sparsity.penalty is lagrangian there and fixed here"),
        ({"mask": True}, r"mask is learned there and given \(model.mask\) here"),
    ],
)
def test_a_run_that_goes_on_keeps_its_course(finished, folder, tmp_path, which, options, message):
    options = {"mask": str(finished[0])} if "mask" in options else options
    with pytest.raises(KoffError, match=message):
        trainer(tmp_path, saver(tmp_path / "again", 4)).fit(
            module(folder, **options), text(folder), ckpt_path=finished[which], weights_only=True
        )


def test_a_run_without_a_mask_does_not_go_on_with_one(folder, tmp_path):
    fit(folder, tmp_path, saver(tmp_path, 4), sparsity={"target": 0.0}, steps=4)
    with pytest.raises(KoffError, match=r"mask is none \(sparsity.target 0\) there and learned here"):
        trainer(tmp_path, saver(tmp_path / "again", 4)).fit(
            module(folder), text(folder), ckpt_path=tmp_path / "step=4.ckpt", weights_only=True
        )


def test_a_mask_is_not_scored_as_if_there_were_none(finished, folder, tmp_path):
    with pytest.raises(KoffError, match="holds a mask that model.sparsity.target 0 would leave out"):
        trainer(tmp_path, saver(tmp_path, 4)).test(
            module(folder, sparsity={"target": 0.0}), text(folder), ckpt_path=finished[1], weights_only=True
        )


def test_a_run_that_goes_on_to_an_earlier_end_would_never_fix_its_mask(finished, folder, tmp_path):
    with pytest.raises(KoffError, match="laid out over 20 steps and fixes its mask after step 12, .* to end after 11"):
        trainer(tmp_path, saver(tmp_path / "11", 4), steps=11).fit(
            module(folder), text(folder), ckpt_path=finished[1], weights_only=True
        )
    for steps in (12, 24):
        model = module(folder)
        trainer(tmp_path, saver(tmp_path / str(steps), 4), steps=steps).fit(
            model, text(folder), ckpt_path=finished[1], weights_only=True
        )
        assert model.model.gates.hardened


@pytest.mark.parametrize("others", [None, 4])
def test_ranks_that_go_on_from_different_steps_are_refused(finished, folder, tmp_path, monkeypatch, others):
    monkeypatch.setattr(ranks, "gather", lambda value: [value, value if isinstance(value, str) else others])
    there = others and f"step {others}"
    with pytest.raises(KoffError, match=rf"different checkpoints \(by rank: step 8, {str(there).lower()}\)"):
        trainer(tmp_path, saver(tmp_path, 4)).fit(
            module(folder), text(folder), ckpt_path=finished[1], weights_only=True
        )


def test_a_strangers_checkpoint_is_refused(finished, folder, tmp_path):
    checkpoint = torch.load(finished[0], weights_only=True)
    checkpoint.pop("koff")
    torch.save(checkpoint, tmp_path / "other.ckpt")
    with pytest.raises(KoffError, match="not written by koff-lightning"):
        trainer(tmp_path, saver(tmp_path / "again", 4)).fit(
            module(folder), text(folder), ckpt_path=tmp_path / "other.ckpt", weights_only=True
        )


# -------------------------------------------------------------------------------------------------- bad input


class Poison(Callback):
    def __init__(self, step):
        self.step = step

    @torch.no_grad()
    def on_train_batch_start(self, trainer, pl_module, *_):
        if trainer.global_step == self.step:
            pl_module.model.memories.lora_parameters("en")[0].fill_(float("nan"))


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_step(folder, tmp_path):
    with pytest.raises(KoffError, match="loss became nan at step 5 .in rows of domain en.; what was saved stays"):
        fit(folder, tmp_path, saver(tmp_path, 2), Poison(5))
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["state_dict"]
    assert all(torch.isfinite(v).all() for v in saved.values() if v.is_floating_point())
    assert not (tmp_path / "step=6.ckpt").exists()


class PoisonGradient(Callback):
    """Makes a gradient, or the loss through its rows, no number at given steps."""

    def __init__(self, *steps, loss=False):
        self.poisoned, self.loss = steps, loss

    @torch.no_grad()
    def on_train_batch_start(self, trainer, pl_module, *_):
        if self.loss and trainer.global_step in self.poisoned:
            self.kept = pl_module.model.memories.lora_parameters("law")[0].clone()
            pl_module.model.memories.lora_parameters("law")[0].fill_(float("nan"))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not self.loss and trainer.global_step in self.poisoned:
            pl_module.model.memories.kv_parameters("law")[0].grad[0] = float("inf")

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, *_):
        if self.loss and trainer.global_step - 1 in self.poisoned:
            pl_module.model.memories.lora_parameters("law")[0].copy_(self.kept)


def test_a_gradient_that_is_not_a_number_stops_the_run_before_it_reaches_the_weights(folder, tmp_path):
    with pytest.raises(KoffError, match="gradients of domain law .kv. are not finite at step 6; what was saved stays"):
        fit(folder, tmp_path, saver(tmp_path, 2), PoisonGradient(6))
    saved = torch.load(tmp_path / "step=6.ckpt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in saved["state_dict"].values() if v.is_floating_point())


@pytest.mark.parametrize("loss", [True, False], ids=["loss", "gradient"])
def test_a_step_that_is_skipped_leaves_no_trace(folder, tmp_path, loss):
    """In the warm-up, where gradients are collected, too."""
    poison = PoisonGradient(2, 6, loss=loss)
    with pytest.warns(UserWarning, match="step [26] is left out: the .* not finite|nan .*law"):
        model, run = fit(folder, tmp_path, poison, optim=OptimSpec(on_nonfinite="skip"))
    for step in (2, 6):
        assert not run.moved("lora_B", [step])
        assert not run.moved("memories.kv", [step])
    assert run.moved("lora_B", [3])
    assert len(run.steps) == STEPS
    assert torch.isfinite(model.model.gates.importance).all()
    assert model.model.gates.hardened


ALONE = {"lora": None, "kv": None}  # the mask alone: nothing moves in the warm-up, nor once it is fixed


@pytest.mark.parametrize("options", [{"joint": False}, {"joint": True}, ALONE], ids=["two stages", "joint", "alone"])
def test_16_bit_training_takes_steps_in_which_nothing_moves(folder, tmp_path, monkeypatch, options):
    """Torch's loss scaler fails where no parameter has a gradient. Here it scales what is computed in fp32."""
    monkeypatch.setattr(MixedPrecision, "autocast_context_manager", lambda _: nullcontext())
    ended = []
    for plugins in ([MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=128.0))], []):
        model, run = fit(folder, tmp_path, plugins=plugins, **options)
        assert len(run.steps) == STEPS
        ended.append({name: value for name, value in model.state_dict().items() if name in model.owned()})
    assert ended[0]["model.gates.importance"].any()
    for name, value in ended[0].items():
        torch.testing.assert_close(value, ended[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("skip", [True, False])
def test_a_loss_that_another_ranks_rows_spoil_names_their_domain(monkeypatch, skip):
    monkeypatch.setattr("koff_lightning.support.ranks.gather", lambda mine: [mine, {"law"}])
    guard, predicted = NonFiniteGuard(skip), torch.ones(2, 3, dtype=torch.bool)
    with (
        nullcontext()
        if skip
        else pytest.raises(KoffError, match="the loss became nan at step 7 .in rows of domain law")
    ):
        guard.check_loss(torch.tensor(float("nan")), torch.ones(6), predicted, ["en", "code"], 7)
    if skip:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
        run = SimpleNamespace(trainer=SimpleNamespace(precision_plugin=None), global_step=7)
        with pytest.warns(
            UserWarning, match="step 7 is left out: the loss became nan at step 7 .in rows of domain law"
        ):
            guard.check_gradients(run, optimizer, {})


def test_with_a_loss_scale_gradients_may_overflow_and_a_loss_that_is_no_number_is_told():
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad, optimizer = torch.ones(1), torch.optim.SGD([weight])
    run = SimpleNamespace(trainer=SimpleNamespace(precision_plugin=SimpleNamespace(scaler="one")), global_step=7)
    guard = NonFiniteGuard(skip=True)
    guard.check_gradients(run, optimizer, {"lora": torch.tensor(math.inf)})
    assert weight.grad is not None
    guard.check_loss(torch.tensor(math.nan), torch.ones(6), torch.ones(2, 3, dtype=torch.bool), ["en", "code"], 7)
    with pytest.warns(UserWarning, match="step 7 is left out: the loss became nan at step 7 .by its penalty"):
        guard.check_gradients(run, optimizer, {})
    assert weight.grad is None


def test_a_warm_start_takes_the_weights_and_begins_anew(finished, folder, tmp_path):
    path, unfinished, old = finished
    fresh = module(folder, warm_start=str(path))
    fresh.configure_model()
    batch = RandomText.batch(["en", "law", "en"], seed=3)
    assert torch.equal(fresh.model.row_nats(batch, "koff"), old.model.row_nats(batch, "koff"))
    model, run = fit(folder, tmp_path, warm_start=str(path), steps=6)
    assert len(run.steps) == 6, "a run of its own"
    assert torch.equal(model.model.gates.kept, old.model.gates.kept), "a fixed mask stays"
    assert run.moved("lora_B", range(1, 6))
    weights = torch.load(unfinished, weights_only=True)
    del weights["optimizer_states"]  # as a checkpoint that holds a model and no run
    torch.save(weights, tmp_path / "weights.ckpt")
    model, run = fit(folder, tmp_path, warm_start=str(tmp_path / "weights.ckpt"))
    assert model.model.gates.hardened
    assert all(run.moved("gates.logits", [step]) for step in range(4, 12))


@pytest.mark.parametrize("which", [0, 1], ids=["after hardening", "in mid-ramp"])
def test_a_warm_start_leaves_random_state_and_what_the_old_run_observed(finished, folder, which):
    path = finished[which]
    torch.manual_seed(0)
    fresh, old = module(folder, warm_start=str(path)), torch.load(path, weights_only=True)["state_dict"]
    torch.manual_seed(77)
    fresh.configure_model()
    assert int(fresh.model.gates.seed) == 77
    assert torch.equal(fresh.model.gates.logits, old["model.gates.logits"])
    assert old["model.gates.importance"].any()
    assert bool(fresh.model.gates.importance.any()) == fresh.model.gates.hardened, "of a fixed mask it says why"
    assert fresh.penalty.quadratic.item() == LagrangianPenalty().quadratic.item() != float(old["penalty.quadratic"])


def test_a_mask_that_is_given_leaves_the_seed_of_the_run_that_takes_it(finished, folder):
    fresh = module(folder, mask=str(finished[0]))
    torch.manual_seed(77)
    fresh.configure_model()
    assert torch.equal(fresh.model.gates.kept, finished[2].model.gates.kept)
    assert int(fresh.model.gates.seed) == 77 != int(finished[2].model.gates.seed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": {"target": 0.1}}, "fixed already, and its target is 0.2 there and 0.1 here"),
        ({"kv": KVSpec(slots=5)}, "make: kv.slots is 4 there and 5 here"),
    ],
)
def test_a_warm_start_from_another_make_is_refused(finished, folder, options, message):
    with pytest.raises(KoffError, match=message):
        module(folder, warm_start=str(finished[0]), **options).configure_model()


def test_a_batch_of_an_unknown_domain(folder, tmp_path):
    with pytest.raises(KoffError, match="unknown domain chemistry; this model has en, law"):
        fit(folder, tmp_path, data=Scheduled(["en", "chemistry"]), steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"domains": []}, "domains is empty"),
        ({"domains": ["en", "en"]}, "en.*(twice|duplicate|more than once)"),
        ({"domains": ["en", "a/b"]}, "a/b"),
        ({"domains": ["en", "v1.5"]}, r"v1\.5"),
        ({"sparsity": {"target": 0.0}, "lora": None, "kv": None}, "nothing to train"),
        ({"dtype": "flaot32"}, "flaot32"),
        ({"sparsity": {"units": ["layer"]}}, "some of channel, kv_group, .*; got layer"),
        ({"sparsity": {"target": 0.95}}, "cannot be reached"),
        ({"kv": KVSpec(slots=4000)}, "too short for a memory of 4000 slots"),
    ],
)
def test_bad_options_are_refused_before_training(folder, tmp_path, options, message):
    with pytest.raises(KoffError, match=message):
        fit(folder, tmp_path, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoraSpec(rank=0), "between 1 and 1024; got 0"),
        (lambda: LoraSpec(rank=5000), "got 5000"),
        (lambda: LoraSpec(alpha=0.0), "alpha.*got 0"),
        (lambda: LoraSpec(alpha=float("nan")), "alpha.*nan"),
        (lambda: LoraSpec(targets=["q_proj", "wq"]), "got wq"),
        (lambda: LoraSpec(targets=[]), "got none"),
        (lambda: KVSpec(slots=0), "slot 0 is frozen.*got 0"),
        (lambda: KVSpec(slots=1), "got 1"),
        (lambda: KVSpec(slots=10**6), "got 1000000"),
        (lambda: OptimSpec(mask_lr=0.0), "mask_lr=0"),
        (lambda: OptimSpec(kv_lr=float("nan")), "kv_lr=nan"),
        (lambda: OptimSpec(warmup=-0.5), "warmup"),
        (lambda: OptimSpec(final=2.0), "final"),
        (lambda: AnnealSparsity(0.5, 0.5, 0.5), r"must lie in \(0, 1\]"),
        (lambda: AnnealSparsity(-0.1, 0.5, 0.5), r"must lie in \(0, 1\]"),
        (lambda: AnnealSparsity(shape="square"), "shape.*square"),
    ],
)
def test_bad_specs_are_refused(make, message):
    with pytest.raises(KoffError, match=message):
        make()


def test_a_run_without_an_end_is_refused(folder, tmp_path):
    with pytest.raises(KoffError, match="max_steps"):
        trainer(tmp_path, steps=-1, max_epochs=-1).fit(module(folder), text(folder))


def test_training_without_text_for_the_memories_says_so(folder, tmp_path):
    loader = RandomText().train_dataloader()
    with pytest.raises(KoffError, match="datamodule|sample_ids"):
        trainer(tmp_path, steps=1).fit(module(folder), loader, loader)


def test_rows_without_a_domain_train_the_mask_only(folder, tmp_path):
    _, run = fit(folder, tmp_path, data=Scheduled(*[[None, None]] * 12), steps=12)
    assert not run.moved("koff_", range(1, 12))
    assert run.moved("gates.logits", range(3, 6))


def test_a_strategy_that_would_train_wrongly_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(DDPStrategy, "setup_environment", lambda _: None)  # start no process group
    with pytest.raises(KoffError, match="DDPStrategy cannot train .*: use --config hardware/ddp.yaml"):
        trainer(tmp_path, strategy="ddp", devices=1).fit(module(folder), text(folder))
