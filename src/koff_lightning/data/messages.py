"""Records of chat and instruction data -> messages, checked, as JSON: one form for all kinds of file."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

TALK = ("messages", "prompt", "completion")  # fields that hold a talk: the first, or both others


def as_talk(record: Mapping[str, Any], names: Sequence[str]) -> str:
    """The messages of a record as JSON.

    A list of messages, each with role and content, lies in the first of `names` (or, as in csv, the JSON of such a
    list). Without it a prompt and a completion do: texts, which are a question of the user and the assistant's answer,
    or lists of messages.

    Raises:
        ValueError: There is no talk, in words that follow the number of a line.
    """
    if record.get(names[0]) is not None:
        messages = _messages(record[names[0]], names[0])
    elif len(names) > 1 and all(record.get(name) is not None for name in names[1:]):
        sides = zip(names[1:], ("user", "assistant"), strict=True)
        messages = [message for name, role in sides for message in _side(record[name], name, role)]
    else:
        wanted = " nor ".join(["'" + names[0] + "'", *(["'" + "' with '".join(names[1:]) + "'"] if names[1:] else [])])
        raise ValueError(
            f"a talk (chat) has no field {wanted}, only {', '.join(map(repr, list(record)[:12])) or 'none'}"
        )
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("a talk in which the assistant says nothing: there is no answer to learn")
    try:
        return json.dumps(messages, ensure_ascii=False, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"a message holds what JSON does not ({error})") from error


def questions(talk: str) -> str:
    """What the user says in a talk, the JSON of its messages, line by line; where no user speaks, all that is said."""
    messages = json.loads(talk)
    asked = [message["content"] for message in messages if message["role"] == "user"]
    return "\n".join(asked or [message["content"] for message in messages])


def last_questions_first(messages: Sequence[Mapping[str, Any]]) -> str:
    """What the user says in a talk under way, for a router, which reads the beginning: a short question goes first."""
    return "\n".join(message["content"] for message in reversed(messages) if message["role"] == "user")


def _side(value: Any, name: str, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": value}] if isinstance(value, str) else _messages(value, name)


def _messages(value: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(
                f"field '{name}' should be a list of messages or the JSON of one, got other text"
            ) from None
    if not isinstance(value, list) or not value:
        kind = "an empty list" if value == [] else type(value).__name__
        raise ValueError(f"field '{name}' should be a list of messages, got {kind}")
    return [_message(message, number, name) for number, message in enumerate(value, start=1)]


def _message(message: Any, number: int, name: str) -> dict[str, Any]:
    """One message without the fields that are null: tables fill them up."""
    where = f"message {number} in '{name}'"
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        got = f"has only {', '.join(map(str, message))}" if isinstance(message, Mapping) else f"is {message!r:.40}"
        raise ValueError(f"{where} should have role and content; it {got}")
    for key in ("role", "content"):
        if not isinstance(message[key], str):
            raise ValueError(f"{where}: {key} should be text, got {type(message[key]).__name__}")
    return {key: value for key, value in message.items() if value is not None}
