"""Text -> tokens: one rule for the start and the end of prompts and documents, and bytes that nobody predicts."""

import math
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from tiny_artifact import tiny_artifact
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from toy_text import toy_documents, toy_tokenizer, write_jsonl
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from koff_lightning.artifact.decomposed import load_decomposed
from koff_lightning.cli import main
from koff_lightning.data import DomainDataModule, encoding, token_bytes
from koff_lightning.data.encoding import encode_prompt, encode_prompts, fingerprint, opening, tokenize
from koff_lightning.data.packing import IGNORED
from koff_lightning.evaluation.harness import KoffLM
from koff_lightning.loading import load_tokenizer, tokenizer_hash
from koff_lightning.metrics import BitsPerByte
from koff_lightning.support.errors import KoffError

PROMPT = "the quick fox"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Folder of a byte-level tokenizer that puts its start token before text."""
    return toy_tokenizer(tmp_path_factory.mktemp("plain"))


def putting(tokenizer, template):
    """The tokenizer with another rule of what it puts around text by itself."""
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<bos>", "<eos>") if name in template]
    processor = processors.TemplateProcessing(single=template, special_tokens=special) if special else None
    tokenizer.backend_tokenizer.post_processor = processor or processors.ByteLevel()
    return tokenizer


TEMPLATES = ("<bos> $A", "$A <eos>", "<bos> $A <eos>", "$A")

# ------------------------------------------------------------------------------------------------- start and end


@pytest.mark.parametrize("template", TEMPLATES)
def test_rows_open_with_what_a_tokenizer_puts_before_text_by_itself(plain, template):
    tokenizer = putting(AutoTokenizer.from_pretrained(plain), template)
    assert opening(tokenizer) == (tokenizer.bos_token_id if template.startswith("<bos>") else None)


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_rows_of_a_domain_open_so_and_say_so(tmp_path, plain, template):
    """In batches of training and held-out text; stored rows too, which others than these do not stand for."""
    tokenizer = putting(AutoTokenizer.from_pretrained(plain), template)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    file = write_jsonl(tmp_path / "a.jsonl", toy_documents(60))
    options = {"tokenizer": str(tmp_path / "tokenizer"), "seq_len": 16, "heldout_fraction": 0.2}
    data = [DomainDataModule({"a": str(file)}, cache=str(tmp_path / name), **options) for name in ("none", "stored")]
    data[1].prepare(tokenizer)
    for module in data:
        module.setup()
    assert data[1].stored(data[1].sources["a"]) is not None and data[0].stored(data[0].sources["a"]) is None
    firsts = []
    for module in data:
        batches = [module.batch_number(n) for n in range(10)] + list(module.val_dataloader())
        firsts.append([batch["input_ids"][:, :2].tolist() for batch in batches])
    assert firsts[0] == firsts[1]
    opened = {row[0] for batch in firsts[0] for row in batch}
    assert (opened == {tokenizer.bos_token_id}) == template.startswith("<bos>")
    plainer = DomainDataModule({"a": str(file)}, open_with_start=False, **options)
    plainer.tokenizer = tokenizer
    assert (plainer._key(plainer.sources["a"]) == data[0]._key(data[0].sources["a"])) != template.startswith("<bos>")


def test_a_start_token_that_stands_for_unknown_text_is_put_by_nobody():
    """A vocabulary of amino acids has no `a`."""
    words = Tokenizer(models.WordLevel({"<s>": 0, "M": 1, "K": 2}, unk_token="<s>"))
    assert opening(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<s>", bos_token="<s>")) is None


@pytest.mark.parametrize("text", ["caf\udce9", "half \ud800"])
def test_a_prompt_that_is_no_text(plain, text):
    """So Python gives what a terminal in another encoding has sent."""
    tokenizer = AutoTokenizer.from_pretrained(plain)
    for many in (text, ["good", text]):
        with pytest.raises(KoffError, match=r"no character \(bytes that are no UTF-8\): write it in UTF-8"):
            encoding.encode(tokenizer, many)
    assert encode_prompt(tokenizer, "caf\xe9")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_prompt_has_the_start_token_once_and_no_end_token_whatever_the_tokenizer_puts(plain, template):
    tokenizer = putting(load_tokenizer(plain), template)
    text = tokenizer(PROMPT, add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, PROMPT) == [0, *text]
    assert encode_prompt(tokenizer, "<bos>" + PROMPT) == [0, *text]
    tokenizer.pad_token = "<eos>"
    assert encode_prompts(tokenizer, [PROMPT])[0].tolist() == [[0, *text]]
    assert tokenize([PROMPT], tokenizer).tokens.tolist() == [0, *text]
    tokenizer.bos_token = None
    assert encode_prompt(tokenizer, PROMPT) == text


@pytest.fixture(scope="module")
def appending(tmp_path_factory):
    """An artifact whose tokenizer puts the end token behind text, and the same one whose tokenizer does not."""
    folders = []
    for template in ("<bos> $A", "<bos> $A <eos>"):
        made = tiny_artifact(tmp_path_factory.mktemp("made"), chat=True)
        tokenizer = putting(AutoTokenizer.from_pretrained(made.folder / "backbone"), template)
        model = load_decomposed(made.folder)
        model.tokenizer = tokenizer
        folders.append((made.folder, model))
    return folders


def test_what_a_model_encodes_is_what_it_was_trained_on(appending):
    """As the examples of the pages and of the model's card call it."""
    (_, one), (_, other) = appending
    batches = [model.encode([PROMPT, "fox"]) for model in (one, other)]
    for model, batch in zip((one, other), batches, strict=True):
        rows = [ids[mask > 0].tolist() for ids, mask in zip(*batch.values(), strict=True)]
        assert rows == [encode_prompt(model.tokenizer, text) for text in (PROMPT, "fox")]
        assert batch["attention_mask"][:, -1].all(), "padded on the left"
    assert torch.equal(
        *(model.generate(**batch, max_new_tokens=4) for model, batch in zip((one, other), batches, strict=True))
    )


def scores(model):
    """Log-likelihoods of a continuation and of a text, and what is generated, by the adapter of lm-eval."""
    lm = KoffLM(model, batch_size=2)
    request = lambda *args: Instance("", {}, args, 0)  # noqa: E731
    pair, rolling = lm.loglikelihood([request(PROMPT, " jumps")]), lm.loglikelihood_rolling([request(PROMPT)])
    answer = lm.generate_until([request(PROMPT, {"max_gen_toks": 4, "until": ["\n"]})])
    return pair, rolling, answer


def test_lm_eval_scores_before_the_end_token_not_behind_it(appending):
    (_, one), (_, other) = appending
    assert scores(one) == scores(other)


def test_a_rolling_likelihood_is_of_the_text_behind_one_start_token(appending):
    for _, model in appending:
        ids = torch.tensor([encode_prompt(model.tokenizer, PROMPT)])
        with torch.no_grad():
            logits = model(ids, domains=None).logits[0, :-1].double()
        expected = -torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        assert scores(model)[1] == [pytest.approx(expected, rel=1e-5)]


def test_log_likelihoods_are_summed_in_float32_unless_it_is_said(appending):
    """As a model in bf16 would not: its sums have two or three digits."""
    _, model = appending[0]
    assert KoffLM(model).softmax_dtype == torch.float32
    assert KoffLM(model, softmax_dtype="float64").softmax_dtype == torch.float64


def test_a_tokenizer_without_start_and_end_token_says_what_is_missing(appending):
    _, model = appending[0]
    lm = KoffLM(model)
    lm.tokenizer.bos_token = lm.tokenizer.eos_token = None
    request = type("Request", (), {"args": ("", "fox")})
    with pytest.raises(KoffError, match='neither a start nor an end token .* "prefix_token_id": ID'):
        lm.loglikelihood([request])
    lm = KoffLM(model, prefix_token_id=5)  # what the line advises
    lm.tokenizer.bos_token = lm.tokenizer.eos_token = None
    assert lm.loglikelihood([request])[0][0] < 0


def test_generate_and_chat_go_on_before_the_end_token(tmp_path, capsys, monkeypatch):
    said = []
    made = tiny_artifact(tmp_path, chat=True)
    for template in ("<bos> $A", "<bos> $A <eos>"):
        path = made.folder / "backbone"
        putting(AutoTokenizer.from_pretrained(path), template).save_pretrained(path)
        model = load_decomposed(made.folder, verify=False)
        monkeypatch.setattr("koff_lightning.artifact.decomposed.load_decomposed", lambda *_, m=model, **__: m)
        lines = iter(["hello", "/exit"])
        monkeypatch.setattr("builtins.input", lambda _, lines=lines: next(lines))
        options = ["--model", str(made.folder), "--domain", "de", "--max-new-tokens", "5", "--temperature", "0"]
        assert main(["generate", *options, "--prompt", PROMPT]) == 0
        assert main(["chat", *options]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]


def test_the_end_token_is_trained_behind_documents_only_if_asked_for_and_never_scored(tmp_path, plain):
    texts = toy_documents(60)
    path = write_jsonl(tmp_path / "a.jsonl", texts)

    def rows(**options):
        data = DomainDataModule({"a": str(path)}, tokenizer=plain, seq_len=32, heldout_fraction=0.2, **options)
        data.setup()
        return data

    bare, ended = rows(), rows(append_eos=True)
    eos = ended.tokenizer.eos_token_id
    assert not (bare._train["a"].tokens == eos).any()
    lengths = ended._documents["a"].lengths
    assert (lengths == bare._documents["a"].lengths + 1).all()
    ends = np.cumsum(lengths) - 1
    assert (ended._documents["a"].tokens[ends] == eos).all()
    for batches, count in ((ended.train_dataloader(), len(lengths)), (ended.val_dataloader(), 0)):
        trained = sum(int((batch["labels"][:, 1:] == eos).sum()) for batch in batches)
        assert count * 0.9 <= trained <= count  # at the head of a row nothing predicts it
    np.testing.assert_array_equal(ended._heldout["a"].tokens, bare._heldout["a"].tokens)
    np.testing.assert_array_equal(ended._documents["a"].num_bytes, bare._documents["a"].num_bytes)


def test_an_end_token_that_there_is_not_is_refused(tmp_path, plain):
    tokenizer = load_tokenizer(plain)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no_end")
    (tmp_path / "no_end" / "config.json").write_text('{"model_type": "llama"}')
    path = write_jsonl(tmp_path / "a.jsonl", toy_documents(60))
    data = DomainDataModule({"a": str(path)}, tokenizer=str(tmp_path / "no_end"), append_eos=True)
    with pytest.raises(KoffError, match="data.append_eos: the tokenizer has no end token"):
        data.setup()


# ------------------------------------------------------------------------------------------------- long documents


@pytest.mark.parametrize("bos", [True, False])
def test_a_long_document_is_one_document_whose_parts_lose_nothing(tmp_path, monkeypatch, bos):
    tokenizer = load_tokenizer(toy_tokenizer(tmp_path, bos=bos))
    texts = ["\n".join(toy_documents(40)), "one two", " ".join(toy_documents(20, seed=1)), "x" * 900]
    whole = tokenize(texts, tokenizer)
    monkeypatch.setattr("koff_lightning.data.encoding.LONGEST_PART", 300)
    monkeypatch.setattr("koff_lightning.data.encoding.CHARACTERS_PER_CALL", 700)
    parts = tokenize(texts, tokenizer)
    assert parts.lengths.sum() == len(parts.tokens)
    for part, stream in ((parts.num_bytes, whole.num_bytes), (parts.lengths[:3], whole.lengths[:3])):
        np.testing.assert_array_equal(part, stream)
    np.testing.assert_array_equal(parts.tokens[: parts.lengths[:3].sum()], whole.tokens[: whole.lengths[:3].sum()])


MEASURE = """
import resource, sys
from koff_lightning.data.encoding import tokenize
from koff_lightning.loading import load_tokenizer, tokenizer_hash
tokenizer = load_tokenizer(sys.argv[1])
text = "während der schnelle Fuchs schläft\\n" * (int(sys.argv[2]) // 36)
tokenize(["warm up"], tokenizer)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
tokenize([text], tokenizer)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_the_memory_for_tokenising_a_document_is_bounded(plain):
    """16 MB of text in one document: a few hundred MB, where all at once would take 2.5 GB."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, plain, str(16 * 2**20)], capture_output=True, text=True, check=True, timeout=300
    )
    assert int(done.stdout) < 1_000_000  # KiB


def test_what_the_tokenizer_has_made_of_one_call_is_gone_at_the_next(plain, monkeypatch):
    """Two at once take twice the memory, and leave holes in it that grow with the text."""
    made = []

    def counted(*args, **options):
        assert not [one for one in made if one() is not None]
        encoded = whole(*args, **options)
        made.append(weakref.ref(encoded))
        return encoded

    whole = encoding.encode
    monkeypatch.setattr(encoding, "encode", counted)
    monkeypatch.setattr(encoding, "CHARACTERS_PER_CALL", 10)
    tokenize(["the quick brown", "fox jumps"], load_tokenizer(plain))
    assert len(made) == 2


# ------------------------------------------------------------------------------------------- bytes not predicted


def byte_level(prefix_space=False):
    """A vocabulary of single bytes, without a start token."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={sign: n for n, sign in enumerate(signs)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_fallback(falls_back=True):
    """Pieces for a few letters; others become their bytes, or one unknown token."""
    vocab = {piece: n for n, piece in enumerate(["<unk>", "▁", "a", "b", "▁a"])}
    vocab |= {f"<0x{byte:02X}>": 5 + byte for byte in range(256)}
    model = models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=falls_back)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@settings(deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), min_size=2, max_size=6))
def test_of_single_bytes_every_one_but_the_first_is_predicted(text):
    size = len(text.encode())
    assert tokenize([text], byte_level()).num_bytes.tolist() == [size - 1]
    spaced = tokenize([text], byte_level(prefix_space=True)).num_bytes.tolist()  # a space of its own comes first
    assert spaced == [size - (text[0] == " ")]


@pytest.mark.parametrize(
    ("text", "first"),
    [("日本", 0), ("ab日", 1), ("日", 0), ("a日", 1), ("b", 0)],  # the space that is put first is no byte of the text
)
def test_byte_fallback_counts_what_its_first_token_stands_for(text, first):
    assert tokenize([text], byte_fallback()).num_bytes.tolist() == [len(text.encode()) - first]


def test_uniform_predictions_of_bytes_are_eight_bits_per_byte_however_short_the_text():
    """A model that knows nothing of 256 bytes pays 8 bits for each, also where texts begin with long characters."""
    metric = BitsPerByte()
    stream = tokenize(["狐狸", "да", "é!"], byte_level())
    predicted = len(stream.tokens) - len(stream.lengths)
    metric.update(torch.tensor(predicted * math.log(256), dtype=torch.float64), torch.tensor(stream.num_bytes))
    assert metric.compute().item() == pytest.approx(8.0, rel=1e-12)


# ------------------------------------------------------------------------------------------------- unknown tokens


def test_bytes_of_unknown_tokens_are_not_counted_though_the_tokens_are_predicted():
    stream = tokenize(["ab日本ba", "日a", "aab"], byte_fallback(falls_back=False))
    assert stream.unknown_bytes.tolist() == [6, 3, 0]
    assert stream.num_bytes.tolist() == [3, 1, 2]  # less the first token's, "a" and "", "" and "a"
    assert (stream.tokens == 0).sum() == 2


def letters(*signs, unknown=None, named=None, merges=()):
    """A vocabulary of these signs, with an unknown token or without, which its options name or do not."""
    vocab = {piece: n for n, piece in enumerate([*([unknown] if unknown else []), *signs])}
    model = models.BPE(vocab=vocab, merges=list(merges), unk_token=unknown, fuse_unk=True)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token=named)


def some_bytes(text):
    """A byte-level vocabulary of the bytes in a text alone, as a trainer without an initial alphabet makes it."""
    signs = {pre for byte in text.encode() for pre, value in token_bytes.BYTE_LEVEL.items() if value == byte}
    tokenizer = letters(*sorted(signs)).backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    ("tokenizer", "counted", "unknown"),
    [
        (letters(*"ab é", unknown="<unk>"), [6, 2], [12, 0]),  # named by its model alone
        (letters(*"ab é"), [6, 2], [12, 0]),  # nothing stands in place of what it cannot read
        (letters(*"ab é", named="a"), [6, 2], [12, 0]),  # nor where its options name a token
        (some_bytes("ab é"), [6, 2], [12, 0]),
        (some_bytes("ab é日"), [10, 2], [8, 0]),  # of other signs it has a byte each, by chance
    ],
    ids=["not named", "left out", "named, left out", "bytes", "parts"],
)
def test_bytes_that_a_tokenizer_leaves_out_or_has_no_name_for_are_not_counted(tokenizer, counted, unknown):
    stream = tokenize(["ab é狐狸日本 b", "ab "], tokenizer)
    size = len("ab é狐狸日本 b".encode())
    assert stream.unknown_bytes.tolist() == unknown
    assert stream.num_bytes.tolist() == counted and counted[0] + unknown[0] == size - 1  # less the first token's
    assert encoding.encode_and_count(tokenizer, "ab é狐狸日本 b")[1] == unknown[0]


def test_text_that_is_mostly_left_out_is_refused(tmp_path, recwarn):
    tokenizer = byte_level()
    signs = {sign: n for n, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())) if sign in "abĠ"}
    tokenizer.backend_tokenizer.model = models.BPE(vocab=signs, merges=[])
    tokenizer.save_pretrained(tmp_path / "few")
    (tmp_path / "few" / "config.json").write_text('{"model_type": "llama"}')
    domain(tmp_path, str(tmp_path / "few"), 0.1)
    assert any("does not know" in str(w.message) and "of the training text" in str(w.message) for w in recwarn)
    with pytest.raises(KoffError, match=r"domain 'x': the tokenizer does not know \d\d% of the training text"):
        domain(tmp_path, str(tmp_path / "few"), 0.8)


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    """Folder of a tokenizer that knows a, b and space only."""
    folder = tmp_path_factory.mktemp("limited")
    byte_fallback(falls_back=False).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return str(folder)


def domain(folder, tokenizer, share):
    """A domain of which about this share of the bytes is unknown."""
    texts = [("ab" * 90 + " ") + "狐" * round(60 * share / (1 - share)) + "a" * number for number in range(40)]
    path = write_jsonl(folder / "x.jsonl", texts)
    data = DomainDataModule({"x": str(path)}, tokenizer=tokenizer, seq_len=32, heldout_fraction=0.3)
    data.setup()
    return data


def test_unknown_text_is_said_and_a_domain_that_is_mostly_unknown_is_refused(tmp_path, limited, recwarn):
    domain(tmp_path, limited, 0.0)
    assert not [w for w in recwarn if "does not know" in str(w.message)]
    with pytest.warns(UserWarning, match=r"domain 'x': the tokenizer does not know \d+\.\d% of the training text"):
        domain(tmp_path, limited, 0.1)
    with pytest.raises(KoffError, match=r"domain 'x': the tokenizer does not know \d\d% of the training text"):
        domain(tmp_path, limited, 0.8)


def test_the_labels_of_unknown_tokens_stay(tmp_path, limited):
    with pytest.warns(UserWarning, match="does not know"):
        data = domain(tmp_path, limited, 0.1)
    labels = torch.cat([batch["labels"].reshape(-1) for batch in data.val_dataloader()])
    assert (labels == 0).any()
    assert (labels != IGNORED).any()


def test_a_call_does_not_change_the_hash_of_a_tokenizer(tmp_path):
    """Padding and truncation are states of the last call, also where tokenizer.json has kept them."""
    toy_tokenizer(tmp_path)
    padded = AutoTokenizer.from_pretrained(tmp_path)
    bare = tokenizer_hash(padded)
    padded.backend_tokenizer.enable_padding(length=7, pad_id=1, pad_token="<eos>")
    padded.backend_tokenizer.enable_truncation(5)
    padded.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    stored = AutoTokenizer.from_pretrained(tmp_path)
    assert stored.backend_tokenizer.padding is not None, "as it was stored"
    before = fingerprint(stored), tokenizer_hash(stored)
    stored("some text")
    assert stored.backend_tokenizer.padding is None, "a call without padding puts it off"
    assert (fingerprint(stored), tokenizer_hash(stored)) == before
    assert tokenizer_hash(stored) == bare


def test_a_tokenizer_without_any_special_token_trains_and_generates(tmp_path, monkeypatch, capsys):
    """No pad, no end, no start token: nothing is put before text, prompts are continued one by one or side by side."""
    made = tiny_artifact(tmp_path, bos=False)
    model = load_decomposed(made.folder)
    model.tokenizer.eos_token = model.tokenizer.pad_token = None
    assert (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id, model.tokenizer.pad_token_id) == (None,) * 3
    monkeypatch.setattr("koff_lightning.artifact.decomposed.load_decomposed", lambda *_, **__: model)
    options = ["--model", str(made.folder), "--domain", "de", "--max-new-tokens", "4", "--temperature", "0"]
    said = []
    for prompts in (["--prompt", PROMPT, "--prompt", "a"], ["--prompt", PROMPT]):
        assert main(["generate", *options, *prompts]) == 0
        said.append(capsys.readouterr().out)
    assert said[1].strip() in said[0]
    data = DomainDataModule({"a": str(write_jsonl(tmp_path / "a.jsonl", toy_documents(40)))}, seq_len=32)
    data._load_tokenizer = lambda: model.tokenizer
    data.setup()
    first = next(iter(data.val_dataloader()))
    assert (first["labels"][:, 0] == IGNORED).all()
    data.append_eos = True
    with pytest.raises(KoffError, match="the tokenizer has no end token"):
        data.prepare(model.tokenizer)
