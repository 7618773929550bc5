"""What a checkpoint and a run must agree on for the one to go on from the other."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from koff_lightning.artifact.checkpoint import (
    decomposition_state,
    read_checkpoint,
    refuse_other_backbone,
    refuse_other_tensors,
)
from koff_lightning.artifact.checkpoint_schema import fault_of_place
from koff_lightning.backbone import prunable_groups, without_weights
from koff_lightning.data import DomainDataModule
from koff_lightning.decomposition import Decomposition
from koff_lightning.loading import load_config
from koff_lightning.placement import placed, shortest
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.support.errors import KoffError
from koff_lightning.support.wording import difference

# What fixes a mask; and options that are younger than some checkpoints, which then had these values.
_HARDENING = ("target", "denominator", "layout", "multiple_of", "min_channels", "min_kv_groups", "scope", "harden")
_YOUNGER = {
    name: getattr(SparsitySpec, name) for name in ("scope", "harden", "beta", "beta_end", "initial", "autoscale")
}
_SHAPING = ("layers", "frozen_first")  # of the memories' options; also younger than some checkpoints
_STARTS = ("init", "std")  # of KV memories, which act once at the start


def refuse_other_make(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse a checkpoint of a model that is made otherwise.

    Args:
        there: What the checkpoint says about its model, by the names of options.
        here: What this run's model is, by the same names. What the checkpoint does not say is not compared.

    Raises:
        KoffError: They differ; each difference is shown.
    """
    if differences := difference(there, {key: value for key, value in here.items() if key in there}):
        raise KoffError(f"the checkpoint is of another make: {differences}. Use the model and data options of that run")


def refuse_other_mask(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse to take a mask that is fixed already for one of other options: nothing would act on them any more.

    Args:
        there: `sparsity` options of the run that fixed it. What they do not say is not compared.
        here: The same options of this run.

    Raises:
        KoffError: They differ in what decides how it is fixed; each difference is shown.
    """
    there, here = _YOUNGER | dict(there), _YOUNGER | dict(here)
    if differences := difference(*({key: spec[key] for key in _HARDENING if key in there} for spec in (there, here))):
        raise KoffError(
            f"the checkpoint's mask is fixed already, and its {differences}: use the model.sparsity options of that "
            "run, or an earlier checkpoint of it"
        )


def refuse_other_course(there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Refuse to go on with a run as with one that trains other things, or in another order.

    Args:
        there: Options of `model` of the run that saved the checkpoint.
        here: The same options of this run.

    Raises:
        KoffError: They differ in what decides that; each difference is shown.
    """
    if differences := difference(_course(there), _course(here)):
        raise KoffError(
            f"a run that goes on keeps its course, but {differences}: use the model options of that run, or start a "
            "new one from the checkpoint with --model.warm_start"
        )


def _course(options: Mapping[str, Any]) -> dict[str, Any]:
    sparsity = _YOUNGER | (options.get("sparsity") or {})
    learned = "learned" if sparsity.get("target") else "none (sparsity.target 0)"
    return {
        "joint": options.get("joint"),
        "mask": "given (model.mask)" if options.get("mask") else learned,
        "prior": "given (model.prior)" if options.get("prior") else sparsity.get("prior"),
        "sparsity.penalty": sparsity.get("penalty"),
        "retention": options.get("retention") or "none",
    } | {f"sparsity.{name}": sparsity[name] for name in _YOUNGER if name != "harden"}


def _made(about: Mapping[str, Any], depth: int | None) -> dict[str, Any]:
    """What is said of a model, with the memories' options that decide how they are shaped, filled up and in full.

    Args:
        about: As `make_of` says it.
        depth: Layers of the backbone; None where that is not known yet: then places are left out.
    """
    made = dict(about)
    for name, kind in (("lora", LoraSpec), ("kv", KVSpec)):
        if made.get(name):
            spec = {field.name: field.default for field in fields(kind) if field.name in _SHAPING} | dict(made[name])
            layers = shortest(placed(spec["layers"], depth, f"{name}.layers"), depth) if depth else None
            made[name] = {key: value for key, value in spec.items() if key not in _STARTS} | {"layers": layers}
    return made


def refuse_other_options(path: str | Path, run: LightningModule, verb: str) -> None:
    """Refuse, before text is read and weights are loaded, to use a checkpoint under other options than its run had.

    Args:
        path: The checkpoint.
        run: The KOFFModule that is to take it up, not configured yet.
        verb: `fit` to go on with its run, `warm_start` to begin a new one from it; any other scores it, some of its
            domains alone too.

    Raises:
        KoffError: The checkpoint cannot be read, or is of another backbone, make or course.
    """
    checkpoint = read_checkpoint(path, mmap=True)
    if about := checkpoint.get("koff"):  # else `refuse_unfit` says whose it is not
        here = make_of(run)
        if verb not in ("fit", "warm_start"):
            here.pop("domains")
        _refuse_other_sizes(checkpoint, run)
        refuse_other_make(_made(about, None), _made(here, None))
        if verb == "fit":
            refuse_other_course(checkpoint["hyper_parameters"], run.hparams)


def _refuse_other_sizes(checkpoint: Mapping[str, Any], run: LightningModule) -> None:
    """Refuse the checkpoint of a backbone that has another number of units than the run's.

    One of another name may be the same one, moved; whether it is tells its hash, once the weights are loaded.
    """
    about, logits = checkpoint["koff"], decomposition_state(checkpoint).get("gates.logits")
    if logits is None or about["backbone"] == run.source or run.artifact is not None:
        return
    where = {name: run.loading[name] for name in ("revision", "trust_remote_code")}
    groups = prunable_groups(without_weights(load_config(run.source, **where)), about["units"])
    if sum(group.size for group in groups) != len(logits):
        raise KoffError(
            f"the checkpoint belongs to backbone {about['backbone']!r}, and this run's {run.source!r} has other sizes: "
            f"{_own_backbone(about)}"
        )


def _own_backbone(about: Mapping[str, Any]) -> str:
    return f"give --model.backbone {about['backbone']}, or the config of that run"


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


def refuse_without_run(checkpoint: Mapping[str, Any], trainer: Trainer) -> None:
    """Refuse to train on from what holds no run; say so where the run that goes on is to compute in other precision.

    Args:
        checkpoint: What was read.
        trainer: Of the run that goes on; our datamodule always leaves in a checkpoint where its text stood.

    Raises:
        KoffError: There is no state of a run, as `koff baseline` writes it, or not the place in our data.
    """
    if "optimizer_states" not in checkpoint:
        raise KoffError(
            "the checkpoint holds a model but no run that could go on: give it as model.mask or model.prior for its "
            "mask, or as model.warm_start for its memories too"
        )
    ours = isinstance(trainer.datamodule, DomainDataModule)
    place = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {}).get("combined_loader")
    if ours and not place:
        raise KoffError(
            "the checkpoint does not say where its text stood (loops.fit_loop.state_dict.combined_loader), so the run "
            "would begin it anew: go on from another checkpoint, or start a new run with model.warm_start"
        )
    if ours and (fault := fault_of_place(place)):
        raise KoffError(f"the checkpoint is not as `koff fit` writes one: {fault}. Give another one")
    there, here = checkpoint.get("koff", {}).get("precision"), str(trainer.precision)
    if there not in (None, here):  # checkpoints of 0.1.0 do not say theirs
        rank_zero_info(f"the run so far computed in {there}, from here on in {here} (trainer.precision)")


def make_of(model: Decomposition | LightningModule) -> dict[str, Any]:
    """What a checkpoint must have in common with a run that takes it up, by the names of options.

    Args:
        model: The model, or a KOFFModule that has none yet.
    """
    return {
        "domains": list(model.domains),
        "shared_memory": model.shared_memory,
        "gate": model.sparsity.gate,
        "units": sorted(model.sparsity.units),
        "lora": model.lora and asdict(model.lora) | {"targets": sorted(model.lora.targets)},
        "kv": model.kv and asdict(model.kv),
    }


def other_dtype(there: str | None, model: Decomposition) -> tuple[str, str] | None:
    """The dtypes of a run's frozen weights, by its options, and of these, where that is known and they differ."""
    kept = model.backbone.dtype
    if there is None or getattr(torch, there, there) == kept:  # half is float16
        return None
    return there, str(kept).removeprefix("torch.")


def refuse_unfit(checkpoint: Mapping[str, Any], model: Decomposition, some_domains: bool = False) -> None:
    """Refuse a checkpoint of another backbone, make or fixed mask.

    Args:
        checkpoint: Content of the file.
        model: The model that is to load it.
        some_domains: The model may have other domains, as when some are scored alone.

    Raises:
        KoffError: It does not fit; what differs is said.
    """
    about = checkpoint.get("koff")
    if about is None:
        raise KoffError(
            "this checkpoint was not written by koff-lightning: it does not say which backbone it belongs to"
        )
    dtypes = other_dtype((checkpoint.get("hyper_parameters") or {}).get("dtype"), model)
    if about["backbone_hash"] != model.backbone_hash and dtypes:
        raise KoffError(
            f"the checkpoint's run kept its frozen weights in {dtypes[0]}, this one in {dtypes[1]}: give --model.dtype "
            f"{dtypes[0]}"
        )
    refuse_other_backbone(about, model, _own_backbone(about))
    here, depth = make_of(model), model.memories.depth
    if some_domains:
        here.pop("domains")
    there, here = _made(about, depth), _made(here, depth)
    for part, layers in about.get("placement", {}).items():
        if here.get(part) and here[part]["layers"] == shortest(layers, depth):
            there[part] = (there[part] or {}) | {"layers": here[part]["layers"]}  # this run names what that one chose
    refuse_other_make(there, here)
    model.place(about.get("placement", {}))
    if bool(decomposition_state(checkpoint).get("gates.hardened", False)):
        refuse_other_mask((checkpoint.get("hyper_parameters") or {}).get("sparsity") or {}, asdict(model.sparsity))


def load_warm_start(model: Decomposition, path: str) -> None:
    """Give a new run the trained weights of a checkpoint, from whatever strategy and number of processes it came.

    Memories and mask come along; steps, rates, multipliers and random state do not. A mask that was fixed stays fixed,
    so that only the memories train on; one that was not is ordered anew when the ramp begins, by what it sees.

    Raises:
        KoffError: The checkpoint cannot be read or is of another make, or its mask is fixed at another size.
    """
    checkpoint = read_checkpoint(path, mmap=True)
    refuse_unfit(checkpoint, model)
    state = decomposition_state(checkpoint)
    refuse_other_tensors(state, model.state_dict(), model.owned())
    anew = ("gates.seed",) if state["gates.hardened"] else ("gates.seed", "gates.importance")
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith(anew)}, strict=False)
