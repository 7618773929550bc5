"""What an artifact is on disk: its folders, its manifest `koff.json`, and the hashes of its files.

    DIR/koff.json            manifest
    DIR/export_report.json   what the proof found
    DIR/backbone/            the pruned model as transformers saves one
    DIR/memories/<domain>/   one memory (memory_files.py)
    DIR/router/              what picks a memory for a text, if one was fitted (router_files.py)

Nothing here loads a model.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from koff_lightning.artifact.layouts import Layout, layout_named
from koff_lightning.backbone import FAMILIES, PrunableGroup, channel_linear
from koff_lightning.listed_files import (
    BACKBONE,
    CARD,
    FILES,
    MANIFEST,
    Files,
    check_files,
    paths_below,
    refuse_extra,
)
from koff_lightning.model_files import FLOATS_OF_TORCH, check_links, heads
from koff_lightning.placement import check_words
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import check_sha256, hash_file
from koff_lightning.support.forms import fault_in
from koff_lightning.support.json_files import read_json_object
from koff_lightning.support.names import check_name, refuse_no_memory
from koff_lightning.support.run_places import artifact_near, checkpoint_below
from koff_lightning.surgery import masks

FORMAT = 1
REPORT, MEMORIES, ROUTER = "export_report.json", "memories", "router"
_AT_ROOT = (MANIFEST, REPORT, BACKBONE, MEMORIES, "README.md", "LICENSE")

_FORM = {  # of koff.json
    "layout": str,
    "domain": (str, None),
    "base": {"id": str, "revision": (str, None), "hash": str, "family": str, "tokenizer_hash": str},
    "dtype": str,
    "mask_hash": str,
    "kept": [{"layer": int, "kind": str, "of": int, "kept": int, "bits": str, "bias?": str}],
    "sparsity": {"denominator": str} | dict.fromkeys(("target", "body", "total", "units", "ffn", "attention"), float),
    "parameters": {"dense_total": int, "backbone": int, "active": {str: int}, "stored": int},
    "domains": {
        str: {
            "rank": (int, None),
            "slots": (int, None),
            "parameters": int,
            "card_sha256": str,
            "lora_layers?": [int],
            "kv_layers?": [int],
        }
    },
    "config": (dict, None),
    "versions": {str: str},
    "files": FILES,
    "licence": (str, None),
    "created_by": str,
    "router?": ({"files": FILES}, None),
}


@dataclass(frozen=True)
class Manifest:
    """Content of `koff.json`.

    Args:
        layout: How the backbone is stored (layouts.py).
        domain: The merged domain of layout `merged`, else None.
        base: The dense model: `id`, `revision`, `hash` of its weights, `family`, `tokenizer_hash`.
        dtype: Dtype of the backbone's weights.
        mask_hash: Hash of `kept`.
        kept: The mask as `describe_mask` writes it.
        sparsity: Target, denominator, and what was removed by all three denominators and by type of unit.
        parameters: Counted from the written files: `dense_total`, `backbone`, `active` by domain, `stored`.
        domains: The memories: `rank`, `alpha`, `slots`, `parameters` of each, `card_sha256` of its memory.json, and
            `lora_layers`, `kv_layers` where these are not all.
        config: Resolved options of the run, if they were found.
        versions: Versions of the libraries that wrote it.
        files: Hash and size of every file below `backbone/`, by path.
        licence: Licence of the dense model, if it says.
        created_by: Name and version of the writer.
        format_version: Version of this file.
        router: None, or `files`: hash and size of every file below `router/`, by path. An artifact without a router
            has no such entry.
    """

    layout: str
    domain: str | None
    base: dict[str, Any]
    dtype: str
    mask_hash: str
    kept: list[dict[str, Any]]
    sparsity: dict[str, Any]
    parameters: dict[str, Any]
    domains: dict[str, dict[str, Any]]
    config: dict[str, Any] | None
    versions: dict[str, str]
    files: Files
    licence: str | None
    created_by: str
    format_version: int = FORMAT
    router: dict[str, Any] | None = None

    @property
    def closed_nothing(self) -> bool:
        """Whether a mask was learned that keeps every unit, as a threshold may: the backbone is whole then."""
        return bool(self.sparsity["target"]) and all(group["kept"] == group["of"] for group in self.kept)

    def to_json(self) -> str:
        """The text of `koff.json`."""
        content = asdict(self)
        if self.router is None:
            del content["router"]  # so that releases before there were any read it
        return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"

    @classmethod
    def from_json(cls, content: dict[str, Any], where: Path) -> "Manifest":
        """Check the content of `koff.json`.

        Raises:
            KoffError: It lacks something, has something unknown, or contradicts itself.
        """
        names = {field.name for field in fields(cls)}
        if odd := sorted(names ^ (content.keys() | {"router"})):
            problem = "lacks" if odd[0] in names else "has an unknown entry"
            raise KoffError(f"{where} {problem} {odd[0]!r}: it is damaged, or not an artifact's; export it again")
        if found := fault_in(content, _FORM, "it"):
            raise KoffError(f"{where} cannot be used ({found}): it is damaged; export it again")
        manifest = cls(**content)
        try:
            manifest._check()
        except (KoffError, ValueError, IndexError) as error:
            raise KoffError(f"{where} cannot be used ({error}): it is damaged; export it again") from error
        return manifest

    def _check(self) -> None:
        """Raise if an entry lacks a part or has one of a wrong kind, or if entries contradict each other."""
        if layout_named(self.layout).folds != (self.domain is not None):
            raise KoffError(f"layout {self.layout!r} does not go with the merged domain {self.domain!r}")
        if (family := self.base["family"]) not in FAMILIES:
            raise KoffError(f"base.family must be one of {', '.join(FAMILIES)}; got {family!r}")
        for name, about in self.domains.items():
            check_name(name)  # it is part of a path
            for placement in ("lora_layers", "kv_layers"):
                check_words(about.get(placement, [0]), placement)
        if missing := sorted(self.domains.keys() - self.parameters["active"].keys()):
            raise KoffError(f"its active parameters lack {missing[0]!r}")
        routers = {} if self.router is None else self.router["files"]
        for below, files in ((BACKBONE, self.files), (ROUTER, routers)):
            for name in files:
                if Path(name).parts[:1] != (below,) or ".." in Path(name).parts:
                    raise KoffError(f"it lists {name!r}, which is not below {below}/")
        if hash_description(self.kept) != self.mask_hash:
            raise KoffError("its mask does not fit its mask_hash")
        for group in self.kept:
            if (len(bits := _unpack(group)), int(bits.sum())) != (group["of"], group["kept"]):
                raise KoffError(f"the bits of layer {group['layer']} are not {group['kept']} of {group['of']}")

    def refuse_others(self, domains: Iterable[str], where: object) -> None:
        """Raise KoffError unless the artifact, which lies at `where`, has a memory for each of these domains."""
        refuse_no_memory(domains, self.domains, where)

    @property
    def form(self) -> Layout:
        """How the backbone and its memories are stored."""
        return layout_named(self.layout)

    @property
    def tokenizer_hash(self) -> str:
        """Of the tokenizer that the memories were trained with."""
        return self.base["tokenizer_hash"]

    def closed(self) -> dict[str, Tensor]:
        """Path of a linear -> which of its channels stay in their place as zeros, bool [out]; where there are any."""
        rows = {channel_linear(group["layer"], group["kind"]): ~_unpack(group) for group in self.kept}
        return {path: closed for path, closed in rows.items() if path is not None and closed.any()}

    def mask(self) -> Tensor:
        """The mask, bool [U], over the groups in the order of `kept`."""
        return torch.cat([_unpack(group) for group in self.kept])


def backbone_of(folder: str) -> str:
    """Folder of an artifact's backbone."""
    return str(Path(folder).expanduser() / BACKBONE)


# ------------------------------------------------------------------------------------------------------ the mask


def describe_mask(groups: Sequence[PrunableGroup], kept: Tensor, bias: Tensor | None = None) -> list[dict[str, Any]]:
    """The mask as the manifest has it.

    Args:
        groups: The units.
        kept: The mask, bool [U].
        bias: What the removed units leave behind at each group's consumer, [groups, d]; None without compensation.

    Returns:
        An entry per group, its bits packed (first unit highest) in hex; with compensation also the SHA-256 of its bias.
    """
    mask = [
        {"layer": g.layer, "kind": g.kind, "of": g.size, "kept": int(part.sum()), "bits": _pack(part)}
        for g, part in masks(groups, kept.cpu())
    ]
    if bias is None:
        return mask
    rows = bias.cpu().float().numpy().astype("<f4")  # the same on every machine
    return [group | {"bias": hashlib.sha256(row.tobytes()).hexdigest()} for group, row in zip(mask, rows, strict=True)]


def hash_description(mask: list[dict[str, Any]]) -> str:
    """SHA-256 over what `describe_mask` writes, by which a memory knows the mask that it was made for."""
    lines = [" ".join(map(str, (g["layer"], g["kind"], g["of"], g["bits"], *_bias(g)))) + "\n" for g in mask]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _bias(group: dict[str, Any]) -> list[str]:
    return [group["bias"]] if "bias" in group else []  # without one the hash is that of artifacts before there were any


def _pack(bits: Tensor) -> str:
    return np.packbits(bits.numpy()).tobytes().hex()


def _unpack(group: dict[str, Any]) -> Tensor:
    """The mask of one described group, bool [units of the group]."""
    packed = np.frombuffer(bytes.fromhex(group["bits"]), np.uint8)  # [bytes]
    return torch.from_numpy(np.unpackbits(packed)[: group["of"]]).bool()


# ------------------------------------------------------------------------------------------------------ the files


def read_manifest(folder: str | Path) -> Manifest:
    """Read `koff.json` of an artifact.

    Raises:
        KoffError: The file is missing, damaged, or of another format version.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        fault = "that is a file, wanted is the folder" if folder.exists() else "no such folder"
        raise KoffError(f"artifact {str(folder)!r}: {fault}. `koff export --ckpt CHECKPOINT --out DIR` makes one")
    if not (folder / MANIFEST).is_file():
        raise KoffError(_no_artifact(folder))
    return Manifest.from_json(read_versioned(folder / MANIFEST), folder / MANIFEST)


def _no_artifact(folder: Path) -> str:
    """What to do where another folder was given for an artifact."""
    kind = "a model" if (folder / "config.json").is_file() else "a folder"
    said = f"{folder} is {kind} without {MANIFEST}, so it is no artifact: "
    if found := artifact_near(folder):
        return f"{said}give {found}"
    if checkpoint := checkpoint_below(folder):
        return (
            f"{said}it is of a run that has not ended, or exports none. `koff export --ckpt {checkpoint} --out DIR` "
            "makes one, and `koff fit` goes on with the run with --ckpt_path last"
        )
    return f"{said}`koff export --ckpt CHECKPOINT --out DIR` makes an artifact"


def read_versioned(path: Path) -> dict[str, Any]:
    """Read a JSON file that states its format version.

    Raises:
        KoffError: It is missing, is no object in JSON, or has another format version than this release writes.
    """
    content = read_json_object(path)
    version = content.get("format_version")
    if version != FORMAT:
        raise KoffError(
            f"{path} has format version {version!r}, this koff-lightning reads {FORMAT}: "
            "use the release that wrote it, or write it again"
        )
    try:
        json.dumps(content, allow_nan=False)  # NaN is no JSON: what was read could not be written again
    except ValueError as error:
        raise KoffError(f"{path} holds NaN or Infinity for a number: it is damaged; get or write it again") from error
    return content


def verify(folder: str | Path, backbone: bool = True) -> Manifest:
    """Check that an artifact holds what its manifest lists, nothing less and nothing more.

    Args:
        folder: The artifact.
        backbone: Compare the backbone's hashes, which reads all of it; else only its names and sizes. Of the memories
            their cards are compared; the other files of one are when it is loaded.

    Raises:
        KoffError: A file is missing, extra, truncated or changed, or the weights have another dtype.
    """
    folder = Path(folder).expanduser()
    manifest = read_manifest(folder)
    check_links(folder)
    allowed = _AT_ROOT if manifest.router is None else (*_AT_ROOT, ROUTER)
    refuse_extra(folder, (path.name for path in folder.iterdir()), allowed)
    check_files(folder, manifest.files, BACKBONE, hashes=backbone)
    if manifest.router is not None:
        check_files(folder, manifest.router["files"], ROUTER, hashes=backbone)
    _check_dtype(folder / BACKBONE, manifest.dtype)
    present = [path.name for path in (folder / MEMORIES).iterdir()] if (folder / MEMORIES).is_dir() else []
    refuse_extra(folder / MEMORIES, present, manifest.domains)
    if missing := sorted(set(manifest.domains) - set(present)):
        raise KoffError(f"{folder / MEMORIES / missing[0]} is missing: {MANIFEST} lists it; copy the artifact again")
    for name, about in manifest.domains.items():
        card = folder / MEMORIES / name / CARD
        if card.is_file():
            check_sha256(hash_file(card), about["card_sha256"], card)
    return manifest


def describe_files(folder: Path, below: str = ".") -> Files:
    """Hash and size of every file in `folder / below`, by path relative to `folder`; hidden files are left out."""
    paths = sorted(paths_below(folder, below))
    return {name: describe_file(folder / name) for name in paths}


def describe_file(path: Path) -> dict[str, Any]:
    """Hash and size of a file, as `check_files` compares them."""
    return {"sha256": hash_file(path), "size": path.stat().st_size}


def count_parameters(folder: Path) -> int:
    """Numbers in the safetensors files of a folder, by the shapes that they state."""
    return sum(math.prod(shape) for path in folder.glob("*.safetensors") for _, shape in heads(path).values())


def _check_dtype(folder: Path, dtype: str) -> None:
    """Raise KoffError unless the safetensors files of a backbone hold what the manifest says; reads only their heads.

    transformers would cast to whatever is asked for, without a word.
    """
    for path in sorted(folder.glob("*.safetensors")):
        kinds = {name: kind for name, (kind, _) in heads(path).items()}
        if odd := [name for name, kind in kinds.items() if kind != FLOATS_OF_TORCH.get(getattr(torch, dtype, None))]:
            raise KoffError(
                f"{MANIFEST} says {dtype}, but {path} holds {odd[0]} as {kinds[odd[0]]}: one of them was changed; get "
                "the artifact again"
            )
