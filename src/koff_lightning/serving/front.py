"""What all requests share: the engine, who may what, the names of models, what is counted.

NAME          the bare backbone
NAME:DOMAIN   with a domain's memory
NAME:auto     with the memory that the artifact's router chooses by the text
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from koff_lightning.serving.engine import Engine
from koff_lightning.serving.errors import Refused, no_model
from koff_lightning.serving.job import Places
from koff_lightning.serving.keys import ANYBODY, Keys, Rights
from koff_lightning.support.errors import KoffError
from koff_lightning.support.names import AUTO

_PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/koff/memories", "/health", "/metrics", "/")
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_log = logging.getLogger(__name__)


@dataclass
class Settings:
    """How a server serves.

    Args:
        name: Name of the model.
        keys: Who may do what; None for everybody everything but administration, on this machine.
        texts: Most texts that are under way or wait.
        seconds: Time limit of a request.
        max_tokens: Most tokens of an answer; None for what the context leaves.
        look: Seconds between two looks at the artifact's memories.
        folder: The artifact, whose memories an admin may add and remove; None where there is none.
    """

    name: str
    keys: Keys | None = None
    texts: int = 256
    seconds: float = 600.0
    max_tokens: int | None = None
    look: float = 1.0
    folder: Path | None = None


class Metrics:
    """What one server counts, in Prometheus' form. No prompt, key or name of a caller is in it."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("koff_requests", "Requests answered", ["path", "status"], registry=registry)
        self.tokens = Counter("koff_tokens", "Tokens read and made", ["kind"], registry=registry)
        self.running = Gauge("koff_texts_running", "Texts under way", registry=registry)
        self.waiting = Gauge("koff_texts_waiting", "Texts that wait", registry=registry)
        self.memories = Gauge("koff_memories", "Memories that can be asked for", registry=registry)
        self.first = Histogram(
            "koff_first_token_seconds", "From request to first token", buckets=_SECONDS, registry=registry
        )
        self.whole = Histogram("koff_request_seconds", "From request to end", buckets=_SECONDS, registry=registry)

    def text(self) -> bytes:
        """As Prometheus reads it."""
        return generate_latest(self._registry)


class Front:
    """What the routes share.

    Args:
        engine: Computes.
        settings: How to serve.
    """

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self.engine, self.settings = engine, settings
        self.places, self.metrics = Places(settings.texts), Metrics()
        self._changing, self._faults = asyncio.Lock(), ""

    @cached_property
    def most_characters(self) -> int:
        """Of a text that may fit in the context: a longer one need not be tokenised, which takes a minute for 8 MB."""
        return self.engine.room(None) * max(map(len, self.engine.tokenizer.get_vocab()))

    def rights(self, request: Request) -> Rights:
        """The rights of the caller.

        Raises:
            Refused: 401 for an unknown one.
        """
        if self.settings.keys is None:
            return ANYBODY
        rights = self.settings.keys.rights(request.headers.get("authorization"))
        if rights is None:
            raise Refused("unknown API key", 401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        return rights

    def admin(self, request: Request) -> Rights:
        """The rights of a caller who may administer.

        Raises:
            Refused: The caller may not.
        """
        rights = self.rights(request)
        if not rights.admin:
            raise Refused("this takes a key with admin: true in the file given by --keys", 403)
        return rights

    def domain(self, model: str, rights: Rights) -> str | None:
        """The domain that the name of a model asks for; `AUTO` for the router's choice.

        Raises:
            Refused: 404 for what does not exist, or not for this caller.
        """
        name, colon, domain = model.partition(":")
        if name != self.settings.name:
            raise no_model(model)
        if not colon:
            return None
        if domain == AUTO and not self.called_auto(rights):
            return AUTO
        if domain not in self.engine.memories() or not rights.may_read(domain):
            raise no_model(model)
        return domain

    def called_auto(self, rights: Rights) -> bool:
        """Whether `auto` is the name of a memory for this caller, and so not the router."""
        return AUTO in self.engine.memories() and rights.may_read(AUTO)

    def count(self, path: str, status: int) -> None:
        """Note an answered request."""
        known = [known for known in _PATHS if path == known or (known != "/" and path.startswith(f"{known}/"))]
        self.metrics.requests.labels(known[0] if known else "other", status).inc()

    def models(self, rights: Rights) -> list[dict[str, Any]]:
        """What the caller may ask for."""
        domains = [domain for domain in self.engine.memories() if rights.may_read(domain)]
        names = ["", *(f":{domain}" for domain in domains)]
        if self.engine.routes and AUTO not in domains:
            names.append(f":{AUTO}")
        about = {"object": "model", "created": 0, "owned_by": "koff-lightning"}
        return [{"id": self.settings.name + name} | about for name in names]

    async def refresh(self) -> None:
        """Take up what has changed in the artifact. Says each change and each new fault in the log."""
        async with self._changing:
            try:
                for line in await self.engine.refresh():
                    _log.warning("%s", line)
                self._faults = ""
            except Exception as error:  # whatever it is, the next look comes
                if str(error) != self._faults:  # while an artifact is being replaced there is none for a moment
                    _log.warning("the memories were not looked at: %s", error)
                self._faults = str(error)
        self.metrics.memories.set(len(self.engine.memories()))

    async def watch(self) -> None:
        """Refresh now and then, for ever."""
        while True:
            await asyncio.sleep(self.settings.look)
            await self.refresh()

    async def change(self, request: Request, what: Callable[[Path], object]) -> Response:
        """Let an admin change the artifact, and take it up."""
        self.admin(request)
        if self.settings.folder is None:
            raise Refused("this server does not change its artifact", 403)
        try:
            await asyncio.to_thread(what, self.settings.folder)
        except (KoffError, OSError) as error:
            raise Refused(str(error)) from error
        await self.refresh()
        return JSONResponse({"object": "list", "data": self.models(ANYBODY)})
