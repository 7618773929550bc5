"""Model types whose layers differ in width: `koff_llama`, `koff_mistral`, `koff_qwen2` and so on (`MODELS`).

Each is the stock class of its family with every decoder layer built from the layer's own widths; no forward is copied.
Importing this file makes them known to transformers. It needs nothing but transformers, because an export may carry a
copy of it for people without koff-lightning (`trust_remote_code=True`).
"""

import copy
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

WIDTHS = ("intermediate_size", "num_attention_heads", "num_key_value_heads")


class _Widths:
    """What the configs add to those of their families: `koff_layers`, the `WIDTHS` of every layer, and `koff_biases`.

    The config's own widths stay those of the model that was cut; they are the default of a layer that names none.
    `koff_biases` names linears, by their path inside a layer, that have a bias here though not in their family.

    Raises:
        ValueError: `koff_layers` does not describe this model (transformers' own exception for a wrong config).
    """

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if getattr(self, "head_dim", None) is None:  # never guessed from a layer's heads
            self.head_dim = self.hidden_size // self.num_attention_heads
        whole = {name: getattr(self, name) for name in WIDTHS}
        if self.koff_layers is None:
            self.koff_layers = [{} for _ in range(self.num_hidden_layers)]
        if len(self.koff_layers) != self.num_hidden_layers:
            raise ValueError(f"koff_layers has {len(self.koff_layers)} entries for {self.num_hidden_layers} layers")
        self.koff_layers = [whole | widths for widths in self.koff_layers]
        for index, widths in enumerate(self.koff_layers):
            if set(widths) != set(WIDTHS) or not all(type(n) is int and n > 0 for n in widths.values()):
                raise ValueError(f"koff_layers[{index}] must give {', '.join(WIDTHS)}, each at least 1; got {widths}")
            if widths["num_attention_heads"] % widths["num_key_value_heads"]:
                raise ValueError(f"koff_layers[{index}]: the query heads must divide over the kv heads; got {widths}")


class _Ragged:
    """What the models add to those of their families: layers of unequal width."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        layers = self.model.layers
        for index, widths in enumerate(config.koff_layers):
            narrow = copy.copy(config)
            for name, width in widths.items():
                setattr(narrow, name, width)
            layers[index] = type(layers[index])(narrow, index)
            for path in config.koff_biases or ():
                linear = layers[index].get_submodule(path)
                linear.bias = torch.nn.Parameter(linear.weight.new_zeros(linear.out_features))
            for module in layers[index].modules():
                if getattr(module, "config", None) is narrow:
                    module.config = config  # shared, so that `set_attn_implementation` reaches every layer
        self.post_init()


class KoffLlamaConfig(_Widths, LlamaConfig):
    """`LlamaConfig` and the widths of every layer."""

    model_type = "koff_llama"
    koff_layers: list[dict[str, int]] | None = None
    koff_biases: list[str] | None = None


class KoffMistralConfig(_Widths, MistralConfig):
    """`MistralConfig` and the widths of every layer."""

    model_type = "koff_mistral"
    koff_layers: list[dict[str, int]] | None = None
    koff_biases: list[str] | None = None


class KoffQwen2Config(_Widths, Qwen2Config):
    """`Qwen2Config` and the widths of every layer."""

    model_type = "koff_qwen2"
    koff_layers: list[dict[str, int]] | None = None
    koff_biases: list[str] | None = None


class KoffQwen3Config(_Widths, Qwen3Config):
    """`Qwen3Config` and the widths of every layer."""

    model_type = "koff_qwen3"
    koff_layers: list[dict[str, int]] | None = None
    koff_biases: list[str] | None = None


class KoffGemma3TextConfig(_Widths, Gemma3TextConfig):
    """`Gemma3TextConfig` and the widths of every layer."""

    model_type = "koff_gemma3_text"
    koff_layers: list[dict[str, int]] | None = None
    koff_biases: list[str] | None = None


class KoffLlamaForCausalLM(_Ragged, LlamaForCausalLM):
    """`LlamaForCausalLM` with layers of unequal width."""

    config: KoffLlamaConfig


class KoffMistralForCausalLM(_Ragged, MistralForCausalLM):
    """`MistralForCausalLM` with layers of unequal width."""

    config: KoffMistralConfig


class KoffQwen2ForCausalLM(_Ragged, Qwen2ForCausalLM):
    """`Qwen2ForCausalLM` with layers of unequal width."""

    config: KoffQwen2Config


class KoffQwen3ForCausalLM(_Ragged, Qwen3ForCausalLM):
    """`Qwen3ForCausalLM` with layers of unequal width."""

    config: KoffQwen3Config


class KoffGemma3ForCausalLM(_Ragged, Gemma3ForCausalLM):
    """`Gemma3ForCausalLM` with layers of unequal width."""

    config: KoffGemma3TextConfig


class _Block(dict):
    """A dictionary whose entries can be read as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


class KoffDeciConfig(LlamaConfig):
    """Reads layout `deci` for engines that load the config by `auto_map`: they want block configs with attributes."""

    model_type = "nemotron-nas"
    block_configs: list[dict[str, Any]] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        blocks = self.block_configs or []
        self.block_configs = [_Block({part: _Block(values) for part, values in block.items()}) for block in blocks]


MODELS = {  # family -> (config class, model class)
    "llama": (KoffLlamaConfig, KoffLlamaForCausalLM),
    "mistral": (KoffMistralConfig, KoffMistralForCausalLM),
    "qwen2": (KoffQwen2Config, KoffQwen2ForCausalLM),
    "qwen3": (KoffQwen3Config, KoffQwen3ForCausalLM),
    "gemma3_text": (KoffGemma3TextConfig, KoffGemma3ForCausalLM),
}
for _config, _model in MODELS.values():  # exist_ok: a copy of this file may have come with an export
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
    AutoModelForCausalLM.register(_config, _model, exist_ok=True)
