"""Decomposition: a frozen backbone with a mask and a memory per domain. Plain torch; training it is training/module.py.

Shapes: B rows, T tokens, N predicted tokens, d hidden, U prunable units.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from koff_lightning.backbone import (
    ask_nothing_,
    hidden_states,
    inputs_of,
    parameter_counts,
    prunable_groups,
    uniform_kv_groups,
    without_weights,
)
from koff_lightning.gates import BackboneGates
from koff_lightning.loading import fingerprint, load_backbone
from koff_lightning.losses import head_nats
from koff_lightning.memory import MemoryBank, Part
from koff_lightning.placement import placed, shown
from koff_lightning.sparsity import Budget
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.support import ranks
from koff_lightning.support.errors import KoffError
from koff_lightning.support.names import check_names

Batch = dict[str, Any]

# Ways to score text: the unpruned model; under the mask with the row's own memory, without, and with another domain's.
MODES = ("dense", "koff", "memory_off", "swapped")


def price(model: PreTrainedModel, sparsity: SparsitySpec) -> Budget:
    """The budget of a backbone's prunable units.

    Args:
        model: The plain backbone, with weights or without.
        sparsity: What to remove.

    Raises:
        KoffError: The target cannot be reached, or (layout `uniform`) no config of this family can express it.
    """
    groups = prunable_groups(model, sparsity.units)
    return Budget(groups, parameter_counts(model), sparsity, uniform_kv_groups(model.config))


def check_layout(config: PreTrainedConfig, sparsity: SparsitySpec) -> None:
    """Refuse a layout that no config of the family can express, before any weights are read."""
    price(without_weights(config), sparsity)


class Decomposition(nn.Module):
    """A frozen LLM with gates on its units and a memory per domain.

    Args:
        source: Hub id, local folder, `.gguf` file, or `koff-tiny`.
        domains: Names of the domains.
        sparsity: What to remove.
        lora: LoRA adapter of every domain; None for none.
        kv: Key-value memory of every domain; None for none.
        shared_memory: One memory for all domains.
        loading: Further arguments of `load_backbone`.

    Raises:
        KoffError: An unsafe name, a backbone that cannot be loaded, or a target that cannot be reached.
    """

    def __init__(
        self,
        source: str,
        domains: Sequence[str],
        sparsity: SparsitySpec,
        lora: LoraSpec | None,
        kv: KVSpec | None,
        shared_memory: bool = False,
        **loading: Any,
    ) -> None:
        super().__init__()
        check_names(domains)
        self.source, self.domains, self.loading = source, list(domains), loading
        self.sparsity, self.lora, self.kv, self.shared_memory = sparsity, lora, kv, shared_memory
        self.placement: dict[Part, list[int]] = {}  # layers of each part that `place` has chosen
        self._target = 0.0  # see `target`
        self._cut: tuple[Any, Tensor, Tensor] | None = None  # cache of `hard_mask`: (target, device), logits, mask
        self.chunk = 1024  # tokens whose logits exist at one time
        self.backbone = load_backbone(source, **loading)
        self.own_settings = ask_nothing_(self.backbone)  # generation_config.json, for the export
        with torch.device("cpu"):  # its tensors stay on the CPU, also inside Lightning's device context
            self.budget = price(self.backbone, sparsity)
        self.backbone_hash = fingerprint(self.backbone)
        # In this order, so that the gates are outside of the adapters.
        self.memories = MemoryBank(self.backbone, self.domains, lora, kv, shared_memory)
        self.gates = BackboneGates(self.budget.groups, sparsity.gate, **sparsity.gate_options())
        self.gates.attach(self.backbone)

    @property
    def device(self) -> torch.device:
        """Device of the mask, and so of everything else."""
        return self.gates.logits.device

    def owned(self) -> set[str]:
        """Names in the state dict of all but the frozen weights: what is trained, or was chosen by training."""
        return {name for name in self.state_dict() if name.startswith(("gates.", "memories."))} | {
            name for name, parameter in self.named_parameters() if parameter.requires_grad
        }

    # ------------------------------------------------------------------------------------------------- mask

    @property
    def learns_mask(self) -> bool:
        """Whether anything is pruned at all."""
        return self.sparsity.target > 0

    @property
    def target(self) -> float:
        """Sparsity at which the mask is cut: what was set last (at first 0); once it is fixed, that of the options."""
        return self.sparsity.target if self.gates.hardened else self._target

    @target.setter
    def target(self, sparsity: float) -> None:
        self._target = sparsity

    def _keep(self) -> Tensor:
        """Probability that each unit stays, [U]; 0 or 1 once hardened."""
        return self.gates.kept.float() if self.gates.hardened else self.gates.gate.keep(self.gates.logits)

    def expected_sparsity(self) -> Tensor:
        """Sparsity in the target's denominator, scalar: the soft count, exact once hardened."""
        return self.budget.expected(self._keep())

    def shift_to_target(self, target: float, band: float) -> None:
        """Shift the logits until soft and hard sparsity are at the target +- band; see tracking.py."""
        for units, counts in self.budget.scopes():
            self.gates.shift_to_target(target, band, counts, units)

    def realised_sparsity(self) -> float:
        """Sparsity in the target's denominator: the hard count, exact once hardened."""
        return float(self.budget.counts(self._keep())[1])

    def hard_mask(self) -> Tensor:
        """The mask if training stopped now, bool [U]: the hardened one, or what `harden` would choose at `target`."""
        if self.gates.hardened:
            return self.gates.kept
        target, logits = self.target, self.gates.logits.detach()
        if self.sparsity.harden == "threshold":  # not cached: cheap, and depends on the temperature too
            return self.chosen_mask(target).to(logits.device)
        asked = target, logits.device
        if self._cut is None or self._cut[0] != asked or not torch.equal(self._cut[1], logits):
            self._cut = asked, logits.clone(), self.chosen_mask(target).to(logits.device)
        return self._cut[2]

    def chosen_mask(self, target: float) -> Tensor:
        """The mask by the present logits, bool [U]: the lowest removed until the target is met, or by the threshold."""
        if self.sparsity.harden == "threshold" and target > 0:
            return self.budget.threshold(self.gates.gate.keep(self.gates.logits))
        return self.budget.harden(self.gates.logits, target)

    def hard_gates(self) -> Tensor | None:
        """Gate values of `hard_mask`, [1, U]; None where nothing is pruned."""
        return self.hard_mask().float().unsqueeze(0) if self.learns_mask else None

    def harden(self) -> None:
        """Fix the mask by the logits of rank 0: at the final target, or by the threshold."""
        self.gates.harden(self.chosen_mask(self.sparsity.target))
        ranks.copy_from_first([self.gates.kept])

    def added_parameters(self) -> int:
        """Parameters that the cut model has and the dense one does not: biases in place of removed units."""
        if self.gates.bias is None:
            return 0
        consumers = [self.backbone.get_submodule(group.consumer) for group in self.gates.groups]
        plain = [getattr(linear, "base_layer", linear) for linear in consumers]  # without adapters
        return sum(linear.out_features for linear in plain if linear.bias is None)

    def place(self, placement: Mapping[Part, Sequence[int]]) -> None:
        """Keep a part of the memories (adapters, slots) in the given layers alone, and delete it elsewhere.

        Raises:
            KoffError: No layer is given for a part, or one in which the memories lack it.
        """
        for part, layers in placement.items():
            spec = {"lora": self.lora, "kv": self.kv}.get(part)
            held = self.placement.get(part) or (placed(spec.layers, self.memories.depth) if spec else [])
            if not layers or not set(layers) <= set(held):
                raise KoffError(
                    f"no {part} can be kept in layers {shown(sorted(layers)) or 'none'}: the memories of this run have "
                    f"theirs in {shown(held) or 'none'}"
                )
            self.memories.keep_layers(part, layers)
            self.placement[part] = sorted(set(layers))

    # ---------------------------------------------------------------------------------------------- forward

    @contextmanager
    def under(self, memories: Sequence[str | None] = (), mask: Tensor | None = None) -> Iterator[None]:
        """Inside the block, in this thread, these memories and this mask are in force; by default the dense model.

        Args:
            memories: Memory of each row, None for none; empty if no row has one.
            mask: Gate values, [R, U] with R = 1 or rows; None for all open.
        """
        with self.gates.off(), self.memories.scope(self.memories.routes_of(memories)):
            self.gates.set(mask)
            yield

    def hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [B, T, d] under the gates and memories in force."""
        return hidden_states(self.backbone, **inputs_of(batch, self.device))

    @torch.no_grad()
    def dense_hidden(self, batch: Batch) -> Tensor:
        """Last hidden states [B, T, d] of the dense model: gates and memories off."""
        with self.under():
            return self.hidden(batch)

    @property
    def head(self) -> Tensor:
        """Frozen output embedding, [V, d]."""
        return self.backbone.get_output_embeddings().weight

    def domain_of_row(self, batch: Batch) -> Tensor:
        """Index of each row's domain, [B]; rows without one count as a domain of their own."""
        if "domains" not in batch:
            raise KoffError(
                f"a batch has no 'domains' (it has {', '.join(sorted(batch))}): give the name of each row's domain, "
                "None for a row without one"
            )
        places = {domain: i for i, domain in enumerate(self.domains)} | {None: len(self.domains)}
        unknown = sorted({str(d) for d in batch["domains"]} - {str(d) for d in places})
        if unknown:
            raise KoffError(
                f"a batch holds rows of unknown domain {', '.join(unknown)}; this model has {', '.join(self.domains)}"
            )
        return torch.tensor([places[d] for d in batch["domains"]], device=batch["labels"].device)

    @staticmethod
    def targets(batch: Batch) -> tuple[Tensor, Tensor]:
        """Next tokens [N] and where they are predicted, bool [B, T-1]."""
        labels = batch["labels"][:, 1:]
        predicted = labels != -100
        return labels[predicted], predicted

    # ---------------------------------------------------------------------------------------------- scoring

    def row_nats(self, batch: Batch, mode: str) -> Tensor:
        """Negative log-likelihood of each row in nats, [B]; `mode` as in `token_nats`."""
        return self.token_nats(batch, mode).sum(1)

    @torch.no_grad()
    def token_nats(self, batch: Batch, mode: str) -> Tensor:
        """Negative log-likelihood of each next token in nats, [B, T-1], zero where none is predicted.

        Args:
            batch: Rows of any domains.
            mode: One of `MODES`; `swapped` scores each row under the memory that `another` chooses.
        """
        if mode == "dense":
            return self._nats(batch, (), None)
        if mode == "memory_off":
            return self._nats(batch, (), self.hard_gates())
        memories = self.another(batch) if mode == "swapped" else batch["domains"]
        return self._nats(batch, memories, self.hard_gates())

    def _nats(self, batch: Batch, memories: Sequence[str | None], mask: Tensor | None) -> Tensor:
        with self.under(memories, mask):
            hidden = self.hidden(batch)
        labels, predicted = self.targets(batch)
        nats = head_nats(hidden[:, :-1][predicted], self.head, labels, self.chunk)  # [N]
        return torch.zeros(predicted.shape, device=nats.device).masked_scatter(predicted, nats)  # [B, T-1]

    def another(self, batch: Batch) -> list[str | None]:
        """For each row, [B], a domain with another memory than the row's: its own if there is no other.

        It is chosen by the row's tokens. So it does not depend on the batch, and one pass over a text scores about
        equally many rows under each of the others. For rows of general text all domains are others; a row without a
        domain has None.
        """
        names, chosen = self.memories.names, []
        for domain, number in zip(batch["domains"], batch["labels"].clamp(min=0).sum(1).tolist(), strict=True):
            others = [other for other in self.domains if names[other] != names.get(domain)] or [domain]
            chosen.append(None if domain is None else others[number % len(others)])
        return chosen

    def same_as(self, mode: str) -> str:
        """`koff` if `mode` must give the same figures, since there is no memory or only one; else `mode` itself."""
        bare = self.lora is None and self.kv is None
        one = bare or len(set(self.memories.names.values())) == 1
        return "koff" if (mode == "swapped" and one) or (mode == "memory_off" and bare) else mode
