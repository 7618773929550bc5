"""Prefill and decode of backbones cut at 12 and 25 %, beside the dense one, in real widths with random weights."""

from functools import partial

import torch
from findings import SHORT, Findings, fresh_memory, most_memory, timed
from random_models import TINY, backbone_of, config_of, cut_shape
from transformers import DynamicCache, PreTrainedModel

from koff_lightning import SparsitySpec
from koff_lightning.backbone import cache_argument
from koff_lightning.commands.published_sizes import PUBLISHED

MODELS = {"Llama-3.2-1B": "meta-llama/Llama-3.2-1B", "Llama-3.2-3B": "meta-llama/Llama-3.2-3B"}
SHARES = (0.0, 0.12, 0.25)
WIDTHS = (1, 64)  # FFN neurons that stay in a layer are a multiple of this many
STEPS = 16


def decode(say: Findings, device: str, tiny: bool) -> None:
    """Each model, share, and number of rows: seconds of a prefill and of a decode step."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for name, published in {"tiny": "tiny"}.items() if tiny else MODELS.items():
        config = config_of(TINY if tiny else PUBLISHED[published])
        dense: dict[tuple[str, int], float] = {}
        for share in SHARES:
            for multiple in WIDTHS if share and not tiny else (1,):
                about = {"model": name, "removed": share, "multiple_of": multiple, "dtype": SHORT[str(dtype)[6:]]}
                with say.trying(what="decode", **about):
                    spec = SparsitySpec(target=share, multiple_of=multiple, min_channels=8)
                    fresh_memory(device)
                    model = backbone_of(cut_shape(config, spec) if share else config, dtype, device)
                    for rows in (1, 8):
                        _measure(say, model, rows, 32 if tiny else 2048, device, about, dense, 1 if tiny else 10)
                model = None  # its memory is wanted for the next


@torch.inference_mode()
def _measure(
    say: Findings,
    model: PreTrainedModel,
    rows: int,
    length: int,
    device: str,
    about: dict[str, object],
    dense: dict[tuple[str, int], float],
    rounds: int,
) -> None:
    """A row for the prefill and one for a decode step, with the gain over the dense model, whose times are noted."""
    ids = torch.randint(3, model.config.vocab_size, (rows, length), device=device)  # [B, T]
    cache = DynamicCache()
    kept = {cache_argument(model): cache, "use_cache": True}
    runs = {"prefill": partial(model, input_ids=ids, use_cache=True, logits_to_keep=1)}
    model(input_ids=ids, logits_to_keep=1, **kept)

    def decode_steps() -> None:
        for _ in range(STEPS):
            model(input_ids=ids[:, -1:], **kept)
        cache.crop(-STEPS)

    runs["decode"] = decode_steps
    for what, run in runs.items():
        seconds = timed(run, device, rounds) / (STEPS if what == "decode" else 1)
        before = dense.setdefault((what, rows), seconds)
        tokens = rows * (length if what == "prefill" else 1)
        parameters = sum(p.numel() for p in model.parameters())
        say(what=what, **about, rows=rows, length=length, parameters=parameters, seconds=seconds,
            tokens_per_second=tokens / seconds, times_dense=before / seconds, gib=most_memory(device))  # fmt: skip
