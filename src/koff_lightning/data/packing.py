"""Tokenised documents -> token rows of one length, with document boundaries kept. Pure functions on numpy arrays.

Shapes: N tokens of all documents, D documents, R rows, S segments, T = seq_len.

A row holds one or more segments; a segment is a document or a piece of one. Attention and positions restart at each
segment, and a segment's first token is not predicted, so no prediction crosses a document boundary. Training rows cut
the token stream every T tokens. Held-out rows overlap where a document goes on in the next row, so that every token of
a document but its first is predicted exactly once.

Start tokens. If the tokenizer puts a start token before each text, the model has seen one at the head of everything,
and later tokens may direct nearly all of their attention to it. A row that opens inside a document would lack it: the
dense model would do badly there, and the first thing that a memory learned would be to stand for that token. So such a
row has the start token in place of its first token, and its second token is not predicted.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from koff_lightning.data.encoding import TokenStream

NO_START = -1
IGNORED = -100  # label of a token that is not predicted (torch's cross-entropy ignores it)


@dataclass(frozen=True)
class PackedRows:
    """Rows of one length, ready to be batched."""

    tokens: NDArray[np.int32]  # [R, T]
    starts: NDArray[np.bool_]  # [R, T] True at the first token of each segment, and at the first padding token
    padding: int  # padding tokens at the end of the last row
    first_segment: NDArray[np.int64]  # [R + 1] index of each row's first segment; the last entry is S
    documents: NDArray[np.int32]  # [S] document to which each segment belongs
    shares: NDArray[np.int64]  # [S] UTF-8 bytes of the text predicted in each segment; sums to the documents' bytes
    # [R, T] False for tokens that are not to be predicted, as a talk's questions; [0, 0] if there are none
    predicted: NDArray[np.bool_] = field(default_factory=lambda: np.zeros((0, 0), bool))
    start: int = NO_START  # token that replaces the first one of rows that open inside a document
    inside: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))  # [R] which rows do; [0] if none

    @property
    def num_bytes(self) -> NDArray[np.int64]:
        """UTF-8 bytes of the text predicted in each row, [R]."""
        return np.add.reduceat(self.shares, self.first_segment[:-1])

    @property
    def cut(self) -> int:
        """Number of documents that are cut at the end of a row and go on in the next."""
        return int((np.bincount(self.documents) > 1).sum())

    @property
    def digest(self) -> str:
        """A hash that differs for other rows; of all segments' bytes but the tokens of a thousand rows, to be fast."""
        some = self.tokens[:: max(1, len(self.tokens) // 1000)]
        flags = self.predicted[:: max(1, len(self.tokens) // 1000)]
        opened = self.inside.tobytes() + str(self.start).encode() * bool(self.inside.size)
        return hashlib.sha256(self.shares.tobytes() + some.tobytes() + flags.tobytes() + opened).hexdigest()[:16]

    @cached_property
    def useful(self) -> NDArray[np.int64]:
        """Indices of the rows in which any token is predicted.

        A row of talks may hold questions alone, and the last row of a text a single token.
        """
        if self.predicted.size:
            return np.flatnonzero((self.predicted & ~self.starts).any(axis=1))
        left = self.tokens.shape[1] - np.diff(self.first_segment)  # [R] tokens that do not begin a segment
        left[-1:] -= self.padding
        if self.inside.size:
            few = np.flatnonzero(left <= 1)  # only where it matters, as `starts` may be mapped from disk
            left[few] -= self.inside[few] & ~self.starts[few, 1]  # the second token of such a row is not predicted
        return np.flatnonzero(left > 0)

    @property
    def whole(self) -> int:
        """Useful rows without padding, which only the last row can have."""
        return len(self) - bool(self.padding and len(self) and self.useful[-1] == len(self.tokens) - 1)

    def __len__(self) -> int:
        return len(self.useful)


def pack(stream: TokenStream, seq_len: int, *, overlap: bool, pad_id: int = 0, start: int | None = None) -> PackedRows:
    """Pack documents into rows of equal length.

    Args:
        stream: The documents.
        seq_len: T, tokens per row.
        overlap: False for training rows, True for held-out rows (see the head of this file).
        pad_id: Token that fills the last row; padding is a segment of its own and is never predicted.
        start: Token at the head of rows that open inside a document, as long as all documents begin with it; None to
            leave the document's own token there.

    Returns:
        Rows whose `shares` split each document's bytes over its predicted tokens, in proportion and in whole bytes.
    """
    num_tokens = len(stream.tokens)
    is_start = np.zeros(num_tokens, dtype=bool)  # [N]
    is_start[stream.starts] = True
    if not (stream.tokens[stream.starts] == start).all():  # talks may not: their template decides
        start = None
    row_starts, inside = _row_starts(is_start, seq_len, (1 if start is None else 2) * overlap)  # [R], [R]
    inside = inside[:0] if start is None or not inside.any() else inside
    padding = max(0, int(row_starts[-1]) + seq_len - num_tokens)  # only the last row can run past the end

    def in_rows(values: NDArray[Any], fill: int) -> NDArray[Any]:
        """[N] -> [R, T]; indexed by row, since an index of every token would take twice the memory of the tokens."""
        padded = np.append(values, np.full(padding, fill, values.dtype))
        return sliding_window_view(padded, seq_len)[row_starts]

    starts = in_rows(is_start, False)
    starts[:, 0] = True
    segments = np.flatnonzero(starts)  # [S] where each begins, in the flattened rows
    ends = np.append(segments[1:], starts.size - padding)
    first = row_starts[segments // seq_len] + segments % seq_len  # [S] its first token in the stream
    documents = np.searchsorted(stream.starts, first, side="right") - 1
    wanted = in_rows(stream.predicted, False) if len(stream.predicted) else np.zeros((0, 0), bool)
    first_segment = np.searchsorted(segments, np.arange(len(row_starts) + 1) * seq_len)
    if wanted.size:
        wanted[: len(inside), 1] &= ~inside
        predicted = np.add.reduceat((wanted & ~starts).reshape(-1), segments, dtype=np.int64)
    else:
        predicted = ends - segments - 1
        predicted[first_segment[: len(inside)][inside]] -= 1
        np.maximum(predicted, 0, out=predicted)  # a segment of one token predicts nothing anyway
    shares = _share_bytes(stream.num_bytes, documents, predicted=predicted)
    if padding:
        starts[-1, seq_len - padding] = True
    tokens, number = in_rows(stream.tokens, pad_id), NO_START if start is None or not inside.size else start
    numbers = documents.astype(np.int32)
    return PackedRows(tokens, starts, padding, first_segment, numbers, shares, wanted, number, inside)


def _row_starts(is_start: NDArray[np.bool_], seq_len: int, overlap: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Index of each row's first token in the stream, and whether the row opens inside a document, both [R].

    A row that opens inside a document repeats the last `overlap` tokens of the row before. If that row ends with the
    first token of the document, only this token is repeated, so that the row opens with the document.
    """
    if not overlap:
        starts = np.arange(0, len(is_start), seq_len)
        return starts, ~is_start[starts]
    starts, inside, begin = [0], [False], seq_len
    while begin < len(is_start):
        goes_on = not is_start[begin]
        alone = goes_on and is_start[begin - 1]  # the row before has only the document's first token
        begin -= goes_on * (1 if alone else overlap)
        starts.append(begin)
        inside.append(goes_on and not alone)
        begin += seq_len
    return np.array(starts), np.array(inside)


def _share_bytes(
    num_bytes: NDArray[np.int64], documents: NDArray[np.int64], predicted: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Share each document's bytes over its segments in proportion to the tokens predicted in each.

    The running total is rounded and not the parts, so that a document's shares sum to exactly its bytes.

    Args:
        num_bytes: Bytes per document, [D].
        documents: Document of each segment, non-decreasing, [S].
        predicted: Tokens predicted in each segment, [S].
    """
    totals = np.bincount(documents, weights=predicted, minlength=len(num_bytes)).astype(np.int64)  # [D]
    after = np.cumsum(predicted) - (np.cumsum(totals) - totals)[documents]  # [S] predicted so far in the same document
    total, size = np.maximum(totals[documents], 1), num_bytes[documents]
    return size * after // total - size * (after - predicted) // total


def collate(rows: Sequence[tuple[str, PackedRows, int]]) -> dict[str, torch.Tensor | list[str]]:
    """Build a batch from triples of a domain, its packed rows, and the number of a row among the useful ones.

    Returns:
        input_ids and labels [B, T] (labels aligned with input_ids, -100 = not predicted); position_ids [B, T], which
        restart at each segment (absent if no row holds more than one: then no mask is needed); domains (B names);
        documents [B, T], each token's document within its domain (padding counts to the one before); and the UTF-8
        bytes of the predicted text: num_bytes [B] of each row, document_bytes [B, T] of each segment, at the place of
        its first token.
    """
    rows = [(domain, packed, int(packed.useful[number])) for domain, packed, number in rows]
    tokens = np.stack([packed.tokens[row] for _, packed, row in rows]).astype(np.int64)  # [B, T]
    starts = np.stack([packed.starts[row] for _, packed, row in rows])  # [B, T]
    labels = np.where(starts, IGNORED, tokens)
    documents, document_bytes = np.zeros_like(tokens), np.zeros(tokens.shape, dtype=np.float32)
    for line, (_, packed, row) in enumerate(rows):
        if packed.padding and row == len(packed.tokens) - 1:
            labels[line, -packed.padding :] = IGNORED
        if packed.predicted.size:
            labels[line, ~packed.predicted[row]] = IGNORED
        if packed.inside.size and packed.inside[row]:
            tokens[line, 0], labels[line, 1] = packed.start, IGNORED
        segments = slice(*packed.first_segment[row : row + 2])
        shares = packed.shares[segments]
        segment = np.minimum(np.cumsum(starts[line]), len(shares)) - 1  # [T]
        documents[line] = packed.documents[segments][segment]
        document_bytes[line, np.flatnonzero(starts[line])[: len(shares)]] = shares
    batch: dict[str, torch.Tensor | list[str]] = {
        "input_ids": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "domains": [domain for domain, _, _ in rows],
        "num_bytes": torch.from_numpy(document_bytes.sum(axis=1)),
        "documents": torch.from_numpy(documents),
        "document_bytes": torch.from_numpy(document_bytes),
    }
    if starts[:, 1:].any():
        place = np.arange(tokens.shape[1])
        batch["position_ids"] = torch.from_numpy(place - np.maximum.accumulate(np.where(starts, place, 0), axis=1))
    return batch
