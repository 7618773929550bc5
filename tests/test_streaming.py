"""Streaming: every document once, exact resume, faults of sources and of text, hub datasets."""

import errno
import gzip
import json
import lzma
import warnings
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from test_datamodule import Recorder, trainer_in
from toy_text import toy_documents, toy_tokenizer, write_jsonl

from koff_lightning.data import DomainDataModule, DomainSource, is_heldout, retries, shards, stream
from koff_lightning.data.encoding import tokenize
from koff_lightning.data.packing import IGNORED
from koff_lightning.data.readers import Document, Part
from koff_lightning.data.shards import FileShard, HubShard, deal
from koff_lightning.data.sources import as_sources
from koff_lightning.data.stream import Place, RowStream, Text
from koff_lightning.loading import load_tokenizer
from koff_lightning.support import ranks
from koff_lightning.support.errors import KoffError

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        r".*LeafSpec.*",
        r"Checkpoint directory .* exists and is not empty",
        r".*multi-threaded, use of fork",
    )
]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    """So that a short run crosses packs, buffers, shards and passes."""
    monkeypatch.setattr(stream, "BUFFER", 6000)
    monkeypatch.setattr(stream, "PACK", 60)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a tokenizer and two domains in several files."""
    folder = tmp_path_factory.mktemp("text")
    toy_tokenizer(folder / "tokenizer")
    for name, files in (("a", 3), ("b", 5)):
        texts = toy_documents(40 * files, seed=files)
        for i in range(files):
            lines = [{"id": f"doc-{n}", "text": texts[n]} for n in range(40 * i, 40 * i + 40)]
            (folder / f"{name}-{i}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def module_of(text, names="ab", place=(0, 1), files="{name}-*.jsonl", **options):
    defaults = {"tokenizer": str(text / "tokenizer"), "seq_len": 32, "batch_size": 4, "heldout_fraction": 0.2}
    defaults |= {"streaming": True, "max_heldout_bytes": 10**6}
    data = DomainDataModule({name: str(text / files.format(name=name)) for name in names}, **defaults | options)
    data._place = lambda: place
    return data


def loader_of(text, max_steps=60, **options):
    data = module_of(text, **options)
    data.setup()
    data.trainer = SimpleNamespace(accumulate_grad_batches=1, max_steps=max_steps, world_size=1)
    return data.train_dataloader()


def plain(batch):
    return {key: value.tolist() if torch.is_tensor(value) else value for key, value in batch.items()}


def saved(state, folder):
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


# ------------------------------------------------------------------------------------------------- who reads what


@given(sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=12), readers=st.integers(1, 9))
def test_every_record_has_exactly_one_reader(sizes, readers):
    count = Counter(
        (shard, record)
        for parts in deal(sizes, readers)
        for shard, turn, of in parts
        for record in range(7)
        if record in Part(0, turn, of)
    )
    assert count == Counter({(shard, record): 1 for shard in range(len(sizes)) for record in range(7)})


def test_whole_shards_where_they_come_out_even_and_records_in_turn_where_not():
    assert deal([10, 10, 10, 10], 2) == [[(0, 0, 1), (2, 0, 1)], [(1, 0, 1), (3, 0, 1)]]
    assert deal([None] * 4, 4) == [[(i, 0, 1)] for i in range(4)]
    assert all(of == 2 for part in deal([1000, 10], 2) for _, _, of in part)
    assert {of for part in deal([10] * 5, 2) for _, _, of in part} == {1, 2}
    one_record = [[shard for shard, turn, _ in part if turn == 0] for part in deal([1, 1, 1], 4)]
    assert sorted(map(len, one_record)) == [0, 1, 1, 1]


@pytest.mark.parametrize("readers", [1, 2, 3, 7])
def test_a_pass_reads_every_document_once_and_rows_hold_all_their_bytes(text, readers):
    shards = [FileShard(text / f"b-{i}.jsonl") for i in range(5)]
    tokenizer = load_tokenizer(str(text / "tokenizer"))
    read, size = [], 0
    for reader, parts in enumerate(deal([shard.size for shard in shards], readers)):
        wanted = lambda shard, document: read.append(document.id) or True  # noqa: E731
        rows = RowStream(Text("b", shards, wanted, pytest.fail), parts, tokenizer, 32, 0, reader)
        before = len(read)
        for packed, row in rows:
            if rows.place.passes:
                break
            size += int(packed.num_bytes[row])
        del read[len(set(read[before:])) + before :]  # what the second pass has read by then
    assert sorted(read) == sorted(f"doc-{i}" for i in range(200))
    assert size == sum(len(document.encode()) for document in toy_documents(200, seed=5))


def test_hundreds_of_files_over_two_ranks_with_two_workers_each(tmp_path, text):
    """Through the loaders and their processes; files do not come out even, and in a pass each token has one reader.

    Rows open with the start token here, in the place of a token: fewer are read, none twice.
    """
    texts, files = toy_documents(404), 202
    for i in range(files):
        lines = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in texts[2 * i : 2 * i + 2])
        (tmp_path / f"a-{i:03d}.jsonl{'.gz' * (i % 2)}").write_bytes(gzip.compress(lines) if i % 2 else lines)
    options = {"names": "a", "files": "{name}-*", "tokenizer": str(text / "tokenizer"), "num_workers": 2}
    read, replaced = Counter(), 0
    for rank in range(2):
        loader = loader_of(tmp_path, 10**6, place=(rank, 2), batch_size=1, seq_len=128, **options)
        for number, batch in enumerate(loader):
            if loader._places[number % 2]["a"][0] == 0:  # the first pass of this lane
                read.update(batch["input_ids"].flatten().tolist())
                replaced += int(batch["labels"][0, 1] == IGNORED)
            if all(places.get("a", [0])[0] for places in loader._places):
                break
    wanted = loader._reading.texts["a"].wanted
    kept = [t for t in texts if wanted(0, Document(t, t))]
    assert 250 < len(kept) < 400
    expected = Counter(tokenize(kept, load_tokenizer(str(text / "tokenizer"))).tokens.tolist())
    del expected[0], read[0]  # BOS, with which the last row of a pack is filled too
    assert replaced > 100
    assert not read - expected
    assert (expected - read).total() == replaced


def test_passes_come_in_different_orders_and_so_do_seeds(text):
    def beginning(passes, seed):
        shards = [FileShard(text / f"b-{i}.jsonl") for i in range(5)]
        tokenizer = load_tokenizer(str(text / "tokenizer"))
        rows = RowStream(
            Text("b", shards, lambda *_: True, pytest.fail), deal([1] * 5, 1)[0], tokenizer, 32, seed, 0, Place(passes)
        )
        packed, row = next(rows)
        return packed.tokens[row].tolist()

    assert beginning(0, 0) == beginning(0, 0)
    assert len({str(beginning(*which)) for which in ((0, 0), (1, 0), (0, 1))}) == 3


def test_rows_are_nearly_full(monkeypatch, text):
    monkeypatch.undo()
    batches = list(loader_of(text, names="b", heldout_fraction=0.01))
    blank = size = 0
    for batch in batches:
        ends = (
            (batch["labels"] == IGNORED).flip(1).cumprod(1).sum(1)
        )  # tokens after the last that is predicted: padding,
        blank, size = blank + int(ends.sum()), size + batch["input_ids"].numel()  # or a document of which one is left
    assert 0 < blank < 0.01 * size


# ------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_interrupted_run_sees_the_batches_of_an_uninterrupted_one(text, tmp_path, accumulate, num_workers):
    def fit(folder, module, ckpt_path=None):
        checkpoint = ModelCheckpoint(folder, save_last=True, every_n_train_steps=3, save_on_train_epoch_end=False)
        trainer = trainer_in(folder, checkpoint, max_steps=8, accumulate_grad_batches=accumulate)
        data = module_of(text, num_workers=num_workers)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return module.seen

    whole = fit(tmp_path / "whole", Recorder())
    assert len(whole) == 8 * accumulate
    with pytest.raises(ConnectionError):
        fit(tmp_path / "cut", Recorder(stop_after=5 * accumulate))
    assert fit(tmp_path / "cut", Recorder(), tmp_path / "cut" / "last.ckpt") == whole[3 * accumulate :]


def test_a_run_can_go_on_after_any_batch(text, tmp_path):
    steps = 60  # more than a pass over the smaller domain
    loader = loader_of(text, steps, seq_len=128)
    batches, states = [], [saved(loader.state_dict(), tmp_path)]
    for batch in loader:
        batches.append(plain(batch))
        states.append(saved(loader.state_dict(), tmp_path))
    assert max(state["places"][0][0].get("a", [0])[0] for state in states) >= 1, "no second pass: make the run longer"
    for done in range(0, steps, 3):
        rest = loader_of(text, 3, seq_len=128)
        rest.load_state_dict(states[done])
        assert [plain(batch) for batch in rest] == batches[done : done + 3]


@pytest.mark.parametrize("fewer", [0, 1, 3])
def test_another_number_of_workers_gives_the_same_batches(text, fewer):
    loader = loader_of(text, 12, num_workers=2)
    batches = [plain(batch) for batch in loader]
    begun = loader_of(text, 5, num_workers=2)
    assert [plain(batch) for batch in begun] == batches[:5]
    rest = loader_of(text, 7, num_workers=fewer)
    with pytest.warns(UserWarning, match=f"is {fewer}, the run began with 2") if fewer == 3 else nullcontext():
        rest.load_state_dict(begun.state_dict())
    assert [plain(batch) for batch in rest] == batches[5:]


def test_an_epoch_ends_and_the_next_goes_on(text):
    whole = [plain(batch) for batch in loader_of(text, 10)]
    loader = loader_of(text, 5)
    assert [plain(batch) for _ in range(2) for batch in loader] == whole


def test_a_state_of_other_data_is_refused_or_warned_of(text, tmp_path):
    state = loader_of(text).state_dict()
    refuse = partial(pytest.raises, KoffError)
    others = r"text of a \(there \w{16}, here \w{16}\), text of b \(there"
    for options, what in (({"seq_len": 48}, r"seq_len \(there 32, here 48\)"), ({"heldout_fraction": 0.3}, others)):
        with refuse(match=f"differs from the checkpoint's in {what}.*, so it cannot go on"):
            loader_of(text, **options).load_state_dict(state)
    with refuse(match="in world_size"):
        loader_of(text, place=(0, 2)).load_state_dict(state)
    memory = DomainDataModule({"a": str(text / "a-0.jsonl")}, str(text / "tokenizer"), 32, 4, 0.2)
    memory.setup()
    with refuse(match=r"in .*, so it cannot go on"):
        loader_of(text).load_state_dict(memory.train_dataloader().state_dict())
    with refuse(match="is of a run that streamed its text, and this run is not to: .* Give --data.streaming=true"):
        memory.train_dataloader().load_state_dict(state)
    with pytest.warns(UserWarning, match="differs from the checkpoint's in batch_size"):
        loader_of(text, batch_size=6).load_state_dict(state)


def test_ranks_read_different_documents_and_each_finds_its_own_place_again(text, monkeypatch):
    loaders = [loader_of(text, 6, place=(rank, 2)) for rank in range(2)]
    batches = [[plain(batch) for batch in loader] for loader in loaders]
    rows = [{tuple(row) for batch in mine for row in batch["input_ids"]} for mine in batches]
    assert not rows[0] & rows[1]
    monkeypatch.setattr(ranks, "gather", lambda _: [(rank, loader._places) for rank, loader in enumerate(begun)])
    begun = [loader_of(text, 4, place=(rank, 2)) for rank in range(2)]
    for loader in begun:
        list(loader)
    state = begun[0].state_dict()
    for rank in range(2):
        rest = loader_of(text, 2, place=(rank, 2))
        rest.load_state_dict(state)
        assert [plain(batch) for batch in rest] == batches[rank][4:]


# ------------------------------------------------------------------------------------------------- the split


def test_heldout_documents_are_those_of_memory_and_never_trained_on(text):
    streamed, memory = module_of(text), module_of(text, streaming=False, max_heldout_bytes=None)
    for data in (streamed, memory):
        data.setup()
    for name in "ab":
        assert streamed._heldout[name].tokens.tolist() == memory._heldout[name].tokens.tolist()
        wanted = streamed._texts[name].wanted
        kept = [
            document.id
            for number, shard in enumerate(streamed._texts[name].shards)
            for _, document in shard.read(pytest.fail)
            if wanted(number, document)
        ]
        assert kept == [f"doc-{i}" for i in range(len(kept) * 2) if f"doc-{i}" in set(kept)]
        assert not [doc_id for doc_id in kept if is_heldout(doc_id, 0.2)]
    assert torch.equal(streamed.sample_ids("a", 50), streamed.sample_ids("a", 50))


def test_other_text_of_the_same_size_is_other_text(text, tmp_path):
    for path in text.glob("[ab]-*.jsonl"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_jsonl(tmp_path / "other.jsonl", toy_documents(3, seed=9))
    options = {"files": f"{tmp_path}/{{name}}-*.jsonl"}
    state = loader_of(text, **options).state_dict()
    loader_of(text, **options).load_state_dict(state)
    changed = tmp_path / "a-0.jsonl"
    content = changed.read_text()
    changed.write_text(content[:-6] + content[-6:].swapcase())
    assert changed.stat().st_size == (text / "a-0.jsonl").stat().st_size
    with pytest.raises(KoffError, match=r"differs from the checkpoint's in text of a \("):
        loader_of(text, **options).load_state_dict(state)


def test_other_heldout_text_leaves_other_text_to_train_on(text, tmp_path):
    states = []
    for seed in (9, 8):
        write_jsonl(tmp_path / "held.jsonl", toy_documents(3, seed=seed))
        data = module_of(text)
        data.sources = as_sources({"a": {"files": f"{text}/a-*.jsonl", "heldout_files": f"{tmp_path}/held.jsonl"}})
        data.shares = {"a": 1.0}
        data.setup()
        data.trainer = SimpleNamespace(accumulate_grad_batches=1, max_steps=60, world_size=1)
        states.append(data.train_dataloader())
    with pytest.raises(KoffError, match=r"differs from the checkpoint's in text of a \("):
        states[1].load_state_dict(states[0].state_dict())


def test_reading_the_head_stops_when_it_has_enough(tmp_path, text):
    write_jsonl(tmp_path / "a-0.jsonl", toy_documents(300))
    (tmp_path / "a-1.jsonl").write_text("not JSON\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("koff_lightning.data.datamodule.SAMPLE", 2000)
        options = {"tokenizer": str(text / "tokenizer"), "max_heldout_bytes": 2000}
        data = module_of(tmp_path, "a", **options)
        data.setup()
        assert 1500 < data._heldout["a"].num_bytes.sum() <= 2000


def test_own_heldout_files_and_bundled_text_are_streamed_as_they_were_split(tmp_path, text):
    write_jsonl(tmp_path / "train.jsonl", toy_documents(60))
    write_jsonl(tmp_path / "test.jsonl", [*toy_documents(9, seed=1), toy_documents(60)[7]])
    sources = {
        "own": DomainSource(f"{tmp_path}/train.jsonl", heldout_files=f"{tmp_path}/test.jsonl"),
        "de": DomainSource("bundled:de"),
    }
    data = DomainDataModule(sources, str(text / "tokenizer"), 32, 4, streaming=True)
    data.setup()
    assert [shard.name for shard in data._texts["own"].shards] == ["train.jsonl"]
    assert [shard.name for shard in data._texts["de"].shards] == ["de.train.jsonl.xz"]
    documents = [document for _, document in data._texts["own"].shards[0].read(pytest.fail)]
    assert [data._texts["own"].wanted(0, d) for d in documents] == [i != 7 for i in range(60)]


def test_temperature_brings_shares_closer(text):
    sources = {"a": DomainSource(str(text / "a-*.jsonl"), weight=9), "b": DomainSource(str(text / "b-*.jsonl"))}
    for temperature, share in ((1.0, 9), (2.0, 7.5)):
        data = DomainDataModule(
            sources, str(text / "tokenizer"), 32, 10, 0.2, 9000, temperature=temperature, streaming=True
        )
        data.setup()
        data.trainer = SimpleNamespace(accumulate_grad_batches=1, max_steps=8, world_size=1)
        drawn = Counter(domain for batch in data.train_dataloader() for domain in batch["domains"])
        assert drawn["a"] / 8 == pytest.approx(share, abs=0.2)


# ------------------------------------------------------------------------------------------------- kinds of file


def test_all_kinds_of_file_in_one_domain(tmp_path, text):
    texts = toy_documents(120)
    lines = [json.dumps({"text": t}).encode() + b"\n" for t in texts]
    (tmp_path / "a-1.jsonl").write_bytes(b"".join(lines[:20]))
    (tmp_path / "a-2.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[20:40])))
    (tmp_path / "a-3.jsonl.xz").write_bytes(lzma.compress(b"".join(lines[40:60])))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts[60:100]}), tmp_path / "a-4.parquet", row_group_size=7)
    (tmp_path / "a-5.csv").write_text("text\n" + "".join(f'"{t}"\n' for t in texts[100:119]))
    (tmp_path / "a-6.txt").write_text(texts[119])
    (tmp_path / "a-7.jsonl").write_bytes(b"")
    loader = loader_of(tmp_path, 30, names="a", files="a-*", tokenizer=str(text / "tokenizer"), num_workers=2)
    read = []
    for part in deal([shard.size for shard in loader._reading.texts["a"].shards], 3):
        for shard, turn, of in part:
            for first in (0, 4):  # as a resumed run
                shards = loader._reading.texts["a"].shards
                read += [d.text for n, d in shards[shard].read(pytest.fail, Part(first, turn, of)) if first or n < 4]
    assert sorted(read) == sorted(texts)
    assert len(list(loader)) == 30


def test_hub_datasets_are_streamed_shard_by_shard(tmp_path, text):
    texts = toy_documents(200)
    folder = tmp_path / "corpus"
    (folder / "data").mkdir(parents=True)
    for i in range(4):
        rows = {"content": texts[50 * i : 50 * i + 50], "path": [f"p{n}" for n in range(50 * i, 50 * i + 50)]}
        pyarrow.parquet.write_table(pyarrow.table(rows), folder / "data" / f"train-{i:05d}-of-00004.parquet")
    source = DomainSource(f"hub:{folder}", text_field="content", id_field="path")
    options = {"tokenizer": str(text / "tokenizer"), "seq_len": 32, "batch_size": 4, "heldout_fraction": 0.2}
    data = DomainDataModule({"x": source}, **options, streaming=True, max_heldout_bytes=10**6, num_workers=2)
    memory = DomainDataModule({"x": source}, **options)
    for module in (data, memory):
        module.setup()
    assert data._heldout["x"].tokens.tolist() == memory._heldout["x"].tokens.tolist()
    shards = data._texts["x"].shards
    assert [type(shard) for shard in shards] == [HubShard] * 4
    assert [d.text for shard in shards for _, d in shard.read(pytest.fail)] == texts
    assert [n for n, _ in shards[2].read(pytest.fail, Part(9, 1, 3))] == list(range(10, 50, 3))
    data.trainer = SimpleNamespace(accumulate_grad_batches=1, max_steps=40, world_size=1)
    batches = [plain(batch) for batch in data.train_dataloader()]
    begun = data.train_dataloader()
    begun._length = 20
    list(begun)
    rest = data.train_dataloader()
    rest.load_state_dict(begun.state_dict())
    assert [plain(batch) for batch in islice(rest, 20)] == batches[20:]
    with pytest.raises(KoffError, match="has no column 'text', only content, path: set text_field"):
        DomainDataModule({"x": f"hub:{folder}"}, **options).setup()
    with pytest.raises(KoffError, match="cannot read hub:.*split.*test"):
        DomainDataModule({"x": DomainSource(f"hub:{folder}", split="test")}, **options).setup()


def test_other_content_of_a_local_dataset_is_other_text(tmp_path, text):
    folder = tmp_path / "corpus"
    folder.mkdir()

    def loader(texts, file="train.jsonl"):
        shards._open_hub.cache_clear()
        for old in folder.iterdir():
            old.unlink()
        rows = [{"text": one, "id": str(number)} for number, one in enumerate(texts)]
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DomainDataModule({"x": f"hub:{folder}"}, str(text / "tokenizer"), 32, 4, 0.2, 900, streaming=True)
        data.trainer = SimpleNamespace(accumulate_grad_batches=1, max_steps=4, world_size=1, lightning_module=None)
        data.setup()
        return data.train_dataloader()

    texts = toy_documents(200)
    state = loader(texts).state_dict()
    loader(texts).load_state_dict(state)
    other = [*texts[:-1], texts[-1][::-1]]  # of the same size, and nothing else is held out
    for changed in (loader(other), loader(texts, "train-other.jsonl")):
        with pytest.raises(KoffError, match="differs from the checkpoint's in text of x"):
            changed.load_state_dict(state)


def test_a_dataset_of_the_hub_that_has_moved_on_is_other_text(text, monkeypatch):
    """What is streamed is the version that the run saw at its start; the error names both, so one can be pinned."""
    commits = iter("abb")
    asked = []

    def load_dataset(path, name, split, revision, streaming):
        asked.append((path, revision))
        rows = {"text": toy_documents(80), "id": [str(i) for i in range(80)]}
        return datasets.Dataset.from_dict(rows).to_iterable_dataset(num_shards=2)

    def loader(repo):
        shards._open_hub.cache_clear()
        commit = next(commits) * 40
        builder = lambda name, subset, revision: SimpleNamespace(hash=revision or commit)  # noqa: E731
        monkeypatch.setattr(datasets, "load_dataset_builder", builder)
        data = DomainDataModule({"x": f"hub:{repo}"}, str(text / "tokenizer"), 32, 4, 0.2, 900, streaming=True)
        data.trainer = SimpleNamespace(accumulate_grad_batches=1, max_steps=4, world_size=1, lightning_module=None)
        data.setup()
        return data.train_dataloader()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    state = loader("org/name").state_dict()
    assert set(asked) == {("org/name", "a" * 40)}
    differs = rf"in version of x \(there org/name@{'a' * 40}, here org/name@{'b' * 40}\), .*by hub:name@commit\)"
    with pytest.raises(KoffError, match=differs):
        loader("org/name").load_state_dict(state)
    loader(f"org/name@{'a' * 40}").load_state_dict(state)
    shards._open_hub.cache_clear()


# ------------------------------------------------------------------------------------------------- faults of a source


class Flaky:
    """A shard whose reading fails `times` times after the third record."""

    def __init__(self, shard, error, times):
        self.shard, self.error, self.left, self.name, self.size = shard, error, times, shard.name, shard.size

    def read(self, on_bad, part):
        for n, item in enumerate(self.shard.read(on_bad, part)):
            if n == 3 and self.left:
                self.left -= 1
                raise KoffError("cannot read it") from self.error
            yield item


@pytest.fixture
def waited(monkeypatch):
    seconds = []
    monkeypatch.setattr(retries.time, "sleep", seconds.append)
    monkeypatch.setattr(retries.constants, "HF_HUB_OFFLINE", False)  # also where the tests run without a network
    return seconds


def break_a(loader, error, times):
    text = loader._reading.texts["a"]
    flaky = replace(text, shards=[Flaky(shard, error, times) for shard in text.shards])
    object.__setattr__(loader._reading, "texts", {**loader._reading.texts, "a": flaky})
    return loader


@pytest.mark.filterwarnings("ignore:cannot read a-.*trying again")
@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), ConnectionResetError("reset"), TimeoutError("slow")])
def test_a_fault_that_passes_changes_nothing(text, waited, error):
    loader = break_a(loader_of(text, 20), error, 2)
    assert [plain(batch) for batch in loader] == [plain(batch) for batch in loader_of(text, 20)]
    assert waited[:2] == [1, 1], "the wait begins anew once something was read"


@pytest.mark.filterwarnings("ignore:cannot read a-.*trying again")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_source_that_stays_away_stops_clearly_and_loses_nothing(text, waited, num_workers):
    whole = [plain(batch) for batch in loader_of(text, 30, num_workers=num_workers)]
    loader = loader_of(text, 30, num_workers=num_workers)
    reading = loader._reading
    loader = break_a(loader, OSError(errno.EIO, "unplugged"), 0)
    seen = []
    with pytest.raises(KoffError, match=r"cannot read a-\d.jsonl: .* Tried 9 times in 255 s\. Nothing saved is lost"):
        for batch in loader:
            seen.append(plain(batch))
            if len(seen) == 2:
                break
        state = loader.state_dict()
        dead = loader_of(text, 28, num_workers=num_workers)
        dead.load_state_dict(state)
        for shard in break_a(dead, OSError(errno.EIO, "unplugged"), 10**9)._reading.texts["a"].shards:
            shard.read = partial(_fails, shard.error)
        list(dead)
    rest = loader_of(text, 28, num_workers=num_workers)
    rest.load_state_dict(state)
    assert seen + [plain(batch) for batch in rest] == whole
    assert reading.seq_len == 32


def _fails(error, on_bad, part):
    raise error
    yield


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "no right"), FileNotFoundError("gone"), None])
def test_a_fault_that_does_not_pass_stops_at_once(text, waited, error):
    with pytest.raises(KoffError, match="cannot read it"):
        list(break_a(loader_of(text, 30), error, 1))
    assert waited == []


def test_a_web_servers_answers(waited):
    class Answer(Exception):
        def __init__(self, code):
            self.response = SimpleNamespace(status_code=code)

    assert [retries._is_transient(Answer(code)) for code in (401, 404, 429, 503)] == [False, False, True, True]


def test_without_network_nobody_waits_for_it(waited, monkeypatch):
    """datasets says ConnectionError, and hides that it was the switch."""
    monkeypatch.setattr(retries.constants, "HF_HUB_OFFLINE", True)
    assert not retries._is_transient(ConnectionError("Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)"))
    assert retries._is_transient(OSError(errno.EIO, "a disk is something else"))


# ------------------------------------------------------------------------------------------------- faults of the text


def test_bad_lines_stop_or_are_left_out_with_one_warning(tmp_path, text):
    good = [json.dumps({"text": t}).encode() for t in toy_documents(60)]
    bad = [b'{"text": "cut', b'{"text": "\xff"}', b'{"text": {"a": {"b": "nested"}}}', b"[" * 9000, b"\x00"]
    (tmp_path / "a-0.jsonl").write_bytes(b"\n".join(bad + good) + b"\n")
    (tmp_path / "a-1.jsonl").write_bytes(b"")
    options = {"names": "a", "tokenizer": str(text / "tokenizer")}
    with pytest.raises(KoffError, match=r"a-0\.jsonl:1: not valid JSON .*on_bad_line=skip"):
        list(loader_of(tmp_path, 20, **options))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        list(loader_of(tmp_path, 20, on_bad_line="skip", **options))
    said = [str(warning.message) for warning in heard]
    assert len(said) == 2
    assert "domain 'a': left out 5 line(s) that could not be used, first" in said[0], "when the head is read"
    assert "domain 'a': leaves out lines that cannot be used, first" in said[1], "in the stream, once"
    assert all("a-0.jsonl:1: not valid JSON" in message for message in said), "the first is named"


def test_nuls_huge_lines_and_duplicates_are_text(tmp_path, text):
    texts = ["a \x00 b " * 5, "huge " * 60_000, *["the same " * 9] * 30, *toy_documents(40)]
    write_jsonl(tmp_path / "a-0.jsonl", texts)
    loader = loader_of(tmp_path, 40, names="a", tokenizer=str(text / "tokenizer"))
    assert len(list(loader)) == 40


def test_too_little_text_for_all_that_read_it(tmp_path, text):
    write_jsonl(tmp_path / "a-0.jsonl", toy_documents(4))
    loader = loader_of(tmp_path, 5, names="a", tokenizer=str(text / "tokenizer"), heldout_fraction=0.5, place=(7, 8))
    with pytest.raises(KoffError, match="domain 'a' has too little training text .* reader 8 gets none"):
        list(loader)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_train_bytes": 99}, "data.max_train_bytes=99 limits text in memory, data.streaming keeps none"),
        ({"max_heldout_bytes": None}, "domain 'a': data.streaming needs data.max_heldout_bytes"),
        ({"max_heldout_bytes": 1}, "domain 'a' has no held-out text that could be used"),
        ({"temperature": 0.0}, "data.temperature must be a number above 0, got 0.0"),
        ({"temperature": float("nan")}, "data.temperature must be a number above 0"),
        ({"max_steps": -1}, "data.streaming needs trainer.max_steps"),
    ],
)
def test_bad_options(text, options, message):
    with pytest.raises(KoffError, match=message):
        loader_of(text, **options)


def test_opening_a_stream_leaves_the_global_random_states_alone(text):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    next(iter(loader_of(text)))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.random.get_state()[1].tolist() == numpy_before
