"""Read a checkpoint of `koff fit`. Nothing in it is run: it may come from anyone."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from koff_lightning.decomposition import Decomposition
from koff_lightning.errors import KoffError
from koff_lightning.memory import KVSpec, LoraSpec
from koff_lightning.sparsity import SparsitySpec


def from_checkpoint(path: str | Path, backbone: str | None = None) -> Decomposition:
    """The decomposition that a checkpoint holds, on the CPU, ready to run.

    The backbone is loaded without code of its own, whatever the run's options were.

    Args:
        path: A `.ckpt` file of `koff fit`.
        backbone: Where the backbone is, if it is no longer where the run found it.

    Raises:
        KoffError: No such file, not a checkpoint of `koff fit`, or a backbone that is missing or another one.
    """
    path = Path(path).expanduser()
    checkpoint = _read(path)
    options = checkpoint["hyper_parameters"]
    if options.get("artifact"):
        raise KoffError(
            f"{path} holds memories for the artefact {options['artifact']!r}, where that run put them, and no backbone"
        )
    try:
        module = Decomposition(
            backbone or options["backbone"],
            options["domains"],
            SparsitySpec(**options["sparsity"]),
            options["lora"] and LoraSpec(**options["lora"]),
            options["kv"] and KVSpec(**options["kv"]),
            options["shared_memory"],
            revision=options["revision"] if backbone is None else None,
            dtype=options["dtype"],
        )
    except (TypeError, KeyError) as error:
        raise KoffError(f"{path} was written by another release of koff-lightning ({error}): use that one") from error
    try:
        module.configure_model()
    except KoffError as error:
        hint = "" if backbone else " (if the backbone has moved, say where it is with --backbone)"
        raise KoffError(f"{path}: {error}{hint}") from error
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    return module


def _read(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise KoffError(
            f"{path} is a folder, as sharded runs save: make one file of it with "
            f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {path}`"
        )
    if not path.is_file():
        raise KoffError(f"checkpoint {path}: no such file. `koff fit` leaves one in runs/.../checkpoints/last.ckpt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise KoffError(f"cannot read {path} as a checkpoint: it is damaged or something else ({reason})") from error
    if not isinstance(checkpoint, Mapping) or not {"koff", "hyper_parameters", "state_dict"} <= checkpoint.keys():
        raise KoffError(f"{path} is not a checkpoint of `koff fit`: it does not say what was trained on which backbone")
    return checkpoint
