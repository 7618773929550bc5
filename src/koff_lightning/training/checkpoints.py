"""Checkpoints on disk: there in full or not at all, read without running anything, the newest intact one found.

Lightning writes to the system's temporary folder and moves the file: across file systems that is a copy, which a kill
or a full disk cuts in half. Here the file is made beside its place, flushed to the disk, and renamed.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import flush

_PARTS = ("koff", "hyper_parameters", "state_dict")
_VERSION = re.compile(r"version_(\d+)")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's way to and from files, for checkpoints that survive a kill at any moment."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write a file so that it is there in full or as it was before, also after a power cut.

        Raises:
            KoffError: The disk did not take it; what was saved before is untouched.
        """
        path = Path(path)
        part = path.with_name(f".{path.name}.part")  # a killed save leaves one, which the next save there overwrites
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with part.open("wb") as file:
                    torch.save(checkpoint, file)
                flush(part)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
            flush(path.parent)
        except (OSError, RuntimeError) as error:  # torch has its own words for a full disk
            earlier = _checkpoints_below(_run_of(path))
            advice = "Earlier checkpoints are intact: make room, then go on with --ckpt_path last"
            raise KoffError(
                f"cannot write {path}: {_reason(error)}. "
                + (advice if earlier else "No checkpoint had been saved before: make room, then start again")
            ) from error

    def load_checkpoint(
        self, path: str | Path, map_location: object = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file, to the CPU and as plain values whatever the caller asks for.

        Raises:
            KoffError: See `read_checkpoint`.
        """
        return read_checkpoint(path)


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """The content of a checkpoint of `koff fit`, on the CPU. Nothing in it is run: it may come from anyone.

    Args:
        path: The file.
        mmap: Leave tensors on the disk until they are used.

    Raises:
        KoffError: No such file, damaged, not of `koff fit`, or holding more than tensors and plain values.
    """
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            raise IsADirectoryError
        if not path.is_file():
            raise FileNotFoundError
        with ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch does not look at the check sums
                raise BadZipFile(f"{damaged} has another check sum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except IsADirectoryError:
        raise KoffError(
            f"{path} is a folder, as sharded runs save: make one file of it with "
            f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {path}`"
        ) from None
    except FileNotFoundError:
        raise KoffError(
            f"checkpoint {path}: no such file. `koff fit` leaves one in runs/.../checkpoints/last.ckpt"
        ) from None
    except OSError as error:
        raise KoffError(
            f"cannot read {path}: {_reason(error)}. It may be intact: see to the disk or the rights, then try again"
        ) from error
    except Exception as error:  # a file made to do harm can raise anything
        raise KoffError(
            f"cannot read {path} as a checkpoint: it is damaged or something else ({_reason(error)})"
        ) from error
    parts = [checkpoint.get(key) if isinstance(checkpoint, Mapping) else None for key in _PARTS]
    if not all(isinstance(part, Mapping) for part in parts):
        raise KoffError(f"{path} is not a checkpoint of `koff fit`: it does not say what was trained on which backbone")
    if named := {"_instantiator", "_class_path"} & checkpoint["hyper_parameters"].keys():
        raise KoffError(f"{path} names code to be run ({', '.join(sorted(named))}): `koff fit` writes no such thing")
    return checkpoint


def newest_checkpoint(folders: Sequence[str | Path]) -> Path | None:
    """The intact checkpoint of the highest step in the newest run below `folders`; None where there is no file at all.

    Runs are ordered by their `version_N`, not by times of files: clocks go backwards, copies are young. What is damaged
    gives way to the one before. What the system does not let us read is no reason to: it may be back in a minute, and a
    run from an earlier step, or from none, would from then on count as the newest.

    Raises:
        KoffError: There are files, but none can be used, or the system refuses to read one.
    """
    runs: dict[int, set[Path]] = {}
    for path in (path for folder in folders for path in _checkpoints_below(folder)):
        versions = _VERSION.findall(str(path.parent))
        runs.setdefault(int(versions[-1]) if versions else -1, set()).add(path)
    useless: list[str] = []
    for version in sorted(runs, reverse=True):
        steps: dict[Path, int] = {}
        for path in sorted(runs[version]):
            try:
                steps[path] = _step_of(path)
            except KoffError as error:
                if isinstance(error.__cause__, OSError):
                    raise
                useless.append(str(error))
        if steps:
            for reason in useless:
                rank_zero_warn(f"{reason}. An earlier checkpoint is used in its place.")
            newest = max(steps, key=steps.__getitem__)
            _warn_of_later_runs(folders, max(runs), newest)
            return newest
    if useless:
        raise KoffError(
            f"there are checkpoints, but none can be used: {'; '.join(useless)}. Put an intact one there, or start "
            "anew without --ckpt_path"
        )
    return None


def _warn_of_later_runs(folders: Sequence[str | Path], version: int, newest: Path) -> None:
    """Warn of a run after `version` that has begun to train but has saved nothing: its folder for that is empty."""
    begun = [path.parent for folder in folders for path in Path(folder).expanduser().glob("version_*/checkpoints")]
    later = {int(number[1]): path for path in begun if (number := _VERSION.fullmatch(path.name))}
    if later and max(later) > version:
        rank_zero_warn(
            f"{later[max(later)]} is of a later run, but holds no checkpoint: {newest} of an earlier run is used"
        )


def _run_of(path: Path) -> Path:
    """The folder of runs that a checkpoint belongs to."""
    return next((folder.parent for folder in path.parents if _VERSION.fullmatch(folder.name)), path.parent)


def _checkpoints_below(folder: str | Path) -> list[Path]:
    """All files, and folders as of sharded runs, that are named as checkpoints; none in a folder that is not there."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise KoffError(f"cannot look for checkpoints in {error.filename}: {_reason(error)}") from error

    found: list[Path] = []
    for place, folders, files in os.walk(Path(folder).expanduser(), onerror=refuse, followlinks=True):
        if any(os.path.samefile(place, parent) for parent in Path(place).absolute().parents):
            folders.clear()  # a link that leads to where we come from
            continue
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        strange = {name for name in links if not (_VERSION.fullmatch(name) or name == "checkpoints")}
        folders[:] = [name for name in folders if name not in strange]  # data, say, or other runs
        found += [Path(place, name) for name in (*folders, *files) if name.endswith(".ckpt")]
    return found


def _step_of(path: Path) -> int:
    """Optimizer steps that a checkpoint has behind it; raises KoffError for one that cannot be used or does not say."""
    step = read_checkpoint(path, mmap=True).get("global_step")
    if not isinstance(step, int):
        raise KoffError(f"{path} does not say at which step it was saved")
    return step


def _reason(error: BaseException) -> str:
    """What the system said, where torch covers it with words of its own."""
    cause: BaseException | None = error
    while cause is not None and not getattr(cause, "strerror", None):
        cause = cause.__cause__ or cause.__context__
    text = cause.strerror if isinstance(cause, OSError) else str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0]
