"""What the parser lets pass: null where it means nothing, and a plain value where a group of options stands."""

import inspect
from dataclasses import is_dataclass
from types import NoneType
from typing import Any, get_args, get_type_hints

from jsonargparse import Namespace

from koff_lightning.support.errors import KoffError


def refuse_meaningless(kind: type, options: Any, name: str) -> None:
    """Check the options of a class, and of the dataclasses among them, against its signature.

    Args:
        kind: The class that they are for.
        options: As parsed.
        name: Dotted name of the section that they stand in.

    Raises:
        KoffError: An option is null whose type and default do not allow that, or no mapping where one is wanted.
    """
    if not isinstance(options, Namespace):
        given = "null" if options is None else repr(options)
        raise KoffError(f"{name} must be a mapping of its options; got {given}. Leave it out for the defaults")
    hints, parameters = get_type_hints(kind.__init__), inspect.signature(kind).parameters
    for key, value in vars(options).items():
        kinds = get_args(hints.get(key)) or (hints.get(key),)
        spec = next((part for part in kinds if is_dataclass(part)), None)
        if value is None and key in hints and parameters[key].default is not None and not {NoneType, Any} & {*kinds}:
            raise KoffError(f"{name}.{key} must not be null: leave it out for its default, {parameters[key].default!r}")
        if spec and value is not None:
            refuse_meaningless(spec, value, f"{name}.{key}")
