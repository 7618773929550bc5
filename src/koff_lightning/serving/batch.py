"""Texts that are continued together, a token each at a time. Rows come and go between two steps.

Every row has its own memory, prompt and options. Rows stand in one token cache, padded on the left; who comes is read
apart, in a batch of all that come at once, and put beside the others.

Shapes: B rows, S cached tokens, T new tokens, V vocabulary, K key-value heads, dh head size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from koff_lightning.artifact.decomposed import DecomposedModel
from koff_lightning.serving.engine import Failed, Options, Piece, Token
from koff_lightning.serving.sampling import Sampler, described

CHUNK = 512  # tokens of a prompt that are read at a time: bounds the attention scores that are held
SCORED = 2048  # the same over all rows of a batch, where the logits at all of them are wanted: 1.2 GB at V = 150,000


@dataclass(eq=False)
class Row:
    """One text.

    Args:
        ids: The prompt, one token or more.
        memory: Name inside the model, None for none.
        options: How it is continued.
        tell: Takes the pieces of the answer.
    """

    ids: list[int]
    memory: str | None
    options: Options
    tell: Callable[[Piece | Exception], None]
    gone: bool = False  # nobody waits for it any longer
    done: bool = False
    count: int = 0  # tokens of the answer
    last: int = 0  # the token that is read next
    sampler: Sampler = field(init=False)

    def __post_init__(self) -> None:
        self.sampler = Sampler(self.options)

    def take(self, logits: Tensor, ends: frozenset[int], prompt: tuple[Token, ...] | None = None) -> None:
        """Choose the next token by logits [V], and tell it."""
        if not self.options.max_tokens:
            self._tell(Piece((), "length", prompt))
            return
        if not logits.max().isfinite():
            self.fail(Failed("the model's numbers are not finite"))
            return
        self.last = self.sampler.pick(logits)
        if self.last in ends and not self.options.ignore_end:
            self._tell(Piece((), "stop", prompt))
            return
        self.count += 1
        token = described([self.last], logits[None], self.options)[0]
        self._tell(Piece((token,), "length" if self.count == self.options.max_tokens else None, prompt))

    def fail(self, error: Exception) -> None:
        """End the answer."""
        self.done = True
        self.tell(error)

    def _tell(self, piece: Piece) -> None:
        self.done = piece.finish is not None
        self.tell(piece)


class Batch:
    """Rows under way.

    Args:
        model: Continues them.
        ends: Tokens that end a text.
    """

    def __init__(self, model: DecomposedModel, ends: frozenset[int]) -> None:
        self.model, self.ends = model, ends
        self.rows: list[Row] = []
        self._layers: list[tuple[Tensor, Tensor]] = []  # keys and values of each layer, [B, K, S, dh] each
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)  # [B, S], 0 for padding

    @torch.inference_mode()
    def add(self, rows: Sequence[Row]) -> None:
        """Read the prompts of rows that come, tell their first tokens, and put those that go on beside the others."""
        layers, mask = self._read(rows)
        stay = [index for index, row in enumerate(rows) if not (row.done or row.gone)]
        if not stay:
            return
        layers, mask = _cut(layers, mask, stay)
        width = max(mask.shape[1], self._mask.shape[1])
        parts = [(self._layers, self._mask), (layers, mask)] if self.rows else [(layers, mask)]
        self._mask = torch.cat([F.pad(mask, (width - mask.shape[1], 0)) for _, mask in parts])
        self._layers = [
            tuple(
                torch.cat([F.pad(t, (0, 0, width - t.shape[2], 0)) for t in same]) for same in zip(*pairs, strict=True)
            )
            for pairs in zip(*(layers for layers, _ in parts), strict=True)
        ]
        self.rows += [rows[index] for index in stay]

    @torch.inference_mode()
    def step(self) -> None:
        """Read every row's last token and choose its next; rows that are done or gone leave."""
        self._drop()
        if not self.rows:
            return
        device = self.model.device
        ids = torch.tensor([[row.last] for row in self.rows], device=device)  # [B, 1]
        self._mask = F.pad(self._mask, (0, 1), value=1)  # [B, S + 1]
        cache = DynamicCache(self._layers)
        domains = [row.memory for row in self.rows]
        logits = self.model(ids, self._mask, domains=domains, past_key_values=cache).logits  # [B, 1, V]
        self._layers = _layers(cache)
        for row, scores in zip(self.rows, logits[:, -1], strict=True):
            row.take(scores, self.ends)

    def _drop(self) -> None:
        stay = [index for index, row in enumerate(self.rows) if not (row.done or row.gone)]
        if len(stay) < len(self.rows):
            self.rows = [self.rows[index] for index in stay]
            self._layers, self._mask = _cut(self._layers, self._mask, stay)

    def _read(self, rows: Sequence[Row]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
        """Prompts, part by part. Returns the cache's layers and its mask [B, S]."""
        width = max(len(row.ids) for row in rows)
        ids = torch.tensor([[row.ids[0]] * (width - len(row.ids)) + row.ids for row in rows])  # [B, S]
        mask = (torch.arange(width) >= width - torch.tensor([len(row.ids) for row in rows])[:, None]).long()
        mask, domains = mask.to(self.model.device), [row.memory for row in rows]
        cache, echo = DynamicCache(), any(row.options.echo for row in rows)
        before: Tensor | None = None  # logits [B, V] at the token before the part
        prompts: list[list[Token]] = [[] for _ in rows]
        part = max(1, min(CHUNK, SCORED // len(rows))) if echo else CHUNK
        for start in range(0, width, part):
            end = min(start + part, width)
            kept = {} if echo else {"logits_to_keep": 1}
            out = self.model(ids[:, start:end], mask[:, :end], domains=domains, past_key_values=cache, **kept)
            if echo:
                for index, row in enumerate(rows):
                    shown = None if before is None else before[index]
                    prompts[index] += _scored(row, shown, out.logits[index], start, end, width)
            before = out.logits[:, -1]
        for row, scores, prompt in zip(rows, before, prompts, strict=True):
            row.take(scores, self.ends, tuple(prompt) if row.options.echo else None)
        return _layers(cache), mask


def _scored(row: Row, before: Tensor | None, logits: Tensor, start: int, end: int, width: int) -> list[Token]:
    """The row's tokens in a part of the batch, with their log-probabilities.

    Args:
        row: Padded on the left to `width` tokens.
        before: Logits [V] at the token before the part.
        logits: The logits at the tokens of the part, [T, V].
        start: Place of the part's first token in the padded batch.
        end: Place behind its last token.
        width: Tokens of each row of the batch, padding included.
    """
    pad = width - len(row.ids)
    first = max(start, pad)
    if not row.options.echo or first >= end:
        return []
    found = [Token(row.ids[0])] if first == pad else []  # nothing predicts it
    first += len(found)
    if first < end:
        shown = logits[first - start - 1 : end - start - 1] if first > start else torch.cat([before[None], logits[:-1]])
        found += described(row.ids[first - pad : end - pad], shown, row.options)
    return found


def _layers(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def _cut(
    layers: list[tuple[Tensor, Tensor]], mask: Tensor, stay: list[int]
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Only these rows, and without the columns that are padding in all of them."""
    mask = mask[stay]
    start = mask.shape[1] - int(mask.sum(1).max()) if stay else mask.shape[1]
    return [(key[stay, :, start:], value[stay, :, start:]) for key, value in layers], mask[:, start:]
