"""Find the checkpoint or the artifact in a run's folder, to name it in messages when the folder itself was given."""

from pathlib import Path

_CHECKPOINTS = ("*.ckpt", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt", "*/*/checkpoints/*.ckpt")
_OF_SHARDS = (".metadata", "meta.pt")  # files of torch and Lightning in the folder of a sharded checkpoint


def is_sharded(folder: Path) -> bool:
    """Whether a folder is a sharded checkpoint."""
    return any((folder / name).is_file() for name in _OF_SHARDS)


def checkpoint_below(folder: Path) -> Path | None:
    """The newest `last.ckpt` of the runs in a folder, else the newest checkpoint, by time of change; None if none."""
    found = [path for pattern in _CHECKPOINTS for path in folder.glob(pattern) if path.exists()]
    return max(found, key=lambda path: (path.name == "last.ckpt", path.stat().st_mtime), default=None)


def artifact_near(folder: Path) -> Path | None:
    """The artifact in a folder (a run's), or the artifact that the folder is a part of; None if there is none."""
    places = [folder / "artifact", folder.parent]
    places += [folder.parent / "artifact"] * folder.name.startswith("version_")
    return next((place for place in places if (place / "koff.json").is_file()), None)
