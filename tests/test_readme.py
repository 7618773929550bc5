"""What a newcomer reads first: its Python runs as it stands, its paths and commands exist, the house is all there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from koff_lightning import __version__
from koff_lightning.cli import TOOLS, TRAINING
from koff_lightning.commands.parsing import option_table
from koff_lightning.commands.parsing.config_files import find_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_COMMANDS = [page for page in [*PAGES, *sorted((ROOT / "docs/results").glob("*.md"))] if page.name != "log.md"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_python_of_readme_artifacts_page_and_model_card_runs_as_it_stands(tmp_path):
    use, train = blocks("README.md")
    assert len([line for line in train.splitlines() if line]) <= 12
    done = run(train, tmp_path)
    assert done.returncode == 0, done.stderr
    assert {"results.json", "artifact"} <= {file.name for file in (tmp_path / "runs/python").iterdir()}
    shutil.copytree(tmp_path / "runs/python", tmp_path / "runs/demo")
    done = run(use, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Klicken Sie auf")
    assert "\n---\ndef main(" in done.stdout
    card = (tmp_path / "runs/demo/artifact/backbone/README.md").read_text(encoding="utf-8")
    codes = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    codes = [code.replace("DIR", "runs/demo/artifact") for code in codes]
    assert len(codes) == 2
    for code in [*blocks("docs/artifacts.md"), *codes]:
        done = run(code, tmp_path)
        assert done.returncode == 0, f"{code}\n{done.stderr}"


def test_no_python_on_a_page_uses_a_name_that_nobody_gave():
    for page in PAGES:
        for code in blocks(str(page.relative_to(ROOT))):
            compile(code, page.name, "exec")
            assert "input_ids," not in code
            assert not re.search(r"tokenizer\(", code), "a tokenizer may put an end token behind a prompt: model.encode"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


YOURS = {"mine.yaml", "english.yaml", "four.yaml", "nine.yaml", "config.yaml"}  # what pages have their reader write


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_on_a_page_are_commands(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = re.findall(r"(?:^    |`)koff ([a-z][^`\n#]*)", text, re.MULTILINE)
    assert len(commands) > 15 or page != ROOT / "README.md"
    for command in commands:
        words = [word.strip("'\"").rstrip(",.;:") for word in command.split()]
        two = " ".join(words[:2])
        assert two in TOOLS or words[0] in [*TRAINING, *TOOLS], command
        for word in words:
            if word.endswith(".yaml") and not word.startswith("--") and Path(word).name not in YOURS:
                find_config(word)
        verb = two if two in TOOLS else words[0]
        if option_table.knows(verb) and "NAME" not in command:
            rows = {row["name"] for row in option_table.options_of(verb)} | {"config", "print_config"}
            for word in words[len(verb.split()) :]:
                if word == "--":  # options of `koff fit` follow
                    rows |= {row["name"] for row in option_table.options_of("fit")}
                elif word.startswith("--"):
                    name = re.sub(r"=.*", "", word)[2:]
                    known = name in rows or name.replace("-", "_") in rows or name.startswith("data.domains.")
                    assert known or name in ("help", "offline", "allow-custom-classes"), command


# ---------------------------------------------------------------------------------------------------------- the house


def test_contributing_shows_every_file_and_folder_of_the_repository():
    """So nobody adds one without saying what it is for; test_architecture.py looks at those of the package."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("NOT TESTED HERE: git knows the files, and there is no git or no clone")
    words = ["git", "-c", f"safe.directory={ROOT}", "ls-files"]  # also where the clone is another user's
    listed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    names = {line.split("/")[0] for line in listed.splitlines()}
    house = CONTRIBUTING[CONTRIBUTING.index("At the root of the repository") : CONTRIBUTING.index("## Four ways")]
    assert names
    assert not [name for name in names if not re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", house)]


def test_the_citation_and_the_changelog_name_this_version():
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
