"""Chat and instruction data: what the template writes is what is read, what the assistant says is what is predicted."""

import json
from collections import Counter
from itertools import islice, takewhile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_artifact import tiny_artifact
from tokenizers import AddedToken, decoders
from toy_text import WORDS, toy_documents, toy_tokenizer, write_jsonl
from transformers import AutoTokenizer

from koff_lightning.artifact.decomposed import load_decomposed
from koff_lightning.cli import main
from koff_lightning.data import DomainDataModule, DomainSource, rendering, stream
from koff_lightning.data.packing import IGNORED, collate, pack
from koff_lightning.data.readers import refuse
from koff_lightning.data.split import read_domain
from koff_lightning.data.talks import answers, tokenize_talks
from koff_lightning.support.errors import KoffError

TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}" + TURN + "{% endfor %}" + ASK
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}" + ASK.replace(
    "<|im_start|>assistant\n", "assistant: "
)
WITH_START = "<bos>" + CHATML
# As Qwen3: the last answer gets room for thoughts, and loses it as soon as the talk goes on.
THINKING = (
    "{% for m in messages %}{% if loop.last and m.role == 'assistant' %}"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n{{ m.content }}<|im_end|>\n"
    "{% else %}" + TURN + "{% endif %}{% endfor %}" + ASK
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a tokenizer with signs for turns and a template."""
    path = toy_tokenizer(tmp_path_factory.mktemp("talks") / "tokenizer")
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("</think>")])  # added, and text all the same
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(path)
    return path


def with_template(folder, template=CHATML, bos=True):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    if not bos:
        tokenizer.bos_token = None
    return tokenizer


def talk(*contents, system=None):
    """User and assistant in turn."""
    opening = [{"role": "system", "content": system}] if system else []
    return opening + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def encoded(tokenizer, *talks, chat="answers", on_bad=refuse):
    return tokenize_talks([json.dumps(messages) for messages in talks], tokenizer, chat, on_bad)


def predicted_text(tokenizer, stream, document=0):
    """The text of each run of predicted tokens of a document."""
    first = int(stream.starts[document])
    tokens, flags = (a[first : first + stream.lengths[document]] for a in (stream.tokens, stream.predicted))
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags, [0]])))
    return [tokenizer.decode(tokens[a:b].tolist()) for a, b in edges.reshape(-1, 2)]


# ------------------------------------------------------------------------------------------------------ the mask

said = st.lists(st.sampled_from([*WORDS, "\n", "user:", "{{ x }}", "<b>"]), min_size=1, max_size=8).map(" ".join)
# Answers whose words stand in what templates write around them, too.
said |= st.sampled_from(["e", "im", "end", "|", "think", " ", "\n\n"])


@settings(deadline=None, max_examples=40)
@given(
    contents=st.lists(said, min_size=2, max_size=7),
    template=st.sampled_from([CHATML, WITH_START, THINKING]),
    bos=st.booleans(),
)
def test_what_is_predicted_is_what_the_template_writes_for_the_assistant(folder, contents, template, bos):
    tokenizer = with_template(folder, template, bos)
    messages = talk(*contents)
    stream = encoded(tokenizer, messages)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert stream.tokens.tolist() == tokenizer(whole, add_special_tokens=False)["input_ids"], "as koff chat has them"
    expected = [f"{content}<|im_end|>\n" for content in contents[1::2]]
    if template == THINKING and len(contents) % 2 == 0:
        expected[-1] = "<think>\n\n</think>\n\n" + expected[-1]
    assert predicted_text(tokenizer, stream) == expected
    assert stream.num_bytes.tolist() == [sum(len(e.replace("<|im_end|>", "").encode()) for e in expected)]


@pytest.mark.parametrize("template", [CHATML, WITH_START, PLAIN])
def test_the_ends_of_answers_are_those_of_written_beginnings(folder, template):
    tokenizer, messages = with_template(folder, template), talk("a", "b", "c", "d", "e", system="s")
    write = lambda part, ask=False: tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=ask)  # noqa: E731
    expected = [(len(write(messages[:n], True)), len(write(messages[: n + 1]))) for n in (2, 4)]
    assert answers(tokenizer, messages) == expected


@pytest.mark.parametrize("template", [CHATML, WITH_START, THINKING])
def test_the_words_with_which_an_assistant_opens_a_talk_are_learned_too(folder, template):
    tokenizer = with_template(folder, template)
    messages = talk("x", "hello", "y", "hello")[1:]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    found = [whole[first:end] for first, end in answers(tokenizer, messages)]
    last = "<think>\n\n</think>\n\n" if template == THINKING else ""
    assert found == ["hello<|im_end|>\n", f"{last}hello<|im_end|>\n"]
    assert encoded(tokenizer, messages, chat="all").predicted[1:].all()


@pytest.mark.parametrize("template", [CHATML, WITH_START])
def test_memories_begin_with_the_start_token_where_the_template_writes_it(folder, tmp_path, template):
    data = DomainDataModule(
        {"a": {"files": str(talks_file(tmp_path / "a.jsonl")), "chat": "answers"}}, seq_len=32, batch_size=4
    )
    data._load_tokenizer = lambda: with_template(folder, template)
    data.setup()
    ids = data.sample_ids("a", 200).tolist()
    documents = data._documents["a"]
    opening = documents.tokens[documents.starts[0] : documents.starts[0] + (2 if template == WITH_START else 1)]
    assert ids[: len(opening)] == opening.tolist()
    text = data.tokenizer.decode(ids)
    assert text.count("<|im_start|>user") == text.count("user\n") > 1, "no talk lacks its first token"


@pytest.mark.parametrize("bos", [True, False])
def test_all_of_a_talk_is_predicted_where_that_is_wanted(folder, bos):
    tokenizer, messages = with_template(folder, bos=bos), talk("größere", "狐狸")
    stream = encoded(tokenizer, messages, chat="all")
    assert stream.predicted.tolist() == [False] + [True] * (len(stream.tokens) - 1)
    text = "user\ngrößere\nassistant\n狐狸\n"  # without the signs, which stand for no bytes
    assert stream.num_bytes.tolist() == [len(text.encode())]


def test_a_talk_without_signs_counts_no_byte_of_the_first_token(folder):
    tokenizer, messages = with_template(folder, PLAIN, bos=False), talk("größere", "狐狸")
    stream = encoded(tokenizer, messages, chat="all")
    first = tokenizer.decode(stream.tokens[:1].tolist())
    assert stream.num_bytes.tolist() == [len("user: größere\n\nassistant: 狐狸\n\n".encode()) - len(first)]


def test_rows_predict_the_answers_alone_and_nothing_across_talks(folder):
    tokenizer = with_template(folder)
    talks = [
        talk(f"question {i} " + "the " * (i % 5), f"answer {i} " + "fox " * (i % 7), "and", "so") for i in range(30)
    ]
    stream = encoded(tokenizer, *talks)
    starts = np.zeros(len(stream.tokens), bool)
    starts[stream.starts] = True
    for seq_len in (16, 40, 400):
        rows = pack(stream, seq_len, overlap=True)
        assert rows.num_bytes.sum() == stream.num_bytes.sum() == rows.shares.sum()
        batch = collate([("a", rows, row) for row in range(len(rows))])
        labels = batch["labels"].numpy()
        wanted = stream.tokens[stream.predicted & ~starts]
        np.testing.assert_array_equal(labels[labels != IGNORED], wanted)  # each once, in order, and no other
        rows = pack(stream, seq_len, overlap=False)
        flags = rows.predicted.reshape(-1)[: len(stream.tokens)]
        np.testing.assert_array_equal(flags, stream.predicted)
        labels = collate([("a", rows, row) for row in range(len(rows))])["labels"].numpy()
        wanted = rows.predicted & ~rows.starts
        np.testing.assert_array_equal(labels != IGNORED, wanted[wanted.any(axis=1)])  # rows of questions teach nothing


# ------------------------------------------------------------------------------------------------------- reading


def talks_file(path, count=120):
    lines = [
        {"id": str(i), "messages": talk(t, f"answer to {t[:9]}", "why?", t[:20])}
        for i, t in enumerate(toy_documents(count))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def read(path, **options):
    texts = read_domain("a", DomainSource(str(path), chat="answers", **options), heldout_fraction=0.3)
    return sorted([json.loads(text) for text in [*texts.train, *texts.heldout]], key=str)


def test_messages_and_prompts_with_completions_in_all_kinds_of_file(tmp_path):
    talks = [talk("one", "two"), talk("three", "four")]
    columns = {"messages": talks, "id": ["0", "1"]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table(columns).rename_columns(["turns", "id"]), tmp_path / "b.parquet")
    rows = [{"prompt": t[0]["content"], "completion": t[1]["content"]} for t in talks]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "d.csv").write_text("prompt,completion\none,two\nthree,four\n")
    rows = [{"prompt": t[:1], "completion": t[1:]} for t in talks]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quoted = ['"' + json.dumps(t).replace('"', '""') + '"' for t in talks]
    (tmp_path / "f.csv").write_text("messages\n" + "\n".join(quoted) + "\n")
    for name in ("a.parquet", "c.jsonl", "d.csv", "e.jsonl", "f.csv"):
        assert read(tmp_path / name) == talks, name
    assert read(tmp_path / "b.parquet", text_field="turns") == talks


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "no field 'messages' nor 'prompt' with 'completion', only 'text'"),
        ({"prompt": "a"}, "nor 'prompt' with 'completion', only 'prompt'"),
        ({"messages": []}, "'messages' should be a list of messages, got an empty list"),
        ({"messages": "hello"}, "should be a list of messages or the JSON of one, got other text"),
        ({"messages": ["a"]}, "message 1 in 'messages' should have role and content; it is 'a'"),
        ({"messages": [{"from": "human", "value": "a"}]}, "should have role and content; it has only from, value"),
        (
            {"messages": [{"role": "user", "content": ["a"]}]},
            "message 1 in 'messages': content should be text, got list",
        ),
        ({"messages": talk("a")}, "the assistant says nothing: there is no answer to learn"),
        (["a"], "expected a JSON object with a field 'messages' or 'prompt', got a list"),
    ],
)
def test_a_record_that_is_no_talk_is_named_or_left_out(tmp_path, record, message):
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"messages": talk(t, "yes")}) for t in toy_documents(20)]
    path.write_text("\n".join([good[0], json.dumps(record), *good[1:]]) + "\n")
    source = DomainSource(str(path), chat="answers")
    with pytest.raises(KoffError, match="a.jsonl:2: ") as error:
        read_domain("a", source, heldout_fraction=0.3)
    assert message in str(error.value)
    with pytest.warns(UserWarning, match=r"left out 1 line"):
        texts = read_domain("a", source, heldout_fraction=0.3, on_bad_line="skip")
    assert len(texts.train) + len(texts.heldout) == 20


def test_a_table_of_talks_that_is_read_as_text_says_what_to_do(tmp_path):
    path = talks_file(tmp_path / "a.jsonl")
    with pytest.raises(KoffError, match="no field 'text', only id, messages: .* or for talks chat: answers"):
        read_domain("a", DomainSource(str(path)), heldout_fraction=0.3)
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"], "completion": ["b"]}), tmp_path / "b.parquet")
    with pytest.raises(KoffError, match="no column 'text', .* or for talks chat: answers"):
        read_domain("a", DomainSource(str(tmp_path / "b.parquet")), heldout_fraction=0.3)
    with pytest.raises(KoffError, match="no column 'messages' .nor prompt with completion., only text"):
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "c.parquet")
        read(tmp_path / "c.parquet")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"files": "a.jsonl", "chat": "some"}, "chat must be 'all' or 'answers'"),
        ({"files": "bundled:de", "chat": "all"}, "bundled text holds no talks: leave chat out"),
    ],
)
def test_options_that_cannot_be(fields, message):
    with pytest.raises(KoffError, match=message):
        DomainDataModule({"a": fields})


# ------------------------------------------------------------------------------------------- templates of strangers


def refused(folder, template, messages, on_bad=refuse):
    with pytest.raises(KoffError) as error:
        encoded(with_template(folder, template), messages, on_bad=on_bad)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_template_that_refuses_or_fails_is_one_line(folder):
    said = refused(folder, NO_SYSTEM, talk("hello", "yes", system="be kind"))
    assert "a talk that begins 'be kind': the chat template does not take these messages: System role not" in said
    assert "(roles: system, user, assistant)" in said
    assert "does not take these messages" in refused(folder, "{{ messages[7].content }}", talk("a", "b"))
    assert "does not take these messages" in refused(folder, "{% for m in %}", talk("a", "b"))
    assert "does not take these messages (ZeroDivisionError)" in refused(folder, "{{ 1 // 0 }}", talk("a", "b"))
    assert "makes 5,000,000 characters of a short talk" in refused(folder, "{{ 'a' * 5000000 }}", talk("a", "b"))


def test_a_template_that_goes_on_for_ever_is_ended(folder, monkeypatch):
    monkeypatch.setattr(rendering, "SECONDS", 0.5)
    monkeypatch.setattr(rendering.writing.__wrapped__, "__defaults__", (0.5,))
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    assert "its chat template still wrote after 0.5 s" in refused(folder, loops, talk("a", "b"))
    assert encoded(with_template(folder), talk("a", "b")).lengths.tolist()[0] > 2, "and the next one is written"


def test_what_looks_like_a_sign_of_the_tokenizer_is_told_or_left_out(folder):
    odd, left = talk("a <|im_end|> b", "c"), []
    assert "holds '<|im_end|>', which the tokenizer takes for a sign of its own" in refused(folder, CHATML, odd)
    stream = encoded(with_template(folder), odd, talk("a", "b"), on_bad=left.append)
    assert len(stream.lengths) == len(left) == 1


def test_a_template_that_does_not_show_its_answers_is_told(folder):
    upper = "{% for m in messages %}{{ m.content | upper }}{{ messages | length }}{% endfor %}"
    assert "does not let an answer begin with the words" in refused(folder, upper, talk("a", "b"))


def test_a_tokenizer_without_a_template_is_told_before_text_is_read(folder, tmp_path):
    data = DomainDataModule({"a": {"files": str(talks_file(tmp_path / "a.jsonl")), "chat": "answers"}})
    data._load_tokenizer = lambda: with_template(folder, None)
    with pytest.raises(KoffError, match="domain 'a' holds talks .chat., and the tokenizer has no chat template"):
        data.setup()


# ---------------------------------------------------------------------------------- in memory, prepared, streamed


@pytest.fixture
def data_of(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "BUFFER", 6000)
    monkeypatch.setattr(stream, "PACK", 60)
    talks_file(tmp_path / "a.jsonl")

    def make(chat="answers", **options):
        source = {"files": str(tmp_path / "a.jsonl"), "chat": chat, "id_field": "id"}
        small = {
            "seq_len": 32,
            "batch_size": 4,
            "heldout_fraction": 0.2,
            "tokenizer": folder,
            "cache": str(tmp_path / "cache"),
        }
        return DomainDataModule({"a": source}, **small | options)

    return make


def train_loader(data, max_steps=60):
    data.setup()
    data.trainer = SimpleNamespace(accumulate_grad_batches=1, max_steps=max_steps, world_size=1)
    return data.train_dataloader()


def plain(batch):
    return {key: value.tolist() if torch.is_tensor(value) else value for key, value in batch.items()}


def test_streamed_talks_are_those_in_memory(data_of):
    cut = {"open_with_start": False}  # else where rows begin decides which tokens are given
    memory, streamed = data_of(**cut), data_of(streaming=True, max_heldout_bytes=10**6, **cut)
    memory.setup()
    loader = train_loader(streamed)
    assert [plain(b) for b in memory.val_dataloader()] == [plain(b) for b in streamed.val_dataloader()]
    rows = loader._reading.streams(0, 0, 1, {})["a"]
    packs = {id(packed): packed for packed, _ in takewhile(lambda _: not rows.place.passes, rows)}.values()
    assert len(packs) > 5
    train = memory._train["a"]
    found = Counter(token for packed in packs for token in packed.tokens[packed.predicted].tolist())
    assert found == Counter(train.tokens[train.predicted].tolist())


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_that_goes_on_sees_the_batches_of_an_uninterrupted_one(data_of, streaming):
    options = {"streaming": True, "max_heldout_bytes": 10**6} if streaming else {}
    whole = [plain(batch) for batch in train_loader(data_of(**options), 12)]
    first = train_loader(data_of(**options), 12)
    begun = [plain(batch) for batch in islice(first, 5)]
    state = first.state_dict()
    second = train_loader(data_of(**options), 12)
    second.load_state_dict(state)
    assert begun + [plain(batch) for batch in islice(second, 7)] == whole
    other = train_loader(data_of("all", **options), 12)
    with pytest.raises(KoffError, match="cannot go on where that run stopped"):
        other.load_state_dict(state)


def test_prepared_talks_give_the_same_batches_and_have_a_key_of_their_own(data_of, folder):
    made, data = data_of(), data_of()
    made.setup()
    data.cache.folder.mkdir()
    tokenizer = with_template(folder)
    assert data.prepare(tokenizer) == {"a": True}
    data = data_of()
    data._make = pytest.fail
    assert [plain(b) for b in train_loader(data, 9)] == [plain(b) for b in train_loader(made, 9)]
    keys = set()
    for chat, template in (("answers", CHATML), ("all", CHATML), ("answers", WITH_START)):
        data = data_of(chat)
        data.tokenizer = with_template(folder, template)
        keys.add(data._key(data.sources["a"]))
    assert len(keys) == 3


# ------------------------------------------------------------------------------------------------------ commands


def test_a_run_scores_the_answers_alone(tmp_path, monkeypatch, capsys):
    tiny_artifact(tmp_path, chat=True)
    tokenizer = with_template(tmp_path / "dense", PLAIN)
    tokenizer.save_pretrained(tmp_path / "dense")
    talks_file(tmp_path / "a.jsonl")
    write_jsonl(tmp_path / "b.jsonl", toy_documents(60))
    monkeypatch.chdir(tmp_path)
    config = {
        "model": {"backbone": str(tmp_path / "dense"), "lora": {"rank": 2}, "kv": None, "sparsity": {"target": 0}},
        "data": {
            "domains": {"talks": {"files": "a.jsonl", "chat": "answers"}, "text": "b.jsonl"},
            "seq_len": 64, "batch_size": 4, "heldout_fraction": 0.2,
        },
        "trainer": {"max_steps": 4, "accelerator": "cpu", "enable_progress_bar": False, "num_sanity_val_steps": 0,
                    "log_every_n_steps": 1,
                    "default_root_dir": "run"},
    }  # fmt: skip
    Path("mine.json").write_text(json.dumps(config))
    assert main(["fit", "--config", "mine.json"]) == 0
    results = json.loads(Path("run/results.json").read_text())
    assert 0 < results["domains"]["talks"]["koff_bpb"] < 20
    documents = json.loads(Path("run/documents.json").read_text())["talks"]
    texts = read_domain("talks", DomainSource("a.jsonl", chat="answers"), heldout_fraction=0.2)
    said = []
    for text in texts.heldout:
        contents = [message["content"] for message in json.loads(text) if message["role"] == "assistant"]
        said.append(sum(len(f"{content}\n\n".encode()) for content in contents))
    assert documents["bytes"] == said, "bytes are those of the answers, as this template writes them"


@pytest.mark.parametrize(
    ("template", "words", "said"),
    [
        (
            NO_SYSTEM,
            ["--system", "be kind"],
            "--system: the chat template does not take these messages: System role not",
        ),
        ("{{ messages[7].content }}", [], "the chat template does not take these messages"),
    ],
)
def test_chat_says_what_the_template_does_not_take(tmp_path, capsys, monkeypatch, template, words, said):
    """Before anybody types."""
    made = tiny_artifact(tmp_path, chat=True)
    model = load_decomposed(made.folder)
    model.tokenizer.chat_template = template
    monkeypatch.setattr("koff_lightning.artifact.decomposed.load_decomposed", lambda *_, **__: model)
    assert main(["chat", "--model", str(made.folder), *words]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
