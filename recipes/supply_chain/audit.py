"""Look for known-bad releases: among what is installed, in constraints.txt, and in what setup.cfg would allow.

    make audit

The list is ours (koff_lightning/commands/known_bad.py) and needs no network. Where pip-audit is installed (`pip install
pip-audit`) it is asked too, about the same pins; it says itself which of them it could not look up.
"""

import configparser
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from koff_lightning.commands.known_bad import KNOWN_BAD, KnownBad

ROOT = Path(__file__).parents[2]


def pins(file: Path = ROOT / "constraints.txt") -> dict[str, str]:
    """Version by package of a file of pins."""
    lines = (line.split("#")[0].strip() for line in file.read_text(encoding="utf-8").splitlines())
    return {canonicalize_name(name): pin for name, _, pin in (line.partition("==") for line in lines if line)}


def requirements(file: Path = ROOT / "setup.cfg") -> dict[str, Requirement]:
    """What setup.cfg asks for, its extras too, by package."""
    config = configparser.ConfigParser()
    config.read(file, encoding="utf-8")
    texts = [config["options"]["install_requires"], *config["options.extras_require"].values()]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip() and "#" not in line]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def faults(pinned: dict[str, str], asked: dict[str, Requirement]) -> list[str]:
    """A line for each known-bad release that is installed, pinned or allowed."""
    found = []
    for bad in KNOWN_BAD:
        name = canonicalize_name(bad.name)
        for where, now in (("installed", _installed(bad)), ("in constraints.txt", pinned.get(name))):
            found += [f"{where}: {bad.line(now)}"] if now and bad.has(now) else []
        allowed = (
            [now for now in _edges(bad, asked[name]) if asked[name].specifier.contains(now)] if name in asked else []
        )
        found += [f"allowed by setup.cfg: {bad.line(allowed[0])}"] if allowed else []
    return found


def _installed(bad: KnownBad) -> str | None:
    try:
        return version(bad.name)
    except PackageNotFoundError:
        return None


def _edges(bad: KnownBad, asked: Requirement) -> list[str]:
    """The bad ones among the bounds of both ranges: where two ranges meet, one of these lies in both."""
    bounds = [bound.version for range_ in (SpecifierSet(bad.versions), asked.specifier) for bound in range_]
    return sorted(bound for bound in bounds if bad.has(bound))


def main() -> int:
    """Print and judge."""
    for bad in KNOWN_BAD:
        print(f"excluded  {bad.name} {bad.versions}: {bad.fault} ({bad.advisory})")
    found = faults(pins(), requirements())
    for line in found:
        print(f"FOUND     {line}")
    print(f"{len(pins())} pins and all that is installed looked at: {len(found) or 'no'} known-bad release(s)")
    ask = shutil.which("pip-audit")
    if ask is None:
        print("pip-audit is not installed: nothing but the list above was looked up")
        return int(bool(found))
    words = [ask, "--no-deps", "--disable-pip", "--progress-spinner", "off", "-r", str(ROOT / "constraints.txt")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    unknown = done.stdout.count("could not be audited")
    print(*[line for line in done.stdout.splitlines() if "could not be audited" not in line], done.stderr, sep="\n")
    print(f"pip-audit could not look up {unknown} of {len(pins())} pins here")
    return int(bool(found) or (done.returncode and unknown < len(pins())))


if __name__ == "__main__":
    sys.exit(main())
