"""The notebooks that ship: stored with outputs, readable anywhere, and about the package rather than beside it.

That their cells run is for `make notebooks`.
"""

import json
import re
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOME = ROOT / "notebooks"
NOTEBOOKS = sorted(HOME.glob("*.ipynb"))
HERE = [str(ROOT), sys.prefix, tempfile.gettempdir(), "/home/", "/root/", "/Users/", "site-packages"]
LINK = re.compile(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)")
MOST_LINES, MOST_BYTES = 24, 600_000

each = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)


def cells(file: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def test_there_are_six_and_the_readme_lists_them():
    listed = re.findall(r"^\| \[(\w+\.ipynb)\]", (HOME / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert listed == [file.name for file in NOTEBOOKS]
    assert [name[:2] for name in listed] == ["00", "01", "02", "03", "04", "05"]


@each
def test_it_is_a_valid_notebook(file):
    nbformat = pytest.importorskip("nbformat", reason="comes with the extra [notebooks]")
    nbformat.validate(nbformat.read(file, as_version=4))


@each
def test_it_was_run_from_top_to_bottom_without_errors(file):
    code = cells(file, "code")
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]


@each
def test_nothing_in_it_is_of_one_machine(file):
    text = file.read_text(encoding="utf-8")
    assert not [path for path in HERE if path in text]
    assert "\\u001b" not in text, "terminal colours"
    content = json.loads(text)
    assert content["metadata"]["kernelspec"]["name"] == "python3"
    assert not [cell for cell in content["cells"] if "execution" in cell["metadata"]], "times of execution"
    assert len(text) < MOST_BYTES


@each
def test_it_holds_no_code_that_belongs_in_the_package(file):
    for cell in cells(file, "code"):
        source = "".join(cell["source"])
        assert not re.search(r"^\s*(def|class|async)\s|\blambda\b", source, re.MULTILINE), source
        assert len(source.splitlines()) <= MOST_LINES, source


@each
def test_it_explains_itself_and_its_links_lead_somewhere(file):
    words = ["".join(cell["source"]) for cell in cells(file, "markdown")]
    assert words[0].startswith("# ")
    assert "docs/results" in "".join(words), "says where quality is measured"
    for target in LINK.findall("".join(words)):
        assert (HOME / target).exists(), target


def test_the_command_in_a_notebook(capsys):
    pytest.importorskip("IPython", reason="comes with the extra [notebooks]")
    from IPython.core.error import UsageError

    from koff_lightning.notebook import koff

    koff("memory --help")
    assert "koff memory list" in capsys.readouterr().out
    with pytest.raises(UsageError, match="koff ended with status 2"):
        koff("inspect 'no such folder'")
    assert "'no such folder'" in capsys.readouterr().err
    with pytest.raises(UsageError, match="No closing quotation: put a text with an apostrophe in double quotes"):
        koff("generate --model m --prompt 'It's late'")
