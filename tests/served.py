"""A server of the front in a thread of the test's own process, and clients of it."""

import asyncio
import contextlib
import json
import threading

import httpx2 as httpx  # as the clients of huggingface_hub and openai
import uvicorn

from koff_lightning.commands.serve import listening
from koff_lightning.serving.app import create_app
from koff_lightning.serving.connection import config
from koff_lightning.serving.front import Settings


@contextlib.contextmanager
def served(engine, close=True, **settings):
    """Gives the server's address while it runs."""
    app = create_app(engine, Settings(**{"name": "tiny", "look": 0.05} | settings), close)
    at = listening("127.0.0.1", 0)
    server = uvicorn.Server(config(app, 19))
    server.capture_signals = contextlib.nullcontext  # the test's own stay
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[at])))
    thread.start()
    try:
        yield f"http://127.0.0.1:{at.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive(), "the server does not end"


class Client:
    """Asks a server."""

    def __init__(self, address, key=None):
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self.http = httpx.Client(base_url=address, headers=headers, timeout=60)

    def __del__(self):
        self.http.close()

    def complete(self, model, prompt="the quick", **options):
        """Status and JSON of a completion, greedy unless told otherwise."""
        body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0} | options
        return self.post("/v1/completions", body)

    def chat(self, model, text="fox", **options):
        """Status and JSON of a chat of one message."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 6, "temperature": 0}
        return self.post("/v1/chat/completions", body | options)

    def post(self, path, body):
        """Status and JSON."""
        content = json.dumps(body).encode()  # in ASCII, which can write half characters
        answer = self.http.post(path, content=content, headers={"Content-Type": "application/json"})
        return answer.status_code, answer.json()

    def text(self, *args, **options):
        """Text of the first choice of a completion that must succeed."""
        status, content = self.complete(*args, **options)
        assert status == 200, content
        return content["choices"][0]["text"]

    def models(self):
        """Names that the server tells."""
        answer = self.http.get("/v1/models")
        assert answer.status_code == 200, answer.text
        return [model["id"] for model in answer.json()["data"]]

    def events(self, path, body):
        """What a streamed answer says, event by event."""
        with self.http.stream("POST", path, json=body | {"stream": True}) as answer:
            lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        return [line if line == "[DONE]" else json.loads(line) for line in lines]
