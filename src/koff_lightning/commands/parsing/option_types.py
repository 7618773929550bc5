"""Types of options as the table has them in words, `int or null` or `'hc', 'ddp'`, and values of these types."""

import re
from contextlib import suppress

from koff_lightning.support.errors import KoffError
from koff_lightning.support.wording import nearest

SWITCHES = ("true", "false", "yes", "no", "on", "off")  # as YAML reads them
_NAMES = {type(None): "null", bool: "bool", int: "int", float: "float", str: "str"}
_NULLS = ("null", "Null", "NULL", "~")  # likewise
_POWER = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+")  # 1e-3: a number to the parser, not to PyYAML


class InDoubtError(ValueError):
    """A value of which only the parser can say what it is."""


def parts_of(kind: str) -> list[str]:
    """The types of which a value may have any."""
    return kind.replace(", ", " or ").split(" or ") if kind else []


def is_simple(kind: str) -> bool:
    """Whether no class or collection is among them."""
    return all(part in ("int", "float", "bool", "str", "null") or part[:1] == "'" for part in parts_of(kind))


def refuse_wrong_type(name: str, value: object, kind: str) -> None:
    """Refuse what is no number or switch where only these will do, and no word of a closed list."""
    parts = parts_of(kind)
    text = str(value)
    if not parts or not set(parts) <= {"int", "float", "bool", "null"} | {part for part in parts if part[0] == "'"}:
        return
    choices = [part.strip("'") for part in parts if part[0] == "'"]
    if text.lower() in ("null", "none", "~", "") or text.strip("'\"") in choices:
        return
    if "bool" in parts and text.lower() in SWITCHES:
        return
    with_number = {"int", "float"} & set(parts)
    if with_number and (isinstance(value, str) is False or _is_number(text)):
        return
    raise KoffError(f"{name} must be {kind}; got {text!r}.{nearest(text, choices)}")


def _is_number(text: str) -> bool:
    try:
        float(text.replace("_", ""))
    except ValueError:
        return text[:2].lower() in ("0x", "0o", "0b")
    return True


def typed(value: object, kind: str) -> object:
    """A value of a word or a config as the parser takes it.

    Raises:
        InDoubtError: It is of none of the types, or not plainly.
    """
    found, parts = as_read(value), parts_of(kind)
    if type(found) is int and "int" not in parts and "float" in parts:
        with suppress(OverflowError):
            found = float(found)
    if isinstance(found, list):
        inner = {f"list of {_NAMES.get(type(entry))}" for entry in found}
        plain = any(part.startswith("list of") and inner <= {part} for part in parts)
    elif isinstance(found, str):
        plain = found == value and ("str" in parts or repr(found) in parts)  # else it was in quotes
    else:
        plain = _NAMES.get(type(found)) in parts
    if not plain:
        raise InDoubtError
    return found


def as_read(value: object) -> object:
    """What a word stands for, which is YAML; anything else is a config's and stands for itself.

    Raises:
        InDoubtError: It is no YAML, or empty.
    """
    import yaml

    if not isinstance(value, str):
        return value
    try:
        found = yaml.safe_load(value)
        found = float(found.replace("_", "")) if isinstance(found, str) and _POWER.fullmatch(found) else found
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise InDoubtError from error
    if found is None and value not in _NULLS:
        raise InDoubtError
    return found
