"""Domains that are trained later, for an artifact that has its mask and backbone already."""

from torch import Tensor, nn
from transformers import PreTrainedModel

from koff_lightning.artifact.folder import Manifest, verify
from koff_lightning.artifact.layouts import LAYOUTS
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.specs.training import LossSpec
from koff_lightning.support.errors import KoffError


def artifact_to_extend(folder: str, sparsity: SparsitySpec, loss: LossSpec) -> Manifest:
    """Check that an artifact can take memories that are trained under these options.

    Raises:
        KoffError: No sound artifact, one in whose layout a memory would not fit, or options that need the dense model.
    """
    manifest = verify(folder)
    if not manifest.form.takes_domains:
        wanted = " and ".join(repr(name) for name, layout in LAYOUTS.items() if layout.takes_domains)
        raise KoffError(
            f"artifact {folder} has layout {manifest.layout!r}; domains are added to {wanted} ones: "
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


def hold_closed(backbone: PreTrainedModel, manifest: Manifest | None) -> None:
    """Let the closed channels of an artifact say zero for good: y = z (W x + b + s B A x), as while it was learned.

    Args:
        backbone: With its adapters; what they add at these channels has no gradient from here on.
        manifest: Manifest of the artifact; None for a backbone that was not cut.
    """
    for path, closed in manifest.closed().items() if manifest else ():

        def multiply(_: nn.Module, __: object, output: Tensor, kept: Tensor = ~closed) -> Tensor:
            return output * kept.to(output.device, output.dtype)  # [B, T, out]

        backbone.get_submodule(path).register_forward_hook(multiply)
