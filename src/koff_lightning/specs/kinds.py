"""What kinds of values options take: the command line looks at these, Python does not."""

from dataclasses import fields
from functools import partial
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from koff_lightning.support.errors import KoffError
from koff_lightning.support.wording import nearest

Spec = TypeVar("Spec")
NUMBERS = {int: "a whole number", float: "a number"}


def check_values(spec: Any, section: str) -> None:
    """Refuse an option of a spec that is of another kind than its annotation says: a number, or one of a few words.

    Args:
        spec: A dataclass of options.
        section: What stands before their names in a config.

    Raises:
        KoffError: There is one.
    """
    for name, kind in get_type_hints(type(spec)).items():
        given, parts = getattr(spec, name), get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        if get_origin(kind) is Literal and given not in get_args(kind):
            raise KoffError(f"{section}.{name} must be {' or '.join(get_args(kind))}; got {given!r}")
        if set(parts) <= {int, float, NoneType} and not any(map(partial(_is, given), parts)):
            wanted = " or ".join("null" if part is NoneType else NUMBERS[part] for part in parts)
            raise KoffError(f"{section}.{name} must be {wanted}; got {given!r}")


def _is(given: Any, kind: type) -> bool:
    if kind is NoneType:
        return given is None
    return isinstance(given, Integral if kind is int else Real) and not isinstance(given, bool)


def spec_of(kind: type[Spec], given: Spec | dict[str, Any] | None) -> Spec | None:
    """A spec that is given as itself, or by its options in a dict, as a checkpoint holds it.

    Raises:
        KoffError: It is neither, or has no such option.
    """
    name = kind.__name__.removesuffix("Spec").lower()  # of its section in a config
    if isinstance(given, dict):
        known = [field.name for field in fields(kind)]
        if unknown := [option for option in given if option not in known]:
            raise KoffError(f"{name} has no option {unknown[0]!r}.{nearest(str(unknown[0]), known)}")
        return kind(**given)
    if given is not None and not isinstance(given, kind):
        raise KoffError(f"{name} must be a {kind.__name__}, a dict of its options, or None; got {given!r}")
    return given
