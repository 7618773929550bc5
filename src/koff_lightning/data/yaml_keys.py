"""Refuse a YAML file that gives the same key twice: loaders keep the last one and lose the other without a word."""

from pathlib import Path

import yaml

from koff_lightning.support.errors import KoffError
from koff_lightning.support.yaml_files import compose_file


def refuse_duplicate_keys(path: Path) -> None:
    """Check a config file, for example for two domains of one name.

    Raises:
        KoffError: A mapping in the file has the same key twice (names file and line), or the file is not read at all
            (`support.yaml_files`).
    """
    root = compose_file(path)
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
