"""What a checkpoint of `koff fit` holds, entry by entry: kinds, sizes and names, looked at before anything uses them.

torch's reader with `weights_only` makes sure that nothing runs. It does not say what the values are: a list may hold
itself, a tensor may claim a million times the numbers that it has, `global_step` may be a dictionary.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from packaging.version import InvalidVersion, Version
from torch import Tensor

from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.support.forms import fault_in, other

_DEEPEST = 40  # of values in one another; the loops of a run take 8
_MOST = 5_000_000  # values, each as often as it is reached; the optimizer of a large run has 100,000

ADAMW = {"step", "exp_avg", "exp_avg_sq"}  # what it keeps of each parameter
_COUNT = {"ready": int, "started?": int, "processed?": int, "completed": int}
_STEPS = {"total": _COUNT, "current": _COUNT}
_FIT = {
    "state_dict": dict,
    "epoch_loop.state_dict": {"_batches_that_stepped?": int},
    "epoch_loop.batch_progress": _STEPS | {"is_last_batch": bool},
    "epoch_loop.scheduler_progress": _STEPS,
    "epoch_loop.automatic_optimization.state_dict": dict,
    "epoch_loop.automatic_optimization.optim_progress": {"optimizer": {"step": _STEPS, "zero_grad": _STEPS}},
    "epoch_loop.manual_optimization.state_dict": dict,
    "epoch_loop.manual_optimization.optim_step_progress": _STEPS,
    "epoch_loop.val_loop.state_dict": dict,
    "epoch_loop.val_loop.batch_progress": _STEPS | {"is_last_batch": bool},
    "epoch_progress": _STEPS,
}
_POINT = {"step": int, "removed": [float], "target": float, "expected": float, "realised": float}
_HISTORY = {"points": [_POINT], "every": int}
_FORM = {
    "global_step": int,
    "epoch?": int,
    "pytorch-lightning_version?": str,
    "state_dict": {str: Tensor},
    "loops?": {"fit_loop": _FIT},
    "callbacks?": {
        str: dict,
        "RunReport?": {"history": _HISTORY, "tokens": int, "seconds": float},
        "AnnealSparsity?": {"steps": int, "course?": dict},
        "PlaceMemories?": {"whole": (int, None), "worth": {str: float}},
        "LMEval?": {"asked": list, "scores": dict, "step": int, "seconds": float},
    },
    "optimizer_states?": [{"state": dict, "param_groups": [{"params": [int], "lr": float}]}],
    "lr_schedulers?": [{"base_lrs": [float], "last_epoch": int, "_step_count": int, "_last_lr": [float]}],
    "log?": {"file": (str, None), "row": dict, "last": int, "validate": bool},
    "koff": {
        "backbone": str,
        "backbone_hash": str,
        "target": float,
        "precision?": str,
        "domains?": [str],
        "units?": [str],
        "gate?": str,
        "shared_memory?": bool,
        "lora?": (LoraSpec, None),
        "kv?": (KVSpec, None),
        "placement?": {str: [int]},
        "moved?": [int],
    },
    "hyper_parameters": {
        "backbone?": str,
        "domains?": [str],
        "sparsity?": SparsitySpec,
        "lora?": (LoraSpec, None),
        "kv?": (KVSpec, None),
        "loss?": dict,
        "retention?": (dict, None),
        "optim?": dict,
        "shared_memory?": bool,
        "joint?": bool,
        "dtype?": str,
        "revision?": (str, None),
        "artifact?": (str, None),
        "mask?": (str, None),
        "prior?": (str, None),
    },
}


def fault_of(checkpoint: Mapping[str, Any]) -> str | None:
    """What is wrong with the content of a checkpoint, in a clause; None if it is as `koff fit` writes it."""
    try:
        _count(checkpoint, {}, 0)
    except ValueError as error:
        return str(error)
    form = fault_in(checkpoint, _FORM, "it")
    form = form or _fault_of_tensors(checkpoint["state_dict"]) or _fault_of_release(checkpoint)
    if form or (form := _fault_of_optimizers(checkpoint.get("optimizer_states", ()), checkpoint["global_step"])):
        return form
    moved = [len(state["state"]) for state in checkpoint.get("optimizer_states", ())]
    if moved and moved != (due := list(checkpoint["koff"].get("moved", moved))):
        return f"optimizer_states keep something of {moved} parameters, where the run kept it of {due}"
    return _fault_of_history(checkpoint) or _contradiction(checkpoint)


def fault_of_place(place: Any) -> str | None:
    """What is wrong with the place in the text that a run of our data leaves in a checkpoint; None if it is one."""
    if found := fault_in(place, [{"batches": int, "order": dict, "places?": dict}], "combined_loader"):
        return found
    return next((other("batches", "a count", one["batches"]) for one in place if one["batches"] < 0), None)


def _count(value: Any, known: dict[int, int], depth: int) -> int:
    """How many values a value holds, shared ones each time; raises ValueError for what is no plain data."""
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.is_meta or value.is_nested:
            raise ValueError(f"it holds a tensor of a kind that `koff fit` does not save ({value.layout})")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"it holds a tensor of shape {list(value.shape)} without as many numbers")
        return 1
    if not isinstance(value, Mapping | list | tuple | set):
        return 1
    if depth > _DEEPEST or known.get(id(value)) == 0:
        raise ValueError(f"its values lie more than {_DEEPEST} deep in one another")
    if id(value) not in known:
        known[id(value)] = 0  # on the way
        inner = [*value, *value.values()] if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(_count(part, known, depth + 1) for part in inner)
    if known[id(value)] > _MOST:
        raise ValueError(f"it holds more than {_MOST} values")
    return known[id(value)]


def _fault_of_tensors(state: Mapping[str, Tensor]) -> str | None:
    """Trained tensors hold numbers, and the switch of the mask is one."""
    if (fixed := state.get("model.gates.hardened")) is not None and (fixed.dtype != torch.bool or fixed.ndim):
        return f"model.gates.hardened is {fixed.dtype} {list(fixed.shape)}, not one bool"
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return f"{name} holds numbers that are not finite"
    return None


def _fault_of_release(checkpoint: Mapping[str, Any]) -> str | None:
    """Lightning reads the number of its release before anything else."""
    try:
        Version(checkpoint.get("pytorch-lightning_version", "2.6"))
    except InvalidVersion:
        return other("pytorch-lightning_version", "the number of a release", checkpoint["pytorch-lightning_version"])
    return None


def _fault_of_optimizers(states: Sequence[Mapping[str, Any]], steps: int) -> str | None:
    """What is wrong with what AdamW keeps after `steps` steps; another optimizer has to look at its own itself."""
    for state in states:
        known = {number for group in state["param_groups"] for number in group["params"]}
        if odd := [number for number in state["state"] if type(number) is not int or number not in known]:
            return (
                f"optimizer_states keep something of a parameter {odd[0]!r:.60}, which their param_groups do not have"
            )
        entries = list(state["state"].values())
        if odd := [entry for entry in entries if not isinstance(entry, Mapping)]:
            return other("an entry of optimizer_states", "a dictionary", odd[0])
        whole = [entry for entry in entries if entry.keys() == ADAMW]
        if whole and any(entry.keys() < ADAMW for entry in entries):
            return "optimizer_states keep less of one parameter than of another"
        if fault := next(filter(None, (_fault_of_averages(entry, steps) for entry in whole)), None):
            return f"optimizer_states keep of a parameter {fault}"
    return None


def _fault_of_averages(entry: Mapping[str, Any], steps: int) -> str | None:
    """What is kept of one parameter is tensors of one shape, finite, and the count of steps that it has been moved."""
    if odd := [name for name, part in entry.items() if not isinstance(part, Tensor)]:
        return f"{odd[0]} that is no tensor"
    if odd := [name for name, part in entry.items() if part.dtype != torch.float32]:
        return f"{odd[0]} as {entry[odd[0]].dtype}, not torch.float32"
    if odd := [name for name, part in entry.items() if not part.isfinite().all()]:
        return f"{odd[0]} in numbers that are not finite"
    if len({part.shape for part in entry.values() if part.ndim}) > 1:
        return "tensors of several shapes"
    count = entry.get("step")
    if count is not None and (count.ndim or float(count) not in range(1, steps + 1)):
        return f"a count of steps that is not one of 1 to {steps}"
    return None


def _fault_of_history(checkpoint: Mapping[str, Any]) -> str | None:
    """Points of the mask's history are of the same groups, in the order of the steps, up to now, and in shares."""
    points = checkpoint.get("callbacks", {}).get("RunReport", {}).get("history", {}).get("points", ())
    if len({len(point["removed"]) for point in points}) > 1:
        return "points of its history are of other groups of units than others"
    steps = [-1, *(point["step"] for point in points), checkpoint["global_step"]]
    if any(a >= b for a, b in pairwise(steps[:-1])) or steps[-2] > steps[-1]:
        return f"the steps of its history, up to {steps[-2]}, are not in order, or go past its own, {steps[-1]}"
    shares = [share for point in points for share in (*point["removed"], point["target"], point["realised"])]
    if odd := [share for share in shares if not -1e-6 <= share <= 1 + 1e-6]:
        return other("a share in its history", "from 0 to 1", odd[0])
    return None


def _contradiction(checkpoint: Mapping[str, Any]) -> str | None:
    """What a checkpoint says of its model it says twice, with the options of its run and with its tensors."""
    options, about = checkpoint["hyper_parameters"], checkpoint["koff"]
    sparsity = options.get("sparsity", {})
    if not 0 <= about["target"] <= 1:
        return other("koff.target", "from 0 to 1", about["target"])
    for name, there in {name: options.get(name) for name in ("domains", "shared_memory", "lora", "kv")}.items():
        if name in about and name in options and _sorted(about[name]) != _sorted(there):
            return f"hyper_parameters.{name} and koff.{name} differ"
    for name in ("gate", "units"):
        if name in about and name in sparsity and _sorted(about[name], True) != _sorted(sparsity[name], True):
            return f"hyper_parameters.sparsity.{name} and koff.{name} differ"
    if loops := checkpoint.get("loops"):
        loop = loops["fit_loop"]  # of the two ways of stepping a run goes one, and the other's count is 0
        own = loop["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]["total"]["completed"]
        by_hand = loop["epoch_loop.manual_optimization.optim_step_progress"]["total"]["completed"]
        if (own, by_hand) not in ((checkpoint["global_step"], 0), (0, checkpoint["global_step"])):
            return f"its loops have taken {own or by_hand} steps, and global_step is {checkpoint['global_step']}"
    return None


def _sorted(value: Any, whole: bool = False) -> Any:
    """A value with the order of `targets` taken out; of the whole with `whole`."""
    if isinstance(value, Mapping):
        return {name: sorted(part, key=repr) if name == "targets" else part for name, part in value.items()}
    return sorted(value, key=repr) if whole and isinstance(value, list | tuple) else value
