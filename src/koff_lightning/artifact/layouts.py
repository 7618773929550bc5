"""Layouts: the ways in which a pruned backbone and its memories can be stored, one class each.

A layout decides which units the files hold (`held`). That gives the shapes of weights and memories: removed units that
are held are zeros, the other removed units are cut out. It also decides what config.json says, and what can be done
with the artifact later.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from koff_lightning.artifact.modeling_koff import MODELS, WIDTHS
from koff_lightning.backbone import PrunableGroup, head_size
from koff_lightning.loading import load_config
from koff_lightning.model_files import check_config
from koff_lightning.support.errors import KoffError
from koff_lightning.support.json_files import read_json_object
from koff_lightning.surgery import State, cut_kv, cut_state, grow_kv, grow_state, masks, with_bias, zero_kv, zero_state

Groups = Sequence[PrunableGroup]
Config = PreTrainedConfig | dict[str, Any]  # a dict (the content of config.json) if transformers has no class for it
Memory = tuple[State | None, State | None]  # adapter and KV memory, None where there is none
Widths = list[dict[str, int]]  # of each layer, by the config's own names

_Edit = Callable[[Mapping[str, Tensor], Groups, Tensor], State]


class Layout:
    """What all layouts have in common.

    Attributes:
        name: In options and in the manifest.
        about: What it means, for the model card; `{domain}` is the merged one.
        shapes: Shapes of its memories, as their cards say: `cut` (removed units are gone), `full` (they are zeros) or
            `deci` (FFN units are gone up to the format's granularity, attention is full).
        folds: Whether the LoRA of one domain is merged into the weights, so that there is no model without it.
        takes_domains: Whether memories can be trained on it later. Not if removed units are zeros: a new adapter could
            bring them back.
        takes_biases: Whether it can store the biases that stand in for removed units.
        has_code: Whether it may have a model type of ours, whose code can be stored with it.
        in_transformers: Whether transformers can run the backbone as it is stored.
    """

    name: str
    about: str
    shapes = "cut"
    folds = False
    takes_domains = True
    takes_biases = True
    has_code = True
    in_transformers = True

    def held(self, groups: Groups, kept: Tensor) -> Tensor:
        """The units that the files hold, bool [U]; the others are cut out."""
        return kept

    def config(self, config: PreTrainedConfig, dtype: str | None, widths: Widths, biases: list[str]) -> Config:
        """Return the entries of config.json.

        Args:
            config: Config of the model that was cut.
            dtype: Dtype of its weights.
            widths: Widths of each layer in the files.
            biases: Paths, inside a layer, of the linears that have a bias in place of removed units.

        Raises:
            KoffError: The layout cannot express this config.
        """
        raise NotImplementedError

    def backbone(
        self,
        config: PreTrainedConfig,
        state: Mapping[str, Tensor],
        groups: Groups,
        kept: Tensor,
        bias: Tensor | None = None,
    ) -> tuple[Config, State]:
        """Config and weights to write. No argument is changed.

        Args:
            config: Config of the model that the groups were listed from.
            state: Its weights under the plain model's names; if the layout folds, after `surgery.merge_lora`.
            groups: Its prunable units.
            kept: Hard mask, bool [U].
            bias: Added to the output of each group's consumer in place of the removed units, [groups, d].

        Raises:
            KoffError: The layout cannot express this model or this mask.
        """
        biases: list[str] = []
        if bias is not None:
            if not self.takes_biases:
                raise KoffError(
                    f"layout {self.name!r} has no place for the biases by which this mask makes up for what it "
                    "removes: use 'ragged' or 'masked', or make the mask with koff baseline --compensate false"
                )
            state = with_bias(state, groups, bias)
            biases = sorted({group.consumer.partition(f"layers.{group.layer}.")[2] for group in groups})
        dtype = next((str(t.dtype).removeprefix("torch.") for t in state.values() if t.is_floating_point()), None)
        widths = layer_widths(config, groups, self.held(groups, kept))
        return self.config(config, dtype, widths, biases), self._fit(state, groups, kept, zero_state, cut_state)

    def memory(
        self, lora: Mapping[str, Tensor] | None, kv: Mapping[str, Tensor] | None, groups: Groups, kept: Tensor
    ) -> Memory:
        """One domain's memory in the shapes of the backbone.

        Args:
            lora: Adapter tensors by peft's names, or None.
            kv: `layers.{i}.key` and `layers.{i}.value`, each [K, P, dh], or None.
            groups: The units of the uncut model.
            kept: Hard mask, bool [U].
        """
        fitted = lora and self._fit(lora, groups, kept, zero_state, cut_state)
        return fitted, kv and self._fit(kv, groups, kept, zero_kv, cut_kv)

    def dense_memory(
        self, lora: Mapping[str, Tensor] | None, kv: Mapping[str, Tensor] | None, groups: Groups, kept: Tensor
    ) -> Memory:
        """A stored memory in the dense model's shapes, with zeros for what is not stored; arguments as of `memory`."""
        held = self.held(groups, kept)
        return lora and grow_state(lora, groups, held), kv and grow_kv(kv, groups, held)

    def read_config(self, folder: Path, family: str) -> PreTrainedConfig:
        """The config under which transformers runs a stored backbone.

        Args:
            folder: Folder of the backbone.
            family: Model type of the dense model.

        Raises:
            KoffError: The backbone is of a family that is not supported.
        """
        return load_config(str(folder))

    def _fit(self, tensors: Mapping[str, Tensor], groups: Groups, kept: Tensor, zero: _Edit, cut: _Edit) -> State:
        held = self.held(groups, kept)
        return cut(tensors if held is kept else zero(tensors, groups, kept), groups, held)


class Ragged(Layout):
    """Every layer has its own widths (a koff_* model type); a plain model where nothing was removed."""

    name = "ragged"
    about = "every layer has its own widths"

    def config(self, config: PreTrainedConfig, dtype: str | None, widths: Widths, biases: list[str]) -> Config:
        """Of the koff_* model type of its family, or of the family itself where nothing was removed."""
        family = _family(config)
        if biases:
            return _copied(f"koff_{family}", config, dtype, koff_layers=widths, koff_biases=biases)
        if all(layer == _whole(config) for layer in widths):
            return _copied(family, config, dtype)
        return _copied(f"koff_{family}", config, dtype, koff_layers=widths)


class Masked(Ragged):
    """Removed units are zeros in the original shapes."""

    name = "masked"
    about = "removed units are zeros in the original shapes: nothing is saved by it"
    shapes = "full"
    takes_domains = False
    has_code = False

    def held(self, groups: Groups, kept: Tensor) -> Tensor:
        """Units that the files hold: all, as none is cut."""
        return torch.ones_like(kept)


class Merged(Ragged):
    """As `Ragged`, with one domain's LoRA merged into the weights; of its memory only the slots are stored."""

    name = "merged"
    about = "every layer has its own widths; the LoRA of {domain} is part of the weights"
    folds = True
    takes_domains = False

    def memory(
        self, lora: Mapping[str, Tensor] | None, kv: Mapping[str, Tensor] | None, groups: Groups, kept: Tensor
    ) -> Memory:
        """As `Layout.memory`, without the adapter, which is in the weights."""
        return super().memory(None, kv, groups, kept)


class Uniform(Layout):
    """All layers have the same widths, so that it is a plain model of its family."""

    name = "uniform"
    about = "all layers have the same widths, so that it is a plain model of its family"
    takes_biases = False
    has_code = False

    def config(self, config: PreTrainedConfig, dtype: str | None, widths: Widths, biases: list[str]) -> Config:
        """Of its family, with the widths that all layers have in common."""
        for name in WIDTHS:
            found = sorted({layer[name] for layer in widths})
            if len(found) > 1:
                raise KoffError(
                    f"layout 'uniform' wants one {name} for all layers, the mask leaves {found[0]} to {found[-1]}: "
                    "train with sparsity.layout: uniform, or export another layout"
                )
        family = _family(config)
        try:
            return _copied(family, config, dtype, **widths[0])
        except StrictDataclassError as error:
            reason = str(error).splitlines()[-1].strip()
            raise KoffError(
                f"a plain {family} config cannot say what is left ({reason}): use layout 'ragged'"
            ) from error


class Deci(Layout):
    """The block configs of DeciLM and Nemotron-NAS (`DeciLMForCausalLM`), in which every layer has its own FFN width.

    The format follows from the engines that read it: vLLM's and SGLang's `nemotron_nas.py`, llama.cpp's `DeciModel`
    converter.

    * An FFN width is written as `ffn_mult`, from which readers compute int(2 ffn_mult hidden / 3), rounded up to a
      multiple of 256. So widths are raised to such a multiple by removed neurons that stay as zeros. If the dense width
      is no such multiple, the exact `intermediate_size` is written, which of the three only vLLM reads.
    * The number of query heads is one for the whole model, so removed kv groups stay as zeros.
    * There are no q/k norms (Qwen3) and no sliding windows. Biases on q, k, v alone (Qwen2) are `qkv_bias`.
    """

    name = "deci"
    about = "block configs of DeciLM and Nemotron-NAS; removed kv groups are zeros"
    shapes = "deci"
    takes_domains = False
    takes_biases = False
    in_transformers = False

    FAMILIES = ("llama", "mistral", "qwen2")
    STEP = 256  # the granularity of `ffn_mult`
    _WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers")

    def held(self, groups: Groups, kept: Tensor) -> Tensor:
        """All kv groups, the kept neurons, and removed neurons up to the next multiple of `STEP`."""
        parts = []
        for group, mask in masks(groups, kept):
            if group.kind != "channel":
                parts.append(torch.ones_like(mask))
                continue
            missing = -int(mask.sum()) % self.STEP if group.size % self.STEP == 0 else 0
            filling = (~mask).nonzero()[:missing, 0]
            parts.append(mask.index_fill(0, filling, True))
        return torch.cat(parts)

    def config(self, config: PreTrainedConfig, dtype: str | None, widths: Widths, biases: list[str]) -> Config:
        """The dictionary to write as config.json."""
        self._check(config)
        values = _copied(config.model_type, config, dtype).to_dict()
        rope = dict(values.pop("rope_parameters"))
        for name in ("koff_layers", "_name_or_path", "layer_types", *self._WINDOWS):
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
            "block_configs": [self._block(layer, config.hidden_size) for layer in widths],
        }
        values |= {name: values.get(name, False) for name in ("attention_bias", "mlp_bias")}  # not all families do
        return values | ({"qkv_bias": True} if config.model_type.endswith("qwen2") else {})

    def _check(self, config: PreTrainedConfig) -> None:
        family = _family(config)
        if family not in self.FAMILIES:
            raise KoffError(
                f"layout 'deci' is for {', '.join(self.FAMILIES)}; its format has no q/k norms, as {family!r} needs"
            )
        if getattr(config, "sliding_window", None) is not None:
            raise KoffError(
                f"layout 'deci' has no sliding windows, the model has one of {config.sliding_window} tokens: use "
                "layout 'ragged' or 'uniform'"
            )
        heads = {(layer["num_attention_heads"]) for layer in getattr(config, "koff_layers", None) or []}
        if len(heads) > 1:
            raise KoffError(
                f"layout 'deci' has one number of query heads for all layers, the model has {min(heads)} to "
                f"{max(heads)}: export from the checkpoint of the uncut model, or use layout 'ragged'"
            )

    def _block(self, layer: dict[str, int], hidden: int) -> dict[str, Any]:
        used = {"no_op": False, "replace_with_linear": False}
        width = layer["intermediate_size"]
        size = {"intermediate_size": width} if width % self.STEP else {"ffn_mult": 3 * width / (2 * hidden)}
        group = layer["num_attention_heads"] // layer["num_key_value_heads"]
        return {"attention": {"n_heads_in_group": group} | used, "ffn": size | used}

    def read_config(self, folder: Path, family: str) -> PreTrainedConfig:
        """As a koff_* model, which has the same tensors: transformers has no class for block configs."""
        entries = read_json_object(folder / "config.json")
        check_config(entries, str(folder))
        return self.ragged_config(entries, family)

    def ragged_config(self, values: dict[str, Any], family: str) -> PreTrainedConfig:
        """The config of the koff_* model with the same tensors, from the values of config.json.

        Raises:
            KoffError: They are not as `config` writes them.
        """
        try:
            heads, hidden = values["num_attention_heads"], values["hidden_size"]
            widths = [
                {
                    "intermediate_size": self._width(block["ffn"], hidden),
                    "num_attention_heads": heads,
                    "num_key_value_heads": heads // block["attention"]["n_heads_in_group"],
                }
                for block in values["block_configs"]
            ]
            odd = ("model_type", "block_configs", "architectures")
            plain = {name: value for name, value in values.items() if name not in odd}
            return MODELS[family][0](**plain | {"koff_layers": widths, "sliding_window": None})
        except (KeyError, TypeError, ValueError, ZeroDivisionError, OverflowError, StrictDataclassError) as error:
            reason = " ".join(repr(error).split())[:200]
            raise KoffError(f"config.json is not as koff-lightning writes it for layout 'deci' ({reason})") from error

    def _width(self, ffn: dict[str, Any], hidden: int) -> int:
        if "intermediate_size" in ffn:
            return ffn["intermediate_size"]
        return -(-int(2 * ffn["ffn_mult"] * hidden / 3) // self.STEP) * self.STEP  # the readers' rule


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Ragged(), Uniform(), Deci(), Masked(), Merged())}


def layout_named(name: object) -> Layout:
    """Look up a layout by its name.

    Raises:
        KoffError: No layout has that name.
    """
    if not isinstance(name, str) or name not in LAYOUTS:
        raise KoffError(f"layout must be one of {', '.join(LAYOUTS)}; got {name!r}")
    return LAYOUTS[name]


def layer_widths(config: PreTrainedConfig, groups: Groups, held: Tensor) -> Widths:
    """The widths of every layer when only the `held` units are left, by the config's own names.

    Raises:
        KoffError: A layer would lose all its units of a kind.
    """
    whole, size = _whole(config), head_size(config)
    layers = [whole | layer for layer in getattr(config, "koff_layers", None) or [{}] * config.num_hidden_layers]
    for group, mask in masks(groups, held):
        count = int(mask.sum())
        if not count:
            raise KoffError(f"layer {group.layer} keeps no {group.kind} at all: raise sparsity.min_{group.kind}s")
        if group.kind == "channel":
            layers[group.layer] |= {"intermediate_size": count}
        else:
            heads = count * group.width // size
            layers[group.layer] |= {"num_attention_heads": heads, "num_key_value_heads": count}
    return layers


def _copied(model_type: str, config: PreTrainedConfig, dtype: str | None, **widths: Any) -> PreTrainedConfig:
    """A copy of a config with another model type, for config.json."""
    values = config.to_dict()
    gone = ["model_type", "quantization_config", "transformers_version", "auto_map", "_name_or_path"]
    for name in gone if model_type == config.model_type else [*gone, "koff_layers"]:
        values.pop(name, None)
    values |= {"head_dim": head_size(config), "use_cache": True} | widths  # training switches the cache off
    ragged = MODELS[model_type.removeprefix("koff_")][1].__name__
    architecture = ragged if model_type.startswith("koff_") else ragged.removeprefix("Koff")
    return AutoConfig.for_model(model_type, **values | {"dtype": dtype, "architectures": [architecture]})


def _whole(config: PreTrainedConfig) -> dict[str, int]:
    return {name: getattr(config, name) for name in WIDTHS}


def _family(config: PreTrainedConfig) -> str:
    return config.model_type.removeprefix("koff_")
