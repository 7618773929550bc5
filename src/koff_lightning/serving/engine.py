"""What the front wants of an engine. It knows tokens and names of memories; text, HTTP and rights are the front's.

Everything that an engine needs beyond tokens to read a memory (places for slots, adapters, cache salts) is its own
affair and never shows: not in `room`, not in counts of tokens.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from koff_lightning.support.errors import KoffError


class Unknown(KoffError):
    """There is no memory of that name, or no longer."""


class Failed(KoffError):
    """The engine could not compute an answer; others may go on."""


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


class Engine(Protocol):
    """Computes for the front. All methods are called in one event loop.

    Attributes:
        tokenizer: The backbone's.
        vocabulary: Token ids that the model takes, often more than the tokenizer names.
        scores: Whether it can tell log-probabilities of a prompt (`Options.echo` with `logprobs`).
        routes: Whether it can choose a memory by the text.
        load: Texts under way and texts that wait, for the metrics.
    """

    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    scores: bool

    @property
    def routes(self) -> bool: ...  # noqa: D102

    @property
    def load(self) -> tuple[int, int]: ...  # noqa: D102

    def memories(self) -> dict[str, str]:
        """The memories that can be asked for -> a hash of their content."""
        ...

    def room(self, memory: str | None) -> int:
        """Tokens of prompt and answer together that it can take with this memory."""
        ...

    def route(self, texts: list[str]) -> list[str | None]:
        """The memory for each text, None for the bare backbone. May compute; called in a thread of its own.

        Raises:
            KoffError: The artifact has no router.
        """
        ...

    def stream(self, ids: list[int], memory: str | None, options: Options) -> AsyncIterator[Piece]:
        """Continue a prompt. Closing the iterator early frees its place.

        Raises:
            Unknown: No such memory.
            Failed: It could not be computed.
        """
        ...

    async def refresh(self) -> list[str]:
        """Take up the memories that the artifact has now, let go of those that it no longer has.

        Answers under way end with the memory that they began with. A memory that cannot be used is left out.

        Returns:
            A line for each change and each fault that is new.
        """
        ...

    async def close(self) -> None:
        """End the answers under way with `Failed` and free what is held."""
        ...
