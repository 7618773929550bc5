"""What a training step takes in memory and arithmetic, found without weights.

The step of the real model runs on tensors that have shapes and no numbers (torch's FakeTensorMode), so whatever it
keeps, recomputes, casts or copies is counted as it is, not by a formula of its own. What runs is `Objective`, as in
training, where every token is predicted: a choice among tokens has no shape without numbers. Layers are alike: a model
of two and one of three layers are counted, and each further layer adds what the third did.

Not seen: scratch space inside kernels, fragmentation, what a device driver takes, and kernels of a GPU that need
other memory than the CPU's (rows that hold several documents: see docs/scaling.md).

Shapes: B rows, T tokens, d hidden.
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from koff_lightning.backbone import allow_recomputation, decoder_layers, prunable_groups
from koff_lightning.data.teacher import INDEX, LOG_Q
from koff_lightning.decomposition import Batch, Decomposition
from koff_lightning.gates import BackboneGates
from koff_lightning.losses import fused_head_loss
from koff_lightning.memory import MemoryBank
from koff_lightning.placement import ALL, placed
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.specs.training import LossSpec, RetentionSpec
from koff_lightning.support import ranks
from koff_lightning.training.objective import Objective
from koff_lightning.training.retention import moved_parts
from koff_lightning.training.settled import settled

COUNTED = (2, 3)  # layers
AMPS = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
GATHERED = 2  # layers whose weights are whole on every device at one time: the present one and the next

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the kernel that torch's own table lacks
_FLOPS = flop_registry | {
    torch.ops.aten.baddbmm_: flop_registry[torch.ops.aten.baddbmm],
    _FLASH: sdpa_flop,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}


@dataclass(frozen=True)
class Step:
    """A micro-batch of a run, as far as memory and arithmetic depend on it.

    Args:
        config: Config of the backbone.
        domains: All domains of the run.
        rows: B, on one device.
        length: T.
        dtype: Dtype of the frozen weights.
        precision: Precision of the trainer.
        checkpointing: Recompute activations.
        sparsity: Units and kind of the gates.
        lora: Adapter of each domain.
        kv: KV memory of each domain.
        loss: Its chunk, and whether there is a teacher.
        shared: One memory for all domains.
        retention: How general text takes part; None for not at all.
        gpu: The device is a GPU, whatever is here: logits come in chunks of full length and in the head's dtype, and
            the optimizer works on all tensors at a time, for which it needs room for one more copy.
    """

    config: PreTrainedConfig
    domains: Sequence[str]
    rows: int
    length: int
    dtype: torch.dtype = torch.float32
    precision: str = "32-true"
    checkpointing: bool = False
    sparsity: SparsitySpec = field(default_factory=SparsitySpec)
    lora: LoraSpec | None = None
    kv: KVSpec | None = None
    loss: LossSpec = field(default_factory=LossSpec)
    shared: bool = False
    retention: RetentionSpec | None = None
    gpu: bool = True


@dataclass(frozen=True)
class Counts:
    """Bytes and floating-point operations of one micro-batch on one device with the whole model.

    Attributes:
        layers: Bytes of the frozen weights of all layers.
        rest: Bytes of the other frozen weights.
        lora: Bytes of all adapters.
        kv: Bytes of all KV memories, but for their frozen slots.
        sinks: Bytes of those.
        mask: Bytes of the logits.
        teacher: Bytes that the teacher pass leaves.
        activations: Bytes that the forward keeps for the backward.
        peaks: Most bytes that are alive in `teacher pass`, `forward`, `loss` and `backward`, beyond weights, gradients
            and optimizer state; with retention in a step that takes general text.
        flops: Operations without general text.
        retention: Operations that general text adds in a step that takes it.
    """

    layers: float
    rest: float
    lora: float
    kv: float
    sinks: float
    mask: float
    teacher: float
    activations: float
    peaks: dict[str, float]
    flops: float
    retention: float

    @property
    def trained(self) -> float:
        """Bytes of all that is trained."""
        return self.lora + self.kv + self.mask


def memory(step: Step, counts: Counts, devices: int = 1, sharded: bool = False) -> dict[str, float]:
    """Bytes on each device at the peak, by what takes them; they add up.

    Args:
        step: A micro-batch.
        counts: What `count` found for that micro-batch.
        devices: Processes of the run.
        sharded: The layers' weights are split over them.
    """
    spread = sharded and devices > 1
    averaging = 2 * min(4 * ranks.BUCKET, counts.trained) if devices > 1 else 0  # a bucket and its mean, fp32
    peaks = counts.peaks | {"optimizer step": averaging + (counts.trained if step.gpu else 0)}
    stage = max(peaks, key=peaks.get)
    both = counts.teacher + counts.activations
    kept = {"forward": counts.teacher, "loss": both, "backward": both}.get(stage, 0)
    return {
        "frozen weights": counts.rest + counts.layers / (devices if spread else 1),
        "layers gathered from all GPUs": GATHERED * counts.layers / step.config.num_hidden_layers if spread else 0,
        "LoRA": counts.lora,
        "KV memories": counts.kv + counts.sinks,
        "mask": counts.mask,
        "their gradients": counts.trained,
        "AdamW": 2 * counts.trained,
        "kept for the backward": kept,
        f"most in the {stage}": peaks[stage] - kept,
    }


def count(step: Step) -> Counts:
    """Count a step: two and three layers as they are, the others as the third of those that carry the same memories.

    Layers of an artifact's backbone are of unequal width: all are counted as they are.
    """
    layers = step.config.num_hidden_layers
    if layers <= COUNTED[1] or hasattr(step.config, "koff_layers"):
        return Counts(**_count(step, layers))
    lora, kv = (part and placed(part.layers, layers) for part in (step.lora, step.kv))
    kinds = Counter((layer in (lora or ()), layer in (kv or ())) for layer in range(layers))
    counted = {kind: [_count(_everywhere(step, *kind), few) for few in COUNTED] for kind in kinds}
    first = next(iter(kinds))  # of layer 0, which differs from the others in what goes into it
    total = counted[first][0]
    for kind, times in kinds.items():
        total = _along(total, *counted[kind], times - COUNTED[0] * (kind == first))
    return Counts(**total)


def _everywhere(step: Step, lora: bool, kv: bool) -> Step:
    """The step with these parts of the memories in all layers, and the others in none."""
    return replace(
        step,
        lora=replace(step.lora, layers=ALL) if step.lora and lora else None,
        kv=replace(step.kv, layers=ALL) if step.kv and kv else None,
    )


def _along(value: Any, fewer: Any, more: Any, times: int) -> Any:
    """A value and so many times the difference of two others."""
    if isinstance(value, dict):
        return {name: _along(part, fewer[name], more[name], times) for name, part in value.items()}
    return value + times * (more - fewer)


def _count(step: Step, layers: int) -> dict[str, Any]:
    """The fields of `Counts` for a model of so many layers."""
    with FakeTensorMode():
        model = _Outline(step, layers)
        memories, gates, backbone = model.memories, model.gates, model.backbone
        if step.checkpointing:
            allow_recomputation(backbone)
        frozen = {id(p): _bytes(p) for p in backbone.parameters() if not p.requires_grad}
        inside = sum(frozen.get(id(p), 0) for layer in decoder_layers(backbone) for p in layer.parameters())
        known = [*model.parameters(), *model.buffers()]
        for parameter in [*memories.lora_parameters(), *memories.kv_parameters(), gates.logits]:
            parameter.grad = torch.zeros_like(parameter)  # alive during the whole of the next micro-batch
            known.append(parameter.grad)
        live = _Live(known)
        with live, torch.autocast("cpu", AMPS[step.precision]) if step.precision in AMPS else nullcontext():
            parts = _micro_batch(step, model, live)
    sinks = [b for kv in memories.kv.values() for part in (kv.sink_key, kv.sink_value) for b in part.buffers()]
    return parts | {
        "layers": inside,
        "rest": sum(frozen.values()) - inside,
        "lora": sum(map(_bytes, memories.lora_parameters())),
        "kv": sum(map(_bytes, memories.kv_parameters())),
        "sinks": sum(map(_bytes, sinks)),
        "mask": _bytes(gates.logits),
    }


class _Outline(Decomposition):
    """A decomposition of a backbone without numbers, as far as a training step asks for it.

    Args:
        step: Of which run.
        layers: Of the backbone.
    """

    def __init__(self, step: Step, layers: int) -> None:
        nn.Module.__init__(self)
        self.domains = list(step.domains)
        self.backbone = _backbone(step.config, layers, step.dtype)
        groups = prunable_groups(self.backbone, step.sparsity.units)
        self.memories = MemoryBank(self.backbone, self.domains, step.lora, step.kv, step.shared)
        self.gates = BackboneGates(groups, step.sparsity.gate, **step.sparsity.gate_options())
        self.gates.attach(self.backbone)

    @staticmethod
    def targets(batch: Batch) -> tuple[Tensor, Tensor]:
        """Next tokens, and that all are predicted."""
        labels = batch["labels"][:, 1:]
        return labels.flatten(), torch.ones_like(labels, dtype=torch.bool)


def _backbone(config: PreTrainedConfig, layers: int, dtype: torch.dtype) -> PreTrainedModel:
    """A model of the config's shapes with so many layers; its config is a copy."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    config.use_cache = False
    return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False).eval()


@dataclass(frozen=True)
class _Counted(Objective):
    """The objective where every token is predicted, with a note of what each part of it takes."""

    live: "_Live | None" = None
    gpu: bool = True

    def teacher(self, *args: Any) -> Any:
        """As in training."""
        with self.live.stage("teacher pass"):
            return super().teacher(*args)

    def student(self, *args: Any) -> Tensor:
        """As in training."""
        with self.live.stage("forward"):
            return super().student(*args)

    def compare(self, *args: Any) -> Any:
        """As in training."""
        with self.live.stage("loss"):
            return super().compare(*args)

    def head_loss(self, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """As on the device of the run, though what is counted lies on the CPU."""
        if not self.gpu:
            return super().head_loss(*given)
        student, teacher, labels, weights = given
        return fused_head_loss(student, teacher, self.model.head, labels, weights, self.spec, self.spec.chunk)

    def weights(self, predicted: Tensor, groups: Tensor) -> Tensor:
        """Weight of each token, [N]: the same shape without a look at which domain it is of."""
        return torch.ones(predicted.numel())

    @staticmethod
    def at(values: Tensor, predicted: Tensor) -> Tensor:
        """All values, [N, ...]."""
        return values.flatten(0, 1)


def _micro_batch(step: Step, model: _Outline, live: "_Live") -> dict[str, Any]:
    """What `KOFFModule.training_step` and its backward do."""
    rows = [step.domains[row * len(step.domains) // step.rows] for row in range(step.rows)]
    tokens = torch.zeros(step.rows, step.length, dtype=torch.int64)
    packed = torch.ones(step.rows, 1, step.length, step.length, dtype=torch.bool)  # who sees whom in packed rows
    batch = {"input_ids": tokens, "position_ids": tokens, "attention_mask": packed, "labels": tokens}
    if step.loss.teacher == "stored":
        places = step.rows, step.length - 1, step.loss.top_k
        batch |= {INDEX: torch.zeros(places, dtype=torch.int32), LOG_Q: torch.zeros(places, dtype=torch.float16)}
    groups = torch.zeros(step.rows, dtype=torch.int64)
    objective = _Counted(model, step.loss, step.checkpointing, live, step.gpu)

    def forward(memories: Sequence[str]) -> Tensor:
        gates = model.gates.gate.sample(model.gates.logits, step.rows)
        return objective(batch, gates, memories, groups).loss

    added = torch.zeros(())
    spec = step.retention
    if moved := spec and moved_parts(spec, model, rows[0], step.sparsity.target > 0, True):
        found = forward(rows[:1] * step.rows)
        with live.stage("backward"):
            added = settled(found, moved)
        del found
    retention, held = live.flops, live.now
    loss = forward(rows)
    with live.stage("backward"):
        (loss + added).backward()
    teacher = live.left["teacher pass"] - held
    return {
        "teacher": teacher,
        "activations": live.left["forward"] - live.left["teacher pass"],
        "peaks": live.peaks,
        "flops": live.flops - retention,
        "retention": retention,
    }


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and something still holds, and the operations' arithmetic.

    Args:
        known: Tensors that were there before, which do not count.
    """

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.now, self.peak, self.flops = 0, 0, 0
        self.peaks: dict[str, float] = {}
        self.left: dict[str, float] = {}  # alive at the end of a stage
        self._held = {id(tensor.untyped_storage()) for tensor in known}
        self._known = known  # while they are held no other storage gets their number

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Note the peak of a part of the step, of all times that it runs, and what the last time leaves."""
        self.peak = self.now
        yield
        self.peaks[name] = max(self.peaks.get(name, 0), self.peak)
        self.left[name] = self.now

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if price := _FLOPS.get(func._overloadpacket):
            self.flops += price(*args, **(kwargs or {}), out_val=out)
        for part in tree_leaves(out):
            if isinstance(part, Tensor):
                self._note(part.untyped_storage())
        return out

    def _note(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._held:
            return
        self._held.add(id(storage))
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, id(storage), storage.nbytes())

    def _free(self, number: int, size: int) -> None:
        self._held.discard(number)
        self.now -= size
