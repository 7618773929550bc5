"""Tokenised text on disk: made once by `koff prepare`, then mapped into memory by every run that wants just this.

An entry's name is a hash of all that its content depends on: the bytes of the files, how they are read and split, the
tokenizer, the length of rows. It appears in full or not at all, and a second builder of the same entry waits for the
first.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from koff_lightning.artefact.new_folder import new_folder
from koff_lightning.data.packing import PackedRows, TokenStream, pack, tokenize
from koff_lightning.data.sources import BUNDLED, HUB, DomainSource, bundled_file, expand_files
from koff_lightning.data.split import Texts
from koff_lightning.errors import KoffError

try:
    import fcntl
except ImportError:  # Windows: two builders may both do the work, and one of them is told that it was in vain
    fcntl = None

FORMAT = 1  # of an entry; part of its name
ARRAYS = ("tokens", "starts", "first_segment", "documents", "shares")  # of PackedRows
DIGESTS = "digests.json"  # of files whose size and time of change are still the same


@dataclass(frozen=True)
class DomainRows:
    """A domain's text, ready for batches."""

    train: PackedRows
    heldout: PackedRows
    documents: TokenStream  # the training text


def domain_rows(name: str, texts: Texts, tokenizer: PreTrainedTokenizerBase, seq_len: int) -> DomainRows:
    """Tokenise and pack a domain's texts.

    Raises:
        KoffError: A side has no document that is two tokens or longer.
    """
    train, heldout = tokenize(texts.train, tokenizer), tokenize(texts.heldout, tokenizer)
    for split, stream in (("training", train), ("held-out", heldout)):
        if not len(stream.tokens):
            raise KoffError(f"domain '{name}': no {split} document is two tokens or longer; give it longer text")
    pad_id = tokenizer.pad_token_id or 0  # never predicted nor attended to: any token serves
    rows = (
        pack(stream, seq_len, overlap=overlap, pad_id=pad_id) for stream, overlap in ((train, False), (heldout, True))
    )
    return DomainRows(*rows, documents=train)


def default_folder() -> Path:
    """Where tokenised text is kept: $KOFF_CACHE/tokens, or ~/.cache/koff/tokens."""
    return Path(os.environ.get("KOFF_CACHE") or "~/.cache/koff").expanduser() / "tokens"


class TokenCache:
    """Tokenised domains by what they are made of.

    Args:
        folder: Where the entries lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, source: DomainSource, **options: Any) -> str:
        """Name of an entry.

        Text from the hub counts by its name: pin a revision (``hub:name@commit``) where it may change.

        Args:
            source: The domain.
            options: Everything else that decides what the rows are, in plain values.

        Raises:
            KoffError: Files that are not there.
        """
        entries = source.entries
        files = expand_files([entry for entry in entries if not entry.startswith((BUNDLED, HUB))])
        bundled = [entry.removeprefix(BUNDLED) for entry in entries if entry.startswith(BUNDLED)]
        shipped = [bundled_file(name, split) for split in ("heldout", "train") for name in bundled]
        what = {
            "format": FORMAT,
            "heldout": self._digests(expand_files(source.heldout_entries)),
            "bundled": self._digests(shipped),
            "files": self._digests(files),
            "hub": [entry for entry in entries if entry.startswith(HUB)],
            "fields": [source.text_field, source.id_field, source.subset, source.split],
            **options,
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]

    def _digests(self, files: list[Path]) -> list[str]:
        """SHA-256 of each file; read again only where size or time of change are others than when last read."""
        memo = self.folder / DIGESTS
        try:
            known = json.loads(memo.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            known = {}
        new, found = {}, []
        for file in files:
            stat = file.stat()
            seen = known.get(str(file.resolve()))
            if not (isinstance(seen, list) and seen[:2] == [stat.st_size, stat.st_mtime_ns]):
                with file.open("rb") as content:
                    seen = [stat.st_size, stat.st_mtime_ns, hashlib.file_digest(content, "sha256").hexdigest()]
                new[str(file.resolve())] = seen
            found.append(seen[2])
        if new and self.folder.is_dir() and os.access(self.folder, os.W_OK):
            part = memo.with_name(f".{DIGESTS}.{os.getpid()}")
            part.write_text(json.dumps(known | new), encoding="utf-8")
            part.replace(memo)  # of two writers at once one is forgotten, and its files are read once more
        return found

    def load(self, key: str) -> DomainRows | None:
        """An entry mapped into memory, or None where there is none.

        Raises:
            KoffError: It is damaged.
        """
        folder = self.folder / key
        if not folder.is_dir():
            return None
        try:
            train, heldout = (self._rows(folder / side) for side in ("train", "heldout"))
            lengths, num_bytes = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("lengths", "num_bytes"))
        except (OSError, ValueError, TypeError) as error:
            raise KoffError(f"tokenised text in {folder} is damaged ({error}): delete that folder") from error
        return DomainRows(train, heldout, TokenStream(train.tokens.reshape(-1)[: lengths.sum()], lengths, num_bytes))

    def _rows(self, folder: Path) -> PackedRows:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        return PackedRows(**arrays, padding=int(np.load(folder / "padding.npy")))

    def build(self, key: str, make: Callable[[], DomainRows]) -> bool:
        """Make an entry unless it is there; returns whether it was made.

        Raises:
            KoffError: The disk does not take it.
        """
        with self._alone(key):
            if (self.folder / key).is_dir():
                return False
            rows = make()
            with new_folder(self.folder / key) as work:
                for side, packed in (("train", rows.train), ("heldout", rows.heldout)):
                    (work / side).mkdir()
                    for name, value in vars(packed).items():
                        np.save(work / side / f"{name}.npy", value)
                np.save(work / "lengths.npy", rows.documents.lengths)
                np.save(work / "num_bytes.npy", rows.documents.num_bytes)
        return True

    @contextmanager
    def _alone(self, key: str) -> Iterator[None]:
        """Wait until no other process builds this entry; a lock goes with its process, however that ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.folder / f".{key}.lock", os.O_CREAT | os.O_RDWR)
        except OSError as error:
            raise KoffError(f"cannot write {self.folder}: {error.strerror or error}") from error
        try:
            if fcntl:
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)
