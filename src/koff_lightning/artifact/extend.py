"""Add domains to an artifact: its mask and backbone stay as they are, only the new memories train."""

from collections.abc import Iterable
from pathlib import Path

from koff_lightning.artifact.folder import BACKBONE, Manifest, verify
from koff_lightning.artifact.memories import check_free_name
from koff_lightning.losses import LossSpec
from koff_lightning.sparsity import SparsitySpec
from koff_lightning.support.errors import KoffError


def artifact_to_extend(folder: str, sparsity: SparsitySpec, loss: LossSpec) -> Manifest:
    """Check that an artifact can take memories that are trained under these options.

    Raises:
        KoffError: No sound artifact, one in whose layout a memory would not fit, or options that need the dense model.
    """
    manifest = verify(folder)
    if manifest.layout not in ("ragged", "uniform"):  # full shapes would let adapters speak through removed units
        raise KoffError(
            f"artifact {folder} has layout {manifest.layout!r}; domains are added to 'ragged' and 'uniform' ones: "
            "export the run again with --layout ragged"
        )
    if sparsity.target:
        raise KoffError(
            f"the mask of an artifact is fixed: set model.sparsity.target to 0, as add_domain.yaml does; got "
            f"{sparsity.target}"
        )
    if loss.kl:
        raise KoffError(
            "an artifact holds no dense model to learn from: set model.loss.kl to 0, as add_domain.yaml does; got "
            f"{loss.kl}"
        )
    return manifest


def check_new(manifest: Manifest, folder: str, domains: Iterable[str]) -> None:
    """Raise KoffError if an artifact has a memory for one of these domains already."""
    for domain in domains:
        check_free_name(manifest, Path(folder), domain)


def backbone_of(folder: str) -> str:
    """Where the backbone of an artifact is."""
    return str(Path(folder).expanduser() / BACKBONE)
