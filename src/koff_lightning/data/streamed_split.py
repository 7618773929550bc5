"""The split for streaming: held-out text is read from the head of a corpus, and the rest is training text."""

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
    """Whether a document is training text: not on the held-out side, and no copy of a held-out text.

    Args:
        sides: Side of each shard.
        fraction: Share that is held out by hash.
        heldout: The held-out texts.
        id: Id of the documents that are held out because the hash holds out none; None if it does.
    """

    sides: Sequence[Side]
    fraction: float
    heldout: frozenset[str]
    id: str | None = None

    def __call__(self, shard: int, document: Document) -> bool:
        """Whether a document of the shard with this index is training text."""
        held = on_heldout_side(self.sides[shard], document, self.fraction) or document.id == self.id
        return not held and document.text not in self.heldout

    @property
    def digest(self) -> str:
        """A hash that differs for other held-out text, which leaves other text to train on."""
        texts = sorted(hashlib.sha256(text.encode()).hexdigest() for text in self.heldout)
        return hashlib.sha256("".join([*texts, str(self.id)]).encode()).hexdigest()[:16]


class _AtMost(list[str]):
    """Texts of at most `limit` UTF-8 bytes together; full at the first that no longer fits."""

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
    """Documents until their texts have at least `limit` UTF-8 bytes together."""

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
    """The shards that hold a domain's first documents, the last shard ending behind the last of these.

    The documents are read once to find that place.

    Args:
        shards: Shards of the domain, with their sides; documents of held-out files do not count.
        count: Number of documents.
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
    """Read just enough of a domain for its held-out text and some training text, for corpora of any size.

    Held-out documents are taken in file order while they fit; those larger than the limit are passed over. Reading
    stops when both sides are full. If the hash holds out none of several documents, the one with the lowest hash is
    held out, with all documents of its id.

    Args:
        name: Name of the domain, for messages.
        shards: Shards of the domain, with their sides.
        heldout_fraction: Share of documents to hold out where the split is by hash.
        max_heldout_bytes: UTF-8 bytes of held-out text; None for all of it, where it comes already split.
        train_bytes: About how many UTF-8 bytes of training text to return.
        on_bad: What to do with a bad line.
        bounded: The shards are those of `first_documents`, so that reading all of them has an end.

    Returns:
        The texts, and a function that says which of all documents are training text.

    Raises:
        KoffError: Bad files or lines, no limit where one is needed, or a side that is left without text.
    """
    if max_heldout_bytes is None and any(side == "by hash" for _, side in shards) and not bounded:
        raise KoffError(
            f"domain '{name}': data.streaming needs data.max_heldout_bytes (1000000, say), heldout_files or "
            "max_documents: without them, finding the held-out text would take reading the whole corpus"
        )
    heldout, train = _AtMost(max_heldout_bytes), _AtLeast(train_bytes)
    first: Document | None = None  # the one with the lowest hash, if the hash decides
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
