"""What is inside a frozen LLM: its layers, and what can be removed from them. Only this file and units.py know names.

To add a family, check that its decoder layer has the names in `FFN` and `ATTENTION` (units.py) and add its `model_type`
to `FAMILIES`. Qwen2's q/k/v biases are counted and cut with their rows; the q/k norms of Qwen3 and Gemma 3 act inside
one head and are shared by all heads, so there is nothing of them to cut. Gemma 3 rotates the layers that slide a window
over the text with another base than the others, so rotary embeddings are asked for layer by layer.
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
GRAPHS = 16  # of a compiled layer: dense or gated, with memories or without, rows in blocks or not, training or scoring
_GLOBAL = "full_attention"  # the layers that see the whole text, as configs with two rotary embeddings name them


@dataclass(frozen=True)
class PrunableGroup:
    """The units of one kind in one layer: whole ones (`KINDS`), or output channels of one linear (`CHANNELS`).

    A whole unit, an FFN neuron (`channel`) or a kv head with its queries (`kv_group`), owns `rows` rows of every
    producer and `width` columns of the consumer, so removing it leaves smaller but otherwise ordinary linears (method:
    structured pruning in the units of Sheared-LLaMA, with GQA groups kept whole). A channel owns a row of its one
    producer and its bias; what else goes with it is said by `whole`.
    """

    layer: int
    kind: str
    size: int  # units
    producers: tuple[tuple[str, int], ...]  # (module path, output rows per unit)
    consumer: str  # module path; its INPUT is what a gate multiplies. Empty: the gate multiplies the producer's OUTPUT
    width: int  # input columns of the consumer per unit
    params_per_unit: int
    whole: "PrunableGroup | None" = None  # units of which each is dead, and goes, once its channel here is closed

    @property
    def gated(self) -> str:
        """Path of the module at which the gates act."""
        return self.consumer or self.producers[0][0]

    @property
    def in_ffn(self) -> bool:
        """Whether the units are of the FFN; else they are of attention."""
        return f".{FFN[0]}." in f".{self.gated}." or self.kind == KINDS[0]


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks in order."""
    return list(model.model.layers)


def layer_of(path: str) -> int:
    """Number of the layer that a module belongs to, from its path in the model."""
    return next(int(word) for word in path.split(".") if word.isdigit())


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The self-attention module of each layer, in order."""
    return [getattr(layer, ATTENTION[0]) for layer in decoder_layers(model)]


def neuron_linears(model: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    """Of each layer's FFN the linear whose output the activation function takes, and the one that reads the neurons."""
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
    """Where the documents of packed rows begin, for `koff_attention` on a GPU, whose kernels need no mask then.

    int32 [N + 1], in the tokens of all rows joined, the end of the last at last. Finding them waits for the device,
    once a pass. Nothing where they are short: the backward of the kernel keeps 128 tokens more for each.
    """
    if position_ids is None or attention_mask is not None or not position_ids.is_cuda:
        return {}
    first = F.pad(position_ids.diff(dim=1) != 1, (1, 0), value=True).expand(input_ids.shape)  # bool [B, T]
    begins = first.flatten().nonzero()[:, 0]
    if 128 * len(begins) > input_ids.numel():
        return {}
    return {"koff_documents": F.pad(begins, (0, 1), value=input_ids.numel()).int()}


def inputs_of(batch: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    """What `hidden_states` takes of a batch, as far as it has it, each [B, T]."""
    names = ("input_ids", "position_ids", "attention_mask")
    return {name: batch[name].to(device) for name in names if batch.get(name) is not None}


def refuse_masked_packing(mask: Tensor | None, positions: Tensor | None) -> None:
    """Raise KoffError for packed rows (positions [B, T] that restart) with a padding mask [B, T]."""
    if mask is None or positions is None or mask.ndim != 2 or mask.shape[1] != positions.shape[1]:
        return
    inside = mask[:, 1:].bool() & mask[:, :-1].bool()
    if ((positions.diff(dim=1) != 1) & inside).any():  # transformers would let the documents see each other
        raise KoffError("packed rows (positions that restart) and a padding mask cannot be combined: give one of them")


def rope_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The rotary embedding of the layers that see the whole text, as the config describes it.

    Layers with a sliding window have the same, but those of Gemma 3: theirs has a base of its own and no scaling.
    """
    return config.rope_parameters.get(_GLOBAL, config.rope_parameters)


def sliding_window(config: PreTrainedConfig) -> int | None:
    """Tokens that a layer sees at most, itself included; None if all layers see the whole text."""
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
    """What cos and sin of the rotary embedding are multiplied by: 1 but for yarn."""
    return float(model.model.rotary_emb.attention_scaling)


def prunable_groups(model: PreTrainedModel, kinds: tuple[str, ...] | list[str] = KINDS) -> list[PrunableGroup]:
    """List the prunable units layer by layer. Call before adapters are injected: it reads the plain linears.

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
    """Path of the linear whose output channels a kind is; None for kinds that leave nothing of a unit behind."""
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
    """How many kv groups a plain config of this family can have in all layers when some are removed, most first.

    A config of Llama or Gemma 3 takes only head counts that divide the hidden size, whatever its head size; the others
    take any.
    """
    groups, queries = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    bound = config.model_type in ("llama", "gemma3_text")
    return [n for n in range(groups, 0, -1) if not bound or config.hidden_size % (n * queries) == 0]


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config with shapes and no numbers (on the meta device), to count by."""
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
    """Let torch.compile translate each layer when it first runs.

    Layer by layer, since one graph of a whole model takes minutes and cannot be recomputed in the backward. Gates and
    memories are their layer's own, so each has graphs of its own, of which torch by itself keeps 8 for all layers.

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
    """The tokens that end a text, of an `eos_token_id` of transformers."""
    return [] if given is None else [given] if isinstance(given, int) else list(given)


def ask_nothing_(model: PreTrainedModel) -> GenerationConfig:
    """Let `generate` do only what a call asks for. Returns what the model's generation_config.json says.

    Of that the token ids stay: without those that end a text, generation would go on behind the end.
    """
    own = model.generation_config
    ids = {name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    return own


def allow_recomputation(model: PreTrainedModel) -> None:
    """Let the model's layers be computed again in the backward, in training mode: activation checkpointing."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:  # its name in transformers 5.17
        model.gradient_checkpointing_enable()


def is_recomputed(model: PreTrainedModel) -> bool:
    """Whether a backward would compute layers again: transformers does so in training mode only."""
    return any(layer.training and layer.gradient_checkpointing for layer in decoder_layers(model))


@contextmanager
def recomputed(model: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """Inside the block layers keep their inputs alone for the backward, which computes the rest again.

    `allow_recomputation` comes first. transformers recomputes a layer in training mode only, and drops its cache there:
    hence for one pass.
    """
    layers = decoder_layers(model) if wanted else []
    for layer in layers:
        layer.training = True  # the flag of the layer itself: its parts stay in eval mode
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
