"""`koff analyze`: what it writes, what it says of runs that lack something, and what it refuses."""

import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_artifact import DOMAINS, VOCABULARY, tiny_decomposition
from tiny_models import tiny_model
from toy_text import toy_documents, write_jsonl

from koff_lightning import KoffError
from koff_lightning.artifact.export import export
from koff_lightning.cli import main
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.studies.analysis import paper
from koff_lightning.studies.analysis.runs import find_others, folder_for, history_of
from koff_lightning.studies.analysis.study import _about_text
from koff_lightning.studies.analysis.text import open_text

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
def whole(home, drawn_pictures):
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
    assert len(tables["transfer"]) == len(tables["perplexity"]) == 2 * len(DOMAINS)
    of_memories = ("similarity", "transfer", "perplexity", "knockout", "causal", "attention", "adapters", "tokens")
    assert {name: set(tables[name]["run"]) for name in of_memories} == {key: {"run0", "run1"} for key in of_memories}
    judged = tables["statements"]
    assert {paper.SPECIFIC, paper.GENERAL, paper.STAYS} <= set(judged["says"])
    assert set(judged["runs"]) == {2} and (judged["low"] <= judged["high"]).all()
    assert len(tables["similarity_draws"]) == 2 * 10_000
    said = [line for line in content["findings"] if line["text"].startswith("The paper, ")]
    assert [line["text"].split(": ")[1].split(". ")[0] for line in said] == list(dict.fromkeys(judged["says"]))
    for name in ("removed_by_layer", "enrichment", "transfer", "perplexity", "attention", "sparsity"):
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


SHORT = ["--skip", "transfer,knockout,attention,adapters,tokens", *FEW]


def test_a_masked_dense_artifact_gives_the_same(home, whole, tmp_path, capsys):
    analysed(capsys, "--model", str(home / "masked"), "--out", str(tmp_path), *SHORT)
    masked, ragged = (pd.read_parquet(folder / "tables" / "neurons.parquet") for folder in (tmp_path, whole))
    assert masked["removed_koff_masked"].tolist() == ragged["removed_koff_run0"].tolist()
    assert masked["specific"].tolist() == ragged["specific"].tolist()
    causal = [pd.read_parquet(folder / "tables" / "causal.parquet") for folder in (tmp_path, whole)]
    first = causal[1][causal[1]["run"] == "run0"]
    assert causal[0]["off_after"].to_numpy() == pytest.approx(first["off_after"].to_numpy(), rel=1e-5, nan_ok=True)


def exported(home, folder, units: list[str] | None = None, layer_only: int | None = None):
    """An artifact with a mask of its own making."""
    config = json.loads((home / "run0" / "artifact" / "koff.json").read_text())["config"]
    spec = SparsitySpec(target=0.05, min_channels=4, **({"units": units} if units else {}))
    module = tiny_decomposition_of(home, spec)
    if layer_only is not None:
        groups = module.gates.groups
        parts = [torch.ones(group.size, dtype=torch.bool) for group in groups]
        for part, group in zip(parts, groups, strict=True):
            part[: group.size // 3] = group.kind != "channel" or group.layer != layer_only
        module.gates.harden(torch.cat(parts))
    export(module, folder, config=config, prove=False)
    return folder


def tiny_decomposition_of(home, spec: SparsitySpec):
    from koff_lightning.decomposition import Decomposition
    from koff_lightning.specs.memories import LoraSpec

    module = Decomposition(str(home / "dense"), list(DOMAINS), spec, LoraSpec(rank=1), None)
    module.harden()
    return module.eval()


def test_no_ffn_neuron_removed(home, tmp_path, capsys):
    folder = exported(home, tmp_path / "kv", units=["kv_group"])
    said = analysed(capsys, "--model", str(folder), "--out", str(tmp_path / "out"), *FEW)
    assert re.search(r"not answered: removal of kv: .* removes no FFN neurons .*nothing to compare", said)
    assert re.search(r"not answered: causal of kv: .* removes no FFN neurons", said)
    assert "not answered: attention of kv: no domain of this text has a KV memory" in said
    tables = json.loads((tmp_path / "out" / "analysis.json").read_text())["tables"]
    assert {"transfer", "knockout", "stability"} <= set(tables)
    page, neurons = (tmp_path / "out" / "report.html").read_text(), tmp_path / "out" / "tables" / "neurons.parquet"
    assert f"<b>{len(pd.read_parquet(neurons)):,}</b><span>FFN neurons of the dense model" in page


def test_layers_with_nothing_removed_are_named(home, tmp_path, capsys):
    folder = exported(home, tmp_path / "one", layer_only=1)
    analysed(capsys, "--model", str(folder), "--out", str(tmp_path / "out"), *SHORT)
    tests = pd.read_parquet(tmp_path / "out" / "tables" / "enrichment.parquet").set_index("class")
    assert list(tests.loc["specific", "skipped"]) == [0]
    layers = pd.read_parquet(tmp_path / "out" / "tables" / "layers.parquet")
    assert layers.query("`class` == 'specific' and layer == 0")["removed"].tolist() == [0]


def test_pictures_of_an_earlier_study_are_not_left_beside_a_later_one(home, tmp_path, capsys):
    skip = "removal,ranking,overlap,similarity,transfer,causal,attention,adapters,tokens"
    analysed(capsys, "--model", str(home / "run0"), "--out", str(tmp_path), "--skip", skip, *FEW)
    (tmp_path / "plots" / "my own.png").touch()
    assert (tmp_path / "plots" / "knockout.svg").is_file() and (tmp_path / "tables" / "knockout.parquet").is_file()
    analysed(capsys, "--model", str(home / "run1"), "--out", str(tmp_path), "--skip", f"knockout,{skip}", *FEW)
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"sparsity", "my own"}
    listed = json.loads((tmp_path / "analysis.json").read_text())["files"]
    assert "knockout" not in listed and (tmp_path / "tables" / "knockout.parquet").is_file(), "it names its run"


def test_text_that_is_too_little_is_told(home, tmp_path, capsys):
    analysed(capsys, "--model", str(home / "run0"), "--out", str(tmp_path), *SHORT)
    page = (tmp_path / "report.html").read_text()
    assert re.search(r"Too little text: the halves of the text agree on \d+% .*(are needed|too alike)", page)
    assert "No other mask was compared with" in page
    assert "There is one run" in page


def test_bad_input_is_named(home, tmp_path, capsys):
    def refused(*words: str) -> str:
        assert main(["analyze", *words, "--out", str(tmp_path / "out"), *FEW]) == 2
        return capsys.readouterr().err

    run0 = str(home / "run0")
    assert "give --model, an artifact or a checkpoint" in refused()
    assert "missing: no such run: give a checkpoint, or the folder" in refused("--model", str(home / "missing"))
    assert "no file or folder matches" in refused("--model", str(home / "none*"))
    assert "is a model without koff.json, so it is no artifact" in refused("--model", str(home / "dense"))
    (tmp_path / "bare").mkdir()
    assert "holds neither a checkpoint" in refused("--model", run0, "--model", str(tmp_path / "bar*"))
    assert "is given twice: two seeds are two runs" in refused("--model", run0, "--model", run0)
    assert "--against takes NAME=RUN" in refused("--model", run0, "--against", str(home / "bare"))
    assert "so the studied runs are called" in refused("--model", run0, "--against", f"koff={home / 'bare'}")
    for option, said in (
        ("--draws=0", "draws must be 1 or more, got 0"),
        ("--rate=1.5", "rate must be a share between 0 and 1; got 1.5"),
        ("--bar=0", "bar must be a share between 0 and 1; got 0"),
        ("--controls=-1", "controls must be 0 or more, got -1"),
    ):
        assert main(["analyze", "--model", run0, *FEW, option]) == 2
        assert capsys.readouterr().err.startswith(f"koff: {said}")
    assert "seed must be from 0 to 2^63 - 1; got -1" in refused("--model", run0, "--seed", "-1")
    assert "no question 'transfers'. Did you mean 'transfer'?" in refused("--model", run0, "--skip", "transfers")
    assert "--data takes NAME=TEXT" in refused("--model", run0, "--data", "de")
    assert "give either --config or --data" in refused("--model", run0, "--data", "de=x", "--config", "demo.yaml")
    assert "no text (data.domains)" in refused("--model", run0, "--config", "ablations/no_memory.yaml")
    tiny_model("llama", seed=7, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1).save_pretrained(tmp_path / "x")
    for file in (home / "dense").glob("token*"):
        (tmp_path / "x" / file.name).write_bytes(file.read_bytes())
    assert re.search(
        r"was cut from .* \(hash .*\), but .* has hash .*give its own dense model",
        refused("--model", run0, "--dense", str(tmp_path / "x")),
    )


def test_a_place_that_cannot_be_written_is_told_before_the_work(home, tmp_path, capsys, monkeypatch):
    """As beside a colleague's run."""
    (tmp_path / "file").touch()
    monkeypatch.setattr("koff_lightning.studies.analysis.study.study", lambda *_, **__: pytest.fail("it works"))
    assert main(["analyze", "--model", str(home / "run0"), "--out", str(tmp_path / "file" / "in"), *FEW]) == 2
    line = f"koff: analyze: --out: cannot write into {tmp_path}/file/in (Not a directory): give another place"
    assert capsys.readouterr().err.splitlines()[-1] == line


def test_an_artifact_that_lies_in_no_run_has_no_course_and_its_analysis_lies_beside_it(tmp_path):
    """The checkpoints around it are other runs'; one of them may be damaged."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "other" / "checkpoints").mkdir(parents=True)
    (tmp_path / "other" / "checkpoints" / "last.ckpt").write_text("damaged")
    assert history_of(tmp_path / "mine") == []
    assert folder_for(tmp_path / "mine") == tmp_path / "mine-analysis"
    assert folder_for(tmp_path / "run" / "checkpoints" / "last.ckpt") == tmp_path / "run" / "analysis"


def test_runs_of_two_dense_models_are_not_compared(home, tmp_path, capsys):
    tiny_model("llama", seed=7, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1).save_pretrained(
        tmp_path / "dense"
    )
    for file in (home / "dense").glob("token*"):
        (tmp_path / "dense" / file.name).write_bytes(file.read_bytes())
    export(tiny_decomposition(tmp_path), tmp_path / "other", prove=False)
    words = ["--model", str(home / "run0"), "--against", f"other={tmp_path / 'other'}", "--out", str(tmp_path / "out")]
    assert main(["analyze", *words, *FEW]) == 2
    assert re.search(
        r"was cut from the dense model with hash .*: compare runs of one dense model", capsys.readouterr().err
    )
    assert main(["analyze", "--model", str(tmp_path / "other"), "--out", str(tmp_path / "out")]) == 2
    assert "does not say which text it was made with: give --config or --data" in capsys.readouterr().err


def test_a_study_reads_no_general_text():
    options = {"domains": {"de": "bundled:de"}, "retention": {"web": "gone.jsonl"}, "max_train_bytes": 20_000}
    data, _ = open_text(options, "koff-tiny", 300, 3_000)
    assert data.general is None


@pytest.mark.parametrize("words", ["bare", "=runs/bare", "bare=", "a/b=runs/bare", "="])
def test_a_run_to_compare_with_needs_a_name_and_a_place(words):
    with pytest.raises(KoffError, match=rf"--against takes NAME=RUN, .*; got '{words}'"):
        find_others([words])


def test_what_was_read_is_counted_by_domain():
    """A domain of which nothing is held out has no bytes; the tokens are those of both halves of the text."""
    source = SimpleNamespace(files=["x"])
    names = ["de", "fr", "zh"]
    data = SimpleNamespace(domain_names=names, seq_len=8, sources=dict.fromkeys(names, source))
    batches = [{"domains": ["de", "fr", "de"], "num_bytes": torch.tensor([5.0, 7.0, 11.0])}]
    batches += [{"domains": ["fr"], "num_bytes": torch.tensor([100.0])}]
    seen = SimpleNamespace(domains=("de", "fr", "zh"), tokens=np.array([[1, 2, 3], [10, 20, 30]]))
    found = _about_text(data, seen, batches)
    assert found["heldout_bytes"] == {"de": 16, "fr": 107, "zh": 0}
    assert found["watched_tokens"] == {"de": 11, "fr": 22, "zh": 33}


@pytest.mark.parametrize("tokens", [640, 6_400])
def test_of_each_domain_as_many_tokens_are_watched_as_were_asked_for(tokens):
    options = {"domains": {"de": "bundled:de", "en": "bundled:en", "fr": "bundled:fr"}, "seq_len": 64}
    _, text = open_text(options | {"max_train_bytes": 60_000}, "koff-tiny", tokens, 3_000)
    rows = [domain for batch in text for domain in batch["domains"]]
    assert {domain: 64 * rows.count(domain) for domain in set(rows)} == dict.fromkeys(("de", "en", "fr"), tokens)
