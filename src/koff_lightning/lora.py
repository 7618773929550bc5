"""A linear with the LoRA adapters of all memories, and which memory each row of the current batch reads.

Laid out as peft lays it out (`base_layer`, `lora_A.<memory>`, `lora_B.<memory>`) and started as peft starts it, so the
names in a state dict are peft's. Only the forward is ours: peft refuses rows of different adapters in training, and its
per-forward hooks are gone when a checkpointed layer is recomputed.

Shapes: B rows, T tokens, r rank, M distinct memories present in the batch.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from operator import attrgetter
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from koff_lightning.support.errors import KoffError
from koff_lightning.support.in_force import InForce

Made = TypeVar("Made")
_version, _gone = attrgetter("_version"), attrgetter("gone")  # asked for so often that a loop in Python shows
_NOTHING = None, (), (-1,)  # kept where nothing is: its versions are those of no tensors


class Mark:
    """Stands for a memory in the routes that read it; `gone` once it is taken away."""

    gone = False


class Routes:
    """Which memory each row of a batch reads, and what was stacked for these rows. The rows never change.

    Args:
        names: Memories present.
        marks: The `Mark` of each of them.
        order: Index of each row's memory in `names`; -1 for none.
        device: Device of the adapters.
    """

    def __init__(
        self,
        names: tuple[str, ...] = (),
        marks: Sequence[Mark] = (),
        order: Sequence[int] = (),
        device: torch.device | None = None,
    ) -> None:
        self.names, self.marks, self.order = names, marks, order
        self.rows: Tensor | None = None  # [B] the same where the adapters are; None = every row reads names[0]
        self.groups = 0  # blocks of consecutive rows that share a memory, when all blocks are equally long; else 0
        self._kept: dict[Hashable, tuple[object, Sequence[Tensor], Sequence[int]]] = {}
        if names and (len(names) > 1 or -1 in order):
            self.rows = torch.tensor(order, device=device)
            if order == [m for m in range(len(names)) for _ in range(len(order) // len(names))]:
                self.groups = len(names)

    def __getstate__(self) -> dict[str, object]:
        """A copy of a model has tensors of its own: nothing that was kept holds for them."""
        return self.__dict__ | {"_kept": {}}

    @property
    def hold(self) -> bool:
        """Whether all memories that rows read are still there."""
        return not any(map(_gone, self.marks))

    def forget(self) -> None:
        """Free the stacked tensors."""
        self._kept.clear()

    def keep(self, place: Hashable, make: Callable[[], tuple[Made, Sequence[Tensor]]], rows: int | None = None) -> Made:
        """What `make` returns first; without gradients it is made once and kept, as decoding asks for every token.

        Made anew when one of the tensors that `make` returns second was changed in place.

        Raises:
            KoffError: The routes do not hold any longer, or not for that many rows.
        """
        if not self.hold:
            raise KoffError("a memory that is active was removed: activate the rows' memories anew")
        if rows not in (None, len(self.order)):
            raise KoffError(f"memories are active for {len(self.order)} rows, the batch has {rows}: one is due per row")
        if torch.is_grad_enabled():
            return make()[0]
        made, sources, versions = self._kept.get(place, _NOTHING)
        if versions != list(map(_version, sources)):
            made, sources = make()
            sources = [source for source in sources if not source.is_inference()]  # those count no versions
            self._kept[place] = made, sources, list(map(_version, sources))
        return made


class _Matrix(nn.Module):
    """Half of an adapter. A module, since peft's names end in `.weight`; not a linear, whose making costs more."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class RoutedLinear(nn.Module):
    """A frozen linear and the rows' own adapters: y = W x + (alpha / r) B_m A_m x, m the memory of the row.

    Args:
        base_layer: The frozen linear.
        routes: In force for the bank that the adapters belong to.
    """

    def __init__(self, base_layer: nn.Linear, routes: InForce[Routes]) -> None:
        super().__init__()
        self.base_layer, self.routes = base_layer, routes
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.scaling: dict[str, float] = {}  # alpha / r

    def add(self, name: str, rank: int, scaling: float, weights: tuple[Tensor, Tensor] | None) -> None:
        """Hang an adapter on: of given matrices A [r, in] and B [out, r], frozen; else a fresh one, to be trained.

        A given B lies in memory as [r, out], which one token's product reads up to eight times as fast.
        """
        device = self.base_layer.weight.device
        if weights is None:
            with torch.device("cpu"):  # drawn there on every device: same seed, same adapter
                down = nn.Linear(self.in_features, rank, bias=False)
                up = nn.Linear(rank, self.out_features, bias=False)
                nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))  # again, as peft does
                nn.init.zeros_(up.weight)
            down, up = (nn.Parameter(half.weight.detach().to(device)) for half in (down, up))
        else:
            given = weights[0].to(device), weights[1].to(device).mT.contiguous().mT
            down, up = (nn.Parameter(weight, requires_grad=False) for weight in given)
        self.lora_A[name], self.lora_B[name], self.scaling[name] = _Matrix(down), _Matrix(up), scaling

    def remove(self, name: str) -> None:
        """Take an adapter away, if there is one of that name."""
        if name in self.scaling:
            del self.lora_A[name], self.lora_B[name], self.scaling[name]

    def forward(self, x: Tensor) -> Tensor:
        """Args: x [B, T, in]. Returns [B, T, out]; exactly the base layer's output while no memory is active."""
        base, routes = self.base_layer(x), self.routes.value
        if not routes.names:
            return base
        matrices = routes.keep((self, x.dtype), lambda: self._matrices(routes, x.dtype), len(x))
        if matrices is None:
            return base
        down, up, scale = matrices
        if down.ndim == 2:  # by the operators of the base layer, whose code the processor still holds
            added = F.linear(F.linear(x, down), up)
            return torch.add(base, added, alpha=scale) if torch.is_grad_enabled() else base.add_(added, alpha=scale)
        low = torch.bmm(x.reshape(len(down), -1, x.shape[-1]), down.mT)  # [M or B, tokens, r]
        if torch.is_grad_enabled() or base.dtype != up.dtype:  # the latter under autocast
            return base + (low @ up.mT).view_as(base)
        base.view(len(down), -1, base.shape[-1]).baddbmm_(low, up.mT)  # decoding waits for every call
        return base

    def _matrices(
        self, routes: Routes, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, Tensor, float] | None, Sequence[Tensor]]:
        """A, B and a factor of the rows, and what they come from that they do not show.

        [r, in] and [out, r] when all rows read the same; else one of each per block [M, ...] or per row [B, ...], B
        scaled and the factor 1. The first is None when no memory has any here.
        """
        present = {
            name: (self.lora_A[name].weight, self.lora_B[name].weight) for name in routes.names if name in self.scaling
        }
        sources = [weight for pair in present.values() for weight in pair]
        if not present:
            return None, sources
        if routes.rows is None:
            (down, up), scale = sources, self.scaling[routes.names[0]]
            if torch.is_grad_enabled():  # B is smaller than what it makes
                return (down.to(dtype), (up * scale).to(dtype), 1.0), sources
            # Nothing is copied unless it has to be cast, so a change in place shows by itself.
            return (down.to(dtype), up.to(dtype), scale), () if down.dtype == up.dtype == dtype else sources
        empty = sources[0].new_zeros(0, self.in_features), sources[0].new_zeros(self.out_features, 0)
        pairs = [present.get(name, empty) for name in routes.names]  # a memory without an adapter here is one of rank 0
        down = [pair[0] for pair in pairs]
        up = [pair[1] * self.scaling.get(name, 1.0) for name, pair in zip(routes.names, pairs, strict=True)]
        rank = max(w.shape[0] for w in down)
        a = torch.stack([_raised(w, 0, rank) for w in down]).to(dtype)  # [M, r, in]
        b = torch.stack([_raised(w, 1, rank) for w in up]).to(dtype)  # [M, out, r]
        if not routes.groups:
            index, reads = routes.rows.clamp(min=0), (routes.rows >= 0).to(dtype).view(-1, 1, 1)
            a, b = a[index], b[index] * reads  # [B, r, in], [B, out, r]; zeros for a row without a memory
        return (a, b.mT.contiguous().mT, 1.0), sources


def check_fit(linears: Mapping[str, nn.Module], rank: int, weights: Mapping[str, Tensor] | None) -> None:
    """Raise KoffError unless an adapter can be hung on.

    Args:
        linears: Path -> linear that is to carry it.
        rank: Its rank.
        weights: Its matrices, `<path>.lora_A.weight` and `<path>.lora_B.weight`; None when it is made afresh.
    """
    gated = [path for path, m in linears.items() if m._forward_pre_hooks and not isinstance(m, RoutedLinear)]
    if gated:
        raise KoffError(f"{gated[0]} has a gate, which would end up inside the adapter: add memories before gates")
    if weights is None:
        return
    sizes = {f"{path}.lora_A.weight": [rank, linear.in_features] for path, linear in linears.items()}
    sizes |= {f"{path}.lora_B.weight": [linear.out_features, rank] for path, linear in linears.items()}
    if odd := sorted(sizes.keys() ^ weights.keys()):
        fault = "is left over" if odd[0] in weights else "is missing"
        raise KoffError(f"the adapter does not fit its targets: {odd[0]} {fault}")
    for name, size in sizes.items():
        got = weights[name]
        if list(got.shape) != size or got.dtype != torch.float32:
            raise KoffError(
                f"the adapter does not fit the backbone: {name} is {got.dtype} {list(got.shape)}, due is torch.float32 "
                f"{size}"
            )
        if not got.isfinite().all():
            raise KoffError(f"the adapter holds nan or inf: {name}; get it again")


def _raised(weight: Tensor, dim: int, rank: int) -> Tensor:
    """A matrix of a higher rank; what is added is zeros and adds nothing."""
    missing = rank - weight.shape[dim]
    return F.pad(weight, (0, 0, 0, missing) if dim == 0 else (0, missing)) if missing else weight
