"""What clients may ask, in OpenAI's words. What is not known here is refused: a parameter without effect is a lie."""

import json
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from koff_lightning.serving.engine import Options
from koff_lightning.serving.errors import Refused
from koff_lightning.support.seeds import seed_of

MOST_CHOICES = 128  # texts of one request: prompts times n
MOST_LOGPROBS = 20
MOST_PARTS = 10_000  # of a list or an object: every part takes time to look at, and every faulty one much more
MOST_IDS = 2**20  # of a prompt
MOST_TOKENS = 2**31  # of an answer, and the largest token id: no model has as many
SAID = {  # of what may be given in several ways, in place of pydantic's words, which are of one of them
    "prompt": "it must be a text, a list of token ids, or a list of one of these, and not empty",
    "stop": "it must be a text or a list of at most 16, each of 1 to 1000 characters",
}
MESSAGE = {  # of its entries, what is taken
    "role": "it must be system, developer, user or assistant",
    "content": "it must be a text, or a list of parts of type text",
}

Stop = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
# `fail_fast`: a million faults would be described one by one.
Ids = Annotated[list[Annotated[int, Field(ge=0, le=MOST_TOKENS)]], Field(min_length=1, fail_fast=True)]
Body = TypeVar("Body", bound="_Request")


class _Strict(BaseModel):
    """No unknown entries, no guessing of types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """Options of a streamed answer."""

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against those who count bytes: never done here


class _Request(_Strict):
    """What both ways of asking share."""

    model: str = Field(max_length=200)
    n: int | None = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    seed: int | None = None
    temperature: float | None = Field(1.0, ge=0, le=2)
    top_p: float | None = Field(1.0, gt=0, le=1)
    ignore_eos: bool = False  # vLLM's word: to measure speed
    return_token_ids: bool = False  # vLLM's word: what the tokens were
    # Taken in these values only, which change nothing.
    presence_penalty: Literal[0, 0.0, None] = None
    frequency_penalty: Literal[0, 0.0, None] = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    # Notes of the client to itself.
    user: str | None = None
    metadata: dict[str, str] | None = None

    @model_validator(mode="after")
    def _is_streamed(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are of streamed answers: give stream true, or leave them out")
        return self

    @property
    def stops(self) -> list[str]:
        """The stop words."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def copies(self) -> int:
        """Answers to each prompt."""
        return self.n or 1

    def options(self, max_tokens: int, number: int) -> Options:
        """How the answer of that number is made, of all that the request asks for."""
        return Options(
            max_tokens,
            1.0 if self.temperature is None else self.temperature,
            self.top_p or 1.0,
            None if self.seed is None else seed_of(self.seed, number),
            self.told(),
            bool(getattr(self, "echo", False)),
            self.ignore_eos,
        )

    def told(self) -> int | None:
        """Likeliest tokens to tell beside each token; None for no log-probabilities."""
        raise NotImplementedError


class Completion(_Request):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | Annotated[list[Ids], Field(min_length=1, fail_fast=True)]
    )
    max_tokens: int | None = Field(16, ge=0, le=MOST_TOKENS)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool | None = False
    best_of: int | None = None
    suffix: Literal["", None] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One prompt or several, always as a list."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return self.prompt if several else [self.prompt]

    def told(self) -> int | None:
        """As many as were asked for."""
        return self.logprobs


class _Part(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    """One of a talk."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[_Part], Field(min_length=1, fail_fast=True)]
    # What clients send back of an answer, empty.
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class Chat(_Request):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MOST_TOKENS)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    # As above: taken where they change nothing.
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto", None] = None
    store: Literal[False, None] = None

    @model_validator(mode="after")
    def _one_limit(self) -> Self:
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: give one of them")
        return self

    def told(self) -> int | None:
        """As many as were asked for; with `logprobs` alone only the tokens' own."""
        return (self.top_logprobs or 0) if self.logprobs else None


class NewMemory(_Strict):
    """`POST /koff/memories`."""

    path: str = Field(min_length=1, max_length=4000)
    name: str | None = None


def read(kind: type[Body], body: bytes) -> Body:
    """A request's body.

    Raises:
        Refused: It is no JSON, or not what may be asked.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:  # not UTF-8 and no JSON are ValueErrors
        raise Refused(f"the body is not JSON: {str(error)[:100]}") from error
    if not isinstance(content, dict):
        raise Refused(f"the body must be a JSON object, not {type(content).__name__}")
    _check_sizes(content)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise _refusal(error) from error
    except (RecursionError, UnicodeError) as error:
        raise Refused("the body cannot be read: it is nested too deeply or holds half characters") from error


def _check_sizes(content: dict[str, Any]) -> None:
    """Refuse what is far too much before it is looked at part by part, while all other requests wait."""
    for name, value in {"body": content, **content}.items():
        most = MOST_PARTS
        if name == "prompt" and isinstance(value, list) and value:
            most = MOST_IDS if isinstance(value[0], int) else MOST_CHOICES
        if isinstance(value, list | dict) and len(value) > most:
            shown = ascii(name[:100])[1:-1]  # a name may be of half characters
            raise Refused(f"{shown}: {len(value)} parts; at most {most} are taken", param=shown)


def _refusal(error: ValidationError) -> Refused:
    """The first fault in one line. What came is not repeated: it may be secret or huge."""
    faults = error.errors(include_url=False, include_input=False, include_context=False)
    unknown = [fault for fault in faults if fault["type"] == "extra_forbidden"]
    first = (unknown or faults)[0]
    said = first["msg"].removeprefix("Value error, ")[:300]  # pydantic's word before ours
    name = str(first["loc"][0])[:100] if first["loc"] else "body"
    if name == "messages" and len(first["loc"]) > 2:  # [number, name in it, ...]
        place = f"messages[{first['loc'][1]}].{str(first['loc'][2])[:100]}"
        if unknown and len(first["loc"]) == 3:
            return Refused(f"unknown or unsupported: {place}", param=name)
        return Refused(f"{place}: {MESSAGE.get(first['loc'][2], said)}", param=name)
    if unknown:
        return Refused(f"unknown or unsupported parameter: {name}", param=name)
    return Refused(f"{name}: {SAID.get(name, said)}", param=name)
