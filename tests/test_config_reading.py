"""Configs are read in UTF-8, and a path in one stays a path."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from toy_text import toy_documents, toy_tokenizer, write_jsonl

from koff_lightning import KoffError
from koff_lightning.cli import main
from koff_lightning.commands.training_cli import resolved


@pytest.mark.parametrize(
    "content",
    ['{"files": "bundled:de"}', "[bundled:de, bundled:en]", "[" * 200_000, "a: " * 100_000, "bundled:de\nbundled:en"],
    ids=["a mapping", "a list", "brackets", "a large text", "lines"],
)
@pytest.mark.parametrize("where", ["config", "command line"])
def test_a_corpus_is_never_read_as_a_config(tmp_path, monkeypatch, content, where):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(content, encoding="utf-8")
    (tmp_path / "run.yaml").write_text(json.dumps({"data": {"domains": {"law": str(corpus)}}}), encoding="utf-8")
    words = ["--config", "run.yaml"] if where == "config" else ["--data.domains.law", str(corpus)]
    monkeypatch.chdir(tmp_path)
    assert resolved(["fit", *words])["data"]["domains"] == {"law": str(corpus)}


@pytest.mark.parametrize("option", ["model.lora", "model.retention", "model", "data", "anneal", "trainer.logger"])
@pytest.mark.parametrize("where", ["file", "value"])
def test_what_is_deep_does_not_end_the_process(tmp_path, monkeypatch, option, where):
    """As it does with the reader of the parser."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "deep").write_text("[" * 100_000, encoding="utf-8")
    value = "deep" if where == "file" else "[" * 100_000
    with pytest.raises(KoffError, match="is not read: its values lie more than 64 deep in one another"):
        resolved(["fit", "--config", "demo.yaml", f"--{option}", value])


def test_a_long_text_that_is_no_yaml_is_a_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"a: b: {'c' * 80}"
    assert resolved(["fit", "--config", "demo.yaml", "--data.tokenizer", name])["data"]["tokenizer"] == name


def test_the_text_of_a_corpus_that_looks_like_a_config_is_its_text(tmp_path, capsys):
    toy_tokenizer(tmp_path / "tokenizer")
    lines = [json.dumps({"files": "nowhere.jsonl", "text": text}) for text in toy_documents(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = {
        "data": {"domains": {"a": str(tmp_path / "a.jsonl")}, "tokenizer": str(tmp_path / "tokenizer"), "seq_len": 32}
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config), encoding="utf-8")
    assert main(["prepare", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "out")]) == 0
    assert "a: tokenised" in capsys.readouterr().out


SCRIPT = """
import locale, sys
from jsonargparse import ArgumentParser
from koff_lightning import KoffError
from koff_lightning.cli import main
from koff_lightning.commands.parsing.config_files import utf8_files
assert locale.getpreferredencoding(False).lower() not in ("utf-8", "utf8"), "the locale must be another"
parser = ArgumentParser()
parser.add_argument("--name", type=str)
with utf8_files():
    parser.save(parser.parse_args(["--name", "\\u6e2c\\u8a66"]), "saved.yaml")
assert main(["prepare", "--config", "run.yaml", "--out", "out"]) == 0

from pathlib import Path
from koff_lightning.commands import lm_eval_cli

words = ["--model", "x", "--config", "c.yaml", "--samples", "samples.json"]
settings = lm_eval_cli._settings(lm_eval_cli._parser().parse_args(words))
Path("said").write_text(repr((settings.system_instruction, settings.samples)), encoding="utf-8")
"""


def test_what_is_read_is_utf8_in_a_locale_that_is_not(tmp_path):
    """Configs, text, and files of lm-eval, whose own reader takes the locale's encoding."""
    toy_tokenizer(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "text.jsonl", toy_documents(60))
    config = {
        "data": {"domains": {"a": {"files": "text.jsonl", "text_field": "größe 狐"}}, "tokenizer": "tokenizer"},
        "seed_everything": 1,
    }
    lines = (tmp_path / "text.jsonl").read_text(encoding="utf-8").replace('"text"', '"größe 狐"')
    (tmp_path / "text.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    (tmp_path / "c.yaml").write_text("tasks: [koff_bpb]\nsystem_instruction: große Füchse 狐狸\n", encoding="utf-8")
    (tmp_path / "samples.json").write_text('{"koff_größe": [0]}', encoding="utf-8")
    environment = os.environ | {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C", "LANG": "C"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"a: tokenised" in done.stdout
    assert "測試" in (tmp_path / "saved.yaml").read_text(encoding="utf-8")
    said = (tmp_path / "said").read_text(encoding="utf-8")
    assert said == repr(("große Füchse 狐狸", {"koff_größe": [0]}))
