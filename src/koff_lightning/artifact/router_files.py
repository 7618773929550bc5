"""The router of an artifact on disk: written beside the memories, read through a door that looks at everything.

    DIR/router/router.json          whose texts it tells apart, by what kind of classifier, and its thresholds
    DIR/router/router.safetensors   of kind `ngrams`: weight [D, F] and bias [D], fp32 (router/ngrams.py)
    DIR/router/encoder/             of kind `encoder`: a model for sequence classification, as transformers saves one

The manifest lists all of them with their hashes. Letters: D domains, F buckets of n-grams.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from koff_lightning.artifact.folder import (
    FORMAT,
    ROUTER,
    Manifest,
    describe_files,
    read_manifest,
    read_versioned,
    verify,
)
from koff_lightning.listed_files import MANIFEST, check_files
from koff_lightning.model_files import not_finite, tensors_in
from koff_lightning.router.ngrams import BITS, BYTES, LONGEST, NgramClassifier
from koff_lightning.router.routing import SIZES, Router
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import check_sha256
from koff_lightning.support.names import AUTO, check_names

CARD, WEIGHTS, ENCODER = "router.json", "router.safetensors", "encoder"
NGRAMS = {"longest": LONGEST, "bits": BITS, "bytes": BYTES, "hash": "fnv1a-32"}
KINDS = ("ngrams", "encoder")
_ENTRIES = {"format_version", "kind", "domains", "ngrams", "encoder", "sizes", "thresholds", "training"}


def check_choice(manifest: Manifest, folder: Path) -> None:
    """Raise KoffError unless there is something for a router of this artifact to choose."""
    names = list(manifest.domains)
    if manifest.form.folds or len(names) < 2:
        have = f"one memory, {names[0]!r}" if names else "no memory"
        raise KoffError(f"{folder} has {have}, so there is nothing to choose: a router takes two memories or more")
    if AUTO in names:
        raise KoffError(
            f"{folder} has a memory called {AUTO!r}, the word that asks the router: add it under another name"
        )


def write_router(folder: str | Path, router: Router, training: dict[str, Any]) -> None:
    """Put a router into an artifact, in the place of any that is there. The folder is replaced as a whole.

    Args:
        folder: The artifact.
        router: For its memories.
        training: What it was trained on and how, for whoever asks later.

    Raises:
        KoffError: The artifact is not sound, is being written by another process, or has other memories.
    """
    from koff_lightning.artifact.memories import revised, write_text  # who only reads is spared it

    folder = Path(folder).expanduser().resolve()
    check_choice(read_manifest(folder), folder)
    with revised(folder) as work:
        manifest = verify(work, backbone=False)
        check_fit(router.domains, list(manifest.domains), folder)
        shutil.rmtree(work / ROUTER, ignore_errors=True)  # links: the files of the old folder stay
        (work / ROUTER).mkdir()
        ngrams = isinstance(router.classifier, NgramClassifier)
        card = {
            "format_version": FORMAT,
            "kind": KINDS[0] if ngrams else KINDS[1],
            "domains": list(router.domains),
            "ngrams": NGRAMS if ngrams else None,
            "encoder": None if ngrams else training.get("encoder"),
            "sizes": list(SIZES),
            "thresholds": list(router.thresholds),
            "training": training,
        }
        write_text(work / ROUTER / CARD, json.dumps(card, indent=2, ensure_ascii=False) + "\n")
        if ngrams:
            parts = {"weight": router.classifier.weight, "bias": router.classifier.bias}
            save_file({name: torch.from_numpy(part) for name, part in parts.items()}, work / ROUTER / WEIGHTS)
        else:
            router.classifier.save(work / ROUTER / ENCODER)
        manifest = replace(manifest, router={"files": describe_files(work, ROUTER)})
        write_text(work / MANIFEST, manifest.to_json())
        verify(work, backbone=False)


def read_router(folder: Path, manifest: Manifest) -> Router:
    """Read the router of an artifact.

    Raises:
        KoffError: It has none, or one that is damaged, or made for other memories.
    """
    if manifest.router is None:
        raise KoffError(f"{folder} has no router to pick a memory: `koff router fit --model {folder}` makes one")
    check_files(folder, manifest.router["files"], ROUTER)
    card = read_fitting_card(folder, manifest)
    if card["kind"] == "ngrams":
        classifier = _ngrams(folder, manifest, len(card["domains"]))
    else:
        from koff_lightning.router.encoder import load_encoder

        classifier = load_encoder(folder / ROUTER / ENCODER, len(card["domains"]))
    return Router(tuple(card["domains"]), classifier, tuple(map(float, card["thresholds"])))


def read_fitting_card(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Content of the `router.json` of an artifact that has a router.

    Raises:
        KoffError: It is damaged, or its router was made for other memories.
    """
    path = folder / ROUTER / CARD
    card = read_versioned(path)
    try:
        _check_card(card)
    except (KoffError, TypeError, KeyError, ValueError, AttributeError) as error:
        raise KoffError(f"{path} cannot be used ({error}): fit the router anew (koff router fit)") from error
    check_fit(card["domains"], list(manifest.domains), folder)
    return card


def check_fit(answers: Sequence[str], memories: Sequence[str], folder: Path, loaded: bool = False) -> None:
    """Raise KoffError unless a router's answers are an artifact's memories, or those of them that are `loaded`."""
    if loaded and (missing := [name for name in answers if name not in memories]):
        raise KoffError(
            f"the router of {folder} picks among {', '.join(answers)}, and {missing[0]!r} is not loaded: load all "
            f'memories, as domains="{AUTO}" does'
        )
    if odd := sorted(set(answers) ^ set(memories)):
        of = "a memory" if odd[0] in memories else "a router"
        raise KoffError(
            f"the router of {folder} was fitted for {', '.join(answers)}, its memories are "
            f"{', '.join(memories) or 'none'} ({odd[0]!r} is {of} only): fit it "
            f"anew with `koff router fit --model {folder}`"
            + " (what was added to this process alone: `koff memory add` it first)"
            * loaded
        )


def _check_card(card: dict[str, Any]) -> None:
    """Raise if an entry is missing, unknown, or of a wrong kind or size."""
    if odd := sorted(_ENTRIES ^ card.keys()):
        raise KoffError(f"it lacks or should not have {odd[0]!r}")
    names = card["domains"]
    if not isinstance(names, list) or len(names) < 2:
        raise KoffError("its domains must be two names or more")
    check_names(names)
    if card["kind"] not in KINDS:
        raise KoffError(f"its kind is {str(card['kind'])[:40]!r}, known are {' and '.join(KINDS)}")
    if card["kind"] == "ngrams" and card["ngrams"] != NGRAMS:
        raise KoffError(f"its n-grams are not those of this release ({NGRAMS})")
    levels = card["thresholds"]
    if card["sizes"] != list(SIZES) or not isinstance(levels, list) or len(levels) != len(SIZES) + 1:
        raise KoffError(f"it must have {len(SIZES) + 1} thresholds for the sizes {list(SIZES)}")
    if odd := [level for level in levels if type(level) not in (int, float) or not 0 <= level <= 1]:
        raise KoffError(f"a threshold must lie in [0, 1], got {str(odd[0])[:40]}")


def _ngrams(folder: Path, manifest: Manifest, count: int) -> NgramClassifier:
    """The linear model; what is hashed here is what is used."""
    path = folder / ROUTER / WEIGHTS
    listed = manifest.router["files"].get(f"{ROUTER}/{WEIGHTS}")
    if listed is None:
        raise KoffError(f"{path} is missing: fit the router anew (koff router fit)")
    content = path.read_bytes()
    check_sha256(hashlib.sha256(content).hexdigest(), listed["sha256"], path)
    tensors = tensors_in(content, path)
    due = {"weight": (count, 2**BITS), "bias": (count,)}
    have = {name: tuple(part.shape) for name, part in tensors.items()}
    if have != due or any(part.dtype != torch.float32 for part in tensors.values()) or not_finite(tensors):
        raise KoffError(f"{path} must hold {due}, fp32 and finite, and holds {have}: fit the router anew")
    return NgramClassifier(*(np.ascontiguousarray(tensors[name].numpy()) for name in ("weight", "bias")))
