"""Whether a run keeps its activations for the backward or computes them again: kept wherever they find room.

Computing them again costs a third more arithmetic and changes no result, so processes need not agree.
"""

from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info

from koff_lightning.training.planning import Step, count, memory
from koff_lightning.training.strategies import ShardedStrategy

AUTO = "auto"
ROOM = 0.9  # share of what is free now that a step may take: others come and go, and memory is left in pieces
# Floats that a layer keeps for each token are fewer than 16 hidden sizes and 8 FFN widths (planning.py counts them);
# where twice as many find room nothing needs to be counted, which would take seconds.
HIDDEN, FFN = 32, 16
IN_PLACE = ("frozen weights", "LoRA", "KV memories", "mask")  # parts of a step that lie where it is taken already


def recomputes(module: LightningModule) -> bool:
    """Whether layers compute their activations again in the backward; what `auto` comes to is said where it is so.

    Args:
        module: A KOFFModule with its model; outside of `koff fit`, or with a datamodule of another kind, `auto` is no.
    """
    wanted = module.activation_checkpointing
    if wanted != AUTO:
        return bool(wanted)
    trainer = module._trainer
    if trainer is None or not trainer.training or not hasattr(trainer.datamodule, "seq_len"):
        return False
    device = trainer.strategy.root_device
    free = free_memory(device)
    if free is not None and device.type == "cpu":  # all processes here take from it
        free //= trainer.num_devices
    step, trained = _step(module), sum(p.numel() for p in module.parameters() if p.requires_grad)
    each = 20 if step.retention else 16  # bytes: values, gradients, AdamW's two; general text holds slopes of its own
    if free is None or _at_most(step) + each * trained <= ROOM * free:
        return False
    sharded = isinstance(trainer.strategy, ShardedStrategy)
    with torch.device("cpu"):  # Lightning has all made on the GPU here; what is counted has no numbers
        parts = memory(step, count(step), trainer.world_size, sharded)
    if module.model.backbone.device.type == device.type:  # under FSDP it is on the CPU until then
        parts = {name: size for name, size in parts.items() if name not in IN_PLACE}
    total = sum(parts.values())
    if total <= ROOM * free:
        return False
    rank_zero_info(
        f"activations are computed again in the backward: kept, a step would take {total / 2**30:.1f} GiB of "
        f"{free / 2**30:.1f} that are free (--model.activation_checkpointing false keeps them all the same)"
    )
    return True


def free_memory(device: torch.device) -> int | None:
    """Bytes that a device has left, of the CPU within the limit of its control group; None where nothing tells."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch has it at hand
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None
    try:  # of a container
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        parts = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        gives_way = int(parts["inactive_file"])  # of files that were read, such as the weights'
    except (OSError, ValueError, KeyError):  # there is none
        return free
    return min(free, limit - used + gives_way)


def _step(module: LightningModule) -> Step:
    """A micro-batch of the run under way."""
    backbone, trainer = module.model.backbone, module.trainer
    return Step(
        config=backbone.config,
        domains=module.domains,
        rows=trainer.datamodule.batch_size,
        length=trainer.datamodule.seq_len,
        dtype=backbone.dtype,
        precision=trainer.precision,
        sparsity=module.sparsity,
        lora=module.lora,
        kv=module.kv,
        loss=module.loss,
        shared=module.shared_memory,
        retention=module.retention,
        gpu=trainer.strategy.root_device.type != "cpu",
    )


def _at_most(step: Step) -> int:
    """Bytes that a step surely does not reach beyond its weights and what belongs to those that are trained."""
    config = step.config
    layer = HIDDEN * config.hidden_size + FFN * config.intermediate_size
    logits = 4 * min(step.loss.chunk, step.rows * step.length) * config.vocab_size
    return 4 * (step.rows * step.length * config.num_hidden_layers * layer + logits)
