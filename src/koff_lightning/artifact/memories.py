"""The memories of an artifact on disk: put one in, take one out, train one more for its mask and backbone.

The folder is replaced as a whole, so no crash leaves half. The backbone and the other memories are not written: the new
folder links to their files.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from koff_lightning.artifact.folder import BACKBONE, MANIFEST, MEMORIES, Manifest, read_manifest, verify
from koff_lightning.artifact.layouts import LAYOUTS
from koff_lightning.artifact.memory_files import (
    CARD,
    card_of,
    listed,
    load_memory,
    lora_state,
    read_card,
    unlisted,
    write_memory,
)
from koff_lightning.losses import LossSpec
from koff_lightning.memory import MemoryBank
from koff_lightning.model_files import check_links
from koff_lightning.sparsity import SparsitySpec
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import hash_file, new_folder
from koff_lightning.support.names import check_name


def add_memory(folder: str | Path, source: str | Path, name: str | None = None) -> str:
    """Copy a memory into an artifact, after every check that loading it makes.

    Args:
        folder: The artifact.
        source: Folder of a memory that was made for the artifact's backbone.
        name: Domain to keep it as; by default its own.

    Returns:
        The domain.

    Raises:
        KoffError: The artifact is not sound, is a merged one or is being written by another process, the memory is
            damaged, belongs to another base, mask or tokenizer, or does not fit the backbone, or the name is unsafe or
            taken. Nothing is changed then.
    """
    source = Path(source).expanduser()
    domain = read_card(source).domain if name is None else name
    _add(Path(folder).expanduser().resolve(), {domain: source})
    return domain


def add_from_bank(folder: str | Path, bank: MemoryBank, domains: Sequence[str]) -> None:
    """Write memories of a bank that hangs on the artifact's backbone, and add all of them to the artifact or none.

    Raises:
        KoffError: As `add_memory`.
    """
    folder = Path(folder).expanduser().resolve()
    manifest = read_manifest(folder)
    about = {"base": manifest.base, "mask_hash": manifest.mask_hash, "tokenizer_hash": manifest.tokenizer_hash}
    with tempfile.TemporaryDirectory() as work:
        sources = {domain: Path(work) / domain for domain in domains}
        for domain, source in sources.items():
            card, slots = card_of(bank, domain, **about, shapes=manifest.form.shapes), bank.slots(domain)
            write_memory(source, card, lora_state(bank, domain), None if slots is None else slots.tensors())
        _add(folder, sources)


def _add(folder: Path, sources: Mapping[str, Path]) -> None:
    """Copy memories, domain -> folder, into an artifact in one step."""
    read_manifest(folder)
    with revised(folder) as work:
        manifest = verify(work, backbone=False)
        for domain, source in sources.items():
            check_free_name(manifest, folder, domain)
            load_memory(MemoryBank(_skeleton(work, manifest)), source, domain, expect=manifest)
            card = replace(read_card(source), domain=domain)
            home = work / MEMORIES / domain
            home.mkdir(parents=True)
            for file in card.files:
                shutil.copyfile(source / file, home / file)
            write_text(home / CARD, json.dumps(asdict(card), indent=2) + "\n")
            manifest = listed(manifest, card, hash_file(home / CARD))
        write_text(work / MANIFEST, manifest.to_json())


def remove_memory(folder: str | Path, domain: str) -> None:
    """Delete a memory of an artifact.

    Raises:
        KoffError: The artifact has no such memory, or is a merged one.
    """
    folder = Path(folder).expanduser().resolve()
    read_manifest(folder)
    with revised(folder) as work:
        manifest = read_manifest(work)
        if domain not in manifest.domains:
            raise KoffError(f"{folder} has no memory for {domain!r}; it has {', '.join(manifest.domains) or 'none'}")
        if manifest.form.folds:
            raise KoffError(f"{folder} is {domain!r} merged into its backbone: there is no model without it in it")
        if (work / MEMORIES / domain).is_dir():
            shutil.rmtree(work / MEMORIES / domain)
        write_text(work / MANIFEST, unlisted(manifest, domain).to_json())


def check_free_name(manifest: Manifest, folder: Path, domain: str) -> None:
    """Raise KoffError unless an artifact can take a memory of this name."""
    check_name(domain)
    if manifest.form.folds:
        raise KoffError(
            f"the memory of {manifest.domain!r} is merged into the backbone of {folder}, so it takes no further one: "
            "export the run with --layout ragged"
        )
    if domain in manifest.domains:
        raise KoffError(
            f"{folder} has a memory {domain!r} already: `koff memory remove {folder} {domain}`, or give another name"
        )


# ----------------------------------------------------------------------------------------- domains trained later


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


def check_new(manifest: Manifest, folder: str, domains: Iterable[str]) -> None:
    """Raise KoffError if an artifact has a memory for one of these domains already."""
    for domain in domains:
        check_free_name(manifest, Path(folder), domain)


def backbone_of(folder: str) -> str:
    """Folder of an artifact's backbone."""
    return str(Path(folder).expanduser() / BACKBONE)


# -------------------------------------------------------------------------------------------------- the folder


@contextmanager
def revised(folder: Path) -> Iterator[Path]:
    """A copy of an artifact that takes its place when the block ends well.

    Its files are links to the old ones where the disk has links: replace them, never write into them.
    """
    check_links(folder)  # what lies outside is not copied into it
    with new_folder(folder, overwrite=True) as work:
        shutil.copytree(folder, work, dirs_exist_ok=True, copy_function=_link)
        yield work


def _link(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def write_text(file: Path, text: str) -> None:
    """Write a file of a folder that `revised` gave."""
    file.unlink(missing_ok=True)  # a link: writing into it would change the old folder
    file.write_text(text, encoding="utf-8")


def _skeleton(folder: Path, manifest: Manifest) -> torch.nn.Module:
    """The artifact's backbone without numbers, to try on whether a memory fits."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(manifest.form.read_config(folder / BACKBONE, manifest.base["family"]))
