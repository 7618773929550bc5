"""What a run will take, told before it starts: against real runs, against published sizes, and in words."""

import re
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from tiny_artifact import tiny_artifact
from tiny_models import tiny_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from koff_lightning import losses
from koff_lightning.backbone import neuron_linears, parameter_counts, without_weights
from koff_lightning.cli import main
from koff_lightning.commands.plan import planned
from koff_lightning.commands.published_sizes import PUBLISHED
from koff_lightning.loading import load_backbone
from koff_lightning.losses import fused_head_loss
from koff_lightning.memory import MemoryBank
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.specs.training import LossSpec, RetentionSpec
from koff_lightning.training import planning
from koff_lightning.training.planning import Step, _count, _Live, count, memory

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes/scale"))
import peak

TOTALS = {  # by the models' cards on the hub
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-8B-Base": 8_190_735_360,
}


@pytest.fixture
def step():
    config = tiny_model("qwen3", num_hidden_layers=5).config
    return Step(config, ["en", "law"], 4, 24, lora=LoraSpec(rank=2), kv=KVSpec(slots=4))


# --------------------------------------------------------------------------------------------- against real runs


def compare(*cases, tmp_path):
    """Plan over measured peak of cases of the recipe."""
    words = [peak.words(peak.backbone(model, tmp_path), *rest) for model, *rest in cases]
    return [planned(given, on_cpus=True)[1] / real for given, real in zip(words, peak.in_child(words), strict=True)]


def test_the_peak_of_a_real_run_is_met_to_15_percent(tmp_path):
    assert compare(("koff-tiny", 7, 256, {}), tmp_path=tmp_path) == [pytest.approx(1, abs=0.15)]


@pytest.mark.slow
def test_and_of_larger_ones_with_and_without_kl_and_checkpointing(tmp_path):
    options = {"model.loss.kl": 0}, {"model.activation_checkpointing": "true"}, {"trainer.accumulate_grad_batches": 2}
    options += ({"model.retention.every": 1, "model.retention.updates": "both", "data.retention.g": "bundled:en"},)
    ratios = compare(*(("20M", 7, 128, each) for each in options), tmp_path=tmp_path)
    assert ratios == [pytest.approx(1, abs=0.15)] * len(options)


# ------------------------------------------------------------------------------------------------------ counting


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_that_are_not_counted_are_as_those_that_are(step, checkpointing):
    step = replace(step, checkpointing=checkpointing)
    counts, whole = count(step), _count(step, step.config.num_hidden_layers)
    for field in fields(counts):
        assert getattr(counts, field.name) == whole[field.name], field.name


@pytest.fixture(scope="module")
def known():
    return {}


@pytest.mark.parametrize("lora", ["top:2", [0, 3]])
@pytest.mark.parametrize("kv", ["top:40%", [1]])
def test_layers_without_memories_are_counted_as_such(step, known, monkeypatch, lora, kv):
    def once(step, layers):  # of the kinds of layers, the same of each of these placements
        asked = repr(step), layers
        if asked not in known:
            known[asked] = _count(step, layers)
        return known[asked]

    monkeypatch.setattr(planning, "_count", once)
    step = replace(step, lora=LoraSpec(rank=2, layers=lora), kv=KVSpec(slots=4, layers=kv))
    counts, whole = count(step), _count(step, step.config.num_hidden_layers)
    for field in fields(counts):
        if field.name != "peaks":
            assert getattr(counts, field.name) == whole[field.name], field.name
    assert counts.peaks == pytest.approx(whole["peaks"], rel=0.05)
    everywhere = count(replace(step, lora=LoraSpec(rank=2), kv=KVSpec(slots=4)))
    assert counts.trained < everywhere.trained
    assert counts.flops < everywhere.flops


def test_weights_and_memories_are_counted_exactly(step):
    counts, model = count(step), tiny_model("qwen3", num_hidden_layers=5)
    assert counts.layers + counts.rest == 4 * parameter_counts(model)["total"]
    memories = MemoryBank(model, step.domains, step.lora, step.kv)
    assert counts.lora == 4 * sum(p.numel() for p in memories.lora_parameters())
    assert counts.kv == 4 * sum(p.numel() for p in memories.kv_parameters())
    assert sum(memories.size(d) for d in step.domains) * 4 == counts.lora + counts.kv + counts.sinks
    half = count(replace(step, dtype=torch.bfloat16))
    assert (half.layers, half.trained) == (counts.layers / 2, counts.trained)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_layers_of_unequal_width_are_counted_one_by_one(tmp_path, checkpointing):
    made = tiny_artifact(tmp_path, changes={"num_hidden_layers": 5})
    model = load_backbone(str(made.folder / "backbone"))
    assert len({up.out_features for up, _ in neuron_linears(model)}) > 1
    counts = count(Step(model.config, ["en"], 4, 24, lora=LoraSpec(rank=2), checkpointing=checkpointing))
    assert counts.layers + counts.rest == 4 * parameter_counts(model)["total"]


def test_the_arithmetic_is_that_of_the_matrix_products(step):
    """2 per weight and token forward, as much for the gradient of what went in, as much forward for the teacher."""
    step, config = replace(step, lora=None, kv=None, loss=LossSpec(kl=0)), step.config
    tokens, body = step.rows * step.length, parameter_counts(tiny_model("qwen3", num_hidden_layers=5))["body"]
    head = 2 * step.rows * (step.length - 1) * config.vocab_size * config.hidden_size
    product = 2 * step.rows * step.length**2 * config.num_attention_heads * config.head_dim
    ends = config.num_attention_heads + 2 * config.num_key_value_heads  # whatever goes into the first layer is frozen
    spared = 2 * tokens * config.hidden_size * ends * config.head_dim + 5 * product
    assert count(step).flops == 4 * tokens * body + 2 * head + 5 * (2 + 5) * product - spared
    teacher = count(replace(step, loss=LossSpec())).flops - count(step).flops
    assert teacher == 2 * tokens * body + head + 5 * 2 * product


def test_general_text_is_a_second_pass_in_some_steps(step):
    """It costs as much forward, and backward only what leads to what it moves; its gradients stay for the rest."""
    step = replace(step, loss=LossSpec(kl=0), sparsity=SparsitySpec(target=0.1))
    none, mask, both = (
        count(replace(step, retention=how and RetentionSpec(updates=how))) for how in (None, "mask", "both")
    )
    assert none.retention == 0 and none.flops == mask.flops == both.flops
    assert none.flops / 2 < mask.retention < both.retention <= none.flops
    assert none.peaks["backward"] < mask.peaks["backward"] < both.peaks["backward"] < 2 * none.peaks["backward"]
    assert mask.activations == pytest.approx(none.activations, rel=0.01)
    nothing = replace(step, sparsity=SparsitySpec(target=0.0), retention=RetentionSpec())
    assert count(nothing).retention == 0, "without a mask to learn it moves nothing, and no step takes it"


def test_every_saving_saves(step):
    step = replace(step, length=600)
    counts = count(step)
    assert count(replace(step, checkpointing=True)).activations < counts.activations / 3
    assert count(replace(step, rows=2)).activations == pytest.approx(counts.activations / 2, rel=0.02)
    assert count(replace(step, loss=LossSpec(kl=0))).peaks["loss"] < counts.peaks["loss"]
    whole, sharded = (memory(step, counts, devices=4, sharded=way) for way in (False, True))
    assert sum(sharded.values()) < sum(whole.values())
    assert sharded["frozen weights"] == counts.rest + counts.layers / 4
    assert sum(memory(replace(step, gpu=False), counts).values()) == pytest.approx(
        counts.layers + counts.rest + counts.sinks + 4 * counts.trained + max(counts.peaks.values())
    )


def test_a_gpu_is_planned_alike_on_every_processor(step, monkeypatch):
    """One without bf16 multiplies with an fp32 copy of the head, and any with shorter chunks; a GPU does neither."""
    step.config.vocab_size = 50_000
    half = {"dtype": torch.bfloat16, "precision": "bf16-mixed", "loss": LossSpec(kl=0)}
    step, peaks = replace(step, length=300, **half), []
    for slow in (True, False):
        monkeypatch.setattr(losses, "has_products", lambda _, slow=slow: not slow)
        peaks.append(count(step).peaks)
    assert peaks[0] == peaks[1]
    shorter = count(replace(step, loss=LossSpec(kl=0, chunk=512))).peaks["loss"]
    assert peaks[0]["loss"] - shorter >= 2 * 4 * 512 * step.config.vocab_size, "fp32 logits and their softmax"


@pytest.mark.parametrize(("kl", "top_k"), [(0, None), (2, None), (2, 50)])
def test_many_chunks_of_tokens_take_as_much_at_one_time_as_one(kl, top_k):
    peaks, spec = [], LossSpec(kl=kl, top_k=top_k, chunk=64)
    for chunks in (1, 3):
        with FakeTensorMode():
            head, labels, weights = torch.zeros(5000, 8), torch.zeros(64 * chunks, dtype=torch.int64), torch.ones(())
            student, teacher = torch.zeros(64 * chunks, 8, requires_grad=True), torch.zeros(64 * chunks, 8)
            with _Live([head, labels, weights, student, teacher]) as live:
                fused_head_loss(student, teacher if kl else None, head, labels, weights, spec, spec.chunk)
        peaks.append(live.peak)
    assert peaks[1] < 1.05 * peaks[0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_add_up_to_the_published_totals(name):
    sizes = dict(PUBLISHED[name])
    assert (
        parameter_counts(without_weights(AutoConfig.for_model(sizes.pop("model_type"), **sizes)))["total"]
        == TOTALS[name]
    )


# -------------------------------------------------------------------------------------------------- the command


def test_an_8b_run_is_planned_without_weights_or_network(monkeypatch, capsys):
    monkeypatch.setattr("koff_lightning.loading._loading", lambda *_: pytest.fail("looked for a model"))
    assert main(["plan", "--config", "llama31_8b_12pct.yaml", "--gpus", "8", "--gpu-memory", "80"]) == 0
    told = capsys.readouterr().out
    assert "frozen weights                     14.96" in told  # 8.03 billion, 2 bytes each
    assert "fits:" in told and "hours for 2,000 steps, 917,504,000 tokens" in told


@pytest.mark.parametrize(
    "name, memory",
    [
        ("llama31_8b_topics", 277e6),
        ("llama32_3b_topics", None),
        ("qwen25_3b_topics", None),
        ("llama32_1b_topics", None),
    ],
)
def test_the_papers_recipes_fit_on_one_gpu_without_asking_for_a_model(name, memory, monkeypatch, capsys):
    """Six memories of its rank on one GPU of 80 GB, as the paper trains them; at 8B of the size that it gives."""
    monkeypatch.setattr("koff_lightning.loading._loading", lambda *_: pytest.fail("looked for a model"))
    words = ["plan", "--config", f"paper/{name}.yaml", "--config", "domains/wikipedia_topics.yaml"]
    assert main([*words, "--config", "retention/paper.yaml", "--gpu-memory", "80"]) == 0
    told = capsys.readouterr().out
    assert "6 domains" in told and "fits:" in told and "general text" in told
    trained = sum(float(re.search(rf"{part} +([\d.]+)\n", told)[1]) for part in ("LoRA", "KV memories"))  # GiB, fp32
    assert memory is None or trained * 2**30 / 4 / 6 == pytest.approx(memory, rel=0.003)


def test_what_does_not_fit_is_told_what_would(capsys):
    words = ["plan", "--config", "demo.yaml", "--gpus", "2", "--tflops", "1"]
    few = ["--data.domains={de: bundled:de, en: bundled:en}"]  # each takes its time to count
    kept = [*few, "--model.activation_checkpointing=false"]
    assert main([*words, "--gpu-memory", "0.1", "--", "--data.seq_len=512", *kept]) == 0
    told = capsys.readouterr().out
    assert "does not fit:" in told
    advice = told.partition("fits with ")[2].partition(":")[0].split()
    assert advice[0] == "--model.activation_checkpointing=true"
    assert main([*words, "--gpu-memory", "0.1", "--", "--data.seq_len=512", *few, *advice]) == 0
    assert "\nfits: " in capsys.readouterr().out
    assert main([*words, "--gpu-memory", "0.01", "--", *few]) == 0
    assert "even one row takes" in capsys.readouterr().out


def test_fewer_rows_are_advised_and_nothing_is_counted_twice(monkeypatch, capsys):
    """Of 7 rows of a GiB each, halved where activations are recomputed, 3 fit into 92 % of 2 GiB."""
    counted = []

    def count(step):
        counted.append((step.checkpointing, step.rows))
        size = step.rows * 2**30 / (2 if step.checkpointing else 1)
        nothing = dict.fromkeys((field.name for field in fields(planning.Counts)), 0)
        return planning.Counts(**nothing | {"peaks": {"backward": size}, "flops": 1})

    monkeypatch.setattr(planning, "count", count)
    words = ["plan", "--config", "demo.yaml", "--tflops", "1", "--gpu-memory", "2", "--"]
    assert main([*words, "--model.activation_checkpointing=false"]) == 0
    advice = "--model.activation_checkpointing=true --data.batch_size=3 --trainer.accumulate_grad_batches=3: 1.5 GiB"
    assert f"fits with {advice}" in capsys.readouterr().out
    assert counted == [(False, 7), (True, 7), (True, 1), (True, 3)]


def test_a_config_in_place_of_a_model_out_of_reach(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = ["plan", "--config", "demo.yaml", "--", "--model.backbone", "owner/model"]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("koff: backbone 'owner/model': no such folder here") and "--model-config" in said
    assert said.count("\n") == 1
    tiny_model("llama").config.save_pretrained(tmp_path)
    quantised = tmp_path / "quantised"
    tiny_model("llama", quantization_config={"quant_method": "gptq"}).config.save_pretrained(quantised)
    assert main([*words[:-1], str(quantised)]) == 2
    assert capsys.readouterr().err.endswith("get the unquantised weights\n"), "its config.json is no way out"
    told = [*words[:3], "--model-config", str(tmp_path / "config.json"), *words[3:], "--model.dtype=float32"]
    assert main(told) == 0
    assert "no time told: give --tflops" in capsys.readouterr().out
    assert main([*words[:3], "--model-config", str(tmp_path), *words[3:]]) == 2
    assert "must be a file config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give the run's config"),
        (["--config", "demo.yaml", "--gpus", "0"], "gpus must be more than 0"),
        (["--config", "demo.yaml", "--gpu", "h1000"], "got 'h1000'. For another leave --gpu out and give --gpu-memory"),
        (["--config", "demo.yml"], "Did you mean 'demo.yaml'"),
        (["--config", "demo.yaml", "--", "--model.lora.rnk=3"], "no option 'model.lora.rnk'"),
        (["--config", "add_domain.yaml", "--", "--data.domains.x=bundled:en"], "model.artifact names one that was cut"),
    ],
)
def test_bad_input_is_one_line(words, said, capsys):
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_what_is_small_is_told_in_mib(capsys):
    """Not as 0.00 GiB."""
    assert main(["plan", "--config", "demo.yaml", "--tflops", "1", "--gpu-memory", "80"]) == 0
    told = capsys.readouterr().out
    assert re.search(r"^  LoRA +[1-9][\d.]* MiB$", told, re.MULTILINE)
    assert not re.search(r"^  .* 0\.00", told, re.MULTILINE)
