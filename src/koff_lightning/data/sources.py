"""Where the text of a domain comes from, and which of its documents are held out.

A domain is text that ships with the package (``bundled:de``) or local files. Shipped text comes already split; local
files are split by a hash of the document id, so that a document is on the same side in every run, on every machine and
(for parallel corpora that share ids) in every language.
"""

import glob
import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_warn

from koff_lightning.data.readers import Document, OnBad, format_of, read_file
from koff_lightning.errors import KoffError

BUNDLED = "bundled:"
BUNDLED_DIR = Path(__file__).resolve().parents[1] / "tiny" / "corpora"
SAFE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class DomainSource:
    """Text of one domain.

    Args:
        files: ``bundled:<name>``, a file, or a glob (``**`` for any depth), or a list of these. Kinds of file: jsonl,
            csv, txt (one document per file), each also .gz, .xz or .zst, and parquet.
        text_field: Field or column that holds the text.
        id_field: Field or column that holds the document id; documents without one are split by their text.
        weight: Share of the training rows relative to the other domains.
    """

    files: str | list[str]
    text_field: str = "text"
    id_field: str = "id"
    weight: float = 1.0

    @property
    def entries(self) -> list[str]:
        """`files` as a list."""
        return [self.files] if isinstance(self.files, str) else list(self.files)


class Texts(NamedTuple):
    """The texts of one domain, split by document."""

    train: list[str]
    heldout: list[str]


def is_heldout(doc_id: str, fraction: float) -> bool:
    """Whether the document with this id is held out; depends on nothing but the id."""
    return _hash(doc_id) / 2**32 < fraction


def _hash(doc_id: str) -> int:
    return int(hashlib.sha256(doc_id.encode()).hexdigest()[:8], 16)


def as_sources(domains: Mapping[str, DomainSource | str | list[str]]) -> dict[str, DomainSource]:
    """Check names and weights and write the short forms (one entry, a list of entries) in full.

    Raises:
        KoffError: No domain, a name that is not safe as a file name, two names that differ in case only, a domain
            without files, or a weight that is not a finite number above 0.
    """
    if not domains:
        raise KoffError("data.domains is empty: name at least one domain, for example 'de: bundled:de'")
    sources: dict[str, DomainSource] = {}
    for name, value in domains.items():
        _check_name(name, sources)
        source = value if isinstance(value, DomainSource) else DomainSource(value)
        if not source.entries:
            raise KoffError(
                f"domain '{name}' has an empty list of files: give at least one file, glob or 'bundled:<name>'"
            )
        if isinstance(source.weight, bool) or not (math.isfinite(source.weight) and source.weight > 0):
            raise KoffError(f"domain '{name}': weight must be a finite number above 0, got {source.weight}")
        sources[name] = source
    return sources


def _check_name(name: object, known: Mapping[str, DomainSource]) -> None:
    if not isinstance(name, str):  # YAML reads an unquoted no as false (and 1 as a number)
        raise KoffError(f"domain name {name!r} is not text: put it in quotes, for example 'no': (Norwegian) or '1':")
    if not SAFE_NAME.fullmatch(name):
        raise KoffError(
            f"domain name {name!r} is not safe as a file name: use 1 to 64 of the letters a-z A-Z, digits, '_' and '-'"
        )
    clash = next((other for other in known if other.lower() == name.lower()), None)
    if clash is not None:
        raise KoffError(
            f"duplicate domain names '{clash}' and '{name}': they would share a file on some systems; rename one"
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
    the order of the id's hash, leaving out documents that do not fit.

    Raises:
        KoffError: Bad files or lines (see `readers`), or a side of the split that is left without text.
    """
    skipped: list[str] = []

    def on_bad(message: str) -> None:
        if on_bad_line == "fail":
            raise KoffError(f"{message}. Mend it, or set data.on_bad_line=skip to leave such lines out")
        skipped.append(message)

    train, heldout = _split(_labelled(source, heldout_fraction, on_bad), max_train_bytes)
    if skipped:
        rank_zero_warn(f"domain '{name}': left out {len(skipped)} line(s) that could not be used, first {skipped[0]}")
    held_texts = {document.text for document in heldout}
    texts = Texts([d.text for d in train if d.text not in held_texts], _fill(heldout, max_heldout_bytes))
    if not (train or heldout or max_train_bytes):
        raise KoffError(f"domain '{name}' is empty: its files hold no document with text")
    if not texts.train:
        raise KoffError(
            f"domain '{name}' has no training text: its documents are held out, repeat one that is, or exceed "
            f"data.max_train_bytes={max_train_bytes}. Add documents, or change heldout_fraction={heldout_fraction:.3g}"
        )
    if not heldout:
        raise KoffError(
            f"domain '{name}' has no held-out text: none of the {len(train)} document(s) read falls in the "
            f"{heldout_fraction:.3g} chosen by hash. Add documents, or raise data.heldout_fraction"
        )
    if not texts.heldout:
        raise KoffError(
            f"domain '{name}': none of its {len(heldout)} held-out document(s) fits in "
            f"data.max_heldout_bytes={max_heldout_bytes}: raise it (whole documents are taken)"
        )
    return texts


def _labelled(source: DomainSource, fraction: float, on_bad: OnBad) -> Iterator[tuple[bool, Document]]:
    """Yield (held out?, document): shipped text as it was split, local files by the hash of the id."""
    bundled = [entry.removeprefix(BUNDLED) for entry in source.entries if entry.startswith(BUNDLED)]
    for split in ("heldout", "train"):  # held-out first: reading stops when the training text is full
        for path in [bundled_file(entry, split) for entry in bundled]:
            yield from ((split == "heldout", document) for document in read_file(path, "text", "id", on_bad))
    for path in expand_files([entry for entry in source.entries if not entry.startswith(BUNDLED)]):
        for document in read_file(path, source.text_field, source.id_field, on_bad):
            yield is_heldout(document.id, fraction), document


def _split(
    documents: Iterator[tuple[bool, Document]], max_train_bytes: int | None
) -> tuple[list[Document], list[Document]]:
    train: list[Document] = []
    heldout: list[Document] = []
    size = 0
    for held, document in documents:
        if held:
            heldout.append(document)
            continue
        size += len(document.text.encode())
        if max_train_bytes is not None and size > max_train_bytes:
            break
        train.append(document)
    return train, heldout


def _fill(documents: list[Document], max_bytes: int | None) -> list[str]:
    """Take documents in the order of their hash, a sample that does not depend on file order, while they fit."""
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


def bundled_domains() -> list[str]:
    """Names of the domains whose text ships with the package."""
    return sorted(path.name.split(".")[0] for path in BUNDLED_DIR.glob("*.train.jsonl.xz"))


def bundled_file(name: str, split: str) -> Path:
    """Path of one split of a bundled domain, or a KoffError that lists the bundled domains."""
    if name not in bundled_domains():
        raise KoffError(f"unknown bundled domain '{name}'; bundled are: {', '.join(bundled_domains()) or 'none'}")
    return BUNDLED_DIR / f"{name}.{split}.jsonl.xz"


def expand_files(patterns: list[str]) -> list[Path]:
    """Expand files and globs, each pattern in sorted order, a file that matches twice only once.

    Raises:
        KoffError: A pattern that matches nothing, a folder, or a file of unknown kind.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            raise KoffError(f"'{pattern}' is a folder: name the files in it, for example '{path / '*.jsonl'}'")
        matches = (
            [path] if path.is_file() else list(filter(Path.is_file, map(Path, glob.glob(str(path), recursive=True))))
        )
        if not matches:
            raise KoffError(f"no file matches '{pattern}' (looked in {Path.cwd()}): correct the path or glob")
        for match in sorted(matches):
            format_of(match)  # refuse an unknown kind before hours of reading, not after
            found[match] = None
    return list(found)
