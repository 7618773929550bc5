"""Write a folder so that it is there in full, or not at all, or as it was before."""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from koff_lightning.errors import KoffError


@contextmanager
def new_folder(target: Path, overwrite: bool = False, marker: str = "koff.json") -> Iterator[Path]:
    """An empty folder that becomes `target` when the block ends well, and vanishes when it does not.

    It lies beside `target`, so that the last step is a rename: whoever looks finds the old folder or the new one.

    Args:
        target: Where the folder shall be.
        overwrite: Replace a folder that is there already.
        marker: File by which a folder is known to be of the kind that may be replaced; an empty one always may.

    Raises:
        KoffError: The target exists and may not be replaced, or the disk did not take the new one.
    """
    check_free(target, overwrite, marker)
    work = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        work.mkdir(parents=True)
        yield work
        _flush(work)
        _swap(work, target)
        _flush_one(target.parent)
    except (OSError, SafetensorError) as error:  # safetensors has its own class for a full disk
        raise KoffError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)  # after a swap it holds the old content


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
    """Put `new` in the place of `target`, whose old content is at `new` afterwards."""
    if not target.exists():
        new.rename(target)
    elif not _exchange(new, target):
        aside = target.with_name(f".{target.name}.previous")
        target.rename(aside)
        try:
            new.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        aside.rename(new)


def _exchange(a: Path, b: Path) -> bool:
    """Exchange two folders in one system call; False where there is none (Linux has renameat2 with flag 2)."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    here = -100  # AT_FDCWD
    return rename is not None and rename(here, os.fsencode(a), here, os.fsencode(b), 2) == 0


def _flush(folder: Path) -> None:
    """Wait until all below a folder is on the disk, so that the rename cannot arrive there before it."""
    for path in [*folder.rglob("*"), folder]:
        _flush_one(path)


def _flush_one(path: Path) -> None:
    if os.name == "posix" or path.is_file():  # Windows does not open folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
