"""Talks: chat and instruction data -> tokens, as the tokenizer's own chat template writes them.

A talk is a list of messages, each with role and content. Between reader and tokenizer it is a text like any other, the
JSON of its messages. So it is split, counted and compared by what it says, not by how a template writes it.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from koff_lightning.data.encoding import LONGEST_PART, TokenStream, encode
from koff_lightning.data.readers import OnBad
from koff_lightning.data.rendering import Message, render, writing
from koff_lightning.data.sources import Chat
from koff_lightning.data.token_bytes import unread
from koff_lightning.support.errors import KoffError

TALKS_PER_CALL = 64
MARK = "koffMARKkoff"  # put in place of an answer, to find where the template writes it; no talk contains it
SHOWN = 60  # characters of a talk in a message

Span = tuple[int, int]  # first character, and the one behind the last


def check_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a tokenizer that cannot write talks.

    Raises:
        KoffError: It has no chat template, does not say where its tokens lie in a text, or leaves a part of it out.
    """
    if not tokenizer.chat_template:
        raise KoffError(
            f"domain '{name}' holds talks (chat), and the tokenizer has no chat template to write them with: take an "
            "instruction-tuned backbone, or set data.tokenizer to a folder with a chat_template.jinja"
        )
    if not tokenizer.is_fast:
        raise KoffError(
            f"domain '{name}' holds talks (chat), which takes a tokenizer that says where its tokens lie in a text: "
            "take a backbone with a tokenizer.json"
        )
    if unread(tokenizer).left_out:
        raise KoffError(
            f"domain '{name}' holds talks (chat), and the tokenizer leaves out what it cannot read, without a token in "
            "its place: take a backbone whose tokenizer has an unknown token or reads all bytes"
        )


def template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides how a talk becomes tokens, besides the tokenizer's fingerprint."""
    what = [tokenizer.chat_template, sorted(_special(tokenizer)), tokenizer.special_tokens_map]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:16]


def tokenize_talks(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, chat: Chat, on_bad: OnBad) -> TokenStream:
    """Tokenise talks; each begins and ends as its template writes it, with a start token or without.

    The tokens are those of the whole talk as the template writes it, with its special tokens, as a model meets them in
    a chat. A token belongs to an answer if its first character does (see `answers`). `num_bytes` counts predicted text;
    predicted special tokens cost nats but have no bytes.

    Args:
        texts: JSON of the messages of each talk, as `readers` gives it.
        tokenizer: Tokenizer of the backbone, with a chat template.
        chat: `answers` predicts the answers alone, `all` every token behind the first.
        on_bad: Called with what is wrong with a talk; it raises, or returns to leave the talk out.
    """
    found: list[tuple[NDArray[np.int32], NDArray[np.bool_], int, int]] = []
    special = np.array(sorted(_special(tokenizer)), dtype=np.int32)
    token = unread(tokenizer).token
    unread_as = -1 if token is None else token
    for group in _groups(_written(texts, tokenizer, chat, on_bad)):
        encoded = encode(
            tokenizer,
            [text for text, _ in group],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        for (text, spans), ids, offsets in zip(group, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            tokens, places = np.array(ids, dtype=np.int32), np.array(offsets, dtype=np.int64).reshape(-1, 2)
            predicted = np.ones(len(ids), bool) if chat == "all" else _inside(places[:, 0], spans)
            predicted[:1] = False  # there is nothing to predict it from
            unknown = tokens == unread_as
            counted = predicted & ~unknown & ~np.isin(tokens, special)
            if predicted.any():
                found.append(
                    (tokens, predicted, _bytes(text, places, counted), _bytes(text, places, predicted & unknown))
                )
    return TokenStream(
        tokens=np.concatenate([talk[0] for talk in found]) if found else np.zeros(0, np.int32),
        lengths=np.array([len(talk[0]) for talk in found], dtype=np.int64),
        num_bytes=np.array([talk[2] for talk in found], dtype=np.int64),
        unknown_bytes=np.array([talk[3] for talk in found], dtype=np.int64),
        predicted=np.concatenate([talk[1] for talk in found]) if found else np.zeros(0, bool),
    )


def _groups(talks: Iterator[tuple[str, list[Span]]]) -> Iterator[list[tuple[str, list[Span]]]]:
    """Yield groups of talks to tokenise in one call."""
    while group := list(islice(talks, TALKS_PER_CALL)):
        yield group


def _written(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, chat: Chat, on_bad: OnBad
) -> Iterator[tuple[str, list[Span]]]:
    """Yield each talk as the template writes it, and the spans of its answers if only these are predicted."""
    special = sorted(tokenizer.convert_ids_to_tokens(sorted(_special(tokenizer))))
    for text in texts:
        messages = json.loads(text)
        contents = [message["content"] for message in messages]
        try:
            if odd := next((sign for sign in special if any(sign in content for content in contents)), None):
                raise KoffError(f"what it says holds '{odd}', which the tokenizer takes for a sign of its own")
            with writing():
                written = render(tokenizer, messages)
                spans = answers(tokenizer, messages) if chat == "answers" else []
            if len(written) > LONGEST_PART:
                raise KoffError(f"it has {len(written):,} characters, a talk may have {LONGEST_PART:,}")
        except KoffError as error:
            on_bad(f"a talk that begins {_shown(messages)}: {error}")
            continue
        yield written, spans


def answers(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[Span]:
    """The spans of the assistant's messages in the written talk.

    A span begins behind the template's generation prompt and ends where the next message begins, so that the end of
    turn is part of it. Both ends are found by writing beginnings of the talk, up to the message and with it.

    Some templates write the last answer differently from earlier ones (Qwen3 leaves out the thoughts of those), so that
    a beginning of the talk is no prefix of the whole. Then the end is found by what the template writes behind `MARK`
    in place of the answer. If the assistant opens the talk, there is no generation prompt before it: then the span
    begins where `MARK` does.

    Raises:
        KoffError: The template does not write a beginning of the talk as it does in the whole.
    """
    whole, spans = render(tokenizer, messages), []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if number:
            asked = render(tokenizer, messages[:number], add_generation_prompt=True)
        else:  # most templates refuse to write a talk without messages
            asked, _ = _around(tokenizer, messages, 0)
        through = render(tokenizer, messages[: number + 1])
        if not whole.startswith(asked):
            raise KoffError("its chat template does not let an answer begin with the words that ask for one")
        if whole.startswith(through) and len(through) >= len(asked):
            spans.append((len(asked), len(through)))
            continue
        before, behind = _around(tokenizer, messages, number)
        _, last = _around(tokenizer, messages[: number + 1], number)
        if not (whole.startswith(before) and whole.endswith(behind) and len(asked) <= len(whole) - len(behind)):
            raise KoffError("its chat template does not show where an answer ends")
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(last, behind, strict=False))
        spans.append((len(asked), len(whole) - len(behind) + sum(1 for _ in alike)))
    return spans


def _around(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], number: int) -> tuple[str, str]:
    """What a template writes before and behind a message's content, with what it adds to that message itself."""
    marked = [message | {"content": MARK} if n == number else message for n, message in enumerate(messages)]
    before, mark, behind = render(tokenizer, marked).partition(MARK)
    if not mark or MARK in behind:
        raise KoffError("its chat template does not write an answer once and as it is")
    return before, behind


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of special tokens, which stand for no text."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _inside(places: NDArray[np.int64], spans: Sequence[Span]) -> NDArray[np.bool_]:
    inside = np.zeros(len(places), dtype=bool)
    for first, end in spans:
        inside |= (places >= first) & (places < end)
    return inside


def _bytes(text: str, places: NDArray[np.int64], counted: NDArray[np.bool_]) -> int:
    """UTF-8 bytes of the characters that counted tokens cover, and that no other token covers, not even in part."""
    taken = np.zeros(len(text), dtype=bool)
    for value in (True, False):
        for first, end in places[counted == value]:
            taken[first:end] = value
    if text.isascii():
        return int(taken.sum())
    return sum(len(sign.encode()) for sign, is_taken in zip(text, taken, strict=True) if is_taken)


def _shown(messages: Sequence[dict[str, Any]]) -> str:
    """The beginning of what is said first, for a message."""
    text = " ".join(str(messages[0]["content"]).split())
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
