"""The training rows of one domain as an endless, shuffled stream for one reader, which can be resumed at any row.

Shapes: T = seq_len.

A pass goes through the reader's shards in a new random order. The documents that it reads fill a buffer. A full buffer
is shuffled and cut into packs. A pack is tokenised and packed into rows, in random order, when its first row is asked
for. In each pass every document is in exactly one pack of one buffer. All random orders depend only on (seed, domain,
reader, pass, buffer, pack). So a place in the stream is six numbers (`Place`), and to resume there one buffer is read
again.
"""

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from koff_lightning.data.encoding import TokenStream, tokenize
from koff_lightning.data.packing import PackedRows, pack
from koff_lightning.data.readers import OnBad, Part
from koff_lightning.data.retries import read_with_retries
from koff_lightning.data.shards import HubShard, Shard
from koff_lightning.data.sources import Chat
from koff_lightning.data.streamed_split import IsTraining
from koff_lightning.data.talks import tokenize_talks
from koff_lightning.support.errors import KoffError

BUFFER = 4 * 2**20  # characters of text that are shuffled together
PACK = 512  # times T characters of text that are packed together: some 128 rows, of which the last is half empty


@dataclass(frozen=True)
class Place:
    """Place in a stream, after `row` rows of pack `pack` of the buffer that begins at record `record`."""

    passes: int = 0  # passes that are over
    shard: int = 0  # place in the order of this pass
    record: int = 0  # first record of that shard that may be in the buffer
    buffer: int = 0  # buffers of this pass that are over
    pack: int = 0  # packs of this buffer that are over
    row: int = 0


@dataclass(frozen=True)
class Text:
    """What a reader reads of a domain, and how."""

    domain: str
    shards: Sequence[Shard]
    wanted: IsTraining
    on_bad: OnBad
    append_eos: bool = False  # the end token behind each document
    chat: Chat | None = None  # if documents are talks: what of them is predicted
    open_with_start: int | None = None  # `start` of `pack`

    def identity(self, *how: object) -> dict[str, Any]:
        """All that a place in this text depends on, in plain values by name: the shards, and `how` they are read."""
        shards = [[shard.name, shard.size, shard.digest] for shard in self.shards]
        what = json.dumps([shards, *how])
        commits = sorted({shard.repo for shard in self.shards if isinstance(shard, HubShard)})
        said = {f"version of {self.domain}": ", ".join(commits)} if commits else {}
        return said | {f"text of {self.domain}": hashlib.sha256(what.encode()).hexdigest()[:16]}


class RowStream:
    """The training rows of one domain, one after the other.

    Args:
        text: The domain's text.
        parts: (shard, turn, of) that this reader reads: see `shards.deal`.
        tokenizer: Tokenizer of the backbone.
        seq_len: T.
        seed: Seed of all orders.
        reader: Number of this reader, over all ranks and workers.
        place: Place to start from.
    """

    def __init__(
        self,
        text: Text,
        parts: Sequence[tuple[int, int, int]],
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
        seed: int,
        reader: int,
        place: Place | None = None,
    ) -> None:
        self.text, self.parts, self.tokenizer, self.seq_len = text, parts, tokenizer, seq_len
        self.seed = [seed, zlib.crc32(text.domain.encode()), reader]
        self.place = place or Place()
        self._rows = self._all_rows()

    def __iter__(self) -> Iterator[tuple[PackedRows, int]]:
        return self

    def __next__(self) -> tuple[PackedRows, int]:
        return next(self._rows)

    def _all_rows(self) -> Iterator[tuple[PackedRows, int]]:
        found = self.place != Place()
        while True:
            for texts, end in self._buffers():
                for row in self._rows_of(texts):
                    found = True
                    yield row
                self.place = replace(end, passes=self.place.passes, buffer=self.place.buffer + 1)
            if not found:
                raise KoffError(
                    f"domain '{self.text.domain}' has too little training text to be shared by all that read it: "
                    f"reader {self.seed[2] + 1} gets none. Take fewer devices or data.num_workers, or do not stream"
                )
            self.place = Place(passes=self.place.passes + 1)
            found = False

    def _buffers(self) -> Iterator[tuple[list[str], Place]]:
        """Yield the buffers that remain of this pass, each with the place where it ends."""
        texts: list[str] = []
        size, limit = 0, max(BUFFER, PACK * self.seq_len)
        end = self.place
        for end, text in self._documents():
            texts.append(text)
            size += len(text)
            if size >= limit:
                yield texts, end
                texts, size = [], 0
        if texts:
            yield texts, end

    def _documents(self) -> Iterator[tuple[Place, str]]:
        """Yield the texts that remain of this pass, each with the place after it."""
        order = self._random(self.place.passes).permutation(len(self.parts))
        first = self.place
        for index in range(first.shard, len(order)):
            shard, turn, of = self.parts[order[index]]
            part = Part(first.record if index == first.shard else 0, turn, of)
            for number, document in read_with_retries(self.text.shards[shard], self.text.on_bad, part):
                if self.text.wanted(shard, document):
                    yield Place(shard=index, record=number + 1), document.text

    def _rows_of(self, texts: list[str]) -> Iterator[tuple[PackedRows, int]]:
        """Yield the rows that remain of a buffer."""
        order = self._random(self.place.passes, self.place.buffer).permutation(len(texts))
        ends = np.cumsum([len(texts[i]) for i in order])
        count = max(1, int(ends[-1]) // (PACK * self.seq_len))
        cuts = np.searchsorted(ends, ends[-1] * np.arange(1, count) / count)  # packs of about equal size
        how = {"overlap": False, "pad_id": self.tokenizer.pad_token_id or 0, "start": self.text.open_with_start}
        for documents in np.split(order, cuts)[self.place.pack :]:
            stream = self._tokenized([texts[i] for i in documents])
            if len(stream.tokens):
                packed = pack(stream, self.seq_len, **how)
                seed = self.place.passes, self.place.buffer, self.place.pack
                for row in self._random(*seed).permutation(len(packed))[self.place.row :]:
                    self.place = replace(self.place, row=self.place.row + 1)
                    yield packed, int(row)
            self.place = replace(self.place, pack=self.place.pack + 1, row=0)

    def _tokenized(self, texts: list[str]) -> TokenStream:
        if self.text.chat:
            return tokenize_talks(texts, self.tokenizer, self.text.chat, self.text.on_bad)
        return tokenize(texts, self.tokenizer, self.text.append_eos)

    def _random(self, *which: int) -> np.random.Generator:
        return np.random.default_rng([*self.seed, len(which), *which])

    def state(self) -> list[int]:
        """The stream's place as plain numbers, for a checkpoint."""
        return list(astuple(self.place))
