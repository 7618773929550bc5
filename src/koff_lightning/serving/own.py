"""The project's own runtime as an engine: one thread that continues all texts together, whatever memories they read."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from koff_lightning.artifact.decomposed import DecomposedModel, load_decomposed
from koff_lightning.artifact.folder import MEMORIES, Manifest, read_manifest
from koff_lightning.artifact.router_files import check_fit, read_router
from koff_lightning.router.routing import Router
from koff_lightning.serving.batch import Batch, Row
from koff_lightning.serving.engine import Failed, Options, Piece, Unknown
from koff_lightning.support.errors import KoffError

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Held:
    """A memory in the model.

    Args:
        name: Inside the model; the domain's, unless an older memory of that domain is still being read.
        sha256: Hash of its card, which holds the hashes of the rest.
    """

    name: str
    sha256: str
    rows: int = 0  # texts that read it
    current: bool = True  # whether new texts get it


class OwnEngine:
    """An engine (engine.py) over `DecomposedModel`.

    Args:
        folder: The artifact.
        rows: Most texts that are continued together.
        device: Torch device.
        dtype: Dtype of the backbone; by default as exported.

    Raises:
        KoffError: The artifact cannot be loaded.
    """

    scores = True

    def __init__(self, folder: Path, rows: int = 32, device: str = "cpu", dtype: str | None = None) -> None:
        with torch.inference_mode():  # of such tensors no changes are counted, which would be looked at in every layer
            model = load_decomposed(folder, device, dtype)
        self._start(model, folder, rows)

    def _start(self, model: DecomposedModel, folder: Path, rows: int) -> None:
        self.model, self.tokenizer = model, model.tokenizer
        self.vocabulary = model.backbone.get_input_embeddings().num_embeddings
        self.folder, self._rows = folder, rows
        manifest = self.model.manifest
        self._held = {name: _Held(name, manifest.domains[name]["card_sha256"]) for name in self.model.domains}
        self._broken: dict[str, str] = {}  # domain -> hash of the card of a memory that could not be used
        self._read: tuple[Any, Router] | None = None  # what the manifest said of the router, and the router
        self._numbers = 0  # of memories that took the place of another
        self._room = int(getattr(self.model.backbone.config, "max_position_embeddings", 0) or 2**31)
        self._batch = self._empty()
        self._waiting: deque[Row] = deque()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="koff-engine", daemon=True)
        self._thread.start()

    def _empty(self) -> Batch:
        """A batch of no rows."""
        return Batch(self.model, ends_of(self.model))

    @property
    def routes(self) -> bool:
        """Whether the artifact has a router that knows its memories."""
        try:
            self._router()
        except KoffError:
            return False
        return True

    @property
    def load(self) -> tuple[int, int]:
        """Texts under way and texts that wait."""
        return len(self._batch.rows), len(self._waiting)

    def memories(self) -> dict[str, str]:
        """Domain -> hash of its memory's card."""
        return {domain: held.sha256 for domain, held in self._held.items()}

    def room(self, memory: str | None) -> int:
        """The backbone's context; slots stand before it and take nothing of it."""
        return self._room

    def route(self, texts: list[str]) -> list[str | None]:
        """By the artifact's router."""
        return self._router().route(texts)

    def _router(self) -> Router:
        """The router of the artifact as it is now; the model's own knows the names inside the model alone.

        Raises:
            KoffError: There is none, it is damaged, or it was fitted for other memories.
        """
        manifest = self.model.manifest
        if self._read is None or self._read[0] != manifest.router:
            self._read = manifest.router, read_router(self.folder, manifest)
        router = self._read[1]
        check_fit(router.domains, list(self._held), self.folder)
        return router

    # -------------------------------------------------------------------------------------- in the event loop

    async def stream(self, ids: list[int], memory: str | None, options: Options) -> AsyncIterator[Piece]:
        """Put a text among the waiting, and give its pieces as they come."""
        held = self._held.get(memory) if memory is not None else None
        if memory is not None and held is None:
            raise Unknown(f"there is no memory {memory!r}")
        pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        put = partial(asyncio.get_running_loop().call_soon_threadsafe, pieces.put_nowait)
        row = Row(ids, held and held.name, options, put)
        if held is not None:
            held.rows += 1
        try:
            with self._wake:
                if self._closed:
                    raise Failed("the server is ending")
                self._waiting.append(row)
                self._wake.notify()
            while True:
                piece = await pieces.get()
                if isinstance(piece, Exception):
                    raise piece
                yield piece
                if piece.finish is not None:
                    return
        finally:
            row.gone = True
            if held is not None:
                held.rows -= 1
                if not held.rows and not held.current:
                    self._call(partial(self.model.remove_memory, held.name))

    async def refresh(self) -> list[str]:
        """Compare the artifact's manifest with what is held."""
        manifest = await asyncio.to_thread(read_manifest, self.folder)
        if manifest.mask_hash != self.model.manifest.mask_hash or manifest.base != self.model.manifest.base:
            raise KoffError(f"{self.folder} is another model now: start the server again to serve it")
        due = {name: about["card_sha256"] for name, about in manifest.domains.items()}
        said = [f"removed {name}" for name in [*self._held] if name not in due and self._let_go(name)]
        self._broken = {name: sha256 for name, sha256 in self._broken.items() if due.get(name) == sha256}
        for name, sha256 in due.items():
            if sha256 in (self._broken.get(name), self._held[name].sha256 if name in self._held else None):
                continue
            try:
                said.append(await self._take_up(name, sha256, manifest))
            except Exception as error:  # whatever is wrong with one, the others go on
                self._broken[name] = sha256
                said.append(f"left out {name}, which cannot be used: {error}")
        self.model.manifest = manifest
        return said

    async def close(self) -> None:
        """End what is under way, and the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    async def _take_up(self, domain: str, sha256: str, manifest: Manifest) -> str:
        """Load a memory under a name that is free in the model, then let new texts have it."""
        name = domain
        while name in self.model.memories.domains:
            self._numbers += 1
            name = f"{domain[:50]}-{self._numbers}"
        load = partial(self.model.add_memory, self.folder / MEMORIES / domain, name)
        await asyncio.wrap_future(self._call(load))
        replaced = self._let_go(domain)
        self._held[domain] = _Held(name, sha256)
        return f"{'replaced' if replaced else 'added'} {domain}"

    def _let_go(self, domain: str) -> bool:
        """Give a memory to no new text, and free it once no text reads it."""
        held = self._held.pop(domain, None)
        if held is None:
            return False
        held.current = False
        if not held.rows:
            self._call(partial(self.model.remove_memory, held.name))
        return True

    # ------------------------------------------------------------------------------------------ in the thread

    def _call(self, what: Callable[[], T]) -> "Future[T]":
        """Let the thread do something to the model between two steps."""
        future: Future[T] = Future()
        with self._wake:
            self._calls.append((what, future))
            self._wake.notify()
        return future

    @torch.inference_mode()
    def _work(self) -> None:
        """Until the engine is closed: what was asked for, who comes, a token for each row."""
        while not self._closed:
            with self._wake:
                self._wake.wait_for(lambda: self._closed or self._calls or self._waiting or self._batch.rows)
                calls = [self._calls.popleft() for _ in range(len(self._calls))]
            for what, future in calls:
                _do(what, future)
            rows = self._batch.rows
            try:
                rows = [*rows, *(newcomers := self._newcomers())]
                if newcomers:
                    self._batch.add(newcomers)
                self._batch.step()
            except Exception as error:  # of torch, a lack of memory among them: the answers fail, the server goes on
                _log.exception("a step of the engine failed")
                self._fail(rows, Failed(f"the engine failed ({type(error).__name__})"))
        self._fail([*self._batch.rows, *self._waiting], Failed("the server is ending"))

    def _newcomers(self) -> list[Row]:
        """Those who wait, as many as there is room for."""
        found: list[Row] = []
        busy = sum(not (row.done or row.gone) for row in self._batch.rows)
        while self._waiting and busy + len(found) < self._rows:
            row = self._waiting.popleft()
            if not row.gone:
                found.append(row)
        return found

    def _fail(self, rows: list[Row], error: Failed) -> None:
        """Tell rows that they have failed, and begin anew with none."""
        for row in rows:
            row.fail(error)
        self._batch = self._empty()


def _do(what: Callable[[], T], future: "Future[T]") -> None:
    try:
        future.set_result(what())
    except Exception as error:
        future.set_exception(error)


def ends_of(model: DecomposedModel) -> frozenset[int]:
    """The tokens that end a text, as `generate` has them."""
    given = model.backbone.generation_config.eos_token_id
    return frozenset([] if given is None else [given] if isinstance(given, int) else given)
