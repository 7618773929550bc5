"""A reader of the block-config format (DeciLM, Nemotron-NAS) from what its engines say of it: none of our code.

Only plain tensors. Widths are worked out from config.json alone and every weight must have exactly those.
"""

import json

import torch
import torch.nn.functional as F
from safetensors.torch import load_file


def ffn_width(ffn, hidden):
    """`ffn_mult` is a share of 3/2 of the hidden size, rounded up to a multiple of 256; else the width is given."""
    if "ffn_mult" not in ffn:
        return ffn["intermediate_size"]
    return -(-int(2 * round(ffn["ffn_mult"], 6) * hidden / 3) // 256) * 256


def deci_logits(folder, tokens):
    """Logits [B, T, V] of the model in a folder for tokens [B, T]."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    assert config["model_type"] == "nemotron-nas" and config["architectures"] == ["DeciLMForCausalLM"]
    assert len(config["block_configs"]) == config["num_hidden_layers"]
    hidden, heads, size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]

    def linear(x, name, out, bias):
        weight, shift = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        assert weight.shape == (out, x.shape[-1]) and (shift is not None) == bias, name
        return F.linear(x, weight, shift)

    def norm(x, name):
        return F.rms_norm(x, (hidden,), weights[f"{name}.weight"], config["rms_norm_eps"])

    x = weights["model.embed_tokens.weight"][tokens]
    for index, block in enumerate(config["block_configs"]):
        attention, ffn = block["attention"], block["ffn"]
        assert not (
            attention["no_op"] or attention["replace_with_linear"] or ffn["no_op"] or ffn["replace_with_linear"]
        )
        at = f"model.layers.{index}"
        bias = config["attention_bias"]
        qkv = config.get("qkv_bias", bias)
        groups = heads // attention["n_heads_in_group"]
        y = norm(x, f"{at}.input_layernorm")
        q = linear(y, f"{at}.self_attn.q_proj", heads * size, qkv).unflatten(-1, (heads, size)).transpose(1, 2)
        k = linear(y, f"{at}.self_attn.k_proj", groups * size, qkv).unflatten(-1, (groups, size)).transpose(1, 2)
        v = linear(y, f"{at}.self_attn.v_proj", groups * size, qkv).unflatten(-1, (groups, size)).transpose(1, 2)
        q, k = rotate(q, config), rotate(k, config)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + linear(y.transpose(1, 2).flatten(2), f"{at}.self_attn.o_proj", hidden, bias)
        y, width = norm(x, f"{at}.post_attention_layernorm"), ffn_width(ffn, hidden)
        gate = F.silu(linear(y, f"{at}.mlp.gate_proj", width, config["mlp_bias"]))
        y = gate * linear(y, f"{at}.mlp.up_proj", width, config["mlp_bias"])
        x = x + linear(y, f"{at}.mlp.down_proj", hidden, config["mlp_bias"])
    head = weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return F.linear(norm(x, "model.norm"), head)


def rotate(x, config):
    """Rotary embedding of [B, heads, T, size] with the base frequency alone."""
    assert config["rope_scaling"] is None
    size = x.shape[-1]
    frequency = config["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    angle = torch.arange(x.shape[-2])[:, None] * frequency  # [T, size / 2]
    cos, sin = angle.cos(), angle.sin()
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
