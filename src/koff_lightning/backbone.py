"""What is inside a frozen LLM: its layers, and what can be removed from them. The only file that knows their names.

To add a family, check that its decoder layer has the names in `_FFN` and `_ATTENTION` below and add its `model_type`
to `FAMILIES`. Qwen2's q/k/v biases are counted and cut with their rows; Qwen3's q/k norms act inside one head and are
shared by all heads, so there is nothing of them to cut.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from koff_lightning.support.errors import KoffError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
KINDS = ("channel", "kv_group")
GRAPHS = 16  # of a compiled layer: dense or gated, with memories or without, rows in blocks or not, training or scoring
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_FFN = ("mlp", ("gate_proj", "up_proj"), "down_proj")
_ATTENTION = ("self_attn", ("q_proj", "k_proj", "v_proj"), "o_proj")


@dataclass(frozen=True)
class PrunableGroup:
    """The units of one kind in one layer: FFN neurons (`channel`) or whole kv heads with their queries (`kv_group`).

    A unit owns `rows` rows of every producer and `width` columns of the consumer, so removing it leaves smaller but
    otherwise ordinary linears (method: structured pruning in the units of Sheared-LLaMA, with GQA groups kept whole).
    """

    layer: int
    kind: str
    size: int  # units
    producers: tuple[tuple[str, int], ...]  # (module path, output rows per unit)
    consumer: str  # module path; its INPUT is what a gate multiplies
    width: int  # input columns of the consumer per unit
    params_per_unit: int


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The transformer blocks in order."""
    return list(model.model.layers)


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The self-attention module of each layer, in order."""
    return [getattr(layer, _ATTENTION[0]) for layer in decoder_layers(model)]


def neuron_linears(model: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    """Of each layer's FFN the linear whose output the activation function takes, and the one that reads the neurons."""
    name, (gate, _), down = _FFN
    blocks = [getattr(layer, name) for layer in decoder_layers(model)]
    return [(getattr(block, gate), getattr(block, down)) for block in blocks]


def kv_shapes(model: PreTrainedModel) -> list[tuple[int, int]]:
    """(kv heads, head dim) of each layer, as its weights have them."""
    heads = [attention.k_proj for attention in attention_modules(model)]
    return [(k.out_features // a.head_dim, a.head_dim) for k, a in zip(heads, attention_modules(model), strict=True)]


def head_size(config: PreTrainedConfig) -> int:
    """Dimensions of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def hidden_states(model: PreTrainedModel, **inputs: Tensor | None) -> Tensor:
    """Last hidden states [B, T, d] after the final norm; `lm_head` is left to the loss, which works on token chunks."""
    refuse_masked_packing(inputs.get("attention_mask"), inputs.get("position_ids"))
    return model.model(use_cache=False, **inputs).last_hidden_state


def refuse_masked_packing(mask: Tensor | None, positions: Tensor | None) -> None:
    """Raise KoffError for packed rows (positions [B, T] that restart) with a padding mask [B, T]."""
    if mask is None or positions is None or mask.ndim != 2 or mask.shape[1] != positions.shape[1]:
        return
    inside = mask[:, 1:].bool() & mask[:, :-1].bool()
    if ((positions.diff(dim=1) != 1) & inside).any():  # transformers would let the documents see each other
        raise KoffError("packed rows (positions that restart) and a padding mask cannot be combined: give one of them")


def rotary_inv_freq(model: PreTrainedModel) -> Tensor:
    """Inverse frequencies of the rotary embedding, static scaling included, [head_dim / 2], radians per position."""
    return model.model.rotary_emb.inv_freq


def prunable_groups(model: PreTrainedModel, kinds: tuple[str, ...] | list[str] = KINDS) -> list[PrunableGroup]:
    """List the prunable units layer by layer. Call before adapters are injected: it reads the plain linears.

    Args:
        model: A backbone from `load_backbone`.
        kinds: Which of `channel` (FFN neurons) and `kv_group` to list.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds:
        raise KoffError(f"prunable units must be some of {', '.join(KINDS)}; got {', '.join(unknown) or 'none'}")
    groups = []
    for index, layer in enumerate(decoder_layers(model)):
        for kind, (block, producers, consumer) in zip(KINDS, (_FFN, _ATTENTION), strict=True):
            if kind in kinds:
                groups.append(
                    _group(
                        index, kind, layer.get_submodule(block), f"model.layers.{index}.{block}", producers, consumer
                    )
                )
    return groups


def _group(
    index: int, kind: str, block: nn.Module, path: str, producers: tuple[str, ...], consumer: str
) -> PrunableGroup:
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

    A Llama config takes only head counts that divide the hidden size, whatever its head size; the others take any.
    """
    groups, queries = config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads
    bound = config.model_type == "llama"
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


def is_recomputed(model: PreTrainedModel) -> bool:
    """Whether a backward would compute layers again: transformers does so in training mode only."""
    return any(layer.training and layer.gradient_checkpointing for layer in decoder_layers(model))


@contextmanager
def recomputed(model: PreTrainedModel, wanted: bool = True) -> Iterator[None]:
    """Inside the block layers keep their inputs alone for the backward, which computes the rest again.

    The model must have its `activation_checkpointing_enable` called before. transformers recomputes a layer in training
    mode only, and drops its cache there: hence for one pass.
    """
    layers = decoder_layers(model) if wanted else []
    for layer in layers:
        layer.training = True  # the flag of the layer itself: its parts stay in eval mode
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
