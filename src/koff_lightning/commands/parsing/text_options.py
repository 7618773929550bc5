"""Text as several verbs take it: `--config CONFIG` for what a config names, `--data NAME=TEXT` for what one names."""

from collections.abc import Iterable
from typing import Any

from koff_lightning.support.errors import KoffError


def named_texts(given: Iterable[str], option: str = "--data") -> dict[str, list[str]]:
    """Texts by the name of their domain.

    Args:
        given: NAME=TEXT each; several of one name are one domain.
        option: Where they were given, for the message.

    Raises:
        KoffError: A name or a text is missing.
    """
    domains: dict[str, list[str]] = {}
    for words in given:
        name, _, text = words.partition("=")
        if not (name and text):
            raise KoffError(f"{option} takes NAME=TEXT, such as de=bundled:de; got {words!r}")
        domains.setdefault(name, []).append(text)
    return domains


def data_section(config: str) -> dict[str, Any]:
    """Section `data` of a config.

    Raises:
        KoffError: There is no such config, or it names no text.
    """
    from koff_lightning.commands.parsing.config_files import find_config
    from koff_lightning.support.yaml_files import read_yaml, refuse_duplicate_keys

    path = find_config(config)
    refuse_duplicate_keys(path)
    content = read_yaml(path)
    if not isinstance(content, dict) or not (content.get("data") or {}).get("domains"):
        raise KoffError(f"{path} names no text (data.domains): give a config that does, or --data NAME=TEXT")
    return dict(content["data"])
