"""What pip installs: the wheel's contents, its metadata, and the door of the package."""

import ast
import re
import shutil
import subprocess
import sys
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

import koff_lightning
import koff_lightning.data

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A copy of the tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("src", "configs"):
        shutil.copytree(
            ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
        )
    for file in [*ROOT.glob("*.cfg"), *ROOT.glob("*.toml"), *ROOT.glob("*.md"), ROOT / "setup.py", ROOT / "LICENSE"]:
        shutil.copy(file, tree)
    return tree


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory) -> ZipFile:
    """A wheel built from it, as pip would from a clone."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", out, clone], check=True, capture_output=True, text=True)
    return ZipFile(next(out.glob("*.whl")))


def test_a_build_leaves_nothing_in_the_clone_but_its_metadata(clone, wheel):
    assert not (clone / "build").exists()
    known = {"src", "configs", "setup.py", "LICENSE"}
    assert {path.name for path in clone.iterdir() if path.suffix not in (".cfg", ".toml", ".md")} == known


@pytest.fixture(scope="module")
def requirements() -> dict[str, Requirement]:
    """What setup.cfg asks for, read from the installed metadata."""
    return {r.name: r for r in map(Requirement, distribution("koff-lightning").requires)}


def test_the_wheel_holds_every_module_and_data_file(wheel):
    packaged = {name for name in wheel.namelist() if name.startswith("koff_lightning/")}
    package = ROOT / "src" / "koff_lightning"
    wanted = {file for file in package.rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    names = {f"koff_lightning/{file.relative_to(package).as_posix()}" for file in wanted}
    configs = {
        f"koff_lightning/configs/{c.relative_to(ROOT / 'configs').as_posix()}"
        for c in (ROOT / "configs").rglob("*.yaml")
    }
    assert packaged == names | configs


def test_configs_in_the_wheel_are_the_files_themselves(wheel):
    for config in (ROOT / "configs").rglob("*.yaml"):
        name = f"koff_lightning/configs/{config.relative_to(ROOT / 'configs').as_posix()}"
        assert wheel.read(name) == config.read_bytes()


def test_the_wheel_is_small(wheel):
    assert sum(info.compress_size for info in wheel.infolist()) < 20e6


def test_the_command_and_the_licence(wheel):
    info = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(info).decode())
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Version"] == koff_lightning.__version__
    commands = wheel.read(info.replace("METADATA", "entry_points.txt")).decode()
    assert "koff = koff_lightning.cli:main" in commands


def test_the_malicious_lightning_releases_are_excluded(requirements):
    """Advisory GHSA-w37p-236h-pfx3: they stole credentials on import."""
    lightning = requirements["lightning"].specifier
    assert {"2.6.2", "2.6.3"}.isdisjoint(lightning.filter(["2.6.2", "2.6.3", "2.6.6"]))
    assert {str(part) for part in lightning} >= {"!=2.6.2", "!=2.6.3", ">=2.6.6"}, "spelled out, whatever the floor"
    assert "pytorch-lightning" not in requirements, "it would need the same exclusions"


def test_ranges_that_the_stack_needs(requirements):
    assert "5.0" not in requirements["jsonargparse"].specifier, "LightningCLI calls what jsonargparse 5 removed"
    assert "0.4.9" not in requirements["lm-eval"].specifier, "broken with transformers 5"


def test_constraints_are_exact_portable_and_cover_what_we_require(requirements):
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert not [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)], (
        "no paths, no hosts, no local builds"
    )
    pinned = dict(line.lower().replace("_", "-").split("==") for line in lines)
    for name, requirement in requirements.items():
        if requirement.marker is None or "notebooks" not in str(requirement.marker):
            assert pinned[name] in requirement.specifier, name


@pytest.mark.parametrize("command", ["koff", "-m koff_lightning"])
def test_the_command_is_light(command, tmp_path):
    """Both ways to call it import nothing of torch and transformers for a version or a help."""
    (tmp_path / "koff").write_text("from koff_lightning.cli import main\nmain()\n")
    words = [str(tmp_path / "koff")] if command == "koff" else command.split()
    done = subprocess.run([sys.executable, "-X", "importtime", *words, "--version"], capture_output=True, text=True)
    loaded = [line.rpartition("|")[2].strip() for line in done.stderr.splitlines()]
    assert done.stdout.startswith("koff-lightning ")
    assert "koff_lightning.cli" in loaded
    assert not {"torch", "lightning", "transformers", "numpy", "koff_lightning.artifact.modeling_koff"} & set(loaded)


IMPORTS = """
import sys
import koff_lightning
print(*sys.modules)
# all that `koff serve --engine vllm` needs but vLLM itself and the parser of its words
import koff_lightning.commands.serve, koff_lightning.serving.app, koff_lightning.artifact.hub
import koff_lightning.serving.vllm.engine, koff_lightning.serving.vllm.plugin, koff_lightning.serving.keys
print(*sys.modules)
"""
LACKING = {"peft", "jsonargparse", "lm_eval", "datasets", "torchmetrics", "matplotlib", "gguf", "statsmodels"}


def test_an_import_makes_the_model_types_known_and_serving_by_vllm_needs_what_its_environment_has():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True)
    package, serving = (set(line.split()) for line in done.stdout.splitlines())
    light = {"koff_lightning.support", "koff_lightning.support.threads"}  # which is to run before torch is loaded
    own = {"koff_lightning.artifact", "koff_lightning.artifact.modeling_koff"}
    assert {name for name in package if name.startswith("koff_lightning")} == {"koff_lightning"} | light | own
    assert not serving & (LACKING | {"lightning"})


@pytest.mark.parametrize("name", koff_lightning._HOME)
def test_every_name_at_the_door_opens(name):
    thing = getattr(koff_lightning, name)
    assert thing.__name__ == name
    assert name in dir(koff_lightning)


@pytest.mark.parametrize("door", [koff_lightning, koff_lightning.data], ids=lambda door: door.__name__)
def test_type_checkers_and_editors_know_what_is_imported_when_first_used(door):
    """They do not run `__getattr__`, so a block of imports that never runs tells them the same."""
    tree = ast.parse(Path(door.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ours = [node for node in block.body if node.module.startswith("koff_lightning")]
    told = {node.names[0].asname: node.module.removeprefix(f"{door.__name__}.") for node in ours}
    assert told == door._HOME


def test_a_wrong_name_at_the_door():
    with pytest.raises(AttributeError, match="module 'koff_lightning' has no attribute 'KOFModule'"):
        koff_lightning.KOFModule  # noqa: B018
