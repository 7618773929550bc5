"""What a config that says nothing gets: dtype and precision by the device, activations kept where they find room."""

import ast
import os
import re
from pathlib import Path
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


# ------------------------------------------------------------------------------------------ what cannot be, or differs

ROUNDED = "casts what is trained: small steps would be rounded away. Use bf16-mixed, and model.dtype for the frozen"
FOR_GPUS = (
    "trainer.precision '16-mixed' needs a GPU, and this run is on the CPU: use bf16-mixed, or null for what suits"
)
NO_DTYPE = "dtype must be a floating torch dtype such as float32, bfloat16 or float16; got "
STORED = "torch stores numbers in float8_e4m3fn but does not compute in it: give float32, bfloat16 or float16"


@pytest.mark.parametrize(
    ("word", "due"),
    [
        ("trainer.precision=16-mixed", FOR_GPUS),
        ("trainer.precision=16", FOR_GPUS),
        ("trainer.precision=bf16-true", f"trainer.precision 'bf16-true' {ROUNDED}"),
        ("trainer.precision=16-true", f"trainer.precision '16-true' {ROUNDED}"),
        (
            "trainer.precision=64",
            "'64-true' casts what is trained, which stays fp32 here. Use 32-true, and model.dtype",
        ),
        ("trainer.precision=transformer-engine", "into the backbone and cast what is trained, which koff cannot work"),
        ("trainer.precision=auto", "got 'auto'. Leave it out (null) for what suits the device."),
        ("model.dtype=int8", f"{NO_DTYPE}'int8'"),
        ("model.dtype=bfloat", f"{NO_DTYPE}'bfloat'"),
        ("model.dtype=float8_e4m3fn", STORED),
    ],
)
def test_what_the_word_alone_decides_is_refused_before_anything_is_read(
    tmp_path, monkeypatch, capsys, caplog, word, due
):
    monkeypatch.setattr(training_cli, "take_up", lambda *_: pytest.fail("read on"))
    words = ["--data.domains.en=bundled:en", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
    assert main(["fit", *words, f"--{word}"]) == 2
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("koff: ")]
    assert due in line
    assert "frozen weights in" not in caplog.text and not any(tmp_path.iterdir())


@pytest.mark.parametrize("verb", ["fit", "validate", "baseline", "prepare"])
def test_16_mixed_stays_allowed_where_there_is_a_gpu_and_for_who_only_prepares(monkeypatch, verb):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for gpu, accelerator in ((True, "auto"), (True, "gpu"), (True, "cpu"), (False, "auto"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        model, trainer = SimpleNamespace(dtype="half"), SimpleNamespace(precision=16, accelerator=accelerator)
        if verb == "prepare" or (gpu and accelerator != "cpu"):
            precision.refuse_words(model, trainer, verb)
        else:
            with pytest.raises(KoffError, match="'16-mixed' needs a GPU"):
                precision.refuse_words(model, trainer, verb)
        assert (model.dtype, trainer.precision) == ("float16", "16-mixed")


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("fp16", [True, False])
def test_what_is_slow_is_told_of_the_dtype_that_is_computed_in(monkeypatch, bf16, fp16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: fp16)
    for dtype, given, used in (
        ("float16", None, "float16"),
        ("half", "32", "float16"),
        ("float16", "bf16-mixed", "bfloat16"),
        ("float32", "bf16", "bfloat16"),
        ("bfloat16", "32-true", "bfloat16"),
        ("float64", None, "float64"),
    ):
        said = precision.told(SimpleNamespace(dtype=dtype), SimpleNamespace(precision=given, accelerator="auto"))
        slow = {"float16": not fp16, "bfloat16": not bf16, "float64": False}[used]
        assert (f"no instructions for half precision in {used}: a step takes several times" in said) == slow
        assert (f"frozen weights in {dtype}, steps in " in said) != slow
    for given in (None, "32", "32-true"):
        assert (
            precision.told(SimpleNamespace(dtype="float32"), SimpleNamespace(precision=given, accelerator="auto"))
            is None
        )


@pytest.mark.parametrize("has", [True, False])
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
def test_the_head_is_multiplied_in_fp32_where_fp16_is_slow_and_bf16_is_not(monkeypatch, autocast, has):
    seen, real = [], losses.fused_head_loss
    monkeypatch.setattr(losses, "half_is_slow", lambda _: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", lambda: has)
    monkeypatch.setattr(losses, "fused_head_loss", lambda *words: seen.append(words) or real(*words))
    torch.manual_seed(0)
    student, head, labels = torch.randn(5, 8).half(), torch.randn(30, 8).half(), torch.arange(5)
    exact = torch.nn.functional.cross_entropy(student.float() @ head.float().T, labels, reduction="none")
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        losses.head_loss(student, None, head, labels, torch.full((5,), 0.2), losses.LossSpec(1.0, 0.0))
        nats = losses.head_nats(student, head, labels, 2)
    wide = not has and autocast != torch.bfloat16
    assert {tensor.dtype for tensor in (seen[0][0], seen[0][2])} == {torch.float32 if wide else torch.float16}
    torch.testing.assert_close(nats, exact, **({} if wide else {"rtol": 0.1, "atol": 0.1}))


def words_of(folder, tmp_path, *further):
    """Of a short run on the small backbone."""
    words = ["--model.backbone", str(folder), "--export.enabled=false", "--trainer.accelerator=cpu"]
    words += [f"--data.domains.{name}={folder / 'text' / f'{name}.jsonl'}" for name in ("en", "law")]
    words += ["--data.seq_len=32", "--trainer.limit_val_batches=0", "--trainer.limit_test_batches=1"]
    words += ["--data.heldout_fraction=0.2", "--model.loss.kl=0", "--trainer.log_every_n_steps=1"]
    return [*words, f"--trainer.default_root_dir={tmp_path}", *further]


def test_a_run_that_goes_on_in_another_precision_says_so_once(folder, tmp_path, capsys, caplog):
    """Whichever way; a checkpoint of what this device cannot do is not taken up as something else."""

    def goes_on(*further):
        caplog.clear()
        assert main(["fit", *words_of(folder, tmp_path, *further)]) == 0
        return [line for line in caplog.messages if "so far computed" in line]

    assert not goes_on("--trainer.max_steps=1", "--trainer.precision=bf16-mixed")
    assert not goes_on("--trainer.max_steps=2", "--ckpt_path=last")
    assert not goes_on("--trainer.max_steps=2", "--ckpt_path=last", "--trainer.precision=bf16")
    there = "the run so far computed in bf16-mixed, from here on in 32-true (trainer.precision)"
    assert goes_on("--trainer.max_steps=3", "--ckpt_path=last", "--trainer.precision=32-true") == [there]
    back = "the run so far computed in 32-true, from here on in bf16-mixed (trainer.precision)"
    assert goes_on("--trainer.max_steps=4", "--ckpt_path=last", "--trainer.precision=bf16-mixed") == [back]
    (last,) = (tmp_path / "version_4").rglob("last.ckpt")
    content = torch.load(last, weights_only=True)
    content["koff"]["precision"] = "16-mixed"
    torch.save(content, last)
    words = words_of(folder, tmp_path, "--trainer.max_steps=5", f"--ckpt_path={last}")
    capsys.readouterr()
    assert main(["fit", *words]) == 2
    assert "computed in 16-mixed, which needs a GPU, and this one is on the CPU: give" in capsys.readouterr().err
    said = goes_on("--trainer.max_steps=5", f"--ckpt_path={last}", "--trainer.precision=bf16-mixed")
    assert said == [there.replace("bf16-mixed", "16-mixed").replace("32-true", "bf16-mixed")]


def test_a_mask_of_a_run_in_another_dtype_is_refused_by_its_name(folder, tmp_path, capsys):
    words = words_of(folder, tmp_path, "--trainer.max_steps=1")
    assert (
        main(["baseline", *words[:-1], "--method=magnitude", "--sparsity=0.2", "--no-score", f"--out={tmp_path}"]) == 0
    )
    mask = tmp_path / "checkpoints" / "last.ckpt"
    for option in ("mask", "prior"):
        capsys.readouterr()
        assert main(["fit", *words, f"--model.{option}={mask}", "--model.dtype=bfloat16"]) == 2
        due = (
            f"the mask in {mask} is of a run that kept its frozen weights in float32, this one keeps them in bfloat16: "
        )
        assert f"{due}give --model.dtype float32" in capsys.readouterr().err


def test_options_that_are_named_in_advice_exist():
    named = set()
    for node in ast.walk(ast.parse(Path(training_cli.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            sections = "data|model|trainer|loss|sparsity|lora|kv|optim|checkpoint|anneal|export"
            named |= set(re.findall(rf"(?<![\w./])(?:{sections})(?:\.[a-z]\w*)+", node.value))
    options = training_cli.resolved(["fit", "--data.domains.en=bundled:en"])

    def leaf(name):
        value = options
        for part in name.split("."):
            value = value.get(part, KeyError) if isinstance(value, dict) else KeyError
        return value

    assert {"data.batch_size", "model.loss.chunk", "model.activation_checkpointing"} <= named
    assert [name for name in named if leaf(name) is KeyError] == ["model.domains"]  # which is taken from the data
