"""Copies of the heads of hub datasets, for runs that stream where there is no network: `koff prepare --prefetch-only`.

A copy is a folder of parquet files with text and id of a dataset's first documents, and a list of them that says how
much was asked for. It appears in full or not at all.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from koff_lightning.data.readers import Document, Fields, OnBad
from koff_lightning.data.retries import read_with_retries, warn
from koff_lightning.data.shards import FileShard, HubShard
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import new_folder, own_cache

PIECE = 64 * 2**20  # bytes of text in a file: some dozens of files in a few GB, so that many readers get whole ones
MANIFEST = "copy.json"


def find_copy(repo: str, subset: str | None, split: str, fields: Fields) -> list[FileShard]:
    """The files of a dataset's copy, in its order; none where there is no copy.

    Raises:
        KoffError: A copy whose files are not those that were written.
    """
    folder = _folder(repo, subset, split, fields)
    if (manifest := _manifest(folder)) is None:
        return []
    for name, size in manifest["files"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise KoffError(
                f"the copy of hub:{repo} in {folder} is damaged ({name}): delete the folder, and where there is a "
                "network `koff prepare --prefetch-only` makes it anew"
            )
    warn(
        f"no network: of hub:{repo} only the {manifest['num_bytes']:,} bytes of text are read that `koff prepare "
        "--prefetch-only` has copied"
    )
    return [FileShard(folder / name) for name in manifest["files"]]


def make_copy(repo: str, shards: Sequence[HubShard], num_bytes: int, on_bad: OnBad) -> None:
    """Copy the first documents of a dataset, unless that many are copied already.

    Args:
        repo: Its name as the config has it.
        shards: All shards of the dataset.
        num_bytes: UTF-8 bytes of text to copy; with the last document it may be more.
        on_bad: What to do with a record that cannot be used.

    Raises:
        KoffError: The dataset cannot be read, or the copy not be written.
    """
    first = shards[0]
    folder = _folder(repo, first.subset, first.split, first.fields)
    manifest = _manifest(folder)
    if manifest and (manifest["whole"] or manifest["asked"] >= num_bytes):
        return
    with new_folder(folder, overwrite=True, marker=MANIFEST) as work:
        files, copied = {}, 0
        for number, documents in enumerate(_pieces(shards, num_bytes, on_bad)):
            path = work / f"{number:05d}.parquet"
            _write(path, documents)
            files[path.name] = path.stat().st_size
            copied += sum(len(document.text.encode()) for document in documents)
        whole = copied < num_bytes
        content = {"of": first.repo, "asked": num_bytes, "num_bytes": copied, "whole": whole, "files": files}
        (work / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _folder(repo: str, subset: str | None, split: str, fields: Fields) -> Path:
    what: list[Any] = [repo, subset, split, fields.text, fields.id]
    what += ["chat"] * fields.chat + [fields.where] * bool(fields.where)  # of talks the JSON of their messages is kept
    named = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    return own_cache() / "hub" / f"{re.sub('[^A-Za-z0-9]+', '-', repo)[-60:]}-{named}"


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise KoffError(f"cannot read {folder / MANIFEST}: {error}. Delete the folder and fetch it again") from error


def _pieces(shards: Sequence[HubShard], num_bytes: int, on_bad: OnBad) -> Iterator[list[Document]]:
    """Yield the first documents in groups of one file each."""
    piece: list[Document] = []
    size = 0
    for shard in shards:
        for _, document in read_with_retries(shard, on_bad):
            piece.append(document)
            size += len(document.text.encode())
            if size >= min(PIECE, num_bytes):
                yield piece
                num_bytes, piece, size = num_bytes - size, [], 0
            if num_bytes <= 0:
                return
    if piece:
        yield piece


def _write(path: Path, documents: Sequence[Document]) -> None:
    import pyarrow  # here: importing it costs a fifth of a second
    import pyarrow.parquet

    ids = [None if document.id == document.text else document.id for document in documents]  # None: the text is the id
    table = pyarrow.table({"text": [document.text for document in documents], "id": pyarrow.array(ids, "string")})
    pyarrow.parquet.write_table(table, path, compression="zstd", row_group_size=1024)
