"""Which units a decomposition removed, from a checkpoint or an artifact, without loading weights."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from koff_lightning.artifact.checkpoint import decomposition_state, read_checkpoint
from koff_lightning.artifact.folder import read_manifest
from koff_lightning.backbone import prunable_groups, without_weights
from koff_lightning.decomposition import Decomposition
from koff_lightning.loading import load_config
from koff_lightning.studies.analysis.activations import Activations
from koff_lightning.support.errors import KoffError
from koff_lightning.units import NEURONS

if TYPE_CHECKING:
    import pandas as pd

Bools = NDArray[np.bool_]
_Group = tuple[int, str, int]  # layer, kind, units


class NothingRemoved(KoffError):
    """A run that is sound and has no mask over FFN neurons."""


@dataclass(frozen=True)
class Mask:
    """The units of a dense model and which of them were removed: N neurons and G kv groups, layer after layer.

    Attributes:
        name: Where it comes from.
        base_hash: Hash of the dense model's weights.
        domains: Those that have a memory.
        layer: Layer of each neuron, [N].
        removed: bool [N]. Where gate and up channels are gated each by itself, a neuron is removed if either is.
        kv_layer: Layer of each kv group, [G].
        kv_removed: bool [G].
        logits: Logits of the neurons' gates when the mask was fixed, [N]; None in an artifact, and where only halves
            have any.
        importance: Squared gradients of the neurons' gates before anything was removed, [N]; None as the logits.
        halves: `gate_channel` and `up_channel`, as far as they are gated -> `removed`, `logit`, `importance`, each [N].
    """

    name: str
    base_hash: str
    domains: list[str]
    layer: NDArray[np.int64]
    removed: Bools
    kv_layer: NDArray[np.int64]
    kv_removed: Bools
    logits: NDArray[np.float64] | None = None
    importance: NDArray[np.float64] | None = None
    halves: dict[str, dict[str, Any]] = field(default_factory=dict)

    def check(self, activations: Activations) -> None:
        """Raise KoffError unless the activations are those of the dense model that this mask cuts."""
        if self.base_hash != activations.base_hash:
            raise KoffError(
                f"{self.name} was cut from the dense model with hash {self.base_hash[:12]}, the activations are of the "
                f"one with hash {activations.base_hash[:12]}: measure them on its own dense model"
            )
        if len(self.layer) != len(activations.layer):
            raise KoffError(
                f"{self.name} speaks of {len(self.layer)} FFN neurons, the activations of {len(activations.layer)}: "
                "measure its own dense model"
            )

    def table(self) -> "pd.DataFrame":
        """One line per unit: layer, kind, unit (within layer and kind), removed, and a neuron's logit and importance.

        What an artifact does not know is nan.
        """
        import pandas as pd

        kinds = [("channel", self.layer, self.removed), ("kv_group", self.kv_layer, self.kv_removed)]
        parts = []
        for kind, layer, removed in kinds:
            nothing = np.full(len(layer), np.nan)
            own = kind == "channel"
            columns = {"layer": layer, "kind": kind, "unit": np.arange(len(layer)) - np.searchsorted(layer, layer)}
            columns["removed"] = removed
            columns["logit"] = self.logits if own and self.logits is not None else nothing
            columns["importance"] = self.importance if own and self.importance is not None else nothing
            parts.append(pd.DataFrame(columns))
            if own:
                front = {name: columns[name] for name in ("layer", "unit")}
                parts += [pd.DataFrame(front | {"kind": half} | values) for half, values in self.halves.items()]
        return pd.concat([part for part in parts if len(part)], ignore_index=True)


def read_mask(source: str | Path, backbone: str | None = None) -> Mask:
    """The mask of a checkpoint of `koff fit` or `koff baseline`, or of an artifact in any layout.

    Args:
        source: A `.ckpt` file, or the folder that `koff export` wrote.
        backbone: Where the dense model is, if a checkpoint's run had it elsewhere; only its config is read.

    Raises:
        NothingRemoved: The run prunes nothing, or no FFN neurons.
        KoffError: Neither of these, damaged, or a mask that is not fixed yet.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        manifest = read_manifest(path)
        groups = [(group["layer"], group["kind"], group["of"]) for group in manifest.kept]
        return _mask(str(source), manifest.base["hash"], list(manifest.domains), groups, manifest.mask())
    checkpoint = read_checkpoint(path, mmap=True)
    options, about, state = checkpoint["hyper_parameters"], checkpoint["koff"], decomposition_state(checkpoint)
    _check_fixed(str(source), bool(state["gates.hardened"]), options["sparsity"]["target"])
    where = backbone or options["backbone"]
    config = load_config(where, revision=None if backbone else options["revision"])
    units = prunable_groups(without_weights(config), options["sparsity"]["units"])
    groups = [(group.layer, group.kind, group.size) for group in units]
    learned = {name: state[f"gates.{name}"] for name in ("logits", "importance")}
    return _mask(str(source), about["backbone_hash"], list(about["domains"]), groups, state["gates.kept"], learned)


def mask_of(module: Decomposition) -> Mask:
    """The mask of a decomposition that is hardened.

    Raises:
        KoffError: The mask is not fixed yet, or there is none.
    """
    name, gates = "this decomposition", module.gates
    _check_fixed(name, bool(gates.hardened), module.sparsity.target)
    groups = [(group.layer, group.kind, group.size) for group in gates.groups]
    learned = {"logits": gates.logits.detach(), "importance": gates.importance}
    return _mask(name, module.backbone_hash, list(module.memories.domains), groups, gates.kept, learned)


def _check_fixed(name: str, hardened: bool, target: float) -> None:
    if not hardened and not target:
        raise NothingRemoved(f"{name} prunes nothing (sparsity.target 0): it has no mask")
    if not hardened:
        raise KoffError(f"{name}: its mask is not fixed yet: train to the end of the hold phase, or take a later one")


def _mask(
    name: str,
    base_hash: str,
    domains: list[str],
    groups: list[_Group],
    kept: Tensor,
    learned: dict[str, Tensor] | None = None,
) -> Mask:
    kinds = np.repeat([kind for _, kind, _ in groups], [size for *_, size in groups])  # [U]
    layers = np.repeat([layer for layer, *_ in groups], [size for *_, size in groups])  # [U]
    if len(kinds) != len(kept):
        raise KoffError(f"{name} has a mask of {len(kept)} units, the dense model has {len(kinds)}: give its own")
    removed, heads = ~kept.cpu().numpy(), kinds == "kv_group"
    values = {key: value.cpu().double().numpy() for key, value in (learned or {}).items()}  # each [U]
    if "importance" in values and not values["importance"].any():
        del values["importance"]  # nothing was observed
    if "logits" in values and (values["logits"] == values["logits"][:1]).all():
        del values["logits"]  # as they began: an artifact does not store them, and a mask may be given without
    own = {kind: kinds == kind for kind in NEURONS if (kinds == kind).any()}  # bool [U] each
    if not own:
        raise NothingRemoved(
            f"{name} removes no FFN neurons (sparsity.units has no channel): there is nothing to compare"
        )
    first = next(iter(own.values()))
    gone = np.any([removed[units] for units in own.values()], axis=0)  # [N]
    about = (name, base_hash, domains, layers[first], gone, layers[heads], removed[heads])
    if "channel" in own:
        return Mask(*about, **{key: value[first] for key, value in values.items()})
    unknown = np.full(len(gone), np.nan)
    halves = {
        kind: {"removed": removed[units]}
        | {key.removesuffix("s"): values[key][units] if key in values else unknown for key in ("logits", "importance")}
        for kind, units in own.items()
    }
    return Mask(*about, halves=halves)
