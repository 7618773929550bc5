"""What a config that says nothing gets: dtype and precision by the device, activations kept where they find room."""

import os
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from tiny_models import tiny_model
from toy_text import toy_documents, toy_tokenizer, write_jsonl

from koff_lightning import (
    AnnealSparsity,
    DomainDataModule,
    KoffError,
    KOFFModule,
    KVSpec,
    LoraSpec,
    SparsitySpec,
    losses,
)
from koff_lightning.backbone import decoder_layers
from koff_lightning.cli import main
from koff_lightning.commands import training_cli
from koff_lightning.commands.parsing import precision
from koff_lightning.training import recomputation

MIXED = ("bfloat16", "bf16-mixed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("backbone")
    toy_tokenizer(path)
    tiny_model("llama", vocab_size=300, hidden_size=32, intermediate_size=24, head_dim=8).save_pretrained(path)
    for i, domain in enumerate(("en", "law")):
        write_jsonl(path / "text" / f"{domain}.jsonl", toy_documents(60, seed=i, longest=30))
    return path


@pytest.mark.parametrize(
    ("bf16", "backbone", "dtype", "given", "due"),
    [
        (True, "some/model", "auto", None, MIXED),
        (True, "koff-tiny", "auto", None, ("float32", None)),
        (True, "some/model", "float32", None, ("float32", None)),
        (True, "some/model", "auto", "32-true", ("bfloat16", "32-true")),
        (True, "some/model", "bfloat16", None, MIXED),
        (False, "some/model", "auto", None, ("float32", None)),
        (False, "some/model", "bfloat16", None, ("bfloat16", None)),
        (False, "some/model", "auto", "bf16-mixed", ("float32", "bf16-mixed")),
    ],
)
def test_what_was_said_stays_and_the_rest_is_fast_where_that_is_safe(bf16, backbone, dtype, given, due):
    model, trainer = SimpleNamespace(backbone=backbone, dtype=dtype), SimpleNamespace(precision=given)
    precision.choose(model, trainer, bf16)
    assert (model.dtype, trainer.precision) == due


@pytest.mark.parametrize("accelerator", ["auto", "gpu", "cuda", "cpu"])
def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_is_one_on_a_cpu(monkeypatch, accelerator):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert precision.has_bf16(accelerator, "some/model") == (accelerator != "cpu")


@pytest.mark.parametrize("has", ["_is_amx_tile_supported", "_is_avx512_bf16_supported", None])
def test_a_processor_that_multiplies_in_bf16_does_so_for_a_backbone_of_some_size(monkeypatch, tmp_path, has):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == has)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "weights.gguf").touch()
    (tmp_path / "README.md").symlink_to("nowhere")
    for size, faster in ((precision.SMALL - 1, False), (precision.SMALL, has is not None)):
        os.truncate(tmp_path / "weights.gguf", size)
        for place in (tmp_path, tmp_path / "weights.gguf"):
            assert precision.has_bf16("auto", str(place)) == precision.has_bf16("cpu", str(place)) == faster
            assert not precision.has_bf16("gpu", str(place)), "which it does not have"
    assert precision.has_bf16("cpu", "some/model") == (has is not None)
    assert not precision.has_bf16("cpu", "koff-tiny")
    model, trainer = SimpleNamespace(dtype="bfloat16"), SimpleNamespace(precision="bf16-mixed", accelerator="auto")
    said = precision.told(model, trainer)
    assert ("steps in bf16-mixed, what is trained in fp32" if has else "no instructions for half precision") in said


def test_half_precision_is_slow_where_the_processor_has_none_and_the_saved_config_says_what_ran(
    folder, tmp_path, monkeypatch, caplog
):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    words = ["fit", "--model.backbone", str(folder), "--export.enabled=false", "--trainer.accelerator=cpu"]
    words += [f"--data.domains.{name}={folder / 'text' / f'{name}.jsonl'}" for name in ("en", "law")]
    words += ["--data.seq_len=32", "--trainer.max_steps=1", "--trainer.log_every_n_steps=1"]
    words += [f"--trainer.default_root_dir={tmp_path}"]
    words += ["--trainer.limit_val_batches=0", "--trainer.limit_test_batches=1", "--data.heldout_fraction=0.2"]
    assert main([*words, "--trainer.precision=bf16-mixed"]) == 0
    assert "no instructions for half precision" in caplog.text
    caplog.clear()
    assert main(words) == 0
    assert "half precision" not in caplog.text
    saved = [yaml.safe_load((tmp_path / f"version_{n}" / "config.yaml").read_text()) for n in (0, 1)]
    assert [(c["model"]["dtype"], c["trainer"]["precision"]) for c in saved] == [
        ("float32", "bf16-mixed"),
        ("float32", None),
    ]


@pytest.mark.parametrize("first", [True, False], ids=["from a GPU", "to a GPU"])
def test_a_run_that_goes_on_on_another_device_computes_as_it_did(folder, tmp_path, monkeypatch, capsys, first):
    """What is chosen where nothing is said must not change in the middle; nor under a mask that a run has learned."""
    words = ["--model.backbone", str(folder), "--export.enabled=false", "--trainer.accelerator=cpu"]
    words += [f"--data.domains.{name}={folder / 'text' / f'{name}.jsonl'}" for name in ("en", "law")]
    words += ["--data.seq_len=32", "--trainer.limit_val_batches=0", "--trainer.limit_test_batches=1"]
    words += ["--data.heldout_fraction=0.2", "--model.loss.kl=0", "--trainer.log_every_n_steps=1"]
    words += [f"--trainer.default_root_dir={tmp_path}"]

    def run(verb, bf16, *further):
        monkeypatch.setattr(training_cli, "has_bf16", lambda *_: bf16)
        return main([verb, *words, *further])

    def choice(number):
        saved = yaml.safe_load((tmp_path / f"version_{number}" / "config.yaml").read_text())
        return saved["model"]["dtype"], saved["trainer"]["precision"] or "32-true"

    due = MIXED if first else ("float32", "32-true")
    assert run("fit", first, "--trainer.max_steps=2") == 0
    assert run("fit", not first, "--trainer.max_steps=3", "--ckpt_path=last") == 0
    assert run("validate", not first, "--ckpt_path=last") == 0
    (last,) = (tmp_path / "version_1").rglob("last.ckpt")
    sparsity = yaml.safe_load((tmp_path / "version_1" / "config.yaml").read_text())["model"]["sparsity"]["target"]
    assert run("fit", not first, "--trainer.max_steps=1", f"--model.mask={last}") == 0
    assert sparsity and [choice(0), choice(1)] == [due, due] and choice(2)[0] == due[0]
    capsys.readouterr()
    other = "float32" if first else "bfloat16"
    assert run("fit", first, "--trainer.max_steps=4", f"--ckpt_path={last}", f"--model.dtype={other}") == 2
    said = f"kept its frozen weights in {due[0]}, this one in {other}: give --model.dtype {due[0]}"
    assert said in capsys.readouterr().err


def test_the_backbone_that_a_baseline_is_given_is_the_one_for_which_is_chosen(folder, monkeypatch, capsys):
    """By its short option too: a mask belongs to weights of one dtype, those that `koff fit` will choose."""

    def seen(model, trainer, bf16):
        raise KoffError(f"chosen for {model.backbone}")

    monkeypatch.setattr(training_cli, "choose", seen)
    text = f"--data.domains.en={folder / 'text' / 'en.jsonl'}"
    assert main(["baseline", "--method=magnitude", "--backbone=some/model", "--sparsity=0.5", "--out=o", text]) == 2
    assert "chosen for some/model" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("slow", [False, True])
def test_the_head_is_multiplied_in_fp32_where_half_precision_is_slow(monkeypatch, slow, dtype):
    seen, real = [], losses.fused_head_loss
    monkeypatch.setattr(losses, "half_is_slow", lambda _: slow)
    monkeypatch.setattr(losses, "fused_head_loss", lambda *words: seen.append(words) or real(*words))
    torch.manual_seed(0)
    student, teacher, head = (torch.randn(size, 8).to(dtype) for size in (5, 5, 30))
    about = torch.arange(5), torch.full((5,), 0.2), losses.LossSpec(1.0, 2.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss, *_ = losses.head_loss(student.requires_grad_(), teacher, head, *about)
        nats = losses.head_nats(student.detach(), head, about[0], 2)
    loss.backward()
    assert student.grad.dtype == dtype
    assert {tensor.dtype for tensor in seen[0][:3]} == {torch.float32 if slow else dtype}
    wide = student.detach().float().requires_grad_()
    exact, *_ = real(wide, teacher.float(), head.float(), *about)
    exact.backward()
    bounds = {"rtol": 1e-6, "atol": 1e-6} if slow else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(loss, exact, **bounds)
    torch.testing.assert_close(student.grad, wide.grad.to(dtype), **bounds)
    expected = torch.nn.functional.cross_entropy(wide @ head.float().T, about[0], reduction="none")
    torch.testing.assert_close(nats, expected.detach(), **bounds)


# ------------------------------------------------------------------------------------------ activations


def recomputed(folder, tmp_path, **options):
    """Whether a run computes its activations again."""
    paths = {name: str(folder / "text" / f"{name}.jsonl") for name in ("en", "law")}
    data = DomainDataModule(paths, str(folder), seq_len=32, batch_size=4, heldout_fraction=0.2)
    sizes = {"sparsity": SparsitySpec(target=0.0), "lora": LoraSpec(rank=2), "kv": KVSpec(slots=4)}
    model = KOFFModule(str(folder), ["en", "law"], **sizes, **options)
    about = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    about |= {"max_steps": 1, "limit_val_batches": 0, "log_every_n_steps": 1, "default_root_dir": tmp_path}
    Trainer(callbacks=[AnnealSparsity()], **about).fit(model, data)
    assert decoder_layers(model.model.backbone)[0].gradient_checkpointing == model.objective.recompute
    return model.objective.recompute


@pytest.mark.parametrize(("free", "due"), [(2**40, False), (None, False), (2**10, True)])
def test_activations_are_kept_unless_they_find_no_room(folder, tmp_path, monkeypatch, caplog, free, due):
    monkeypatch.setattr(recomputation, "free_memory", lambda _: free)
    if not due:  # seconds of counting would be spent for nothing
        monkeypatch.setattr(recomputation, "count", lambda _: pytest.fail("counted"))
    assert recomputed(folder, tmp_path) == due
    assert ("are computed again in the backward: kept" in caplog.text) == due


def test_what_is_counted_decides_where_the_bound_does_not(folder, tmp_path, monkeypatch):
    need = []
    monkeypatch.setattr(recomputation, "memory", lambda *_, **__: need and {"frozen weights": 2**40, "rest": need[0]})
    monkeypatch.setattr(recomputation, "_at_most", lambda _: 2**60)
    monkeypatch.setattr(recomputation, "free_memory", lambda _: 1000)
    for need[:], due in (([900], False), ([901], True)):
        assert recomputed(folder, tmp_path) == due


def test_what_is_counted_is_the_step_of_the_run(folder, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(recomputation, "_at_most", lambda step: steps.append(step) or 0)
    monkeypatch.setattr(recomputation, "free_memory", lambda _: 2**40)
    recomputed(folder, tmp_path)
    (step,) = steps
    assert (step.rows, step.length, step.domains, step.retention) == (4, 32, ["en", "law"], None)
    assert (step.lora.rank, step.kv.slots, step.sparsity.target, step.checkpointing) == (2, 4, 0.0, False)


@pytest.mark.parametrize("said", [False, True])
def test_what_was_said_of_activations_is_done(folder, tmp_path, monkeypatch, said):
    monkeypatch.setattr(recomputation, "free_memory", lambda _: pytest.fail("looked"))
    assert recomputed(folder, tmp_path, activation_checkpointing=said) == said


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("length", [16, 600])  # below and above where attention is merged
def test_the_bound_is_above_what_is_counted(family, length):
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    step = recomputation.Step(
        tiny_model(family, **sizes).config, ["a"], 3, length, lora=LoraSpec(rank=8), kv=KVSpec(slots=8)
    )
    assert max(recomputation.count(step).peaks.values()) <= recomputation._at_most(step)


def test_memory_that_is_free_is_a_plausible_number():
    free = recomputation.free_memory(torch.device("cpu"))
    assert free is None or 2**20 < free < 2**50


@pytest.mark.parametrize(("limit", "due"), [("1000000", 400_000), ("max", 800 * 1024), ("90000000", 800 * 1024)])
def test_in_a_container_what_files_that_were_read_take_counts_as_free(monkeypatch, tmp_path, limit, due):
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 1000 kB\nMemAvailable: 800 kB\n")
    for name, text in {"max": limit, "current": "900000", "stat": "anon 600000\ninactive_file 300000"}.items():
        (group / f"memory.{name}").write_text(f"{text}\n")
    monkeypatch.setattr(recomputation, "Path", lambda name: tmp_path / name.lstrip("/"))
    assert recomputation.free_memory(torch.device("cpu")) == due
