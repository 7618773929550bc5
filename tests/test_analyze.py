"""`koff analyze`: what it writes, what it says of runs that lack something, and what it refuses."""

import json
import math
import re

import pandas as pd
import pytest
from tiny_artefact import DOMAINS, tiny_decomposition
from toy_text import toy_documents, write_jsonl

from koff_lightning.artefact.export import export
from koff_lightning.cli import main

FEW = [
    "--tokens=600",
    "--heldout_bytes=400",
    "--rate=0.1",
    "--bar=0.8",
    "--draws=200",
    "--resamples=50",
    "--controls=1",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two seeds of a decomposition, the text that their config names, and a mask to compare with."""
    folder = tmp_path_factory.mktemp("analyze")
    for number, domain in enumerate(DOMAINS):
        write_jsonl(folder / "text" / f"{domain}.jsonl", toy_documents(60, seed=number))
    text = {domain: str(folder / "text" / f"{domain}.jsonl") for domain in DOMAINS}
    config = {"model": {}, "data": {"domains": text, "seq_len": 32, "heldout_fraction": 0.2}}
    for seed in range(2):
        export(tiny_decomposition(folder, seed=seed), folder / f"run{seed}" / "artifact", config=config, prove=False)
    other = tiny_decomposition(folder, seed=5, lora=None, kv=None)
    export(other, folder / "bare" / "artifact", config=config, prove=False)
    export(tiny_decomposition(folder, seed=0), folder / "masked", layout="masked", config=config, prove=False)
    return folder


def analysed(capsys, *words: str) -> str:
    status = main(["analyze", *words])
    said = capsys.readouterr()
    assert status == 0, said
    return said.out


@pytest.fixture(scope="module")
def whole(home):
    """Everything, with two seeds against another mask."""
    runs = ["--model", str(home / "run0"), "--model", str(home / "run1"), "--against", f"bare={home / 'bare'}"]
    assert main(["analyze", *runs, "--out", str(home / "whole"), *FEW]) == 0
    return home / "whole"


def test_everything_is_written(whole):
    content = json.loads((whole / "analysis.json").read_text(encoding="utf-8"))
    assert content["missing"] == {}
    assert list(content["runs"]) == ["run0", "run1"]
    tables = {name: pd.read_parquet(whole / path) for name, path in content["files"].items()}
    neurons = tables["neurons"]
    assert neurons["specific"].sum() == round(0.1 * len(neurons))
    assert {"removed_koff_run0", "removed_koff_run1", "removed_bare_bare"} <= set(neurons.columns)
    masks = tables["masks"].query("unit_kind == 'channel' and run == 'run1'")
    assert masks["removed"].tolist() == neurons["removed_koff_run1"].tolist()
    assert set(tables["enrichment"]["run"]) == {"run0", "run1", "bare"}
    assert set(tables["ratios"]["against"]) == {"bare"}
    assert len(tables["transfer"]) == 2 * len(DOMAINS)
    for name in ("removed_by_layer", "enrichment", "transfer", "attention", "sparsity"):
        assert (whole / "plots" / f"{name}.png").stat().st_size > 1000
        assert (whole / "plots" / f"{name}.svg").is_file()


def test_the_page_asks_nothing_of_any_server(whole):
    page = (whole / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert not re.findall(r'(?:src|data|srcset)="[^"#]', page)
    assert not re.findall(r"url\((?!#)", page), "also no font or picture in a style"
    assert "@import" not in page
    assert re.findall(r'<a href="https://arxiv.org/abs/\d+', page), "links are followed by people only"
    drawn = re.findall(r'<svg role="img" aria-label="([^"]+)"', page)
    assert len(drawn) >= 8
    assert all(len(text) > 30 for text in drawn)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_second_time_the_text_is_not_read_again(home, whole, capsys):
    before = {path: path.stat().st_mtime_ns for path in (whole / "activations").rglob("*.safetensors")}
    first = pd.read_parquet(whole / "tables" / "neurons.parquet")
    out = ["--out", str(whole), "--skip", "transfer,knockout,causal,attention,adapters,tokens,overlap"]
    said = analysed(capsys, "--model", str(home / "run0"), *FEW, *out)
    assert "not answered: transfer: left out, as --skip says" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    again = pd.read_parquet(whole / "tables" / "neurons.parquet")
    assert again["importance"].tolist() == first["importance"].tolist()


def test_one_domain_only(home, tmp_path, capsys):
    text = f"--data=de={home / 'text' / 'de.jsonl'}"
    said = analysed(capsys, "--model", str(home / "run0"), text, "--out", str(tmp_path), *FEW)
    assert re.search(r"not answered: removal: LAPE compares domains and there is only 'de'", said)
    assert "not answered: causal of run0: no neurons are known to be specific" in said
    tables = json.loads((tmp_path / "analysis.json").read_text())["tables"]
    assert [row["domain"] for row in tables["knockout"]] == ["de"]
    assert not math.isnan(tables["transfer"][0]["fr"]), "the other memories are still there"
    assert "rate_de" in pd.read_parquet(tmp_path / "tables" / "neurons.parquet")
