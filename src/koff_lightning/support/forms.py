"""Small schemas for the content of files: checks a value against a form and says in one clause what is wrong first.

A form is one of
    int, float, str ...      a type; floats are finite, and ints are counts
    (form, form, None)       any of several; None allows null
    [form]                   a list whose entries all have this form
    {"a": form, "b?": form}  a mapping with these names, of which `b` may be missing; further names are not checked
    {str: form}              a mapping whose values under any further name have this form
    SomeSpec                 a dataclass of options, whose type hints say what its fields may be
"""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Options = TypeVar("Options")


def fault_in(value: Any, form: Any, name: str) -> str | None:
    """What is wrong with a value, in a clause; None if it has the form.

    Args:
        value: From the file.
        form: See the head of this file.
        name: What to call the value.
    """
    if isinstance(form, tuple):
        if value is None and None in form:
            return None
        found = [fault_in(value, part, name) for part in form if part is not None]
        return None if None in found else found[0]
    if isinstance(form, list):
        if not isinstance(value, list | tuple):
            return other(name, "a list", value)
        return next(filter(None, (fault_in(part, form[0], f"an entry of {name}") for part in value)), None)
    if isinstance(form, dict):
        return _fault_of_names(value, form, name)
    if is_dataclass(form):
        return _fault_of_spec(value, form, name)
    return _fault_of_kind(value, form, name)


def _fault_of_kind(value: Any, kind: type, name: str) -> str | None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float:
        return None if number and math.isfinite(value) and abs(value) < 1e18 else other(name, "a finite number", value)
    if kind is int:
        sound = number and isinstance(value, int) and -1 <= value < 2**62
        return None if sound else other(name, "a count", value)
    return None if isinstance(value, Mapping if kind is dict else kind) else other(name, kind.__name__, value)


def _fault_of_names(value: Any, form: dict[Any, Any], name: str) -> str | None:
    if not isinstance(value, Mapping):
        return other(name, "a dictionary", value)
    if odd := [key for key in value if not isinstance(key, str)]:
        return f"{name} has the name {odd[0]!r:.60}, where text is due"
    own = {key.removesuffix("?"): (part, key.endswith("?")) for key, part in form.items() if isinstance(key, str)}
    if missing := [key for key, (_, optional) in own.items() if key not in value and not optional]:
        return f"{name} lacks {missing[0]}"
    for key, part in value.items():
        due = own[key][0] if key in own else form.get(str)
        if due is not None and (found := fault_in(part, due, key)):
            return found
    return None


def _fault_of_spec(value: Any, spec: type, name: str) -> str | None:
    """Options of a dataclass, by its type hints. Unknown names pass: `options_of` refuses them."""
    if not isinstance(value, Mapping):
        return other(name, "a dictionary", value)
    hints, known = get_type_hints(spec), {entry.name for entry in fields(spec)}
    for key, part in value.items():
        if not isinstance(key, str):
            return f"{name} has the name {key!r:.60}, where text is due"
        if key not in known:
            continue
        hint = hints[key]
        if get_origin(hint) is Literal:
            if not isinstance(part, str) or part not in get_args(hint):
                return other(f"{name}.{key}", " or ".join(get_args(hint)), part)
        elif found := fault_in(part, _form_of(hint), f"{name}.{key}"):
            return found
    return None


def options_of(spec: type[Options], given: Mapping[str, Any], name: str) -> Options:
    """A dataclass of options with the values that a file gives.

    Raises:
        TypeError: An option that it does not have, as Python would raise it, but worded for users.
    """
    if odd := sorted(given.keys() - {entry.name for entry in fields(spec)}):
        raise TypeError(f"{name} has no option {odd[0]!r:.60}")
    return spec(**given)


def _form_of(hint: Any) -> Any:
    """The form of a type hint."""
    if get_origin(hint) in (Union, UnionType):
        return tuple(None if part is type(None) else _form_of(part) for part in get_args(hint))
    return [_form_of(get_args(hint)[0])] if get_origin(hint) is list else hint


def other(name: str, wanted: str, value: object) -> str:
    """The clause on a value that is not `wanted`."""
    shown = f"{type(value).__name__} {value!r:.40}" if isinstance(value, str | int | float) else type(value).__name__
    return f"{name} must be {wanted}, and is {'nothing' if value is None else ' '.join(shown.split())}"
