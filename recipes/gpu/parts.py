"""What to look at first where there is a GPU: correctness, then speed and memory, attention, decoding, quality.

    python recipes/gpu/parts.py correct --out gpu.jsonl
    python recipes/gpu/parts.py all --tiny --device cpu --out /tmp/rows.jsonl      # on small shapes, for a test

Each finding is one line of JSON, written as soon as it is known, so that a run that is cut off is worth what it got to.
`recipes/gpu/all.sh` runs the parts in order with a time limit each. Nobody has run it on a GPU yet. Models have random
weights in the exact shapes of the named ones: speed and memory do not depend on the numbers.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from koff_lightning import KVSpec, LoraSpec, LossSpec, SparsitySpec, attention
from koff_lightning.attention import LayerMemory, attend_merged, attend_reference
from koff_lightning.backbone import allow_recomputation
from koff_lightning.commands.published_sizes import PUBLISHED
from koff_lightning.data.teacher import INDEX, LOG_Q
from koff_lightning.decomposition import Decomposition
from koff_lightning.losses import top_k_of
from koff_lightning.support import ranks
from koff_lightning.training.objective import Objective

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 256}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SHAPES = {  # speed of a step: name -> (published sizes, rows, tokens of a row)
    "Llama-3.2-1B": ("meta-llama/Llama-3.2-1B", 4, 4096),
    "Llama-3.2-3B": ("meta-llama/Llama-3.2-3B", 2, 4096),
    "Llama-3.1-8B": ("meta-llama/Llama-3.1-8B", 1, 4096),
    "Qwen2.5-3B": ("Qwen/Qwen2.5-3B", 2, 4096),
    "Qwen3-8B": ("Qwen/Qwen3-8B-Base", 1, 4096),
}
MORE = {  # sizes that no shipped config needs; from the models' published config.json
    "meta-llama/Llama-3.2-1B": PUBLISHED["meta-llama/Llama-3.2-3B"]
    | {"hidden_size": 2048, "num_hidden_layers": 16, "head_dim": 64},
    "Qwen/Qwen2.5-3B": PUBLISHED["Qwen/Qwen2.5-7B"]
    | {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
}
DOMAINS = ["de", "en"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BOUND = {"fp32": 2e-4, "bf16": 6e-2}  # of the largest logit; fp32 without TF32
WAYS = {"merged": attend_merged, "reference": attend_reference}
Say = Callable[..., None]


@contextlib.contextmanager
def model_of(sizes: dict[str, Any], dtype: torch.dtype, device: str) -> Iterator[Decomposition]:
    """A decomposition of a random backbone of these shapes, its mask half-way and its memories full of noise."""
    sizes = dict(sizes)
    config = AutoConfig.for_model(sizes.pop("model_type", "llama"), **sizes)
    with TemporaryDirectory() as folder:
        with torch.device(device):
            backbone = AutoModelForCausalLM.from_config(config, dtype=dtype)
        backbone.save_pretrained(folder)
        del backbone
        sparsity = SparsitySpec(target=0.12, min_channels=8)
        module = Decomposition(folder, DOMAINS, sparsity, LoraSpec(16, 32.0), KVSpec(128), dtype=str(dtype)[6:])
    module.to(device)
    with torch.no_grad():
        for parameter in (*module.memories.lora_parameters(), *module.memories.kv_parameters()):
            parameter.normal_(std=0.05)
        module.gates.logits.normal_(std=4)
    module.target = 0.12
    yield module


def batch_of(rows: int, length: int, vocabulary: int, device: str) -> dict[str, Any]:
    """Random tokens, rows of both domains in turn."""
    ids = torch.randint(3, vocabulary, (rows, length), device=device)
    domains = list(itertools.islice(itertools.cycle(DOMAINS), rows))
    return {"input_ids": ids, "labels": ids, "domains": domains}


def gap(one: Tensor, other: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((one.float() - other.float()).abs().max() / other.float().abs().max())


def correct(say: Say, device: str, tiny: bool) -> None:
    """What holds on the CPU, here in fp32 and bf16: rows apart, packed rows, recomputation, the CPU's own values."""
    families = ("llama", "qwen2", "qwen3")
    attention.MERGE_FROM = 0  # as in long rows
    for (name, dtype), family in itertools.product(DTYPES.items(), families):
        with model_of(TINY | {"model_type": family}, dtype, device) as module, torch.no_grad():
            batch = batch_of(4, 48, TINY["vocab_size"], device)
            with module.under(batch["domains"], module.hard_gates()):
                together = module.hidden(batch)  # [B, T, d]
            alone = []
            for row, domain in enumerate(batch["domains"]):
                with module.under([domain], module.hard_gates()):
                    alone.append(module.hidden({"input_ids": batch["input_ids"][row : row + 1]}))
            say(what="rows together and alone", family=family, dtype=name, gap=gap(torch.cat(alone), together))
            with module.under(batch["domains"], module.hard_gates()):
                places = (torch.arange(48, device=device) % 24).expand(4, -1)
                packed = module.hidden({"input_ids": batch["input_ids"], "position_ids": places})[:, 24:]
                apart = module.hidden({"input_ids": batch["input_ids"][:, 24:]})
            say(what="packed and apart", family=family, dtype=name, gap=gap(packed, apart))
            module.to("cpu")
            with module.under(batch["domains"], module.hard_gates()):
                there = module.hidden({"input_ids": batch["input_ids"].cpu()})
            say(what="device and CPU", family=family, dtype=name, gap=gap(together.cpu(), there))
        _recomputed(say, device, family, name, dtype)


def _recomputed(say: Say, device: str, family: str, name: str, dtype: torch.dtype) -> None:
    """Gradients of a step with checkpointed layers, without, and on the CPU."""
    with model_of(TINY | {"model_type": family}, dtype, device) as module:
        batch, gates = batch_of(4, 48, TINY["vocab_size"], device), torch.rand(4, len(module.gates.logits))
        kept = _gradients(module, batch, gates.to(device), False)
        again = _gradients(module, batch, gates.to(device), True)
        module.to("cpu")
        batch |= {part: batch[part].cpu() for part in ("input_ids", "labels")}
        there = _gradients(module, batch, gates, False)
    say(what="gradients recomputed and kept", family=family, dtype=name, gap=gap(again, kept))
    say(what="gradients on device and CPU", family=family, dtype=name, gap=gap(kept.cpu(), there))


def _gradients(module: Decomposition, batch: dict[str, Any], gates: Tensor, again: bool) -> Tensor:
    """Of all that a step trains under these gates [B, U], in one row."""
    module.zero_grad()
    gates = gates.clone().requires_grad_()
    if again:
        allow_recomputation(module.backbone)
    objective = Objective(module, LossSpec(1.0, 1.0), again)
    objective(batch, gates, batch["domains"], module.domain_of_row(batch)).loss.backward()
    return torch.cat([p.grad.flatten() for p in (*module.parameters(), gates) if p.grad is not None])


def attend(say: Say, device: str, tiny: bool) -> None:
    """Merged attention beside the reference (one attention over memory and tokens): value, gradients, time."""
    rows, heads, kv_heads, slots, width = (2, 4, 2, 8, 16) if tiny else (4, 24, 8, 256, 128)
    for length in (64,) if tiny else (512, 2048, 4096):
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        tokens, memory = (rows, kv_heads, length, width), (rows, kv_heads, slots, width)
        shapes = [(rows, heads, length, width), tokens, tokens, memory, memory]
        made = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
        runs = {name: partial(_attended, ways, made) for name, ways in WAYS.items()}
        out = {name: run() for name, run in runs.items()}
        seconds = {name: timed(run, device, 3 if tiny else 20) for name, run in runs.items()}
        gaps = [gap(one, other) for one, other in zip(out["merged"], out["reference"], strict=True)]
        say(what="merged beside reference", length=length, dtype=str(dtype)[6:], gaps=gaps, seconds=seconds)


def _attended(attend: Callable[..., Tensor], made: list[Tensor]) -> list[Tensor]:
    """The output and the gradients of its inputs: query, key, value, memory key, memory value."""
    query, key, value, memory_key, memory_value = made
    found = attend(query, key, value, LayerMemory(memory_key, memory_value), None, None, True)
    return [found.detach(), *torch.autograd.grad(found.float().square().sum(), made)]


def timed(run: Callable[[], object], device: str, rounds: int) -> float:
    """Median seconds of a call, after two that do not count."""
    times = []
    for _ in range(rounds + 2):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def step(say: Say, device: str, tiny: bool) -> None:
    """Seconds, tokens per second and memory of a training step: peft LoRA, KOFF without KL, live and stored teacher."""
    for name, (published, rows, length) in SHAPES.items():
        sizes = TINY if tiny else {**PUBLISHED, **MORE}[published]
        rows, length = (2, 32) if tiny else (rows, length)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        for kind in ("peft", "no KL", "live", "stored"):
            if device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            try:
                seconds = _peft(sizes, rows, length, dtype, device, tiny) if kind == "peft" else None
                seconds = seconds or _koff(kind, sizes, rows, length, dtype, device, tiny)
            except torch.OutOfMemoryError as error:
                say(what="step", model=name, kind=kind, error=str(error).split(".")[0])
                continue
            memory = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
            say(what="step", model=name, kind=kind, rows=rows, length=length, seconds=seconds,
                tokens_per_second=rows * length / seconds, gib=memory)  # fmt: skip
        if tiny:
            return


def _peft(sizes: dict[str, Any], rows: int, length: int, dtype: torch.dtype, device: str, tiny: bool) -> float:
    sizes = dict(sizes)
    config = AutoConfig.for_model(sizes.pop("model_type", "llama"), **sizes)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=LoraSpec().targets))
    allow_recomputation(model)
    model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    batch = batch_of(rows, length, config.vocab_size, device)

    def run() -> None:
        with _amp(device):
            model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return timed(run, device, 1 if tiny else 8)


def _amp(device: str) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


def _koff(
    kind: str, sizes: dict[str, Any], rows: int, length: int, dtype: torch.dtype, device: str, tiny: bool
) -> float:
    spec = LossSpec(1.0, 0.0) if kind == "no KL" else LossSpec(0.0, 1.0, top_k=100, teacher=kind)
    with model_of(sizes, dtype, device) as module:
        allow_recomputation(module.backbone)
        batch = batch_of(rows, length, module.backbone.config.vocab_size, device)
        objective, groups = Objective(module, spec, True), module.domain_of_row(batch)
        if kind == "stored":
            with _amp(device):
                hidden = module.dense_hidden(batch)[:, :-1]
            seen = [top_k_of(row, module.head, spec.top_k) for row in hidden]
            batch |= {INDEX: torch.stack([row.index for row in seen]).int()}
            batch |= {LOG_Q: torch.stack([row.log_q for row in seen]).half()}
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)

        def run() -> None:
            with _amp(device):
                loss = objective(batch, module.gates.draw(rows, (0, 0, 0)), batch["domains"], groups).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return timed(run, device, 1 if tiny else 8)


PARTS = {"correct": correct, "attention": attend, "step": step}


def main() -> None:
    """Run a part, or all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    where = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    wrong = []

    def say(**row: Any) -> None:
        row = {"part": part, "device": where, "torch": torch.__version__, **row}
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        bad = not row.get("gap", 0) <= BOUND.get(row.get("dtype", ""), 1)  # also where it is no number
        wrong.extend([row] * bad)
        print(("WRONG " if bad else "") + json.dumps(row), flush=True)

    assert ranks.count() == 1
    for part in PARTS if options.part == "all" else [options.part]:
        torch.manual_seed(0)
        PARTS[part](say, options.device, options.tiny)
    if wrong:
        raise SystemExit(f"{len(wrong)} findings are beyond their bound, first {wrong[0]}")


if __name__ == "__main__":
    main()
