"""How well a router picks: what it answers to held-out text, and what its answers cost in bits per byte.

Letters: B rows, T tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from koff_lightning.artifact.decomposed import DecomposedModel
from koff_lightning.data.encoding import encode
from koff_lightning.data.packing import IGNORED
from koff_lightning.metrics import BitsPerByte
from koff_lightning.router.routing import Router

if TYPE_CHECKING:
    from koff_lightning.data import DomainDataModule

FIRST = (16, 64, 256)  # tokens of a text that the router sees
NONE = "(none)"  # no domain can be called so
Confusion = dict[str, dict[str, int]]  # whose text -> what the router picks -> texts


def confusion(
    router: Router, texts: Mapping[str, Sequence[str]], tokenizer: PreTrainedTokenizerBase, tokens: int
) -> Confusion:
    """What a router answers to the beginnings of texts.

    Args:
        router: Asked.
        texts: Texts of each domain; also of domains that it does not know.
        tokenizer: Tokenizer of the backbone.
        tokens: What is seen of each text; of a shorter one, all.
    """
    table: Confusion = {}
    for name, part in texts.items():
        answers = router.route([beginning(text, tokenizer, tokens) for text in part])
        row = {answer: 0 for answer in (*router.domains, NONE)}
        for answer in answers:
            row[answer or NONE] += 1
        table[name] = row
    return table


def beginning(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """The first tokens of a text, as text."""
    ids = encode(tokenizer, text[: 32 * tokens], add_special_tokens=False, verbose=False)["input_ids"]
    return tokenizer.decode(ids[:tokens], skip_special_tokens=True)


def accuracy(table: Confusion, known: Sequence[str]) -> dict[str, float]:
    """Share of each domain's texts that go where they should: to their own, or to none where it is not known."""
    due = {name: name if name in known else NONE for name in table}
    return {name: row[due[name]] / max(sum(row.values()), 1) for name, row in table.items()}


@torch.no_grad()
def routed_bits(model: DecomposedModel, data: "DomainDataModule") -> dict[str, dict[str, float]]:
    """Bits per byte of held-out rows, by domain: `told` their domain, `none`, and routed from the first tokens.

    Args:
        model: With its router.
        data: Set up, with held-out text of the model's domains.

    Returns:
        {domain: {"told": ..., "none": ..., "16": ..., "64": ..., "256": ...}}.
    """
    meters: dict[tuple[str, str], BitsPerByte] = {}
    for batch in data.val_dataloader():
        told = list(batch["domains"])
        ways: dict[str, list[str | None]] = {"told": told, "none": [None] * len(told)}
        for tokens in FIRST:
            heads = model.tokenizer.batch_decode(first_ids(batch, tokens), skip_special_tokens=True)
            ways[str(tokens)] = model.route(heads)
        for way, nats in _nats(model, batch, ways).items():
            for row, domain in enumerate(told):
                meters.setdefault((domain, way), BitsPerByte()).update(nats[row], batch["num_bytes"][row])
    domains = dict.fromkeys(domain for domain, _ in meters)
    ways = dict.fromkeys(way for _, way in meters)
    return {domain: {way: float(meters[domain, way].compute()) for way in ways} for domain in domains}


def first_ids(batch: Mapping[str, Any], tokens: int) -> list[list[int]]:
    """The first tokens of each row, without padding: that may be a token of text where a tokenizer has none for it."""
    lengths = [int(row.nonzero().max()) + 1 for row in batch["labels"] != IGNORED]
    return [ids[: min(tokens, end)].tolist() for ids, end in zip(batch["input_ids"], lengths, strict=True)]


def _nats(model: DecomposedModel, batch: Mapping[str, Any], ways: Mapping[str, list[str | None]]) -> dict[str, Tensor]:
    """Negative log-likelihood of each row [B] under each way; a row and a memory that come twice are read once."""
    pairs = list(dict.fromkeys((row, name) for names in ways.values() for row, name in enumerate(names)))
    found: dict[tuple[int, str | None], Tensor] = {}
    size = len(batch["input_ids"])
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        rows = [row for row, _ in part]
        positions = batch.get("position_ids")
        ids, labels = batch["input_ids"][rows], batch["labels"][rows, 1:]  # [b, T], [b, T - 1]
        more = {} if positions is None else {"position_ids": positions[rows].to(model.device)}
        logits = model(ids, domains=[name for _, name in part], **more).logits[:, :-1].float()  # [b, T - 1, V]
        nats = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels.to(logits.device), ignore_index=IGNORED, reduction="none"
        ).sum(1)  # [b]
        found |= dict(zip(part, nats.cpu(), strict=True))
    return {way: torch.stack([found[row, name] for row, name in enumerate(names)]) for way, names in ways.items()}
