"""What lies in the folder of a run: for messages to who gave the folder where one thing in it was wanted."""

from pathlib import Path

_CHECKPOINTS = ("*.ckpt", "checkpoints/*.ckpt", "*/checkpoints/*.ckpt", "*/*/checkpoints/*.ckpt")
_OF_SHARDS = (".metadata", "meta.pt")  # Lightning and torch leave them in the folder of a sharded checkpoint


def is_sharded(folder: Path) -> bool:
    """Whether a folder is a checkpoint as sharded runs save one."""
    return any((folder / name).is_file() for name in _OF_SHARDS)


def checkpoint_below(folder: Path) -> Path | None:
    """The youngest `last.ckpt` of the runs in a folder, else the youngest checkpoint; None where there is none.

    By the time of the file alone: nothing is read, since this is to name one, not to go on from it.
    """
    found = [path for pattern in _CHECKPOINTS for path in folder.glob(pattern) if path.exists()]
    return max(found, key=lambda path: (path.name == "last.ckpt", path.stat().st_mtime), default=None)


def artifact_near(folder: Path) -> Path | None:
    """The exported model that a folder belongs to: in it, as in a run's, or the one that it is a part of."""
    places = [folder / "artifact", folder.parent]
    places += [folder.parent / "artifact"] * folder.name.startswith("version_")
    return next((place for place in places if (place / "koff.json").is_file()), None)
