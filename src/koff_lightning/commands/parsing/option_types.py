"""Types of options as the table has them in words, `int or null` or `'hc', 'ddp'`, and values of these types."""

import re
from contextlib import suppress

from koff_lightning.support.errors import KoffError
from koff_lightning.support.wording import in_brackets, nearest

_NAMES = {type(None): "null", bool: "bool", int: "int", float: "float", str: "str"}
_NULLS = ("null", "Null", "NULL", "~")  # as YAML reads them
# To the parser, not to PyYAML, 010 is ten, and 1e-3 is a number.
_DECIMAL = re.compile(r"-?\d+")
_REAL = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?")


class InDoubtError(ValueError):
    """A value of which only the parser can say what it is."""


def parts_of(kind: str) -> list[str]:
    """The types of which a value may have any."""
    return kind.replace(", ", " or ").split(" or ") if kind else []


def is_simple(kind: str) -> bool:
    """Whether no class or collection is among them."""
    return all(part in ("int", "float", "bool", "str", "null") or part[:1] == "'" for part in parts_of(kind))


def refuse_wrong_type(name: str, value: object, kind: str) -> None:
    """Refuse what is certainly of none of the types: numbers, switches and words of a closed list, or a list alone."""
    parts, text = parts_of(kind), str(value)
    choices = [part.strip("'") for part in parts if part[0] == "'"]
    is_list = kind.startswith("list of ") and len(parts) == 1
    is_closed = parts and is_simple(kind) and "str" not in parts
    if not (is_list or (is_closed and text and text.strip("'\"") not in choices)):
        return
    if "null" in parts and text.lower() in ("null", "none"):
        return
    with suppress(InDoubtError):
        if not is_list or not isinstance(as_read(value), list | None):
            typed(value, kind)
        return
    wanted = "list" if is_list else kind
    raise KoffError(f"{name} must be {wanted}; got {text!r}.{in_brackets(wanted, text) or nearest(text, choices)}")


def typed(value: object, kind: str) -> object:
    """A value of a word or a config as the parser takes it.

    Raises:
        InDoubtError: It is of none of the types, or not plainly.
    """
    found, parts = as_read(value), parts_of(kind)
    if type(found) is int and "int" not in parts and "float" in parts:
        with suppress(OverflowError):
            found = float(found)
    if "str" in parts and isinstance(value, str) and _NAMES.get(type(found), "null") not in {*parts, "null"} - {"str"}:
        found = value  # as it was typed, be it a number elsewhere, or in quotes
    if isinstance(found, list):
        inner = {f"list of {_NAMES.get(type(entry))}" for entry in found}
        plain = any(part.startswith("list of") and inner <= {part} for part in parts)
    else:
        plain = _NAMES.get(type(found)) in parts or (found == value and repr(found) in parts)
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
        found = int(value) if _DECIMAL.fullmatch(value.strip()) else yaml.safe_load(value)
        if isinstance(found, str) and _REAL.fullmatch(value.strip()):
            found = float(value.replace("_", ""))
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise InDoubtError from error
    if found is None and value not in _NULLS:
        raise InDoubtError
    return found


def as_meant(value: object) -> object:
    """The mapping or list that a word stands for; all else stands for itself."""
    if isinstance(value, str) and value[:1] in ("[", "{"):
        with suppress(InDoubtError):
            return as_read(value)
    return value
