"""The project's own runtime as an engine: one thread that continues all texts together, whatever memories they read."""

import asyncio
import contextlib
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from koff_lightning.artifact.decomposed import DecomposedModel, load_decomposed
from koff_lightning.artifact.folder import MEMORIES, Manifest
from koff_lightning.backbone import end_tokens
from koff_lightning.listed_files import CARD
from koff_lightning.serving.batch import Batch, Row
from koff_lightning.serving.engine import Ending, Engine, Failed, Held, Options, Piece, Who
from koff_lightning.serving.turns import turns
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import hash_file

T = TypeVar("T")
_log = logging.getLogger(__name__)


class OwnEngine(Engine):
    """An engine over `DecomposedModel`.

    Args:
        folder: The artifact.
        rows: Most texts that are continued together.
        device: Torch device.
        dtype: Dtype of the backbone; by default as exported.

    Raises:
        KoffError: The artifact cannot be loaded.
    """

    def __init__(self, folder: Path, rows: int = 32, device: str = "cpu", dtype: str | None = None) -> None:
        with torch.inference_mode():  # of such tensors no changes are counted, which would be looked at in every layer
            model = load_decomposed(folder, device, dtype)
        self._start(model, folder, rows, model)

    def _start(self, model: DecomposedModel, folder: Path, rows: int, keeper: Any) -> None:
        """Begin to work.

        Args:
            model: The model.
            folder: The artifact.
            rows: Most texts that are continued together.
            keeper: What memories are added to and removed from.
        """
        super().__init__(folder, model.manifest)
        self.model, self.tokenizer, self._keeper, self._rows = model, model.tokenizer, keeper, rows
        self.vocabulary = model.backbone.get_input_embeddings().num_embeddings
        self._held = {name: self._known(name, model.manifest.domains[name]["card_sha256"]) for name in model.domains}
        self._numbers = 0  # of memories that took the place of another
        self._context = int(getattr(model.backbone.config, "max_position_embeddings", 0) or 2**31)
        self._ends = ends_of(model)
        self._batch = self._empty()
        self._waiting: list[Row] = []
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake, self._closed = threading.Condition(), False
        self._thread = threading.Thread(target=self._work, name="koff-engine", daemon=True)
        self._thread.start()

    def _empty(self) -> Batch:
        """A batch of no rows."""
        return Batch(self.model, self._ends)

    def _known(self, name: str, sha256: str) -> Held:
        """What is noted of a memory in the model; its slots stand before the context and take nothing of it."""
        return Held(name, sha256)

    @property
    def load(self) -> tuple[int, int]:
        """Texts under way and texts that wait."""
        return sum(row.lives for row in self._batch.rows), len(self._waiting)

    @property
    def alive(self) -> bool:
        """Whether its thread is there."""
        return self._thread.is_alive()

    # -------------------------------------------------------------------------------------- in the event loop

    async def stream(
        self, ids: list[int], memory: str | None, options: Options, who: Who | None = None
    ) -> AsyncIterator[Piece]:
        """Put a text among the waiting, and give its pieces as they come."""
        async with self._reading(memory) as held:
            pieces: asyncio.Queue[Piece | Exception] = asyncio.Queue()
            put = partial(asyncio.get_running_loop().call_soon_threadsafe, pieces.put_nowait)
            row = Row(ids, held and held.name, options, put, who or ("", object()))
            try:
                with self._wake:
                    if self._closed:
                        raise Ending("the server is ending")
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
                with self._wake, contextlib.suppress(ValueError):
                    self._waiting.remove(row)  # else it would be held until there is room for it

    async def close(self) -> None:
        """End what is under way, and the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    async def _take_up(self, domain: str, sha256: str, manifest: Manifest) -> Held:
        """Load a memory under a name that is free in the model."""
        name = domain
        while name in self.model.memories.domains:
            self._numbers += 1
            name = f"{domain[:50]}-{self._numbers}"
        await asyncio.wrap_future(self._call(partial(self._load, self.folder / MEMORIES / domain, name, sha256)))
        return self._known(name, sha256)

    def _load(self, folder: Path, name: str, sha256: str) -> None:
        if hash_file(folder / CARD) != sha256:
            raise KoffError(f"{folder / CARD} is not the one in the artifact's manifest")
        self._keeper.add_memory(folder, name)

    async def _drop(self, held: Held) -> None:
        """Let the thread free a memory; nobody waits for that."""
        self._call(partial(self._keeper.remove_memory, held.name))

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
                newcomers = self._newcomers()
                rows = [*self._batch.rows, *newcomers]
                if newcomers:
                    self._batch.add(newcomers)
                self._batch.step()
            except Exception as error:  # of torch, a lack of memory among them: the answers fail, the server goes on
                _log.exception("a step of the engine failed")
                self._fail(rows, Failed(f"the engine failed ({type(error).__name__})"))
        self._fail([*self._batch.rows, *self._waiting], Ending("the server is ending"))

    def _newcomers(self) -> list[Row]:
        """Those whose turn it is. Those who step back for them wait before all others of their requests."""
        with self._wake:
            if not self._waiting:
                return []
            come, back = turns(self._batch, self._waiting, self._rows)
            if back:
                self._batch.put_back(back)
            self._waiting = [*back, *(row for row in self._waiting if row not in come)]
        return come

    def _fail(self, rows: list[Row], error: Failed) -> None:
        """Tell rows that they have failed, and begin anew with none."""
        for row in rows:
            row.fail(error)
        self._batch = self._empty()


def _do(what: Callable[[], T], future: "Future[T]") -> None:
    if not future.set_running_or_notify_cancel():
        return  # whoever asked has gone
    try:
        future.set_result(what())
    except Exception as error:
        future.set_exception(error)


def ends_of(model: DecomposedModel) -> frozenset[int]:
    """The tokens that end a text, as `generate` has them."""
    return frozenset(end_tokens(model.backbone.generation_config.eos_token_id))
