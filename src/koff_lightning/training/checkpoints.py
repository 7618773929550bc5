"""Checkpoints on disk: there in full or not at all, read without running anything, the newest intact one found.

Lightning writes to the system's temporary folder and moves the file: across file systems that is a copy, which a kill
or a full disk cuts in half. Here the file is made beside its place, flushed to the disk, and renamed.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from koff_lightning.artifact.checkpoint import read_checkpoint, reason_of
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import flush, replacing

_VERSION = re.compile(r"version_(\d+)")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's CheckpointIO (how it reads and writes checkpoints), safe against a kill at any moment."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write a file so that it is there in full or as it was before, also after a power cut.

        Raises:
            KoffError: The disk did not take it; what was saved before is untouched.
        """
        path = Path(path)
        try:
            with replacing(path, alone=True) as part:
                with part.open("wb") as file:
                    torch.save(checkpoint, file)
                flush(part)
            flush(path.parent)
        except (OSError, RuntimeError) as error:  # torch has its own words for a full disk
            earlier = _checkpoints_below(_run_of(path))
            advice = "Earlier checkpoints are intact: make room, then go on with --ckpt_path last"
            raise KoffError(
                f"cannot write {path}: {reason_of(error)}. "
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
            raise KoffError(f"cannot look for checkpoints in {error.filename}: {reason_of(error)}") from error

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
