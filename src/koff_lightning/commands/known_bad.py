"""Releases of what we stand on that must not be used, and why. Looked up by metadata alone: none is imported."""

from dataclasses import dataclass

from packaging.specifiers import SpecifierSet

_STEALS = "steals credentials when imported"


@dataclass(frozen=True)
class KnownBad:
    """Releases of a package with a fault that matters here.

    Args:
        name: Name of the package, as on the index.
        versions: Those that have the fault, as pip writes ranges.
        fault: What these versions do wrong.
        advisory: Address of the advisory.
    """

    name: str
    versions: str
    fault: str
    advisory: str

    def has(self, version: str) -> bool:
        """Whether a version is one of them."""
        return SpecifierSet(self.versions).contains(version, prereleases=True)

    @property
    def steals(self) -> bool:
        """Whether the harm is done by an import; the others have faults of which an upgrade is the end."""
        return self.fault == _STEALS

    def line(self, version: str) -> str:
        """What is to be said of an installed or pinned version."""
        return f"{self.name} {version} {self.fault} ({self.advisory})"


KNOWN_BAD = (
    KnownBad("lightning", ">=2.6.2,<=2.6.3", _STEALS, "GHSA-w37p-236h-pfx3"),
    KnownBad("pytorch-lightning", ">=2.6.2,<=2.6.3", _STEALS, "GHSA-w37p-236h-pfx3"),
    KnownBad("torch", "<2.6", "runs code from a file that torch.load reads with weights_only=True", "CVE-2025-32434"),
    KnownBad("transformers", "<4.48", "runs code from files of some models", "CVE-2024-11392, -11393, -11394"),
    KnownBad("pyarrow", "<14.0.1", "runs code from a parquet file", "CVE-2023-47248"),
    KnownBad("Jinja2", "<3.1.6", "lets a chat template out of its sandbox", "CVE-2025-27516"),
    KnownBad("nltk", "<3.9", "runs code from downloaded data", "CVE-2024-39705"),
    KnownBad("requests", "<2.32.4", "sends credentials of one host to another", "CVE-2024-47081"),
    KnownBad("h11", "<0.16", "reads one request where a proxy sees two", "CVE-2025-43859"),
    KnownBad("setuptools", "<78.1.1", "writes files outside the folder it was given", "CVE-2025-47273"),
)
