"""The forms in which a cut backbone and its memories are written: what goes into config.json, and which shapes.

`ragged` (a koff_* model type), `uniform` (a plain config), `masked` (zeros in the original shapes), `merged` (`ragged`
with one domain's LoRA folded in beforehand) and `deci` (the block configs of DeciLM and Nemotron-NAS).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from koff_lightning.artifact.deci import check_deci, deci_config, deci_mask
from koff_lightning.artifact.modeling_koff import MODELS, WIDTHS
from koff_lightning.backbone import PrunableGroup
from koff_lightning.support.errors import KoffError
from koff_lightning.surgery import State, cut_kv, cut_state, masks, with_bias, zero_kv, zero_state

LAYOUTS = ("ragged", "uniform", "deci", "masked", "merged")


def backbone_for(
    layout: str,
    config: PreTrainedConfig,
    state: Mapping[str, Tensor],
    groups: Sequence[PrunableGroup],
    kept: Tensor,
    bias: Tensor | None = None,
) -> tuple[PreTrainedConfig | dict[str, Any], State]:
    """Config and weights to write for a layout. Neither argument is changed.

    Args:
        layout: One of `LAYOUTS`.
        config: Of the model that the groups were listed from.
        state: Its weights under the plain model's names (for `merged`, after `surgery.merge_lora`).
        groups: Its prunable units.
        kept: Hard mask, bool [U].
        bias: What the removed units leave behind at the output of each group's consumer, [groups, d].

    Returns:
        The config (for `deci` the dictionary to write as config.json) and the tensors.

    Raises:
        KoffError: No such layout, or the layout cannot express this model or this mask.
    """
    shapes = memory_shapes(layout)
    if bias is not None:
        return _compensated(layout, config, with_bias(state, groups, bias), groups, kept)
    if shapes == "full":
        return _config(config.model_type, config, state), zero_state(state, groups, kept)
    if shapes == "deci":
        check_deci(config)
        wider = deci_mask(groups, kept)
        cut = cut_state(zero_state(state, groups, kept), groups, wider)
        return deci_config(_config(config.model_type, config, state), layer_widths(config, groups, wider)), cut
    family, widths = _family(config), layer_widths(config, groups, kept)
    cut = cut_state(state, groups, kept)
    if layout == "uniform":
        return _uniform(config, state, widths), cut
    if all(layer == _whole(config) for layer in widths):
        return _config(family, config, state), cut
    return _config(f"koff_{family}", config, state, koff_layers=widths), cut


def _compensated(
    layout: str, config: PreTrainedConfig, state: State, groups: Sequence[PrunableGroup], kept: Tensor
) -> tuple[PreTrainedConfig, State]:
    """A backbone with biases at the consumers, which no family's own config can say of them alone."""
    if layout in ("uniform", "deci"):
        raise KoffError(
            f"layout {layout!r} has no place for the biases by which this mask makes up for what it removes: use "
            "'ragged' or 'masked', or make the mask with koff baseline --compensate false"
        )
    paths = sorted({group.consumer.partition(f"layers.{group.layer}.")[2] for group in groups})
    if layout == "masked":
        widths, state = [_whole(config)] * config.num_hidden_layers, zero_state(state, groups, kept)
    else:
        widths, state = layer_widths(config, groups, kept), cut_state(state, groups, kept)
    return _config(f"koff_{_family(config)}", config, state, koff_layers=widths, koff_biases=paths), state


def memory_shapes(layout: str) -> str:
    """What the memories of a layout are shaped for.

    Returns:
        `cut` (all removed units are gone), `full` (all are there, as zeros) or `deci` (FFN units are gone up to the
        format's granularity, attention is full).
    """
    if layout not in LAYOUTS:
        raise KoffError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")
    return {"masked": "full", "deci": "deci"}.get(layout, "cut")


def memory_for(
    layout: str,
    lora_state: Mapping[str, Tensor] | None,
    kv_tensors: Mapping[str, Tensor] | None,
    groups: Sequence[PrunableGroup],
    kept: Tensor,
) -> tuple[State | None, State | None]:
    """One domain's memory in the shapes that `backbone_for` gives the backbone.

    Args:
        layout: One of `LAYOUTS`.
        lora_state: Adapter tensors by peft's names, or None.
        kv_tensors: `layers.{i}.key` and `layers.{i}.value`, each [K, P, dh], or None.
        groups: The units of the uncut model.
        kept: Hard mask, bool [U].
    """
    shapes, lora, kv = memory_shapes(layout), lora_state, kv_tensors
    if shapes == "cut":
        return lora and cut_state(lora, groups, kept), kv and cut_kv(kv, groups, kept)
    lora, kv = lora and zero_state(lora, groups, kept), kv and zero_kv(kv, groups, kept)
    return lora and cut_state(lora, groups, deci_mask(groups, kept)) if shapes == "deci" else lora, kv


def layer_widths(config: PreTrainedConfig, groups: Sequence[PrunableGroup], kept: Tensor) -> list[dict[str, int]]:
    """The widths of every layer once the removed units are gone, under the config's own names for them.

    Raises:
        KoffError: A layer would lose all its units of a kind.
    """
    whole, size = _whole(config), _head_dim(config)
    layers = [whole | layer for layer in getattr(config, "koff_layers", None) or [{}] * config.num_hidden_layers]
    for group, mask in masks(groups, kept):
        count = int(mask.sum())
        if not count:
            raise KoffError(f"layer {group.layer} keeps no {group.kind} at all: raise sparsity.min_{group.kind}s")
        if group.kind == "channel":
            layers[group.layer] |= {"intermediate_size": count}
        else:
            heads = count * group.width // size
            layers[group.layer] |= {"num_attention_heads": heads, "num_key_value_heads": count}
    return layers


def _uniform(config: PreTrainedConfig, state: Mapping[str, Tensor], widths: list[dict[str, int]]) -> PreTrainedConfig:
    family = _family(config)
    for name in WIDTHS:
        found = sorted({layer[name] for layer in widths})
        if len(found) > 1:
            raise KoffError(
                f"layout 'uniform' wants one {name} for all layers, the mask leaves {found[0]} to {found[-1]}: train "
                "with sparsity.layout: uniform, or export another layout"
            )
    try:
        return _config(family, config, state, **widths[0])
    except StrictDataclassError as error:
        reason = str(error).splitlines()[-1].strip()
        raise KoffError(f"a plain {family} config cannot say what is left ({reason}): use layout 'ragged'") from error


def _config(model_type: str, config: PreTrainedConfig, state: Mapping[str, Tensor], **widths: Any) -> PreTrainedConfig:
    """A copy of the config as another model type, as it should be found on disk."""
    values = config.to_dict()
    gone = ["model_type", "quantization_config", "transformers_version", "auto_map", "_name_or_path"]
    for name in gone if model_type == config.model_type else [*gone, "koff_layers"]:
        values.pop(name, None)
    values |= {"head_dim": _head_dim(config), "use_cache": True} | widths  # training switches the cache off
    values["dtype"] = next((str(t.dtype).removeprefix("torch.") for t in state.values() if _is_float(t)), None)
    ragged = MODELS[model_type.removeprefix("koff_")][1].__name__
    values["architectures"] = [ragged if model_type.startswith("koff_") else ragged.removeprefix("Koff")]
    return AutoConfig.for_model(model_type, **values)


def _whole(config: PreTrainedConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in WIDTHS}


def _family(config: PreTrainedConfig) -> str:
    return config.model_type.removeprefix("koff_")


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _is_float(tensor: Tensor) -> bool:
    return torch.is_floating_point(tensor)
