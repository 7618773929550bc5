"""From a request to its answer: whose memory, which tokens, what is told."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from koff_lightning.data.encoding import encode, encode_prompt
from koff_lightning.data.messages import last_questions_first
from koff_lightning.data.rendering import render, writing
from koff_lightning.serving.answers import ChatForm, CompletionForm, Form, as_json
from koff_lightning.serving.errors import Refused
from koff_lightning.serving.front import Front
from koff_lightning.serving.job import Answer, Job, Told
from koff_lightning.serving.keys import Rights
from koff_lightning.serving.requests import MOST_CHOICES, Chat, Completion
from koff_lightning.serving.text import decoded
from koff_lightning.support.errors import KoffError
from koff_lightning.support.names import AUTO

GRACE = 5.0  # seconds after the time limit in which a client must have read the end of a streamed answer
HEADER = "X-Koff-Domain"  # whose memory was chosen; `none` for the bare backbone
T = TypeVar("T")
_log = logging.getLogger(__name__)


class Gone(Exception):
    """Nobody waits for the answer."""


class Ask:
    """One request.

    Args:
        front: What all requests of the server share.
        rights: The rights of the caller.
        body: What is asked.
    """

    def __init__(self, front: Front, rights: Rights, body: Completion | Chat) -> None:
        self.front, self.rights, self.body = front, rights, body
        self.engine, self.tokenizer = front.engine, front.engine.tokenizer
        self.began = time.monotonic()
        self.routed, self._waits = False, True

    async def answer(self, request: Request) -> Response:
        """The response, whole or streamed.

        Raises:
            Refused: It cannot be answered.
        """
        domain = self.front.domain(self.body.model, self.rights)
        self._check()
        count = len(self._texts()) * self.body.copies
        if count > MOST_CHOICES:
            raise Refused(f"{count} texts in one request; at most {MOST_CHOICES} are taken", param="n")
        async with contextlib.AsyncExitStack() as held:
            self.front.places.take(count)
            held.callback(self.front.places.free, count)
            prompts = await asyncio.to_thread(self._encoded)
            domains = await self._domains(domain, prompts)
            answers = self._answers(prompts, domains)
            form, headers = self._form(answers), {HEADER: ",".join(name or "none" for name in domains)}
            job = Job(self.engine, answers, self.front.settings.seconds, self.rights.name)
            held.push_async_callback(job.close)
            held.callback(self._count, form)
            if not self.body.stream:
                told = await _unless_gone(request, self._collected(job))
                content = await asyncio.to_thread(form.whole, told)
                return Response(content, media_type="application/json", headers=headers)
            come = job.told()
            first = await _unless_gone(request, anext(come))  # what is refused now has a status of its own
            seconds = self.front.settings.seconds + GRACE
            return EventStream(self._events(form, come, first), held.pop_all(), headers, seconds)

    def _texts(self) -> list[Any]:
        """What is continued: prompts, or the one talk."""
        return self.body.prompts if isinstance(self.body, Completion) else [self.body.messages]

    def _check(self) -> None:
        """Refuse what this server or its engine does not do."""
        body = self.body
        if isinstance(body, Chat):
            if not self.tokenizer.chat_template:
                raise Refused("this model has no chat template, so it is no chat model: use /v1/completions")
            if body.top_logprobs is not None and not body.logprobs:
                raise Refused("top_logprobs needs logprobs: true", param="top_logprobs")
            return
        if body.best_of not in (None, body.copies):
            raise Refused("best_of is not supported, unless it is n", param="best_of")
        if body.echo and body.logprobs is not None and not self.engine.scores:
            raise Refused(
                "this engine tells no log-probabilities of a prompt: leave echo or logprobs out", param="echo"
            )
        if body.max_tokens == 0 and not body.echo:
            raise Refused("max_tokens must be at least 1, unless the prompt is echoed", param="max_tokens")

    def _encoded(self) -> list[list[int]]:
        """Token ids of the prompts; in a thread, as long texts take a while."""
        if isinstance(self.body, Chat):
            return [self._talk([message.plain() for message in self.body.messages])]
        vocabulary = self.engine.vocabulary
        prompts = []
        for text in self.body.prompts:
            ids = encode_prompt(self.tokenizer, self._short(_sound(text))) if isinstance(text, str) else text
            if not ids:
                raise Refused("an empty prompt cannot be continued: this model has no start token", param="prompt")
            if max(ids) >= vocabulary:
                raise Refused(f"a token id is {max(ids)}; this model has {vocabulary} tokens", param="prompt")
            prompts.append(ids)
        return prompts

    def _talk(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a chat, up to where the answer begins."""
        for message in messages:
            _sound(message["content"])
        try:
            with writing():
                written = render(self.tokenizer, messages, add_generation_prompt=True)
        except KoffError as error:  # a template is a program of whoever made the model
            raise Refused(f"the model's template cannot be used here: {str(error)[:200]}") from error
        ids = encode(self.tokenizer, self._short(written), add_special_tokens=False)["input_ids"]
        if not ids:
            raise Refused("the model's chat template makes no tokens of these messages", param="messages")
        return ids

    def _short(self, text: str) -> str:
        """Refuse a text that is far too long, before it is tokenised."""
        if len(text) > self.front.most_characters:
            room = self.engine.room(None)
            raise Refused(
                f"the prompt has {len(text)} characters, more than {room} tokens can hold: this model takes {room} in "
                "all",
                param="prompt" if isinstance(self.body, Completion) else "messages",
                code="context_length_exceeded",
            )
        return text

    async def _domains(self, domain: str | None, prompts: list[list[int]]) -> list[str | None]:
        """Whose memory each prompt is read with."""
        if domain != AUTO or self.front.called_auto(self.rights):
            return [domain] * len(prompts)
        if isinstance(self.body, Chat):
            texts = [last_questions_first([message.plain() for message in self.body.messages])]
        else:
            texts = [text if isinstance(text, str) else decoded(self.tokenizer, text) for text in self.body.prompts]
        try:
            chosen = await asyncio.to_thread(self.engine.route, texts)
        except KoffError as error:  # its words may name domains that the caller must not know of
            _log.warning("no memory was chosen: %s", error)
            raise Refused(
                "this model has no router that can be used: name a memory, as /v1/models lists them",
                404,
                "model",
                "model_not_found",
            ) from error
        self.routed, known = True, self.engine.memories()
        return [name if name in known and self.rights.may_read(name) else None for name in chosen]

    def _answers(self, prompts: list[list[int]], domains: list[str | None]) -> list[Answer]:
        """What the engine is to do: `n` times for each prompt."""
        answers = []
        for ids, domain in zip(prompts, domains, strict=True):
            most = self._most_tokens(len(ids), self.engine.room(domain))
            for _ in range(self.body.copies):
                options = self.body.options(most, len(answers))
                answers.append(Answer(len(answers), ids, domain, options, self.tokenizer, self.body.stops))
        return answers

    def _most_tokens(self, length: int, room: int) -> int:
        """Tokens that an answer may have."""
        asked, body = self.body.max_tokens, self.body
        if isinstance(body, Chat) and body.max_completion_tokens is not None:
            asked = body.max_completion_tokens
        limit = min(room - length, self.front.settings.max_tokens or room)
        least = 0 if asked == 0 else 1
        if room - length < least or (asked is not None and asked > limit):
            raise Refused(
                f"the prompt has {length} tokens and {asked if asked is not None else 'some'} more are asked for; this "
                f"model takes {room} in all" + (f", {limit} of an answer" if limit < room - length else ""),
                param="max_tokens" if room > length else "prompt",
                code="context_length_exceeded",
            )
        if asked is None:
            return min(limit, 16) if isinstance(body, Completion) else limit  # as OpenAI's does
        return asked

    def _form(self, answers: list[Answer]) -> Form:
        """How the answers are written down."""
        body, chosen = self.body, {answer.domain for answer in answers}
        name = body.model
        if self.routed and len(chosen) == 1:
            (only,) = chosen
            name = self.front.settings.name + (f":{only}" if only else "")
        about = name, self.tokenizer, answers, body.return_token_ids, body.copies, self.routed
        if isinstance(body, Chat):
            return ChatForm(*about)
        if not body.echo:
            return CompletionForm(*about)
        texts = [text if isinstance(text, str) else decoded(self.tokenizer, text) for text in body.prompts]
        return CompletionForm(*about, echoes={answer: texts[answer.index // body.copies] for answer in answers})

    # ----------------------------------------------------------------------------------------------- what comes

    async def _collected(self, job: Job) -> dict[Answer, list[Told]]:
        """All of it."""
        found: dict[Answer, list[Told]] = {answer: [] for answer in job.answers}
        async for answer, told in job.told():
            self._first()
            found[answer].append(told)
        return found

    async def _events(
        self, form: Form, come: AsyncIterator[tuple[Answer, Told]], first: tuple[Answer, Told]
    ) -> AsyncIterator[str]:
        """Server-sent events of a streamed answer."""
        self._first()
        asked = self.body.stream_options and self.body.stream_options.include_usage
        begun, usage = set[Answer](), {"usage": None} if asked else {}
        try:
            async for answer, told in _again(first, come):
                if told.text or told.tokens or told.finish or told.prompt:
                    part = answer, told, answer not in begun
                    # Log-probabilities of a prompt are many, and all that is done here keeps all others waiting.
                    written = await asyncio.to_thread(form.part, *part) if told.prompt else form.part(*part)
                    yield _event(written | usage)
                    begun.add(answer)
        except Refused as error:
            yield _event(error.body())
            return
        except Exception:
            _log.exception("a streamed answer failed")
            yield _event(Refused("the server failed; its log says how", 500).body())
            return
        if asked:
            yield _event(form.last())
        yield "data: [DONE]\n\n"

    def _first(self) -> None:
        """Note when the first token came."""
        if self._waits:
            self._waits = False
            self.front.metrics.first.observe(time.monotonic() - self.began)

    def _count(self, form: Form) -> None:
        """Note what the request took."""
        usage, metrics = form.usage(), self.front.metrics
        metrics.whole.observe(time.monotonic() - self.began)
        metrics.tokens.labels("prompt").inc(usage["prompt_tokens"])
        metrics.tokens.labels("completion").inc(usage["completion_tokens"])


class EventStream(StreamingResponse):
    """Server-sent events. What they hold is freed at the end, also where the client went before the first.

    Args:
        events: Ready to be sent.
        held: Closed at the end.
        headers: HTTP headers of the response.
        seconds: After which a client that does not read is left.
    """

    def __init__(
        self, events: AsyncIterator[str], held: contextlib.AsyncExitStack, headers: dict[str, str], seconds: float
    ) -> None:
        super().__init__(events, headers=headers | {"Cache-Control": "no-cache"}, media_type="text/event-stream")
        self._held, self._seconds = held, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send, then free."""
        async with self._held:
            with contextlib.suppress(TimeoutError):  # the server then closes what it could not send
                async with asyncio.timeout(self._seconds):
                    await super().__call__(scope, receive, send)


def _event(content: dict[str, Any]) -> str:
    return f"data: {as_json(content)}\n\n"


def _sound(text: str) -> str:
    """Refuse half characters, which JSON can write and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused("the text holds half a character (a lone surrogate)", param="prompt") from error
    return text


async def _again(first: T, rest: AsyncIterator[T]) -> AsyncIterator[T]:
    yield first
    async for one in rest:
        yield one


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, unless the client goes away before.

    Raises:
        Gone: The client went away first; the work is cancelled.
    """
    task, leaving = asyncio.ensure_future(work), asyncio.create_task(_left(request))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for one in (task, leaving):
            one.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
