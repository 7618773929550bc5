"""One request under way: its texts in the engine, and the pieces of all of them as they come."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from koff_lightning.serving.engine import Ending, Engine, Failed, Options, Piece, Token, Unknown
from koff_lightning.serving.errors import Refused, no_model
from koff_lightning.serving.text import Text


class Places:
    """How many texts may be under way or wait, in all.

    Args:
        total: So many.
    """

    def __init__(self, total: int) -> None:
        self.total, self.taken = total, 0

    def take(self, count: int) -> None:
        """Take places.

        Raises:
            Refused: There are not that many, now or ever.
        """
        if count > self.total:
            raise Refused(f"{count} texts in one request; this server takes {self.total} at a time: ask for fewer")
        if self.taken + count > self.total:
            raise Refused(
                "too many requests are waiting: ask again later",
                429,
                code="queue_full",
                headers={"Retry-After": "1"},
            )
        self.taken += count

    def free(self, count: int) -> None:
        """Give places back."""
        self.taken -= count


@dataclass(frozen=True)
class Told:
    """What came of one text: text, tokens, and why it ended if it did."""

    text: str
    tokens: tuple[Token, ...]
    finish: str | None
    prompt: tuple[Token, ...] | None = None


class Answer:
    """One text that is continued.

    Args:
        index: Among the choices of its request.
        ids: The prompt.
        domain: Whose memory it reads.
        options: How it is continued.
        tokenizer: The backbone's.
        stop: Words that end it.
    """

    def __init__(
        self,
        index: int,
        ids: list[int],
        domain: str | None,
        options: Options,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
    ) -> None:
        self.index, self.ids, self.domain, self.options = index, ids, domain, options
        self.text = Text(tokenizer, ids, stop)
        self.count = 0  # tokens so far
        self.done = False

    def take(self, piece: Piece) -> Told:
        """What there is to tell after a piece."""
        self.count += len(piece.tokens)
        text = self.text.add([token.id for token in piece.tokens], last=piece.finish is not None)
        finish = "stop" if self.text.stopped else piece.finish
        self.done = finish is not None
        return Told(text, piece.tokens, finish, piece.prompt)


class Job:
    """The texts of one request. Whoever makes one closes it.

    Args:
        engine: Computes.
        answers: What is wanted.
        seconds: Time limit of them all.
        caller: The name of who asks.
    """

    def __init__(self, engine: Engine, answers: Sequence[Answer], seconds: float, caller: str = "") -> None:
        self.engine, self.answers = engine, answers
        self._who = caller, object()
        self._come: asyncio.Queue[tuple[Answer, Piece] | Exception] = asyncio.Queue()
        late = Refused(f"the answer took longer than {seconds:g} s, the limit of this server", 504, code="timeout")
        self._timer = asyncio.get_running_loop().call_later(seconds, self._come.put_nowait, late)
        self._tasks = {answer: asyncio.create_task(self._run(answer)) for answer in answers}

    async def _run(self, answer: Answer) -> None:
        stream = self.engine.stream(answer.ids, answer.domain, answer.options, self._who)
        try:
            async for piece in stream:
                self._come.put_nowait((answer, piece))
        except Unknown:
            self._come.put_nowait(no_model(answer.domain or ""))
        except Failed as error:
            self._come.put_nowait(Refused(str(error), 503 if isinstance(error, Ending) else 500, code="engine_failed"))
        except Exception as error:  # whatever an engine raises: the client is told, the log has the rest
            self._come.put_nowait(error)
        finally:
            await stream.aclose()

    async def told(self) -> AsyncIterator[tuple[Answer, Told]]:
        """What comes of the texts, until all have ended.

        Raises:
            Refused: One of them could not be answered, or the time is up.
        """
        while not all(answer.done for answer in self.answers):
            came = await self._come.get()
            if isinstance(came, Exception):
                raise came
            answer, piece = came
            if answer.done:
                continue  # what came after a stop word
            told = answer.take(piece)
            if answer.done:
                self._tasks[answer].cancel()
            yield answer, told

    async def close(self) -> None:
        """Free what the texts hold."""
        self._timer.cancel()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
