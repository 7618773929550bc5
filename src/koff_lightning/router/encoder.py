"""Texts told apart by a fine-tuned encoder, as the paper does it: all weights of, say, RoBERTa-base are trained.

What is loaded is a folder of transformers' own kind, safetensors and JSON; no code of others runs.

Letters: N texts, D domains, T tokens.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from koff_lightning.data.encoding import encode
from koff_lightning.loading import no_report
from koff_lightning.model_files import check_config, check_folder, check_tokenizer, not_finite
from koff_lightning.support.errors import KoffError
from koff_lightning.support.json_files import read_json_object

RATE, BATCH = 3e-4, 64  # of the paper
TOKENS = 512  # of a text, at most: what RoBERTa and its kin can hold


class EncoderClassifier:
    """An encoder with a classification head, and its tokenizer.

    Args:
        model: transformers' model for sequence classification, with D labels.
        tokenizer: The encoder's own tokenizer, not the backbone's.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @torch.no_grad()
    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Of each domain, [N, D]; text by text, so that none depends on how others were padded."""
        rows = [self.model(**_batch(self, [text])).logits[0].double().softmax(-1) for text in texts]  # [D] each
        return torch.stack(rows).cpu().numpy()

    def save(self, folder: Path) -> None:
        """Write model and tokenizer as transformers does."""
        self.model.save_pretrained(folder, max_shard_size="100GB")  # one file, whose hash is one line
        self.tokenizer.save_pretrained(folder)


def load_encoder(source: str | Path, labels: int, new: bool = False) -> EncoderClassifier:
    """Load an encoder for D = `labels` domains.

    Args:
        source: Folder, or id on a hub.
        labels: How many domains it tells apart.
        new: Give it a new head, to be trained; else its files must hold one.

    Raises:
        KoffError: Nothing there, no encoder, no weights in safetensors, or files that do not go together.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        check_folder(folder, str(source))
        check_config(read_json_object(folder / "config.json"), str(source))
        check_tokenizer(folder)
    elif new and str(source).startswith(("/", ".", "~")):
        raise KoffError(f"the encoder {str(source)!r}: no such folder, and no name on the hub begins like that")
    place = {"pretrained_model_name_or_path": str(folder if folder.is_dir() else source), "trust_remote_code": False}
    options = {"num_labels": labels, "use_safetensors": True, "output_loading_info": True, "dtype": torch.float32}
    try:
        with no_report():
            model, info = AutoModelForSequenceClassification.from_pretrained(
                **place, **options, ignore_mismatched_sizes=new
            )
        tokenizer = AutoTokenizer.from_pretrained(**place)
    except Exception as error:  # transformers has no class of its own for what may be wrong with a folder
        reason = " ".join(str(error).split())[:200]
        raise KoffError(
            f"the encoder {str(source)!r} cannot be loaded ({reason}): name another, or get it again"
        ) from error
    if not new and (odd := sorted(map(str, (*info["missing_keys"], *info["mismatched_keys"])))):
        raise KoffError(f"the encoder {str(source)!r} lacks {odd[0]}: fit the router anew")
    if odd := not_finite(model.state_dict()):
        raise KoffError(f"the encoder {str(source)!r} holds numbers that are not finite, in {odd}: get it again")
    if tokenizer.pad_token is None:
        raise KoffError(f"the tokenizer of {str(source)!r} has no padding token, so it is no encoder's: name another")
    return EncoderClassifier(model, tokenizer)


def fine_tune(
    encoder: EncoderClassifier,
    texts: Sequence[str],
    labels: Sequence[int],
    *,
    epochs: int = 1,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> EncoderClassifier:
    """Train all weights with AdamW at the paper's rate and batch; a linear warm-up over a tenth, then linear decay.

    Every domain counts alike, however much text it has.

    Raises:
        KoffError: The loss is not a finite number.
    """
    model, generator = encoder.model.train().requires_grad_(True), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    steps = epochs * math.ceil(len(texts) / BATCH)
    warm = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / max(1, steps - warm))
    )
    counts = torch.bincount(torch.tensor(labels), minlength=model.config.num_labels).clamp(min=1)
    weight = (len(labels) / (len(counts) * counts)).to(model.device, model.dtype)  # [D]
    step = 0
    for _ in range(epochs):
        for rows in torch.randperm(len(texts), generator=generator).split(BATCH):
            logits = model(**_batch(encoder, [texts[row] for row in rows])).logits  # [B, D]
            wanted = torch.tensor([labels[row] for row in rows], device=logits.device)
            loss = torch.nn.functional.cross_entropy(logits, wanted, weight)
            if not loss.isfinite():
                raise KoffError(f"the router's loss is {loss.item()} at step {step + 1}: name another encoder")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            step += 1
            if step % max(1, steps // 10) == 0:
                say(f"router: step {step} of {steps}, loss {loss.item():.4f}")
    model.eval().requires_grad_(False)
    return encoder


def _batch(encoder: EncoderClassifier, texts: list[str]) -> dict[str, Any]:
    """Ids and mask [N, T] on the model's device, cut to what the encoder can hold."""
    positions = getattr(encoder.model.config, "max_position_embeddings", None) or TOKENS
    positions -= 2 * ("roberta" in encoder.model.config.model_type)  # which counts from behind its padding index
    batch = encode(
        encoder.tokenizer,
        texts,
        padding=True,
        truncation=True,
        max_length=min(TOKENS, positions),
        return_tensors="pt",
        verbose=False,
    )
    known = ("input_ids", "attention_mask", "token_type_ids")
    return {name: value.to(encoder.model.device) for name, value in batch.items() if name in known}
