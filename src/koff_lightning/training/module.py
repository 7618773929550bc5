"""KOFFModule: trains a decomposition by one equation.

    L = sum_d w_d [ce * CE_d + kl * KL(dense || student)_d] + lam1 (s - t) + lam2 (s - t)^2 + mu R  (retention.py)

Shapes: B rows, T tokens, N predicted tokens, U prunable units.
"""

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Self

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from koff_lightning.artifact.checkpoint import PREFIX, check_content, read_checkpoint, refuse_other_tensors, target_of
from koff_lightning.artifact.folder import backbone_of
from koff_lightning.backbone import allow_recomputation, compile_layers
from koff_lightning.data import check_vocabulary
from koff_lightning.decomposition import MODES, Batch, Decomposition, check_layout
from koff_lightning.loading import load_config
from koff_lightning.losses import check_top_k
from koff_lightning.metrics import BitsPerByte, DocumentScores
from koff_lightning.penalties import make_penalty
from koff_lightning.sparsity import Phase, SparsitySchedule
from koff_lightning.specs.kinds import spec_of
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.specs.training import LossSpec, OptimSpec, RetentionSpec
from koff_lightning.support import ranks
from koff_lightning.support.errors import KoffError
from koff_lightning.support.names import GENERAL, check_names, refuse_taken, word_of
from koff_lightning.support.secrets import without_secrets
from koff_lightning.training import strategies
from koff_lightning.training.ending import EndsBetweenSteps
from koff_lightning.training.extending import artifact_to_extend, hold_closed
from koff_lightning.training.filling import fill_memories
from koff_lightning.training.mask_source import load_mask, read_mask_source
from koff_lightning.training.nonfinite import NonFiniteGuard
from koff_lightning.training.objective import Objective, take_stored_teacher
from koff_lightning.training.optim import clip_by_group, loss_scale, optimizer_and_rates, take_step, total_steps
from koff_lightning.training.recomputation import recomputes
from koff_lightning.training.resume import (
    give_data_its_place,
    load_warm_start,
    make_of,
    refuse_other_course,
    refuse_other_steps,
    refuse_unfit,
    refuse_without_run,
)
from koff_lightning.training.retention import check_text, retention_loss
from koff_lightning.training.trainer_options import refuse_trainer


class KOFFModule(LightningModule):
    """Decompose a frozen LLM into a smaller shared backbone and per-domain memories (KOFF, arXiv 2605.29075).

    Args:
        backbone: Hub id, local folder, `.gguf` file, or `koff-tiny`, the model that ships with the package.
        domains: Names of the domains; on the command line they are the keys of `data.domains`.
        sparsity: What to remove and how the mask is learned.
        lora: LoRA adapter of every domain; null for none.
        kv: Key-value memory of every domain; null for none.
        loss: Weights of cross-entropy and of KL to the dense self.
        retention: When and how general text (data.retention) is part of the loss; null for never.
        optim: Learning rates of mask, multipliers and memories.
        joint: Train mask and memories together; false trains the mask alone and the memories after hardening.
        shared_memory: One memory for all domains (an ablation).
        artifact: Folder of an exported artifact to add the domains to. Its pruned backbone and its mask stay as they
            are; only the new memories train.
        warm_start: Checkpoint whose memories and mask a new run starts from.
        mask: Checkpoint of `koff baseline` or `koff fit` whose mask and `sparsity` options are taken; memories train.
        prior: Checkpoint whose logits order those of the mask to learn when the ramp begins; replaces `sparsity.prior`.
        revision: Branch, tag or commit of a hub model.
        dtype: Torch dtype of the frozen weights; `auto` (command line): bfloat16 on a GPU or a processor
            that computes in it, else float32.
        activation_checkpointing: Recompute activations in the backward; auto where kept they would find no room.
        compile: Backend of torch.compile for each layer, such as inductor (an experiment); null for none.
        trust_remote_code: Allow code from the model repository to run; to be said on the command line, not in a config.
    """

    def __init__(
        self,
        backbone: str = "koff-tiny",
        domains: list[str] | None = None,
        sparsity: SparsitySpec = SparsitySpec(),  # noqa: B008 (read only; LightningCLI shows its fields as options)
        lora: LoraSpec | None = LoraSpec(),  # noqa: B008
        kv: KVSpec | None = KVSpec(),  # noqa: B008
        loss: LossSpec = LossSpec(),  # noqa: B008
        retention: RetentionSpec | None = None,
        optim: OptimSpec = OptimSpec(),  # noqa: B008
        joint: bool = True,
        shared_memory: bool = False,
        artifact: str | None = None,
        warm_start: str | None = None,
        mask: str | None = None,
        prior: str | None = None,
        revision: str | None = None,
        dtype: str = "float32",
        activation_checkpointing: bool | Literal["auto"] = "auto",
        compile: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        if not domains:
            raise KoffError("model.domains is empty: name at least one domain (on the command line: data.domains)")
        backbone, given = word_of(backbone), (artifact, warm_start, mask, prior)
        artifact, warm_start, mask, prior = (path if path is None else os.fspath(path) for path in given)
        sparsity, lora, kv = spec_of(SparsitySpec, sparsity), spec_of(LoraSpec, lora), spec_of(KVSpec, kv)
        loading = {"revision": revision, "dtype": dtype, "trust_remote_code": trust_remote_code}
        loss, optim, retention = spec_of(LossSpec, loss), spec_of(OptimSpec, optim), spec_of(RetentionSpec, retention)
        mask_source = read_mask_source(mask, prior, sparsity, {"artifact": artifact, "warm_start": warm_start})
        sparsity = mask_source.sparsity if mask_source and mask_source.fixed else sparsity
        extends = None if artifact is None else artifact_to_extend(artifact, sparsity, loss)
        source = backbone if artifact is None else backbone_of(artifact)
        check_names(domains)
        super().__init__()
        self.source, self.domains, self.loading, self.extends = source, list(domains), loading, extends
        self.sparsity, self.lora, self.kv, self.shared_memory = sparsity, lora, kv, shared_memory
        self.artifact, self.loss, self.optim, self.joint, self.retention = artifact, loss, optim, joint, retention
        self.activation_checkpointing, self.warm_start = activation_checkpointing, warm_start
        self.mask_source, self.guard = mask_source, NonFiniteGuard(skip=optim.on_nonfinite == "skip")
        self.modes = MODES if extends is None else tuple(mode for mode in MODES if mode != "dense")
        self.schedule: SparsitySchedule | None = None  # of the mask; AnnealSparsity sets it when a fit starts
        self.resumed_at: int | None = None  # step of the checkpoint from which a run is resumed
        self.strict_loading = False  # checkpoints hold only what is trained; `on_load_checkpoint` checks that
        self.model: Decomposition | None = None  # see `configure_model`
        if lora is None and kv is None and (sparsity.target == 0 or mask):
            what = "model.mask gives the mask" if mask else "sparsity.target is 0"
            raise KoffError(f"nothing to train: {what} and both model.lora and model.kv are null")
        specs = {"sparsity": sparsity, "lora": lora, "kv": kv, "loss": loss, "optim": optim, "retention": retention}
        plain = {"backbone": backbone, "joint": joint, "shared_memory": shared_memory}
        plain |= {"activation_checkpointing": activation_checkpointing, "compile": compile, "artifact": artifact}
        plain |= {"mask": mask, "prior": prior} | loading
        specs = {name: spec and asdict(spec) for name, spec in specs.items()}
        self.save_hyperparameters(specs | {"domains": self.domains} | without_secrets(plain))
        if sparsity.uniform:  # refuse now what no config of the family can express
            check_layout(load_config(source, revision=revision, trust_remote_code=trust_remote_code), sparsity)

    def configure_model(self) -> None:
        """Build the decomposition, as the devices are known by now; then check trainer and data against it."""
        strategies.check(self._trainer)
        if self.model is None:
            self._build()
        self.objective = Objective(self.model, self.loss, recomputes(self))
        if self.objective.recompute:
            allow_recomputation(self.model.backbone)
        data = self._trainer.datamodule if self._trainer is not None else None
        if self._trainer is not None and self.trainer.training:
            refuse_trainer(self.trainer)
            check_text(self.retention, data)
            for text in (data, data.general) if self.retention else (data,):
                take_stored_teacher(self.loss, text, self.model.backbone_hash)
        if (tokenizer := getattr(data, "tokenizer", None)) is not None:
            check_vocabulary(tokenizer, self.model.backbone.get_input_embeddings().num_embeddings)

    def _build(self) -> None:
        self.model = Decomposition(
            self.source, self.domains, self.sparsity, self.lora, self.kv, self.shared_memory, **self.loading
        )
        self.model.chunk = self.loss.chunk
        hold_closed(self.model.backbone, self.extends)
        check_top_k(self.loss.top_k, len(self.model.head))
        spec, kinds = self.sparsity, len(self.model.budget.kinds) if self.sparsity.scope == "local" else None
        self.penalty = make_penalty(spec.penalty, spec.weight, spec.autoscale, kinds)
        if self.mask_source is not None:
            load_mask(self.model, self.mask_source)
            self.penalty.requires_grad_(not self.mask_source.fixed)
        if self.hparams.compile:
            compile_layers(self.model.backbone, self.hparams.compile)
        if self.warm_start is not None:
            load_warm_start(self.model, self.warm_start)
        self.bpb = torch.nn.ModuleDict({f"{mode}/{d}": BitsPerByte() for mode in self.modes for d in self.domains})
        self.documents = DocumentScores()

    # --------------------------------------------------------------------------------------------- training

    def configure_callbacks(self) -> list[Callback]:
        """What every trainer needs to end a run where it can go on."""
        return [EndsBetweenSteps()]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One micro-batch; the equation at the head of this file."""
        rows, domains = len(batch["labels"]), self.model.domain_of_row(batch)  # [B]
        retention = retention_loss(self, batch_idx)  # first, with its backward: it needs other gates and memories
        memories = batch["domains"] if self.memories_on else [None] * rows
        data = self.objective(batch, self.draw_gates(rows, batch_idx), memories, domains)
        penalty = self.sparsity_penalty(data.loss)
        loss = data.loss + penalty + retention
        self.guard.check_loss(loss, data.tokens, data.predicted, batch["domains"], self.global_step)
        parts = {"train/loss": loss, "train/kl": data.kl, "train/penalty": penalty}
        self.log_dict(parts if self.loss.top_k_alone else parts | {"train/ce": data.ce}, batch_size=rows)
        return loss if loss.requires_grad else loss.requires_grad_()  # in some steps nothing learns

    @property
    def learns_mask(self) -> bool:
        """Whether anything is pruned at all."""
        return self.sparsity.target > 0

    @property
    def mask_is_fixed(self) -> bool:
        """Whether memories train alone: the mask is hardened, or none is learned."""
        return not self.learns_mask or bool(self.model.gates.hardened)

    @property
    def phase(self) -> Phase:
        """Phase of the current optimizer step: by the schedule, as long as there is a mask to learn."""
        if self.mask_is_fixed:
            return "consolidate"
        return "warmup" if self.schedule is None else self.schedule.phase(self.global_step)

    @property
    def learns_now(self) -> bool:
        """Whether the mask is learned in this step: gates are sampled and the penalty is on."""
        return self.phase in ("ramp", "hold")

    @property
    def memories_on(self) -> bool:
        """Whether rows read their memories in this step: always, but in a two-stage run only once the mask is fixed."""
        return self.joint or self.mask_is_fixed

    def draw_gates(self, rows: int, batch_idx: int) -> Tensor | None:
        """Gate values for a micro-batch, [R, U]: in the warm-up ones (or None), then a sample, then the hard mask."""
        gates = self.model.gates
        if not self.learns_mask:
            return None
        if gates.hardened or self.learns_now:
            return gates.draw(rows, (self.global_step, batch_idx, self.global_rank))
        observes = self.sparsity.prior == "fisher" and self.mask_source is None and self.training
        return gates.probe(rows) if observes else None

    def sparsity_penalty(self, data: Tensor | None = None) -> Tensor:
        """The penalty while the mask is learned, else 0: scalar in nats. `data`: the loss on data, scalar."""
        if not self.learns_now:
            return torch.zeros((), device=self.device)
        gates = self.model.gates
        return self.penalty(self.model.budget.measured(gates.gate.keep(gates.logits)), self.model.target, data)

    def on_fit_start(self) -> None:
        """Refuse what would silently train wrongly; then fill fresh KV memories and let all ranks start alike."""
        refuse_taken(self.domains if self.resumed_at is None else ())
        cast = [name for name, p in self.named_parameters() if p.requires_grad and p.dtype != torch.float32]
        if cast:
            raise KoffError(
                f"trainer.precision {self.trainer.precision!r} casts what is trained (first: {cast[0]}): small steps "
                "would be rounded away. Use bf16-mixed, and model.dtype for the frozen weights"
            )
        if self.schedule is None and not self.mask_is_fixed:
            raise KoffError(
                "nothing says when the mask is learned: give the trainer koff_lightning.AnnealSparsity() as a "
                "callback, or set model.sparsity.target to 0"
            )
        if len(set(ranks.gather(self.model.backbone_hash))) > 1:
            raise KoffError(f"the processes have loaded different weights as {self.source!r}: give all the same")
        refuse_other_steps(ranks.gather(self.resumed_at))
        self.fill_memories()
        owned = self.owned()
        ranks.copy_from_first([value for name, value in sorted(self.state_dict().items()) if name in owned])

    def on_train_start(self) -> None:
        """In a resumed run, let the training data go on where it was."""
        give_data_its_place(self.trainer)

    def fill_memories(self) -> None:
        """Fill fresh KV memories from each domain's own text; restored ones are left alone."""
        fill_memories(self.model, getattr(self._trainer, "datamodule", None))

    on_validation_start = on_test_start = on_predict_start = fill_memories

    def on_after_backward(self) -> None:
        """In the warm-up, collect the squared gradients of the gates, which later order the logits."""
        self.model.gates.observe(loss_scale(self.trainer))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One AdamW: mask, multipliers (ascent), LoRA, KV."""
        parts = self.model.gates, self.penalty, self.model.memories
        optimizer, rates = optimizer_and_rates(*parts, self.optim, total_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """As Lightning's, also where nothing moves."""
        moves = self.learns_now or (self.memories_on and (self.lora or self.kv))
        take_step(self, optimizer, optimizer_closure, bool(moves))

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: object, **__: object) -> None:
        """Clip LoRA and KV gradients, each by its own norm: a global norm would be mostly that of the multipliers."""
        self.guard.check_gradients(self, optimizer, clip_by_group(optimizer, self.optim.clip))

    # ------------------------------------------------------------------------------------------- evaluation

    def _evaluate(self, batch: Batch, modes: Sequence[str]) -> None:
        found: dict[str, Tensor] = {}  # mode -> nats [B, T-1]
        tokens = self.model.targets(batch)[1].sum(1)  # [B]
        general = all(str(d).startswith(GENERAL) for d in batch["domains"])  # general text has no memory of its own
        for mode in (mode for mode in modes if mode != "koff" or not general):
            same = self.model.same_as(mode)
            found[same] = nats = found[same] if same in found else self.model.token_nats(batch, mode)
            self.documents.update(mode, batch, nats)
            for domain in dict.fromkeys(d for d in batch["domains"] if d in self.domains):
                chosen = [i for i, d in enumerate(batch["domains"]) if d == domain]
                self.bpb[f"{mode}/{domain}"].update(nats[chosen], batch["num_bytes"][chosen], tokens[chosen])

    def held_out(self, modes: Sequence[str]) -> dict[str, dict[str, float]]:
        """Bits per byte of the evaluation that just ran, {domain: {mode: bits per byte}}; nan without a row."""
        with warnings.catch_warnings():  # of such a domain
            warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
            return {d: {mode: float(self.bpb[f"{mode}/{d}"].compute()) for mode in modes} for d in self.domains}

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics."""
        for metric in (self.documents, *self.bpb.values()):
            metric.reset()

    on_test_epoch_start = on_validation_epoch_start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Held-out bits per byte of each row with its own memory, under the mask in force."""
        self._evaluate(batch, ("koff",))

    def on_validation_epoch_end(self) -> None:
        """Log bits per byte by domain, and their mean as the figure to monitor."""
        self._log_table("val", ("koff",))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Held-out bits per byte in all modes."""
        self._evaluate(batch, self.modes)

    def on_test_epoch_end(self) -> None:
        """Log bits per byte in all modes, by domain."""
        self._log_table("test", self.modes)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Bits per byte of every row under its own memory."""
        nats, size = self.model.row_nats(batch, "koff"), batch["num_bytes"]
        rows = zip(batch["domains"], (nats / math.log(2) / size).tolist(), size.tolist(), strict=True)
        return [{"domain": domain, "bits_per_byte": value} for domain, value, count in rows if count > 0]

    def _log_table(self, stage: str, modes: Sequence[str]) -> None:
        table = self.held_out(modes)
        for mode in modes:
            for domain, row in table.items():
                self.log(f"{stage}/{mode}_bpb/{domain}", row[mode], sync_dist=True)
            scored = [row[mode] for row in table.values() if not math.isnan(row[mode])] or [math.nan]
            self.log(f"{stage}/{mode}_bpb", fmean(scored), prog_bar=mode == "koff", sync_dist=True)

    # ------------------------------------------------------------------------------------------ checkpoints

    def owned(self) -> set[str]:
        """Names in the state dict of all but the frozen weights: ours, and what a subclass adds to this module."""
        return {n for n in self.state_dict() if not n.startswith(PREFIX)} | {PREFIX + n for n in self.model.owned()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was trained; of the backbone only its name and hash."""
        owned = self.owned()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in owned}
        checkpoint["koff"] = make_of(self.model) | {
            "placement": self.model.placement,
            "backbone": self.source,
            "backbone_hash": self.model.backbone_hash,
            "target": self.model.target,
            "precision": str(self.trainer.precision),
            "moved": [len(state.get("state", ())) for state in checkpoint.get("optimizer_states", ())],
        }

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, **options: Any) -> Self:
        """As Lightning's, but safe for files from anyone: no pickled code runs, and no remote code unless asked for."""
        if "domains" in options:
            raise KoffError("load_from_checkpoint takes the checkpoint's own domains: leave domains out")
        options = {name: asdict(value) if is_dataclass(value) else value for name, value in options.items()}
        read_checkpoint(checkpoint_path, mmap=True)
        with warnings.catch_warnings():  # of the frozen weights, all by name: they are the backbone's
            warnings.filterwarnings("ignore", "Found keys that are in the model state dict but not in the checkpoint")
            return super().load_from_checkpoint(
                checkpoint_path, **{"weights_only": True, "trust_remote_code": False} | options
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not fit, and one that a run cannot be resumed from."""
        goes_on = self._trainer is not None and self.trainer.training
        if "koff" in checkpoint:  # else `refuse_unfit` says whose it is not
            check_content(checkpoint)
        refuse_unfit(checkpoint, self.model, some_domains=self._trainer is not None and not goes_on)
        if goes_on:
            refuse_other_course(checkpoint["hyper_parameters"], self.hparams)
        others = set(checkpoint["koff"].get("domains", ())) - set(self.model.domains)
        refuse_other_tensors(checkpoint["state_dict"], self.state_dict(), self.owned(), others)
        if goes_on:
            refuse_without_run(checkpoint, self.trainer)
        self.resumed_at = checkpoint.get("global_step")
        self.model.target = target_of(checkpoint, self.sparsity)
