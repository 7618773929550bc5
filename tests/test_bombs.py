"""Corpora of strangers: files that unpack to more than any text, headers that lie, folders that bring programs."""

import gzip
import lzma
import random

import pyarrow
import pyarrow.parquet
import pytest
from toy_text import toy_documents, write_jsonl

from koff_lightning.data import readers
from koff_lightning.data.readers import Fields, read_records
from koff_lightning.data.shards import hub_shards
from koff_lightning.support.errors import KoffError


def zstd(content):
    with pyarrow.CompressedOutputStream(sink := pyarrow.BufferOutputStream(), "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def texts_of(path):
    return [document.text for _, document in read_records(path, Fields(), pytest.fail)]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt"])
@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)])
def test_what_unpacks_to_far_more_than_text_does_is_refused_before_it_is_whole(
    tmp_path, monkeypatch, suffix, pack, kind
):
    monkeypatch.setattr(readers, "FREE", 2**20)
    path = tmp_path / f"a.{kind}{suffix}"
    path.write_bytes(pack((b"text,id\n" if kind == "csv" else b'{"text": "') + b"a" * 2**25))  # a line, in some KB
    with pytest.raises(KoffError, match=r"it unpacks to more than [\d,]+ bytes, which is not how text is packed"):
        texts_of(path)
    path = tmp_path / f"b.jsonl{suffix}"
    path.write_bytes(pack(write_jsonl(tmp_path / "b.jsonl", texts := toy_documents(400)).read_bytes()))
    assert texts_of(path) == texts


def test_a_table_whose_texts_are_one_text_a_million_times(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "FREE", 2**20)
    text = pyarrow.array(["a" * 1000])
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 100_000), text)})
    pyarrow.parquet.write_table(table.cast(pyarrow.schema([("text", pyarrow.string())])), tmp_path / "a.parquet")
    with pytest.raises(KoffError, match="it unpacks to more than"):
        texts_of(tmp_path / "a.parquet")


def test_a_table_whose_header_lies_is_one_line(tmp_path):
    table = pyarrow.table({"text": [f"text number {i} " * 5 for i in range(200)], "id": list(map(str, range(200)))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    rng, refused = random.Random(0), 0
    for _ in range(300):
        spoilt = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            spoilt[rng.randrange(len(whole) - footer, len(whole))] = rng.choice([0, 127, 128, 255, rng.randrange(256)])
        (tmp_path / "b.parquet").write_bytes(spoilt)
        try:
            list(read_records(tmp_path / "b.parquet", Fields(), lambda message: None))
        except KoffError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 150


def test_a_dataset_that_is_a_program_is_refused_and_not_run(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "corpus.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(KoffError, match="cannot read hub:") as error:
        hub_shards(str(tmp_path / "corpus"), None, "train", Fields())
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
