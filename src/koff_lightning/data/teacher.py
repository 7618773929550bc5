"""The dense model's predictions on the training rows, stored once: runs map them into memory and need no teacher pass.

For each place of each row, whether its next token is predicted in training or not, the store holds the k tokens that
the dense model finds likeliest, likeliest first: their ids, as the smallest unsigned integers that fit the vocabulary,
and their log-probabilities among all tokens in fp16, which is the more precise the likelier a token is.

A store is valid for one backbone's weights, one tokenizer, and exactly these rows. It appears in full or not at all.
Two processes never write the same store: one goes on to the next domain's, or waits. If a writer was killed the next
one continues its work.

Shapes: R rows, T tokens per row, k stored tokens, V size of the vocabulary.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from koff_lightning.data.cache import MANIFEST, alone_with, check_entry, is_whole, read_own
from koff_lightning.data.packing import PackedRows, collate
from koff_lightning.losses import TopK
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import flush, hash_file, write_atomically

FOLDER = "teacher"  # in the cache of tokenised text
INDEX, LOG_Q = "teacher_index", "teacher_log_q"  # names in a batch
DONE = "rows.json"  # in an unfinished store: number of rows that are certainly on the disk
SAVED, SAID = 30.0, 10.0  # seconds between two updates of DONE, and between two lines of progress
MAKE = "`koff prepare --teacher` with the same options makes it"


@dataclass(frozen=True)
class Belongs:
    """What a stored teacher was made of, and is valid for.

    Attributes:
        backbone: Hash of the dense model's weights.
        tokenizer: Hash of the tokenizer.
        seq_len: Tokens per row.
        text: Hash of all rows.
    """

    backbone: str
    tokenizer: str
    seq_len: int
    text: str


WORDS = {  # how a message names a difference in each; the first that differs is named
    "backbone": "is of another backbone: model.backbone, its revision or model.dtype (weights {} there, {} here)",
    "tokenizer": "is of another tokenizer ({} there, {} here)",
    "seq_len": "is of rows of another length: data.seq_len is {} there and {} here",
    "text": "is of other text: files, limits, split or open_with_start of data ({} there, {} here)",
}


@dataclass(frozen=True)
class StoredTeacher:
    """The teacher of one domain's training rows.

    Attributes:
        index: The likeliest tokens, [R, T - 1, k].
        log_q: Their log-probabilities, fp16 [R, T - 1, k].
    """

    index: NDArray[np.unsignedinteger]
    log_q: NDArray[np.float16]


def rows_hash(rows: PackedRows) -> str:
    """A hash of all that a model sees of the rows: tokens and boundaries."""
    digest = hashlib.sha256(f"{rows.tokens.shape} {rows.padding}".encode())
    if rows.inside.size:
        digest.update(f"{rows.start}".encode() + rows.inside.tobytes())
    for some in range(0, len(rows), 4096):
        taken = rows.useful[some : some + 4096]
        digest.update(np.ascontiguousarray(rows.tokens[taken]))
        digest.update(np.ascontiguousarray(rows.starts[taken]))
    return digest.hexdigest()


def index_type(vocabulary: int) -> np.dtype:
    """The smallest unsigned integer that holds every token of a vocabulary."""
    return np.min_scalar_type(vocabulary - 1)


def stored_bytes(rows: PackedRows, k: int, vocabulary: int) -> int:
    """Bytes that a stored teacher takes on disk."""
    return len(rows) * (rows.tokens.shape[1] - 1) * k * (index_type(vocabulary).itemsize + 2)


def teacher_of_rows(teachers: Mapping[str, StoredTeacher], refs: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
    """What stored teachers add to a batch of (domain, row): int32 ids and fp16 log-probabilities, [B, T - 1, k]."""
    index = np.stack([teachers[domain].index[row].astype(np.int32) for domain, row in refs])
    log_q = np.stack([teachers[domain].log_q[row] for domain, row in refs])
    return {INDEX: torch.from_numpy(index), LOG_Q: torch.from_numpy(log_q)}


class TeacherStore:
    """Stored teachers in a folder.

    Args:
        folder: Folder that holds them, each in a folder of its own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, domain: str, belongs: Belongs, k: int) -> StoredTeacher:
        """A domain's stored teacher, mapped into memory and cut to the k likeliest tokens.

        Raises:
            KoffError: There is none, or one that belongs to something else, holds fewer tokens, or is damaged.
        """
        found = list(self._all())
        fitting = [about for about in found if about["belongs"] == asdict(belongs)]
        wide = sorted((about for about in fitting if about["top_k"] >= k), key=lambda about: about["top_k"])
        if not wide:
            raise KoffError(self._missing(domain, belongs, k, fitting, found))
        about = wide[0]
        folder, shape = self.folder / about["name"], (about["rows"], belongs.seq_len - 1, about["top_k"])
        try:
            check_entry(folder, lambda file, size, digest: file.stat().st_size == size)
            index = np.memmap(folder / "index.bin", index_type(about["vocabulary"]), "r", shape=shape)
            log_q = np.memmap(folder / "log_q.bin", np.float16, "r", shape=shape)
        except (OSError, ValueError, TypeError) as error:
            raise KoffError(f"the stored teacher in {folder} is damaged ({error}): {MAKE} anew") from error
        return StoredTeacher(index[..., :k], log_q[..., :k])

    def _all(self) -> Iterator[dict[str, Any]]:
        """The description of each store."""
        for file in sorted(self.folder.glob("*/about.json")):
            about = read_own(file)
            if {"belongs", "domain", "rows", "top_k", "vocabulary"} <= about.keys():
                yield about | {"name": file.parent.name}

    def _missing(
        self, domain: str, belongs: Belongs, k: int, fitting: list[dict[str, Any]], found: list[dict[str, Any]]
    ) -> str:
        """Why no store fits: in what the most similar one of this domain differs."""
        here = asdict(belongs)
        near = [about for about in found if about["domain"] == domain and isinstance(about["belongs"], dict)]
        near.sort(key=lambda about: sum(about["belongs"].get(name) != value for name, value in here.items()))
        if fitting:
            most = max(about["top_k"] for about in fitting)
            why = f"holds the {most} likeliest tokens, and loss.top_k asks for {k}"
        elif near:
            there = near[0]["belongs"]
            name = next(name for name in here if there.get(name) != here[name])
            why = WORDS[name].format(str(there.get(name))[:12], str(here[name])[:12])
        else:
            return (
                f"loss.teacher is stored, and there is no stored teacher of domain '{domain}' in {self.folder}: {MAKE}"
            )
        return f"loss.teacher is stored, and the stored teacher of domain '{domain}' {why}: {MAKE}"

    def build(
        self,
        domain: str,
        belongs: Belongs,
        rows: PackedRows,
        ask: Callable[[dict[str, Any]], TopK],
        k: int,
        vocabulary: int,
        batch_size: int,
        wait: bool = True,
    ) -> bool | None:
        """Store a teacher's predictions unless they are there and intact.

        Args:
            domain: Name, for messages.
            belongs: What the store belongs to.
            rows: Training rows.
            ask: The teacher: a batch of rows -> its likeliest tokens at all B (T - 1) places, k each.
            k: Tokens to store.
            vocabulary: V.
            batch_size: Rows of a batch.
            wait: Wait for another process that stores the same.

        Returns:
            Whether this was still to do; None where another process is at it, and was not waited for.

        Raises:
            KoffError: The disk does not take it.
        """
        about = {"belongs": asdict(belongs), "rows": len(rows), "top_k": k, "vocabulary": vocabulary}
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
        if is_whole(self.folder / key):  # also where nobody may write
            return False
        with alone_with(self.folder, key, wait) as alone:
            if not alone:
                return None
            if is_whole(self.folder / key):
                return False
            work = self.folder / f".{key}.part"
            work.mkdir(exist_ok=True)
            _write_rows(domain, work, rows, ask, k, index_type(vocabulary), batch_size)
            _finish(work, self.folder / key, about | {"domain": domain})
        return True


def _write_rows(
    domain: str,
    work: Path,
    rows: PackedRows,
    ask: Callable[[dict[str, Any]], TopK],
    k: int,
    kind: np.dtype,
    batch_size: int,
) -> None:
    """Append the missing rows to an unfinished store; every `SAVED` seconds flush them and note how many in DONE."""
    kinds = {"index.bin": kind, "log_q.bin": np.dtype(np.float16)}
    sizes = {name: (rows.tokens.shape[1] - 1) * k * kind.itemsize for name, kind in kinds.items()}  # bytes of a row
    done = read_own(work / DONE).get("rows", 0)
    present = [(work / name).stat().st_size // size if (work / name).exists() else 0 for name, size in sizes.items()]
    done = min([done, *present])
    files = {name: (work / name).open("r+b" if (work / name).exists() else "w+b") for name in kinds}
    saved = said = time.monotonic()
    try:
        for name, file in files.items():
            file.truncate(done * sizes[name])
            file.seek(0, os.SEEK_END)
        for first in range(done, len(rows), batch_size):
            end = min(first + batch_size, len(rows))
            seen = ask(collate([(domain, rows, row) for row in range(first, end)]))
            for name, values in (("index.bin", seen.index), ("log_q.bin", seen.log_q)):
                files[name].write(values.cpu().numpy().astype(kinds[name]).tobytes())
            now = time.monotonic()
            if now - said > SAID:
                said = now
                print(f"{domain}: {end:,} of {len(rows):,} rows", flush=True)
            if now - saved > SAVED or end == len(rows):
                saved = now
                for file in files.values():
                    file.flush()
                    os.fsync(file.fileno())
                write_atomically(work / DONE, json.dumps({"rows": end}))
    finally:
        for file in files.values():
            file.close()


def _finish(work: Path, target: Path, about: dict[str, Any]) -> None:
    """Write the manifest of a complete store and rename it to where runs look for it."""
    write_atomically(work / "about.json", json.dumps(about))
    parts = [work / name for name in ("about.json", "index.bin", "log_q.bin")]
    files = {part.name: [part.stat().st_size, hash_file(part)] for part in parts}  # minutes for a large store
    write_atomically(work / MANIFEST, json.dumps(files))
    for file in [*work.iterdir(), work]:
        flush(file)
    shutil.rmtree(target, ignore_errors=True)  # a damaged one
    work.rename(target)
    (target / DONE).unlink(missing_ok=True)  # only now: a writer that is killed before goes on from there
    flush(target.parent)
