"""Who may read which memory: a file of keys.

    alice:
      key: a-long-random-text
      domains: [de, law]
    operator:
      key: another-one
      domains: all
      admin: true

The names are for people; they are no secrets. Keys are kept as hashes, compared in constant time, never logged.
"""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koff_lightning.support.errors import KoffError
from koff_lightning.support.yaml_files import read_yaml

SHORTEST = 16  # characters of a key
_ENTRIES = {"key", "domains", "admin"}


@dataclass(frozen=True)
class Rights:
    """What a caller may do.

    Args:
        name: Name of the caller.
        domains: Whose memories it may read; None for all. The bare backbone may be read by everybody.
        admin: Whether it may add and remove memories and read the metrics.
    """

    name: str
    domains: frozenset[str] | None = None
    admin: bool = False

    def may_read(self, domain: str | None) -> bool:
        """Whether the domain exists for this caller."""
        return domain is None or self.domains is None or domain in self.domains


ANYBODY = Rights("anybody")  # where no keys are asked for


class Keys:
    """The callers that are known.

    Args:
        rights: SHA-256 of a key -> what its holder may do.
    """

    def __init__(self, rights: Mapping[bytes, Rights]) -> None:
        self._rights = dict(rights)

    def rights(self, authorization: str | None) -> Rights | None:
        """What the sender of this `Authorization` header may do; None for an unknown one."""
        scheme, _, key = (authorization or "").partition(" ")
        given, found = _hashed(key.strip()), None
        for known, rights in self._rights.items():  # all of them: the time must not tell which
            if hmac.compare_digest(known, given):
                found = rights
        return found if scheme.lower() == "bearer" else None


def read_keys(path: str | Path) -> Keys:
    """Read a file of keys.

    Raises:
        KoffError: It is missing or not as described above. No message holds a key.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise KoffError(f"keys file {path}: no such file. It holds NAME: {{key: ..., domains: [...] or all}} in YAML")
    try:
        content = read_yaml(path)
    except KoffError:  # its message would show the line, and a key in it
        raise KoffError(f"keys file {path} cannot be read as YAML in UTF-8: check it with another tool") from None
    if not isinstance(content, dict) or not content:
        raise KoffError(f"keys file {path} names nobody: write NAME: {{key: ..., domains: [...] or all}} in YAML")
    found: dict[bytes, Rights] = {}
    for name, entry in content.items():
        key, rights = _entry(path, str(name), entry)
        if _hashed(key) in found:
            raise KoffError(f"keys file {path}: {name} has the key of {found[_hashed(key)].name}: give each its own")
        found[_hashed(key)] = rights
    return Keys(found)


def _entry(path: Path, name: str, entry: Any) -> tuple[str, Rights]:
    where = f"keys file {path}: {name}"
    if not isinstance(entry, dict) or not {"key", "domains"} <= entry.keys() <= _ENTRIES:
        raise KoffError(f"{where} must have the entries key and domains, and may have admin: true; nothing else")
    key, domains, admin = entry["key"], entry["domains"], entry.get("admin", False)
    if not isinstance(key, str) or len(key) < SHORTEST or not key.isascii() or any(c.isspace() for c in key):
        raise KoffError(
            f"{where} needs a key of at least {SHORTEST} ASCII characters without spaces (`openssl rand -hex 32`)"
        )
    if domains != "all" and not (isinstance(domains, list) and all(isinstance(domain, str) for domain in domains)):
        raise KoffError(f"{where}: domains must be a list of names, or all")
    if not isinstance(admin, bool):
        raise KoffError(f"{where}: admin must be true or false")
    return key, Rights(name, None if domains == "all" else frozenset(domains), admin)


def _hashed(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()
