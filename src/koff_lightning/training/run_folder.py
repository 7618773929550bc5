"""Folders of runs: one run at a time in each, and for each start a `version_N` of its own."""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only

from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import clear_leftovers, lock
from koff_lightning.support.yaml_files import read_yaml

LOCK = ".running"


@contextmanager
def alone_in(root: str | Path, option: str = "--trainer.default_root_dir") -> Iterator[None]:
    """Hold a run's folder: at its end the run replaces `results.json`, `plots/` and `artifact/` there.

    The kernel lets go when the process ends, in whatever way. What a run that was killed has left half written is
    cleared away.

    Args:
        root: The folder.
        option: What gives the command another one, for the message.

    Raises:
        KoffError: Another run holds it, or it cannot be written.
    """
    if rank_zero_only.rank:
        yield
        return
    root = Path(root)
    with ExitStack() as stack:
        with _writing(root, option):
            root.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context(lock(root / LOCK))
        if not held:
            raise KoffError(f"another run is going on in {root}: wait for it, or give {option} another folder")
        for place in (root, *root.glob("version_*/checkpoints")):
            clear_leftovers(place)
        yield


@dataclass(frozen=True)
class Version:
    """The `version_N` of one start.

    Args:
        folder: It.
        above: The folders that had to be made for it, from the lowest up.
    """

    folder: Path
    above: list[Path]

    def remove(self) -> None:
        """Leave nothing of a start that came to nothing; folders above it stay where something else lies in them."""
        if rank_zero_only.rank:
            return
        rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):
            for place in self.above:
                place.rmdir()


def new_version(root: str | Path) -> Version:
    """Make the next `version_N` in `root`; two that ask at once get two.

    Raises:
        KoffError: The folder cannot be written.
    """
    root = Path(root)
    above = [place for place in (root, *root.parents) if not place.exists()]
    if not rank_zero_only.rank:
        with _writing(root):
            root.mkdir(parents=True, exist_ok=True)  # below a link that leads nowhere no number is ever free
    names = [path.name.removeprefix("version_") for path in root.glob("version_*")]
    version = max((int(name) for name in names if name.isdigit()), default=-1) + 1
    while not rank_zero_only.rank:
        with _writing(root):
            try:
                (root / f"version_{version}").mkdir()
                break
            except FileExistsError:
                version += 1
    return Version(root / f"version_{version}", above)


def run_config(ckpt: Path) -> dict[str, Any] | None:
    """The resolved options that `koff fit` left beside its checkpoints, if they are still there."""
    for folder in _folders(ckpt):
        if (folder / "config.yaml").is_file():
            config = read_yaml(folder / "config.yaml")
            if isinstance(config, dict) and {"model", "data"} <= config.keys():
                return config
    return None


def _folders(ckpt: Path) -> list[Path]:
    """Where the options of a run can be: the checkpoint's folder and the one above, which may be a link."""
    paths = ckpt.expanduser().resolve(), ckpt.expanduser().absolute()
    return [folder for path in paths for folder in list(path.parents)[:2]]


def run_results(ckpt: Path, config: dict[str, Any] | None) -> dict[str, Any] | None:
    """The `results.json` of a `koff fit` that ended with this checkpoint, if it is still there.

    None where it is of other options or another step: another run's.

    Args:
        ckpt: The checkpoint, which has been read before (`from_checkpoint`).
        config: The options that lie beside it (`run_config`); results of other options are another run's.
    """
    beside = (folder.parent / "results.json" for folder in _folders(ckpt))  # of version_N/checkpoints/X.ckpt
    path = next(filter(Path.is_file, beside), None)
    if config is None or path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        step = torch.load(ckpt.expanduser(), map_location="cpu", weights_only=True, mmap=True)["global_step"]
        same = found["config"] == config and found["steps"] == step
    except (OSError, ValueError, KeyError, TypeError):  # of another release, or cut short: the card does without
        return None
    return found if same else None


@contextmanager
def _writing(root: Path, option: str = "--trainer.default_root_dir") -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno)
        if isinstance(error, FileExistsError):
            reason = f"{error.filename} is a file, or a link that leads nowhere"
        raise KoffError(f"cannot write the run's folder {root}: {reason}. Give {option}") from error
