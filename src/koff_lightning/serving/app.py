"""The HTTP front: OpenAI's protocol over an engine, routes and what holds them together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from koff_lightning.serving.ask import Ask, Gone
from koff_lightning.serving.engine import Engine
from koff_lightning.serving.errors import Refused, no_model
from koff_lightning.serving.front import Front, Settings
from koff_lightning.serving.guard import LOCAL, Guard, refusal
from koff_lightning.serving.requests import Chat, Completion, NewMemory, read

_PAGE = Path(__file__).with_name("page.html")


def create_app(engine: Engine, settings: Settings, close: bool = True) -> FastAPI:
    """The application.

    Args:
        engine: Computes.
        settings: How to serve.
        close: Whether the engine ends with it.
    """

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        await front.refresh()
        watcher = asyncio.create_task(front.watch())
        try:
            yield
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
            if close:
                await engine.close()

    front = Front(engine, settings)
    app = FastAPI(lifespan=life, openapi_url=None, docs_url=None, redoc_url=None)
    _routes(app, front)
    _koff_routes(app, front)
    app.add_middleware(Guard, count=front.count, hosts=LOCAL if settings.keys is None else None)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(Gone, _gone)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(Exception, _failed)
    return app


def _routes(app: FastAPI, front: Front) -> None:
    """The routes of OpenAI's protocol."""

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": front.models(front.rights(request))})

    @app.get("/v1/models/{name:path}")
    async def model(name: str, request: Request) -> Response:
        known = {entry["id"]: entry for entry in front.models(front.rights(request))}
        if name not in known:
            raise no_model(name)
        return JSONResponse(known[name])

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        rights = front.rights(request)
        body = read(Completion, await request.body())
        return await Ask(front, rights, body).answer(request)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        rights = front.rights(request)
        body = read(Chat, await request.body())
        return await Ask(front, rights, body).answer(request)


def _koff_routes(app: FastAPI, front: Front) -> None:
    """The routes of this project's own."""

    @app.post("/koff/memories")
    async def add(request: Request) -> Response:
        from koff_lightning.artifact.memories import add_memory

        front.admin(request)
        body = read(NewMemory, await request.body())
        return await front.change(request, lambda folder: add_memory(folder, body.path, body.name))

    @app.delete("/koff/memories/{domain}")
    async def remove(domain: str, request: Request) -> Response:
        from koff_lightning.artifact.memories import remove_memory

        return await front.change(request, lambda folder: remove_memory(folder, domain))

    @app.api_route("/health", methods=["GET", "HEAD"])  # proxies and monitors ask by either
    async def health() -> Response:
        if not front.engine.alive:
            raise Refused("the engine has ended: start the server again", 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        if front.settings.keys is not None:
            front.admin(request)
        running, waiting = front.engine.load
        front.metrics.running.set(running)
        front.metrics.waiting.set(waiting)
        return Response(front.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    async def page() -> Response:
        policy = (
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
        )
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers=headers)


async def _refused(request: Request, error: Refused) -> Response:
    return refusal(error)


async def _gone(request: Request, error: Gone | ClientDisconnect) -> Response:
    return Response(status_code=499)  # nginx' number; nobody reads it


async def _not_found(request: Request, error: HTTPException) -> Response:
    said = f"{request.method} {request.url.path[:100]}: {error.detail}"
    return refusal(Refused(said, error.status_code, headers=dict(error.headers or {})))


async def _failed(request: Request, error: Exception) -> Response:
    return refusal(Refused("the server failed; its log says how", 500))
