"""What a KOFF training step costs beside the same step with plain peft LoRA.

    python recipes/scale/bench.py

With `--teacher K`: what a step with the stored teacher's K likeliest tokens costs beside one with a live teacher, and
beside plain peft LoRA; there also the loss of a run with such a teacher, CE + 2 KL with the tail in a bucket. The first
of two steps is also set against the machine's own rate: 4 N floating-point operations a token, forward and
backward of N frozen parameters, at the rate at which it multiplies matrices of the FFN's shape in that dtype.

Both steps see the same batch of the bundled corpora, adapt the same linears at the same rank, leave out KL and include
the optimizer. They run in turn in one process, so that drift of the machine's speed cancels in the ratio; peak memory
is taken in a fresh process for each.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from koff_lightning.callbacks.anneal import AnnealSparsity
from koff_lightning.data import DomainDataModule
from koff_lightning.data.teacher import INDEX, LOG_Q
from koff_lightning.loading import TINY, load_backbone
from koff_lightning.losses import top_k_of
from koff_lightning.sparsity import SparsitySchedule
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.specs.training import LossSpec
from koff_lightning.training.module import KOFFModule
from koff_lightning.training.optim import parameter_groups

Step = Callable[[], None]


def batch_of(domains: list[str], rows: int, length: int, device: str) -> tuple[dict[str, Any], DomainDataModule]:
    """One training batch with every domain in it, and the data it came from."""
    sources = {name: f"bundled:{name}" for name in domains}
    data = DomainDataModule(sources, tokenizer=TINY, seq_len=length, batch_size=rows, max_train_bytes=400_000)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}, data


def lora_step(batch: dict[str, Any], rank: int, device: str, backbone: str, dtype: str) -> Step:
    """Forward, backward and AdamW of one peft adapter on the frozen backbone."""
    model = load_backbone(backbone, dtype=dtype).to(device)
    model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LoraSpec().targets))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    inputs = {k: batch[k] for k in ("input_ids", "position_ids", "labels") if k in batch}

    def step() -> None:
        model(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def koff_step(
    batch: dict[str, Any],
    data: DomainDataModule,
    rank: int,
    slots: int,
    device: str,
    backbone: str,
    dtype: str = "float32",
    loss: LossSpec = LossSpec(kl=0),  # noqa: B008
) -> Step:
    """The same with gates being learned, an adapter and a KV memory per domain, rows routed to their own."""
    sizes = {"lora": LoraSpec(rank, 2 * rank), "kv": KVSpec(slots)}
    module = KOFFModule(backbone, data.domain_names, **sizes, loss=loss, dtype=dtype)
    module.configure_model()
    module.to(device).train()
    if loss.teacher == "stored":  # what the loader would have read from the disk
        hidden = module.model.dense_hidden(batch)[:, :-1]
        seen = [top_k_of(row, module.model.head, loss.top_k) for row in hidden]
        index, log_q = torch.stack([row.index for row in seen]), torch.stack([row.log_q for row in seen])
        batch = batch | {INDEX: index.int(), LOG_Q: log_q.half()}
    for name in data.domain_names:
        memory = module.model.memories.kv[module.model.memories.key(name)]
        memory.initialise_(module.model.backbone, data.sample_ids(name, slots).to(device))
    module.schedule = SparsitySchedule(target=0.12, steps=2, warmup=0, ramp=0, hold=1)  # step 0: gates are drawn
    module.model.target = 0.06
    gates = module.model.gates  # ordered, as a run's are when its mask begins
    gates.order = torch.rand(gates.logits.numel(), generator=torch.Generator().manual_seed(0)).to(device)
    gates.order_by_prior(module.model.budget.costs, module.sparsity.spread)
    module.log_dict = lambda *_, **__: None
    groups = parameter_groups(module.model.gates, module.penalty, module.model.memories, module.optim)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)

    def step() -> None:
        with torch.no_grad():
            module.model.gates.shift_to_target(module.model.target, module.sparsity.band, module.model.budget.counts)
        AnnealSparsity.state_of_mask(module)
        module.training_step(batch, 0).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Step, device: str) -> float:
    """Seconds that one step takes."""
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(kind: str, options: argparse.Namespace) -> float:
    """Peak memory of three steps in a fresh process, MiB: of the GPU, or of the process beyond what it held before."""
    passed = [f"--{k}={v}" for k, v in vars(options).items() if k not in ("measure", "rounds", "teacher")]
    command = [sys.executable, __file__, f"--measure={kind}", *passed]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def make(kind: str, options: argparse.Namespace) -> Step:
    """Build a step: `lora`, `koff` without a teacher, with KL alone to a `stored` or `live` one, CE and KL: `both`."""
    domains = options.domains.split(",")
    batch, data = batch_of(domains, options.rows, options.length, options.device)
    if kind == "lora":
        return in_dtype(lora_step(batch, options.rank, options.device, options.backbone, options.dtype), options)
    if kind == "koff":
        loss = LossSpec(kl=0)
    elif kind == "both":
        loss = LossSpec(1.0, 2.0, top_k=options.teacher, tail="bucket", teacher="stored")
    else:
        loss = LossSpec(0.0, 1.0, top_k=options.teacher, teacher=kind)
    about = options.rank, options.slots, options.device, options.backbone, options.dtype
    return in_dtype(koff_step(batch, data, *about, loss), options)


def in_dtype(step: Step, options: argparse.Namespace) -> Step:
    """The step as a trainer of precision bf16-mixed takes it, where the weights are bfloat16."""

    def cast() -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.dtype == "bfloat16"):
            step()

    return cast


def of_the_products(options: argparse.Namespace, seconds: float) -> str:
    """A step's tokens a second, and its share of what the machine's own matrix products would allow."""
    config, dtype = load_backbone(options.backbone).config, getattr(torch, options.dtype)
    parameters = sum(p.numel() for p in load_backbone(options.backbone).parameters())
    x = torch.randn(2048, config.hidden_size, dtype=dtype, device=options.device)
    weight = torch.randn(config.intermediate_size, config.hidden_size, dtype=dtype, device=options.device)
    best = min(timed(lambda: torch.nn.functional.linear(x, weight), options.device) for _ in range(30))
    rate = 2 * x.numel() * len(weight) / best
    speed = options.rows * options.length / seconds
    return f"{speed:.0f} tokens/s, {4 * parameters * speed / rate:.0%} of 4 N at {rate / 1e9:.0f} GFLOP/s"


def measure_peak(kind: str, options: argparse.Namespace) -> float:
    """What `peak` reads from its child. On the CPU by Linux's own high-water mark, which can be set back."""
    step = make(kind, options)
    gc.collect()
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    for _ in range(3):
        step()
    return torch.cuda.max_memory_allocated() / 2**20 if options.device == "cuda" else _status("VmHWM") - before


def _status(field: str) -> float:
    """A field of /proc/self/status, MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def _say_pairs(options: argparse.Namespace, one: str, kind: str, other: str, other_kind: str, goal: float) -> None:
    """Time two steps in turn; print their medians and the ratio's median, least and most."""
    steps = [make(name, options) for name in (kind, other_kind)]
    pairs = [tuple(timed(step, options.device) for step in steps) for _ in range(options.rounds + 2)][2:]
    ratios = [first / second for first, second in pairs]
    first, second = (statistics.median(times) for times in zip(*pairs, strict=True))
    print(
        f"{options.backbone}, {options.rows} x {options.length} tokens, rank {options.rank}, {options.slots} slots, "
        f"{options.device}, {options.dtype}, {options.threads} threads, {options.rounds} pairs"
    )
    print(
        f"step    {one} {first:.3f} s   {other} {second:.3f} s   "
        f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}; goal {goal})"
    )
    print(f"        {one}: {of_the_products(options, first)}")


def main() -> None:
    """Print both steps' medians and the two ratios."""
    parser = argparse.ArgumentParser(description="Cost of a KOFF step beside a peft LoRA step on the same batch.")
    parser.add_argument("--backbone", default=TINY)
    parser.add_argument("--domains", default="en,de,fr,es,ru,zh,python")
    parser.add_argument("--rows", type=int, default=14)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15, help="counted pairs of steps, after two that are not")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="bfloat16 with autocast")
    parser.add_argument("--teacher", type=int, metavar="K", help="compare steps with a teacher instead")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(measure_peak(options.measure, options)))
        return
    if options.teacher:
        _say_pairs(options, "stored teacher", "stored", "live teacher", "live", goal=0.75)
        _say_pairs(options, "stored teacher", "stored", "peft LoRA", "lora", goal=1.1)
        _say_pairs(options, "CE + 2 KL, stored teacher", "both", "peft LoRA", "lora", goal=1.1)
        return
    _say_pairs(options, "koff", "koff", "peft LoRA", "lora", goal=1.0)
    memory = {kind: peak(kind, options) for kind in ("koff", "lora")}
    print(
        f"memory  koff {memory['koff']:.0f} MiB   peft LoRA {memory['lora']:.0f} MiB   "
        f"ratio {memory['koff'] / memory['lora']:.2f} (goal 0.90)"
    )


if __name__ == "__main__":
    main()
