"""Answers in OpenAI's form: whole or in parts, of completions and of chats."""

import json
import time
import uuid
from codecs import getincrementaldecoder
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from koff_lightning.data.token_bytes import pieces_of
from koff_lightning.serving.engine import Token
from koff_lightning.serving.job import Answer, Told

PART = "bytes:"  # begins the name of a token that is a part of a character
_LOWEST = -9999.0  # in place of minus infinity, which JSON does not have


def as_json(content: Any) -> str:
    """What is sent, in one line."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class Form:
    """Writes the answers to one request.

    Args:
        model: Name that the answer carries.
        tokenizer: The backbone's.
        answers: The answers of the request.
        with_ids: Whether to say the tokens' ids too.
        copies: Answers to each prompt; the first of them counts the prompt.
        domains: Whether to say whose memory each choice read: it was chosen for the client.
    """

    kind: str  # of a whole answer
    part_kind: str
    prefix: str  # of its id

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        answers: Sequence[Answer],
        with_ids: bool,
        copies: int,
        domains: bool,
    ) -> None:
        self.model, self.tokenizer, self.answers = model, tokenizer, answers
        self.with_ids, self.copies, self.domains = with_ids, copies, domains
        self._pieces: dict[int, bytes] = {}
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def part(self, answer: Answer, told: Told, first: bool) -> dict[str, Any]:
        """What came of one answer."""
        return self._around(self.part_kind, [self._choice(answer, [told], first=first, part=True)])

    def whole(self, told: dict[Answer, list[Told]]) -> bytes:
        """All of it, as JSON. For a thread: log-probabilities of long prompts are megabytes, and take seconds."""
        # Choice by choice: nobody else can run while JSON is written.
        choices = [as_json(self._choice(answer, told[answer], first=True, part=False)) for answer in self.answers]
        around = self._around(self.kind, []) | {"usage": self.usage()}
        parts = {name: as_json(value) for name, value in around.items()} | {"choices": f"[{','.join(choices)}]"}
        return ("{" + ",".join(f'"{name}":{part}' for name, part in parts.items()) + "}").encode()

    def last(self) -> dict[str, Any]:
        """The part that tells the usage."""
        return self._around(self.part_kind, []) | {"usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens of prompts and answers."""
        prompts = sum(len(answer.ids) for answer in self.answers if answer.index % self.copies == 0)
        new = sum(answer.count for answer in self.answers)
        return {"prompt_tokens": prompts, "completion_tokens": new, "total_tokens": prompts + new}

    def _around(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        about = {"id": self._id, "object": kind, "created": self._created, "model": self.model}
        return about | {"choices": choices}

    def _choice(self, answer: Answer, told: Sequence[Told], first: bool, part: bool) -> dict[str, Any]:
        tokens = [token for one in told for token in one.tokens]
        prompt = next((one.prompt for one in told if one.prompt is not None), None)
        choice: dict[str, Any] = {"index": answer.index}
        choice |= self._content(answer, "".join(one.text for one in told), tokens, prompt, first=first, part=part)
        choice["finish_reason"] = next((one.finish for one in told if one.finish), None)
        if self.with_ids:
            choice["token_ids"] = [token.id for token in tokens]
        if self.with_ids and first:
            choice["prompt_token_ids"] = answer.ids
        if self.domains:
            choice["koff_domain"] = answer.domain
        return choice

    def _content(
        self,
        answer: Answer,
        text: str,
        tokens: list[Token],
        prompt: Sequence[Token] | None,
        *,
        first: bool,
        part: bool,
    ) -> dict[str, Any]:
        raise NotImplementedError

    def _piece(self, token: int) -> bytes:
        if token not in self._pieces:
            (self._pieces[token],) = pieces_of(self.tokenizer, [token])
        return self._pieces[token]

    def _word(self, token: int) -> str:
        """What a token stands for; a part of a character as OpenAI writes it, so that no two are written alike."""
        piece = self._piece(token)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return PART + "".join(f"\\x{byte:02x}" for byte in piece)


class CompletionForm(Form):
    """The answers of `/v1/completions`.

    Args:
        echoes: The text of the prompt before each answer, None where it is not wanted.
    """

    kind = part_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, *args: Any, echoes: dict[Answer, str] | None = None) -> None:
        super().__init__(*args)
        self._echoes = echoes
        self._offsets = dict.fromkeys(self.answers, 0)
        self._characters = {answer: getincrementaldecoder("utf-8")("replace") for answer in self.answers}
        self._unseen = frozenset(self.tokenizer.all_special_ids)  # no part of the text

    def _content(
        self,
        answer: Answer,
        text: str,
        tokens: list[Token],
        prompt: Sequence[Token] | None,
        *,
        first: bool,
        part: bool,
    ) -> dict[str, Any]:
        if self._echoes is not None and first:
            text = self._echoes[answer] + text
        if answer.options.logprobs is None:
            return {"text": text, "logprobs": None}
        told = [*(prompt or ()), *tokens] if self._echoes is not None else tokens
        words = [self._word(token.id) for token in told]
        offsets = [self._offset(answer, token.id, word) for token, word in zip(told, words, strict=True)]
        tops = [None if t.logprob is None else self._top(t, w) for t, w in zip(told, words, strict=True)]
        logprobs = [None if token.logprob is None else max(token.logprob, _LOWEST) for token in told]
        about = {"tokens": words, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}
        return {"text": text, "logprobs": about}

    def _offset(self, answer: Answer, token: int, word: str) -> int:
        """Where a token begins in the text; one that is a part of a character, where that character does."""
        place = self._offsets[answer]
        if token in self._unseen:
            return place
        self._offsets[answer] += len(self._characters[answer].decode(self._piece(token)))
        return place if word.startswith(PART) else self._offsets[answer] - len(word)

    def _top(self, token: Token, word: str) -> dict[str, float]:
        """The likeliest tokens and the one that stands there, which goes before another that reads alike."""
        found: dict[str, float] = {}
        for other, value in token.top:
            found.setdefault(self._word(other), max(value, _LOWEST))
        return found | {word: max(token.logprob, _LOWEST)}


class ChatForm(Form):
    """The answers of `/v1/chat/completions`."""

    kind, part_kind = "chat.completion", "chat.completion.chunk"
    prefix = "chatcmpl"

    def _content(
        self,
        answer: Answer,
        text: str,
        tokens: list[Token],
        prompt: Sequence[Token] | None,
        *,
        first: bool,
        part: bool,
    ) -> dict[str, Any]:
        said = ({"role": "assistant"} if first else {}) | {"content": text}
        logprobs = None
        if answer.options.logprobs is not None:
            logprobs = {"content": [self._described(token) for token in tokens], "refusal": None}
        return (
            {"delta": said, "logprobs": logprobs}
            if part
            else {"message": said | {"refusal": None}} | {"logprobs": logprobs}
        )

    def _described(self, token: Token) -> dict[str, Any]:
        top = [self._one(other, value) for other, value in token.top]
        return self._one(token.id, token.logprob or 0.0) | {"top_logprobs": top}

    def _one(self, token: int, value: float) -> dict[str, Any]:
        return {"token": self._word(token), "logprob": max(value, _LOWEST), "bytes": list(self._piece(token))}
