"""Names that become folders, parameters and options: one rule."""

import re
from collections.abc import Iterable
from pathlib import Path

from koff_lightning.support.errors import KoffError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")  # org/name, org/name@revision
_SAFE = re.compile(r"[A-Za-z0-9_-]{1,64}")


def refuse_no_model(source: str) -> None:
    """Refuse the name of a backbone that can only be a path, and of one where nothing is.

    Raises:
        KoffError: There is no such folder or file.
    """
    is_path = source.count("/") > 1 or source.startswith((".", "/", "~")) or source.endswith(".gguf")
    path = Path(source).expanduser()
    if is_path and not (path.is_file() if source.endswith(".gguf") else path.exists()):
        if source.endswith(".gguf"):
            raise KoffError(
                f"backbone {source!r}: no such file. `koff fetch smollm2` gets one; a hub id or a folder also works"
            )
        raise KoffError(
            f"backbone {source!r}: no such folder. Give a folder, a .gguf file, a hub id (owner/name) or 'koff-tiny'"
        )


def check_name(name: object, what: str = "domain") -> None:
    """Refuse a name that is not safe as the name of a folder.

    Args:
        name: To look at.
        what: What it names, for the message.

    Raises:
        KoffError: It is no text of 1 to 64 letters, digits, `_` and `-`.
    """
    if not isinstance(name, str) or not _SAFE.fullmatch(name):
        raise KoffError(
            f"{what} name {name!r} is not safe as a file name: use 1 to 64 of the letters a-z A-Z, digits, '_' and '-'"
        )


def check_names(names: Iterable[str], what: str = "domain") -> None:
    """The same of several, of which no two may be alike."""
    names = list(names)
    for name in names:
        check_name(name, what)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise KoffError(f"{what} {twice[0]!r} is given more than once")
