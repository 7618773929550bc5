"""Which runs are studied and which they are compared with: paths, patterns and names as a user gives them."""

import glob
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from koff_lightning.artifact.checkpoint import read_checkpoint
from koff_lightning.artifact.folder import read_manifest
from koff_lightning.artifact.hub import artifact_or_same
from koff_lightning.listed_files import MANIFEST
from koff_lightning.support.errors import KoffError
from koff_lightning.support.names import refuse_no_run
from koff_lightning.training.checkpoints import newest_checkpoint
from koff_lightning.training.run_folder import run_config

ARTIFACT = "artifact"  # of a run, in its folder
_NAMELESS = ("checkpoints", ARTIFACT)


def find_runs(places: Iterable[str]) -> dict[str, Path]:
    """Checkpoints and artifacts by a short name of their run, in the order given.

    Args:
        places: A `.ckpt` file, the folder that `koff export` wrote, the folder of a run (its artifact, else its newest
            checkpoint), or a pattern of any of these.

    Raises:
        KoffError: A place holds no run, or is given twice.
    """
    paths = [_of_run(path) for place in places for path in _expanded(place)]
    if twice := [path for number, path in enumerate(paths) if path in paths[:number]]:
        raise KoffError(f"{twice[0]} is given twice: two seeds are two runs")
    names = [_name(path) for path in paths]
    return {
        name if names.count(name) == 1 else f"{name}.{number}": path
        for number, (name, path) in enumerate(zip(names, paths, strict=True), 1)
    }


def find_others(given: Iterable[str]) -> dict[str, dict[str, Path]]:
    """Runs to compare with, by what the user calls their kind.

    Args:
        given: NAME=PLACE each; of one name several times are several seeds.

    Raises:
        KoffError: A name is missing, or a place holds no run.
    """
    places: dict[str, list[str]] = {}
    for words in given:
        name, equals, place = words.partition("=")
        if not (name and equals and place) or "/" in name:
            raise KoffError(f"--against takes NAME=RUN, such as wanda_sp=runs/wanda_sp; got {words!r}")
        places.setdefault(name, []).append(place)
    return {name: find_runs(of_one) for name, of_one in places.items()}


def config_of(run: Path) -> dict[str, Any] | None:
    """The resolved options of a run: as its artifact has them, or as they lie beside its checkpoint."""
    return read_manifest(run).config if run.is_dir() else run_config(run)


def home_of(run: Path) -> Path | None:
    """The folder of a run, given its checkpoint or artifact; None of an artifact that lies in none (`koff export`)."""
    if run.is_dir() and run.name != ARTIFACT:
        return None
    folder = run.parent
    while folder.name in _NAMELESS or folder.name.startswith("version_"):
        folder = folder.parent
    return folder


def folder_for(run: Path) -> Path:
    """Where the analysis of a run goes unless somewhere else is asked for."""
    home = home_of(run)
    return home / "analysis" if home else run.with_name(f"{run.name}-analysis")


def history_of(run: Path) -> list[dict[str, Any]]:
    """The course of a run's mask over training (`MaskHistory`); empty where no checkpoint of it is at hand."""
    home = home_of(run)
    path = run if not run.is_dir() else newest_checkpoint([home]) if home else None
    state = read_checkpoint(path, mmap=True).get("callbacks", {}) if path else {}
    return state.get("RunReport", {}).get("history", {}).get("points", [])


def _expanded(place: str) -> Sequence[Path]:
    path = Path(place).expanduser()
    if path.exists() or not glob.has_magic(place):
        return [Path(artifact_or_same(str(path)))]
    if not (found := sorted(glob.glob(str(path)))):
        raise KoffError(f"no file or folder matches {place!r}")
    return [Path(each) for each in found]


def _of_run(path: Path) -> Path:
    """The artifact or checkpoint that a path stands for; a folder that holds neither is refused here, before text."""
    refuse_no_run(path)
    if not path.is_dir() or (path / MANIFEST).is_file():
        return path
    if (path / ARTIFACT / MANIFEST).is_file():
        return path / ARTIFACT
    if found := newest_checkpoint([path]):
        return found
    read_manifest(path)  # of a model, say: tells what is missing
    return path


def _name(path: Path) -> str:
    place = path.resolve()
    if place.suffix == ".ckpt" or place.name == ARTIFACT:
        return home_of(place).name if home_of(place).name else place.stem
    return place.name


def one_dense_model(hashes: Mapping[str, str]) -> str:
    """The hash of the dense model that all masks cut.

    Args:
        hashes: By name of the run.

    Raises:
        KoffError: The masks are of different dense models.
    """
    first = next(iter(hashes))
    for name, other in hashes.items():
        if other != hashes[first]:
            raise KoffError(
                f"{name} was cut from the dense model with hash {other[:12]}, {first} from the one with hash "
                f"{hashes[first][:12]}: compare runs of one dense model"
            )
    return hashes[first]
