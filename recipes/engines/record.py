"""The record of runs of other engines: what was run, with which releases, on what machine, when, what came of it."""

import datetime
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "gguf", "xllamacpp", "llama-cpp-py-sync", "vllm")


def write(path: Path, name: str, figures: dict[str, Any]) -> None:
    """Put a run into the record in the place of the last one of that name."""
    held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    held[name] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor(),
        "versions": {package: found for package in PACKAGES if (found := installed(package))},
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(held, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def installed(package: str) -> str | None:
    """Its release; None where it is not here."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """What the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
