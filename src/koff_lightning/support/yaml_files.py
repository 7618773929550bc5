"""YAML that may come from anyone: read with limits, and one line on whatever is wrong with it."""

from pathlib import Path
from typing import Any

import yaml

from koff_lightning.support.errors import KoffError

LARGEST = 4 * 2**20  # characters; the longest config of ours has 3,000
DEEPEST = 64  # of values in one another
TOO_DEEP = f"its values lie more than {DEEPEST} deep in one another"
MOST = 100_000  # values, each as often as an alias names it


def read_yaml(path: Path) -> Any:
    """The content of a YAML file in UTF-8.

    Raises:
        KoffError: It cannot be read, is no YAML, or is too large, too deep, or names itself.
    """
    return load_yaml(_text(path), str(path))


def load_yaml(text: str, where: str) -> Any:
    """What a YAML text holds.

    Args:
        text: The YAML.
        where: Where it is from, for messages.

    Raises:
        KoffError: It is no YAML, or is too large, too deep, or names itself.
    """
    compose(text, where)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError, TypeError) as error:  # a date that is none, a key that is a list
        raise KoffError(f"{where} is not valid YAML: {' '.join(str(error).split())[:300]}") from error


def compose(text: str, where: str) -> yaml.Node | None:
    """The nodes of a YAML text, None of an empty one.

    Raises:
        KoffError: It is no YAML, or is too large, too deep, or names itself.
    """
    if len(text) > LARGEST:
        raise KoffError(f"{where} is {len(text)} characters long; a YAML of more than {LARGEST} is not read")
    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is not None:
            _count(root, {}, 0)
    except yaml.YAMLError as error:
        raise KoffError(f"{where} is not valid YAML: {' '.join(str(error).split())[:300]}") from error
    except _TooMuchError as error:
        raise KoffError(f"{where} is not read: {error}") from error
    return root


class _TooMuchError(ValueError):
    """More than whoever walks over it would survive."""


class _Loader(yaml.SafeLoader):
    """Stops where values lie too deep: what it would take to read on grows with the square of the depth."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One value, and all that it holds."""
        if self.depth > DEEPEST + 1:  # a text or a number may lie one deeper
            raise _TooMuchError(TOO_DEEP)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _count(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """How many values a node stands for, aliases each time."""
    if isinstance(node, yaml.ScalarNode):
        if len(node.value) > 4000 and node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
            raise _TooMuchError(f"it holds a number of {len(node.value)} digits")
        return 1
    if known.get(id(node)) == 0:
        raise _TooMuchError(f"line {node.start_mark.line + 1} holds an alias that names what it stands in")
    if depth > DEEPEST:
        raise _TooMuchError(TOO_DEEP)  # by aliases
    if id(node) not in known:
        known[id(node)] = 0  # on the way
        mapping = isinstance(node, yaml.MappingNode)
        inner = [part for pair in node.value for part in pair] if mapping else node.value
        known[id(node)] = 1 + sum(_count(part, known, depth + 1) for part in inner)
    if known[id(node)] > MOST:
        raise _TooMuchError(f"its aliases multiply to more than {MOST} values")
    return known[id(node)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:  # Windows PowerShell writes what `>` redirects in UTF-16
        raise KoffError(f"{path} is not UTF-8 text (byte {error.start}: {error.reason}): save it as UTF-8") from error
    except OSError as error:
        raise KoffError(f"cannot read {path}: {error.strerror or error}") from error


def refuse_duplicate_keys(path: Path) -> None:
    """Check a config file, as for two domains of one name: loaders keep the last one and lose the other without a word.

    Raises:
        KoffError: A mapping in the file has the same key twice (names file and line), or `read_yaml` would refuse it.
    """
    root = compose(_text(path), str(path))
    seen: set[int] = set()
    pending = [root] if root else []
    while pending:
        node = pending.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            _check_mapping(path, node)
            pending += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value


def _check_mapping(path: Path, node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        name = str(key.value)
        if name in lines:
            raise KoffError(f"{path}:{line}: '{name}' is given twice, first in line {lines[name]}: keep one")
        lines[name] = line
