"""vLLM's own Llama, Mistral, Qwen2 and Qwen3, every decoder layer built from its own widths (`koff_layers`).

No forward is copied: a layer gets a copy of the config that has its widths. Where vLLM builds a part from a name of its
module instead of an argument, the name stands for another class while the model is built.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.models import llama, mistral, qwen2, qwen3
from vllm.model_executor.models.utils import extract_layer_index


def narrow(config: PreTrainedConfig, prefix: str) -> PreTrainedConfig:
    """The config with the widths of the layer that `prefix` names."""
    if config.koff_biases:
        raise ValueError(
            f"vLLM's layers have no place for the biases of {', '.join(config.koff_biases)}, by which this mask makes "
            "up for what it removes: serve it with --engine own"
        )
    own = copy.copy(config)
    for name, width in config.koff_layers[extract_layer_index(prefix)].items():
        setattr(own, name, width)
    return own


@contextmanager
def named(module: ModuleType, name: str, other: object) -> Iterator[None]:
    """Let a name of a module stand for something else."""
    stock = getattr(module, name)
    setattr(module, name, other)
    try:
        yield
    finally:
        setattr(module, name, stock)


def _by_vllm_config(base: type) -> type:
    """A layer class of Llama or Mistral, which takes the whole of vLLM's config."""

    class Layer(base):
        def __init__(
            self, vllm_config: VllmConfig, prefix: str = "", config: PreTrainedConfig | None = None, **rest: Any
        ) -> None:
            own = narrow(config or vllm_config.model_config.hf_config, prefix)
            super().__init__(vllm_config=vllm_config, prefix=prefix, config=own, **rest)

    return Layer


class KoffLlamaForCausalLM(llama.LlamaForCausalLM):
    """`LlamaForCausalLM` with layers of unequal width."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        layer = _by_vllm_config(llama.LlamaDecoderLayer)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer)


class KoffMistralForCausalLM(mistral.MistralForCausalLM):
    """`MistralForCausalLM` with layers of unequal width."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        layer = _by_vllm_config(mistral.MistralDecoderLayer)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer)


class Qwen2Layer(qwen2.Qwen2DecoderLayer):
    """With Llama's attention and Qwen2's biases: Qwen2's own takes hidden size / heads for the size of a head."""

    def __init__(
        self,
        config: PreTrainedConfig,
        cache_config: Any = None,
        quant_config: Any = None,
        prefix: str = "",
        **rest: Any,
    ) -> None:
        own = narrow(config, prefix)

        def attention(*, max_position: int, **given: Any) -> llama.LlamaAttention:
            for name in ("rope_parameters", "dual_chunk_attention_config", "qk_norm", "rms_norm_eps"):
                given.pop(name, None)
            return llama.LlamaAttention(
                own, **given, max_position_embeddings=max_position, bias=True, bias_o_proj=False
            )

        with named(qwen2, "Qwen2Attention", attention):
            super().__init__(own, cache_config, quant_config, prefix, **rest)


class KoffQwen2ForCausalLM(qwen2.Qwen2ForCausalLM):
    """`Qwen2ForCausalLM` with layers of unequal width."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with named(qwen2, "Qwen2Model", partial(qwen2.Qwen2Model, decoder_layer_type=Qwen2Layer)):
            super().__init__(vllm_config=vllm_config, prefix=prefix)


class Qwen3Layer(qwen3.Qwen3DecoderLayer):
    """`Qwen3DecoderLayer` of its own widths."""

    def __init__(
        self,
        config: PreTrainedConfig,
        cache_config: Any = None,
        quant_config: Any = None,
        prefix: str = "",
        **rest: Any,
    ) -> None:
        super().__init__(narrow(config, prefix), cache_config, quant_config, prefix, **rest)


class Qwen3Model(qwen3.Qwen3Model):
    """`Qwen3Model` of layers of unequal width."""

    decoder_layer_type = Qwen3Layer


class KoffQwen3ForCausalLM(qwen3.Qwen3ForCausalLM):
    """`Qwen3ForCausalLM` with layers of unequal width."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        with named(qwen3, "Qwen3Model", Qwen3Model):
            super().__init__(vllm_config=vllm_config, prefix=prefix)
