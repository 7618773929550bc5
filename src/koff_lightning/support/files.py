"""Write files and folders so that, whenever the process or its machine stops, they are complete, old or absent.

One writer at a time may write a folder: it holds a lock, which ends with its process.
"""

import ctypes
import errno
import glob
import hashlib
import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout, lock_descriptor
from safetensors import SafetensorError

from koff_lightning.support.errors import KoffError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # a file system without them


def own_cache() -> Path:
    """$KOFF_CACHE, or ~/.cache/koff: tokenised text in `tokens`, hub datasets and artifacts in `hub`, fetched models.

    Raises:
        KoffError: The user has no home folder, as one that is a mere number in a container.
    """
    try:
        return Path(os.environ.get("KOFF_CACHE") or "~/.cache/koff").expanduser()
    except RuntimeError:
        raise KoffError("there is no home folder to keep files in: set KOFF_CACHE to a folder for them") from None


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, hex digits."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def check_sha256(found: str, listed: str, name: str | Path) -> None:
    """Raise KoffError unless a file has the SHA-256 that is listed for it; both in hex digits."""
    if found != listed:
        raise KoffError(f"{name} was changed after it was written (its sha256 is another): get it again")


@contextmanager
def replacing(path: Path, alone: bool = False) -> Iterator[Path]:
    """A path to write to, which replaces `path` when the block ends without an error, and else is removed.

    It is beside `path`, so that the last step is a rename: the file is complete or as it was before.

    Args:
        path: The file; its folder is made if need be.
        alone: No other process writes this file, so that the next write may overwrite what a killed one has left.

    Raises:
        OSError: The folder or the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part" if alone else f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 file so that it is complete or as it was before.

    Raises:
        KoffError: It cannot be written.
    """
    try:
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise KoffError(f"cannot write {path}: {error.strerror or error}") from error


def refuse_unwritable(folder: Path, option: str) -> None:
    """Refuse a folder, which is made if need be, before the work whose results could not be written into it.

    Args:
        folder: The folder.
        option: What names it, for the message.

    Raises:
        KoffError: It cannot be made, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = None if os.access(folder, os.W_OK) else "no right to write there"
    except OSError as error:
        reason = error.strerror
    if reason:
        raise KoffError(f"{option}: cannot write into {folder} ({reason}): give another place")


@contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Lock a file, which is made if need be and removed at the end; yields whether the lock is held.

    On file systems without locks the block runs as if it were.

    Args:
        path: The file.
        wait: Wait until the lock is free.

    Raises:
        OSError: The file cannot be made.
    """
    own = FileLock(path, blocking=wait, fallback_to_soft=False)
    try:
        own.acquire()
    except Timeout:
        held = False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        held = True
    else:
        held = True
    try:
        yield held
    finally:
        if own.is_locked:
            if os.name == "posix":  # Windows does not remove open files
                path.unlink(missing_ok=True)  # while locked: who opened it meanwhile finds it gone
            own.release()


def has_locks(folder: Path) -> bool:
    """Whether two processes that lock the same file in a folder, which is there, keep each other out."""
    path = folder / f".{platform.node()}-{os.getpid()}.lock"
    own = FileLock(path, fallback_to_soft=False)
    try:
        own.acquire()
    except OSError as error:  # a folder that cannot be written is told where it matters
        return error.errno not in NO_LOCKS
    finally:
        own.release()
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return True


def clear_leftovers(folder: Path) -> None:
    """Remove what killed writers have left in a folder, `.*.part`, unless a writer still holds it."""
    for part in folder.glob(".*.part"):
        if not part.is_dir():
            part.unlink(missing_ok=True)
        elif _is_locked(part) is False:
            _clear(part)


def _clear(part: Path) -> None:
    """Remove a folder that a writer has left, and what is beside it with the same prefix, as of an export's proof."""
    for path in [part, *part.parent.glob(f"{glob.escape(part.name)}.*")]:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def new_folder(target: Path, overwrite: bool = False, marker: str = "koff.json") -> Iterator[Path]:
    """An empty folder that becomes `target` when the block ends without an error, and else is removed.

    It is beside `target`, so that the last step is a rename: at any time there is the old folder or the new one. If
    `target` is a symbolic link, it is beside the folder that this leads to, and the link stays.

    Args:
        target: The folder to write.
        overwrite: Replace a folder that is there already.
        marker: File that a folder must hold to be replaced; an empty folder always may.

    Raises:
        KoffError: The target exists and may not be replaced, another process is writing it, or it cannot be written.
    """
    check_free(target, overwrite, marker)
    target = Path(os.path.realpath(target))
    work = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        work.mkdir(parents=True)
        with _only_writer(work, target):
            yield work
            _follow_umask(work)
            _flush_all(work)
            _swap(work, target)
            flush(target.parent)
    except (OSError, SafetensorError) as error:  # safetensors has its own class for a full disk
        raise KoffError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)  # after a swap it holds the old content


def _follow_umask(folder: Path) -> None:
    """Give all new files the rights of the user's umask: safetensors makes files that only their owner can read."""
    probe = folder / ".umask"
    probe.touch()
    rights = probe.stat().st_mode & 0o777
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1:  # a linked one is of another folder
            path.chmod(rights)


@contextmanager
def _only_writer(work: Path, target: Path) -> Iterator[None]:
    """Refuse if another process is writing the same target; remove what a killed one has left."""
    if os.name != "posix":  # Windows does not open folders
        yield
        return
    own = os.open(work, os.O_RDONLY)
    try:
        _take(own)
        writers = re.compile(rf"\.{re.escape(target.name)}\.\d+\.part")  # not those of a folder `target.2`
        for other in [path for path in target.parent.iterdir() if writers.fullmatch(path.name) and path != work]:
            if locked := _is_locked(other):
                raise KoffError(f"another process is writing {target}: try again when it is done")
            if locked is False:
                _clear(other)
        aside = _aside(target)
        if aside.exists() and target.exists():
            shutil.rmtree(aside, ignore_errors=True)
        elif aside.exists():
            aside.rename(target)
        yield
    finally:
        os.close(own)


def _is_locked(folder: Path) -> bool | None:
    """Whether a writer holds a folder; None if the system cannot say."""
    if os.name != "posix":
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        taken = _take(handle)
        return taken if taken is None else not taken
    finally:
        os.close(handle)


def _take(handle: int) -> bool | None:
    """Lock an open folder; returns whether the lock was free, None if there are no locks."""
    try:
        return lock_descriptor(handle, blocking=False)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return None
        raise


def check_free(target: Path, overwrite: bool = False, marker: str = "koff.json") -> None:
    """Raise KoffError unless `new_folder` may write `target`."""
    if not target.exists() or (overwrite and target.is_dir() and not any(target.iterdir())):
        return
    if not target.is_dir():
        raise KoffError(f"{target} is a file: give another folder")
    if not overwrite:
        raise KoffError(f"{target} exists already: --overwrite replaces it, or give another folder")
    if not (target / marker).is_file():
        raise KoffError(f"{target} holds no {marker}, so it is not overwritten: give another folder")


def _swap(new: Path, target: Path) -> None:
    """Rename `new` to `target`, whose old content is at `new` afterwards."""
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        aside = _aside(target)
        target.rename(aside)
        try:
            new.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        aside.rename(new)


def _aside(target: Path) -> Path:
    """Where the old folder is between two renames, on systems that cannot exchange folders."""
    return target.with_name(f".{target.name}.previous")


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one system call (Linux: renameat2 with flag 2); False if there is none."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here = -100  # AT_FDCWD
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), 2) == 0


def _flush_all(folder: Path) -> None:
    """Wait until all below a folder is on the disk, so that the rename cannot arrive there before it."""
    for path in [*folder.rglob("*"), folder]:
        flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk."""
    if os.name == "posix" or path.is_file():  # Windows does not open folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
