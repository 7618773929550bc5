"""Passwords, keys and tokens do not get into what a run leaves: configs, results, artifacts, messages."""

import os
import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

REMOVED = "(removed)"
_OF_ANY_NAMES = ("domains", "retention", "where")  # options whose values have names of the user's own
_SET = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")  # in the environment

# What the name of a secret ends with, whatever stands before: wandb_api_key, x-api-key, apiKey. An option's name may go
# on after the first kind: access_key_id. The second are common words, too: a count of tokens is none, and in a text it
# takes more to tell.
_KEY = (
    r"(?:api|access|private|account|wandb|secret)[_-]?keys?|(?:passw(?:or)?d|pwd|passphrase|credential)s?|authorization"
)
_WORD = (
    r"secrets?|auth|(?<!eos_)(?<!bos_)(?<!pad_)(?<!unk_)(?<!mask_)(?<!sep_)(?<!cls_)(?<!stop_)token"
    r"|(?:(?<![\w-])|(?:api|access|auth|hf)[_-]?)tokens"
)
_PEM = r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.)*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)"
_START = r"(?:(?<![A-Za-z0-9])|(?<=[a-z0-9])(?=[A-Z]))"
_CORE = rf"{_START}(?i:{_KEY}|(?P<word>{_WORD}))"
_NAME = re.compile(rf"{_START}(?i:(?:{_KEY})(?:[_-]|$)|(?P<word>{_WORD})$)")
_BARE = r"(?!(?i:none|null|true|false)\b)[^\s,;&()\[\]{}'\"<>\\]+"
_NAMED = re.compile(
    rf"(?P<before>(?P<flag>(?<![\w.-])--[\w.-]*?)?{_CORE}(?P<sign>\\?[\"']?\s*[=:]\s*|(?(flag)\s+|(?!))))"
    rf"(?P<value>{_PEM}|(?P<quote>\\?[\"'])(?:(?!(?P=quote)).)+(?P=quote)|\[[^\]]+\]"
    rf"|(?:(?i:bearer|basic|token) +)?{_BARE})"
)
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|xox[a-z]-[\w-]{10,}"
    r"|(?<![\w/-])sk-(?=[\w-]*\d)(?=[\w-]*[A-Z])[\w-]{20,}"  # sk is Slovak too, in names of files and models
    r"|AKIA\w{12,})"
    r"|(?<=Bearer )[\w.~+/=-]{8,}"
    rf"|{_PEM}"
    r"|(?<=://)[^/@:\s]*:(?!\d{1,5}/)[^\s'\"]+(?=@)"  # a password may hold / and @; a port is none
    r"|(?<=://)[^/@\s]+(?=@)"
    r"|(?<=[?&])(?i:[\w-]*(?:sig|token|key)[\w-]*)=[^&\s]+"
)


def without_secrets(value: Any) -> Any:
    """A config or a text without what looks like a password, a key or a token, in names as in texts."""
    if isinstance(value, Namespace):
        return type(value)(**without_secrets(vars(value)))
    if isinstance(value, Mapping):
        return {key: _named(str(key), part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(part) for part in value]
    if not isinstance(value, str):
        return value
    for name in _SET:
        if len(secret := os.environ.get(name, "")) >= 8:
            value = value.replace(secret, REMOVED)
    return _SHAPES.sub(REMOVED, _NAMED.sub(_cut, value))


def _named(name: str, value: Any) -> Any:
    """The value of an option, unless its name says that it is a secret; a domain and a field may have any name."""
    if name in _OF_ANY_NAMES and isinstance(value, Mapping):
        return {name: without_secrets(part) for name, part in value.items()}
    secret = _NAME.search(name)
    if secret and isinstance(value, list | tuple):
        return [_named(name, part) for part in value]
    kinds = str if secret and secret["word"] else str | int | float  # a password may be all digits
    hidden = secret and value and isinstance(value, kinds) and not isinstance(value, bool)
    return REMOVED if hidden else without_secrets(value)


def _cut(found: re.Match[str]) -> str:
    """`NAME=VALUE` of a text without the value, unless the name is a common word and the value may be one, too."""
    keep = found["word"] and not _is_told(found["value"], found["sign"])
    return found[0] if keep else found["before"] + REMOVED


def _is_told(value: str, sign: str) -> bool:
    """Whether what follows a common word is a secret: no number, no path, and quoted, or set by `=`, or like a key."""
    if value.startswith("["):
        return any(_is_told(part, ":") for part in re.split(r"[\s,]+", value[1:-1]))
    plain = value.strip("\\\"'")
    like_a_key = len(plain) >= 8 and re.search(r"\d", plain)
    return bool(
        re.search(r"[A-Za-z]", plain)
        and not re.search(r"[\s/:]", plain)
        and (plain != value or sign == "=" or like_a_key)
    )
