"""Files that an artifact lists, with hash and size: whether they are there, as listed, and nothing else is."""

from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

from koff_lightning.model_files import check_links
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import check_sha256, hash_file
from koff_lightning.support.forms import fault_in
from koff_lightning.support.json_files import read_json_object

MANIFEST, BACKBONE = "koff.json", "backbone"
CARD = "memory.json"  # of a memory
WEIGHTS = (".safetensors",)

Files = dict[str, dict[str, Any]]
FILES = {str: {"sha256": str, "size": int}}  # their form in a manifest or card


def check_by_itself(backbone: Path, weights: bool = True) -> None:
    """Check a backbone folder that is used by itself and lies in an artifact, whose manifest has its hashes.

    Args:
        backbone: The folder; one that lies elsewhere has nothing to be compared with.
        weights: Whether to compare the weights' hashes too, which reads all of them.

    Raises:
        KoffError: A file is missing, extra, truncated or changed.
    """
    place = backbone.expanduser().resolve()
    manifest = place.parent / MANIFEST
    if place.name != BACKBONE or not manifest.is_file():
        return
    files = read_json_object(manifest).get("files")
    if fault := fault_in(files, FILES, "files"):
        raise KoffError(f"{manifest}: {fault}, so {place} cannot be compared with it; get the artifact again")
    hashed = {name for name in files if weights or not name.endswith(WEIGHTS)}
    check_files(place.parent, files, BACKBONE, hashed)


def check_files(folder: Path, files: Files, below: str = ".", hashes: bool | Container[str] = True) -> None:
    """Check that a folder holds exactly the listed files, in the listed state. Hidden files are not looked at.

    Args:
        folder: What the paths in `files` are relative to.
        files: Path -> `sha256` and `size`.
        below: The part of the folder that must hold nothing else.
        hashes: Whether to compare hashes, or of which files; sizes always are.

    Raises:
        KoffError: A file is missing, extra, truncated, changed, or a link out of the folder, hidden or not.
    """
    check_links(folder / below)
    refuse_extra(folder, paths_below(folder, below), files)
    for name, expected in sorted(files.items()):
        path = folder / name
        if not path.is_file():
            raise KoffError(f"{path} is missing: the download or copy is incomplete; get it again")
        size = path.stat().st_size
        if size != expected["size"]:
            raise KoffError(f"{path} has {size} bytes instead of {expected['size']}: it is damaged; get it again")
        if hashes is True or (hashes and name in hashes):
            check_sha256(hash_file(path), expected["sha256"], path)


def paths_below(folder: Path, below: str) -> list[str]:
    """The files in `folder / below` but hidden ones, relative to `folder`."""
    paths = [path.relative_to(folder) for path in (folder / below).rglob("*") if path.is_file()]
    return [path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts)]


def refuse_extra(folder: Path, present: Iterable[str], allowed: Container[str]) -> None:
    """Raise KoffError if a name is there that nothing lists; hidden ones are not looked at."""
    if extra := sorted(name for name in present if name not in allowed and not name.startswith(".")):
        raise KoffError(f"{folder / extra[0]} does not belong there: {MANIFEST} or {CARD} does not list it; remove it")
