"""Shards: the pieces in which text is read (files, shards of hub datasets), and who reads which of them."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from koff_lightning.data.readers import (
    ALL,
    Document,
    Fields,
    OnBad,
    Part,
    as_document,
    read_columns,
    read_records,
    require_column,
)
from koff_lightning.data.remote import RemoteFile
from koff_lightning.data.retries import with_retries

ENDS = 2**16  # bytes at either end of a file that its digest is of
UNEVEN = 1.05  # readers get whole shards if the largest load is at most this many times the smallest
OFFLINE_SHARDS = 64  # number of shards into which a dataset in the cache is divided


class Shard(Protocol):
    """A piece of a domain's text whose records are numbered from 0."""

    name: str  # does not change when a corpus moves to another folder
    until: int | None  # number of the record at which reading ends
    size: int | None  # bytes, None if unknown
    digest: str  # differs for other content of the same name and size; empty if the name differs too

    def read(self, on_bad: OnBad, part: Part = ALL) -> Iterator[tuple[int, Document]]:
        """Yield (number, document) of the usable records in `part`."""
        ...


@dataclass(frozen=True)
class FileShard:
    """A file of any kind in `readers`."""

    path: Path | RemoteFile
    fields: Fields = field(default_factory=Fields)
    until: int | None = None  # number of the record at which reading ends

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.path.name

    @property
    def size(self) -> int | None:
        """Bytes on disk."""
        return self.path.stat().st_size if isinstance(self.path, Path) else self.path.size

    @property
    def digest(self) -> str:
        """Hash of the first and the last bytes of a file on disk, which may be large."""
        if not isinstance(self.path, Path):
            return ""
        with self.path.open("rb") as file:
            head = file.read(ENDS)
            file.seek(max(file.seek(0, os.SEEK_END) - ENDS, 0))
            return hashlib.sha256(head + file.read()).hexdigest()[:16]

    def read(self, on_bad: OnBad, part: Part = ALL) -> Iterator[tuple[int, Document]]:
        """Yield (number, document) of the usable records in `part`."""
        return read_records(self.path, self.fields, on_bad, part, self.until)


@dataclass(frozen=True)
class HubShard:
    """One of the `of` shards of a dataset on the hub, read as a stream; nothing is stored."""

    repo: str  # name@commit, or a local folder that `datasets` can load
    subset: str | None
    split: str
    fields: Fields
    index: int
    of: int
    size: None = None
    digest: str = ""  # of a local folder; elsewhere the name has the commit
    until: int | None = None  # number of the record at which reading ends

    @property
    def name(self) -> str:
        """Dataset, subset, split and shard."""
        return f"hub:{self.repo}/{self.subset or 'default'}/{self.split}:{self.index}"

    def read(self, on_bad: OnBad, part: Part = ALL) -> Iterator[tuple[int, Document]]:
        """Yield (number, document) of the usable records in `part`; a later part means reading the shard again."""
        stream = _open_hub(self.repo, self.subset, self.split, os.getpid())
        if stream.features:
            require_column(f"hub:{self.repo}", list(stream.features), self.fields)
            stream = stream.select_columns(read_columns(list(stream.features), self.fields))
        stream = stream.shard(num_shards=self.of, index=self.index).skip(part.first)
        number = part.first - 1
        for batch in stream.iter(batch_size=100):  # not iter(stream): that would deal shards to torch's workers again
            for values in zip(*batch.values(), strict=True):
                number += 1
                if self.until is not None and number >= self.until:
                    return
                if number not in part:
                    continue
                document = as_document(dict(zip(batch, values, strict=True)), self.fields)
                if not isinstance(document, Document):
                    on_bad(f"{self.name}:{number + 1}: {document}")
                elif document.text:
                    yield number, document


def hub_shards(repo: str, subset: str | None, split: str, fields: Fields) -> list[HubShard]:
    """The shards of a dataset, fixed to its present commit, so that they stay the same.

    Raises:
        KoffError: No such dataset, subset or split, no network, or offline.
    """

    def look() -> tuple[str, int]:
        fixed = _at_commit(repo, subset)
        return fixed, max(1, _open_hub(fixed, subset, split, os.getpid()).num_shards)

    fixed, of = with_retries(look, f"hub:{repo}")
    digest = _digest_of(Path(repo)) if Path(repo).is_dir() else ""
    return [HubShard(fixed, subset, split, fields, index, of, digest=digest) for index in range(of)]


def _digest_of(folder: Path) -> str:
    """Hash of the names, sizes and ends of the files in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    seen = [(str(path.relative_to(folder)), path.stat().st_size, FileShard(path).digest) for path in files]
    return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


def is_out_of_reach(repo: str) -> bool:
    """Whether a dataset is on the hub while `datasets` is offline."""
    import datasets  # a second of imports

    return datasets.config.HF_HUB_OFFLINE and not Path(repo.partition("@")[0]).is_dir()


@lru_cache(maxsize=64)
def _open_hub(repo: str, subset: str | None, split: str, process: int) -> Any:
    """A dataset as a stream. `process`: each process opens its own, because connections do not survive a fork."""
    import datasets  # a second of imports

    if is_out_of_reach(repo):
        table = fetch_hub(repo, subset, split)
        return table.to_iterable_dataset(num_shards=min(OFFLINE_SHARDS, max(1, len(table))))
    datasets.disable_progress_bars()
    return datasets.load_dataset(**_where(_at_commit(repo, subset), subset, split), streaming=True)


def fetch_hub(repo: str, subset: str | None, split: str) -> Any:
    """Download a dataset into the hub's cache, all of it; offline, find it there."""
    import datasets

    return datasets.load_dataset(**_where(_at_commit(repo, subset), subset, split))


def _at_commit(repo: str, subset: str | None) -> str:
    """`repo` as name@commit; a local folder as it is.

    Where `datasets` does not reach the hub it takes the newest version in its cache, whatever is asked.

    Raises:
        ConnectionError: That is another version than the one in name@revision.
    """
    name, _, revision = repo.partition("@")
    if Path(name).is_dir():
        return repo
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    builder = datasets.load_dataset_builder(name, subset, revision=revision or None)
    right = revision in ("", builder.hash) or builder.hash == _commit_in_cache(name, revision)
    if isinstance(builder, Cache) and not right:
        raise ConnectionError(
            f"{revision} is asked for, the hub is not reached, and the newest version in its cache is {builder.hash}. "
            "Where there is a network, `koff prepare --prefetch-only` with an HF_HOME of its own fetches the right one"
        )
    return f"{name}@{builder.hash}"


def _commit_in_cache(name: str, revision: str) -> str | None:
    """The commit of a branch or tag, as the cache here last saw it."""
    from huggingface_hub import snapshot_download  # takes a third of a second

    with suppress(OSError):  # huggingface_hub's word for "not there" is one
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)).name
    return None


def _where(repo: str, subset: str | None, split: str) -> dict[str, str | None]:
    name, _, revision = repo.partition("@")
    return {"path": name, "name": subset, "split": split, "revision": revision or None}


def deal(sizes: Sequence[int | None], readers: int) -> list[list[tuple[int, int, int]]]:
    """Share shards among readers so that each record has exactly one reader and all have about equally much to read.

    Readers get whole shards as long as these divide evenly, and share the other shards record by record: the reader of
    (shard, turn, of) takes the records with number % of == turn.

    Args:
        sizes: Bytes of each shard; if one is unknown, all count as equal.
        readers: Number of readers over all ranks and workers.

    Returns:
        For each reader its (shard, turn, of).
    """
    weights = [1 if None in sizes else size for size in sizes]
    order = sorted(range(len(sizes)), key=lambda shard: -weights[shard])  # the largest first
    whole = len(sizes) - len(sizes) % readers
    loads, parts = [0] * readers, [[] for _ in range(readers)]
    for shard in order[:whole]:
        reader = loads.index(min(loads))
        loads[reader] += weights[shard]
        parts[reader].append((shard, 0, 1))
    shared = order[whole:]
    rest = sum(weights[shard] for shard in shared) / readers
    if max(loads) + rest > UNEVEN * (min(loads) + rest):
        shared, parts = order, [[] for _ in range(readers)]
    for shard in sorted(shared):
        for reader in range(readers):
            turn = (reader + shard) % readers  # varies by shard, so that files of one record are shared too
            parts[reader].append((shard, turn, readers))
    return [sorted(mine) for mine in parts]
