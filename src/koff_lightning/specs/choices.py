"""Options of which a value is one of a few words: the command line looks at these, Python does not."""

from typing import Any, Literal, get_args, get_origin, get_type_hints

from koff_lightning.support.errors import KoffError


def check_choices(spec: Any, section: str) -> None:
    """Refuse an option of a spec that is none of the words of its `Literal`.

    Args:
        spec: A dataclass of options.
        section: What stands before their names in a config.

    Raises:
        KoffError: There is one.
    """
    for name, kind in get_type_hints(type(spec)).items():
        if get_origin(kind) is Literal and (given := getattr(spec, name)) not in get_args(kind):
            raise KoffError(f"{section}.{name} must be {' or '.join(get_args(kind))}; got {given!r}")
