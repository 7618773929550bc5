"""Seconds, tokens per second and memory of a training step, beside what `koff plan` says of it.

Shapes: B rows, T tokens, N predicted tokens, d hidden.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from findings import GIB, Findings, fresh_memory, most_memory, timed
from peft import LoraConfig, get_peft_model
from random_models import DOMAINS, TINY, backbone_of, batch_of, config_of, decomposed
from torch import nn
from transformers import PreTrainedModel

from koff_lightning import KVSpec, LoraSpec, LossSpec, SparsitySpec
from koff_lightning.backbone import allow_recomputation, compile_layers
from koff_lightning.commands.published_sizes import PUBLISHED
from koff_lightning.data.teacher import INDEX, LOG_Q
from koff_lightning.decomposition import Decomposition
from koff_lightning.losses import top_k_of
from koff_lightning.training.objective import Objective
from koff_lightning.training.planning import Step, count, memory

PAPER = Path(__file__).parents[2] / "configs/paper/llama32_3b_languages.yaml"
KINDS = {  # of KOFF: name -> loss
    "no KL": LossSpec(1.0, 0.0),
    "live": LossSpec(0.0, 1.0, top_k=100, teacher="live"),
    "stored": LossSpec(0.0, 1.0, top_k=100, teacher="stored"),
}
ROOM = 0.85  # of the device: where a step is counted to take less, activations are kept


@dataclass(frozen=True)
class Shape:
    """A step to be measured: name of the published sizes, rows and tokens of each, and what is trained."""

    published: str
    rows: int
    length: int
    goal: int | None = None  # tokens per second on one H100
    sparsity: SparsitySpec | None = None
    lora: LoraSpec | None = None
    kv: KVSpec | None = None

    def step(self, config: Any, loss: LossSpec, dtype: torch.dtype, device: str) -> Step:
        """The micro-batch as `koff plan` takes it."""
        sparsity = self.sparsity or SparsitySpec(target=0.12, min_channels=8)
        lora, kv = self.lora or LoraSpec(16, 32.0), self.kv or KVSpec(128)
        precision = "bf16-mixed" if device == "cuda" else "32-true"
        memories = {"sparsity": sparsity, "lora": lora, "kv": kv, "loss": replace(loss)}
        return Step(config, DOMAINS, self.rows, self.length, dtype, precision, **memories, gpu=device == "cuda")


def shapes(tiny: bool) -> dict[str, Shape]:
    """What is measured, what has a goal first."""
    if tiny:
        return {"tiny": Shape("tiny", 2, 32)}
    model = yaml.safe_load(PAPER.read_text(encoding="utf-8"))["model"]
    paper = SparsitySpec(**model["sparsity"]), LoraSpec(**model["lora"]), KVSpec(**model["kv"])
    return {
        "Llama-3.1-8B": Shape("meta-llama/Llama-3.1-8B", 1, 4096, 12_500),
        "the paper's 3B": Shape("meta-llama/Llama-3.2-3B", 2, 512, 13_900, *paper),  # 150 M tokens in 3 hours
        "Llama-3.2-1B": Shape("meta-llama/Llama-3.2-1B", 4, 4096),
        "Llama-3.2-3B": Shape("meta-llama/Llama-3.2-3B", 2, 4096),
        "Qwen2.5-3B": Shape("Qwen/Qwen2.5-3B", 2, 4096),
        "Qwen3-8B": Shape("Qwen/Qwen3-8B-Base", 1, 4096),
    }


def step(say: Findings, device: str, tiny: bool) -> None:
    """Each shape: peft LoRA, KOFF without KL, with a live and with a stored teacher; one model for all of them."""
    for name, shape in shapes(tiny).items():
        with say.trying(what="step", model=name):
            _kinds(say, name, shape, device, 1 if tiny else 8)


def compiled(say: Findings, device: str, tiny: bool) -> None:
    """KOFF as it is and with torch.compile of each layer, the smaller shapes first: compiling takes minutes."""
    order = ("tiny",) if tiny else ("Llama-3.2-1B", "the paper's 3B", "Llama-3.1-8B")
    for name in order:
        shape, dtype = shapes(tiny)[name], _dtype(device)
        with say.trying(may_fail=True, what="compiled step", model=name):
            module = _model(shape, backbone_of(config_of(_sizes(shape)), dtype, device))
            for backend in (None, "eager" if tiny else "inductor"):
                if backend:
                    compile_layers(module.backbone, backend)
                for kind in ("no KL", "live"):
                    about = {"model": name, "kind": kind, "compile": backend}
                    with say.trying(may_fail=True, what="compiled step", **about):
                        _measure(say, "compiled step", about, shape, module, KINDS[kind], device, 1 if tiny else 8)
        module = None  # its memory is wanted for the next


def _kinds(say: Findings, name: str, shape: Shape, device: str, rounds: int) -> None:
    """The kinds of one shape, on one backbone."""
    backbone = backbone_of(config_of(_sizes(shape)), _dtype(device), device)
    with say.trying(what="step", model=name, kind="peft"):
        plan = _planned(shape, backbone, KINDS["no KL"], device)
        again = bool(plan.get("recompute"))
        fresh_memory(device)
        seconds = _peft(shape, backbone, device, again, rounds)
        about = {"model": name, "kind": "peft", "rows": shape.rows, "length": shape.length, "recompute": again}
        _say_step(say, "step", about, shape, seconds, most_memory(device))
    module = _model(shape, backbone)
    for kind, loss in KINDS.items():
        about = {"model": name, "kind": kind}
        with say.trying(what="step", **about):
            _measure(say, "step", about, shape, module, loss, device, rounds)


def _say_step(
    say: Findings, what: str, about: dict[str, Any], shape: Shape, seconds: float, gib: float | None, **more: Any
) -> None:
    """The row of a step."""
    goal = {} if shape.goal is None else {"goal_tokens_per_second": shape.goal}
    speed = {"seconds": seconds, "tokens_per_second": shape.rows * shape.length / seconds, "gib": gib}
    say(what=what, **about, **speed, **more, **goal)


def _measure(
    say: Findings,
    what: str,
    about: dict[str, Any],
    shape: Shape,
    module: Decomposition,
    loss: LossSpec,
    device: str,
    rounds: int,
) -> None:
    """A row of KOFF's step under this loss, the plan beside it."""
    plan = _planned(shape, module.backbone, loss, device)
    about = about | {"rows": shape.rows, "length": shape.length}
    fresh_memory(device)
    seconds = _koff(shape, module, loss, device, bool(plan.get("recompute")), rounds)
    gib = most_memory(device)
    if "gflop_per_token" in plan:
        plan["tflops"] = plan["gflop_per_token"] * shape.rows * shape.length / seconds / 1e3
    _say_step(say, what, about, shape, seconds, gib, **plan)


def _planned(shape: Shape, backbone: PreTrainedModel, loss: LossSpec, device: str) -> dict[str, Any]:
    """What `koff plan` counts, activations kept where they find room; where it cannot count, why."""
    step = shape.step(backbone.config, loss, backbone.dtype, device)
    room = ROOM * torch.cuda.get_device_properties(0).total_memory if device == "cuda" else float("inf")
    try:
        with torch.device("cpu"):
            total = _total(step)
            if total[0] > room:
                step = replace(step, checkpointing=True)
                total = _total(step)
    except Exception as error:  # a step is measured with or without it
        return {"plan_error": f"{type(error).__name__}: {error}"[:200], "recompute": device == "cuda"}
    return {"planned_gib": total[0] / GIB, "gflop_per_token": total[1], "recompute": step.checkpointing}


def _total(step: Step) -> tuple[float, float]:
    """Bytes at the worst moment, and 10^9 operations of a token."""
    counts = count(step)
    return sum(memory(step, counts).values()), counts.flops / step.rows / step.length / 1e9


def _sizes(shape: Shape) -> dict[str, Any]:
    return TINY if shape.published == "tiny" else dict(PUBLISHED[shape.published])


def _dtype(device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" else torch.bfloat16


def _model(shape: Shape, backbone: PreTrainedModel) -> Decomposition:
    """With its memories and its mask."""
    step = shape.step(backbone.config, KINDS["no KL"], backbone.dtype, backbone.device.type)
    return decomposed(backbone, step.sparsity, step.lora, step.kv)


def _amp(device: str) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()


def _peft(shape: Shape, backbone: PreTrainedModel, device: str, again: bool, rounds: int) -> float:
    """Seconds of a step of plain LoRA; the backbone is left as it was."""
    lora = shape.lora or LoraSpec(16, 32.0)
    model = get_peft_model(backbone, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets)))
    if again:
        allow_recomputation(model)
        model.enable_input_require_grads()
        model.train()
    batch = batch_of(shape.rows, shape.length, backbone.config.vocab_size, device)

    def loss() -> torch.Tensor:
        return model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss

    try:
        return _steps(model, loss, device, rounds)
    finally:
        if again:
            model.disable_input_require_grads()
        model.unload().requires_grad_(False).eval()


def _koff(shape: Shape, module: Decomposition, spec: LossSpec, device: str, again: bool, rounds: int) -> float:
    """Seconds of a step of KOFF under this loss."""
    if again:
        allow_recomputation(module.backbone)
    batch = batch_of(shape.rows, shape.length, module.backbone.config.vocab_size, device)
    objective, groups = Objective(module, replace(spec), again), module.domain_of_row(batch)
    if spec.kl and spec.teacher == "stored":
        with _amp(device):
            hidden = module.dense_hidden(batch)[:, :-1]  # [B, T-1, d]
        seen = [top_k_of(row, module.head, spec.top_k) for row in hidden]
        batch |= {INDEX: torch.stack([row.index for row in seen]).int()}
        batch |= {LOG_Q: torch.stack([row.log_q for row in seen]).half()}

    def loss() -> torch.Tensor:
        return objective(batch, module.gates.draw(shape.rows, (0, 0, 0)), batch["domains"], groups).loss

    return _steps(module, loss, device, rounds)


def _steps(model: nn.Module, loss: Callable[[], torch.Tensor], device: str, rounds: int) -> float:
    """Median seconds of forward, backward and AdamW on what is trained."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        with _amp(device):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    try:
        return timed(run, device, rounds)
    finally:
        optimizer.zero_grad()
