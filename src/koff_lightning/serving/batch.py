"""Texts that are continued together, a token each at a time. Rows come and go between two steps.

Every row has its own memory, prompt and options. Rows stand in token caches, padded on the left. A long row does not
widen short ones: they share a cache only while the padding costs a step less than reading the weights once more. Who
comes is read apart, beside prompts of like length, a part of them between two tokens of the others.

Shapes: B rows, S cached tokens, T new tokens, V vocabulary, K key-value heads, dh head size.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from koff_lightning.artifact.decomposed import DecomposedModel
from koff_lightning.backbone import rope_of
from koff_lightning.kv_memory import MOVING_ROPE
from koff_lightning.serving.engine import Failed, Options, Piece, Token, Who
from koff_lightning.serving.sampling import Sampler, check_finite, described

Layers = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [B, K, S, dh] each

CHUNK = 512  # tokens of a prompt that are read at a time: bounds the attention scores that are held
AT_ONCE = 2048  # the same over all rows: how long others wait, and the logits of scored prompts: 1.2 GB at V = 150,000
ALIKE = 64  # prompts up to this length are read together, longer ones with those of more than half their length
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Row:
    """One text.

    Args:
        ids: The prompt, one token or more; what is added to it comes behind.
        memory: Name inside the model, None for none.
        options: How it is continued.
        tell: Takes the pieces of the answer.
        who: Whose it is.
    """

    ids: list[int]
    memory: str | None
    options: Options
    tell: Callable[[Piece | Exception], None]
    who: Who = field(default_factory=lambda: ("", object()))
    gone: bool = False  # nobody waits for it any longer
    done: bool = False
    count: int = 0  # tokens of the answer
    sampler: Sampler = field(init=False)

    def __post_init__(self) -> None:
        self.ids, self.sampler = list(self.ids), Sampler(self.options)

    def take(self, logits: Tensor, ends: frozenset[int], prompt: tuple[Token, ...] | None = None) -> None:
        """Choose the next token by logits [V], and tell it.

        Raises:
            Failed: The logits are no numbers.
        """
        check_finite(logits)
        if not self.options.max_tokens:
            self._tell(Piece((), "length", prompt))
            return
        new = self.sampler.pick(logits)
        if new in ends and not self.options.ignore_end:
            self._tell(Piece((), "stop", prompt))
            return
        self.ids.append(new)
        self.count += 1
        token = described([new], logits[None], self.options)[0]
        self._tell(Piece((token,), "length" if self.count == self.options.max_tokens else None, prompt))

    @property
    def caller(self) -> str:
        """The name of who asks."""
        return self.who[0]

    @property
    def lives(self) -> bool:
        """Whether there is more to do."""
        return not (self.done or self.gone)

    @property
    def echoes(self) -> bool:
        """Whether its prompt is to be told; one that is read anew has been told."""
        return self.options.echo and not self.count

    @property
    def cells(self) -> int:
        """Tokens that its cache holds, once the prompt is read: all but the last."""
        return len(self.ids) - 1

    def fail(self, error: Exception) -> None:
        """End the answer, unless it has ended."""
        if not self.lives:
            return
        self.done = True
        try:
            self.tell(error)
        except RuntimeError:  # the loop that waited is closed
            _log.debug("nobody was left to be told")

    def _tell(self, piece: Piece) -> None:
        self.done = piece.finish is not None
        self.tell(piece)


@contextlib.contextmanager
def failing(rows: Sequence[Row]) -> Iterator[None]:
    """What goes wrong inside, a lack of memory among it, fails these rows and no others."""
    try:
        yield
    except Exception as error:
        _fail(rows, error)


def _fail(rows: Sequence[Row], error: Exception) -> None:
    _log.error("the engine failed at %d of its texts", len(rows), exc_info=error)
    known = isinstance(error, Failed)
    for row in rows:
        row.fail(error if known else Failed(f"the engine failed ({type(error).__name__})"))


def _staying(rows: Sequence[Row], back: Collection[Row]) -> list[int]:
    """Places of those that go on."""
    return [place for place, row in enumerate(rows) if row.lives and row not in back]


class Prompts:
    """Prompts that are read together, padded on the left.

    Args:
        model: Reads them.
        rows: Whose they are.
    """

    def __init__(self, model: DecomposedModel, rows: Sequence[Row]) -> None:
        self.model, self.rows = model, list(rows)
        width = self._width = max(len(row.ids) for row in rows)
        self._ids = torch.tensor([[row.ids[0]] * (width - len(row.ids)) + row.ids for row in rows])  # [B, width]
        real = torch.arange(width) >= width - torch.tensor([len(row.ids) for row in rows])[:, None]
        self._mask = real.long().to(model.device)
        self._start, self._layers = 0, Layers()
        self._before: Tensor | None = None  # logits [B, V] at the token before the part
        self._told: dict[Row, list[Token]] = {row: [] for row in rows}

    def read(self) -> bool:
        """Read the next part. Whether it was the last."""
        start, echo = self._start, any(row.echoes for row in self.rows)
        end = min(self._width, start + max(1, min(CHUNK, AT_ONCE // len(self.rows))))
        cache, kept = DynamicCache(self._layers or None), {} if echo else {"logits_to_keep": 1}
        domains = [row.memory for row in self.rows]
        ids, mask = self._ids[:, start:end], self._mask[:, :end]
        logits = self.model(ids, mask, domains=domains, past_key_values=cache, **kept).logits
        if echo:
            for place, row in enumerate(self.rows):
                shown = None if self._before is None else self._before[place]
                with failing([row]):
                    self._told[row] += _scored(row, shown, logits[place], start, end, self._width)
        self._layers, self._before, self._start = _layers(cache), logits[:, -1], end
        return end == self._width

    def first(self, ends: frozenset[int]) -> "Together":
        """Tell the first tokens; the rows as they go on."""
        for row, scores in zip(self.rows, self._before, strict=True):
            with failing([row]):
                if row.lives:
                    row.take(scores, ends, tuple(self._told[row]) if row.echoes else None)
        return Together(self.model, self.rows, self._layers, self._mask)

    def drop(self, back: Collection[Row] = ()) -> None:
        """Let go of rows that step back or nobody waits for: their memories may be taken away between two parts."""
        stay = _staying(self.rows, back)
        if len(stay) < len(self.rows):
            self.rows, self._ids, self._mask = [self.rows[place] for place in stay], self._ids[stay], self._mask[stay]
            self._layers = [(key[stay], value[stay]) for key, value in self._layers]
            self._before = None if self._before is None else self._before[stay]


class Together:
    """Rows under way that stand in one token cache, padded on the left.

    Args:
        model: Continues them.
        rows: One or more.
        layers: Their cache.
        mask: [B, S], 0 for padding.
    """

    def __init__(self, model: DecomposedModel, rows: Sequence[Row], layers: Layers, mask: Tensor) -> None:
        self.model, self.rows, self._layers, self._mask = model, list(rows), layers, mask

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(row.cells for row in self.rows)

    @property
    def cell(self) -> int:
        """Numbers that are held for a token."""
        return sum(part.shape[1] * part.shape[3] for layer in self._layers for part in layer)

    def drop(self, back: Collection[Row] = ()) -> None:
        """Let go of rows that step back, are done or gone, and of the columns that are padding in all others."""
        stay = _staying(self.rows, back)
        rows = [self.rows[place] for place in stay]
        start = self._mask.shape[1] - max((row.cells for row in rows), default=0)
        if start or len(rows) < len(self.rows):
            self.rows = rows
            self._mask = self._mask[stay, start:]
            self._layers = [(key[stay, :, start:], value[stay, :, start:]) for key, value in self._layers]

    def step(self, ends: frozenset[int]) -> None:
        """Read every row's last token and choose its next."""
        ids = torch.tensor([row.ids[-1:] for row in self.rows], device=self.model.device)  # [B, 1]
        self._mask = F.pad(self._mask, (0, 1), value=1)  # [B, S + 1]
        cache, domains = DynamicCache(self._layers), [row.memory for row in self.rows]
        logits = self.model(ids, self._mask, domains=domains, past_key_values=cache).logits  # [B, 1, V]
        self._layers = _layers(cache)
        for row, scores in zip(self.rows, logits[:, -1], strict=True):
            with failing([row]):
                row.take(scores, ends)

    def padding(self, wider: "Together") -> int:
        """Cells of padding in one cache of these rows and of others, which are as wide or wider."""
        rows = [*self.rows, *wider.rows]
        return len(rows) * wider.width - sum(row.cells for row in rows)

    def join(self, wider: "Together") -> "Together":
        """One cache of all."""
        more = wider._mask.shape[1] - self._mask.shape[1]
        pairs = zip(self._layers, wider._layers, strict=True)
        layers = [
            tuple(torch.cat([F.pad(part, (0, 0, more, 0)), wide]) for part, wide in zip(*pair, strict=True))
            for pair in pairs
        ]
        mask = torch.cat([F.pad(self._mask, (more, 0)), wider._mask])
        return Together(self.model, [*self.rows, *wider.rows], layers, mask)


class Batch:
    """Rows under way.

    Args:
        model: Continues them.
        ends: Tokens that end a text.
    """

    def __init__(self, model: DecomposedModel, ends: frozenset[int]) -> None:
        self.model, self.ends = model, ends
        self._weights = model.active_parameters()
        # Such a rotary embedding goes by the longest text of a pass: together, rows would change each other's answers.
        self._apart = rope_of(model.backbone.config).get("rope_type") in MOVING_ROPE
        self._prompts: list[Prompts] = []
        self._together: list[Together] = []
        self._owed = 0.0  # seconds that the last part of a prompt took longer than the tokens since

    @property
    def rows(self) -> list[Row]:
        """Those whose prompts are read and those that are continued."""
        return [row for part in (*self._together, *self._prompts) for row in part.rows]

    @property
    def reading(self) -> list[Row]:
        """Those whose prompts are read."""
        return [row for part in self._prompts for row in part.rows]

    def rereads(self, row: Row) -> bool:
        """Whether a row that steps back would go on as it went: with a moving embedding, only one with no token yet."""
        return not (self._apart and row.count)

    def put_back(self, rows: Sequence[Row]) -> None:
        """Let rows wait, whose caches are freed."""
        for part in (*self._together, *self._prompts):
            part.drop(rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Take in rows whose prompts are to be read."""
        if self._apart:
            self._prompts += [Prompts(self.model, [row]) for row in rows]
            return
        key = _likeness
        self._prompts += [Prompts(self.model, [*few]) for _, few in groupby(sorted(rows, key=key), key)]

    @torch.inference_mode()
    def step(self) -> None:
        """A token more for each row; read a part of some prompts, and tell their first tokens after the last part.

        While a request has its prompts read, those of others that are continued have half of the time: a token of
        theirs takes far less of it than a part.
        """
        start = time.perf_counter()
        for part in (*self._together, *self._prompts):
            part.drop()
        self._prompts = [part for part in self._prompts if part.rows]
        self._join()
        for part in self._together:
            with failing(part.rows):
                part.step(self.ends)
        self._owed -= time.perf_counter() - start
        if self._prompts and (self._owed <= 0 or not self._others()):
            start = time.perf_counter()
            self._read(*self._prompts)
            self._owed = time.perf_counter() - start

    def _others(self) -> bool:
        """Whether requests are continued that have no prompt to be read."""
        reading = {row.who for row in self.reading}
        return any(row.lives and row.who not in reading for part in self._together for row in part.rows)

    def _read(self, prompts: Prompts, *others: Prompts) -> None:
        """Read a part; then it is the others' turn."""
        try:
            go_on = [] if prompts.read() else [prompts]
            if not go_on:
                self._together.append(prompts.first(self.ends))
        except Exception as error:
            alone = [row for row in prompts.rows if len(prompts.rows) > 1]
            go_on = [Prompts(self.model, [row]) for row in alone]  # whose fault it was is seen when each is read alone
            if not alone:
                _fail(prompts.rows, error)
        self._prompts = [*others, *go_on]

    def _join(self) -> None:
        """Put caches together where the padding costs a step less than reading the weights for one more."""
        if self._apart:
            self._together = [part for part in self._together if part.rows]
            return
        joined: list[Together] = []
        for part in sorted((part for part in self._together if part.rows), key=lambda part: part.width):
            if joined and joined[-1].padding(part) * part.cell <= self._weights:
                part = joined.pop().join(part)
            joined.append(part)
        self._together = joined


def pass_share(row: Row) -> float:
    """Of the tokens that are read at a time, the part that its prompt takes."""
    return min(len(row.ids), CHUNK) / AT_ONCE


def _likeness(row: Row) -> int:
    """The same for prompts that are read together."""
    return (max(len(row.ids), ALIKE) - 1).bit_length()


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
    if not row.echoes or first >= end:
        return []
    found = [Token(row.ids[0])] if first == pad else []  # nothing predicts it
    first += len(found)
    if first < end:
        shown = logits[first - start - 1 : end - start - 1] if first > start else torch.cat([before[None], logits[:-1]])
        check_finite(shown)
        found += described(row.ids[first - pad : end - pad], shown, row.options)
    return found


def _layers(cache: DynamicCache) -> Layers:
    return [(layer.keys, layer.values) for layer in cache.layers]
