"""`koff serve` speaks OpenAI's protocol: what clients send is answered as they know it, and as the model says it."""

import asyncio
import concurrent.futures
import contextlib
import gc
import json
import re
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import httpx2 as httpx
import openai
import pytest
from served import Client, served
from tiny_artifact import VOCABULARY, tiny_artifact, tiny_decomposition

from koff_lightning import KVSpec, LoraSpec, load_decomposed
from koff_lightning.artifact.export import export
from koff_lightning.artifact.memories import add_memory, remove_memory
from koff_lightning.data import rendering
from koff_lightning.evaluation.harness import KoffLM
from koff_lightning.serving import ask, requests
from koff_lightning.serving.answers import CompletionForm
from koff_lightning.serving.batch import Batch
from koff_lightning.serving.connection import Connection
from koff_lightning.serving.errors import Refused
from koff_lightning.serving.guard import LARGEST_BODY, Guard
from koff_lightning.serving.own import OwnEngine

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "reliability"))
import clients

ARMS = {"tiny": None, "tiny:de": "de", "tiny:fr": "fr", "tiny:law": "law"}
PROMPTS = ["the quick brown", "größere Füchse", "fox"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("chat"), chat=True)


@pytest.fixture(scope="module")
def model(made):
    return load_decomposed(made.folder)


@pytest.fixture(scope="module")
def address(made):
    with served(OwnEngine(made.folder, rows=4), texts=64, max_tokens=200) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    return Client(address)


@pytest.fixture(scope="module")
def ai(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as ai:
        yield ai


def due(model, prompt, domain, new=6):
    """Text that the model adds by `generate`."""
    ids = model.tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(ids, domains=domain, max_new_tokens=new, do_sample=False, pad_token_id=1)
    return model.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


# ------------------------------------------------------------------------------------------------- what is answered


def test_every_model_of_the_list_answers_as_the_runtime_does(client, model):
    assert client.models() == list(ARMS)
    assert client.http.get("/v1/models/tiny:de").json()["id"] == "tiny:de"
    for name, domain in ARMS.items():
        for prompt in PROMPTS:
            assert client.text(name, prompt) == due(model, prompt, domain)


def test_the_client_of_openai(ai, model):
    whole = ai.completions.create(model="tiny:law", prompt=PROMPTS[0], max_tokens=6, temperature=0)
    assert whole.choices[0].text == due(model, PROMPTS[0], "law")
    length = len(model.tokenizer(PROMPTS[0])["input_ids"])
    usage = whole.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (length, 6, length + 6)
    parts = ai.completions.create(model="tiny:law", prompt=PROMPTS[0], max_tokens=6, temperature=0, stream=True)
    assert "".join(part.choices[0].text for part in parts) == whole.choices[0].text
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "fox"}]
    asked = {"model": "tiny:de", "messages": messages, "max_completion_tokens": 6, "temperature": 0}
    said = ai.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert said.choices[0].message.content == due(model, "system: be kind\nuser: fox\nassistant:", "de")
    assert [len(token.top_logprobs) for token in said.choices[0].logprobs.content] == [2] * 6
    stream = ai.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    *parts, last = stream
    assert "".join(part.choices[0].delta.content for part in parts) == said.choices[0].message.content
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices[0].finish_reason == "length"
    assert last.usage == said.usage
    assert "tiny:fr" in [model.id for model in ai.models.list()]
    with pytest.raises(openai.NotFoundError, match="the model 'tiny:it' does not exist: GET /v1/models lists them"):
        ai.completions.create(model="tiny:it", prompt="x")
    with pytest.raises(openai.BadRequestError, match="unknown or unsupported parameter: wishes"):
        ai.completions.create(model="tiny", prompt="x", extra_body={"wishes": 3})


def test_an_answer_goes_into_the_next_question_as_it_came(ai):
    messages = [{"role": "user", "content": "fox"}]
    for _ in range(2):
        said = ai.chat.completions.create(model="tiny:de", messages=messages, max_tokens=4, temperature=0)
        messages += [said.choices[0].message.model_dump(), {"role": "user", "content": "the quick"}]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]


def test_what_is_streamed_tells_its_usage_last_alone(client):
    body = {"model": "tiny", "prompt": "fox", "max_tokens": 3, "stream_options": {"include_usage": True}}
    *parts, last, _ = client.events("/v1/completions", body)
    assert [part["usage"] for part in parts] == [None] * len(parts) and last["usage"]["completion_tokens"] == 3


def test_many_clients_of_many_domains_get_what_they_get_alone(client, model):
    jobs = [(name, prompt) for name in ARMS for prompt in PROMPTS] * 3
    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        found = list(threads.map(lambda job: client.text(*job), jobs))
    assert found == [due(model, prompt, ARMS[name]) for name, prompt in jobs]


def test_several_prompts_and_several_answers(client, model):
    status, content = client.complete("tiny:fr", PROMPTS, n=2)
    assert status == 200
    assert [choice["index"] for choice in content["choices"]] == list(range(6))
    assert [choice["text"] for choice in content["choices"]] == [
        due(model, prompt, "fr") for prompt in PROMPTS for _ in range(2)
    ]
    ids = [model.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    assert content["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert client.complete("tiny:fr", ids, n=2)[1]["choices"] == content["choices"]
    assert client.text("tiny:fr", ids[0]) == content["choices"][0]["text"]


def test_sampling_follows_the_seed_and_each_of_n_is_another(client):
    options = {"temperature": 1.5, "top_p": 0.95, "seed": 3, "n": 3, "max_tokens": 12}
    first, again, other = (
        [choice["text"] for choice in client.complete("tiny", **options | {"seed": seed})[1]["choices"]]
        for seed in (3, 3, 4)
    )
    assert first == again
    assert len({*first, *other}) == 6, "neighbouring seeds have no answer in common"
    prompts = ["Der Fuchs"] * 3
    several = client.complete("tiny", prompts, **options | {"n": 1})[1]["choices"]
    assert len({choice["text"] for choice in several}) == 3, "nor have equal prompts of one request"


def test_stop_words_end_the_text_before_them(client):
    whole = client.text("tiny:law", max_tokens=40)
    word = whole[12:15]
    for stop in (word, ["never", word], [whole[12:14], word]):
        status, content = client.complete("tiny:law", max_tokens=40, stop=stop)
        assert status == 200
        assert content["choices"][0]["text"] == whole[: whole.index(word)]
        assert content["choices"][0]["finish_reason"] == "stop"
        body = {"model": "tiny:law", "prompt": "the quick", "max_tokens": 40, "temperature": 0, "stop": stop}
        events = client.events("/v1/completions", body)
        assert "".join(event["choices"][0]["text"] for event in events[:-1]) == whole[: whole.index(word)]
        assert (events[-2]["choices"][0]["finish_reason"], events[-1]) == ("stop", "[DONE]")
    assert client.text("tiny:law", max_tokens=40, stop=f"{whole[-3:]}never") == whole, "what was held back is told"


def test_what_is_streamed_is_the_whole(client):
    for options in ({}, {"logprobs": 2}, {"logprobs": 1, "echo": True}, {"n": 2, "return_token_ids": True}):
        body = {"model": "tiny:de", "prompt": PROMPTS[1], "max_tokens": 9, "temperature": 0} | options
        whole = client.complete(**body)[1]
        *events, end = client.events("/v1/completions", body)
        assert end == "[DONE]"
        for choice in whole["choices"]:
            parts = [c for event in events for c in event["choices"] if c["index"] == choice["index"]]
            assert "".join(part["text"] for part in parts) == choice["text"]
            if choice["logprobs"]:
                for key, values in choice["logprobs"].items():
                    assert [value for part in parts for value in part["logprobs"][key]] == values
            if "token_ids" in choice:
                assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]


def test_log_likelihoods_are_those_of_lm_eval(client, made, model):
    """The request that lm-eval's `local-completions` sends, read as it reads it, against our own lm-eval model."""
    pairs = [("the quick", " brown fox"), ("größere", " Füchse schlafen"), ("fox", " jumps")]
    for name, domain in ARMS.items():
        lm = KoffLM(model, domain=domain, device="cpu", batch_size=1)
        tokens = [lm._encode_pair(*pair) for pair in pairs]
        expected = lm._loglikelihood_tokens([(pair, *ids) for pair, ids in zip(pairs, tokens, strict=True)])
        texts = [context + continuation for context, continuation in tokens]
        body = {
            "model": name,
            "prompt": texts,
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "echo": True,
            "seed": 1,
        }
        status, content = client.post("/v1/completions", body)
        assert status == 200
        for choice, (context, _), (total, greedy) in zip(content["choices"], tokens, expected, strict=True):
            told = choice["logprobs"]["token_logprobs"][len(context) : -1]
            tops = choice["logprobs"]["top_logprobs"][len(context) : -1]
            assert sum(told) == pytest.approx(total, abs=1e-4)
            assert all(value == max(top.values()) for value, top in zip(told, tops, strict=True)) == greedy


def test_a_prompt_alone_is_scored(client):
    status, content = client.complete("tiny:de", echo=True, logprobs=0, max_tokens=0)
    assert status == 200
    (choice,) = content["choices"]
    assert choice["text"] == "the quick"
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert len(choice["logprobs"]["tokens"]) == content["usage"]["prompt_tokens"]
    assert content["usage"]["completion_tokens"] == 0


# -------------------------------------------------------------------------------------------------- what is refused

BAD = [
    ({"model": "other"}, 404, "'other' does not exist: GET /v1/models lists them"),
    ({"model": "tiny:it"}, 404, "does not exist"),
    ({"model": "tiny:"}, 404, "does not exist"),
    ({"model": "tiny:auto"}, 404, "no router that can be used"),
    ({"model": None}, 400, "model: Input should be a valid string"),
    ({"prompt": []}, 400, "prompt: it must be a text"),
    ({"prompt": [[]]}, 400, "prompt: it must be a text"),
    ({"prompt": {"a": 1}}, 400, "prompt: it must be a text"),
    ({"prompt": [-1]}, 400, "prompt: it must be a text"),
    ({"prompt": [VOCABULARY]}, 400, f"a token id is {VOCABULARY}; this model has {VOCABULARY} tokens"),
    ({"prompt": [10**6]}, 400, "a token id is 1000000; this model has"),
    ({"prompt": "half \ud800"}, 400, "lone surrogate"),
    ({"prompt": [5] * 600}, 400, "the prompt has 600 tokens and 6 more are asked for; this model takes 512 in all"),
    ({"max_tokens": 1000}, 400, "this model takes 512 in all"),
    ({"max_tokens": 201}, 400, "200 of an answer"),
    ({"max_tokens": -1}, 400, "max_tokens: Input should be greater than or equal to 0"),
    ({"max_tokens": 0}, 400, "max_tokens must be at least 1"),
    ({"max_tokens": "6"}, 400, "max_tokens: Input should be a valid integer"),
    ({"temperature": -0.1}, 400, "temperature: Input should be greater"),
    ({"temperature": True}, 400, "temperature: Input should be a valid number"),
    ({"top_p": 0}, 400, "top_p: Input should be greater than 0"),
    ({"n": 0}, 400, "n: Input should be greater"),
    ({"n": 65}, 400, "65 texts in one request; this server takes 64 at a time"),
    ({"n": 100, "prompt": ["a", "b"]}, 400, "at most 128"),
    ({"prompt": [10**4000]}, 400, "prompt: it must be a text"),
    ({"max_tokens": 10**4000}, 400, "max_tokens: Input should be less than or equal to 2147483648"),
    ({"stop": ""}, 400, "stop: it must be a text or a list of at most 16, each of 1 to 1000 characters"),
    ({"stop": [""]}, 400, "stop: it must be a text or a list of at most 16"),
    ({"stop": ["x"] * 17}, 400, "stop: it must be a text or a list of at most 16"),
    ({"logprobs": 21}, 400, "logprobs: Input should be less"),
    ({"frequency_penalty": 0.5}, 400, "frequency_penalty"),
    ({"logit_bias": {"5": 1.0}}, 400, "logit_bias"),
    ({"best_of": 3}, 400, "best_of is not supported"),
    ({"suffix": "x"}, 400, "suffix"),
    ({"koff_memory": "de"}, 400, "unknown or unsupported parameter: koff_memory"),
]


@pytest.mark.parametrize(("options", "status", "line"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_request_is_refused_in_one_line(client, options, status, line):
    got, content = client.post(
        "/v1/completions", {"model": "tiny:de", "prompt": "the quick", "max_tokens": 6, "temperature": 0} | options
    )
    assert (got, set(content["error"])) == (status, {"message", "type", "param", "code"})
    assert line in content["error"]["message"]
    assert "\n" not in content["error"]["message"]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs: true"),
        ({"prompt": "x"}, "unknown or unsupported parameter: prompt"),
    ],
)
def test_a_bad_chat_is_refused(client, options, line):
    status, content = client.chat("tiny:de", **options)
    assert status == 400 and line in content["error"]["message"]


def test_bodies_that_are_no_requests(client, address):
    def send(body, kind="application/json"):
        answer = client.http.post("/v1/completions", content=body, headers={"Content-Type": kind})
        return answer.status_code, answer.json()["error"]["message"]

    for body in (b"", b"{", b"\xff\xfe", b'{"model": "tiny"' + b"[" * 200_000):
        assert send(body)[0] == 400
    assert send(b'{"\\ud800": [' + b"1," * 20_000 + b"1]}") == (400, "\\ud800: 20001 parts; at most 10000 are taken")
    assert send(b"[1]") == (400, "the body must be a JSON object, not list")
    assert send(b'{"temperature": NaN, "model": "tiny", "prompt": "x"}')[0] == 400
    assert send(b"{}", "text/plain") == (415, "send JSON, with the header Content-Type: application/json")
    assert send(b"x" * (LARGEST_BODY + 1))[0] == 413
    wrong = client.http.post("/v1/models", json={})
    assert (wrong.status_code, wrong.headers["Allow"]) == (405, "GET")
    assert client.http.get("/v2").json()["error"]["message"] == "GET /v2: Not Found"
    assert client.text("tiny")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, r"messages[0].role: it must be system, developer, user or"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": None}]},
            "messages[1].content: it must be a text, or a list of parts of type text",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content: it must be a text, or a list",
        ),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "unknown or unsupported: messages[0].name"),
        (
            {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "max_completion_tokens": 4},
            "max_tokens and max_completion_tokens differ: give one of them",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}], "stream_options": {"include_usage": True}},
            "body: stream_options are of streamed answers: give stream true",
        ),
    ],
)
def test_what_is_wrong_with_a_talk_is_told_by_its_place(body, said):
    with pytest.raises(Refused) as caught:
        requests.read(requests.Chat, json.dumps({"model": "x"} | body).encode())
    assert said in str(caught.value)


def test_parts_of_characters_have_names_of_their_own(client, model):
    """Read as text all of them were one, and a token had another's log-probability."""
    ids = model.tokenizer("größere 今天", add_special_tokens=False)["input_ids"]
    body = {"model": "tiny", "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 5}
    told = client.post("/v1/completions", body)[1]["choices"][0]["logprobs"]
    parts = [token.removeprefix("bytes:").split("\\x") for token in told["tokens"]]
    raw = [bytes(int(each, 16) for each in part[1:]) if part[1:] else part[0].encode() for part in parts]
    assert b"".join(raw) == "größere 今天".encode() and any(len(part) > 1 for part in parts)
    for token, value, top in zip(told["tokens"][1:], told["token_logprobs"][1:], told["top_logprobs"][1:], strict=True):
        assert top[token] == value and "\ufffd" not in "".join(top) and len(top) in (5, 6)
    said = client.chat("tiny", "größere", logprobs=True, top_logprobs=1)[1]["choices"][0]
    parts = [bytes(token["bytes"]) for token in said["logprobs"]["content"]]
    assert b"".join(parts).decode(errors="replace") == said["message"]["content"]


def test_offsets_are_those_of_the_text_that_is_told(client):
    about = client.complete("tiny:de", "Der Fuchs", echo=True, logprobs=0, max_tokens=3)[1]["choices"][0]
    told = about["logprobs"]
    places = zip(told["tokens"], told["text_offset"], strict=True)
    (start, first), *others = [(token, offset) for token, offset in places if token[:6] != "bytes:"]  # half a character
    assert start.startswith("<") and start.endswith(">") and first == 0, "the start token, which the text has not"
    assert len(others) >= 2
    assert all(about["text"][offset : offset + len(token)] == token for token, offset in others)


@pytest.fixture
def without_collector():
    """It would look through all that the tests hold, at a moment of its own choosing."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize(
    ("name", "part"), [("prompt", "[5]"), ("prompt", "{}"), ("prompt", "-1"), ("stop", '""'), ("messages", "1")]
)
def test_a_large_body_is_not_looked_at_for_long(name, part, without_collector):
    """All others wait meanwhile: it may take little more than reading the JSON."""
    body = f'{{"model": "x", "{name}": [{",".join([part] * 200_000)}]}}'
    began = time.process_time()
    json.loads(body)
    reading, began = time.process_time() - began, time.process_time()
    with pytest.raises(Refused):
        requests.read(requests.Chat if name == "messages" else requests.Completion, body.encode())
    assert time.process_time() - began < 2 * reading + 0.1


def test_a_body_without_a_length_is_counted_too(client):
    def endless():
        for _ in range(100):
            yield b" " * 2**20

    try:
        answer = client.http.post("/v1/completions", content=endless(), headers={"Content-Type": "application/json"})
        assert answer.status_code == 413
    except httpx.TransportError:  # closed in the middle of what was being sent
        pass
    assert client.text("tiny")


def test_requests_that_nobody_means_well(address):
    """1,000 of them by recipes/reliability/clients.py."""
    found = clients.attack(address, 120, seed=1)
    assert not [verdict for verdict in found if "FAULT" in verdict]
    assert found["answered"] >= 10 and found["refused"] >= 40


def test_other_sites_pages_are_not_answered(client):
    """A browser on this machine that a page elsewhere leads here, by a name of its own (DNS rebinding) or blindly."""
    refused = client.http.get("/v1/models", headers={"Host": "evil.example:80"})
    assert refused.status_code == 403 and "by localhost" in refused.json()["error"]["message"]
    assert client.http.get("/v1/models", headers={"Host": "localhost"}).status_code == 200
    assert "access-control-allow-origin" not in client.http.get("/v1/models", headers={"Origin": "x"}).headers
    assert client.http.options("/v1/completions").status_code == 405


def test_a_model_without_chat_template_says_so(tmp_path):
    with served(OwnEngine(tiny_artifact(tmp_path).folder)) as address:
        status, content = Client(address).chat("tiny")
    assert status == 400 and "no chat template" in content["error"]["message"]


def test_a_chat_template_that_never_ends_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(rendering.writing.__wrapped__, "__defaults__", (0.5,))
    engine = OwnEngine(tiny_artifact(tmp_path).folder)
    engine.tokenizer.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with served(engine) as address:
        status, content = Client(address).chat("tiny")
    assert status == 400 and "still wrote after 0.5 s" in content["error"]["message"]


# ------------------------------------------------------------------------------------------------------ under load


@pytest.fixture
def slow(monkeypatch):
    """Ten milliseconds a token: the tiny model ends before anybody can be in its way."""
    step = Batch.step
    monkeypatch.setattr(Batch, "step", lambda self: (time.sleep(0.01 * bool(self.rows)), step(self)))


def test_who_finds_no_place_is_told_to_come_again(made, slow):
    with served(OwnEngine(made.folder, rows=1), texts=2) as address:
        client = Client(address)
        body = {
            "model": "tiny:de",
            "prompt": "x",
            "max_tokens": 400,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        with client.http.stream("POST", "/v1/completions", json=body | {"n": 2}) as busy:
            lines = busy.iter_lines()
            next(lines)
            answer = client.http.post("/v1/completions", json=body | {"stream": False})
            assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
            assert answer.json()["error"]["code"] == "queue_full"
        began = time.monotonic()
        while client.complete("tiny:de")[0] == 429:  # who hung up frees the places
            assert time.monotonic() - began < 20
            time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_answers_of_many_log_probabilities_are_written_while_others_are_answered(made, monkeypatch, stream):
    """Of 128 long prompts with 20 each that took 22 s, in which nobody had a token."""
    name, writing = "part" if stream else "whole", threading.Event()
    stock = getattr(CompletionForm, name)

    def slow(form, *args):
        writing.set()
        time.sleep(1.5)
        return stock(form, *args)

    monkeypatch.setattr(CompletionForm, name, slow)
    with served(OwnEngine(made.folder)) as address, concurrent.futures.ThreadPoolExecutor() as pool:
        client, other = Client(address), Client(address)
        body = {"model": "tiny", "prompt": "fox", "max_tokens": 0, "echo": True, "logprobs": 5, "stream": stream}
        asked = pool.submit(client.http.post, "/v1/completions", json=body)
        assert writing.wait(20)
        began = time.monotonic()
        assert other.http.get("/health").status_code == 200
        assert time.monotonic() - began < 1
        assert asked.result().status_code == 200


def test_a_text_that_cannot_fit_is_not_tokenised(client, made, monkeypatch):
    """That took a minute, and six such clients all threads that there are for it."""
    word = max(load_decomposed(made.folder, domains=[]).tokenizer.get_vocab(), key=len)
    long = "x" * (512 * len(word))
    said = f"the prompt has {len(long) + 1} characters, more than 512 tokens can hold: this model takes 512 in all"
    assert "the prompt has" in client.complete("tiny", long)[1]["error"]["message"], "by its tokens"
    monkeypatch.setattr(ask, "encode_prompt", lambda *_: 1 / 0)
    status, content = client.complete("tiny", long + "x")
    assert (status, content["error"]["message"], content["error"]["param"]) == (400, said, "prompt")
    assert content["error"]["code"] == "context_length_exceeded"
    status, content = client.chat("tiny", long)
    assert status == 400 and "characters, more than 512 tokens can hold" in content["error"]["message"]


def test_a_client_that_goes_before_its_answer_frees_its_place(made, slow):
    with served(OwnEngine(made.folder, rows=1), texts=1) as address:
        client = Client(address)
        body = {"model": "tiny:de", "prompt": "x", "max_tokens": 500, "temperature": 0, "ignore_eos": True}
        with pytest.raises(httpx.ReadTimeout):
            client.http.post("/v1/completions", json=body, timeout=0.2)
        began = time.monotonic()
        while client.complete("tiny:de")[0] == 429:
            assert time.monotonic() - began < 20
            time.sleep(0.01)


def test_a_client_that_goes_while_it_sends_is_no_failure(made, caplog):
    with served(OwnEngine(made.folder)) as address:
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as hasty:
            hasty.sendall(f'{head}Content-Length: 1000\r\n\r\n{{"model"'.encode())
            time.sleep(0.2)
        time.sleep(0.2)
        client = Client(address)
        told = client.http.get("/metrics").text
    assert 'status="500"' not in told
    assert not [record for record in caplog.records if record.levelname == "ERROR"], caplog.text


SLOW = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SLOW += "Content-Length: 1000\r\n\r\n{"


@pytest.mark.parametrize("sent", ["", SLOW[:9], SLOW], ids=["nothing", "half a head", "half a body"])
def test_a_client_that_sends_slower_than_slow_is_left(made, monkeypatch, sent):
    """It sends a byte now and then, so its connection is never idle; one who is answered meanwhile stays connected."""
    monkeypatch.setattr(Connection, "seconds", 1.5)
    monkeypatch.setattr(Guard, "seconds", 1.5)
    with served(OwnEngine(made.folder)) as address:
        client, began = Client(address), time.monotonic()
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as slow:
            slow.settimeout(0.3)
            slow.sendall(sent.encode())
            told = b""
            while time.monotonic() - began < 20 and not told:
                with contextlib.suppress(TimeoutError):
                    told = slow.recv(4096)
                if sent and not told:
                    slow.sendall(b"G")
                assert client.complete("tiny:de", max_tokens=1)[0] == 200
            while told and (more := slow.recv(4096)):  # head and body may come one after the other
                told += more
        assert told.startswith(b"HTTP/1.1 408") and 1.4 < time.monotonic() - began < 20
        assert b"Connection: close" in told or b"connection: close" in told
        if sent == SLOW:
            assert b"the body did not come within" in told
            assert 'path="/v1/completions",status="408"} 1.0' in client.http.get("/metrics").text


def test_a_client_that_asks_for_a_websocket_gets_its_answer_and_no_line_of_the_log(client, caplog):
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "x", "Sec-WebSocket-Version": "13"}
    assert client.http.get("/v1/models", headers=upgrade).status_code == 200
    assert not caplog.records


def test_memories_of_each_kind_and_of_more_slots_than_the_context_serve(tmp_path):
    """LoRA alone, slots alone, both, and 600 slots where the model takes 512 tokens: slots take none of them."""
    module = tiny_decomposition(tmp_path)
    for name, lora, kv in [("fr", LoraSpec(rank=2), None), ("law", None, KVSpec(slots=600))]:
        module.memories.remove(name)
        module.memories.add(name, lora, kv)
    export(module, tmp_path / "artifact", prove=False)
    model = load_decomposed(tmp_path / "artifact")
    with served(OwnEngine(tmp_path / "artifact")) as address:
        client = Client(address)
        for name, domain in ARMS.items():
            assert client.text(name, "fox") == due(model, "fox", domain)
        assert client.complete("tiny:law", [5] * 500, max_tokens=12)[0] == 200
        status, content = client.complete("tiny:law", [5] * 501, max_tokens=12)
        assert status == 400 and "this model takes 512 in all" in content["error"]["message"]


def test_a_request_ends_at_the_time_limit(made, slow):
    with served(OwnEngine(made.folder), seconds=0.2) as address:
        client = Client(address)
        body = {"model": "tiny:de", "prompt": "x", "max_tokens": 500, "temperature": 0, "ignore_eos": True}
        status, content = client.post("/v1/completions", body)
        assert status == 504 and "longer than 0.2 s" in content["error"]["message"]
        events = client.events("/v1/completions", body)
        assert events[-1]["error"]["code"] == "timeout"


def test_a_client_that_does_not_read_is_left_after_the_time_limit(made, monkeypatch):
    monkeypatch.setattr(ask, "GRACE", 0.2)
    body = {"model": "tiny:de", "prompt": [5] * 400, "n": 64, "max_tokens": 9, "logprobs": 20, "echo": True}
    content = json.dumps(body | {"stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    with served(OwnEngine(made.folder), texts=64, seconds=2) as address:
        client = Client(address)
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as deaf:
            deaf.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
            while client.complete("tiny:de")[0] == 200:
                time.sleep(0.01)
            began = time.monotonic()
            while client.complete("tiny:de")[0] == 429:
                assert time.monotonic() - began < 20
                time.sleep(0.05)
            assert time.monotonic() - began > 1, "it was the limit that ended it"


def test_metrics_count(client, model):
    def counted():
        lines = client.http.get("/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    before = counted()
    client.complete("tiny:de", PROMPTS[0])
    after = counted()

    def grown(name):
        return after[name] - before.get(name, 0)

    assert grown('koff_tokens_total{kind="prompt"}') == len(model.tokenizer(PROMPTS[0])["input_ids"])
    assert grown('koff_tokens_total{kind="completion"}') == 6
    assert grown('koff_requests_total{path="/v1/completions",status="200"}') == 1
    assert after["koff_memories"] == 3
    assert client.http.get("/health").json() == {"status": "ok"}
    assert client.http.head("/health").status_code == 200, "as some proxies and monitors ask"


def test_a_name_with_a_slash_is_found_as_it_is_listed(made):
    with served(OwnEngine(made.folder), name="org/tiny") as address:
        client = Client(address)
        assert client.models()[1] == client.http.get("/v1/models/org%2Ftiny:de").json()["id"] == "org/tiny:de"
        said = client.http.get("/v1/models/org%2Ftiny:it").json()["error"]["message"]
        assert said.startswith("the model 'org/tiny:it' does not exist")


@pytest.mark.parametrize("stream", [False, True])
def test_scores_that_are_no_numbers_are_one_error_of_the_server(made, stream):
    engine = OwnEngine(made.folder)
    forward = engine.model.forward

    def spoilt(ids, mask, **options):
        out = forward(ids, mask, **options)
        out.logits[ids == 250] = float("nan")
        return out

    engine.model.forward = spoilt
    body = {"max_tokens": 0, "echo": True, "logprobs": 2, "stream": stream}
    with served(engine) as address:
        status, content = Client(address).complete("tiny", [5, 250, 6], **body)
        assert (status, content["error"]["message"]) == (500, "the model's numbers are not finite")
        assert content["error"]["code"] == "engine_failed"
        assert Client(address).text("tiny", [5, 6], max_tokens=0, echo=True, logprobs=2)


def test_a_callers_requests_share_its_turns_whoever_asks_by_which_key(made, monkeypatch):
    """And the texts of one request are of one turn."""
    asked, stream = [], OwnEngine.stream

    def noting(engine, ids, memory, options, who=None):
        asked.append(who)
        return stream(engine, ids, memory, options, who)

    monkeypatch.setattr(OwnEngine, "stream", noting)
    with served(OwnEngine(made.folder)) as address:
        client = Client(address)
        client.complete("tiny", ["a", "b"], n=2)
        client.chat("tiny")
    assert {caller for caller, _ in asked} == {"anybody"}
    assert [len({request for _, request in some}) for some in (asked[:4], asked)] == [1, 2]


def test_health_tells_of_an_engine_that_has_ended(made):
    """Every request fails then, until somebody starts the server again."""
    engine = OwnEngine(made.folder)
    with served(engine, close=False) as address:
        client = Client(address)
        assert client.http.get("/health").status_code == 200
        asyncio.run(engine.close())
        answer = client.http.get("/health")
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "the engine has ended: start the server again"


def test_a_failure_of_the_server_is_counted(made, monkeypatch):
    monkeypatch.setattr(ask.Ask, "answer", lambda *_: 1 / 0)
    with served(OwnEngine(made.folder)) as address:
        client, other = Client(address), Client(address)  # the first one's connection is closed
        assert client.complete("tiny")[0] == 500
        told = other.http.get("/metrics").text
        assert 'koff_requests_total{path="/v1/completions",status="500"} 1.0' in told


def test_the_default_of_tokens_goes_no_further_than_the_limit(made):
    with served(OwnEngine(made.folder), max_tokens=8) as address:
        client = Client(address)
        status, content = client.complete("tiny:de", max_tokens=None)
        assert (status, content["usage"]["completion_tokens"]) == (200, 8)
        assert client.complete("tiny:de", max_tokens=9)[0] == 400


def test_ids_that_the_model_makes_are_taken_though_the_tokenizer_has_no_name_for_them(client, model):
    assert client.complete("tiny:de", [5, VOCABULARY - 1])[0] == 200
    assert len(model.tokenizer) < VOCABULARY


def test_the_page_needs_nothing_from_elsewhere(client, model):
    """And what its script asks for is answered; the page itself is opened in test_serve_page.py."""
    answer = client.http.get("/")
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "connect-src 'self'" in answer.headers["content-security-policy"]
    assert not re.findall(r"https?://|src=|@import|url\(|innerHTML", answer.text)
    body = {"model": "tiny:de", "prompt": "the", "logprobs": 0, "return_token_ids": True, "max_tokens": 5}
    *events, _ = client.events("/v1/completions", body)
    ids = events[0]["choices"][0]["prompt_token_ids"] + [i for e in events for i in e["choices"][0]["token_ids"]]
    status, content = client.complete("tiny", ids, max_tokens=0, echo=True, logprobs=0)
    assert status == 200 and len(content["choices"][0]["logprobs"]["token_logprobs"]) == len(ids)


# ---------------------------------------------------------------------------------------------- router and memories


def test_auto_asks_the_router_and_tells_its_choice(made, model, monkeypatch):
    engine = OwnEngine(made.folder)
    monkeypatch.setattr(OwnEngine, "routes", True)
    asked = []

    def route(self, texts):
        asked.extend(texts)
        return ["law" if "fox" in text else None if "none" in text else "de" for text in texts]

    monkeypatch.setattr(OwnEngine, "route", route)
    with served(engine) as address:
        client = Client(address)
        assert client.models()[-1] == "tiny:auto"
        for prompt, domain, name in (
            ("a fox", "law", "tiny:law"),
            ("größere", "de", "tiny:de"),
            ("none", None, "tiny"),
        ):
            answer = client.http.post(
                "/v1/completions", json={"model": "tiny:auto", "prompt": prompt, "max_tokens": 6, "temperature": 0}
            )
            content = answer.json()
            assert (content["model"], answer.headers["X-Koff-Domain"]) == (name, domain or "none")
            assert content["choices"][0]["koff_domain"] == domain
            assert content["choices"][0]["text"] == due(model, prompt, domain)
        _, content = client.complete("tiny:auto", ["a fox", "größere"])
        assert content["model"] == "tiny:auto"
        assert [choice["koff_domain"] for choice in content["choices"]] == ["law", "de"]
        assert client.chat("tiny:auto", "a fox")[1]["model"] == "tiny:law"
        talk = [("user", "größere"), ("assistant", "ja"), ("user", "fox")]
        status, _ = client.chat("tiny:auto", messages=[{"role": role, "content": text} for role, text in talk])
        assert status == 200 and asked[-1] == "fox\ngrößere", "the last question first"


def test_memories_of_the_folder_show_up_and_go_while_it_serves(made, model, tmp_path):
    folder = shutil.copytree(made.folder, tmp_path / "artifact")

    def until(names):
        began = time.monotonic()
        while client.models() != names:
            assert time.monotonic() - began < 20, client.models()
            time.sleep(0.02)

    with served(OwnEngine(folder)) as address:
        client = Client(address)
        remove_memory(folder, "law")
        until(["tiny", "tiny:de", "tiny:fr"])
        assert client.complete("tiny:law")[0] == 404
        add_memory(folder, made.folder / "memories/law", "jura")
        until(["tiny", "tiny:de", "tiny:fr", "tiny:jura"])
        assert client.text("tiny:jura", PROMPTS[0]) == due(model, PROMPTS[0], "law")
        (folder / "koff.json").write_text("{")
        time.sleep(0.2)
        assert client.text("tiny:jura", PROMPTS[0]) == due(model, PROMPTS[0], "law")
