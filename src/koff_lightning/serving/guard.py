"""What stands before the application: limits of a body, and pages of other sites in a browser on this machine."""

import asyncio
from collections.abc import Callable, Collection
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from koff_lightning.serving.errors import Refused

LARGEST_BODY = 8 * 2**20  # bytes; a full context of 128 texts of 8,192 ids each
READ = 60.0  # seconds in which a head must have come, and after it a body; 8 MiB at 1.2 Mbit/s
LOCAL = ("localhost", "127.0.0.1", "[::1]")


def refusal(error: Refused) -> JSONResponse:
    """The answer that a refusal is."""
    return JSONResponse(error.body(), error.status, error.headers)


class Guard:
    """ASGI middleware that limits the size of a body and the time it takes, and turns away pages of other sites.

    Args:
        app: The application behind it.
        count: Takes the path and the status of each request that was answered.
        hosts: Names that the server may be called by; None for any. Without keys it must be called by a local name: a
            page elsewhere could have its own name lead here (DNS rebinding).
    """

    seconds = READ

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None], hosts: Collection[str] | None = None) -> None:
        self.app, self.count, self.hosts = app, count, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on with the body counted and timed."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        begun = False

        async def noted(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                self.count(scope["path"], message["status"])
            await send(message)

        try:
            self._look(scope)
        except Refused as error:
            await refusal(error)(scope, receive, noted)
            return
        taken, due = 0, asyncio.get_running_loop().time() + self.seconds

        async def counted() -> Message:
            nonlocal taken, due
            try:
                async with asyncio.timeout_at(due):
                    message = await receive()
            except TimeoutError:
                raise _too_slow() from None
            taken += len(message.get("body", b""))
            if taken > LARGEST_BODY:
                raise _too_large()
            if not message.get("more_body", False):
                due = None  # what is waited for now is that the client goes away
            return message

        try:
            await self.app(scope, counted, noted)
        except Exception:
            if not begun:  # what answers it stands before this
                self.count(scope["path"], 500)
            raise

    def _look(self, scope: Scope) -> None:
        headers: Any = Headers(scope=scope)
        host = headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self.hosts is not None and name.lower() not in self.hosts:
            raise Refused(
                "call this server by localhost, or start it with --keys to have it called from elsewhere", 403
            )
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > LARGEST_BODY:
            raise _too_large()
        kind = headers.get("content-type", "").split(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise Refused("send JSON, with the header Content-Type: application/json", 415)


def _too_large() -> Refused:
    return Refused(
        f"the body is larger than {LARGEST_BODY} bytes: send fewer or shorter prompts",
        413,
        headers={"Connection": "close"},
    )


def _too_slow() -> Refused:
    return Refused(
        f"the body did not come within {READ:g} s: send it faster, or less", 408, headers={"Connection": "close"}
    )
