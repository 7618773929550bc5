"""What the front wants of an engine, and what all engines have in common: the memories that they hold.

An engine knows tokens and names of memories; text, HTTP and rights are the front's.

Everything that an engine needs beyond tokens to read a memory (places for slots, adapters, cache salts) is its own
affair and never shows: not in `room`, not in counts of tokens.
"""

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from koff_lightning.artifact.folder import Manifest, read_manifest
from koff_lightning.artifact.router_files import check_fit, read_router
from koff_lightning.router.routing import Router
from koff_lightning.support.errors import KoffError

Who = tuple[str, Hashable]  # whose a text is: the name of the caller, and the request; texts of one share their turns


class Unknown(KoffError):
    """There is no memory of that name, or no longer."""


class Failed(KoffError):
    """The engine could not compute an answer; others may go on."""


class Ending(Failed):
    """The engine takes no more texts, and ends those under way."""


@dataclass(frozen=True)
class Options:
    """How one text is continued.

    Args:
        max_tokens: Most tokens to add; 0 only scores the prompt.
        temperature: Temperature of sampling; 0 takes the most likely token each time.
        top_p: Sample from the likeliest tokens that together have this probability.
        seed: Seed of sampling; None for another one each time.
        logprobs: How many of the likeliest tokens are told beside each token; None for no log-probabilities.
        echo: Tell those of the prompt's tokens too.
        ignore_end: Go on after an end token.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    logprobs: int | None = None
    echo: bool = False
    ignore_end: bool = False


@dataclass(frozen=True)
class Token:
    """A token of a prompt or an answer.

    Args:
        id: In the vocabulary.
        logprob: Natural logarithm of its probability at temperature 1, given what stands before it; None where that was
            not asked for, and for the first token of a prompt.
        top: The likeliest tokens at its place with theirs, best first.
    """

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What has come of an answer since the last piece.

    Args:
        tokens: New ones; the end token is not among them.
        finish: `stop` at an end token, `length` at the limit, None while more will come.
        prompt: The prompt's tokens with their log-probabilities, in the first piece of an answer with `echo`.
    """

    tokens: tuple[Token, ...] = ()
    finish: str | None = None
    prompt: tuple[Token, ...] | None = None


@dataclass(eq=False)
class Held:
    """A memory that an engine has taken up.

    Args:
        name: Inside the engine, where an older memory of the domain may still be read.
        sha256: Hash of its card, which holds the hashes of the rest.
        slots: Places of the context that it takes.
    """

    name: str
    sha256: str
    slots: int = 0
    rows: int = 0  # texts that read it
    current: bool = True  # whether new texts get it


class Engine(ABC):
    """Computes for the front, and holds the memories of an artifact. All methods but `route` run in one event loop.

    Attributes:
        tokenizer: The backbone's.
        vocabulary: Token ids that the model takes, often more than the tokenizer names.
        scores: Whether it can tell log-probabilities of a prompt (`Options.echo` with `logprobs`).
    """

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    scores = True
    _context: int  # tokens of prompt, answer and a memory's places together

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self._manifest = folder, manifest
        self._held: dict[str, Held] = {}
        self._broken: dict[str, str] = {}  # domain -> hash of the card of a memory that could not be used
        self._read: tuple[Any, Router | KoffError] | None = (
            None  # what the manifest says of the router, and it or its fault
        )

    @property
    @abstractmethod
    def load(self) -> tuple[int, int]:
        """Texts under way and texts that wait, for the metrics."""

    @property
    @abstractmethod
    def alive(self) -> bool:
        """Whether it can still answer; one that cannot wants the process to be started again."""

    @abstractmethod
    def stream(
        self, ids: list[int], memory: str | None, options: Options, who: Who | None = None
    ) -> AsyncIterator[Piece]:
        """Continue a prompt. Closing the iterator early frees its place.

        Args:
            ids: The prompt.
            memory: Whose memory it reads.
            options: How it is continued.
            who: Whose it is, for a fair share of the places; by default a request of its own.

        Raises:
            Unknown: No such memory.
            Failed: It could not be computed.
        """

    @abstractmethod
    async def close(self) -> None:
        """End the answers under way with `Failed` and free what is held."""

    @abstractmethod
    async def _take_up(self, domain: str, sha256: str, manifest: Manifest) -> Held:
        """Load a memory of the artifact beside those that are held; raises whatever is wrong with it."""

    @abstractmethod
    async def _drop(self, held: Held) -> None:
        """Free a memory that nobody reads and nobody can ask for."""

    # ------------------------------------------------------------------------------------------ what is known

    def memories(self) -> dict[str, str]:
        """The domains whose memories can be asked for -> a hash of their content."""
        return {domain: held.sha256 for domain, held in self._held.items()}

    def room(self, memory: str | None) -> int:
        """Tokens of prompt and answer together that it can take with this memory."""
        held = self._held.get(memory) if memory is not None else None
        return self._context - (held.slots if held else 0)

    @property
    def routes(self) -> bool:
        """Whether it can choose a memory by the text: the artifact has a router that knows its memories."""
        try:
            self._router()
        except KoffError:
            return False
        return True

    def route(self, texts: list[str]) -> list[str | None]:
        """The memory for each text, None for the bare backbone. May compute; called in a thread of its own.

        Raises:
            KoffError: The artifact has no router that can be used.
        """
        return self._router().route(texts)

    def _router(self) -> Router:
        """The router of the artifact as it is now.

        Raises:
            KoffError: There is none, it is damaged, or it was fitted for other memories.
        """
        of = self._manifest.router
        if self._read is None or self._read[0] != of:
            try:
                self._read = of, read_router(self.folder, self._manifest)
            except KoffError as error:  # it would fail alike each time that somebody looks
                self._read = of, error
        if isinstance(router := self._read[1], KoffError):
            raise router
        check_fit(router.domains, list(self._held), self.folder)
        return router

    # ----------------------------------------------------------------------------------------------- memories

    @contextlib.asynccontextmanager
    async def _reading(self, memory: str | None) -> AsyncIterator[Held | None]:
        """The memory of a domain, which stays while the block runs.

        Raises:
            Unknown: No such memory.
        """
        if memory is None:
            yield None
            return
        held = self._held.get(memory)
        if held is None:
            raise Unknown(f"there is no memory {memory!r}")
        held.rows += 1
        try:
            yield held
        finally:
            held.rows -= 1
            if not held.rows and not held.current:
                await self._drop(held)

    async def refresh(self) -> list[str]:
        """Take up the memories that the artifact has now, let go of those that it no longer has.

        Answers under way end with the memory that they began with. A memory that cannot be used is left out.

        Returns:
            A line for each change and each fault that is new.
        """
        manifest = await asyncio.to_thread(read_manifest, self.folder)
        if manifest.mask_hash != self._manifest.mask_hash or manifest.base != self._manifest.base:
            raise KoffError(f"{self.folder} is another model now: start the server again to serve it")
        due = {name: about["card_sha256"] for name, about in manifest.domains.items()}
        said = [f"removed {name}" for name in [*self._held] if name not in due and await self._let_go(name)]
        self._broken = {name: sha256 for name, sha256 in self._broken.items() if due.get(name) == sha256}
        for name, sha256 in due.items():
            if sha256 in (self._broken.get(name), self._held[name].sha256 if name in self._held else None):
                continue
            try:
                held = await self._take_up(name, sha256, manifest)
                old, self._held[name] = self._held.get(name), held  # at no moment is there none
                said.append(f"{'replaced' if old else 'added'} {name}")
                await self._retire(old)
            except Exception as error:  # whatever is wrong with one, the others go on
                self._broken[name] = sha256
                said.append(f"left out {name}, which cannot be used: {error}")
        self._manifest = manifest
        await asyncio.to_thread(lambda: self.routes)  # to read it may take long: here, and not in a request
        return said

    async def _let_go(self, domain: str) -> bool:
        """Give a memory to no new text, and free it once no text reads it."""
        held = self._held.pop(domain, None)
        await self._retire(held)
        return held is not None

    async def _retire(self, held: Held | None) -> None:
        """Free a memory that no new text is given, once no text reads it."""
        if held is not None:
            held.current = False
            if not held.rows:
                await self._drop(held)
