"""Sizes of the models that the shipped configs name, so that they can be planned for without the hub.

Numbers that the models' publishers state in their config.json and model cards; facts, no files of theirs. The test adds
up their parameters and compares them with the published totals.
"""

_LLAMA = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256}
_QWEN = {"head_dim": 128}

PUBLISHED: dict[str, dict[str, int | str | bool]] = {
    "meta-llama/Llama-3.2-1B": _LLAMA
    | {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64}
    | {"num_attention_heads": 32, "tie_word_embeddings": True},
    "meta-llama/Llama-3.2-3B": _LLAMA
    | {"model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
    | {"num_attention_heads": 24, "tie_word_embeddings": True},
    "meta-llama/Llama-3.1-8B": _LLAMA
    | {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "tie_word_embeddings": False},
    "Qwen/Qwen2.5-3B": _QWEN
    | {"model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36}
    | {"num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "Qwen/Qwen2.5-7B": _QWEN
    | {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
    "Qwen/Qwen3-8B-Base": _QWEN
    | {"model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "tie_word_embeddings": False},
}
