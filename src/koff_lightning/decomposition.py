"""Decomposition: frozen backbone + mask + memories in one module; what it predicts under each arm, what it saves.

Training it is `KOFFModule`'s business (module.py).

Shapes: B rows, T tokens, N predicted tokens, d hidden, U prunable units.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from transformers import PreTrainedModel

from koff_lightning.artifact.folder import Manifest
from koff_lightning.backbone import (
    fingerprint,
    hidden_states,
    load_backbone,
    load_config,
    parameter_counts,
    prunable_groups,
    uniform_kv_groups,
    without_weights,
)
from koff_lightning.gates import BackboneGates
from koff_lightning.losses import head_nats
from koff_lightning.memory import KVSpec, LoraSpec, MemoryBank
from koff_lightning.sparsity import Budget, SparsitySpec
from koff_lightning.support import ranks
from koff_lightning.support.errors import KoffError
from koff_lightning.support.names import check_names
from koff_lightning.training.checkpoints import read_checkpoint
from koff_lightning.training.resume import (
    refuse_other_course,
    refuse_other_make,
    refuse_other_mask,
    refuse_other_tensors,
    refuse_without_run,
)

Batch = dict[str, Any]
ARMS = ("dense", "koff", "memory_off", "swapped")


class Decomposition(LightningModule):
    """A frozen LLM with gates on its units and a memory per domain.

    Args:
        backbone: Hub id, local folder, `.gguf` file, or `koff-tiny`.
        domains: Names of the domains.
        sparsity: What to remove.
        lora: LoRA adapter of every domain; None for none.
        kv: Key-value memory of every domain; None for none.
        shared_memory: One memory for all domains.
        extends: Manifest of the artifact whose backbone this is: its mask is fixed, the dense model is not at hand.
        loading: Further arguments of `load_backbone`.
    """

    def __init__(
        self,
        backbone: str,
        domains: Sequence[str],
        sparsity: SparsitySpec,
        lora: LoraSpec | None,
        kv: KVSpec | None,
        shared_memory: bool = False,
        extends: Manifest | None = None,
        **loading: Any,
    ) -> None:
        super().__init__()
        check_names(domains)
        self.source, self.domains, self.shared_memory, self.loading = backbone, list(domains), shared_memory, loading
        self.sparsity, self.lora, self.kv = sparsity, lora, kv
        self.extends = extends
        self.arms = ARMS if extends is None else tuple(arm for arm in ARMS if arm != "dense")
        self.target = 0.0  # sparsity to aim for now
        self.resumed_at: int | None = None  # step of the checkpoint that a run goes on from
        self.chunk = 1024  # tokens whose logits exist at one time
        self.strict_loading = False  # checkpoints hold what is trained; `on_load_checkpoint` looks for what is missing
        self._built = False
        if sparsity.layout == "uniform":  # what the family's configs cannot say is refused now
            config = load_config(backbone, **{k: v for k, v in loading.items() if k != "dtype"})
            self._price(without_weights(config))

    def _price(self, model: PreTrainedModel) -> Budget:
        groups = prunable_groups(model, self.sparsity.units)
        return Budget(groups, parameter_counts(model), self.sparsity, uniform_kv_groups(model.config))

    def configure_model(self) -> None:
        """Load the backbone and hang memories, then gates, on it (in this order: gates go outside the adapters)."""
        if self._built:
            return
        self.backbone = load_backbone(self.source, **self.loading)
        self.budget = self._price(self.backbone)
        self.backbone_hash = fingerprint(self.backbone)
        self.memories = MemoryBank(self.backbone, self.domains, self.lora, self.kv, self.shared_memory)
        self.gates = BackboneGates(self.budget.groups, self.sparsity.gate)
        self.gates.attach(self.backbone)
        self._built = True

    # ------------------------------------------------------------------------------------------------- mask

    @property
    def learns_mask(self) -> bool:
        """Whether anything is pruned at all."""
        return self.sparsity.target > 0

    def expected_sparsity(self) -> Tensor:
        """Sparsity in the target's denominator, scalar: the soft count, exact once hardened."""
        keep = self.gates.kept.float() if self.gates.hardened else self.gates.gate.keep(self.gates.logits)
        return self.budget.expected(keep)

    def realised_sparsity(self) -> float:
        """Sparsity in the target's denominator by gates more often closed than open; exact once hardened."""
        keep = self.gates.kept.float() if self.gates.hardened else self.gates.gate.keep(self.gates.logits)
        return float(self.budget.counts(keep)[1])

    def hard_mask(self) -> Tensor:
        """The mask if training stopped now, bool [U]: hardened, or without the lowest logits up to the target."""
        if self.gates.hardened:
            return self.gates.kept
        return self.budget.harden(self.gates.logits, self.target).to(self.gates.kept.device)

    def added_parameters(self) -> int:
        """Biases that the cut model has and the dense one has not: those that make up for removed units."""
        if self.gates.bias is None:
            return 0
        consumers = [self.backbone.get_submodule(group.consumer) for group in self.gates.groups]
        plain = [getattr(linear, "base_layer", linear) for linear in consumers]  # without adapters
        return sum(linear.out_features for linear in plain if linear.bias is None)

    def harden(self) -> None:
        """Fix the mask at the exact final budget, by the logits of rank 0."""
        self.gates.harden(self.budget.harden(self.gates.logits))
        ranks.copy_from_first([self.gates.kept])

    # ---------------------------------------------------------------------------------------------- forward

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [B, T, d] under the gates and memories in force."""
        inputs = {name: batch.get(name) for name in ("input_ids", "position_ids", "attention_mask")}
        return hidden_states(self.backbone, **inputs)

    def domain_of_row(self, batch: Batch) -> Tensor:
        """Index of each row's domain, [B]; rows without one count as a domain of their own."""
        places = {domain: i for i, domain in enumerate(self.domains)} | {None: len(self.domains)}
        unknown = sorted({str(d) for d in batch["domains"]} - {str(d) for d in places})
        if unknown:
            raise KoffError(
                f"a batch holds rows of unknown domain {', '.join(unknown)}; this model has {', '.join(self.domains)}"
            )
        return torch.tensor([places[d] for d in batch["domains"]], device=batch["labels"].device)

    @torch.no_grad()
    def dense_hidden(self, batch: Batch) -> Tensor:
        """The same of the dense model: gates and memories off."""
        with self.gates.off(), self.memories.off():
            return self.hidden(batch)

    @property
    def head(self) -> Tensor:
        """Frozen output embedding, [V, d]."""
        return self.backbone.get_output_embeddings().weight

    @staticmethod
    def targets(batch: Batch) -> tuple[Tensor, Tensor]:
        """Next tokens [N] and where they are predicted, bool [B, T-1]."""
        labels = batch["labels"][:, 1:]
        predicted = labels != -100
        return labels[predicted], predicted

    def row_nats(self, batch: Batch, arm: str) -> Tensor:
        """Negative log-likelihood of each row in nats, [B], for one arm."""
        return self.token_nats(batch, arm).sum(1)

    @torch.no_grad()
    def token_nats(self, batch: Batch, arm: str) -> Tensor:
        """Negative log-likelihood of each next token in nats, [B, T-1], zero where none is predicted, for one arm.

        Arms: `dense` (the unpruned model), `koff` (mask and own memory), `memory_off` (mask alone), `swapped` (mask and
        another domain's memory, mean over the others; with one memory only, that one).
        """
        rows: Sequence[str | None] = batch["domains"]
        if arm == "dense":
            return self._nats(batch, self.dense_hidden(batch))
        if arm == "swapped" and len(set(self.memories.names.values())) > 1:
            return torch.stack([self._pruned(batch, self._rotated(rows, k)) for k in range(1, len(self.domains))]).mean(
                0
            )
        return self._pruned(batch, [None] * len(rows) if arm == "memory_off" else rows)

    def same_as(self, arm: str) -> str:
        """The arm that gives the very figures of `arm`, where no memory tells two under the mask apart."""
        bare = self.lora is None and self.kv is None
        one = bare or len(set(self.memories.names.values())) == 1
        return "koff" if (arm == "swapped" and one) or (arm == "memory_off" and bare) else arm

    def _rotated(self, rows: Sequence[str | None], k: int) -> list[str | None]:
        places = {domain: i for i, domain in enumerate(self.domains)}
        return [d if d is None else self.domains[(places[d] + k) % len(self.domains)] for d in rows]

    def _pruned(self, batch: Batch, memories: Sequence[str | None]) -> Tensor:
        self.gates.set(self.hard_mask().float().unsqueeze(0) if self.learns_mask else None)
        self.memories.activate(memories)
        return self._nats(batch, self.hidden(batch))

    def _nats(self, batch: Batch, hidden: Tensor) -> Tensor:
        labels, predicted = self.targets(batch)
        nats = head_nats(hidden[:, :-1][predicted], self.head, labels, self.chunk)  # [N]
        return torch.zeros(predicted.shape, device=nats.device).masked_scatter(predicted, nats)  # [B, T-1]

    # ------------------------------------------------------------------------------------------ checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was trained; of the backbone only its name and hash."""
        owned = self._owned()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in owned}
        checkpoint["koff"] = self._make() | {
            "backbone": self.source,
            "backbone_hash": self.backbone_hash,
            "target": self.target,
        }

    def _make(self) -> dict[str, Any]:
        """What a checkpoint must have in common with a run that takes it up, by the names of options."""
        return {
            "domains": list(self.domains),
            "shared_memory": self.shared_memory,
            "gate": self.sparsity.gate,
            "units": sorted(self.sparsity.units),
            "lora": self.lora and asdict(self.lora) | {"targets": sorted(self.lora.targets)},
            "kv": self.kv and asdict(self.kv),
        }

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **options: Any) -> Self:
        """As Lightning's, for a file that may come from anyone: nothing runs that is not asked for here."""
        read_checkpoint(checkpoint_path, mmap=True)
        return super().load_from_checkpoint(
            checkpoint_path, **{"weights_only": True, "trust_remote_code": False} | options
        )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what does not fit, and to train on from what holds no run or one of another course."""
        goes_on = self._trainer is not None and self.trainer.training
        self.check_fits(checkpoint, goes_on)
        if goes_on:
            refuse_without_run(checkpoint)
        self.resumed_at = checkpoint.get("global_step")
        self.target = checkpoint["koff"]["target"]  # what an unfinished mask is measured at
        if self.target and not self.learns_mask:
            raise KoffError(
                "the checkpoint holds a mask that model.sparsity.target 0 would leave out: give the target of that run"
            )

    def check_fits(self, checkpoint: dict[str, Any], goes_on: bool = False) -> None:
        """Refuse a checkpoint of another backbone, make, fixed mask or (if its run goes on) course, or in parts."""
        about = checkpoint.get("koff")
        if about is None:
            raise KoffError(
                "this checkpoint was not written by koff-lightning: it does not say which backbone it belongs to"
            )
        if about["backbone_hash"] != self.backbone_hash:
            raise KoffError(
                f"the checkpoint belongs to backbone {about['backbone']!r} (hash {about['backbone_hash'][:12]}), "
                f"but {self.source!r} has hash {self.backbone_hash[:12]}: load that backbone"
            )
        here = self._make()
        if self._trainer is not None and not self.trainer.training:
            here.pop("domains")  # some of them can be scored alone
        refuse_other_make(about, here)
        options, state = checkpoint.get("hyper_parameters") or {}, checkpoint["state_dict"]
        if bool(state.get("gates.hardened", False)):
            refuse_other_mask(options.get("sparsity") or {}, asdict(self.sparsity))
        if goes_on:
            refuse_other_course(options, self.hparams)
        refuse_other_tensors(state, self.state_dict(), self._owned())

    def _owned(self) -> set[str]:
        """Names in the state dict that are ours: everything but the frozen weights and the metrics."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return trained | {k for k in self.state_dict() if k.startswith(("gates.", "memories.", "penalty."))}
