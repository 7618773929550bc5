"""Run some of the tests at the lowest versions of our direct dependencies that setup.cfg allows, or at the newest.

    python recipes/supply_chain/versions.py lowest .venv-lowest
    python recipes/supply_chain/versions.py newest .venv-newest tests/test_backbone.py     # other tests than TESTS

Makes a virtual environment in the folder named (kept: delete it to begin anew), installs this tree into it and runs
pytest there. It needs uv. Floors that cannot be installed together are refused; a dependency of a dependency is the
newest that fits. constraints.txt is what the whole suite runs on. What was found is in docs/dependencies.md. On Linux
torch brings CUDA's libraries, 3 GB for each of the two environments, unless UV_TORCH_BACKEND=cpu is set.
"""

import configparser
import os
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]

# What meets the libraries: loading, attention, adapters, the trainer, the command line, export and lm-eval.
TESTS = [
    f"tests/test_{name}.py"
    for name in (
        "backbone",
        "attention",
        "kv_memory",
        "gates",
        "memory",
        "training",
        "cli",
        "artifact",
        "modeling_koff",
        "generate",
        "lm_eval",
        "serve",
    )
]


def lowest(file: Path = ROOT / "setup.cfg") -> list[str]:
    """The floor of each direct dependency, those of `serve` and `dev` too, as a line of a constraints file."""
    config = configparser.ConfigParser()
    config.read(file, encoding="utf-8")
    extras = config["options.extras_require"]
    text = "\n".join([config["options"]["install_requires"], extras["serve"], extras["dev"]])
    asked = [Requirement(line) for line in text.splitlines() if line and line[0] != "#"]
    floors = {one.name: [bound.version for bound in one.specifier if bound.operator == ">="] for one in asked}
    return [f"{name}=={floor}" for name, bounds in floors.items() for floor in bounds]


def main(which: str, folder: str, *tests: str) -> int:
    """Install and test; returns pytest's exit status.

    Args:
        which: lowest or newest.
        folder: Of the virtual environment.
        tests: For pytest, in place of TESTS.
    """
    if which not in ("lowest", "newest"):
        raise SystemExit(f"which versions? lowest or newest; got {which!r}")
    home = Path(folder).absolute()
    python = home / "bin" / "python"
    if not python.exists():
        subprocess.run(["uv", "venv", "--quiet", "--python", sys.executable, home], check=True)
    pins = home / "pins.txt"
    pins.write_text("".join(f"{line}\n" for line in lowest()) if which == "lowest" else "", encoding="utf-8")
    pip = ["uv", "pip", "install", "--quiet", "--python", python, "--upgrade"]
    subprocess.run([*pip, "-e", f"{ROOT}[dev,serve]", "-c", pins], check=True)
    subprocess.run(["uv", "pip", "freeze", "--quiet", "--python", python], check=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [python, "-m", "pytest", "-q", *(tests or TESTS)], cwd=ROOT, env=environment, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
