"""Say in one line what is wrong with an option; the parser's own words run to ninety lines."""

import difflib
import inspect
import re
import sys
from collections.abc import Iterable, Mapping

_BAD_VALUE = re.compile(r"Expected an? (.+?)\. Got value: (.*)")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_OF_CLASS = re.compile(r"Problem with given class_path '([\w.]+)':\s+Option '([\w.-]+)' is not accepted")
_UNKNOWN_INNER = re.compile(r"Option '([\w.-]+)' is not accepted")
_UNKNOWN = re.compile(r"(?:unrecognized arguments: (?:--)?|does not accept option ')([^\s'=]+)")
_ALONE = re.compile(r"unrecognized arguments: ([^\s-]\S*)")
_FOREIGN = re.compile(r"Importing '([\w.]+)' is not allowed")
_OURS = re.compile(r"^Errors:\n  - (?!Expected |Problem |Not )(.+)$", re.MULTILINE)  # of a class's own check
_UNUSABLE = re.compile(r"Problem with given class_path '([\w.]+)':\n\s*(?!\s|Parser key|Problem|Does not)(.+)")
_LINKED = re.compile(r"\((\S+)\) --> (\S+):")


def nearest(word: str, names: Iterable[str]) -> str:
    """The hint " Did you mean '...'?" with the name closest to `word`, or nothing when none is close.

    A dotted option whose last part is right but stands in the wrong place is found by that last part.
    """
    names = sorted(set(names) - {word})  # what was refused is no advice
    same_leaf = [name for name in names if "." in word and name.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    close = difflib.get_close_matches(word, same_leaf or names, n=1, cutoff=0 if same_leaf else 0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def one_line(message: str, names: Iterable[str]) -> str:
    """Condense a jsonargparse error.

    Args:
        message: What the parser said, often many lines.
        names: Valid option names, dotted, to suggest from.
    """
    if linked := _LINKED.search(message):
        return f"{linked[2]} is taken from {linked[1]}: give that instead"
    if alone := _ALONE.search(message):
        return f"{alone[1]!r} stands alone, wanted is an option with a name"
    if unknown := _UNKNOWN.search(message):
        return f"no option {unknown[1]!r}.{nearest(unknown[1], names)}"
    key = ".".join(re.findall(r'Parser key "([^"]+)":\s*$', message, re.MULTILINE))
    if foreign := _FOREIGN.search(message):
        return (
            f"{key or 'an option'} names {foreign[1]}: a config may name classes of koff_lightning, of Lightning and "
            "of torch, not other code. If you trust all that it names, add --allow-custom-classes"
        )
    if ours := _OURS.search(message):
        return ours[1]
    if of_class := _OF_CLASS.search(message):
        return f"{key}: {of_class[1]} has no option {of_class[2]!r}.{nearest(of_class[2], _parameters(of_class[1]))}"
    if inner := _UNKNOWN_INNER.search(message):
        return f"no option '{key}.{inner[1]}'.{nearest(f'{key}.{inner[1]}', names)}"
    if no_class := _NO_CLASS.search(message):
        kind = "loggers.WandbLogger" if key.endswith("logger") else "callbacks.ModelCheckpoint"
        hint = nearest(no_class[1].rpartition(".")[2], _classes())
        return f"{key}: no class {no_class[1]!r}.{hint} Name one in full, as class_path: lightning.pytorch.{kind}"
    if unusable := _UNUSABLE.findall(message):
        name, reason = unusable[-1]
        return f"{key + ': ' if key else ''}{name} cannot be used: {reason}"
    if bad := _BAD_VALUE.search(message):
        kinds = _readable([bad[1]])
        hint = in_brackets(kinds, bad[2]) or nearest(bad[2], _choices(bad[1]))
        return f"{key} must be {kinds}; got {bad[2]!r}.{hint}"
    wanted = re.findall(r"^\s*- Expected an? (.+)$", message, re.MULTILINE)
    given = re.search(r"Given value: (?:NestedArg\(key='\w+', val=)?(.+?)\)?$", message, re.MULTILINE)
    if key and wanted and given:
        value = given[1].strip("'")
        return f"{key} must be {_readable(wanted)}; got {value!r}.{nearest(value, _choices(' '.join(wanted)))}"
    return " ".join(re.split(r"Given value type:|Got value: ", message)[0].split())  # what was given may hold a key


def in_brackets(kinds: str, value: str) -> str:
    """The hint that a list stands in brackets, where one is due and plain words came; else nothing."""
    plain = re.fullmatch(r"[\w.-]+([, ]+[\w.-]+)*", value)
    return f" A list stands in brackets: '[{value}]'" if plain and kinds.startswith("list") else ""


def _classes() -> list[str]:
    """Names of the callbacks and loggers that there are; their modules are loaded before a config is read."""
    places = ("koff_lightning.callbacks", "lightning.pytorch.callbacks", "lightning.pytorch.loggers")
    loaded = [vars(sys.modules[place]) for place in places if place in sys.modules]
    return [name for names in loaded for name, thing in names.items() if isinstance(thing, type)]


def _parameters(path: str) -> list[str]:
    """What a class is made with, which the parser has loaded."""
    module, _, name = path.rpartition(".")
    return [*inspect.signature(getattr(sys.modules[module], name)).parameters]


def _choices(types: str) -> list[str]:
    return re.findall(r"'([^']+)'", " ".join(re.findall(r"Literal\[(.*?)\]", types)))


def _readable(types: list[str]) -> str:
    """Python's names of types as a person writes them."""
    parts: list[str] = []
    for name in types:
        name = re.sub(r"<class '(?:[\w.]*\.)?(\w+)'>", r"\1", name)
        name = re.sub(r"(?:typing\.)?Literal\[(.*)\]", r"\1", name)
        name = re.sub(r"[\w.]+\.(\w+)", r"\1", "null" if name == "NoneType" else name).replace("tuple", "list")
        parts += [name] * (name not in parts)
    return " or ".join(parts)


def difference(there: object, here: object, name: str = "") -> str:
    """Where two plain values differ, as `name is A there and B here`, by dotted names; empty where they do not."""
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        names = [key for key in [*there, *(k for k in here if k not in there)] if key in here or name]
        parts = [difference(there.get(key), here.get(key), f"{name}.{key}" if name else key) for key in names]
        return "; ".join(filter(None, parts))
    return "" if there == here else f"{name} is {_plain(there)} there and {_plain(here)} here"


def _plain(value: object) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value)
