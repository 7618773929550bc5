"""Send a server of `koff serve` requests that nobody means well, and judge what it answers.

    python recipes/reliability/clients.py --cases 1000 --seed 0

Every answer must be one of
    answered   status 200 with JSON that has choices, or events that end in [DONE]
    refused    status 4xx with an error in OpenAI's form, its message one line without what was sent as a secret
    hung up    the connection closed by the server on a body that was too large
and between them the server must answer a sound request as before. A status 5xx, a traceback, another answer to the
sound request or no answer within a minute are faults.
"""

import argparse
import contextlib
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

SECRET = "sk-secret-0123456789"
SOUND = {"model": "tiny:de", "prompt": "the quick", "max_tokens": 5, "temperature": 0}
CHAT = {"model": "tiny:fr", "messages": [{"role": "user", "content": "fox"}], "max_tokens": 4, "temperature": 0}
VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3.5,
    1e308,
    -1e-308,
    2**63,
    -(2**70),
    "",
    "x",
    "\x00",
    "\ud800",
    "☃" * 50,
]
VALUES += [[], {}, [[]], [None], [1, "a"], {"a": {"b": []}}, "a" * 20_000, list(range(700)), [[5]] * 200, ["x"] * 20]
VALUES += [
    {"type": "text"},
    [{"role": "user", "content": "x"}],
    "tiny",
    "tiny:auto",
    "tiny:../de",
    float("nan"),
    float("inf"),
]
NAMES = ["model", "prompt", "messages", "max_tokens", "temperature", "top_p", "n", "stream", "stop", "seed", "logprobs"]
NAMES += [
    "echo",
    "top_logprobs",
    "stream_options",
    "best_of",
    "suffix",
    "user",
    "ignore_eos",
    "tools",
    "response_format",
]
NAMES += ["logit_bias", "metadata", "return_token_ids", "max_completion_tokens", "__proto__", "koff_memory", ""]
FINE = {"stream": True, "n": 2, "seed": 7, "temperature": 1.0, "top_p": 0.5, "stop": ["e", "xx"], "user": "x"}
FINE |= {"return_token_ids": True, "ignore_eos": True, "max_tokens": 9}
PATHS = (
    ["/v1/completions"] * 5
    + ["/v1/chat/completions"] * 3
    + ["/v1/models", "/koff/memories", "/", "/v1/%00", "//", "/x" * 500]
)
KINDS = ["application/json"] * 12 + ["text/plain", "", "application/json; charset=utf-16", "multipart/form-data"]


def spoilt(rng: random.Random) -> tuple[str, str, dict[str, str], bytes]:
    """Method, path, headers and body of a request."""
    path = rng.choice(PATHS)
    body: Any = json.loads(json.dumps(CHAT if "chat" in path else SOUND))
    for name in rng.sample(list(FINE), rng.randrange(4)):
        body[name] = FINE[name]
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        at = body
        if "messages" in body and isinstance(body["messages"], list) and body["messages"] and rng.random() < 0.3:
            at = body["messages"][0] if isinstance(body["messages"][0], dict) else body
        if at and rng.random() < 0.15:
            at.pop(rng.choice(list(at)))
        else:
            at[rng.choice(NAMES if at is body else ["role", "content", "name", "x"])] = rng.choice(VALUES)
    if rng.random() < 0.1:
        body = rng.choice(VALUES)
    raw = json.dumps(body).encode()
    way = rng.random()
    if way < 0.1:  # bytes that are no JSON, or no longer
        place = rng.randrange(len(raw) + 1)
        raw = raw[:place] + rng.choice((b"", b"\xff", b"[" * 5000, b"\x00", b'"')) + raw[place + rng.randrange(3) :]
    elif way < 0.12:
        raw = b" " * (9 * 2**20)
    headers = {"Content-Type": rng.choice(KINDS)}
    if rng.random() < 0.1:
        headers["Authorization"] = rng.choice((f"Bearer {SECRET}", SECRET, "Basic x"))
    if rng.random() < 0.03:
        headers["Host"] = rng.choice(("evil.example", "", "localhost:1", "[::1]:80", ":", "a" * 3000))
    return rng.choice(["POST"] * 12 + ["GET", "PUT", "DELETE", "OPTIONS"]), path, headers, raw


def judge(answer: httpx.Response) -> str:
    """`answered` or `refused`, or what is wrong with an answer."""
    text = answer.text
    if SECRET in text or "Traceback" in text:
        return f"FAULT: the answer shows what it must not: {text[:200]}"
    if answer.status_code == 200:
        if answer.headers["content-type"].startswith("text/event-stream"):
            last = text.strip().rpartition("data: ")[2]
            return "answered" if last == "[DONE]" else f"FAULT: events end in {last[:200]}"
        if answer.headers["content-type"] == "application/json":
            return "answered" if {"choices", "data", "id"} & answer.json().keys() else f"FAULT: {text[:200]}"
        return "answered" if text.startswith("<!doctype html>") else f"FAULT: {text[:200]}"
    if not 400 <= answer.status_code < 500:
        return f"FAULT: status {answer.status_code}: {text[:200]}"
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"FAULT: no error in OpenAI's form: {answer.status_code} {text[:200]}"
    return "refused" if message and "\n" not in message and len(message) < 700 else f"FAULT: {message[:300]!r}"


def attack(address: str, cases: int, seed: int) -> Counter[str]:
    """Send that many requests to a server; how often which judgement was passed.

    Args:
        address: Of a server of the tests' small model, called `tiny`.
        cases: Requests.
        seed: Of what is sent.
    """
    rng, found = random.Random(seed), Counter()
    with httpx.Client(base_url=address, timeout=60) as client:
        due = client.post("/v1/completions", json=SOUND).json()["choices"]
        for case in range(cases):
            method, path, headers, raw = spoilt(rng)
            try:
                with_hang_up = rng.random() < 0.05
                answer = client.request(
                    method, path, headers=headers, content=raw, timeout=0.02 if with_hang_up else 60
                )
                verdict = judge(answer)
            except httpx.TimeoutException:
                verdict = "left by us" if with_hang_up else f"FAULT: no answer to {raw[:200]!r}"
            except httpx.TransportError as error:
                verdict = "hung up" if len(raw) > 2**20 else f"FAULT: {error!r} to {method} {path[:60]} {raw[:200]!r}"
            except (httpx.InvalidURL, UnicodeError, ValueError):
                verdict = "not sent"
            found[
                verdict if "FAULT" not in verdict else f"case {case}: {verdict} to {method} {path[:60]} {raw[:300]!r}"
            ] += 1
            if case % 25 == 24 and client.post("/v1/completions", json=SOUND).json().get("choices") != due:
                found[f"case {case}: FAULT: the sound request has another answer"] += 1
    return found


@contextlib.contextmanager
def victim() -> Iterator[str]:
    """A server of a small model that can chat."""
    from served import served
    from tiny_artifact import tiny_artifact

    from koff_lightning.serving.own import OwnEngine

    with (
        tempfile.TemporaryDirectory() as folder,
        served(OwnEngine(tiny_artifact(Path(folder), chat=True).folder)) as at,
    ):
        yield at


def main() -> int:
    """Print what came of it; 1 where there were faults."""
    parser = argparse.ArgumentParser(description="Requests that nobody means well, against a server of a tiny model.")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with victim() as address:
        found = attack(address, options.cases, options.seed)
    for verdict, count in found.most_common():
        print(f"{count:6} {verdict}")
    return int(any("FAULT" in verdict for verdict in found))


if __name__ == "__main__":
    sys.exit(main())
