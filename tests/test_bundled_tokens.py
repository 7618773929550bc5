"""Tokens of bundled text are kept on the disk: they are those that tokenising gives, or they are made anew."""

import json
import pwd
import shutil

import numpy as np
import pytest
from toy_text import toy_documents, toy_tokenizer, write_jsonl

from koff_lightning import KoffError
from koff_lightning.data import DomainDataModule, bundled_tokens, encoding
from koff_lightning.loading import load_tokenizer


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KOFF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "bundled"


def rows(domains=("bundled:de", "bundled:python"), tokenizer="koff-tiny", **options):
    """All rows of both sides, as plain lists."""
    options = {"seq_len": 64, "max_train_bytes": 6000, "max_heldout_bytes": 1500} | options
    data = DomainDataModule({name.split(":")[-1]: name for name in domains}, tokenizer, **options)
    data.setup()
    return [
        {key: value if key == "domains" else value.tolist() for key, value in batch.items()}
        for loader in (data.train_dataloader(), data.val_dataloader())
        for batch in loader
    ]


@pytest.fixture
def tokenised(monkeypatch):
    """Counts how often text is tokenised."""
    calls, real = [], bundled_tokens.tokenize
    monkeypatch.setattr(bundled_tokens, "tokenize", lambda *words: calls.append(words) or real(*words))
    return calls


def test_a_second_run_tokenises_nothing_and_sees_the_same_rows(cache, tokenised):
    first = rows()
    assert len(tokenised) == len(list(cache.iterdir())) == 4  # two domains, two sides
    assert rows() == first
    assert len(tokenised) == 4
    rows(seq_len=32)  # rows of another length hold the same tokens
    assert len(tokenised) == 4


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 nothing", "half", "one bit", "a field", "a method"])
def test_a_damaged_file_is_made_anew(cache, tokenised, damage):
    first = rows()
    for file in cache.iterdir():
        whole = file.read_bytes()
        changed = bytearray(whole)
        changed[whole.index(b"NUMPY") + 200] ^= 1
        if damage == "a field":
            np.savez(file, tokens=np.zeros(3, np.int32), something=np.zeros(1))
        else:
            packed = whole.replace(b"\x2d\0\0\0\0\0", b"\x2d\0\0\0\x63\0")  # by a method that there is not
            kinds = {"half": whole[: len(whole) // 2], "one bit": bytes(changed), "a method": packed}
            file.write_bytes(kinds.get(damage, damage))
    assert rows() == first
    assert len(tokenised) == 8
    assert rows() == first
    assert len(tokenised) == 8


def test_other_text_another_tokenizer_and_an_end_token_are_not_mistaken(cache, tokenised, tmp_path):
    toy_tokenizer(tmp_path / "tokenizer")
    plain, other = rows(), rows(tokenizer=str(tmp_path / "tokenizer"))
    assert plain != other
    assert rows(max_train_bytes=9000) != plain
    before = len(tokenised)
    assert rows(append_eos=True) != plain
    assert len(tokenised) == before + 2  # the training text alone ends otherwise
    tokenizer = load_tokenizer("koff-tiny")
    key = bundled_tokens._key(["ab", "c"], tokenizer, False)
    assert key != bundled_tokens._key(["a", "bc"], tokenizer, False)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["model"]["vocab"] = dict(zip(rules["model"]["vocab"], [*rules["model"]["vocab"].values()][::-1], strict=True))
    tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(json.dumps(rules))
    assert key != bundled_tokens._key(["ab", "c"], tokenizer, False)


def test_other_code_is_not_mistaken(tmp_path, monkeypatch):
    """Also of another file than the one that tokenises: the bytes that scores are told in are counted elsewhere."""
    tokenizer = load_tokenizer("koff-tiny")
    key = bundled_tokens._key(["ab"], tokenizer, False)
    monkeypatch.setattr(encoding, "CODE", shutil.copytree(encoding.CODE, tmp_path / "clone"))
    assert bundled_tokens._key(["ab"], tokenizer, False) == key
    (tmp_path / "clone" / "token_bytes.py").write_text("# counts otherwise", encoding="utf-8")
    assert bundled_tokens._key(["ab"], tokenizer, False) != key


def test_where_nothing_can_be_kept_a_run_goes_on(cache, tokenised):
    first = rows()
    for file in cache.iterdir():
        file.unlink()
    cache.rmdir()
    cache.write_text("a file where the folder would be")
    assert rows() == first
    assert len(tokenised) == 8


def test_without_a_home_nothing_is_kept_and_a_run_needs_to_be_told_where_its_own_files_go(
    tokenised, monkeypatch, tmp_path
):
    monkeypatch.delenv("KOFF_CACHE")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}["no such user"])
    with pytest.raises(KoffError, match="no home folder to keep files in: set KOFF_CACHE"):
        rows()
    assert rows(cache=str(tmp_path / "own"))
    assert len(tokenised) == 4


def test_text_of_ones_own_is_not_kept(cache, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", toy_documents(60, seed=0))
    data = DomainDataModule({"a": str(tmp_path / "a.jsonl")}, "koff-tiny", seq_len=64, heldout_fraction=0.2)
    data.setup()
    assert not cache.exists()
