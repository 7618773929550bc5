"""The memories of an artifact on disk: put one in, take one out, write the loaded ones as an artifact of their own.

The folder is replaced as a whole, so no crash leaves half. Where one memory changes the backbone and the others are not
written: the new folder links to their files.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from koff_lightning.artifact.folder import MEMORIES, REPORT, ROUTER, Manifest, read_manifest, verify
from koff_lightning.artifact.memory_files import listed, load_memory, read_card, unlisted, write_loaded
from koff_lightning.listed_files import BACKBONE, CARD, MANIFEST
from koff_lightning.memory import MemoryBank
from koff_lightning.model_files import check_links
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import hash_file, new_folder
from koff_lightning.support.names import check_name, refuse_taken
from koff_lightning.support.secrets import without_secrets
from koff_lightning.surgery import plain_state


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


def add_from_bank(
    folder: str | Path, bank: MemoryBank, domains: Sequence[str], texts: Mapping[str, Any] | None = None
) -> None:
    """Write memories of a bank that hangs on the artifact's backbone, and add all of them to the artifact or none.

    Args:
        folder: The artifact.
        bank: Hangs on its backbone.
        domains: Whose memories to add.
        texts: What text of a domain they learned, as `data.domains` names it, for whoever needs it later (a router).

    Raises:
        KoffError: As `add_memory`.
    """
    folder = Path(folder).expanduser().resolve()
    manifest = read_manifest(folder)
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as work:
            sources = {domain: Path(work) / domain for domain in domains}
            for domain, source in sources.items():
                write_loaded(source, bank, domain, manifest)
            _add(folder, sources, texts or {})
    except SafetensorError as error:  # safetensors has its own class for a full disk
        raise KoffError(f"cannot write beside {folder}: {error}") from error


def _add(folder: Path, sources: Mapping[str, Path], texts: Mapping[str, Any] = MappingProxyType({})) -> None:
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
            write_text(home / CARD, card.to_json())
            manifest = _with_text(listed(manifest, card, hash_file(home / CARD)), domain, texts.get(domain))
        write_text(work / MANIFEST, manifest.to_json())


def _with_text(manifest: Manifest, domain: str, text: Any) -> Manifest:
    """The manifest with this text of a domain among the options of its run, or with none of it."""
    data = (manifest.config or {}).get("data")
    if not isinstance(data, Mapping) or not isinstance(data.get("domains"), Mapping):
        return manifest  # a run of Python's: nobody knows its text
    others = {name: source for name, source in data["domains"].items() if name != domain}
    domains = others if text is None else others | {domain: without_secrets(text)}
    return replace(manifest, config={**manifest.config, "data": {**data, "domains": domains}})


def remove_memory(folder: str | Path, domain: str) -> None:
    """Delete a memory of an artifact.

    Raises:
        KoffError: The artifact has no such memory, or is a merged one.
    """
    folder = Path(folder).expanduser().resolve()
    read_manifest(folder)
    with revised(folder) as work:
        manifest = read_manifest(work)
        manifest.refuse_others([domain], folder)
        if manifest.form.folds:
            raise KoffError(f"{folder} is {domain!r} merged into its backbone: there is no model without it in it")
        if (work / MEMORIES / domain).is_dir():
            shutil.rmtree(work / MEMORIES / domain)
        write_text(work / MANIFEST, _with_text(unlisted(manifest, domain), domain, None).to_json())


def check_free_name(manifest: Manifest, folder: Path, domain: str) -> None:
    """Raise KoffError unless an artifact can take a memory of this name."""
    check_name(domain)
    refuse_taken([domain])
    if manifest.form.folds:
        raise KoffError(
            f"the memory of {manifest.domain!r} is merged into the backbone of {folder}, so it takes no further one: "
            "export the run with --layout ragged"
        )
    if domain in manifest.domains:
        raise KoffError(
            f"{folder} has a memory {domain!r} already: `koff memory remove {folder} {domain}`, or give another name"
        )


# --------------------------------------------------------------------------------------- what is loaded, anew


@torch.no_grad()
def save_artifact(backbone: PreTrainedModel, bank: MemoryBank, manifest: Manifest, source: Path, out: Path) -> None:
    """Copy an artifact's backbone and write the memories of a bank beside it.

    Args:
        backbone: As it was loaded from `source`; it is compared with the files.
        bank: Hangs on it.
        manifest: What `source` said when it was loaded.
        source: Folder of the artifact.
        out: A new folder.

    Raises:
        KoffError: As `DecomposedModel.save_pretrained`.
    """
    if out.exists():  # said here: nothing is replaced, so there is no option that would
        raise KoffError(f"{out} exists already: give a new folder")
    if read_manifest(source) != manifest:
        raise KoffError(f"{source} is no longer the artifact that was loaded: load it again, then save")
    if manifest.form.folds and bank.domains != [manifest.domain]:
        raise KoffError(
            f"{manifest.domain!r} is merged into this backbone, so an artifact of it holds that memory and no other; "
            f"loaded is {', '.join(bank.domains) or 'none'}"
        )
    with new_folder(out) as work:
        shutil.copytree(source / BACKBONE, work / BACKBONE)
        _refuse_changed(backbone, work / BACKBONE)
        for name in (REPORT, "README.md", "LICENSE"):
            if (source / name).is_file():
                shutil.copyfile(source / name, work / name)
        if manifest.router is not None:  # with other memories it is refused when it is asked
            shutil.copytree(source / ROUTER, work / ROUTER)
        for domain in manifest.domains:
            manifest = unlisted(manifest, domain)
        for domain in bank.domains:
            home = work / MEMORIES / domain
            card = write_loaded(home, bank, domain, manifest)
            manifest = listed(manifest, card, hash_file(home / CARD))
        (work / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
        verify(work)


def _refuse_changed(backbone: PreTrainedModel, folder: Path) -> None:
    """Raise KoffError unless a backbone holds what its files hold."""
    here = plain_state(backbone)
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dict)
                there = file.get_tensor(name)
                if here[name].dtype != there.dtype:
                    raise KoffError(
                        f"the backbone is {here[name].dtype} here and {there.dtype} in its artifact: load it without "
                        "another dtype, then save"
                    )
                if not torch.equal(here[name], there):
                    raise KoffError(
                        f"the backbone was changed after it was loaded (first: {name}), and memories belong to the one "
                        "that they were trained on. To save other weights: load with domains=[], change model.backbone "
                        "and save that alone, which is no artifact"
                    )


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
