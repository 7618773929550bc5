"""`max_documents`: a domain is its first so many documents, held-out ones among them, in memory and streamed."""

import gzip
import json
from functools import partial
from types import SimpleNamespace

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import torch
from toy_text import toy_documents, toy_tokenizer

from koff_lightning.cli import main
from koff_lightning.data import DomainDataModule, DomainSource, is_heldout, shards, stream
from koff_lightning.data.sources import as_sources
from koff_lightning.support.errors import KoffError

TEXTS = toy_documents(120, longest=9)  # in three files of 40
SHARE = 0.2


def is_first(limit):
    """Texts of the first documents by side: training, held out."""
    first = [(is_heldout(f"doc-{n}", SHARE), text) for n, text in enumerate(TEXTS[:limit])]
    return [text for held, text in first if not held], [text for held, text in first if held]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A tokenizer and the same documents as three files of jsonl, csv, parquet and jsonl.gz."""
    folder = tmp_path_factory.mktemp("limit")
    toy_tokenizer(folder / "tokenizer")
    for part in range(3):
        rows = [{"id": f"doc-{n}", "text": TEXTS[n], "odd": n % 2} for n in range(40 * part, 40 * part + 40)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
        (folder / f"{part}.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
        table = "".join(f'{row["id"]},"{row["text"]}",{row["odd"]}\n' for row in rows)
        (folder / f"{part}.csv").write_text("id,text,odd\n" + table, encoding="utf-8")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / f"{part}.parquet")
    return folder


def module_of(text, source, **options):
    own = {"tokenizer": str(text / "tokenizer"), "seq_len": 16, "batch_size": 4, "heldout_fraction": SHARE}
    return DomainDataModule({"a": source}, **own | {"cache": str(text / "cache")} | options)


def streamed(text, source, max_steps=60, **options):
    """A loader that streams, and its module."""
    data = module_of(text, source, streaming=True, **options)
    data.setup()
    data.trainer = SimpleNamespace(accumulate_grad_batches=1, max_steps=max_steps, world_size=1)
    return data, data.train_dataloader()


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet", "jsonl.gz"])
@pytest.mark.parametrize("limit", [25, 40, 41, 119, 120, 500])
def test_in_memory_a_domain_is_its_first_documents(text, ending, limit):
    source = DomainSource(str(text / f"*.{ending}"), max_documents=limit)
    texts = module_of(text, source).texts()["a"]
    assert [texts.train, texts.heldout] == [*is_first(limit)]


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "jsonl.gz"])
@pytest.mark.parametrize("limit", [25, 40, 41, 120, 500])
def test_streamed_a_pass_has_the_same_documents(text, ending, limit, monkeypatch):
    monkeypatch.setattr(stream, "BUFFER", 600)
    data, loader = streamed(text, DomainSource(str(text / f"*.{ending}"), max_documents=limit))
    train, heldout = is_first(limit)
    assert data.texts()["a"].heldout == heldout, "all of them: there is no limit in bytes"
    rows = loader._reading.streams(0, 0, 1, {})["a"]
    assert sorted(found for _, found in rows._documents()) == sorted(train)
    shared = [loader._reading.streams(0, reader, 2, {})["a"] for reader in (0, 1)]
    assert sorted(found for one in shared for _, found in one._documents()) == sorted(train), "by two readers"


def test_only_what_where_wants_is_counted(text):
    source = DomainSource(str(text / "*.jsonl"), where={"odd": ["1"]}, max_documents=30)
    wanted = [n for n in range(120) if n % 2][:30]
    texts = module_of(text, source).texts()["a"]
    assert {*texts.train, *texts.heldout} == {TEXTS[n] for n in wanted}
    _, loader = streamed(text, source)
    found = {document for _, document in loader._reading.streams(0, 0, 1, {})["a"]._documents()}
    assert found == set(texts.train)


def test_heldout_files_are_not_counted_and_stay_whole(text):
    source = {"files": str(text / "[01].jsonl"), "heldout_files": str(text / "2.jsonl"), "max_documents": 50}
    texts = module_of(text, DomainSource(**source)).texts()["a"]
    assert (texts.train, texts.heldout) == (TEXTS[:50], TEXTS[80:])
    data, loader = streamed(text, DomainSource(**source))
    assert data.texts()["a"].heldout == TEXTS[80:]
    assert len([*loader._reading.streams(0, 0, 1, {})["a"]._documents()]) == 50


def test_what_comes_after_the_limit_is_not_read(text, tmp_path):
    """Not even a line that cannot be used, directly behind the last document."""
    path = tmp_path / "spoilt.jsonl"
    lines = (text / "0.jsonl").read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join([*lines[:30], "{spoilt", *lines[30:]]), encoding="utf-8")
    for streaming in (False, True):
        read = partial(module_of, text, streaming=streaming)
        texts = read(DomainSource(str(path), max_documents=30)).texts()["a"]
        assert len(texts.train) + len(texts.heldout) == 30
        with pytest.raises(KoffError, match="spoilt.jsonl:31: not valid JSON"):
            read(DomainSource(str(path), max_documents=31)).texts()
    _, loader = streamed(text, DomainSource(str(path), max_documents=30))
    assert len([*loader._reading.streams(0, 0, 1, {})["a"]._documents()]) == len(is_first(30)[0])


def test_a_stream_goes_on_where_it_stopped_and_not_with_another_limit(text, monkeypatch):
    monkeypatch.setattr(stream, "BUFFER", 600)
    source = str(text / "*.jsonl")
    _, whole = streamed(text, DomainSource(source, max_documents=70))
    batches = [batch["input_ids"] for batch in whole]
    _, first = streamed(text, DomainSource(source, max_documents=70))
    walked = iter(first)
    for _ in range(23):
        next(walked)
    state = first.state_dict()
    _, again = streamed(text, DomainSource(source, max_documents=70))
    again.load_state_dict(state)
    rest = [batch["input_ids"] for batch in again][: len(batches) - 23]
    assert len(rest) == 37 and all(map(torch.equal, rest, batches[23:]))
    for other in (71, None):
        _, loader = streamed(text, DomainSource(source, max_documents=other), max_heldout_bytes=10**6)
        with pytest.raises(KoffError, match="differs from the checkpoint's in text of a"):
            loader.load_state_dict(state)


def test_a_dataset_of_the_hub_is_cut_too(text, monkeypatch):
    rows = {"id": [f"doc-{n}" for n in range(120)], "text": TEXTS}
    table = datasets.Dataset.from_dict(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table.to_iterable_dataset(num_shards=3))
    builder = SimpleNamespace(hash="c" * 40)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda *_, **__: builder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    shards._open_hub.cache_clear()
    source = DomainSource("hub:own/toy", max_documents=55)
    texts = module_of(text, source).texts()["a"]
    assert [texts.train, texts.heldout] == [*is_first(55)]
    _, loader = streamed(text, source)
    found = [document for _, document in loader._reading.streams(0, 0, 1, {})["a"]._documents()]
    assert sorted(found) == sorted(is_first(55)[0])
    assert loader._reading.identity["version of a"] == f"own/toy@{'c' * 40}"
    shards._open_hub.cache_clear()


def test_prepared_tokens_belong_to_the_limit(text):
    keys = set()
    for limit in (None, 30, 31):
        data = module_of(text, DomainSource(str(text / "*.jsonl"), max_documents=limit))
        data.setup()
        keys.add(data._key(data.sources["a"]))
    assert len(keys) == 3


@pytest.mark.parametrize("limit", [0, -1, 2.5, True, "many"])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(KoffError, match=r"domain 'a': max_documents must be 1 or more \(or null for no limit\), got"):
        as_sources({"a": {"files": "a.jsonl", "max_documents": limit}})


def test_other_bad_limits_are_one_line(text, tmp_path, capsys):
    with pytest.raises(KoffError, match="bundled text comes already split: leave max_documents out"):
        as_sources({"de": {"files": "bundled:de", "max_documents": 5}})
    with pytest.raises(KoffError, match="no held-out text: none of the 1 document"):
        module_of(text, DomainSource(str(text / "*.jsonl"), max_documents=1)).texts()
    with pytest.raises(KoffError, match="needs data.max_heldout_bytes .*, heldout_files or max_documents"):
        streamed(text, DomainSource(str(text / "*.jsonl")))
    config = tmp_path / "own.yaml"
    config.write_text(f"data: {{domains: {{a: {{files: '{text / '0.jsonl'}', max_documents: 0}}}}}}", encoding="utf-8")
    words = ["--config", "tiny_12pct.yaml", "--config", str(config), f"--trainer.default_root_dir={tmp_path / 'run'}"]
    assert main(["fit", *words]) == 2
    err = capsys.readouterr().err
    assert "domain 'a': max_documents must be 1 or more" in err and err.count("\n") == 1
