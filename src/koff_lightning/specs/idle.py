"""Options that others leave nothing to do: told, not refused, since an overlay may lie over a config that has them."""

from collections.abc import Iterator
from typing import Any

from koff_lightning.specs.memories import KVSpec
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.specs.training import LossSpec


def idle_options(sparsity: SparsitySpec, kv: KVSpec | None, loss: LossSpec) -> list[str]:
    """What was set and does nothing, each with the reason; an option at its default is not told."""
    return [
        f"{section}.{name} {value} ({why})"
        for section, name, value, default, why in _without_work(sparsity, kv, loss)
        if value != default
    ]


def _without_work(
    sparsity: SparsitySpec, kv: KVSpec | None, loss: LossSpec
) -> Iterator[tuple[str, str, Any, Any, str]]:
    """Section, name, value and default of each option that is idle, and why."""
    if sparsity.target:
        if sparsity.penalty not in ("fixed", "hinge", "absolute"):
            why = f"of penalty fixed, hinge or absolute; this one is {sparsity.penalty}"
            yield "sparsity", "weight", sparsity.weight, SparsitySpec.weight, why
        if sparsity.penalty != "lagrangian":
            why = f"of penalty lagrangian; this one is {sparsity.penalty}"
            yield "sparsity", "band", sparsity.band, SparsitySpec.band, why
    if not loss.kl:
        yield "loss", "top_k", loss.top_k, LossSpec.top_k, "loss.kl is 0"
    if loss.top_k is None:
        yield "loss", "tail", loss.tail, LossSpec.tail, "loss.top_k is null"
    if kv is not None and kv.init != "normal":
        yield "kv", "std", kv.std, KVSpec.std, f"of kv.init normal; this one is {kv.init}"
