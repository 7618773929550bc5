"""Versions of what the figures of a run depend on."""

import platform
from importlib.metadata import version

from koff_lightning import __version__


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    packages = {name: version(name) for name in ("torch", "lightning", "transformers", "peft")}
    return {"python": platform.python_version(), **packages, "koff_lightning": __version__}
