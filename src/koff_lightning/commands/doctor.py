"""`koff doctor`: what a run will find on this machine. A release known to be bad is not imported."""

import importlib
import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from koff_lightning import __version__
from koff_lightning.commands.known_bad import KNOWN_BAD, KnownBad
from koff_lightning.support.errors import KoffError
from koff_lightning.support.offline import SWITCHES

PACKAGES = ("torch", "lightning", "transformers", "peft", "datasets", "lm-eval", "jsonargparse", "safetensors")
CACHES = {  # variable: where it points unless it is set
    "HF_HOME": "~/.cache/huggingface",
    "HF_HUB_CACHE": "{HF_HOME}/hub",
    "HF_DATASETS_CACHE": "{HF_HOME}/datasets",
    "KOFF_CACHE": "~/.cache/koff",
}
TIMEOUT = 60  # seconds until two processes that should talk to each other are given up

# Run twice at once, as ranks of one group; both add up 1 and 2.
_RANK = """
import datetime, sys, torch, torch.distributed as dist
backend, store, rank = sys.argv[1], sys.argv[2], int(sys.argv[3])
dist.init_process_group(backend, f"file://{store}", datetime.timedelta(seconds=30), rank=rank, world_size=2)
device = f"cuda:{rank}" if backend == "nccl" else "cpu"
value = torch.tensor([rank + 1.0], device=device)
dist.all_reduce(value)
dist.destroy_process_group()
sys.exit(value.item() != 3)
"""


def doctor(skip_processes: bool = False) -> None:
    """Print versions, devices, whether processes can talk to each other, caches and offline switches.

    Args:
        skip_processes: Start no processes.

    Raises:
        KoffError: Something found would break a run, or a known-bad release is installed.
    """
    bad = bad_releases()
    print(f"koff-lightning {__version__}, Python {platform.python_version()}, {platform.platform()}")
    print(f"packages   {', '.join(f'{name} {_version(name)}' for name in PACKAGES)}")
    for release, found in bad:
        print(f"           BAD: {release.line(found)}")
    if stolen := [release.line(found) for release, found in bad if release.steals]:
        raise KoffError(f"{stolen[0]}. Remove it, change all keys that this machine holds, and install another release")
    faults = [f"{name} is not installed" for name in PACKAGES if _version(name) == "missing"]
    if not faults:
        faults = _devices(skip_processes)
    faults += [f"{one.line(found)}: pip install --upgrade {one.name}" for one, found in bad]
    _switches()
    if faults:
        raise KoffError("; ".join(faults))


def bad_releases() -> list[tuple[KnownBad, str]]:
    """The known-bad releases that are installed, each with its version, by their metadata alone."""
    installed = [(bad, _version(bad.name)) for bad in KNOWN_BAD]
    return [(bad, found) for bad, found in installed if found != "missing" and bad.has(found)]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _devices(skip_processes: bool) -> list[str]:
    """Print what can compute and whether it can do so together; returns what is wrong."""
    torch = importlib.import_module("torch")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0.0
    print(f"processor  {os.cpu_count()} cores, {memory:.1f} GiB; torch uses {torch.get_num_threads()} thread(s)")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        print(f"GPU {index}      {gpu.name}, {gpu.total_memory / 2**30:.1f} GiB, capability {gpu.major}.{gpu.minor}")
    if not count:
        print(f"GPU        none (torch {'was built without CUDA' if torch.version.cuda is None else 'finds none'})")
    backends = ["gloo"] + ["nccl"] * (count > 1 and torch.distributed.is_nccl_available())
    faults = []
    for backend in [] if skip_processes else backends:
        fault = talk(backend)
        print(f"{backend:<11}{fault or 'two processes add up a number'}")
        faults += [f"two processes cannot work together by {backend}: {fault}"] if fault else []
    return faults


def talk(backend: str, timeout: float = TIMEOUT) -> str:
    """Let two processes on this machine add up a number; returns what goes wrong, or nothing.

    Args:
        backend: Backend of torch.distributed: `gloo` on processors, `nccl` on GPUs.
        timeout: Seconds until they are given up.
    """
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _RANK, backend, str(Path(folder) / "store")]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        ranks = [subprocess.Popen([*command, str(rank)], **pipes) for rank in range(2)]
        try:
            said = [rank.communicate(timeout=timeout)[1] for rank in ranks]
        except subprocess.TimeoutExpired:
            return f"no answer in {timeout:.0f} s (a firewall, or a network interface that does not resolve?)"
        finally:
            for rank in ranks:
                rank.kill()
                rank.communicate()
    failed = [text.strip().splitlines() for rank, text in zip(ranks, said, strict=True) if rank.returncode]
    return (failed[0] or ["a process ended without a word"])[-1] if failed else ""


def _switches() -> None:
    """Print where models and data are looked for, and whether the network may be."""
    on = [name for name in SWITCHES if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]
    print(f"network    {'may be used' if not on else 'is not used: ' + ', '.join(f'{name} is set' for name in on)}")
    folders: dict[str, str] = {}
    for name, default in CACHES.items():
        folder = Path(os.path.expanduser(os.environ.get(name) or default.format(**folders)))
        folders[name] = str(folder)
        if folder.parts[0] == "~":
            state = f"NO HOME FOLDER, set {name}"
        elif folder.is_dir():
            free = shutil.disk_usage(folder).free / 2**30
            state = f"{'' if os.access(folder, os.W_OK) else 'NOT WRITABLE, '}{free:.1f} GiB free"
        else:
            state = "not there yet"
        print(f"{name:<10} {folder}: {state}")
    for what in _held({name: Path(folder) for name, folder in folders.items()}):
        print(f"           holds {what}")


def _held(caches: dict[str, Path]) -> list[str]:
    """What lies in the caches, by the names that their folders have there."""
    held = []
    for kind in ("model", "dataset"):
        found = sorted(caches["HF_HUB_CACHE"].glob(f"{kind}s--*"))
        held += [f"{kind} {folder.name.removeprefix(f'{kind}s--').replace('--', '/')}" for folder in found]
    made = sorted(folder for folder in caches["HF_DATASETS_CACHE"].glob("*") if folder.is_dir())
    held += [f"dataset {folder.name.replace('___', '/')}, ready to read" for folder in made]
    own = {kind: list((caches["KOFF_CACHE"] / kind).glob("[!.]*/")) for kind in ("tokens", "hub")}
    pulled = [folder for folder in own["hub"] if "@" in folder.name]  # no copy of a dataset has that in its name
    counts = {"tokenised text": len(own["tokens"]), "copies of streamed datasets": len(own["hub"]) - len(pulled)}
    for what, count in (counts | {"artifacts that were pulled": len(pulled)}).items():
        held += [f"{what}, {count} {'entry' if count == 1 else 'entries'}"] * (count > 0)
    return held
