"""A training step of KOFF beside those of HF Trainer with PEFT and of litgpt's finetune_lora: time and memory.

    pip install --target peers --no-deps litgpt==0.5.13
    PYTHONPATH=peers python recipes/peers/step.py --rounds 10
    python recipes/peers/step.py --only koff,trainer        # where litgpt is not installed

All train the same linears at the same rank with AdamW, on the same random rows, with random weights of the same shape
(Llama family, SmolLM2-135M's sizes by default; `--layers` takes fewer of them). KOFF moreover learns its mask and a KV
memory, for two domains that the rows belong to in turn; its loss is cross-entropy alone, as theirs. Of HF Trainer its
own `training_step` runs, of litgpt its model, its chunked head and its loss, as finetune_lora calls them.

Steps take turns in one process, in an order that rotates, so that a drift of the machine's speed cancels in the ratios;
counted are processor seconds (user and system, all threads) as well as those of the clock, since a busy machine
stretches the latter. Memory is what a fresh process holds at most during three steps beyond what it held before.
"""

import argparse
import contextlib
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import LlamaConfig, LlamaForCausalLM

Step = Callable[[], None]
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
SMOLLM2 |= {"head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True, "max_position_embeddings": 8192}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def shape(options: argparse.Namespace) -> LlamaConfig:
    """The model's sizes."""
    return LlamaConfig(**SMOLLM2, num_hidden_layers=options.layers, dtype=DTYPES[options.dtype])


def rows(options: argparse.Namespace) -> torch.Tensor:
    """Token ids, [B, T]."""
    torch.manual_seed(0)
    return torch.randint(3, SMOLLM2["vocab_size"], (options.rows, options.length))


def amp(options: argparse.Namespace) -> contextlib.AbstractContextManager[object]:
    """Autocast, where the frozen weights are bf16."""
    return torch.autocast("cpu", torch.bfloat16) if options.dtype == "bf16" else contextlib.nullcontext()


def koff(options: argparse.Namespace) -> Step:
    """Gates, an adapter and a KV memory for each of two domains."""
    from koff_lightning import KVSpec, LoraSpec, LossSpec, OptimSpec, SparsitySpec
    from koff_lightning.decomposition import Decomposition
    from koff_lightning.training.objective import Objective
    from koff_lightning.training.optim import parameter_groups

    with TemporaryDirectory() as folder:
        LlamaForCausalLM(shape(options)).to(DTYPES[options.dtype]).save_pretrained(folder)
        gc.collect()
        memories = LoraSpec(options.rank, 2 * options.rank), KVSpec(options.slots)
        dtype = str(DTYPES[options.dtype]).removeprefix("torch.")
        model = Decomposition(folder, ["a", "b"], SparsitySpec(target=0.12), *memories, dtype=dtype)
    ids = rows(options)
    batch = {"input_ids": ids, "labels": ids, "domains": ["a", "b"] * (len(ids) // 2) + ["a"] * (len(ids) % 2)}
    objective, groups = Objective(model, LossSpec(kl=0)), model.domain_of_row(batch)
    optimizer = torch.optim.AdamW(parameter_groups(model.gates, torch.nn.Module(), model.memories, OptimSpec()))

    def step() -> None:
        with amp(options):
            loss = objective(batch, model.gates.draw(len(ids), (0, 0, 0)), batch["domains"], groups).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def trainer(options: argparse.Namespace) -> Step:
    """HF Trainer's own step of a PEFT model."""
    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    model = LlamaForCausalLM(shape(options)).to(DTYPES[options.dtype])
    model = get_peft_model(model, LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules=LINEARS))
    about = {"report_to": [], "use_cpu": True, "bf16": options.dtype == "bf16", "optim": "adamw_torch"}
    with TemporaryDirectory() as folder:
        run = Trainer(model, TrainingArguments(folder, **about))
    run.current_gradient_accumulation_steps = 1  # `train` sets it, which is not called
    optimizer, ids = run.create_optimizer(), rows(options)

    def step() -> None:
        run.training_step(model, {"input_ids": ids, "labels": ids})
        optimizer.step()
        optimizer.zero_grad()

    return step


def litgpt(options: argparse.Namespace) -> Step:
    """Litgpt's model, head and loss, as its finetune_lora calls them."""
    from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    from litgpt.utils import chunked_cross_entropy

    heads = {"n_head": 9, "n_query_groups": 3, "head_size": 64, "n_embd": 576, "intermediate_size": 1536}
    text = {"vocab_size": 49152, "padded_vocab_size": 49152, "block_size": max(options.length, 256)}
    kind = {"rotary_percentage": 1.0, "parallel_residual": False, "bias": False, "norm_class_name": "RMSNorm"}
    kind |= {"mlp_class_name": "LLaMAMLP", "norm_eps": 1e-5, "n_layer": options.layers}
    where = [f"lora_{part}" for part in ("query", "key", "value", "projection", "mlp")]
    lora = {"lora_r": options.rank, "lora_alpha": 2 * options.rank} | dict.fromkeys(where, True)
    model = GPT(Config(name="shape", **heads, **text, **kind, **lora)).to(DTYPES[options.dtype])
    model.lm_head.linear.weight = model.transformer.wte.weight  # tied, as the others
    mark_only_lora_as_trainable(model)
    optimizer, ids = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), rows(options)

    def step() -> None:
        logits = model(ids, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        chunked_cross_entropy(logits, ids[..., 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


KINDS = {"koff": koff, "trainer": trainer, "litgpt": litgpt}


def timed(step: Step) -> tuple[float, float]:
    """Processor and clock seconds of a step."""
    cpu, clock = time.process_time(), time.perf_counter()
    step()
    return time.process_time() - cpu, time.perf_counter() - clock


def measure_peak(step: Step) -> float:
    """MiB that the process holds at most in three steps beyond what it holds now; Linux tells."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    for _ in range(3):
        step()
    return _status("VmHWM") - before


def _status(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def compare(options: argparse.Namespace) -> None:
    """Time all in turn, then take each one's memory in a process of its own; print a table and a line of JSON."""
    kinds = options.only.split(",")
    steps = {kind: KINDS[kind](options) for kind in kinds}
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for turn in range(options.rounds + 1):
        order = kinds[turn % len(kinds) :] + kinds[: turn % len(kinds)]
        for kind in order:
            found[kind].append(timed(steps[kind]))
    steps.clear()
    print(f"{options}; torch {torch.__version__}, transformers {version('transformers')}, peft {version('peft')}")
    print("step       processor s   ratio (least to most)   tokens/s of processor   clock s   MiB")
    tokens, base = options.rows * options.length, found["koff"][1:] if "koff" in found else found[kinds[0]][1:]
    for kind, times in found.items():
        cpu, clock = (statistics.median(values) for values in zip(*times[1:], strict=True))
        ratios = [first[0] / second[0] for first, second in zip(base, times[1:], strict=True)]
        memory = _peak_of(kind) if options.memory else float("nan")
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"{kind:<10} {cpu:11.2f}   {spread:<23} {tokens / cpu:21.0f} {clock:9.2f} {memory:5.0f}", flush=True)


def _peak_of(kind: str) -> float:
    command = [sys.executable, *sys.argv, f"--measure={kind}"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    """Compare."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(KINDS))
    for name, value in {"layers": 30, "rows": 4, "length": 512, "rank": 8, "slots": 32, "rounds": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        print(json.dumps(measure_peak(KINDS[options.measure](options))))
        return
    compare(options)


if __name__ == "__main__":
    main()
