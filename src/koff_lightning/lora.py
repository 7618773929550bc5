"""A linear with the LoRA adapters of all memories, and which memory each row of the current batch reads.

Modules have peft's layout (`base_layer`, `lora_A.<memory>`, `lora_B.<memory>`) and initialisation, so the names in a
state dict are peft's. Only the forward is our own: peft cannot train rows of different adapters in one batch, and the
hooks that it sets for one forward are gone when activation checkpointing computes a layer again.

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
_version, _gone = attrgetter("_version"), attrgetter("gone")  # mapped in C: a loop in Python would cost time here
_NOT_CACHED = None, (), (-1,)  # its versions never match


class Mark:
    """By which `Routes` see that a memory that they read was removed from the bank: `gone` is True then."""

    gone = False


class Routes:
    """Which memory each row of a batch reads, and a cache of the tensors stacked for these rows. Rows never change.

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
        self.rows: Tensor | None = None  # [B] `order` on the device; None = every row reads names[0]
        self.groups = 0  # M if the rows are M equally long blocks, each reading one memory, in the order of names; or 0
        self._cache: dict[Hashable, tuple[object, Sequence[Tensor], Sequence[int]]] = {}
        if names and (len(names) > 1 or -1 in order):
            self.rows = torch.tensor(order, device=device)
            if order == [m for m in range(len(names)) for _ in range(len(order) // len(names))]:
                self.groups = len(names)

    def __getstate__(self) -> dict[str, object]:
        """Copies do not take the cache: a copied model has tensors of its own."""
        return self.__dict__ | {"_cache": {}}

    @property
    def valid(self) -> bool:
        """Whether all memories that rows read are still there."""
        return not any(map(_gone, self.marks))

    def forget(self) -> None:
        """Empty the cache."""
        self._cache.clear()

    def cached(
        self, place: Hashable, make: Callable[[], tuple[Made, Sequence[Tensor]]], rows: int | None = None
    ) -> Made:
        """What `make` returns first. Without gradients it is made once and cached, since decoding asks at every token.

        Args:
            place: Key of the cache.
            make: Returns what is wanted, and the tensors that it was computed from: when one of these was changed in
                place, it is made anew.
            rows: Rows of the batch at hand.

        Raises:
            KoffError: A memory was removed, or the routes are for another number of rows.
        """
        if not self.valid:
            raise KoffError("a memory that is active was removed: activate the rows' memories anew")
        if rows not in (None, len(self.order)):
            raise KoffError(f"memories are active for {len(self.order)} rows, the batch has {rows}: one is due per row")
        if torch.is_grad_enabled():
            return make()[0]
        made, sources, versions = self._cache.get(place, _NOT_CACHED)
        if versions != list(map(_version, sources)):
            made, sources = make()
            sources = [source for source in sources if not source.is_inference()]  # those have no version counter
            self._cache[place] = made, sources, list(map(_version, sources))
        return made


class _Matrix(nn.Module):
    """A or B of an adapter. A module, as peft's names end in `.weight`; not an `nn.Linear`, which is slow to make."""

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
        """Add an adapter: a fresh one to train, or a frozen one with the given matrices A [r, in] and B [out, r].

        A given B is stored transposed, which makes the product with a single token up to eight times as fast.
        """
        device = self.base_layer.weight.device
        if weights is None:
            with torch.device("cpu"):  # so that one seed gives the same adapter on every device
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
        routes = self.routes.value
        matrices = None
        if routes.names:
            matrices = routes.cached((self, x.dtype), lambda: self._matrices(routes, x.dtype), len(x))
        if matrices is None:
            return self.base_layer(x)
        down, up, scale = matrices
        # In place: no pass over the output for a sum, and one call less, as decoding is bound by their number.
        if down.ndim == 2:  # F.linear as in the base layer: its code is still in the processor's cache
            return self.base_layer(x).add_(F.linear(F.linear(x, down), up), alpha=scale)
        blocks = x.reshape(len(down), -1, x.shape[-1])  # [M or B, tokens, in]
        base, low = self.base_layer(blocks), torch.bmm(blocks, down.mT)  # [M or B, tokens, out], [M or B, tokens, r]
        out = base.baddbmm_(low.to(base.dtype), up.mT.to(base.dtype))  # dtypes differ under autocast
        return out.view(*x.shape[:-1], -1)

    def _matrices(
        self, routes: Routes, dtype: torch.dtype
    ) -> tuple[tuple[Tensor, Tensor, float] | None, Sequence[Tensor]]:
        """A, B and the factor of their product for the current rows (None if no memory has an adapter here).

        A is [r, in] and B [out, r] if all rows read one memory; else they are stacked, per block [M, ...] or per row
        [B, ...], with B scaled already and a factor of 1. Comes with the tensors to watch, as `Routes.cached` wants it.
        """
        present = {
            name: (self.lora_A[name].weight, self.lora_B[name].weight) for name in routes.names if name in self.scaling
        }
        sources = [weight for pair in present.values() for weight in pair]
        if not present:
            return None, sources
        if routes.rows is None:
            (down, up), scale = sources, self.scaling[routes.names[0]]
            if torch.is_grad_enabled():  # scale B, which is smaller than the output
                return (down.to(dtype), (up * scale).to(dtype), 1.0), sources
            # Without a cast these are the parameters themselves, so there is no copy that could be out of date.
            return (down.to(dtype), up.to(dtype), scale), () if down.dtype == up.dtype == dtype else sources
        empty = sources[0].new_zeros(0, self.in_features), sources[0].new_zeros(self.out_features, 0)
        pairs = [present.get(name, empty) for name in routes.names]  # a memory without an adapter here has rank 0
        down = [pair[0] for pair in pairs]
        up = [pair[1] * self.scaling.get(name, 1.0) for name, pair in zip(routes.names, pairs, strict=True)]
        rank = max(w.shape[0] for w in down)
        a = torch.stack([_padded(w, 0, rank) for w in down]).to(dtype)  # [M, r, in]
        b = torch.stack([_padded(w, 1, rank) for w in up]).to(dtype)  # [M, out, r]
        if not routes.groups:
            index, reads = routes.rows.clamp(min=0), (routes.rows >= 0).to(dtype).view(-1, 1, 1)
            a, b = a[index], b[index] * reads  # [B, r, in], [B, out, r]; zeros for a row without a memory
        return (a, b.mT.contiguous().mT, 1.0), sources


def check_fit(linears: Mapping[str, nn.Module], rank: int, weights: Mapping[str, Tensor] | None) -> None:
    """Raise KoffError unless an adapter fits the linears that are to carry it.

    Args:
        linears: Path -> linear.
        rank: Of the adapter.
        weights: Its matrices, `<path>.lora_A.weight` and `<path>.lora_B.weight`; None for a fresh adapter.
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


def _padded(weight: Tensor, dim: int, rank: int) -> Tensor:
    """A or B of a lower rank, padded with zeros to `rank` along `dim`."""
    missing = rank - weight.shape[dim]
    return F.pad(weight, (0, 0, 0, missing) if dim == 0 else (0, missing)) if missing else weight
