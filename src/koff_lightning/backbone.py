"""What is inside a frozen LLM: its layers, and what can be removed from them.

Only this file and units.py know the names of modules. To add a family, check that its decoder layer has the names in
`FFN` and `ATTENTION` (units.py), and add its `model_type` to `FAMILIES`. What differs between families: Qwen2's q/k/v
biases are counted and cut with their rows. The q/k norms of Qwen3 and Gemma 3 act inside one head and are shared by all
heads, so nothing of them is cut. Gemma 3's sliding-window layers have another rotary base than its other layers, so
rotary embeddings are looked up layer by layer.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from koff_lightning.support.errors import KoffError
from koff_lightning.units import ATTENTION, CHANNELS, FFN, HALVES, KINDS, LINEAR_OF, check_kinds

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
# Graphs of a compiled layer: dense or gated, with or without memories, rows in blocks or not, training or scoring.
GRAPHS = 16
_GLOBAL = "full_attention"  # name of the layers that see the whole text, in configs with two rotary embeddings


@dataclass(frozen=True)
class PrunableGroup:
    """The units of one kind in one layer: whole units (`KINDS`), or output channels of one linear (`CHANNELS`).

    A whole unit is an FFN neuron (`channel`) or a kv head with its query heads (`kv_group`): the units of
    Sheared-LLaMA, with GQA groups kept whole. It owns some rows of each producer (the linears that compute it) and
    `width` columns of the consumer (the linear that reads it), so that removing it leaves smaller but ordinary linears.

    A channel owns one row of its only producer, with its bias. `whole` says what else is removed with it.
    """

    layer: int
    kind: str
    size: int  # units
    producers: tuple[tuple[str, int], ...]  # (module path, output rows per unit)
    consumer: str  # module path; a gate multiplies its INPUT. Empty (channels): it multiplies the producer's OUTPUT
    width: int  # input columns of the consumer per unit
    params_per_unit: int
    whole: "PrunableGroup | None" = None  # of gate and up channels: the neurons, each dead once its channel is closed

    @property
    def gated(self) -> str:
        """Path of the module at which the gates act."""
        return self.consumer or self.producers[0][0]

    @property
    def in_ffn(self) -> bool:
        """Whether the units are of the FFN; else they are of attention."""
        return self.kind == KINDS[0] or (self.kind in CHANNELS and LINEAR_OF[self.kind][0] is FFN)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks in order."""
    return list(model.model.layers)


def layer_of(path: str) -> int:
    """Index of the layer that a module belongs to, from its path in the model."""
    return next(int(word) for word in path.split(".") if word.isdigit())


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The self-attention module of each layer, in order."""
    return [getattr(layer, ATTENTION[0]) for layer in decoder_layers(model)]


def neuron_linears(model: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    """For each layer's FFN the linear before the activation function, and the linear that reads the neurons."""
    name, (gate, _), down = FFN
    blocks = [getattr(layer, name) for layer in decoder_layers(model)]
    return [(getattr(block, gate), getattr(block, down)) for block in blocks]


def kv_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(kv heads, head dim) of each layer, as its weights have them."""
    heads = [attention.k_proj for attention in attention_modules(model)]
    return [(k.out_features // a.head_dim, a.head_dim) for k, a in zip(heads, attention_modules(model), strict=True)]


def head_size(config: PreTrainedConfig) -> int:
    """Dimensions of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def cache_argument(model: PreTrainedModel) -> str:
    """What the model's forward calls the tokens' key-value cache: `cache` from transformers 5.24 on."""
    return _cache_argument(type(model))


@cache
def _cache_argument(kind: type[PreTrainedModel]) -> str:
    return "cache" if "cache" in signature(kind.forward).parameters else "past_key_values"


def hidden_states(model: PreTrainedModel, **inputs: Tensor | None) -> Tensor:
    """Last hidden states [B, T, d] after the final norm; `lm_head` is left to the loss, which works on token chunks."""
    refuse_masked_packing(inputs.get("attention_mask"), inputs.get("position_ids"))
    return model.model(use_cache=False, **inputs, **_documents(**inputs)).last_hidden_state


def _documents(
    input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> dict[str, Tensor]:
    """Where the documents of packed rows begin: with them the kernels of `koff_attention` on a GPU need no mask.

    int32 [N + 1]: index of the first token of each document among the tokens of all rows joined, and at last the number
    of tokens. Finding them syncs with the device once per forward. Nothing is returned for short documents, since the
    kernel's backward keeps 128 further tokens for each.
    """
    if position_ids is None or attention_mask is not None or not position_ids.is_cuda:
        return {}
    first = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True).expand(input_ids.shape)  # bool [B, T]
    begins = first.flatten().nonzero()[:, 0]
    if 128 * len(begins) > input_ids.numel():
        return {}
    return {"koff_documents": F.pad(begins, (0, 1), value=input_ids.numel()).int()}


def inputs_of(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """The arguments of `hidden_states` that a batch has, each [B, T]."""
    names = ("input_ids", "position_ids", "attention_mask")
    return {name: batch[name].to(device) for name in names if batch.get(name) is not None}


def refuse_masked_packing(mask: Tensor | None, positions: Tensor | None) -> None:
    """Raise KoffError for packed rows (positions [B, T] that restart) with a padding mask [B, T]."""
    if mask is None or positions is None or mask.ndim != 2 or mask.shape[1] != positions.shape[1]:
        return
    inside = mask[:, 1:].bool() & mask[:, :-1].bool()
    if ((positions.diff(dim=1) != 1) & inside).any():  # transformers would let the documents attend to each other
        raise KoffError("packed rows (positions that restart) and a padding mask cannot be combined: give one of them")


def rope_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The config's rotary embedding of the layers that see the whole text.

    Sliding-window layers have the same, except in Gemma 3, where theirs has another base and no scaling.
    """
    return config.rope_parameters.get(_GLOBAL, config.rope_parameters)


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Tokens that a sliding-window layer sees, the current one included; None if all layers see the whole text."""
    kinds = getattr(config, "layer_types", None)
    return getattr(config, "sliding_window", None) if kinds is None or "sliding_attention" in kinds else None


def rotary_inv_freqs(model: PreTrainedModel) -> list[Tensor]:
    """Each layer's inverse frequencies of the rotary embedding, static scaling included.

    Returns:
        For each layer [head_dim / 2], radians per position.
    """
    rotary, config = model.model.rotary_emb, model.config
    if _GLOBAL not in config.rope_parameters:
        return [rotary.inv_freq] * config.num_hidden_layers
    return [getattr(rotary, f"{kind}_inv_freq") for kind in config.layer_types]


def rotary_scaling(model: PreTrainedModel) -> float:
    """Factor on cos and sin of the rotary embedding: 1 except for yarn."""
    return float(model.model.rotary_emb.attention_scaling)


def prunable_groups(model: PreTrainedModel, kinds: tuple[str, ...] | list[str] = KINDS) -> list[PrunableGroup]:
    """List the prunable units layer by layer. Call it before adapters are injected: it reads the plain linears.

    Args:
        model: A backbone from `load_backbone`.
        kinds: Which of `KINDS` and `CHANNELS` to list.

    Raises:
        KoffError: No such kind, or two that own the same weights.
    """
    check_kinds(kinds)
    groups = []
    for index, layer in enumerate(decoder_layers(model)):
        blocks = zip(KINDS, (FFN, ATTENTION), strict=True)
        groups += [_group(index, kind, layer, names) for kind, names in blocks if kind in kinds]
        groups += [_channels(index, kind, layer) for kind in CHANNELS if kind in kinds]
    return groups


def channel_linear(layer: int, kind: str) -> str | None:
    """Path of the linear whose rows stay, as zeros, when channels of this kind are closed; None for all other kinds."""
    if kind in (*KINDS, *HALVES):
        return None
    (block, *_), name = LINEAR_OF[kind]
    return f"model.layers.{layer}.{block}.{name}"


def _channels(index: int, kind: str, layer: nn.Module) -> PrunableGroup:
    block, name = LINEAR_OF[kind]
    linear = layer.get_submodule(f"{block[0]}.{name}")
    whole = _group(index, KINDS[0], layer, block) if kind in HALVES else None
    cost, path = linear.in_features + (linear.bias is not None), f"model.layers.{index}.{block[0]}.{name}"
    return PrunableGroup(index, kind, linear.out_features, ((path, 1),), "", 1, cost, whole)


def _group(index: int, kind: str, layer: nn.Module, names: tuple[str, tuple[str, ...], str]) -> PrunableGroup:
    name, producers, consumer = names
    block, path = layer.get_submodule(name), f"model.layers.{index}.{name}"
    linears = [getattr(block, name) for name in producers]
    size = linears[-1].out_features // (1 if kind == "channel" else block.head_dim)  # up rows | kv heads
    rows = [linear.out_features // size for linear in linears]
    last = getattr(block, consumer)
    width = last.in_features // size
    made = sum(n * (linear.in_features + (linear.bias is not None)) for n, linear in zip(rows, linears, strict=True))
    paths = tuple((f"{path}.{name}", n) for name, n in zip(producers, rows, strict=True))
    return PrunableGroup(index, kind, size, paths, f"{path}.{consumer}", width, made + width * last.out_features)


def uniform_kv_groups(config: PreTrainedConfig) -> list[int]:
    """Numbers of kv groups that a plain config of this family allows if all layers have equally many, most first.

    Configs of Llama and Gemma 3 allow only head counts that divide the hidden size, whatever the head size is.
    """
    groups, queries = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    must_divide = config.model_type in ("llama", "gemma3_text")
    return [n for n in range(groups, 0, -1) if not must_divide or config.hidden_size % (n * queries) == 0]


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device: shapes without weights, for counting."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def parameter_counts(model: PreTrainedModel) -> dict[str, int]:
    """Exact parameters of the plain model: `total` (tied embeddings once) and `body` (all linears of all layers)."""
    body = sum(
        p.numel()
        for layer in decoder_layers(model)
        for m in layer.modules()
        if isinstance(m, nn.Linear)
        for p in m.parameters()
    )
    return {"total": sum(p.numel() for p in model.parameters()), "body": body}


def compile_layers(model: PreTrainedModel, backend: str) -> None:
    """Let torch.compile compile each layer when it first runs.

    Layer by layer, since compiling a whole model takes minutes and does not go with activation checkpointing. Layers
    share code but not their gates and memories, so each needs graphs of its own, and torch's limit of 8 for the shared
    code is raised.

    Raises:
        KoffError: There is no such backend.
    """
    if backend not in torch.compiler.list_backends(exclude_tags=()):
        usual = ", ".join(torch.compiler.list_backends())
        raise KoffError(f"model.compile must be a backend of torch.compile ({usual}); got {backend!r}")
    layers = decoder_layers(model)
    for limit in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), GRAPHS * len(layers)))
    for layer in layers:
        layer.compile(backend=backend)


def end_tokens(given: int | list[int] | None) -> list[int]:
    """The tokens that end a text, as a list, from an `eos_token_id` of transformers."""
    return [] if given is None else [given] if isinstance(given, int) else list(given)


def ask_nothing_(model: PreTrainedModel) -> GenerationConfig:
    """Clear the model's generation defaults, so that `generate` does only what a call asks for; returns them.

    Token ids stay, as generation needs to know which end a text.
    """
    own = model.generation_config
    ids = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    return own


def allow_recomputation(model: PreTrainedModel) -> None:
    """Turn on activation checkpointing: in training mode the backward computes layers again."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:  # its name in transformers 5.17
        model.gradient_checkpointing_enable()


def is_recomputed(model: PreTrainedModel) -> bool:
    """Whether a backward would compute layers again, which transformers does in training mode only."""
    return any(layer.training and layer.gradient_checkpointing for layer in decoder_layers(model))


@contextmanager
def recomputed(model: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """Inside the block a forward keeps only the layers' inputs for the backward, which computes the rest again.

    Call `allow_recomputation` first. For single forwards: transformers does this in training mode only, where it also
    drops the key-value cache.
    """
    layers = decoder_layers(model) if wanted else []
    for layer in layers:
        layer.training = True  # the flag of the layer itself: its parts stay in eval mode
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
