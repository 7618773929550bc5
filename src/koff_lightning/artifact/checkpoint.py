"""Read a checkpoint of `koff fit`, which may come from anyone, and make the decomposition that it holds."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor

from koff_lightning.artifact.checkpoint_schema import fault_of
from koff_lightning.decomposition import Decomposition
from koff_lightning.memory import MemoryBank
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.support.errors import KoffError
from koff_lightning.support.forms import options_of
from koff_lightning.support.run_places import checkpoint_below, is_sharded

PREFIX = "model."  # of the decomposition's tensors in the state dict of a KOFFModule
_PARTS = ("koff", "hyper_parameters", "state_dict")
_LEFT = "`koff fit` leaves one in runs/.../checkpoints/last.ckpt"
_FIRST_VERSION = ("gates.", "memories.", "backbone.")  # 0.1.0 up to d37453a saved a decomposition without a prefix


def read_checkpoint(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """The content of a checkpoint of `koff fit`, on the CPU. It may come from anyone: nothing in it is run.

    Args:
        path: The file.
        mmap: Leave tensors on the disk until they are used.

    Raises:
        KoffError: There is no such file, it is damaged or not of `koff fit`, or it holds values that are not allowed.
    """
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            raise IsADirectoryError
        if not path.is_file():
            raise FileNotFoundError
        with ZipFile(path) as archive:
            if damaged := archive.testzip():  # torch does not look at the check sums
                raise BadZipFile(f"{damaged} has another check sum")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except IsADirectoryError:
        raise KoffError(_about_folder(path)) from None
    except FileNotFoundError:
        raise KoffError(f"checkpoint {path}: no such file. {_LEFT}") from None
    except OSError as error:
        raise KoffError(
            f"cannot read {path}: {reason_of(error)}. It may be intact: see to the disk or the rights, then try again"
        ) from error
    except Exception as error:  # a file made to do harm can raise anything
        raise KoffError(
            f"cannot read {path} as a checkpoint: it is damaged or something else ({reason_of(error)})"
        ) from error
    parts = [checkpoint.get(key) if isinstance(checkpoint, Mapping) else None for key in _PARTS]
    if not all(isinstance(part, Mapping) for part in parts):
        raise KoffError(f"{path} is not a checkpoint of `koff fit`: it does not say what was trained on which backbone")
    if named := {"_instantiator", "_class_path"} & checkpoint["hyper_parameters"].keys():
        raise KoffError(f"{path} names code to be run ({', '.join(sorted(named))}): `koff fit` writes no such thing")
    check_content(checkpoint, str(path))
    return checkpoint


def _about_folder(path: Path) -> str:
    """The message for a folder that was given as a checkpoint."""
    if is_sharded(path):
        return (
            f"{path} is a folder, as sharded runs save: make one file of it with "
            f"`python -m lightning.pytorch.utilities.consolidate_checkpoint {path}`"
        )
    found = checkpoint_below(path)
    return f"{path} is a folder, wanted is a checkpoint: {f'give {found}' if found else f'it holds none. {_LEFT}'}"


def check_content(checkpoint: dict[str, Any], where: str = "the checkpoint") -> None:
    """Refuse values that no checkpoint of `koff fit` has. Tensors of earlier releases are renamed, in place.

    Args:
        checkpoint: Content of the file.
        where: Path of the file, for the message.

    Raises:
        KoffError: A value is not allowed; the first is named.
    """
    _rename_keys(checkpoint)
    if fault := fault_of(checkpoint):
        raise KoffError(f"{where} is not as `koff fit` writes one: {fault}. It is damaged: take another one")


def _rename_keys(checkpoint: dict[str, Any]) -> None:
    """Rename the tensors of an earlier release's checkpoint to their present names, in place."""
    state = checkpoint.get("state_dict") or {}
    names = [str(name) for name in state]
    if any(name.startswith(_FIRST_VERSION) for name in names) and not any(name.startswith(PREFIX) for name in names):
        new = {f"{PREFIX}{name}" if str(name).startswith(_FIRST_VERSION) else name: v for name, v in state.items()}
        checkpoint["state_dict"] = new


def decomposition_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the decomposition, by its own names: `gates.logits`, `memories. ...`."""
    state = checkpoint["state_dict"]
    return {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}


def target_of(checkpoint: Mapping[str, Any], sparsity: SparsitySpec) -> float:
    """`Decomposition.target` of the checkpoint's run.

    Raises:
        KoffError: The checkpoint has a mask, and these options ask for none.
    """
    target = checkpoint["koff"]["target"]
    if target and not sparsity.target:
        raise KoffError(
            "the checkpoint holds a mask that model.sparsity.target 0 would leave out: give the target of that run"
        )
    return target


def from_checkpoint(path: str | Path, backbone: str | None = None) -> Decomposition:
    """The decomposition that a checkpoint holds, on the CPU, ready to run.

    The backbone is loaded without remote code, whatever the run's options were.

    Args:
        path: A `.ckpt` file of `koff fit`.
        backbone: Where the backbone is, if it is no longer where the run found it.

    Raises:
        KoffError: There is no such file, it is not a checkpoint of `koff fit`, or its backbone is missing or differs.
    """
    path = Path(path).expanduser()
    checkpoint = read_checkpoint(path, mmap=True)
    options = checkpoint["hyper_parameters"]
    if options.get("artifact"):
        raise KoffError(
            f"{path} holds memories for the artifact {options['artifact']!r}, where that run put them, and no backbone"
        )
    try:
        made_of = {
            "domains": options["domains"],
            "sparsity": options_of(SparsitySpec, options["sparsity"], "sparsity"),
            "lora": options["lora"] and options_of(LoraSpec, options["lora"], "lora"),
            "kv": options["kv"] and options_of(KVSpec, options["kv"], "kv"),
            "shared_memory": options["shared_memory"],
            "revision": options["revision"] if backbone is None else None,
            "dtype": options["dtype"],
        }
        source = backbone or options["backbone"]
    except (TypeError, KeyError) as error:
        raise KoffError(f"{path} was written by another release of koff-lightning ({error}): use that one") from error
    try:
        model = Decomposition(source, **made_of)
    except KoffError as error:
        hint = "" if backbone else " (if the backbone has moved, say where it is with --backbone)"
        raise KoffError(f"{path}: {error}{hint}") from error
    refuse_other_backbone(checkpoint["koff"], model)
    model.place(checkpoint["koff"].get("placement") or {})
    state = decomposition_state(checkpoint)
    refuse_other_tensors(state, model.state_dict(), model.owned())
    model.load_state_dict(state, strict=False)
    model.target = target_of(checkpoint, model.sparsity)
    return model


def refuse_other_backbone(about: Mapping[str, Any], model: Decomposition, advice: str = "load that backbone") -> None:
    """Raise KoffError, with `advice`, if a checkpoint (its entry `koff`) belongs to another backbone."""
    if about["backbone_hash"] != model.backbone_hash:
        raise KoffError(
            f"the checkpoint belongs to backbone {about['backbone']!r} (hash {about['backbone_hash'][:12]}), "
            f"but {model.source!r} has hash {model.backbone_hash[:12]}: {advice}"
        )


def refuse_other_tensors(
    there: Mapping[str, Tensor], here: Mapping[str, Tensor], needed: Iterable[str], others: Iterable[str] = ()
) -> None:
    """Refuse a checkpoint whose tensors are not exactly the `needed` ones, with their shapes and dtypes.

    Args:
        there: Tensors of the checkpoint.
        here: State dict of the model.
        needed: Names of the tensors that the checkpoint must have.
        others: Domains of the checkpoint that the model does not have: tensors of their memories may be there too.

    Raises:
        KoffError: A tensor is missing, has another shape or dtype, or is left over; the first one is named.
    """
    needed = sorted(needed)
    if missing := [name for name in needed if name not in there]:
        raise KoffError(
            f"the checkpoint lacks {len(missing)} of the tensors that this run trains, first {missing[0]}: "
            "use the model and data options of that run"
        )
    if odd := [name for name in needed if here[name].shape != there[name].shape]:
        raise KoffError(
            f"the checkpoint does not fit this run: {odd[0]} has shape {list(there[odd[0]].shape)} there and "
            f"{list(here[odd[0]].shape)} here ({len(odd)} tensors in all): use the model options of that run"
        )
    if odd := [name for name in needed if here[name].dtype != there[name].dtype]:  # torch would silently cast
        raise KoffError(
            f"the checkpoint does not fit this run: {odd[0]} is {there[odd[0]].dtype} there and "
            f"{here[odd[0]].dtype} here"
        )
    keys = {MemoryBank.key(domain) for domain in others}
    left = [name for name in sorted(set(there) - set(needed)) if not _may_stay(name, keys)]
    if left:
        raise KoffError(
            f"the checkpoint holds {len(left)} tensors that this run has no place for, first {left[0]}: use the model "
            "and data options of its own run"
        )


def _may_stay(name: str, others: set[str]) -> bool:
    """Whether a tensor that is not needed is allowed: of a domain in `others`, of a penalty, or a mask's bias."""
    name = name.removeprefix(PREFIX)
    return name in ("gates.bias", "bias") or name.startswith("penalty.") or not others.isdisjoint(name.split("."))


def reason_of(error: BaseException) -> str:
    """The system's reason for an error, which torch may have wrapped."""
    cause: BaseException | None = error
    while cause is not None and not getattr(cause, "strerror", None):
        cause = cause.__cause__ or cause.__context__
    text = cause.strerror if isinstance(cause, OSError) else str(error).strip()
    return (text.splitlines() or [type(error).__name__])[0]
