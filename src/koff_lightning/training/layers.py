"""How the backbone's layers run: compiled, or recomputed in the backward. What they compute stays the same."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from koff_lightning.backbone import decoder_layers
from koff_lightning.support.errors import KoffError

KINDS = 16  # graphs of a layer: dense or gated, with memories or without, rows in blocks or not, training or scoring


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
        setattr(torch._dynamo.config, limit, max(getattr(torch._dynamo.config, limit), KINDS * len(layers)))
    for layer in layers:
        layer.compile(backend=backend)


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
