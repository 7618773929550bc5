"""JSON files that may come from anyone: read with limits, and one line on whatever is wrong with them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from koff_lightning.support.errors import KoffError

LARGEST = 256 * 2**20  # bytes; the largest tokenizer.json in use has 35 MiB
DEEPEST = 64  # of values in one another; a tokenizer.json has 10


def read_json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        KoffError: It cannot be read, is too large or too deep, is no JSON, or holds something else than an object.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise KoffError(f"{path} has {path.stat().st_size} bytes; a JSON file of more than {LARGEST} is not read")
        content = path.read_bytes()
    except OSError as error:
        raise KoffError(f"cannot read {path}: {error.strerror or error}") from error
    return json_object(content, str(path))


def json_object(content: bytes, where: str) -> dict[str, Any]:
    """The object in the content of a JSON file.

    Args:
        content: What the file holds, in UTF-8.
        where: Its name, for the message.

    Raises:
        KoffError: It is too deep, is no JSON, or holds something else than an object.
    """
    try:
        found = json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise KoffError(f"{where} nests values thousands deep: it is damaged; get or write it again") from error
    except ValueError as error:  # not JSON, not text, or a number of thousands of digits
        raise KoffError(f"{where} is not valid JSON ({error}): it is damaged; get or write it again") from error
    if too_deep(found):
        raise KoffError(f"{where} nests values more than {DEEPEST} deep: it is damaged; get or write it again")
    if not isinstance(found, dict):
        raise KoffError(f"{where} must hold an object of names and values, and holds {kind(found)}: get it again")
    return found


def too_deep(content: object) -> bool:
    """Whether values lie more than DEEPEST deep in one another, which whoever walks over them may not survive."""
    level = [content]
    for _ in range(DEEPEST):
        inner = [part.values() if isinstance(part, dict) else part for part in level if isinstance(part, dict | list)]
        level = [value for values in inner for value in values]
    return any(isinstance(value, dict | list) for value in level)


def kind(value: object) -> str:
    """What a value is, in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def wrong_value(content: Mapping[str, Any], name: str, wanted: tuple[type, ...], low: float, high: float) -> str | None:
    """What is wrong with an entry that may be missing or null: its kind, or a number outside [low, high]."""
    value = content.get(name)
    if value is None:
        return None
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        return f"{name} is {kind(value)}"
    if isinstance(value, bool) or not isinstance(value, int | float) or low <= value <= high:  # NaN is not
        return None
    return f"{name} is {str(value)[:20]}, outside {low:.6g} to {high:.6g}"
