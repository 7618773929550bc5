"""Passwords, keys and tokens do not get into what a run leaves: configs, results, artefacts, messages."""

import os
import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

REMOVED = "(removed)"
_NAME = re.compile(r"(^|_)(token|secret|password|passwd|api_?key|access_?key|credentials?|auth)($|_)", re.IGNORECASE)
_TEXT = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|AKIA\w{12,})|(?<=://)[^/@\s]+(?=@)|(?<=[?&])(?i:[\w-]*(sig|token|key)[\w-]*)=[^&\s]+"
)
_SET = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")  # in the environment


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
    return _TEXT.sub(REMOVED, value)


def _named(name: str, value: Any) -> Any:
    """The value of an option, unless its name says that it is a secret; a domain may have any name."""
    if name == "domains" and isinstance(value, Mapping):
        return {domain: without_secrets(source) for domain, source in value.items()}
    return REMOVED if value and isinstance(value, str) and _NAME.search(name) else without_secrets(value)
