"""Checks of the arguments of a decomposed model's calls: transformers would silently accept many wrong ones.

Shapes: B rows, T tokens.
"""

from collections.abc import Iterable, Mapping, Set
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.generic import TransformersKwargs

from koff_lightning.backbone import cache_argument, refuse_masked_packing
from koff_lightning.support.errors import KoffError
from koff_lightning.support.wording import nearest

# Kinds of token cache that `generate` was checked with. A paged one bypasses the attention function that reads the
# memories, a quantised one needs further packages, an offloaded one a GPU.
CACHES = (None, "dynamic", "static")


def check_ids(input_ids: Any, backbone: PreTrainedModel) -> None:
    """Refuse what is not a tensor [B, T] of this model's token ids."""
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        what = input_ids.dtype if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise KoffError(
            f"input_ids must be a tensor of whole numbers, [rows, tokens]; got {what}. model.encode(prompts) makes "
            "them of texts: model(**model.encode(prompts))"
        )
    if input_ids.ndim != 2 or not input_ids.numel():
        raise KoffError(f"input_ids must be [rows, tokens], at least one of each; got {list(input_ids.shape)}")
    known, (least, most) = backbone.get_input_embeddings().num_embeddings, torch.aminmax(input_ids)
    if least < 0 or most >= known:
        raise KoffError(
            f"input_ids must lie between 0 and {known - 1}, got {int(least if least < 0 else most)}: the model has "
            f"{known} tokens"
        )


def check_domains(domains: Any, by_row: bool = False) -> None:
    """Refuse what is no name of a domain and no list of names; with `by_row` also sets, which have no order."""
    named = isinstance(domains, Iterable) and not (by_row and isinstance(domains, Set | Mapping))
    if domains is not None and not isinstance(domains, str) and not named:
        raise KoffError(f"domains must be a name, or a list of names (None for no memory); got {domains!r}")


def check_attention(backbone: PreTrainedModel, slots: bool) -> None:
    """Refuse an attention function other than ours if rows read slots, which it would ignore."""
    given = backbone.config._attn_implementation
    if slots and given != "koff":
        raise KoffError(
            f"the backbone's attention is {given!r}, which reads no KV memories: set it back with "
            "model.backbone.set_attn_implementation('koff')"
        )


def check_mask(mask: Any) -> None:
    """Refuse what cannot be an attention mask."""
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim not in (2, 4)):
        what = f"of shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise KoffError(f"attention_mask must be a tensor [rows, tokens], 0 for padding; got one {what}")


def check_arguments(inputs: Mapping[str, Any], backbone: PreTrainedModel) -> None:
    """Refuse arguments of `forward` that the backbone does not have and would ignore, and outputs it cannot give.

    Args:
        inputs: Arguments by name, without ids, mask and domains.
        backbone: The model.
    """
    known = _arguments(type(backbone))
    if unknown := [name for name in inputs if name not in known]:
        raise KoffError(f"a call has no argument {unknown[0]!r}.{nearest(unknown[0], ['domains', *known])}")
    check_attentions(inputs)


def check_attentions(options: Mapping[str, Any]) -> None:
    """Refuse to return attention weights: they are never formed."""
    if options.get("output_attentions"):
        raise KoffError("output_attentions: the weights of attention are never formed here: leave it out")


@cache
def _arguments(kind: type[PreTrainedModel]) -> frozenset[str]:
    return frozenset([*signature(kind.forward).parameters, *TransformersKwargs.__annotations__, "return_dict"])


def check_generation(options: Mapping[str, Any]) -> None:
    """Refuse options of transformers' `generate` at which it would fail, or which it would misread."""
    check_attentions(options)
    for name in ("num_beams", "num_return_sequences"):
        given = options.get(name, 1)
        if given is not None and (not isinstance(given, int) or isinstance(given, bool) or given < 1):
            raise KoffError(f"generate: {name} must be a whole number from 1 on; got {given!r}")
    draft = options.get("assistant_model")
    if draft is not None and not isinstance(draft, PreTrainedModel):
        raise KoffError(
            f"generate: assistant_model must be a model of transformers; got {type(draft).__name__} (of a decomposed "
            "model give its .backbone)"
        )
    config, processors = options.get("generation_config"), options.get("logits_processor")
    if config is not None and not isinstance(config, GenerationConfig):
        raise KoffError(f"generate: generation_config must be a GenerationConfig; got {type(config).__name__}")
    check_attentions({"output_attentions": getattr(config, "output_attentions", None)})
    if processors is not None and not isinstance(processors, list | tuple):
        raise KoffError(f"generate: logits_processor must be a list of processors; got {type(processors).__name__}")


def given_cache(inputs: dict[str, Any], backbone: PreTrainedModel) -> Any:
    """The token cache among the arguments, or None. It is renamed in place to what the backbone calls it."""
    given = [inputs.pop(name) for name in ("cache", "past_key_values") if name in inputs]
    if not given:
        return None
    if given[0] is not None and not hasattr(given[0], "get_seq_length"):
        raise KoffError(f"past_key_values must be a cache as transformers makes them; got {type(given[0]).__name__}")
    inputs[cache_argument(backbone)] = given[0]
    return given[0]


def refuse_overflow(input_ids: Tensor, scores: Tensor) -> Tensor:
    """Return scores [B, V] if they are numbers; of nan or inf the likeliest token would be the first of all."""
    if not (scores < torch.inf).all():
        raise KoffError(
            "the model computes numbers that are not finite, so nothing can be generated: get its files again, or take "
            "a dtype of a wider range"
        )
    return scores


def check_prompt_mask(mask: Tensor, input_ids: Tensor) -> None:
    """For `generate`: the mask covers every token (more with a token cache), and padding is on the left only."""
    if mask.ndim != 2 or len(mask) != len(input_ids) or mask.shape[1] < input_ids.shape[1]:
        raise KoffError(
            f"generate: attention_mask is {list(mask.shape)} for input_ids {list(input_ids.shape)}: give 0 or 1 for "
            "every token"
        )
    if not bool(mask[:, -1].all()):
        raise KoffError("generate: a row ends in padding: pad prompts on the left, as model.encode does")


def positions(mask: Tensor | None, input_ids: Tensor, token_cache: Any) -> Tensor | None:
    """Positions [B, T] counted over a row's tokens without its padding."""
    if mask is None or mask.ndim != 2:
        return None
    past = 0 if token_cache is None else int(token_cache.get_seq_length())
    if mask.shape != (len(input_ids), past + input_ids.shape[1]):
        raise KoffError(
            f"attention_mask is {list(mask.shape)} for input_ids {list(input_ids.shape)} after {past} cached tokens: "
            f"it must be {[len(input_ids), past + input_ids.shape[1]]}, cached tokens included"
        )
    return (mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]


def check_packing(mask: Tensor | None, position_ids: Any, use_cache: bool) -> None:
    """Refuse packed rows with a mask or a cache, with which transformers would silently mix documents."""
    if not isinstance(position_ids, Tensor) or position_ids.ndim != 2:
        got = list(position_ids.shape) if isinstance(position_ids, Tensor) else type(position_ids).__name__
        raise KoffError(f"position_ids must be a tensor [rows, tokens]; got {got}")
    refuse_masked_packing(mask, position_ids)
    if use_cache and (position_ids.diff(dim=-1) != 1).any() and mask is None:
        raise KoffError("packed rows (positions that restart) cannot be run with a token cache: leave use_cache out")
