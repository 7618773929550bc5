"""A mask that a run is given instead of learning it (`--model.mask`), or that gives its own a start (`--model.prior`).

Both come from any checkpoint: of `koff baseline`, or of another `koff fit`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from koff_lightning.artifact.checkpoint import decomposition_state, read_checkpoint, refuse_other_tensors
from koff_lightning.decomposition import Decomposition
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.support.errors import KoffError
from koff_lightning.support.forms import options_of
from koff_lightning.training.resume import other_dtype


@dataclass(frozen=True)
class MaskSource:
    """A checkpoint that a run takes its mask from, or the order of its mask's logits.

    Args:
        path: File of the checkpoint.
        fixed: Whether the mask is taken as it is (`model.mask`); else its logits order those of a new one
            (`model.prior`).
        about: What the checkpoint says about its model: name and hash of the backbone, and so on.
        sparsity: The `model.sparsity` options of the run that saved it.
        dtype: What its frozen weights were kept in, where that is known.
        tensors: State of its gates, by name; `logits` and `kept` are [U], one entry for each prunable unit.
    """

    path: str
    fixed: bool
    about: dict[str, Any]
    sparsity: SparsitySpec
    dtype: str | None
    tensors: dict[str, Tensor]


def read_mask_source(
    mask: str | None, prior: str | None, spec: SparsitySpec, others: Mapping[str, str | None]
) -> MaskSource | None:
    """Read the checkpoint of `model.mask` or `model.prior`; None if there is neither.

    Args:
        mask: Checkpoint whose mask is taken.
        prior: Checkpoint whose logits give the order.
        spec: The run's sparsity options.
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
        found = options_of(SparsitySpec, checkpoint["hyper_parameters"]["sparsity"], "sparsity")
        hardened = bool(tensors["hardened"])
        tensors["logits"]  # by which its units are counted
    except (TypeError, KeyError) as error:
        raise KoffError(f"{path} was written by another release of koff-lightning ({error}): use that one") from error
    if not found.target:
        raise KoffError(f"{path} holds no mask: it is of a run with model.sparsity.target 0")
    if mask is not None and not hardened:
        raise KoffError(f"the mask in {path} is not fixed yet: give a later checkpoint of that run as model.mask")
    if prior is not None and not spec.target:
        raise KoffError("model.prior is the start of a mask, but model.sparsity.target is 0, which learns none")
    dtype = checkpoint["hyper_parameters"].get("dtype")
    return MaskSource(path, mask is not None, checkpoint["koff"], found, dtype, tensors)


def load_mask(model: Decomposition, source: MaskSource) -> None:
    """Put a given mask, or its order, into a model that was just built.

    Raises:
        KoffError: It belongs to another backbone, to one in another dtype, or to other units.
    """
    gates, logits = model.gates, source.tensors["logits"]
    if source.about["backbone_hash"] != model.backbone_hash:
        if dtypes := other_dtype(source.dtype, model):
            raise KoffError(
                f"the mask in {source.path} is of a run that kept its frozen weights in {dtypes[0]}, this one keeps "
                f"them in {dtypes[1]}: give --model.dtype {dtypes[0]}"
            )
        raise KoffError(
            f"the mask in {source.path} belongs to backbone {source.about['backbone']!r} (hash "
            f"{source.about['backbone_hash'][:12]}), but {model.source!r} has hash {model.backbone_hash[:12]}"
        )
    if sorted(source.sparsity.units) != sorted(model.sparsity.units) or logits.shape != gates.logits.shape:
        raise KoffError(
            f"the mask in {source.path} is over {len(logits)} units ({', '.join(source.sparsity.units)}), this run's "
            f"is over {gates.logits.numel()} ({', '.join(model.sparsity.units)}): use the same model.sparsity.units"
        )
    refuse_other_tensors(source.tensors, here := gates.state_dict(), here)
    if not source.fixed:
        gates.order = logits.to(gates.logits.device)
        return
    gates.load_state_dict({name: value for name, value in source.tensors.items() if name != "seed"}, strict=False)
    gates.logits.requires_grad_(False)
