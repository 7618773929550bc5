"""Every option of every verb, from a table that ships with the package, so that help needs no imports.

`options.json` is written by `make options` (recipes/options.py) from the parsers themselves, and a test compares the
two.
"""

import json
import shutil
import textwrap
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("options.json")
LIGHTNINGS = ("trainer", "checkpoint")  # sections whose options another release of Lightning may change
NAMED = ("plan", "claims", "reproduce")  # take a config by its name too

Row = dict[str, Any]


@cache
def table() -> dict[str, Any]:
    """`shared`: options of all training verbs; `verbs`: what each is for, and its own; `versions` it was made with."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def knows(verb: str) -> bool:
    """Whether the table has the verb: `lm-eval` has the parser of lm-eval itself."""
    return verb in table()["verbs"]


def options_of(verb: str) -> list[Row]:
    """A verb's options, its own first and Lightning's last: `name`, `type`, `default`, `meaning`."""
    about = table()["verbs"][verb]
    return [*about["options"], *(table()["shared"] if about["trains"] else [])]


class Options(dict[str, Row]):
    """A verb's options by their names. `trains`: of a training verb, whose options may come from configs too."""

    def __init__(self, verb: str) -> None:
        super().__init__({row["name"]: row for row in options_of(verb)})
        self.verb, self.trains = verb, table()["verbs"][verb]["trains"]
        self.placed = [name for name, row in self.items() if row.get("by_place")]
        self.named = [name for name in self if name not in self.placed]

    def find(self, name: str) -> Row | None:
        """The row of a name, in which dashes and underscores are alike; None where there is none."""
        return self.get(name) or self.get(name.replace("_", "-")) or self.get(name.replace("-", "_"))

    def has_below(self, name: str) -> bool:
        """Whether it is a section, of which the table has the options; the empty name is the root of a config."""
        return not name or any(other.startswith(f"{name}.") for other in self)

    def due(self) -> list[str]:
        """Options that must be given: they have neither a default nor null."""
        rows = self.values()
        return [row["name"] for row in rows if row["type"] and not row["default"] and "null" not in row["type"]]


def wants_help(words: Iterable[str]) -> bool:
    """Whether the words ask for the verb's help: `--help` before a lone `--`."""
    words = list(words)
    return any(word in ("-h", "--help") for word in words[: words.index("--") if "--" in words else None])


def help_text(verb: str) -> str:
    """What `koff VERB --help` prints."""
    about = table()["verbs"][verb]
    width = min(shutil.get_terminal_size().columns, 120)
    options = Options(verb)
    places = "".join(f" {name}" for name in options.placed)
    lines = [f"usage: koff {verb}{places}{' [CONFIG.yaml]' * about['trains']} [options]", ""]
    lines[0] += " [-- options of koff fit]" * (verb in NAMED)
    lines += [*textwrap.wrap(about["about"], width), ""]
    section = None
    for row in [options[name] for name in (*options.placed, *options.named)]:
        here = row["name"].split(".")[0] if "." in row["name"] else ""
        if here != section and section is not None:
            lines += ["", f"{here}:"]
        section = here
        lines += _told(row, width)
    if about["trains"] and not is_as_recorded("lightning"):
        lines += [
            "",
            f"The options of trainer and checkpoint are those of Lightning {table()['versions']['lightning']}.",
        ]
    return "\n".join(lines)


def _told(row: Row, width: int) -> list[str]:
    """The lines on one option."""
    value = "" if row["type"] in ("", "bool") and row["default"] in ("", "false") else f" ({row['type']})"
    name = row["name"] if row.get("by_place") else f"--{row['name']}"
    default = f" Default: {row['default']}." if row["default"] else ""
    first = textwrap.wrap(f"{name}{value}", width, initial_indent="  ", subsequent_indent=" " * 8)
    text = f"{row['meaning']}{default}".strip()
    return [*first, *textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6)]


def is_as_recorded(package: str) -> bool:
    """Whether a package is installed in the version that the table was made with."""
    from importlib.metadata import PackageNotFoundError, version  # takes longer than all else here

    try:
        return version(package) == table()["versions"][package]
    except PackageNotFoundError:
        return False
