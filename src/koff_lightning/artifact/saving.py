"""Write a loaded artifact as one of its own, with the memories that are loaded now."""

import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from koff_lightning.artifact.folder import (
    BACKBONE,
    MANIFEST,
    MEMORIES,
    REPORT,
    ROUTER,
    Manifest,
    read_manifest,
    verify,
)
from koff_lightning.artifact.memory_files import CARD, listed, unlisted, write_loaded
from koff_lightning.memory import MemoryBank
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import check_free, hash_file, new_folder
from koff_lightning.surgery import plain_state


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
    check_free(out)
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
                        "that they were trained on: save it with model.backbone.save_pretrained, which is no artifact"
                    )
