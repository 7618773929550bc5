"""What we depend on: each dependency has a reason, none of the known-bad releases is installed, pinned or allowed."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from koff_lightning.commands.known_bad import KNOWN_BAD

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes" / "supply_chain"))
import audit  # noqa: E402
import versions  # noqa: E402


def test_every_dependency_has_a_reason_and_every_reason_a_dependency():
    rows = re.findall(
        r"^\| `([\w.-]+)` \|(.+)\|(.+)\|(.+)\|$", (ROOT / "docs/dependencies.md").read_text(), re.MULTILINE
    )
    assert [name for name, *_ in rows] == list(audit.requirements())
    assert all(cell.strip() for _, *cells in rows for cell in cells)


def test_no_known_bad_release_is_here():
    assert audit.faults(audit.pins(), audit.requirements()) == []
    assert audit.main() == 0


@pytest.mark.parametrize("name", ["lightning", "pytorch-lightning"])
@pytest.mark.parametrize(("version", "bad"), [("2.6.1", False), ("2.6.2", True), ("2.6.3", True), ("2.6.4", False)])
def test_the_stolen_releases_are_among_them(name, version, bad):
    assert any(entry.name == name and entry.has(version) for entry in KNOWN_BAD) == bad


def test_bad_pins_and_bad_ranges_are_found():
    found = audit.faults({"lightning": "2.6.3", "torch": "2.5.1"}, {"torch": Requirement("torch>=2.5")})
    assert found[0].startswith("in constraints.txt: lightning 2.6.3 steals credentials when imported (GHSA-")
    assert found[1].startswith("in constraints.txt: torch 2.5.1 runs code")
    assert found[2].startswith("allowed by setup.cfg: torch 2.5 runs code")
    assert len(found) == 3


def test_the_hashed_pins_are_the_pins():
    text = (ROOT / "constraints-hashed.txt").read_text()
    hashed = dict(re.findall(r"^([\w.-]+)==(\S+) \\$", text, re.MULTILINE))
    assert {audit.canonicalize_name(name): pin for name, pin in hashed.items()} == audit.pins()
    assert all("--hash=sha256:" in part for part in re.split(r"^(?=[\w.-]+==)", text, flags=re.MULTILINE)[1:])


def test_every_pin_lies_in_its_range():
    pins, asked = audit.pins(), audit.requirements()
    assert set(asked) - set(pins) == {"ipywidgets", "jupyterlab", "nbmake"}, "the notebooks' tools alone are not pinned"
    assert [name for name in asked if name in pins and not asked[name].specifier.contains(pins[name])] == []


def test_every_floor_is_a_release_that_may_be_used():
    floors = dict(line.split("==") for line in versions.lowest())
    asked = audit.requirements()
    optional = {"cffi", "llama-cpp-py-sync", "xllamacpp", "ipywidgets", "jupyterlab", "nbmake"}
    assert {audit.canonicalize_name(name) for name in floors} == set(asked) - optional, "each has a floor"
    for name, floor in floors.items():
        assert asked[audit.canonicalize_name(name)].specifier.contains(floor), f"{name}: the range excludes its floor"
    assert audit.faults({audit.canonicalize_name(name): floor for name, floor in floors.items()}, {}) == []


def test_a_dependency_without_a_floor_is_not_run_at_one(tmp_path):
    (tmp_path / "setup.cfg").write_text(
        "[options]\ninstall_requires =\n    # why\n    a[b]>=1.5,<2,!=1.6\n    c\n"
        "[options.extras_require]\nserve =\n    d>=3\ndev =\n    e>=0.1\n",
        encoding="utf-8",
    )
    assert versions.lowest(tmp_path / "setup.cfg") == ["a==1.5", "d==3", "e==0.1"]
