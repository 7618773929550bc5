"""Streaming's split: the held-out text is read from a corpus' head, and what is left of the corpus is training text."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from koff_lightning.data.readers import Document, OnBad
from koff_lightning.data.retries import read_with_retries
from koff_lightning.data.shards import Shard
from koff_lightning.data.sources import Side
from koff_lightning.data.split import Texts, first_by_hash, on_heldout_side
from koff_lightning.support.errors import KoffError


@dataclass(frozen=True)
class IsTraining:
    """Whether a document is training text: neither on the held-out side nor a copy of a text that is.

    Args:
        sides: Sides of each shard.
        fraction: Held out by hash.
        heldout: Texts that serve validation.
        id: Whose documents are held out where the hash holds out none.
    """

    sides: Sequence[Side]
    fraction: float
    heldout: frozenset[str]
    id: str | None = None

    def __call__(self, shard: int, document: Document) -> bool:
        """Whether a document of the shard of this number is training text."""
        held = on_heldout_side(self.sides[shard], document, self.fraction) or document.id == self.id
        return not held and document.text not in self.heldout

    @property
    def digest(self) -> str:
        """A hash that tells other held-out text, which leaves other text to train on."""
        texts = sorted(hashlib.sha256(text.encode()).hexdigest() for text in self.heldout)
        return hashlib.sha256("".join([*texts, str(self.id)]).encode()).hexdigest()[:16]


class _AtMost(list[str]):
    """Texts that together have no more than so many UTF-8 bytes; full at the first that no longer fits."""

    def __init__(self, limit: int | None) -> None:
        super().__init__()
        self.room, self.full, self.passed = float("inf") if limit is None else limit, False, False

    def add(self, text: str) -> None:
        size = len(text.encode())
        if size <= self.room and not self.full:
            self.append(text)
            self.room -= size
        else:
            self.full = len(self) > 0
            self.passed = True  # a text larger than the limit itself


class _AtLeast(list[Document]):
    """Documents whose texts together have so many UTF-8 bytes or, with the last, more."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.room = limit

    @property
    def full(self) -> bool:
        return self.room <= 0

    def add(self, document: Document) -> None:
        if not self.full:
            self.append(document)
            self.room -= len(document.text.encode())


def first_documents(shards: Sequence[tuple[Shard, Side]], count: int, on_bad: OnBad) -> list[tuple[Shard, Side]]:
    """The shards that hold a domain's first documents, the last of them cut off behind the last of these.

    These documents are read for it, once: where a record ends the count does not show from outside.

    Args:
        shards: Shards of the domain, with their sides; held-out files are not counted.
        count: Documents.
        on_bad: What to do with a bad line.
    """
    kept: list[tuple[Shard, Side]] = []
    for shard, side in shards:
        if side != "held out":
            for number, _ in read_with_retries(shard, on_bad):
                count -= 1
                if not count:
                    return [*kept, (replace(shard, until=number + 1), side)]
        kept.append((shard, side))
    return kept


def split_streamed(
    name: str,
    shards: Sequence[tuple[Shard, Side]],
    *,
    heldout_fraction: float,
    max_heldout_bytes: int | None,
    train_bytes: int,
    on_bad: OnBad,
    bounded: bool = False,
) -> tuple[Texts, IsTraining]:
    """Read as little of a domain as gives its held-out text and some training text, for corpora of any size.

    Held-out documents are taken in file order while they fit; those larger than the limit are passed over. Reading
    stops when both sides are full. Where the hash holds out none of two documents or more, the one that comes first by
    its hash is held out, and with it all of its id.

    Args:
        name: Name of the domain, for messages.
        shards: Shards of the domain, with their sides.
        heldout_fraction: Share of documents to hold out where the split is by hash.
        max_heldout_bytes: UTF-8 bytes of held-out text; None for all of it, where it comes already split.
        train_bytes: About how many UTF-8 bytes of training text to return.
        on_bad: What to do with a bad line.
        bounded: The shards are those of `first_documents`, so that reading all of them has an end.

    Returns:
        The texts, and what tells which of the other documents are training text.

    Raises:
        KoffError: Bad files or lines, no limit where one is needed, or a side that is left without text.
    """
    if max_heldout_bytes is None and any(side == "by hash" for _, side in shards) and not bounded:
        raise KoffError(
            f"domain '{name}': data.streaming needs data.max_heldout_bytes (1000000, say), heldout_files or "
            "max_documents: without them, finding the held-out text would take reading the whole corpus"
        )
    heldout, train = _AtMost(max_heldout_bytes), _AtLeast(train_bytes)
    first: Document | None = None  # by its hash, where the hash decides
    several = False
    for shard, side in shards:
        wanted = {"held out": [heldout], "training": [train], "by hash": [heldout, train]}[side]
        documents = read_with_retries(shard, on_bad)
        while not all(texts.full for texts in wanted) and (numbered := next(documents, None)):
            document = numbered[1]
            if on_heldout_side(side, document, heldout_fraction):
                heldout.add(document.text)
            else:
                train.add(document)
            if side == "by hash":
                several |= first is not None and document.id != first.id and document.text != first.text
                first = document if first is None else min(first, document, key=first_by_hash)
    alone = first.id if several and not (heldout or heldout.passed) else None
    if alone is not None:
        heldout.add(first.text)
    sides = [side for _, side in shards if side != "held out"]
    is_training = IsTraining(sides, heldout_fraction, frozenset(heldout), alone)
    left = [document.text for document in train if document.id != alone and document.text not in is_training.heldout]
    texts = Texts(left, list(heldout))
    _refuse_empty(name, texts, f"data.heldout_fraction={heldout_fraction:.3g} or data.{max_heldout_bytes=}")
    return texts, is_training


def _refuse_empty(name: str, texts: Texts, limits: str) -> None:
    for what, side in (("training", texts.train), ("held-out", texts.heldout)):
        if not side:
            raise KoffError(f"domain '{name}' has no {what} text that could be used: add documents, or change {limits}")
