"""Tokenised text on disk: made once by `koff prepare`, then mapped into memory by every run that needs it.

The name of an entry is a hash of all that its content depends on: the bytes of the files and their format, how they are
read and split, the tokenizer, the length of rows, the code that makes them. An entry appears in full or not at all,
and a second builder of the same entry waits for the first. It lists its files with size and hash: runs check the sizes;
`koff prepare` checks the hashes and makes a damaged entry again.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from koff_lightning.data.bundled_tokens import Tokenise
from koff_lightning.data.encoding import TokenStream, makers, tokenize
from koff_lightning.data.packing import PackedRows, pack
from koff_lightning.data.readers import OnBad, format_of, refuse
from koff_lightning.data.remote import RemoteFile
from koff_lightning.data.sources import Chat, DomainSource, bundled_file, expand_files
from koff_lightning.data.split import Texts
from koff_lightning.data.talks import check_template, tokenize_talks
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import hash_file, lock, new_folder, write_atomically

MANIFEST = "entry.json"  # of an entry: its files with size and SHA-256
ARRAYS = ("tokens", "starts", "first_segment", "documents", "shares", "predicted")  # of PackedRows
OPENING = ("inside", "start")  # of PackedRows too, if rows inside of documents begin with a start token
NOTABLE, MOSTLY = 0.01, 0.5  # shares of a text that a tokenizer does not know, from which it warns and refuses
DIGESTS = "digests.json"  # hashes of text files, valid while size and time of change are the same


@dataclass(frozen=True)
class DomainRows:
    """A domain's text, ready for batches."""

    train: PackedRows
    heldout: PackedRows
    documents: TokenStream  # the training text: the same tokens as in `train`


def domain_rows(
    name: str,
    texts: Texts,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    append_eos: bool = False,
    chat: Chat | None = None,
    on_bad: OnBad = refuse,
    tokenise: Tokenise = tokenize,
    open_with_start: int | None = None,
) -> DomainRows:
    """Tokenise and pack a domain's texts; the end token, if it is wanted, goes into training text only.

    Args:
        name: Name of the domain.
        texts: Its documents; of talks their messages as JSON.
        tokenizer: Tokenizer of the backbone.
        seq_len: Tokens per row.
        append_eos: Put the end token behind each training document; a talk ends as its template ends it.
        chat: If texts are talks: what of them is predicted.
        on_bad: Called with what is wrong with a talk.
        tokenise: Tokenises texts that are no talks.
        open_with_start: `start` of `pack`.

    Raises:
        KoffError: A side has no document that is two tokens or longer, or the tokenizer cannot read most of it.
    """
    if chat:
        check_template(tokenizer, name)
        train, heldout = (tokenize_talks(side, tokenizer, chat, on_bad) for side in texts)
    else:
        train, heldout = tokenise(texts.train, tokenizer, append_eos), tokenise(texts.heldout, tokenizer, False)
    for split, stream in (("training", train), ("held-out", heldout)):
        if not len(stream.tokens):
            raise KoffError(f"domain '{name}': no {split} document is two tokens or longer; give it longer text")
        _check_known(name, split, stream)
    pad_id = tokenizer.pad_token_id or 0  # never predicted nor attended to, so any token will do
    how = {"pad_id": pad_id, "start": open_with_start}
    rows, heldout_rows = (pack(s, seq_len, overlap=s is heldout, **how) for s in (train, heldout))
    if not len(rows):
        raise KoffError(f"domain '{name}': no row of data.seq_len={seq_len} tokens predicts anything: raise it")
    return DomainRows(rows, heldout_rows, _unpacked(rows, train.lengths, train.num_bytes))


def _check_known(name: str, split: str, stream: TokenStream) -> None:
    """Warn if a tokenizer without byte fallback does not know a part of a text, and refuse if it is most of it.

    Raises:
        KoffError: More than `MOSTLY` of the bytes are unknown.
    """
    unknown = int(stream.unknown_bytes.sum())
    share = unknown / max(1, unknown + int(stream.num_bytes.sum()))
    if share > MOSTLY:
        raise KoffError(
            f"domain '{name}': the tokenizer does not know {share:.0%} of the {split} text (by bytes), so there is "
            "little to learn and less to score: take a backbone whose tokenizer reads this text, or leave the domain "
            "out"
        )
    if share > NOTABLE:
        rank_zero_warn(
            f"domain '{name}': the tokenizer does not know {share:.1%} of the {split} text (by bytes): it puts its "
            "unknown token there, or nothing. Bits per byte do not count these bytes, but count what the tokens cost"
        )


def _unpacked(rows: PackedRows, lengths: NDArray[np.int64], num_bytes: NDArray[np.int64]) -> TokenStream:
    """The documents in training rows, as a view of the rows' tokens."""
    return TokenStream(rows.tokens.reshape(-1)[: lengths.sum()], lengths, num_bytes)


class TokenCache:
    """Tokenised domains by what they are made of.

    Args:
        folder: Folder that holds the entries.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def key(self, source: DomainSource, **options: Any) -> str:
        """Name of the folder that holds a domain's tokens.

        Text from the hub counts by its name: pin a revision (``hub:name@commit``) where it may change.

        Args:
            source: The domain.
            options: Everything else that decides what the rows are, in plain values.

        Raises:
            KoffError: Files that are not there.
        """
        fields = source.fields
        shipped = [bundled_file(name, split) for split in ("heldout", "train") for name in source.bundled_entries]
        what = {
            "made by": makers(),
            "heldout": self._digests(expand_files(source.heldout_entries)),
            "bundled": self._digests(shipped),
            "files": self._digests(expand_files(source.file_entries)),
            "hub": source.hub_entries,
            "fields": [fields.text, fields.id, source.subset, source.split, source.chat, *fields.where]
            + ([{"max_documents": source.max_documents}] if source.max_documents else []),
            **options,
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]

    def _digests(self, files: list[Path | RemoteFile]) -> list[list[str]]:
        """Format, suffix and SHA-256 of each file, read again only if its size or time of change differ from the last.

        For remote files the version that their server states.
        """
        known, new, found = read_own(self.folder / DIGESTS), {}, []
        for file in files:
            if isinstance(file, RemoteFile):
                found.append([format_of(file), file.suffix, file.version])
                continue
            name = str(file.resolve())
            try:
                stat = file.stat()
                seen = known.get(name)
                if not (isinstance(seen, list) and len(seen) == 3 and seen[:2] == [stat.st_size, stat.st_mtime_ns]):
                    new[name] = seen = [stat.st_size, stat.st_mtime_ns, hash_file(file)]
            except OSError as error:
                raise KoffError(f"cannot read {file}: {error.strerror or error}") from error
            found.append([format_of(file), file.suffix, seen[2]])
        if new and self.folder.is_dir():
            self._remember(known | new)
        return found

    def _remember(self, digests: dict[str, Any]) -> None:
        """Save digests if the folder can be written; if two write at once, one is lost."""
        with suppress(KoffError):
            write_atomically(self.folder / DIGESTS, json.dumps(digests))

    def load(self, key: str) -> DomainRows | None:
        """An entry mapped into memory, or None where there is none.

        Raises:
            KoffError: The entry is damaged.
        """
        folder = self.folder / key
        if not folder.is_dir():
            return None
        try:
            check_entry(folder, lambda file, size, digest: file.stat().st_size == size)
            train, heldout = (self._rows(folder / side) for side in ("train", "heldout"))
            lengths, num_bytes = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("lengths", "num_bytes"))
        except (OSError, ValueError, TypeError) as error:
            raise KoffError(
                f"tokenised text in {folder} is damaged ({error}): `koff prepare` with the same --config makes it anew"
            ) from error
        return DomainRows(train, heldout, _unpacked(train, lengths, num_bytes))

    def _rows(self, folder: Path) -> PackedRows:
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        if (folder / "start.npy").is_file():
            inside, start = (np.load(folder / f"{name}.npy") for name in OPENING)
            arrays |= {"inside": inside, "start": int(start)}
        return PackedRows(**arrays, padding=int(np.load(folder / "padding.npy")))

    def build(self, key: str, make: Callable[[], DomainRows]) -> bool:
        """Make an entry unless it is there and whole; returns whether it was made.

        Raises:
            KoffError: The disk does not take it.
        """
        if is_whole(self.folder / key):  # also where nobody may write
            return False
        with alone_with(self.folder, key):
            if is_whole(self.folder / key):
                return False
            rows = make()
            if not (self.folder / key / MANIFEST).is_file():  # what tidies up old files may take it and leave the rest
                shutil.rmtree(self.folder / key, ignore_errors=True)
            with new_folder(self.folder / key, overwrite=True, marker=MANIFEST) as work:
                for side, packed in (("train", rows.train), ("heldout", rows.heldout)):
                    (work / side).mkdir()
                    for name in (*ARRAYS, "padding", *(OPENING if packed.inside.size else ())):
                        np.save(work / side / f"{name}.npy", getattr(packed, name))
                np.save(work / "lengths.npy", rows.documents.lengths)
                np.save(work / "num_bytes.npy", rows.documents.num_bytes)
                files = {str(f.relative_to(work)): [f.stat().st_size, hash_file(f)] for f in work.rglob("*.npy")}
                (work / MANIFEST).write_text(json.dumps(files), encoding="utf-8")
        return True


@contextmanager
def alone_with(folder: Path, key: str, wait: bool = True) -> Iterator[bool]:
    """Wait until no other process builds this entry; a process that ends in any way frees its lock.

    Args:
        folder: Folder of the entries.
        key: Name of this one.
        wait: Otherwise the block runs at once, and is told whether no other process is at it.

    Raises:
        KoffError: The disk does not take it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / f".{key}.lock", wait=wait) as held:
            yield held
    except OSError as error:
        raise KoffError(f"cannot write {folder}: {error.strerror or error}") from error


def check_entry(folder: Path, is_right: Callable[[Path, int, str], bool]) -> None:
    """Raise ValueError unless an entry has all its files and each is right."""
    files = read_own(folder / MANIFEST)
    wrong = [name for name, (size, digest) in files.items() if not is_right(folder / name, size, digest)]
    if wrong or not files:
        raise ValueError(f"{wrong[0] if wrong else MANIFEST} is not as it was written")


def is_whole(folder: Path) -> bool:
    """Whether every byte of an entry is as it was written."""
    try:
        check_entry(folder, lambda file, size, digest: hash_file(file) == digest)
    except (OSError, ValueError, TypeError):
        return False
    return True


def read_own(path: Path) -> dict[str, Any]:
    """The content of a JSON file of ours; empty if there is none or it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
