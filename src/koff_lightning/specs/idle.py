"""Options that others leave nothing to do: told, not refused, since an overlay may lie over a config that has them."""

from collections.abc import Iterator
from typing import Any

from koff_lightning.specs.memories import KVSpec
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.specs.training import LossSpec, RetentionSpec

Idle = tuple[str, Any, Any, str]  # name, value and default of an option, and why it does nothing


def idle_options(
    sparsity: SparsitySpec | None,
    kv: KVSpec | None,
    loss: LossSpec,
    retention: RetentionSpec | None = None,
    mask_is_fixed: bool = False,
) -> list[str]:
    """What was set and does nothing, each with the reason; an option at its default is not told.

    Args:
        sparsity: None where a mask or an order is given, and the options may be those of its run.
        kv: None for no slots.
        loss: Of the domains' text, and of general text.
        retention: None for none.
        mask_is_fixed: No step learns a mask.
    """
    found = list(_of_loss(loss))
    if sparsity is not None and sparsity.target:
        found += _of_sparsity(sparsity)
    if kv is not None and kv.init != "normal":
        found.append(("kv.std", kv.std, KVSpec.std, f"of kv.init normal; this one is {kv.init}"))
    if retention is not None and retention.updates == "mask" and mask_is_fixed:
        found.append(
            ("retention.updates", retention.updates, None, "no mask is learned, so general text moves nothing")
        )
    return [f"{name} {value} ({why})" for name, value, default, why in found if value != default]


def _of_sparsity(spec: SparsitySpec) -> Iterator[Idle]:
    if spec.penalty not in ("fixed", "hinge", "absolute"):
        why = f"of penalty fixed, hinge or absolute; this one is {spec.penalty}"
        yield "sparsity.weight", spec.weight, SparsitySpec.weight, why
    if spec.penalty != "lagrangian":
        why = f"of penalty lagrangian; this one is {spec.penalty}"
        yield "sparsity.band", spec.band, SparsitySpec.band, why
    if spec.prior == "none":
        yield "sparsity.spread", spec.spread, SparsitySpec.spread, "of prior fisher; this one is none"


def _of_loss(spec: LossSpec) -> Iterator[Idle]:
    if not spec.kl:
        yield "loss.top_k", spec.top_k, LossSpec.top_k, "loss.kl is 0"
    if not spec.kl or spec.top_k is None:
        yield "loss.tail", spec.tail, LossSpec.tail, "loss.kl is 0" if not spec.kl else "loss.top_k is null"
