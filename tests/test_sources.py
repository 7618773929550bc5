"""Sources: every file kind, the split, the limits, and each kind of bad input with its own line."""

import csv
import gzip
import json
import lzma
import warnings
from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from toy_text import toy_documents, write_jsonl

from koff_lightning.data import DomainDataModule
from koff_lightning.data.readers import Fields, read_records
from koff_lightning.data.sources import (
    DomainSource,
    as_shares,
    as_sources,
    bundled_domains,
    domain_shards,
    expand_files,
)
from koff_lightning.data.split import is_heldout, read_domain
from koff_lightning.data.streamed_split import split_streamed
from koff_lightning.support.errors import KoffError
from koff_lightning.support.yaml_files import refuse_duplicate_keys

TEXTS = ["first document\nwith two lines", 'zweites, größeres "Dokument"', "третий 狐狸"]


def fail(message):
    raise KoffError(message)


def documents_of(path, *names, on_bad=fail):
    return [document for _, document in read_records(path, Fields(*names), on_bad)]


def texts_of(path, *names, on_bad=fail):
    return [document.text for document in documents_of(path, *names, on_bad=on_bad)]


def read(source, **options):
    return read_domain("x", source, **{"heldout_fraction": 0.3, **options})


# ------------------------------------------------------------------------------------------------- kinds of file


def jsonl_bytes():
    return "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


@pytest.mark.parametrize(("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_jsonl_plain_and_compressed(tmp_path, suffix, pack):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack(jsonl_bytes()))
    assert texts_of(path) == TEXTS


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


def test_zst_in_one_frame_or_several(tmp_path):
    path, content = tmp_path / "a.jsonl.zst", jsonl_bytes()
    for packed in (zstd(content), zstd(content[:30]) + zstd(content[30:])):
        path.write_bytes(packed)
        assert texts_of(path) == TEXTS


def test_csv_with_commas_quotes_and_line_ends_in_the_text(tmp_path):
    path = tmp_path / "a.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # as Excel writes it
        csv.writer(file).writerows([["text", "id"], *([text, str(i)] for i, text in enumerate(TEXTS))])
    assert [tuple(document) for document in documents_of(path)] == [(str(i), text) for i, text in enumerate(TEXTS)]


@pytest.mark.parametrize("name", ["text", "id", "kind"])
def test_two_columns_of_one_name_are_refused_where_they_are_read(tmp_path, name):
    names = ["text", "id", "kind", "note", "note", name]
    (tmp_path / "a.csv").write_text("\n".join([",".join(names), "a,b,c,d,e,f"]))
    table = pyarrow.Table.from_arrays([pyarrow.array([letter]) for letter in "abcdef"], names=names)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for kind in ("csv", "parquet"):
        with pytest.raises(
            KoffError, match=rf"a\.{kind} has several columns '{name}', and nothing says which is meant"
        ):
            list(read_records(tmp_path / f"a.{kind}", Fields(where=(("kind", ("c",)),)), pytest.fail))
    (tmp_path / "b.csv").write_text("text,id,note,note\na,b,c,d\n")  # nobody reads the notes
    assert [document.id for _, document in read_records(tmp_path / "b.csv", Fields(), pytest.fail)] == ["b"]


def test_csv_fields_may_be_longer_than_the_csv_modules_limit(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"text\n{'x' * 200_000}\n")
    assert len(texts_of(path)[0]) == 200_000


def test_txt_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(TEXTS), encoding="utf-8")
    assert texts_of(path) == ["\n".join(TEXTS)]


def test_parquet_with_named_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": TEXTS, "path": [7, 8, 9], "other": [0, 0, 0]}), path)
    documents = documents_of(path, "content", "path")
    assert [(d.id, d.text) for d in documents] == list(zip("789", TEXTS, strict=True))


def test_a_document_without_id_is_its_own_id_and_empty_ones_are_left_out(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "id": null}\n\n{"text": ""}\n{"text": "b"}\n')
    assert [tuple(document) for document in documents_of(path)] == [("a", "a"), ("b", "b")]
    (tmp_path / "a.csv").write_text("id,text\n0,a\n,b\n")
    assert [document.id for document in documents_of(tmp_path / "a.csv")] == ["0", "b"]


# ------------------------------------------------------------------------------------------------- bad lines


BAD_LINES = {
    b'{"text": ': r"a\.jsonl:2: not valid JSON \(Expecting value at column 9\)",
    b'["text"]': r"a\.jsonl:2: expected a JSON object with a field 'text', got a list",
    b'{"content": "x", "url": "y"}': r"a\.jsonl:2: no field 'text', only content, url: set text_field",
    b'{"text": 3}': r"a\.jsonl:2: field 'text' should be text, got int",
    b'{"text": null}': r"a\.jsonl:2: field 'text' should be text, got null",
    b'{"text": "\xff"}': r"a\.jsonl:2: not valid UTF-8",
    b'{"text": "x", "i\xffd": "lost"}': r"a\.jsonl:2: not valid UTF-8",
    b'{"text": "\\ud800"}': r"a\.jsonl:2: not valid UTF-8",
    b'{"text": "x", "id": "\\ud800"}': r"a\.jsonl:2: not valid UTF-8",
    b'{"text": ' + b"1" * 5_000 + b"}": r"a\.jsonl:2: not usable JSON \(a number of thousands of digits\)",
    b'{"a\xc2\x85b": 1}': r"a\.jsonl:2: no field 'text', only a.x85b: set text_field",
    b"[" * 100_000: r"a\.jsonl:2: not (usable|valid) JSON",
    b'{"text": "x", "n": ' + b"1" * 5000 + b"}": r"a\.jsonl:2: not usable JSON \(a number of thousands of digits\)",
}


@pytest.mark.parametrize(("line", "message"), BAD_LINES.items(), ids=[m[12:35] for m in BAD_LINES.values()])
def test_a_bad_line_is_named_or_left_out(tmp_path, line, message):
    good = [json.dumps({"text": text}).encode() for text in toy_documents(30)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good[0], line, *good[1:]]))
    with pytest.raises(KoffError, match=f"{message}.*on_bad_line=skip"):
        read(DomainSource(str(path)))
    with pytest.warns(UserWarning, match=f"'x': left out 1 line.*{message}"):
        texts = read(DomainSource(str(path)), on_bad_line="skip")
    assert len(texts.train) + len(texts.heldout) == 30


def test_a_file_that_is_not_what_its_name_says_is_told_so(tmp_path):
    """To leave out bad lines is no advice where all are bad."""
    path = tmp_path / "a.jsonl"
    path.write_text("id,text\n0,a\n1,b\n")
    with pytest.raises(
        KoffError, match=r"a\.jsonl:1: not valid JSON .*; the next 2 are no better\. .* name csv \.csv"
    ) as e:
        read(DomainSource(str(path)))
    assert "on_bad_line" not in str(e.value)
    path.write_bytes('{"text": "süß"}\n'.encode("latin-1") * 30)
    with pytest.raises(KoffError, match=r"a\.jsonl:1: not valid UTF-8; the next 9 are no better\. Save it as UTF-8$"):
        read(DomainSource(str(path)))
    path.write_text('{"content": "a"}\n' * 30)
    with pytest.raises(
        KoffError, match=r"a\.jsonl:1: no field 'text', only content: .*; the next 9 are no better\."
    ) as e:
        read(DomainSource(str(path)))
    path.write_text("id,text\n" + '{"text": "a"}\n')
    with pytest.raises(KoffError, match=r"a\.jsonl:1: not valid JSON \(.*\)\. Mend it, or set data\.on_bad_line=skip"):
        read(DomainSource(str(path)))


def test_skip_says_nothing_when_there_is_nothing_to_skip(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", toy_documents(30))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(DomainSource(str(path)), on_bad_line="skip")


def test_bad_utf8_in_csv_txt_and_parquet(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text\ngood\n\xff\n")
    with pytest.raises(KoffError, match=r"a\.csv:3: not valid UTF-8"):
        texts_of(tmp_path / "a.csv")
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(KoffError, match=r"a\.txt:1: not valid UTF-8"):
        texts_of(tmp_path / "a.txt")
    column = pyarrow.Array.from_buffers(
        pyarrow.string(),
        2,
        [None, pyarrow.py_buffer(bytes([0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0])), pyarrow.py_buffer(b"a\xff")],
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(KoffError, match=r"a\.parquet:2: not valid UTF-8"):
        texts_of(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "rows",
    ["1,good\n2\n", "1,good\n2,a text, with a comma\n", "1,good\n2,trailing,\n", "\n1,good\ntext\n"],
    ids=["short", "comma", "empty", "blank line"],
)
def test_a_csv_row_with_other_columns_than_the_header_is_a_bad_line(tmp_path, rows):
    (tmp_path / "a.csv").write_text(f"id,text\n{rows}")
    with pytest.raises(KoffError, match=r"a\.csv:[34]: more or fewer fields than the header"):
        texts_of(tmp_path / "a.csv")
    assert texts_of(tmp_path / "a.csv", on_bad=lambda _: None) == ["good"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,id\nx,0\n"abc,1\nfoo,2\nbar,3\n', "unexpected end of data, in lines 3 to 5"),
        ('text,id\n"he said "hi"",1\n', r"',' expected after '\"', in lines 2 to 2"),
        ('"text', "unexpected end of data, in lines 1 to 1"),
        ("text\rabc\r", "new-line character seen"),
    ],
    ids=["unclosed", "not doubled", "header", "line ends"],
)
def test_a_csv_with_wrong_quotes_stops_even_when_bad_lines_are_skipped(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(KoffError, match=rf"cannot read .*a\.csv: {message}"):
        texts_of(tmp_path / "a.csv", on_bad=lambda _: None)


def test_a_csv_in_quotes_that_is_cut_never_gives_a_shorter_text(tmp_path):
    """Whole to the last byte but the line's end, or an error: in no cut does a shorter text come out."""
    whole = '"id","text"\n"1","one, two"\n"2","three\nfour"\n'
    for end in range(1, len(whole)):
        (tmp_path / "a.csv").write_text(whole[:end])
        try:
            assert texts_of(tmp_path / "a.csv") in ([], ["one, two"], ["one, two", "three\nfour"])
        except KoffError as error:
            assert "a.csv" in str(error)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_without_the_text_column_names_those_it_has(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "csv":
        path.write_text("body,id\nx,1\n")
    else:
        pyarrow.parquet.write_table(pyarrow.table({"body": ["x"], "id": ["1"]}), path)
    with pytest.raises(KoffError, match="has no column 'text', only body, id: set text_field"):
        texts_of(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.parquet"])
def test_a_damaged_file_stops_even_when_bad_lines_are_skipped(tmp_path, name):
    (tmp_path / name).write_bytes(b"this is neither")
    with pytest.raises(KoffError, match=f"cannot read .*{name}"):
        texts_of(tmp_path / name, on_bad=lambda message: None)


@pytest.mark.parametrize(("suffix", "pack"), [(".gz", gzip.compress), (".xz", lzma.compress), (".zst", zstd)])
def test_a_truncated_archive_stops(tmp_path, suffix, pack):
    whole = pack(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in toy_documents(200)))
    (tmp_path / f"a.jsonl{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(KoffError, match=rf"cannot read .*a\.jsonl\{suffix}"):
        texts_of(tmp_path / f"a.jsonl{suffix}", on_bad=lambda message: None)


def test_an_archive_with_a_wrong_byte_in_its_middle_stops(tmp_path):
    """zlib has an exception of its own, which is no OSError."""
    whole = bytearray(gzip.compress(b"".join(json.dumps({"text": t}).encode() + b"\n" for t in toy_documents(200))))
    for place in range(20, 60):
        damaged = whole.copy()
        damaged[place] ^= 0xFF
        (tmp_path / "a.jsonl.gz").write_bytes(damaged)
        with pytest.raises(KoffError, match=r"cannot read .*a\.jsonl\.gz"):
            texts_of(tmp_path / "a.jsonl.gz", on_bad=lambda message: None)


# ------------------------------------------------------------------------------------------------- files and names


def test_globs_are_sorted_and_a_file_counts_once(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "deep/er/c.jsonl"):
        write_jsonl(tmp_path / name, ["x"])
    found = expand_files([f"{tmp_path}/**/*.jsonl", f"{tmp_path}/a.jsonl"])
    assert [path.name for path in found] == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert len(expand_files([f"{tmp_path}/a.jsonl", f"{tmp_path}/deep/../a.jsonl"])) == 1


def test_a_file_name_may_hold_glob_characters(tmp_path):
    path = write_jsonl(tmp_path / "a[1].jsonl", ["x"])
    assert expand_files([str(path)]) == [path]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none/*.jsonl", r"no file matches '.*none/\*\.jsonl' \(looked in .*\): correct the path"),
        ("gone.jsonl", "no file matches"),
        ("folder", r"'.*folder' is a folder: name the files in it, for example '.*\*\.jsonl'"),
        ("notes.docx", r"cannot read .*notes\.docx: unknown kind of file '\.docx'\. Known: \.jsonl, \.csv"),
        ("bare", "unknown kind of file ''"),
        ("a.parquet.gz", "all but parquet also with"),
    ],
)
def test_files_that_are_not_there_or_not_text(tmp_path, pattern, message):
    (tmp_path / "folder").mkdir()
    for name in ("notes.docx", "bare", "a.parquet.gz"):
        (tmp_path / name).touch()
    with pytest.raises(KoffError, match=message):
        read(DomainSource(f"{tmp_path}/{pattern}"))


def test_an_unknown_bundled_domain_lists_those_there_are():
    with pytest.raises(KoffError, match="unknown bundled domain 'klingon'; bundled are: de, en, .*zh"):
        read(DomainSource("bundled:klingon"))


@pytest.mark.parametrize("name", ["", "a b", "a/b", "..", "ä", "a.b", "x" * 65, "a\n"])
def test_names_that_are_not_safe_as_file_names(name):
    with pytest.raises(KoffError, match="is not safe as a file name: use 1 to 64"):
        as_sources({name: "bundled:de"})


def test_names_that_yaml_does_not_read_as_text():
    with pytest.raises(KoffError, match="domain name False is not text: put it in quotes"):
        as_sources({False: "bundled:de"})


def test_names_that_differ_in_case_only():
    with pytest.raises(KoffError, match="duplicate domain names 'de' and 'DE'"):
        as_sources({"de": "bundled:de", "DE": "bundled:de"})


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf"), True])
def test_bad_weights(weight):
    with pytest.raises(KoffError, match="domain 'de': weight must be a finite number above 0, got"):
        as_sources({"de": DomainSource("bundled:de", weight=weight)})


def weighted(*weights):
    return {name: DomainSource("bundled:de", weight=weight) for name, weight in zip("abc", weights, strict=False)}


@pytest.mark.parametrize(
    ("weights", "temperature", "shares"),
    [
        ((1.0, 2.0, 5.0), 1.0, [0.2, 0.4, 1.0]),
        ((1.0, 4.0), 2.0, [0.5, 1.0]),
        ((10.0, 10.0), 0.001, [1.0, 1.0]),  # 10 ** 1000 is no float, but the two are equal
        ((0.5, 0.5), 1e-4, [1.0, 1.0]),
        ((1e308, 1e308, 5e307), 1.0, [1.0, 1.0, 0.5]),  # nor is their sum
        ((5e-324, 1.0), 100.0, [5e-324**0.01, 1.0]),
    ],
)
def test_shares_hold_for_weights_of_any_size(weights, temperature, shares):
    data = DomainDataModule(weighted(*weights), temperature=temperature)
    assert list(data.shares.values()) == pytest.approx(shares, rel=1e-12)


@pytest.mark.parametrize(
    ("weights", "temperature", "name"),
    [((10.0, 1.0), 0.001, "b"), ((0.5, 1.0), 1e-4, "a"), ((1e-308, 1e308), 1.0, "a"), ((2.0, 2.0), 1e-320, "a")],
)
def test_shares_of_nothing_name_the_domain(weights, temperature, name):
    with pytest.raises(
        KoffError, match=rf"domain '{name}': its weight of .* at data.temperature=.* a share of nothing"
    ):
        as_shares(weighted(*weights), temperature)


def test_no_domains_and_no_files():
    with pytest.raises(KoffError, match=r"data\.domains is empty"):
        as_sources({})
    with pytest.raises(KoffError, match="domain 'de' has an empty list of files"):
        as_sources({"de": []})


def test_duplicate_keys_in_yaml_name_both_lines(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  domains:\n    de: bundled:de\n    en: bundled:en\n    de: [x.jsonl]\n")
    with pytest.raises(KoffError, match=r"run\.yaml:5: 'de' is given twice, first in line 3"):
        refuse_duplicate_keys(path)
    path.write_text("list:\n- {a: 1, a: 2}\n")
    with pytest.raises(KoffError, match=r"run\.yaml:2: 'a' is given twice"):
        refuse_duplicate_keys(path)
    path.write_text("a: [\n")
    with pytest.raises(KoffError, match=r"run\.yaml is not valid YAML"):
        refuse_duplicate_keys(path)
    path.write_bytes("a: 1\n".encode("utf-16"))  # as PowerShell's `>` writes
    with pytest.raises(KoffError, match=r"run\.yaml is not UTF-8 text \(byte 0: .*\): save it as UTF-8"):
        refuse_duplicate_keys(path)
    for good in ("", "a: {de: 1}\nb: {de: 2}\nc: [{de: 1}, {de: 2}]\n", "a: &x {b: 1}\nc: *x\n"):
        path.write_text(good)
        refuse_duplicate_keys(path)


# ------------------------------------------------------------------------------------------------- split and limits


def test_the_split_is_by_id_and_the_same_for_parallel_documents(tmp_path):
    german, french = (write_jsonl(tmp_path / f"{n}.jsonl", toy_documents(200, seed=n)) for n in (1, 2))
    sides = []
    for path in (german, french):
        texts = read(DomainSource(str(path)))
        sides.append([text.split()[0] for text in texts.heldout])
        assert len(texts.train) + len(texts.heldout) == 200
        assert 30 < len(texts.heldout) < 90
    assert sides[0] == sides[1] == [str(i) for i in range(200) if is_heldout(f"doc-{i}", 0.3)]


def test_is_heldout_is_fixed_for_good():
    assert [i for i in range(40) if is_heldout(f"doc-{i}", 0.1)] == [7, 19, 20, 21]
    assert not is_heldout("x", 0.0)
    assert is_heldout("x", 1.0)


def test_a_training_text_that_is_also_held_out_is_dropped(tmp_path):
    texts = toy_documents(50)
    held, trained = (
        next(i for i in range(50) if is_heldout(f"doc-{i}", 0.3)),
        next(i for i in range(50) if not is_heldout(f"doc-{i}", 0.3)),
    )
    texts[trained] = texts[held]
    split = read(DomainSource(str(write_jsonl(tmp_path / "a.jsonl", texts))))
    assert texts[held] in split.heldout
    assert texts[held] not in split.train


def test_limits_take_whole_documents(tmp_path):
    texts = toy_documents(200)
    path = str(write_jsonl(tmp_path / "a.jsonl", texts))
    full, cut = read(DomainSource(path)), read(DomainSource(path), max_train_bytes=9000, max_heldout_bytes=3000)
    assert cut.train == full.train[: len(cut.train)]
    assert 8000 < sum(len(t.encode()) for t in cut.train) <= 9000
    assert set(cut.heldout) < set(texts)
    assert 2900 < sum(len(t.encode()) for t in cut.heldout) <= 3000


def test_reading_stops_when_the_training_text_is_full(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", toy_documents(200))
    path.write_bytes(path.read_bytes() + b"this line is never reached\n")
    read(DomainSource(str(path)), max_train_bytes=5000)


def test_the_heldout_sample_does_not_depend_on_file_order(tmp_path):
    texts = toy_documents(100)
    lines = [json.dumps({"id": f"doc-{i}", "text": text}) for i, text in enumerate(texts)]
    for name, order in (("a.jsonl", lines), ("b.jsonl", lines[::-1])):
        (tmp_path / name).write_text("\n".join(order))
    a, b = (read(DomainSource(str(tmp_path / name)), max_heldout_bytes=2000).heldout for name in ("a.jsonl", "b.jsonl"))
    assert a == b


def test_sides_without_text_say_what_to_do(tmp_path):
    many, empty, one = (
        DomainSource(str(write_jsonl(tmp_path / name, texts)))
        for name, texts in (("many.jsonl", toy_documents(50)), ("empty.jsonl", []), ("one.jsonl", ["only one"]))
    )
    with pytest.raises(KoffError, match="domain 'x' is empty: its files hold no document"):
        read(empty)
    with pytest.raises(KoffError, match="domain 'x' is empty: its files hold no document"):
        read(empty, max_train_bytes=1000)
    for fraction in (1e-9, 1 - 1e-9):  # no fraction helps
        with pytest.raises(KoffError, match=r"is one document, 1 time\(s\).* divide it into several.*heldout_files"):
            read(one, heldout_fraction=fraction, max_train_bytes=1000)
    with pytest.raises(KoffError, match="domain 'x' has no training text: its documents are held out"):
        read(many, heldout_fraction=1 - 1e-9)
    with pytest.raises(KoffError, match="domain 'x' has no training text: .*max_train_bytes=1 .*max_retention_bytes"):
        read(many, max_train_bytes=1)
    with pytest.raises(KoffError, match="none of its .* held-out document.* fits in data.max_heldout_bytes=1"):
        read(many, max_heldout_bytes=1)


@pytest.mark.parametrize("name", ["mine.txt", "mine.jsonl"])
def test_a_single_txt_says_that_it_is_one_document(tmp_path, name):
    (tmp_path / name).write_text(json.dumps({"text": "First. Second."}))
    with pytest.raises(KoffError, match=r"domain 'x' is one document, 1 time\(s\)") as caught:
        read(DomainSource(str(tmp_path / name)))
    said = "A .txt file is one document: give several files, or jsonl with one document a line"
    assert (said in str(caught.value)) == name.endswith(".txt")


def test_a_corpus_too_small_for_the_hash_holds_out_one_document(tmp_path):
    texts = toy_documents(3)
    source = DomainSource(str(write_jsonl(tmp_path / "few.jsonl", texts)))
    split = read(source, heldout_fraction=1e-9)
    assert len(split.heldout) == 1
    assert sorted(split.train + split.heldout) == sorted(texts)
    again = DomainSource(str(write_jsonl(tmp_path / "few.jsonl", texts[::-1])))  # ids are numbers of lines
    assert read(again, heldout_fraction=1e-9).heldout == [texts[2 - texts.index(split.heldout[0])]]
    copies = DomainSource(str(write_jsonl(tmp_path / "copies.jsonl", texts[:1] * 3)))
    with pytest.raises(KoffError, match=r"is one document, 3 time\(s\)"):
        read(copies, heldout_fraction=1e-9)


def test_streamed_the_same_document_of_a_small_corpus_is_held_out(tmp_path):
    texts = toy_documents(3)
    source = DomainSource(str(write_jsonl(tmp_path / "few.jsonl", texts)))
    options = {"heldout_fraction": 1e-9, "max_heldout_bytes": 10_000, "train_bytes": 1, "on_bad": pytest.fail}
    streamed, _ = split_streamed("x", domain_shards(source), **options)
    assert streamed.heldout == read(source, heldout_fraction=1e-9).heldout
    copies = DomainSource(str(write_jsonl(tmp_path / "copies.jsonl", texts[:1] * 3)))
    with pytest.raises(KoffError, match="has no held-out text"):
        split_streamed("x", domain_shards(copies), **options)
    with pytest.raises(KoffError, match="has no held-out text"):  # which is there, and too long
        split_streamed("x", domain_shards(source), **options | {"heldout_fraction": 0.5, "max_heldout_bytes": 1})


def test_streamed_all_of_an_id_is_held_out_where_the_hash_holds_out_none(tmp_path):
    lines = [json.dumps({"id": f"book {i % 3}", "text": text}) for i, text in enumerate(toy_documents(9))]
    (tmp_path / "books.jsonl").write_text("\n".join(lines))
    source = DomainSource(str(tmp_path / "books.jsonl"))
    memory = read(source, heldout_fraction=1e-9)
    options = {"heldout_fraction": 1e-9, "max_heldout_bytes": 10_000, "train_bytes": 10**6, "on_bad": pytest.fail}
    streamed, wanted = split_streamed("x", domain_shards(source), **options)
    assert sorted(streamed.train) == sorted(memory.train)
    assert len(memory.heldout) == 3 and streamed.heldout[0] in memory.heldout
    documents = [document for shard, _ in domain_shards(source) for _, document in shard.read(pytest.fail)]
    assert sorted(d.text for d in documents if wanted(0, d)) == sorted(memory.train)
    same = [json.dumps({"id": "one", "text": text}) for text in toy_documents(4)]
    (tmp_path / "books.jsonl").write_text("\n".join(same))
    with pytest.raises(KoffError, match="has no held-out text"):
        split_streamed("x", domain_shards(source), **options)


def test_where_compares_values_as_they_are_written(tmp_path):
    rows = [
        {"text": f"t{i}", "year": 2020.0 + i % 2, "flag": i % 2 == 0, "lang": ["no", "de"][i % 2]} for i in range(4)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def found(**where):
        source = as_sources({"a": {"files": str(tmp_path / "a.jsonl"), "where": where}})["a"]
        return [
            document.text
            for shard, _ in domain_shards(source)
            for _, document in shard.read(pytest.fail)
            if document.text
        ]

    assert found(year=2020) == found(year="2020") == found(flag=True) == found(flag="true") == found(lang="no")
    assert found(year=2020) == ["t0", "t2"]
    with pytest.raises(KoffError, match=r"where.lang holds \[False, 'de'\]: put words such as no"):
        found(lang=[False, "de"])


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_ids_that_do_not_tell_documents_apart_are_said(tmp_path, fraction):
    lines = [json.dumps({"id": "v1", "text": text}) for text in toy_documents(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(KoffError, match=r"Its 30 documents have only 1 different id\(s\).*set id_field"):
        read(DomainSource(str(tmp_path / "a.jsonl")), heldout_fraction=fraction)
    split = read(DomainSource(str(tmp_path / "a.jsonl"), id_field="none"), heldout_fraction=0.2)
    assert len(split.train) + len(split.heldout) == 30


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt", "a.jsonl.gz"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_utf_16_without_a_mark_is_told(tmp_path, name, encoding):
    content = ('{"text": "one two"}\n' if "jsonl" in name else "text,id\none two,1\n").encode(encoding)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(KoffError, match=rf"cannot read .*{name}: it is not UTF-8 but, as it seems, UTF-16"):
        texts_of(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("words", ["привет мир ", "καλημέρα κόσμε ", "שלום עולם ", "مرحبا بالعالم "])
def test_so_it_is_where_few_bytes_are_zeros(tmp_path, words, encoding):
    content = (words * 100).encode(encoding)
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(KoffError, match=r"cannot read .*a\.txt: it is not UTF-8 but, as it seems, UTF-16"):
        texts_of(tmp_path / "a.txt")


@pytest.mark.parametrize("content", ["1\n0\n" * 300, "a\tb\t" * 300, "one\0two\0three\0four " * 30, "\0 привет"])
def test_utf_8_with_control_characters_is_read(tmp_path, content):
    (tmp_path / "a.txt").write_text(content, encoding="utf-8", newline="")
    assert texts_of(tmp_path / "a.txt") == [content]


def test_what_may_not_be_read_is_told(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", ["x"])

    def forbid(self, *_, **__):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_file", forbid)
    with pytest.raises(KoffError, match=r"you may not look at '.*a.jsonl'"):
        expand_files([str(path)])
    monkeypatch.setattr(Path, "open", forbid)
    with pytest.raises(KoffError, match=r"cannot read .*a\.jsonl: you may not"):
        texts_of(path)


def test_all_that_is_missing_is_told_at_once(tmp_path):
    domains = {
        "a": [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")],
        "b": str(write_jsonl(tmp_path / "there.jsonl", toy_documents(30))),
        "c": ["bundled:klingon", "bundled:en", str(tmp_path / "three.jsonl"), "bundled:elvish"],
    }
    with pytest.raises(KoffError) as error:
        DomainDataModule(domains, tokenizer="koff-tiny").setup()
    said = str(error.value)
    missing = ("one.jsonl", "two.jsonl", "klingon", "three.jsonl", "elvish")
    for part in ("2 domains lack text", "domain 'a': ", "domain 'c': ", *missing):
        assert part in said
    assert "domain 'b'" not in said


def test_bundled_text_is_split_as_shipped_and_entries_can_be_joined():
    assert bundled_domains() == ["de", "en", "es", "fr", "python", "ru", "zh"]
    german = read(DomainSource("bundled:de"), max_train_bytes=20_000, max_heldout_bytes=20_000)
    both = read(DomainSource(["bundled:de", "bundled:zh"]), max_train_bytes=20_000)
    assert german.train == both.train
    assert set(german.heldout) < set(both.heldout)
    assert not set(both.train) & set(both.heldout)


# ------------------------------------------------------------------------------------------------- own held-out files


def own_split(folder, train, heldout):
    write_jsonl(folder / "train-1.jsonl", train[: len(train) // 2])
    write_jsonl(folder / "train-2.jsonl", train[len(train) // 2 :])
    write_jsonl(folder / "test.jsonl", heldout)
    return DomainSource(f"{folder}/train-*.jsonl", heldout_files=[f"{folder}/test.jsonl"])


def test_heldout_files_are_the_whole_heldout_side_whatever_the_hash_says(tmp_path):
    train, heldout = toy_documents(60, seed=1), toy_documents(40, seed=2)
    texts = read(own_split(tmp_path, train, heldout), heldout_fraction=0.9)
    assert texts == (train, heldout)


def test_heldout_files_keep_the_limits_and_the_promise_that_no_text_is_on_both_sides(tmp_path):
    train, heldout = toy_documents(60, seed=1), toy_documents(40, seed=2)
    texts = read(own_split(tmp_path, [*train, heldout[3]], heldout), max_heldout_bytes=1500, max_train_bytes=4000)
    assert texts.train == train[: len(texts.train)]
    assert 0 < len(texts.train) < 60
    assert 0 < len(texts.heldout) < 40
    assert heldout[3] not in read(own_split(tmp_path, [*train, heldout[3]], heldout)).train


@pytest.mark.parametrize(
    ("files", "heldout_files", "message"),
    [
        ("a.jsonl", [], "domain 'x': heldout_files is empty: name a file or glob, or leave it out to split by hash"),
        (["a.jsonl", "bundled:de"], "b.jsonl", "domain 'x': 'bundled:de' comes already split and cannot be combined"),
        ("a.jsonl", "bundled:de", "domain 'x': 'bundled:de' comes already split"),
    ],
)
def test_heldout_files_that_cannot_be(files, heldout_files, message):
    with pytest.raises(KoffError, match=message):
        as_sources({"x": DomainSource(files, heldout_files=heldout_files)})


def test_heldout_files_that_leave_a_side_without_text(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", toy_documents(9))
    write_jsonl(tmp_path / "same.jsonl", toy_documents(9))
    write_jsonl(tmp_path / "empty.jsonl", [])

    def source(files, heldout_files):
        return DomainSource(f"{tmp_path}/{files}", heldout_files=f"{tmp_path}/{heldout_files}")

    with pytest.raises(KoffError, match=r"a\.jsonl is among the files and the heldout_files of one domain"):
        read(source("*.jsonl", "a.jsonl"))
    with pytest.raises(KoffError, match="domain 'x' has no held-out text: its heldout_files hold no document"):
        read(source("a.jsonl", "empty.jsonl"))
    with pytest.raises(KoffError, match="domain 'x' has no training text: its files hold no document that its held"):
        read(source("a.jsonl", "same.jsonl"))
    with pytest.raises(KoffError, match=r"no file matches '.*gone\.jsonl'"):
        read(source("a.jsonl", "gone.jsonl"))


WANTED = (("topic", ("history", "geography")),)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_only_wanted_records_are_read(tmp_path, suffix):
    """By the value of a field, or by one of its values where it holds a list; the others still count."""
    path = tmp_path / f"a.{suffix}"
    table = pd.DataFrame({"text": ["a", "b", "c"], "id": ["1", "2", "3"], "topic": ["history", "art", "geography"]})
    match suffix:
        case "jsonl":
            table["topic"] = [["art", "history"], ["art"], "geography"]
            table.to_json(path, orient="records", lines=True)
        case "csv":
            table.to_csv(path, index=False)
        case "parquet":
            table["topic"] = [["art", "history"], ["art"], ["geography"]]
            table.to_parquet(path)
    found = list(read_records(path, Fields(where=WANTED), pytest.fail))
    assert [(number, document.text) for number, document in found] == [(0, "a"), (2, "c")]
    said = []
    assert list(read_records(path, Fields(where=(("subject", ("x",)),)), said.append)) == []
    assert "no field 'subject', only " in said[0] and "set where to the right one" in said[0]


def test_a_domain_of_wanted_records(tmp_path):
    records = [{"text": f"text {i}", "id": str(i), "topic": "ab"[i % 2]} for i in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    sources = as_sources({n: {"files": str(tmp_path / "a.jsonl"), "where": {"topic": n}} for n in ("a", "b")})
    texts = {
        name: {document.text for shard, _ in domain_shards(source) for _, document in shard.read(pytest.fail)}
        for name, source in sources.items()
    }
    assert texts["a"] == {f"text {i}" for i in range(0, 40, 2)} and not texts["a"] & texts["b"]
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    with pytest.raises(KoffError, match=r"a.txt: a txt file has no field 'topic' to choose by \(where\)"):
        list(read_records(tmp_path / "a.txt", Fields(where=WANTED), pytest.fail))


@pytest.mark.parametrize("where", [["topic"], "topic", {"topic": []}, {"topic": None}, {"topic": {"a": 1}}, {1: "a"}])
def test_where_of_another_kind_is_one_line(where):
    with pytest.raises(KoffError, match=r"domain 'a': where names fields, each with a value or a list of them"):
        as_sources({"a": {"files": "a.jsonl", "where": where}})


def test_bundled_text_cannot_be_chosen_from():
    with pytest.raises(KoffError, match="domain 'a': bundled text has no fields to choose by: leave where out"):
        as_sources({"a": {"files": "bundled:de", "where": {"topic": "a"}}})


def test_numbers_are_wanted_as_they_stand(tmp_path):
    records = [{"text": f"text {i}", "year": 2020 + i % 2, "open": bool(i % 2)} for i in range(6)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    for where in ({"year": 2020}, {"year": [2020, 1999]}, {"open": False}):
        source = as_sources({"a": {"files": str(tmp_path / "a.jsonl"), "where": where}})["a"]
        texts = [d.text for shard, _ in domain_shards(source) for _, d in shard.read(pytest.fail)]
        assert texts == ["text 0", "text 2", "text 4"]
