"""What a checkpoint and a run must agree on for the one to go on from the other."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from koff_lightning.support.errors import KoffError

_HARDENING = ("target", "denominator", "layout", "multiple_of", "min_channels", "min_kv_groups")  # what fixes a mask


def refuse_other_make(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a model that is made otherwise.

    Args:
        there: What the checkpoint says about its model, by the names of options.
        here: The same of this run. What the checkpoint does not say is not compared.

    Raises:
        KoffError: They differ; each difference is shown.
    """
    if odd := difference(there, {key: value for key, value in here.items() if key in there}):
        raise KoffError(f"the checkpoint is of another make: {odd}. Use the model and data options of that run")


def refuse_other_tensors(there: Mapping[str, Tensor], here: Mapping[str, Tensor], needed: Iterable[str]) -> None:
    """Refuse a checkpoint that lacks something `needed`, or holds it in another shape.

    Raises:
        KoffError: So it is; the first such tensor is named.
    """
    needed = sorted(needed)
    if missing := [name for name in needed if name not in there]:
        raise KoffError(
            f"the checkpoint lacks {len(missing)} of the tensors that this run trains, first {missing[0]}: "
            "use the model and data options of that run"
        )
    if odd := [name for name in needed if here[name].shape != there[name].shape]:
        raise KoffError(
            f"the checkpoint does not fit this run: {odd[0]} has shape {list(there[odd[0]].shape)} there and "
            f"{list(here[odd[0]].shape)} here ({len(odd)} tensors in all): use the model options of that run"
        )


def refuse_other_mask(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse to take a mask that is fixed already for one of other options: nothing would act on them any more.

    Args:
        there: `sparsity` options of the run that fixed it. What they do not say is not compared.
        here: Those of this run.

    Raises:
        KoffError: They differ in what decides how it is fixed; each difference is shown.
    """
    if odd := difference(*({key: spec[key] for key in _HARDENING if key in there} for spec in (there, here))):
        raise KoffError(
            f"the checkpoint's mask is fixed already, and its {odd}: use the model.sparsity options of that run, or an "
            "earlier checkpoint of it"
        )


def refuse_other_course(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse to go on with a run as with one that trains other things, or in another order.

    Args:
        there: Options of `model` of the run that saved the checkpoint.
        here: Those of this run.

    Raises:
        KoffError: They differ in what decides that; each difference is shown.
    """
    if odd := difference(_course(there), _course(here)):
        raise KoffError(
            f"a run that goes on keeps its course, but {odd}: use the model options of that run, or start a new one "
            "from the checkpoint with --model.warm_start"
        )


def _course(options: Mapping[str, Any]) -> dict[str, Any]:
    sparsity = options.get("sparsity") or {}
    learned = "learned" if sparsity.get("target") else "none (sparsity.target 0)"
    return {
        "joint": options.get("joint"),
        "mask": "given (model.mask)" if options.get("mask") else learned,
        "prior": "given (model.prior)" if options.get("prior") else sparsity.get("prior"),
        "sparsity.penalty": sparsity.get("penalty"),
    }


def refuse_other_steps(steps: Sequence[int | None]) -> None:
    """Raise KoffError if the processes, whose steps to go on from these are by rank, do not go on from the same one."""
    if len(set(steps)) > 1:
        found = ", ".join("none" if step is None else f"step {step}" for step in steps)
        raise KoffError(
            f"the processes go on from different checkpoints (by rank: {found}): give all the same --ckpt_path, in a "
            "folder that all of them see"
        )


def give_data_its_place(trainer: Trainer) -> None:
    """Let a run laid out in epochs go on with its next row.

    With max_epochs Lightning makes the loader before it has read from the checkpoint where it stood, and where an epoch
    had ended it would not give the loader its place at all.
    """
    loop = trainer.fit_loop
    if states := loop._combined_loader_states_to_load:
        loop._combined_loader._load_state_dicts(states)
        loop._combined_loader_states_to_load = []


def refuse_without_run(checkpoint: Mapping[str, Any]) -> None:
    """Raise KoffError for a checkpoint that holds no state of a run, as `koff baseline` writes it, to train on from."""
    if "optimizer_states" not in checkpoint:
        raise KoffError(
            "the checkpoint holds a model but no run that could go on: give it as model.mask or model.prior for its "
            "mask, or as model.warm_start for its memories too"
        )


def difference(there: object, here: object, name: str = "") -> str:
    """Where two plain values differ, as `name is A there and B here`, by dotted names; empty where they do not."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        names = [key for key in [*there, *(k for k in here if k not in there)] if key in here or name]
        parts = [difference(there.get(key), here.get(key), f"{name}.{key}" if name else key) for key in names]
        return "; ".join(filter(None, parts))
    return "" if there == here else f"{name} is {_plain(there)} there and {_plain(here)} here"


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value)
