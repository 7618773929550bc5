"""Load a frozen LLM and its tokenizer: from a hub id, a folder, a `.gguf` file, or `koff-tiny`, which ships with us."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from koff_lightning.backbone import FAMILIES
from koff_lightning.support.errors import KoffError

TINY = "koff-tiny"
LARGE = 2 * 2**30  # bytes of weights; fewer are loaded in a few seconds, before anybody reads a progress bar


def load_backbone(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    config: PreTrainedConfig | None = None,
) -> PreTrainedModel:
    """Load a causal LM from a hub id, a local folder, a `.gguf` file or `koff-tiny`; frozen, in eval mode.

    Args:
        source: Where the weights are.
        revision: Branch, tag or commit of a hub model.
        dtype: Name of the torch dtype the frozen weights are kept in.
        trust_remote_code: Allow code from the model repository to run.
        config: In place of the one at `source`.

    Raises:
        KoffError: Nothing there, no access, no network, or a family that is not supported.
    """
    where = _resolve(source, revision, trust_remote_code)
    config = config or load_config(source, revision=revision, trust_remote_code=trust_remote_code)
    if "gguf_file" in where:
        from transformers import GgufConfig

        where = where | {
            "quantization_config": GgufConfig(dequantize=True)
        }  # packed weights can be neither cut nor adapted
    where = where | {"config": config, "dtype": torch_dtype(dtype), "output_loading_info": True}
    with _bar_for_large(where["pretrained_model_name_or_path"], where.get("gguf_file")):
        model, info = _loading(source, AutoModelForCausalLM.from_pretrained, where)
    if info["missing_keys"]:  # transformers fills them with random numbers and goes on
        missing = sorted(info["missing_keys"])
        raise KoffError(
            f"backbone {source!r}: its files lack {len(missing)} tensors that its config asks for, first {missing[0]}: "
            "the download is incomplete, or config and weights belong to different models"
        )
    model.config.use_cache = False  # a cache makes packed documents see each other, silently
    return model.requires_grad_(False).eval()


def load_config(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a backbone, which is given as to `load_backbone`.

    Raises:
        KoffError: Nothing there, no access, no network, or a family that is not supported.
    """
    config = _loading(source, AutoConfig.from_pretrained, _resolve(source, revision, trust_remote_code))
    if config.model_type.removeprefix("koff_") not in FAMILIES:  # koff_*: what an artifact holds
        raise KoffError(
            f"backbone {source!r} is a {config.model_type!r} model; supported families are {', '.join(FAMILIES)}. "
            "To add one, see the head of koff_lightning/backbone.py"
        )
    return config


def load_tokenizer(
    source: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    config: PreTrainedConfig | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to `source`, which is given as to `load_backbone`.

    transformers chooses its class by the model's config as well; `config` stands in for the one at `source`.
    """
    where = _resolve(
        source, revision, trust_remote_code, wanted=("tokenizer_config.json", "tokenizer.json", "config.json")
    )
    return _loading(source, AutoTokenizer.from_pretrained, where | ({} if config is None else {"config": config}))


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and bytes of the frozen weights, so that a memory knows the model it was made for."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of what makes token ids: the fast tokenizer's own description, of a slow one the sorted vocabulary."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        content |= {"padding": None, "truncation": None}  # states of the last call
    else:
        content = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def torch_dtype(name: str) -> torch.dtype:
    """The floating dtype of that name."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise KoffError(f"dtype must be a floating torch dtype such as float32, bfloat16 or float16; got {name!r}")
    return dtype


def _resolve(
    source: str, revision: str | None, trust_remote_code: bool, wanted: tuple[str, ...] = ("config.json",)
) -> dict[str, object]:
    """Keyword arguments for `from_pretrained`; a folder must hold one of the `wanted` files."""
    where: dict[str, object] = {"revision": revision, "trust_remote_code": trust_remote_code}
    path = Path(source).expanduser()
    if source == TINY:
        return {"pretrained_model_name_or_path": str(files("koff_lightning") / "tiny" / "model")}
    if source.endswith(".gguf"):
        if not path.is_file():
            raise KoffError(
                f"backbone {source!r}: no such file. `koff fetch smollm2` gets one; a hub id or a folder also works"
            )
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        if not any((path / name).is_file() for name in wanted):
            raise KoffError(
                f"{source!r}: the folder holds no {' or '.join(wanted)}, so it is nothing transformers saved"
            )
        return where | {"pretrained_model_name_or_path": str(path)}
    if path.exists() or source.count("/") > 1 or source.startswith((".", "/", "~")):
        raise KoffError(
            f"backbone {source!r}: no such folder. Give a folder, a .gguf file, a hub id (owner/name) or {TINY!r}"
        )
    return where | {"pretrained_model_name_or_path": source}


def _loading(source: str, load: object, where: dict[str, object]) -> object:
    """Call `load`, turning the hub's many exceptions into one line that says what to do."""
    import koff_lightning.artifact.modeling_koff  # noqa: F401  makes the types koff_* known; costs seconds, so not at the top

    try:
        return load(**where)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError) as error:
        text = str(error)
        if isinstance(error, UnpicklingError):
            hint = "its weights are damaged, or hold more than tensors, which is never run: save them as safetensors"
        elif "trust_remote_code" in text:
            hint = "it brings its own code, which is not run unless trust_remote_code is true"
        elif "gated" in text.lower() or "401" in text or "403" in text:
            hint = "access is restricted: accept its licence on the hub and log in with `hf auth login`"
        elif any(
            sign in text.lower() for sign in ("offline", "connect", "couldn't reach", "resolve host", "timed out")
        ):
            hint = f"no copy is cached and the hub cannot be reached: fetch it where it can be, or use {TINY!r}"
        elif "not a valid model identifier" in text or "404" in text:
            hint = "no such model on the hub: check the spelling, or give a local folder"
        else:
            hint = text.strip().splitlines()[0] if text.strip() else type(error).__name__
        raise KoffError(f"cannot load backbone {source!r}: {hint}") from error


@contextmanager
def _bar_for_large(source: str, gguf: str | None = None) -> Iterator[None]:
    """Show no progress bar inside the block while little is loaded; the caller's own setting comes back after it.

    Args:
        source: Folder of the weights, or a hub id.
        gguf: The file in that folder that holds them, if it is one of that kind.
    """
    files = [Path(source) / gguf] if gguf else Path(source).glob("*.safetensors")
    silent = Path(source).is_dir() and sum(file.stat().st_size for file in files) < LARGE
    if not silent or not is_progress_bar_enabled():
        yield
        return
    disable_progress_bar()
    try:
        yield
    finally:
        enable_progress_bar()
