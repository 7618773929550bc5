"""The memories: domain -> (LoRA adapter by peft, KV memory), and which row of a batch reads which.

Adapters are peft's own, in peft's layout, so they save and load as such. Only the forward is ours: peft refuses rows of
different adapters in training, and its per-forward hooks are gone when a checkpointed layer is recomputed. Each domain
keeps its own parameters, so a domain that is absent from a batch has no gradient and the optimizer leaves it alone.

Shapes: B rows, T tokens, r rank, M distinct memories present in the batch.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners import lora as peft_lora
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from koff_lightning.attention import LayerMemory
from koff_lightning.backbone import LORA_TARGETS, attention_modules, kv_shapes
from koff_lightning.errors import KoffError
from koff_lightning.kv_memory import KVMemory, read_memories

SHARED = "shared"


@dataclass
class LoraSpec:
    """One LoRA adapter per domain.

    Args:
        rank: Rank r of the update B A.
        alpha: Numerator of the scale alpha / r.
        targets: Linears that get an adapter.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 1024:
            raise KoffError(
                f"lora.rank must be between 1 and 1024; got {self.rank} (set model.lora to null for no LoRA)"
            )
        if not 0 < self.alpha < math.inf:
            raise KoffError(f"lora.alpha must be positive and finite; got {self.alpha}")
        unknown = sorted(set(self.targets) - set(LORA_TARGETS))
        if unknown or not self.targets:
            raise KoffError(
                f"lora.targets must be some of {', '.join(LORA_TARGETS)}; got {', '.join(unknown) or 'none'}"
            )


@dataclass
class KVSpec:
    """One learned key-value memory per domain.

    Args:
        slots: Number P of key-value pairs per kv head and layer; slot 0 is frozen.
    """

    slots: int = 16

    def __post_init__(self) -> None:
        if not 2 <= self.slots <= 8192:
            raise KoffError(
                f"kv.slots must be between 2 and 8192 (slot 0 is frozen); got {self.slots} (null for no KV memory)"
            )


class Routes:
    """Which memory each row of the current batch reads. Shared by all adapters and attention layers of one bank."""

    def __init__(self) -> None:
        self.names: tuple[str, ...] = ()  # memories present, in the order `rows` counts them
        self.order: Tensor | None = None  # [B] index into names, -1 = none; on the CPU
        self.rows: Tensor | None = None  # the same where the adapters are; None = every row reads names[0]
        self.groups = 0  # blocks of consecutive rows that share a memory, when all blocks are equally long; else 0
        self.present: Tensor | None = None  # [B, 1, 1] 0.0 for rows without a memory; None = all rows have one


class RoutedLinear(peft_lora.Linear):
    """peft's LoRA linear with the rows' own adapters: y = W x + (alpha / r) B_m A_m x, m the memory of the row."""

    routes: Routes

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """Args: x [B, T, in]. Returns [B, T, out]; exactly the base layer's output while no memory is active."""
        base, routes = self.base_layer(x), self.routes
        if not routes.names:
            return base
        if len(x) != len(routes.order):
            raise KoffError(
                f"memories are active for {len(routes.order)} rows, the batch has {len(x)}: activate one per row"
            )
        down = [self.lora_A[name].weight for name in routes.names]
        up = [self.lora_B[name].weight * self.scaling[name] for name in routes.names]
        if routes.rows is None:
            return base + F.linear(F.linear(x, down[0].to(x.dtype)), up[0].to(x.dtype))
        a, b = self._stack(down, 0).to(x.dtype), self._stack(up, 1).to(x.dtype)  # [M, r, in], [M, out, r]
        if not routes.groups:
            index = routes.rows.clamp(min=0)
            a, b = a[index], b[index]  # [B, r, in], [B, out, r]
        grouped = x.reshape(a.shape[0], -1, x.shape[-1])  # [M or B, tokens, in]
        update = torch.bmm(torch.bmm(grouped, a.mT), b.mT).view_as(base)
        return base + (update if routes.present is None else update * routes.present.to(x.dtype))

    @staticmethod
    def _stack(weights: list[Tensor], rank_dim: int) -> Tensor:
        """Stack matrices of possibly different rank; the missing rank is filled with zeros, which add nothing."""
        most = max(w.shape[rank_dim] for w in weights)
        if any(w.shape[rank_dim] < most for w in weights):
            pad = [(0, 0, 0, most - w.shape[0]) if rank_dim == 0 else (0, most - w.shape[1]) for w in weights]
            weights = [F.pad(w, p) for w, p in zip(weights, pad, strict=True)]
        return torch.stack(weights)


class MemoryBank(nn.Module):
    """The memories of all domains, hung on a frozen backbone.

    Args:
        model: Backbone; adapters are injected into it and its attention becomes memory-aware, both without effect until
            `activate` is called.
        domains: Names of the domains.
        lora: Adapter of every domain; None for none.
        kv: KV memory of every domain; None for none.
        shared: All domains read and train one memory (the ablation).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        domains: Sequence[str],
        lora: LoraSpec | None,
        kv: KVSpec | None,
        shared: bool = False,
    ) -> None:
        super().__init__()
        self.domains = list(domains)
        self.names = {domain: SHARED if shared else domain for domain in self.domains}  # domain -> memory
        self.routes = Routes()
        memories = list(dict.fromkeys(self.names.values()))
        self.kv = nn.ModuleDict()
        self._linears: list[RoutedLinear] = []
        if kv is not None:
            shapes = kv_shapes(model)
            self.kv.update({self.key(name): KVMemory(shapes, kv.slots) for name in memories})
            model.set_attn_implementation("koff")
            for layer, attention in enumerate(attention_modules(model)):
                attention.koff_memory = _Reader(self, layer)
        if lora is not None:
            for name in memories:
                self._inject(model, lora, self.key(name))

    @staticmethod
    def key(name: str) -> str:
        """Name of a memory inside the model; prefixed, since peft and torch reserve some plain names."""
        return f"koff_{name}"

    def _inject(self, model: PreTrainedModel, lora: LoraSpec, adapter: str) -> None:
        config = LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, target_modules=list(lora.targets), lora_dropout=0.0, bias="none"
        )
        config._register_custom_module({nn.Linear: RoutedLinear})
        with warnings.catch_warnings():  # several adapters in one model are what is wanted here
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            inject_adapter_in_model(config, model, adapter_name=adapter)
        self._linears = [module for module in model.modules() if isinstance(module, RoutedLinear)]
        for module in self._linears:
            module.routes = self.routes
            for part in (module.lora_A, module.lora_B):
                part.float().requires_grad_(True)  # peft freezes all but the adapter injected last
        model.eval()

    def activate(self, domains: Sequence[str | None]) -> None:
        """Let row b of the following forwards read the memory of domains[b]; None = no memory.

        In force until the next call, since a checkpointed layer reads the routes again in the backward.

        Raises:
            KoffError: A domain that has no memory here.
        """
        unknown = sorted({str(d) for d in domains if d is not None and d not in self.names})
        if unknown:
            raise KoffError(f"no memory for domain {', '.join(unknown)}; domains with one: {', '.join(self.domains)}")
        keys = [None if d is None else self.key(self.names[d]) for d in domains]
        present = tuple(dict.fromkeys(key for key in keys if key is not None))  # in order of appearance
        self._route(present, [-1 if key is None else present.index(key) for key in keys])

    def _route(self, present: tuple[str, ...], rows: list[int]) -> None:
        routes = self.routes
        routes.names, routes.order = present, torch.tensor(rows)  # [B]
        routes.rows, routes.groups, routes.present = None, 0, None
        if present and (len(present) > 1 or -1 in rows):
            routes.rows = routes.order.to(self._device())
            if -1 in rows:
                routes.present = (routes.rows >= 0).float().view(-1, 1, 1)
            elif rows == [m for m in range(len(present)) for _ in range(len(rows) // len(present))]:
                routes.groups = len(present)

    def _device(self) -> torch.device:
        """Where the memories live."""
        found = next(self.kv.parameters(), None)
        if found is None and self._linears:
            found = self._linears[0].weight
        return torch.device("cpu") if found is None else found.device

    @contextmanager
    def off(self) -> Iterator[None]:
        """No memory for any row inside the block; the routes come back after it."""
        before, self.routes.names = self.routes.names, ()
        try:
            yield
        finally:
            self.routes.names = before

    def read(self, layer: int) -> LayerMemory | None:
        """The KV memories of the current rows at one layer."""
        if not self.routes.names:
            return None
        return read_memories([self.kv[name] for name in self.routes.names], self.routes.order, layer)

    def lora_parameters(self, domain: str | None = None) -> list[nn.Parameter]:
        """Adapter parameters of one domain, or of all."""
        names = [self.key(self.names[d]) for d in ([domain] if domain else self.domains)]
        parts = [part for module in self._linears for part in (module.lora_A, module.lora_B)]
        return [p for part in parts for name in dict.fromkeys(names) if name in part for p in part[name].parameters()]

    def kv_parameters(self, domain: str | None = None) -> list[nn.Parameter]:
        """Trainable KV parameters of one domain, or of all."""
        if not self.kv:
            return []
        names = dict.fromkeys(self.key(self.names[d]) for d in ([domain] if domain else self.domains))
        return [p for name in names for p in self.kv[name].parameters()]

    def size(self, domain: str) -> int:
        """Parameters that one domain's memory adds to the model; the frozen KV slot counts, since it is stored too."""
        kv = self.kv[self.key(self.names[domain])].numel() if self.kv else 0
        return sum(p.numel() for p in self.lora_parameters(domain)) + kv


class _Reader:
    """What an attention module holds: reads the bank anew at every call, so that recomputation sees the same rows."""

    def __init__(self, bank: MemoryBank, layer: int) -> None:
        self.bank, self.layer = bank, layer

    def __call__(self) -> LayerMemory | None:
        return self.bank.read(self.layer)
