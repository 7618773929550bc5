"""Which documents of a domain are held out, and the text of both sides in memory.

Shipped text and domains with held-out files come already split; other text is split by a hash of the document id, so
that a document is on the same side in every run, on every machine, however it is read and (for parallel corpora that
share ids) in every language.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from koff_lightning.data.readers import Document, OfFile, OnBad
from koff_lightning.data.retries import read_with_retries
from koff_lightning.data.sources import DomainSource, Side, domain_shards
from koff_lightning.support.errors import KoffError


class Texts(NamedTuple):
    """The texts of one domain, split by document."""

    train: list[str]
    heldout: list[str]


def is_heldout(doc_id: str, fraction: float) -> bool:
    """Whether the document with this id is held out; depends on nothing but the id."""
    return _hash(doc_id) / 2**32 < fraction


def _hash(doc_id: str) -> int:
    return int(hashlib.sha256(doc_id.encode()).hexdigest()[:8], 16)


@dataclass
class BadLines:
    """What to do with a line that cannot be used: raise, or count it.

    Args:
        domain: For messages.
        action: ``fail`` or ``skip``.
        endless: Warn of the first such line at once, since a stream has no end to warn at.
    """

    domain: str
    action: Literal["fail", "skip"]
    endless: bool = False
    count: int = 0
    first: str = ""

    def __call__(self, message: str) -> None:
        """Count "file:line: what is wrong", or raise it."""
        if self.action == "fail" and isinstance(message, OfFile):
            raise KoffError(message)
        if self.action == "fail":
            raise KoffError(f"{message}. Mend it, or set data.on_bad_line=skip to leave such lines out")
        self.first = self.first or message
        self.count += 1
        if self.endless and self.count == 1:
            rank_zero_warn(f"domain '{self.domain}': leaves out lines that cannot be used, first {message}")

    def report(self) -> None:
        """Warn if there were bad lines."""
        if self.count:
            rank_zero_warn(
                f"domain '{self.domain}': left out {self.count} line(s) that could not be used, first {self.first}"
            )


def read_domain(
    name: str,
    source: DomainSource,
    *,
    heldout_fraction: float,
    max_train_bytes: int | None = None,
    max_heldout_bytes: int | None = None,
    on_bad_line: Literal["fail", "skip"] = "fail",
) -> Texts:
    """Read one domain and split it by document.

    A training document whose text is also held out is dropped. Limits count UTF-8 bytes and take whole documents:
    training text in file order up to the first document that no longer fits (reading stops there); held-out text in
    the order of the id's hash, leaving out documents that do not fit. If the hash holds out none of several documents,
    the one with the lowest hash is held out.

    Raises:
        KoffError: Bad files or lines (see `readers`), or a side of the split that is left without text.
    """
    on_bad = BadLines(name, on_bad_line)
    train, heldout, full = _split(_labelled(source, heldout_fraction, on_bad), max_train_bytes)
    on_bad.report()
    if not (heldout or source.heldout_entries):
        train, heldout = _hold_one(train)
    held_texts = {document.text for document in heldout}
    texts = Texts([d.text for d in train if d.text not in held_texts], fill(heldout, max_heldout_bytes))
    _refuse_empty(name, source, train + heldout, full)
    if (
        not (full or source.heldout_entries or source.max_documents == 1)
        and len({document.text for document in train + heldout}) == 1
    ):
        raise KoffError(
            f"domain '{name}' is one document, {len(train + heldout)} time(s), and none can be on both sides: divide "
            f"it into several, or name other text in its heldout_files{_about_txt(source)}"
        )
    if not texts.train and source.heldout_entries and not max_train_bytes:
        raise KoffError(
            f"domain '{name}' has no training text: its files hold no document that its heldout_files do not hold too"
        )
    if not texts.train:
        options = f"data.max_train_bytes={max_train_bytes} (of general text data.max_retention_bytes)"
        limit = f", or exceed {options}" if max_train_bytes else ""
        raise KoffError(
            f"domain '{name}' has no training text: its documents are held out or repeat one that is{limit}. Add "
            f"documents, or change heldout_fraction={heldout_fraction:.3g}{_about_ids(train + heldout)}"
        )
    if not heldout and source.heldout_entries:
        raise KoffError(f"domain '{name}' has no held-out text: its heldout_files hold no document with text")
    if not heldout:
        raise KoffError(
            f"domain '{name}' has no held-out text: none of the {len(train)} document(s) read falls in the "
            f"{heldout_fraction:.3g} chosen by hash. Add documents, or raise "
            f"data.heldout_fraction{_about_ids(train)}"
        )
    if not texts.heldout:
        raise KoffError(
            f"domain '{name}': none of its {len(heldout)} held-out document(s) fits in "
            f"data.max_heldout_bytes={max_heldout_bytes}: raise it (whole documents are taken)"
        )
    return texts


def _labelled(source: DomainSource, fraction: float, on_bad: OnBad) -> Iterator[tuple[bool, Document]]:
    """Yield (held out?, document); held-out shards first, because reading stops when the training text is full."""
    left = math.inf if source.max_documents is None else source.max_documents
    for shard, side in domain_shards(source):
        for _, document in read_with_retries(shard, on_bad):
            yield on_heldout_side(side, document, fraction), document
            left -= side != "held out"  # heldout_files are not counted, and come first
            if not left:
                return


def on_heldout_side(side: Side, document: Document, fraction: float) -> bool:
    """Whether a document of a shard on this side is held out."""
    return side == "held out" or (side == "by hash" and is_heldout(document.id, fraction))


def _split(
    documents: Iterator[tuple[bool, Document]], max_train_bytes: int | None
) -> tuple[list[Document], list[Document], bool]:
    """The documents of both sides, and whether reading stopped at a document that no longer fits."""
    train: list[Document] = []
    heldout: list[Document] = []
    size = 0
    for held, document in documents:
        if held:
            heldout.append(document)
            continue
        size += len(document.text.encode())
        if max_train_bytes is not None and size > max_train_bytes:
            return train, heldout, True
        train.append(document)
    return train, heldout, False


def _hold_one(train: list[Document]) -> tuple[list[Document], list[Document]]:
    """For a corpus so small that the hash holds out no document: hold out the one with the lowest hash."""
    ids, texts = {document.id for document in train}, {document.text for document in train}
    if min(len(ids), len(texts)) < 2:
        return train, []
    held = min(train, key=first_by_hash).id
    return [d for d in train if d.id != held], [d for d in train if d.id == held]


def first_by_hash(document: Document) -> tuple[int, str]:
    """Sort key by which one document is held out if the hash alone holds out none."""
    return _hash(document.id), document.id


def _about_ids(documents: list[Document]) -> str:
    """Advice on documents that share their ids, to end a message with; empty if none do."""
    ids = len({document.id for document in documents})
    if ids == len({document.text for document in documents}):
        return ""
    return (
        f". Its {len(documents)} documents have only {ids} different id(s), and those of one id stay together: set "
        "id_field to a field that tells documents apart, or to one that none has (then the text decides)"
    )


def _about_txt(source: DomainSource) -> str:
    """Advice on .txt files, to end a message with; empty if there are none."""
    if not any(".txt" in PurePath(entry).suffixes for entry in source.entries):
        return ""
    return ". A .txt file is one document: give several files, or jsonl with one document a line"


def fill(documents: list[Document], max_bytes: int | None) -> list[str]:
    """Take documents that fit, in the order of their hash: a sample that does not depend on the order of files."""
    if max_bytes is None:
        return [document.text for document in documents]
    taken: list[str] = []
    room = max_bytes
    for document in sorted(documents, key=lambda document: _hash(document.id)):
        size = len(document.text.encode())
        if size <= room:
            taken.append(document.text)
            room -= size
    return taken


def _refuse_empty(name: str, source: DomainSource, found: list[Document], full: bool) -> None:
    """Raise KoffError if a domain's files hold no text, or only blanks; `full`: reading stopped at a limit."""
    if not (found or full):
        chosen = f" among the records that where={source.where} lets through" if source.where else ""
        raise KoffError(f"domain '{name}' is empty: its files hold no document with text{chosen}")
    if found and not any(document.text.strip() for document in found):
        raise KoffError(f"domain '{name}' is empty: its documents hold nothing but blanks")
