"""Packing: every token once, nothing across documents, bytes that add up. Properties over random documents."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_text import toy_documents, toy_tokenizer

from koff_lightning.data.encoding import TokenStream, tokenize
from koff_lightning.data.packing import IGNORED, collate, pack
from koff_lightning.loading import load_tokenizer

SEQ_LENS = st.integers(8, 20)
LENGTHS = st.lists(st.integers(2, 50), min_size=1, max_size=12)


def stream_of(lengths):
    """Documents whose every token is different, so that a token tells where it comes from."""
    return TokenStream(
        np.arange(1000, 1000 + sum(lengths), dtype=np.int32),
        np.array(lengths),
        np.array([7 * n + 3 for n in lengths]),
    )


def batch_of(rows):
    return collate([("x", rows, row) for row in range(len(rows))])


def predictions(batch):
    """(context token, predicted token) pairs of a batch, as a causal model with shifted loss sees them."""
    labels = batch["labels"][:, 1:]
    places = labels != IGNORED
    return list(zip(batch["input_ids"][:, :-1][places].tolist(), labels[places].tolist(), strict=True))


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=SEQ_LENS)
def test_heldout_rows_predict_every_token_but_the_first_of_each_document_exactly_once(lengths, seq_len):
    stream = stream_of(lengths)
    firsts = {int(stream.tokens[start]) for start in stream.starts}
    pairs = predictions(batch_of(pack(stream, seq_len, overlap=True)))
    assert sorted(token for _, token in pairs) == [t for t in stream.tokens.tolist() if t not in firsts]
    assert all(token == context + 1 for context, token in pairs)


START = 7  # of documents as of rows: no token of `stream_of`


def started(lengths):
    """The same documents, each behind a start token, as a tokenizer that has one makes them."""
    stream = stream_of([length + 1 for length in lengths])
    tokens = stream.tokens.copy()
    tokens[stream.starts] = START
    return TokenStream(tokens, stream.lengths, stream.num_bytes)


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=SEQ_LENS)
def test_rows_that_open_inside_a_document_begin_with_the_start_token(lengths, seq_len):
    """Every segment then begins with it; still every token is predicted once, from the one before or from the start."""
    stream = started(lengths)
    rows = pack(stream, seq_len, overlap=True, start=START)
    batch = batch_of(rows)
    pairs = predictions(batch)
    texts = [token for token in stream.tokens.tolist() if token != START]
    assert sorted(token for _, token in pairs) == texts
    assert all(context in (START, token - 1) for context, token in pairs)
    assert sum(context == START for context, _ in pairs) == len(lengths)  # none but a document's first token is
    begins = torch.from_numpy(rows.starts)
    if rows.padding:
        begins[-1, -rows.padding :] = False
    assert set(batch["input_ids"][begins].tolist()) == {START}
    assert rows.shares.sum() == rows.num_bytes.sum() == stream.num_bytes.sum()


def test_where_documents_begin_without_it_rows_do_too():
    """As talks whose template writes no start token."""
    stream = stream_of([20, 30])
    rows, plain = (pack(stream, 8, overlap=False, start=start) for start in (START, None))
    assert not rows.inside.size and rows.digest == plain.digest


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=SEQ_LENS)
def test_training_rows_with_a_start_token_give_their_second(lengths, seq_len):
    """What stood first is not read there, what stood second is not predicted; the stream itself stays whole."""
    stream = started(lengths)
    rows, plain = (pack(stream, seq_len, overlap=False, start=start) for start in (START, None))
    np.testing.assert_array_equal(rows.tokens, plain.tokens)
    inside = plain.tokens[:, 0] != START
    assert rows.inside.tolist() == (inside.tolist() if inside.any() else [])
    here, there = (collate([("x", made, row) for row in range(len(made))]) for made in (_all(rows), _all(plain)))
    assert set(here["input_ids"][:, 0].tolist()) == {START}
    assert torch.equal(here["input_ids"][:, 1:], there["input_ids"][:, 1:])
    labels = there["labels"].clone()
    labels[torch.from_numpy(inside), 1] = IGNORED
    assert torch.equal(here["labels"], labels)
    assert (rows.digest == plain.digest) == (not inside.any())
    predicted = np.array([(row != IGNORED).sum() for row in here["labels"].numpy()])
    assert (rows.num_bytes[predicted == 0] == 0).all()


def _all(rows):
    """Rows that say of themselves that all are useful."""
    vars(rows)["useful"] = np.arange(len(rows.tokens))
    return rows


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=SEQ_LENS, begin=st.sampled_from([START, None]), overlap=st.booleans())
def test_useful_rows_are_those_that_predict_anything(lengths, seq_len, begin, overlap):
    """The last row may hold one token, or a start token and one that is given."""
    rows, useful = (pack(started(lengths), seq_len, overlap=overlap, start=begin) for _ in range(2))
    labels = collate([("x", _all(rows), row) for row in range(len(rows.tokens))])["labels"]
    assert useful.useful.tolist() == torch.nonzero((labels != IGNORED).any(1))[:, 0].tolist()


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=SEQ_LENS)
def test_training_rows_hold_every_token_once_and_predict_within_documents_only(lengths, seq_len):
    stream = stream_of(lengths)
    rows = pack(stream, seq_len, overlap=False)
    np.testing.assert_array_equal(rows.tokens.reshape(-1)[: len(stream.tokens)], stream.tokens)
    firsts = {int(stream.tokens[start]) for start in stream.starts}
    row_firsts = {int(token) for token in rows.tokens[:, 0]}
    predicted = {token for _, token in predictions(batch_of(rows))}
    assert predicted == set(stream.tokens.tolist()) - firsts - row_firsts


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=SEQ_LENS)
def test_positions_restart_at_each_document_and_row_and_labels_at_each_segment(lengths, seq_len):
    stream = stream_of(lengths)
    rows = pack(stream, seq_len, overlap=False)
    firsts = set(stream.tokens[stream.starts].tolist())
    batch = batch_of(rows)
    for ids, labels, positions in zip(
        batch["input_ids"],
        batch["labels"],
        batch.get("position_ids", torch.arange(seq_len).expand(len(rows), -1)),
        strict=True,
    ):
        expected = 0
        for place, (token, label, position) in enumerate(
            zip(ids.tolist(), labels.tolist(), positions.tolist(), strict=True)
        ):
            begins = place == 0 or token in firsts or (token == 0 and ids[place - 1] != 0)  # 0 is the padding
            expected = 0 if begins else expected + 1
            assert position == expected
            assert label == (IGNORED if begins or token == 0 else token)


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=SEQ_LENS, overlap=st.booleans())
def test_bytes_add_up_exactly_and_follow_predicted_tokens(lengths, seq_len, overlap):
    stream = stream_of(lengths)
    rows = pack(stream, seq_len, overlap=overlap)
    predicted = [token for _, token in predictions(batch_of(rows))]
    documents = np.searchsorted(stream.starts, np.array(predicted, dtype=int) - 1000, side="right") - 1
    counts = np.bincount(documents, minlength=len(lengths))
    assert rows.num_bytes.sum() == stream.num_bytes[counts > 0].sum()  # one whose every token opens a row has none
    share = stream.num_bytes / np.maximum(counts, 1)
    labels = batch_of(rows)["labels"].numpy()
    for row in range(len(rows)):
        held = np.searchsorted(stream.starts, labels[row][labels[row] != IGNORED] - 1000, side="right") - 1
        assert rows.num_bytes[row] == pytest.approx(share[held].sum(), abs=len(set(held)))  # whole bytes


@settings(deadline=None)
@given(lengths=LENGTHS, seq_len=SEQ_LENS, overlap=st.booleans())
def test_tokens_know_their_document_and_its_bytes(lengths, seq_len, overlap):
    stream = stream_of(lengths)
    rows = pack(stream, seq_len, overlap=overlap)
    batch = batch_of(rows)
    real = batch["input_ids"] > 0
    expected = np.searchsorted(stream.starts, batch["input_ids"][real].numpy() - 1000, side="right") - 1
    np.testing.assert_array_equal(batch["documents"][real], expected)
    assert batch["document_bytes"].sum(1).tolist() == batch["num_bytes"].tolist()
    assert batch["num_bytes"].tolist() == rows.num_bytes[rows.useful].tolist()
    predicted = batch["documents"][batch["labels"] != IGNORED].unique().tolist()
    sizes = torch.zeros(len(lengths)).index_add_(0, batch["documents"].flatten(), batch["document_bytes"].flatten())
    assert sizes[predicted].tolist() == stream.num_bytes[predicted].tolist()


def test_a_known_case():
    stream = TokenStream(np.array([1, 2, 3, 4, 5, 6, 7, 1, 8, 9], np.int32), np.array([7, 3]), np.array([60, 10]))
    batch = batch_of(pack(stream, 4, overlap=True, pad_id=0))
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [4, 5, 6, 7], [1, 8, 9, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3, 4], [-100, 5, 6, 7], [-100, 8, 9, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 0]]
    assert batch["num_bytes"].tolist() == [30, 30, 10]
    assert batch["documents"].tolist() == [[0] * 4, [0] * 4, [1] * 4]
    assert batch["document_bytes"].tolist() == [[30, 0, 0, 0], [30, 0, 0, 0], [10, 0, 0, 0]]
    assert batch["domains"] == ["x"] * 3


def test_position_ids_are_absent_when_no_row_holds_more_than_one_segment():
    rows = pack(stream_of([16, 5]), 8, overlap=False)
    assert "position_ids" not in collate([("x", rows, 0), ("x", rows, 1)])
    assert "position_ids" in collate([("x", rows, 1), ("x", rows, 2)])  # padding counts as a segment


def test_batch_dtypes_are_those_of_the_interface():
    batch = batch_of(pack(stream_of([5, 9]), 8, overlap=False))
    assert {key: value.dtype for key, value in batch.items() if key != "domains"} == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "position_ids": torch.int64,
        "num_bytes": torch.float32,
        "documents": torch.int64,
        "document_bytes": torch.float32,
    }


@pytest.mark.parametrize("bos", [True, False])
def test_tokenize_keeps_text_and_bytes_and_puts_bos_first(tmp_path, bos):
    tokenizer = load_tokenizer(toy_tokenizer(tmp_path, bos=bos))
    texts = ["", *toy_documents(30), "a"]
    stream = tokenize(texts, tokenizer)
    kept = texts[1:] if bos else texts[1:-1]  # "" is BOS alone at most, "a" one token: nothing to predict
    ids = [tokenizer.encode(text, add_special_tokens=False)[0] for text in kept]  # of single characters of ASCII
    first = [0 if bos else len(tokenizer.decode([i])) for i in ids]
    assert stream.num_bytes.tolist() == [len(text.encode()) - size for text, size in zip(kept, first, strict=True)]
    assert stream.lengths.sum() == len(stream.tokens)
    for text, start, length in zip(kept, stream.starts, stream.lengths, strict=True):
        tokens = stream.tokens[start : start + length].tolist()
        assert (tokens[0] == tokenizer.bos_token_id) == bos
        assert tokens[bos:] == tokenizer.encode(text, add_special_tokens=False)


def test_white_space_at_the_head_of_a_text_counts_where_tokens_are_bytes(tmp_path):
    tokenizer, text = load_tokenizer(toy_tokenizer(tmp_path, bos=False)), " \n two words"
    assert tokenize([text], tokenizer).num_bytes.tolist() == [len(text) - 1], "all but its first token"


def test_text_that_looks_like_a_special_token_is_text(tmp_path):
    tokenizer = load_tokenizer(toy_tokenizer(tmp_path))
    stream = tokenize(["before <bos> after <eos>"], tokenizer)
    assert (stream.tokens == tokenizer.bos_token_id).sum() == 1
    said = "".join(tokenizer.convert_ids_to_tokens(stream.tokens[1:].tolist()))
    assert said.replace("Ġ", " ") == "before <bos> after <eos>"


def test_tokenize_does_the_same_in_many_calls(tmp_path, monkeypatch):
    tokenizer, texts = load_tokenizer(toy_tokenizer(tmp_path)), toy_documents(20)
    whole = tokenize(texts, tokenizer)
    monkeypatch.setattr("koff_lightning.data.encoding.TEXTS_PER_CALL", 3)
    np.testing.assert_array_equal(tokenize(texts, tokenizer).tokens, whole.tokens)


def test_packing_takes_little_more_memory_than_tokens_and_rows():
    size = 2**20
    stream = TokenStream(np.arange(size, dtype=np.int32), np.array([size]), np.array([4 * size]))
    tracemalloc.start()
    try:
        rows = pack(stream, 100, overlap=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows.tokens.size >= size
    assert peak < 12 * size, "rows of 4 bytes a token, their copy with padding, and two of a byte"
