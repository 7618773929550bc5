"""Files elsewhere: `s3://bucket/a.jsonl`, `gs://...`, `https://...`, whatever fsspec and what is installed can open."""

import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from koff_lightning.data.retries import with_retries
from koff_lightning.support.errors import KoffError
from koff_lightning.support.offline import is_asked
from koff_lightning.support.secrets import without_secrets

NOT_ELSEWHERE = ("memory", "file", "local")
# What tells two versions of a file apart, as the file systems call it; times and ids of a question are not among it.
VERSION = ("size", "ETag", "etag", "md5Hash", "Content-MD5", "Digest", "generation", "mtime", "LastModified", "created")


@dataclass(frozen=True)
class RemoteFile:
    """A file by its address; as much of a `Path` as readers need.

    Attributes:
        size: Bytes, None where the server does not say.
        version: Another one where the file is another, as far as its file system says.
    """

    url: str
    size: int | None
    version: str

    def __str__(self) -> str:
        return without_secrets(self.url)

    @property
    def _path(self) -> PurePosixPath:
        return PurePosixPath(urlsplit(self.url).path if self.url.startswith("http") else self.url)

    @property
    def name(self) -> str:
        """Last part of the address, without a query."""
        return self._path.name

    @property
    def stem(self) -> str:
        """Name without its last suffix."""
        return self._path.stem

    @property
    def suffix(self) -> str:
        """Last suffix of the name."""
        return self._path.suffix

    def open(self, mode: str = "rb") -> BinaryIO:
        """The file for reading bytes; each process opens its own connection."""
        system, path = _system(self.url)
        return io.BufferedReader(system.open(path, mode))


def is_remote(entry: str) -> bool:
    """Whether an entry is an address and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", entry) is not None


def find_remote(pattern: str) -> list[RemoteFile]:
    """The files at an address; where it holds `*` or `[`, those that match, in their order.

    Raises:
        KoffError: Nothing is there, it cannot be reached, or a package for this kind of address is not installed.
    """
    shown = without_secrets(pattern)
    if is_asked() and not pattern.startswith(tuple(f"{name}://" for name in NOT_ELSEWHERE)):
        raise KoffError(f"{shown} is elsewhere, and --offline forbids to look: give a local copy")

    def look() -> list[RemoteFile]:
        system, path = _system(pattern)
        try:
            if "*" not in path and "[" not in path:
                return [_described(system.unstrip_protocol(path), system.info(path))]
            found = system.glob(path, detail=True)
            return [_described(system.unstrip_protocol(name), found[name]) for name in sorted(found)]
        except FileNotFoundError as error:  # also what a server's refusal becomes
            if error.__cause__ is None:
                raise KoffError(f"there is no file {shown}") from error
            raise error.__cause__ from error

    files = [file for file in with_retries(look, shown) if file is not None]
    if not files:
        raise KoffError(f"no file matches {shown}")
    return files


def _described(url: str, info: dict[str, Any]) -> RemoteFile | None:
    """The file that a listing describes; None for a folder."""
    if info.get("type") == "directory":
        return None
    version = json.dumps([url, [str(info.get(key)) for key in VERSION]])
    return RemoteFile(url, info.get("size"), hashlib.sha256(version.encode()).hexdigest())


def _system(url: str) -> tuple[Any, str]:
    """A file system and the file's path in it."""
    import fsspec  # it brings half of the network's packages

    kind, shown = url.partition("://")[0], without_secrets(url)
    if "::" in url:
        raise KoffError(f"{shown}: an address in an address ('::') is not read: name the file itself")
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
        advice = f"pip install {package[kind]}" if kind in package else " ".join(str(error).split())
        raise KoffError(f"{shown} takes a package that is not installed: {advice}") from error
    except ValueError as error:
        raise KoffError(f"{shown}: nothing here knows addresses of the kind '{kind}://' ({error})") from error
