"""A mask that a run is given instead of learning it (`--model.mask`), or that gives its own a start (`--model.prior`).

Both come from any checkpoint: of `koff baseline`, or of another `koff fit`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from koff_lightning.artifact.checkpoint import decomposition_state, read_checkpoint, refuse_other_tensors
from koff_lightning.decomposition import Decomposition
from koff_lightning.sparsity import SparsitySpec
from koff_lightning.support.errors import KoffError


@dataclass(frozen=True)
class GivenMask:
    """What the checkpoint holds.

    Args:
        path: Of the checkpoint.
        fixed: Whether the mask is to be taken as it is; else its logits order those of a new mask.
        about: Which backbone it belongs to.
        sparsity: Options of the run that made it.
        tensors: Of its gates, by name.
    """

    path: str
    fixed: bool
    about: dict[str, Any]
    sparsity: SparsitySpec
    tensors: dict[str, Tensor]


def given_mask(
    mask: str | None, prior: str | None, spec: SparsitySpec, others: Mapping[str, str | None]
) -> GivenMask | None:
    """Read the checkpoint of `model.mask` or `model.prior`; None if there is neither.

    Args:
        mask: Checkpoint whose mask is taken.
        prior: Checkpoint whose logits give the order.
        spec: What the run's options say.
        others: Options that bring a mask of their own, by name; None where not given.

    Raises:
        KoffError: Several are given, the file cannot be used, or it holds no mask.
    """
    path = prior if mask is None else mask
    if path is None:
        return None
    if len(several := [k for k, v in ({"mask": mask, "prior": prior} | dict(others)).items() if v is not None]) > 1:
        raise KoffError(f"model.{several[0]} and model.{several[1]} both say what the mask is: give one of them")
    checkpoint = read_checkpoint(path)
    state = decomposition_state(checkpoint)
    tensors = {name.removeprefix("gates."): value for name, value in state.items() if name.startswith("gates.")}
    try:
        found = SparsitySpec(**checkpoint["hyper_parameters"]["sparsity"])
        hardened = bool(tensors["hardened"])
    except (TypeError, KeyError) as error:
        raise KoffError(f"{path} was written by another release of koff-lightning ({error}): use that one") from error
    if not found.target:
        raise KoffError(f"{path} holds no mask: it is of a run with model.sparsity.target 0")
    if mask is not None and not hardened:
        raise KoffError(f"the mask in {path} is not fixed yet: give a later checkpoint of that run as model.mask")
    if prior is not None and not spec.target:
        raise KoffError("model.prior is the start of a mask, but model.sparsity.target is 0, which learns none")
    return GivenMask(path, mask is not None, checkpoint["koff"], found, tensors)


def take(model: Decomposition, given: GivenMask) -> None:
    """Put a given mask, or its order, into a model that was just built.

    Raises:
        KoffError: It belongs to another backbone or to other units.
    """
    gates, logits = model.gates, given.tensors["logits"]
    if given.about["backbone_hash"] != model.backbone_hash:
        raise KoffError(
            f"the mask in {given.path} belongs to backbone {given.about['backbone']!r} (hash "
            f"{given.about['backbone_hash'][:12]}), but {model.source!r} has hash {model.backbone_hash[:12]}"
        )
    if sorted(given.sparsity.units) != sorted(model.sparsity.units) or logits.shape != gates.logits.shape:
        raise KoffError(
            f"the mask in {given.path} is over {len(logits)} units ({', '.join(given.sparsity.units)}), this run's is "
            f"over {gates.logits.numel()} ({', '.join(model.sparsity.units)}): use the same model.sparsity.units"
        )
    refuse_other_tensors(given.tensors, here := gates.state_dict(), here)
    if not given.fixed:
        gates.order = logits.to(gates.logits.device)
        return
    gates.load_state_dict(given.tensors)
    gates.logits.requires_grad_(False)
    model.target = model.sparsity.target
