"""`koff baseline` as a command, and what its masks are for: tests, exports, memories trained under them, priors."""

import errno
import json
import math
import re

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_artifact import DOMAINS as ARTIFACT_DOMAINS
from tiny_artifact import Made, left_padded, tiny_decomposition
from tiny_models import tiny_model
from tiny_run import DOMAINS, RandomText, tiny_module, tiny_trainer
from toy_text import toy_documents, toy_tokenizer, write_jsonl
from transformers import AutoModelForCausalLM

from koff_lightning import (
    DomainDataModule,
    KoffError,
    KOFFModule,
    KVSpec,
    LoraSpec,
    SparsitySpec,
    load_decomposed,
)
from koff_lightning.artifact.checkpoint import from_checkpoint
from koff_lightning.artifact.export import export
from koff_lightning.artifact.folder import read_manifest
from koff_lightning.cli import main
from koff_lightning.commands import baseline as one_shot
from koff_lightning.evaluation.baselines import compensation, input_moments
from koff_lightning.gates import BackboneGates
from koff_lightning.reports.results import mask_and_size

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
METHODS = ("magnitude", "wanda_sp", "flap", "random", "fisher")
TARGET = 0.25


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A random Llama with its tokenizer, text of two domains, and a config of `koff fit` over them."""
    path = tmp_path_factory.mktemp("place")
    toy_tokenizer(path / "model")
    tiny_model("llama", **SIZES).save_pretrained(path / "model")
    for seed, domain in enumerate(DOMAINS):
        write_jsonl(path / f"{domain}.jsonl", toy_documents(60, seed=seed, longest=30))
    config = {
        "model": {
            "backbone": str(path / "model"),
            "sparsity": {"target": TARGET, "min_channels": 4},
            "lora": {"rank": 2},
            "kv": {"slots": 4},
        },
        "data": {
            "domains": {domain: str(path / f"{domain}.jsonl") for domain in DOMAINS},
            "seq_len": 16,
            "batch_size": 4,
            "heldout_fraction": 0.1,
        },
        "trainer": {"max_steps": 8, "accelerator": "cpu", "num_sanity_val_steps": 0, "logger": False},
    }
    (path / "tiny.yaml").write_text(yaml.safe_dump(config))
    return path


def baseline(place, out, method, *options, tokens=400):
    """Run the command; returns its exit status."""
    common = ["--config", str(place / "tiny.yaml"), "--out", str(out)]
    asked = [] if tokens is None else [f"--calibration_tokens={tokens}"]
    return main(["baseline", "--method", method, *common, *asked, *options])


@pytest.fixture(scope="module")
def masks(place, tmp_path_factory):
    """Folder of a baseline for each method; those that no test looks at closer are not scored."""
    root = tmp_path_factory.mktemp("masks")
    for method in METHODS:
        assert baseline(place, root / method, method, *([] if method == "flap" else ["--no-score"])) == 0
    return root


def checkpoint(masks, method):
    return masks / method / "checkpoints" / "last.ckpt"


# ------------------------------------------------------------------------------------------------- the checkpoint


@pytest.mark.parametrize("method", METHODS)
def test_the_mask_is_a_checkpoint_at_the_exact_budget(masks, method):
    module = from_checkpoint(checkpoint(masks, method))
    assert bool(module.gates.hardened)
    assert module.lora is None
    assert module.kv is None
    cheapest = int(module.budget.costs.min()) / module.budget.denominators["body"]
    assert 0 <= TARGET - module.budget.report(module.gates.kept)["body"] < cheapest
    assert torch.equal(module.budget.harden(module.gates.logits.detach()), module.gates.kept), "the scores are there"
    assert (module.gates.bias is not None) == (method == "flap")


def test_without_a_number_it_reads_what_the_shortest_domain_allows(place, tmp_path, capsys):
    assert baseline(place, tmp_path / "most", "fisher", "--no-score", tokens=None) == 0
    said = re.search("fisher, ([0-9,]+) tokens of calibration text", capsys.readouterr().out)
    most = int(said[1].replace(",", ""))
    assert 400 < most < 131_072
    assert baseline(place, tmp_path / "more", "fisher", "--no-score", tokens=most + 1) != 0, "there is not one row more"


def test_methods_differ_and_a_seed_repeats(place, masks, tmp_path):
    kept = {method: from_checkpoint(checkpoint(masks, method)).gates.kept for method in METHODS}
    assert len({tuple(mask.tolist()) for mask in kept.values()}) == len(METHODS)
    for seed, same in ((0, True), (1, False)):
        assert baseline(place, tmp_path / str(seed), "random", "--no-score", f"--seed={seed}") == 0
        again = from_checkpoint(tmp_path / str(seed) / "checkpoints" / "last.ckpt").gates.kept
        assert torch.equal(again, kept["random"]) is same


def test_results_are_those_that_koff_test_finds(masks, tmp_path, capsys):
    found = json.loads((masks / "flap" / "results.json").read_text())
    assert found["baseline"] == {"method": "flap", "calibration_tokens": 416}
    assert found["sparsity"]["hardened"]
    assert found["mean"]["koff_bpb"] == found["mean"]["memory_off_bpb"] != found["mean"]["dense_bpb"]
    assert found["config"]["model"]["backbone"]
    documents = json.loads((masks / "flap" / "documents.json").read_text())
    for domain in DOMAINS:
        bits = sum(documents[domain]["nats"]["koff"]) / sum(documents[domain]["bytes"]) / math.log(2)
        assert bits == pytest.approx(found["domains"][domain]["koff_bpb"], rel=1e-5)
    capsys.readouterr()
    options = ["--config", str(masks / "flap" / "config.yaml"), "--ckpt_path", str(checkpoint(masks, "flap"))]
    assert main(["test", *options, f"--trainer.default_root_dir={tmp_path}"]) == 0
    mean = next(line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("mean"))
    assert mean.split()[2:4] == [f"{found['mean'][f'{arm}_bpb']:.4f}" for arm in ("dense", "koff")]


def test_without_score_there_are_no_results(masks):
    assert {path.name for path in (masks / "random").iterdir()} == {"checkpoints", "config.yaml"}


def full_disk(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_scores_of_an_earlier_mask_do_not_stay_beside_another(place, tmp_path, monkeypatch):
    for name in ("results.json", "documents.json", "general_documents.json"):
        (tmp_path / name).write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr("koff_lightning.commands.baseline.KoffTrainer.save_checkpoint", full_disk)
        assert baseline(place, tmp_path, "random", "--no-score") == 2
    assert (tmp_path / "results.json").exists(), "the mask that it is of is still there"
    assert baseline(place, tmp_path, "random", "--no-score") == 0
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "config.yaml"}


def test_short_options_stand_for_those_of_the_run(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--method=random", "--no-score", "--sparsity=0.1", "--model.sparsity.denominator=total", "--out=o"]
    assert main(["baseline", *words, "--config", str(place / "tiny.yaml")]) == 0
    module = from_checkpoint("o/checkpoints/last.ckpt")
    assert 0 <= 0.1 - module.budget.report(module.gates.kept)["total"] < 0.01
    assert main(["baseline", "--method=random", "--no-score", "--config", "o/config.yaml"]) == 0, (
        "a saved config serves"
    )
    assert from_checkpoint("o-random/checkpoints/last.ckpt").sparsity.target == 0.1


def test_a_backbone_alone_is_enough(monkeypatch, tmp_path, capsys):
    def stop(trainer, module, data):
        assert module.source == "koff-tiny"
        assert module.sparsity.target == 0.12
        assert {"en", "de", "python"} < set(module.domains) == set(data.domain_names)
        raise KoffError("as far as this test goes")

    monkeypatch.setattr(one_shot, "_set_up", stop)
    monkeypatch.chdir(tmp_path)
    assert main(["baseline", "--method=magnitude", "--backbone=koff-tiny", "--sparsity=0.12"]) == 2
    assert "as far as this test goes" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- compensation


def compensated(folder, family, **options):
    """A decomposition whose removed units leave their mean behind, and the moments that say what it is."""
    module = tiny_decomposition(folder, family, **options)
    ids, mask = left_padded(seed=5)
    with module.gates.off():
        module.memories.activate([None] * len(ids))
        read = input_moments(module.backbone, [{"input_ids": ids, "attention_mask": mask}], module.gates.groups)
    module.gates.bias = compensation(module.backbone, read, module.gates.groups, module.gates.kept)
    return Made(folder, module), read


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma3_text"])
@pytest.mark.parametrize("layout", ["ragged", "masked", "merged"])
def test_cut_is_gated_with_compensation(family, layout, tmp_path):
    made, _ = compensated(tmp_path, family)
    domain = "de" if layout == "merged" else None
    export(made.module, tmp_path / "out", layout=layout, domain=domain, prove=False)
    model = load_decomposed(tmp_path / "out")
    ids, mask = left_padded()
    read_by = ["de"] * 4 if layout == "merged" else [*ARTIFACT_DOMAINS, None]
    found = model(ids, mask, read_by).logits
    gap = (found - made.gated(ids, mask, read_by))[mask.bool()].abs().max()
    assert gap / found[mask.bool()].abs().max() < 1e-5
    if layout != "masked":  # where what is removed stays as zeros
        assert kept_parameters(made.module) == read_manifest(tmp_path / "out").parameters["backbone"]


def kept_parameters(module):
    """Parameters of the cut backbone as the reports count them."""
    return mask_and_size(module)["parameters"]["backbone_kept"]


def test_compensation_puts_the_mean_in_the_place_of_what_is_removed(tmp_path):
    made, read = compensated(tmp_path, "qwen2", lora=None, kv=None)
    ids, mask = left_padded()
    found = made.gated(ids, mask, [None] * 4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    parts = made.module.gates.kept.split([group.size for group in made.module.gates.groups])
    for group, part in zip(made.module.gates.groups, parts, strict=True):
        kept, mean = part.repeat_interleave(group.width), read[group.consumer].mean.float()
        plain.get_submodule(group.consumer).register_forward_pre_hook(
            lambda _, inputs, kept=kept, mean=mean: (torch.where(kept, inputs[0], mean),)
        )
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = plain(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


def test_compensation_adds_to_a_bias_that_is_there(tmp_path):
    toy_tokenizer(tmp_path / "dense")
    model = tiny_model("llama", vocab_size=320, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
    with torch.no_grad():
        for name, bias in model.named_parameters():
            if name.endswith(".bias"):
                bias.normal_(std=0.5)  # they start as zeros, to which anything can be added
    model.save_pretrained(tmp_path / "dense")
    made, _ = compensated(tmp_path, "llama")
    export(made.module, tmp_path / "out", prove=False)
    ids, mask = left_padded()
    found = load_decomposed(tmp_path / "out")(ids, mask, ["de"] * 4).logits
    torch.testing.assert_close(found[mask.bool()], made.gated(ids, mask, ["de"] * 4)[mask.bool()], rtol=0, atol=1e-5)
    assert kept_parameters(made.module) == read_manifest(tmp_path / "out").parameters["backbone"]


@pytest.mark.parametrize("layout", ["uniform", "deci"])
def test_a_layout_without_a_place_for_biases_says_so(layout, tmp_path):
    made, _ = compensated(tmp_path, "llama", uniform=True)
    with pytest.raises(KoffError, match=f"layout '{layout}' has no place for the biases .* --compensate false"):
        export(made.module, tmp_path / "out", layout=layout, prove=False)
    assert not (tmp_path / "out").exists()


def test_compensation_survives_the_checkpoint_and_the_export_is_proven(place, masks, tmp_path, capsys):
    module = from_checkpoint(checkpoint(masks, "flap"))
    assert module.gates.bias.abs().max() > 0
    assert main(["export", "--ckpt", str(checkpoint(masks, "flap")), "--out", str(tmp_path / "out")]) == 0
    assert "a fresh process computes the same" in capsys.readouterr().out
    assert baseline(place, tmp_path / "plain", "flap", "--no-score", "--compensate=false") == 0
    plain = from_checkpoint(tmp_path / "plain" / "checkpoints" / "last.ckpt")
    assert plain.gates.bias is None
    assert torch.equal(plain.gates.kept, module.gates.kept)


# ------------------------------------------------------------------------------------- memories under a given mask


class Trained(Callback):
    """Notes which parameters the run has moved."""

    def on_train_start(self, trainer, pl_module):
        self.before = {name: p.detach().clone() for name, p in pl_module.named_parameters()}

    def on_train_end(self, trainer, pl_module):
        self.moved = {n for n, p in pl_module.named_parameters() if not torch.equal(p, self.before[n])}
        self.optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}


def test_fit_trains_memories_under_a_mask_to_a_normal_end(place, masks, tmp_path):
    given = from_checkpoint(checkpoint(masks, "flap"))
    words = ["--config", str(place / "tiny.yaml"), "--model.mask", str(checkpoint(masks, "flap"))]
    words += [f"--trainer.default_root_dir={tmp_path}", "--model.sparsity.target=0.1"]  # the mask's own options hold
    assert main(["fit", *words]) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["config"]["model"]["mask"] == str(checkpoint(masks, "flap"))
    assert found["sparsity"]["target"] == TARGET
    assert found["mean"]["koff_bpb"] != found["mean"]["memory_off_bpb"]
    before = json.loads((masks / "flap" / "results.json").read_text())
    assert found["mean"]["memory_off_bpb"] == pytest.approx(before["mean"]["koff_bpb"], rel=1e-6)
    manifest = read_manifest(tmp_path / "artifact")
    assert torch.equal(manifest.mask(), given.gates.kept)
    assert found["parameters"]["backbone_kept"] == manifest.parameters["backbone"]
    assert load_decomposed(tmp_path / "artifact").domains == DOMAINS


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folder of a tiny backbone and of checkpoints over it: a learned mask, one not fixed yet, and no mask."""
    folder = tmp_path_factory.mktemp("made")
    for name, target in (("learned", 0.2), ("none", 0.0)):
        run = tiny_trainer(folder, [])
        run.fit(tiny_module(folder, sparsity=SparsitySpec(target=target, min_channels=4)), RandomText())
        run.save_checkpoint(folder / f"{name}.ckpt")
    unfixed = torch.load(folder / "learned.ckpt", weights_only=True)
    unfixed["state_dict"]["model.gates.hardened"].fill_(False)
    torch.save(unfixed, folder / "unfixed.ckpt")
    return folder


def test_a_given_mask_stays_and_only_the_memories_train(made, tmp_path):
    module, trained = tiny_module(made, mask=str(made / "learned.ckpt")), Trained()
    run = tiny_trainer(tmp_path, [trained], steps=6)
    run.fit(module, RandomText())
    assert torch.equal(module.model.gates.kept, from_checkpoint(made / "learned.ckpt").gates.kept)
    memories = {n for n, p in module.named_parameters() if p.requires_grad}
    assert trained.moved == memories
    assert all(".lora_" in name or name.startswith("model.memories.kv.") for name in memories)
    assert trained.optimised == {
        id(p) for p in module.model.memories.lora_parameters() + module.model.memories.kv_parameters()
    }
    assert module.phase == "consolidate"
    assert module.hparams["mask"] == str(made / "learned.ckpt")


def test_a_run_under_a_mask_can_be_resumed(place, masks, tmp_path):
    ends = []
    for begin in (None, tmp_path / "whole" / "step=3.ckpt"):
        torch.manual_seed(0)
        options = {"mask": str(checkpoint(masks, "flap")), "lora": LoraSpec(rank=2), "kv": KVSpec(slots=4)}
        module = KOFFModule(str(place / "model"), DOMAINS, **options)
        files = {domain: str(place / f"{domain}.jsonl") for domain in DOMAINS}
        data = DomainDataModule(files, seq_len=16, batch_size=4, heldout_fraction=0.1)
        saver = ModelCheckpoint(
            tmp_path / ("rest" if begin else "whole"), filename="{step}", save_top_k=-1, every_n_train_steps=3
        )
        run = tiny_trainer(tmp_path, [saver], steps=6, enable_checkpointing=True)
        run.fit(module, data, ckpt_path=begin)
        ends.append(
            {k: v.clone() for k, v in module.state_dict().items() if ".lora_" in k or not k.startswith("backbone")}
        )
    assert "model.gates.bias" in ends[0]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    saved = from_checkpoint(tmp_path / "rest" / "step=6.ckpt")
    assert torch.equal(saved.gates.kept, ends[0]["model.gates.kept"])
    assert torch.equal(saved.gates.bias, ends[0]["model.gates.bias"])


def test_a_mask_is_no_run_to_go_on_with(place, masks, tmp_path, capsys):
    options = ["--config", str(masks / "random" / "config.yaml"), "--ckpt_path", str(checkpoint(masks, "random"))]
    assert main(["fit", *options, f"--trainer.default_root_dir={tmp_path}"]) == 2
    assert "no run that could go on: give it as model.mask or model.prior" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------- a prior


def test_a_prior_orders_the_logits_when_the_ramp_begins(made, tmp_path, monkeypatch):
    first, order = {}, BackboneGates.order_by_prior

    def note(gates, *options):
        order(gates, *options)
        first["to"] = gates.logits.detach().clone()

    monkeypatch.setattr(BackboneGates, "order_by_prior", note)
    module = tiny_module(made, prior=str(made / "learned.ckpt"))
    tiny_trainer(tmp_path, []).fit(module, RandomText())
    scores = from_checkpoint(made / "learned.ckpt").gates.logits.detach()
    assert torch.equal(first["to"].argsort(), scores.argsort(stable=True))
    assert len(first["to"].unique()) == len(scores)
    assert module.model.gates.importance.sum() == 0, "nobody looks at the Fisher information then"
    assert bool(module.model.gates.hardened)
    assert module.sparsity.target == 0.2


# ------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method=wonda_sp"], "method must be .*; got 'wonda_sp'. Did you mean 'wanda_sp'"),
        (["--method=flap", "--sparsity=0"], "a one-shot mask removes something: give --sparsity"),
        (["--method=flap", "--sparsity=1.5"], r"sparsity.target must lie in \[0, 1\)"),
        (["--method=flap", "--calibration_tokens=90000"], "domain 'en' has .* give --calibration_tokens"),
        (["--method=flap", f"--model.mask={__file__}"], "makes a mask of its own .*: leave model.mask out"),
        (["--method=flap", "--model.sparsity.layout=uniform"], "sparsity.layout uniform .* give --compensate false"),
        (["--method=flap", "--trainer.devices=2"], "runs in one process"),
        ([], "method"),
    ],
)
def test_bad_options_are_one_line(place, tmp_path, capsys, options, message):
    assert main(["baseline", "--config", str(place / "tiny.yaml"), f"--out={tmp_path / 'out'}", *options]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("koff: ")
    with pytest.raises(KoffError, match=message):
        raise KoffError(said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "learned", "prior": "learned"}, "model.mask and model.prior both say what the mask is"),
        ({"mask": "unfixed"}, "the mask in .*unfixed.ckpt is not fixed yet: give a later checkpoint"),
        ({"mask": "none"}, "holds no mask"),
        ({"mask": "missing"}, "missing.ckpt: no such file"),
        ({"mask": "learned", "lora": None, "kv": None}, "nothing to train: model.mask gives the mask"),
        ({"prior": "learned", "sparsity": SparsitySpec(target=0)}, "model.prior is the start of a mask"),
    ],
)
def test_a_mask_that_cannot_be_used_is_refused_at_once(made, options, message):
    paths = {k: str(made / f"{v}.ckpt") if isinstance(v, str) else v for k, v in options.items()}
    with pytest.raises(KoffError, match=message):
        tiny_module(made, **paths)


def test_a_mask_of_another_backbone_or_other_units_is_refused(made, tmp_path):
    tiny_model("llama", seed=1, hidden_size=32, intermediate_size=24, head_dim=8).save_pretrained(tmp_path / "backbone")
    for role in ("mask", "prior"):
        other = tiny_module(tmp_path, **{role: str(made / "learned.ckpt")})
        with pytest.raises(KoffError, match=r"the mask in .* belongs to backbone .* but .* has hash"):
            other.configure_model()
    spec = SparsitySpec(target=0.2, min_channels=4, units=["channel"])
    with pytest.raises(KoffError, match=r"is over 52 units \(channel, kv_group\), this run's is over 48 \(channel\)"):
        tiny_module(made, prior=str(made / "learned.ckpt"), sparsity=spec).configure_model()
