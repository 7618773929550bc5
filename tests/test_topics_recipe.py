"""recipes/data/topics.py: which docstrings of a wheel become documents, without a registry."""

import ast
import importlib.util
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from koff_lightning.commands.parsing.config_files import SHIPPED

RECIPE = Path(__file__).parents[1] / "recipes" / "data" / "topics.py"
LONG = "Sums of squares. " * 20


@pytest.fixture(scope="module")
def topics():
    spec = importlib.util.spec_from_file_location("topics", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_docstrings_of_all_that_a_file_defines(topics):
    code = '"""Of a."""\nclass B:\n    """Of b."""\n    async def c(self):\n        def d():\n            """Of d."""\n'
    assert [*topics.docstrings(ast.parse(code))] == [("", "Of a."), ("B", "Of b."), ("B.c.d", "Of d.")]


def test_documents_of_a_wheel(topics, tmp_path):
    """Long enough, not of a test, no copy, and a file that does not parse spoils nothing."""
    wheel = tmp_path / "own-1.0-py3-none-any.whl"
    files = {
        "own/a.py": f'"""{LONG}"""\ndef f():\n    """Short."""\ndef g():\n    """{LONG}Größe."""\n',
        "own/b.py": f'"""{LONG}"""\n',
        "own/broken.py": "def (",
        "own/tests/c.py": f'"""{LONG} c"""\n',
        "own/ext/other.py": f'"""{LONG} other"""\n',
        "own/test_d.py": f'"""{LONG} d"""\n',
        "own/e.txt": LONG,
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    found = [*topics.documents(wheel, "1.0")]
    assert [one["id"] for one in found] == ["own/a.py:", "own/a.py:g"]
    assert found[1]["text"] == f"{LONG}Größe." and {one["source"] for one in found} == {"own 1.0"}


def test_the_list_has_a_domain_for_each_file(topics, tmp_path, monkeypatch, capsys):
    wheel = tmp_path / "own-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("own/a.py", f'"""{LONG}"""\n')
    monkeypatch.setattr(topics, "fetch", lambda *_: wheel)
    monkeypatch.setattr(sys, "argv", ["topics.py", str(tmp_path / "corpora" / "topics")])
    topics.main()
    domains = yaml.safe_load((SHIPPED / "domains" / "topics_offline.yaml").read_text(encoding="utf-8"))["data"][
        "domains"
    ]
    assert {name: str(tmp_path / path) for name, path in domains.items()} == {
        path.stem: str(path) for path in (tmp_path / "corpora" / "topics").glob("*.jsonl")
    }
    said = capsys.readouterr().out.splitlines()
    assert len(said) == len(domains) >= 3 and all("1 documents" in line and "BSD-3-Clause" in line for line in said)
