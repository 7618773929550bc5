"""`koff prepare`, the cache of tokenised text, and --offline: real commands, concurrent builders, what is missing."""

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from toy_text import toy_documents, toy_tokenizer, write_jsonl

from koff_lightning.cli import main
from koff_lightning.commands import offline, prepare
from koff_lightning.data import DomainDataModule, DomainSource
from koff_lightning.data import datamodule as module
from koff_lightning.errors import KoffError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KOFF_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    toy_tokenizer(folder / "tokenizer")
    for seed, name in enumerate("ab"):
        write_jsonl(folder / f"{name}.jsonl", toy_documents(60, seed=seed))
    return folder


def data_of(text, **options):
    defaults = {"tokenizer": str(text / "tokenizer"), "seq_len": 32, "batch_size": 4, "heldout_fraction": 0.2}
    return DomainDataModule({name: str(text / f"{name}.jsonl") for name in "ab"}, **defaults | options)


def prepared(text, **options):
    data = data_of(text, **options)
    return data.prepare(data._load_tokenizer())


def batches(data):
    data.setup()
    return [
        {key: value.tolist() if key != "domains" else value for key, value in batch.items()}
        for loader in (data.train_dataloader(), data.val_dataloader())
        for batch in loader
    ]


def test_prepared_text_gives_the_same_batches_and_no_file_is_read(text, monkeypatch):
    plain = data_of(text)
    expected, ids = batches(plain), plain.sample_ids("a", 50).tolist()
    assert prepared(text) == {"a": True, "b": True}
    assert prepared(text) == {"a": False, "b": False}
    monkeypatch.setattr(module, "read_domain", lambda *_, **__: pytest.fail("read again"))
    data = data_of(text)
    assert batches(data) == expected
    assert data.sample_ids("a", 50).tolist() == ids
    assert isinstance(data._train["a"].tokens, np.memmap)


def test_whatever_the_rows_depend_on_is_part_of_the_key(text, tmp_path):
    data = data_of(text)
    data.tokenizer = data._load_tokenizer()
    keys = {data._key(data.sources["a"]), data._key(data.sources["b"])}
    others = [{"seq_len": 48}, {"heldout_fraction": 0.3}, {"max_train_bytes": 2000}, {"max_heldout_bytes": 900}]
    others += [{"on_bad_line": "skip"}, {"tokenizer": toy_tokenizer(tmp_path / "no_bos", bos=False)}]
    for options in others:
        other = data_of(text, **options)
        other.tokenizer = other._load_tokenizer()
        keys.add(other._key(other.sources["a"]))
    path = str(text / "a.jsonl")
    sources = [DomainSource(path, text_field="id"), DomainSource(path, id_field="x"), DomainSource([path, "hub:c"])]
    sources += [DomainSource(path, heldout_files=str(text / "b.jsonl")), DomainSource([path, "bundled:de"])]
    keys |= {data._key(source) for source in sources}
    assert len(keys) == 2 + len(others) + len(sources)
    assert data._key(DomainSource(path, weight=3.0)) in keys
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((text / "a.jsonl").read_bytes())
    assert data._key(DomainSource(str(moved))) in keys


def test_a_changed_file_is_noticed(text, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", toy_documents(40))
    data = DomainDataModule({"a": str(file)}, str(text / "tokenizer"), 32, 4, 0.2)
    data.prepare(data._load_tokenizer())
    assert data._key(data.sources["a"]) == data._key(data.sources["a"])
    assert data.stored(data.sources["a"])
    write_jsonl(file, toy_documents(40, seed=9))
    os.utime(file, ns=(1, 1))
    assert data.stored(data.sources["a"]) is None


def test_a_damaged_entry_says_so(text):
    prepared(text)
    data = data_of(text)
    for file in data.cache.folder.glob("*/train/tokens.npy"):
        file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(KoffError, match=r"tokenised text in .* is damaged \(.*: delete that folder"):
        data.setup()


def test_streamed_text_is_not_prepared(text):
    with pytest.raises(KoffError, match=r"data\.streaming tokenises while training: there is nothing to prepare"):
        prepared(text, streaming=True, max_heldout_bytes=900)


def test_builders_of_the_same_entry_wait_for_each_other(text, tmp_path):
    """Three processes at once; each entry is made by exactly one of them."""
    argv = [sys.executable, "-m", "koff_lightning", "prepare", "--data.tokenizer", str(text / "tokenizer")]
    argv += ["--data.seq_len=32", "--data.heldout_fraction=0.2", "--model.backbone=koff-tiny"]
    argv += [f"--data.domains.{name}={text}/{name}.jsonl" for name in "ab"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    builders = [
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) for _ in "123"
    ]
    said = [builder.communicate(timeout=240) for builder in builders]
    assert [builder.returncode for builder in builders] == [0] * 3, said
    lines = [line for out, _ in said for line in out.splitlines()]
    for name in "ab":
        assert lines.count(f"{name}: tokenised") == 1
        assert lines.count(f"{name}: is there already") == 2
    assert not list((tmp_path / "cache" / "tokens").glob(".*.part"))
    assert data_of(text).prepare(data_of(text)._load_tokenizer()) == {"a": False, "b": False}


def test_a_full_disk_leaves_no_entry(text, monkeypatch):
    monkeypatch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(KoffError, match=r"cannot write .*: No space left on device"):
        prepared(text)
    data = data_of(text)
    data.tokenizer = data._load_tokenizer()
    assert data.stored(data.sources["a"]) is None


# ------------------------------------------------------------------------------------------------- offline, prefetch


def test_offline_lists_all_that_is_missing_within_seconds(tmp_path):
    """As a process of its own: the switches must be set before anything is imported."""
    env = {k: v for k, v in os.environ.items() if "OFFLINE" not in k} | {
        "HF_HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    argv = [sys.executable, "-m", "koff_lightning", "fit", "--config", "llama_12pct.yaml", "--offline"]
    argv += ["--data.domains.hub=hub:HuggingFaceFW/fineweb-2"]
    begin = time.monotonic()
    done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert time.monotonic() - begin < 60, "it should be about 6 s; the bound is for a busy machine"
    assert "11 thing(s) that the run needs are missing" in done.stderr
    for what in (
        "backbone: ",
        "weights: ",
        "tokenizer: ",
        "domain law: no file matches",
        "domain hub: cannot read hub:",
    ):
        assert f"\n  {what}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_offline_sets_every_switch(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    assert not offline.is_asked()
    offline.switch_off()
    assert offline.is_asked()
    assert {os.environ[name] for name in offline.SWITCHES} == {"1"}


def test_offline_finds_what_is_there(text, monkeypatch, capsys):
    monkeypatch.setenv(offline.ASKED, "1")
    words = ["--data.seq_len=32", "--data.heldout_fraction=0.2", "--model.backbone=koff-tiny"]
    assert main(["prepare", *words, f"--data.domains.a={text}/a.jsonl"]) == 0
    assert "a: tokenised" in capsys.readouterr().out
    assert main(["prepare", *words, f"--data.domains.a={text}/gone.jsonl"]) == 2
    assert "1 thing(s) that the run needs are missing" in capsys.readouterr().err
    assert main(["prepare", *words, f"--data.domains.a={text}/a.jsonl", "--prefetch-only"]) == 2
    assert "--prefetch-only fetches, --offline forbids it" in capsys.readouterr().err


def test_prefetch_fetches_model_datasets_and_tasks(text, tmp_path, monkeypatch, capsys):
    fetched = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: fetched.append((name, options)))
    monkeypatch.setattr(prepare, "find_task", lambda *task: fetched.append(task))
    (tmp_path / "corpus").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": toy_documents(40)}), tmp_path / "corpus" / "train.parquet")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    argv = ["prepare", "--model.backbone=some/model", "--model.revision=abc", "--prefetch-only"]
    argv += [f"--data.domains.x=hub:{tmp_path}/corpus", f"--data.domains.a={text}/a.jsonl"]
    assert main([*argv, "--lm_eval.tasks=[{task: koff_cloze, domain: x}]"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "fetched some/model",
        f"fetched hub:{tmp_path}/corpus train",
        "fetched task koff_cloze",
    ]
    assert fetched[0] == ("some/model", {"revision": "abc", "allow_patterns": prepare.FILES})
    assert fetched[1] == ("koff_cloze", None)


def test_weights_in_parts_must_all_be_there(tmp_path, monkeypatch):
    (tmp_path / "index.json").write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    there = {"model.safetensors.index.json": str(tmp_path / "index.json"), "1.safetensors": "x"}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _, file, revision: there.get(file))
    with pytest.raises(KoffError, match="1 of 2 files of weights of some/model are not in the cache"):
        offline.find_weights("some/model", None)
    there["2.safetensors"] = "y"
    offline.find_weights("some/model", None)
    offline.find_weights("koff-tiny", None)


def test_a_hub_domain_that_is_tokenised_needs_no_hub(text, tmp_path, monkeypatch):
    config = SimpleNamespace(data=SimpleNamespace(tokenizer=str(text / "tokenizer")))
    folder = tmp_path / "corpus"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": toy_documents(60)}), folder / "train.parquet")
    data = DomainDataModule({"x": f"hub:{folder}"}, str(text / "tokenizer"), 32, 4, 0.2)
    data.prepare(data._load_tokenizer())
    gone = lambda *_: (_ for _ in ()).throw(KoffError("no hub"))  # noqa: E731
    monkeypatch.setattr("koff_lightning.data.sources.hub_shards", gone)
    offline.find_domain(data, data.sources["x"], config)
    data.setup()
    with pytest.raises(KoffError, match="no hub"):
        offline.find_domain(data, DomainSource(f"hub:{folder}", split="other"), config)
