"""Random models of a few thousand parameters, one per family, to test against."""

from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import koff_lightning.attention  # noqa: F401  registers the attention function "koff"

FAMILIES = ("llama", "llama3_rope", "qwen2", "qwen3", "mistral", "gemma3_text")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}

_CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "llama3_rope": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM),
}


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random float32 model in eval mode with the attention function "koff".

    Args:
        family: one of FAMILIES.
        seed: of the weights; the global random state is left as it was.
        overrides: arguments of the config.
    """
    config_class, model_class = _CLASSES[family]
    sizes: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,  # larger than usual: attention far from uniform, so that mistakes show
        "attn_implementation": "koff",
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "gemma3_text":  # a window that the texts of most tests are longer than, and a scale that is not 1/sqrt
        sizes |= {"sliding_window": 8, "query_pre_attn_scalar": 24}
        kinds = ("sliding_attention", "full_attention")
        sizes["layer_types"] = [kinds[i % 2] for i in range(overrides.get("num_hidden_layers", 2))]
    if family == "llama3_rope":
        sizes["rope_parameters"] = LLAMA3_ROPE
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**sizes | overrides))
        for name, parameter in model.named_parameters():
            # made as zeros, which would hide a lost bias; of Gemma's norms, weights of 1 + w
            if name.endswith("bias") or (family == "gemma3_text" and name.endswith("norm.weight")):
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()
