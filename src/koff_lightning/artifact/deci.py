"""The block-config form of DeciLM and Nemotron-NAS (`DeciLMForCausalLM`): FFN widths of its own for every layer.

Read off the engines' loaders: vLLM's and SGLang's `nemotron_nas.py`, llama.cpp's `DeciModel` converter. What follows
from them:

* An FFN width is written as `ffn_mult`, which readers turn into int(2 ffn_mult hidden / 3) rounded up to a multiple of
  256. Widths are therefore raised to such a multiple, with removed neurons that stay as zeros. If the model's own width
  is no such multiple, the exact `intermediate_size` is written, which of the three only vLLM reads.
* Query heads are a property of the whole model, so removed kv groups stay as zeros.
* There is no place for q/k norms (Qwen3) or sliding windows. Biases on q, k, v alone (Qwen2) are `qkv_bias`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from koff_lightning.artifact.modeling_koff import MODELS
from koff_lightning.backbone import PrunableGroup
from koff_lightning.support.errors import KoffError
from koff_lightning.surgery import masks

FAMILIES = ("llama", "mistral", "qwen2")
_WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers")
STEP = 256  # the granularity of `ffn_mult`


def check_deci(config: PreTrainedConfig) -> None:
    """Raise KoffError if the format cannot express this kind of model."""
    family = config.model_type.removeprefix("koff_")
    if family not in FAMILIES:
        raise KoffError(f"layout 'deci' is for {', '.join(FAMILIES)}; its format has no q/k norms, as {family!r} needs")
    if getattr(config, "sliding_window", None) is not None:
        raise KoffError(
            f"layout 'deci' has no sliding windows, the model has one of {config.sliding_window} tokens: use layout "
            "'ragged' or 'uniform'"
        )
    heads = {(layer["num_attention_heads"]) for layer in getattr(config, "koff_layers", None) or []}
    if len(heads) > 1:
        raise KoffError(
            f"layout 'deci' has one number of query heads for all layers, the model has {min(heads)} to {max(heads)}: "
            "export from the checkpoint of the uncut model, or use layout 'ragged'"
        )


def deci_mask(groups: Sequence[PrunableGroup], kept: Tensor) -> Tensor:
    """The units that the format must hold, bool [U]: those kept, and removed ones that stay as zeros."""
    parts = []
    for group, mask in masks(groups, kept):
        if group.kind != "channel":
            parts.append(torch.ones_like(mask))
            continue
        missing = -int(mask.sum()) % STEP if group.size % STEP == 0 else 0
        filling = (~mask).nonzero()[:missing, 0]
        parts.append(mask.index_fill(0, filling, True))
    return torch.cat(parts)


def deci_config(config: PreTrainedConfig, widths: list[dict[str, int]]) -> dict[str, Any]:
    """The dictionary to write as config.json.

    Args:
        config: Plain or ragged config of the model.
        widths: What each layer holds, from `layouts.layer_widths`.
    """
    values = config.to_dict()
    rope = dict(values.pop("rope_parameters"))
    for name in ("koff_layers", "_name_or_path", "layer_types", *_WINDOWS):
        values.pop(name, None)
    first = widths[0]
    values |= {
        "model_type": "nemotron-nas",
        "architectures": ["DeciLMForCausalLM"],
        "num_attention_heads": first["num_attention_heads"],
        "num_key_value_heads": first["num_key_value_heads"],
        "intermediate_size": max(layer["intermediate_size"] for layer in widths),
        "rope_theta": rope.pop("rope_theta"),  # in the older spelling, which all readers know
        "rope_scaling": None if rope.get("rope_type", "default") == "default" else rope,
        "block_configs": [_block(layer, config.hidden_size) for layer in widths],
    }
    biases = {name: values.get(name, False) for name in ("attention_bias", "mlp_bias")}  # not all families name them
    return values | biases | ({"qkv_bias": True} if config.model_type.endswith("qwen2") else {})


def _block(layer: dict[str, int], hidden: int) -> dict[str, Any]:
    used = {"no_op": False, "replace_with_linear": False}
    width = layer["intermediate_size"]
    size = {"intermediate_size": width} if width % STEP else {"ffn_mult": 3 * width / (2 * hidden)}
    group = layer["num_attention_heads"] // layer["num_key_value_heads"]
    return {"attention": {"n_heads_in_group": group} | used, "ffn": size | used}


def ragged_config(values: dict[str, Any], family: str) -> PreTrainedConfig:
    """The config of the koff_* model that has the tensors of a `deci_config`, so that transformers runs them.

    Args:
        values: What `deci_config` gave.
        family: Of the model that was cut.

    Raises:
        KoffError: The block configs are not of the kind written here.
    """
    heads, hidden = values["num_attention_heads"], values["hidden_size"]
    try:
        widths = [
            {
                "intermediate_size": _width(block["ffn"], hidden),
                "num_attention_heads": heads,
                "num_key_value_heads": heads // block["attention"]["n_heads_in_group"],
            }
            for block in values["block_configs"]
        ]
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise KoffError(f"block_configs are not as koff-lightning writes them ({error!r})") from error
    plain = {
        name: value for name, value in values.items() if name not in ("model_type", "block_configs", "architectures")
    }
    return MODELS[family][0](**plain | {"koff_layers": widths, "sliding_window": None})


def _width(ffn: dict[str, Any], hidden: int) -> int:
    if "intermediate_size" in ffn:
        return ffn["intermediate_size"]
    return -(-int(2 * ffn["ffn_mult"] * hidden / 3) // STEP) * STEP  # the readers' rule
