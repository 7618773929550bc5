"""Load a frozen LLM and its tokenizer: from a hub id, a folder, a `.gguf` file, or `koff-tiny`, which ships with us."""

import hashlib
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.resources import files
from pathlib import Path
from pickle import UnpicklingError
from traceback import walk_tb
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from koff_lightning.backbone import FAMILIES, head_size, rope_of
from koff_lightning.gguf_files import check_head, check_sizes, expected_tensors, read_head, rope_parameters
from koff_lightning.listed_files import check_by_itself
from koff_lightning.model_files import (
    adapter_beside,
    check_config,
    check_folder,
    check_tokenizer,
    check_weights,
    not_finite,
    refuse_leftovers,
)
from koff_lightning.support.errors import KoffError
from koff_lightning.support.json_files import read_json_object
from koff_lightning.support.names import refuse_no_model, word_of

TINY = "koff-tiny"
HUB_LOG = "huggingface_hub.utils._http"  # says each new attempt in two lines, where our one on the last says as much
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
        source: Hub id, folder or file of the model.
        revision: Branch, tag or commit of a hub model.
        dtype: Name of the torch dtype the frozen weights are kept in.
        trust_remote_code: Allow code from the model repository to run.
        config: In place of the one at `source`, whose files the caller has looked at.

    Raises:
        KoffError: Nothing there, no access, no network, a family that is not supported, or the backbone of an artifact
            whose files are not those that the artifact lists.
    """
    where = _resolve(source := word_of(source), revision, trust_remote_code) | {"dtype": torch_dtype(dtype)}
    by_itself = config is None
    config = config or load_config(source, revision=revision, trust_remote_code=trust_remote_code)
    if "gguf_file" in where:
        from transformers import GgufConfig

        # packed weights can be neither cut nor adapted
        where = where | {"quantization_config": GgufConfig(dequantize=True)}
    else:
        _refuse_adapter(source, where)
    if (folder := Path(where["pretrained_model_name_or_path"])).is_dir() and "gguf_file" not in where:
        _check_files(folder, config, source, by_itself)
    where = where | {"config": config, "output_loading_info": True, "attn_implementation": "sdpa"}  # not the config's
    with _bar_for_large(where["pretrained_model_name_or_path"], where.get("gguf_file")), no_report():
        model, info = _loading(source, AutoModelForCausalLM.from_pretrained, where)
    if not folder.is_dir() and isinstance(
        copy := try_to_load_from_cache(source, "config.json", revision=revision), str
    ):
        _check_files(Path(copy).parent, config, source)  # of the hub, whose files are here now
    if info["missing_keys"]:  # transformers fills them with random numbers and goes on
        missing = sorted(info["missing_keys"])
        raise KoffError(
            f"backbone {source!r}: its files lack {len(missing)} tensors that its config asks for, first {missing[0]}: "
            "the download is incomplete, or config and weights belong to different models"
        )
    left = set(info["unexpected_keys"])
    if "gguf_file" in where:  # transformers does not tell which it has left out
        head = read_head(folder / where["gguf_file"])
        left |= head.tensors.keys() - expected_tensors([*model.state_dict()], config.num_hidden_layers, head.family)
    refuse_leftovers(source, left, info["mismatched_keys"])
    if config.tie_word_embeddings and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise KoffError(
            f"backbone {source!r}: its config ties the output to the input embeddings, and its files hold an output "
            "that differs: set tie_word_embeddings to false in config.json, or remove lm_head.weight from the files"
        )
    if odd := not_finite(model.state_dict()):
        raise KoffError(f"backbone {source!r}: {odd} holds numbers that are not finite: get its weights again")
    model.config.use_cache = False  # a cache makes packed documents see each other, silently
    return model.requires_grad_(False).eval()


def _check_files(folder: Path, config: PreTrainedConfig, source: str, by_itself: bool = False) -> None:
    check_folder(folder, source)
    check_weights(folder, getattr(config, "num_hidden_layers", None), source)
    if by_itself:
        check_by_itself(folder)


def load_config(source: str, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a backbone, which is given as to `load_backbone`.

    Raises:
        KoffError: Nothing there, no access, no network, a family that is not supported, or entries that ask for more
            than weights.
    """
    where = _resolve(source := word_of(source), revision, trust_remote_code)
    head = None
    if "gguf_file" in where:
        head = read_head(Path(where["pretrained_model_name_or_path"]) / where["gguf_file"])
        check_head(head, source)
    else:
        entries = _entries(source, where)
        check_config(entries, source)
    config = _loading(source, AutoConfig.from_pretrained, where)
    if config.model_type.removeprefix("koff_") not in FAMILIES:  # koff_*: what an artifact holds
        raise KoffError(
            f"backbone {source!r} is a {config.model_type!r} model; supported families are {', '.join(FAMILIES)}. "
            "To add one, see the head of koff_lightning/backbone.py"
        )
    if head is not None:
        check_sizes(head, source)
        if (size := head.own("attention.key_length")) is not None:  # transformers takes its default
            config.head_dim = int(size)
        rope = rope_of(config)
        told = rope_parameters(head, rope["rope_theta"], head_size(config), source)
        rope.clear()
        rope.update(told)
    return config


def _entries(source: str, where: dict[str, object]) -> dict[str, Any]:
    """What config.json says, before any class makes something of it."""
    file = Path(where["pretrained_model_name_or_path"]) / "config.json"
    if file.parent.is_dir():
        return read_json_object(file)
    with _only_errors_of(HUB_LOG):
        return _loading(source, PreTrainedConfig.get_config_dict, where)[0]


def _refuse_adapter(source: str, where: dict[str, object]) -> None:
    """Transformers would apply an adapter that lies among the files, by classes that the adapter names."""
    place = where["pretrained_model_name_or_path"]
    if Path(place).is_dir():
        return
    if _loading(source, find_adapter_config_file, {"model_id": place, "revision": where["revision"]}):
        raise adapter_beside(source)


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
    wanted = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "config.json")
    where = _resolve(source := word_of(source), revision, trust_remote_code, wanted)
    if (folder := Path(where["pretrained_model_name_or_path"])).is_dir() and "gguf_file" not in where:
        check_tokenizer(folder)
    given = {} if config is None else {"config": config}
    with _only_errors_of(HUB_LOG):
        tokenizer = _loading(source, AutoTokenizer.from_pretrained, where | given)
    if not folder.is_dir() and isinstance(
        copy := try_to_load_from_cache(source, "tokenizer_config.json", revision=revision), str
    ):
        check_tokenizer(Path(copy).parent)  # of the hub, whose files are here now
    _loading(source, tokenizer, {"text": "A text."})  # some options are looked at only here
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers makes one from a class and no file
        raise KoffError(
            f"the tokenizer of {source!r} has no vocabulary: its files (tokenizer.json, say) are missing; get them"
        )
    if config is None and folder.is_dir() and "gguf_file" not in where:
        check_by_itself(folder, weights=False)
    if "gguf_file" in where and tokenizer.is_fast:
        _drop_beyond(tokenizer, read_head(folder / where["gguf_file"]).metadata["tokenizer.ggml.tokens"])
    return tokenizer


def _drop_beyond(tokenizer: PreTrainedTokenizerBase, count: int) -> None:
    """Take away what a file of `count` tokens does not hold.

    transformers gives every byte-level tokenizer from a GGUF an `<|endoftext|>`; where the file has none, it gets an id
    that the model has no row for.
    """
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    held = [token for token in content["added_tokens"] if token["id"] < count]
    if len(held) < len(content["added_tokens"]):
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content | {"added_tokens": held}))


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
    """The floating dtype of that name.

    Raises:
        KoffError: There is none, or it is one that numbers are only stored in.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise KoffError(f"dtype must be a floating torch dtype such as float32, bfloat16 or float16; got {name!r}")
    if dtype.itemsize < 2:  # float8 and float4
        raise KoffError(f"torch stores numbers in {name} but does not compute in it: give float32, bfloat16 or float16")
    return dtype


def _resolve(
    source: str, revision: str | None, trust_remote_code: bool, wanted: tuple[str, ...] = ("config.json",)
) -> dict[str, object]:
    """Keyword arguments for `from_pretrained`; a folder must hold one of the `wanted` files."""
    where: dict[str, object] = {"revision": revision, "trust_remote_code": trust_remote_code}
    path = Path(source).expanduser()
    if source == TINY:
        return {"pretrained_model_name_or_path": str(files("koff_lightning") / "tiny" / "model")}
    refuse_no_model(source)
    if source.endswith(".gguf"):
        return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if path.is_dir():
        if not any((path / name).is_file() for name in wanted):
            raise KoffError(
                f"{source!r}: the folder holds no {' or '.join(wanted)}, so it is nothing transformers saved"
            )
        return where | {"pretrained_model_name_or_path": str(path)}
    if path.exists():
        raise KoffError(f"backbone {source!r}: that is a file, and none in GGUF: give the folder that it lies in")
    return where | {"pretrained_model_name_or_path": source}


# Packages that read what comes from outside: whatever they raise at it is the fault of the file.
_READERS = ("transformers", "tokenizers", "huggingface_hub", "safetensors", "torch", "gguf", "numpy", "accelerate")
_READERS += ("sentencepiece", "tiktoken", "google", "httpx", "jinja2", "koff_lightning.artifact.modeling_koff")


def _by_a_reader(error: BaseException) -> bool:
    """Whether an error was raised by code of others that reads files, not by a mistake of ours."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    name = frame.f_globals.get("__name__", "")
    return name in _READERS or name.partition(".")[0] in {*_READERS, *sys.stdlib_module_names}


def _loading(source: str, load: object, where: dict[str, object]) -> object:
    """Call `load`, turning the hub's many exceptions into one line that says what to do."""
    import koff_lightning.artifact.modeling_koff  # noqa: F401  makes the types koff_* known; costs seconds, so not at the top

    try:
        return load(**where)
    except BaseException as error:
        panic = type(error).__name__ == "PanicException"  # of tokenizers, whose base is not Exception
        if not panic and not (isinstance(error, Exception) and _by_a_reader(error)):
            raise
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
        elif "ignore_mismatched_sizes" in text:
            hint = "its weights have other shapes than its config asks for: they belong to different models"
        elif "instantiate the backend tokenizer" in text:
            hint = "the files of its tokenizer are missing, damaged or of a kind that is not known: get them again"
        elif "not a valid model identifier" in text or "404" in text:
            hint = "no such model on the hub: check the spelling, or give a local folder"
        else:
            hint = _reason(error)
        raise KoffError(f"cannot load backbone {source!r}: {hint}") from error


def _reason(error: BaseException) -> str:
    """The first line that says something, short; with the kind of error where that does not explain itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[-1] if type(error).__name__.startswith("StrictDataclass") and lines else (lines or [""])[0]
    said = said if len(said) <= 200 else f"{said[:200]} ..."
    return said if isinstance(error, OSError | ValueError | RuntimeError) and said else f"{type(error).__name__} {said}"


def no_report() -> AbstractContextManager[None]:
    """Keep transformers' table of what files and model do not share off the terminal: we say it in a line.

    The logger's level stays: where one is set, transformers also lists the layers that no other device shares.
    """
    return _only_errors_of("transformers.modeling_utils")


@contextmanager
def _only_errors_of(name: str) -> Iterator[None]:
    """Keep a logger's warnings off the terminal inside the block."""
    log = logging.getLogger(name)
    log.addFilter(_is_error)
    try:
        yield
    finally:
        log.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


@contextmanager
def _bar_for_large(source: str, gguf: str | None = None) -> Iterator[None]:
    """Show no progress bar inside the block while little is loaded.

    Args:
        source: Folder of the weights, or a hub id.
        gguf: The file in that folder that holds them, if it is one of that kind.
    """
    files = [Path(source) / gguf] if gguf else Path(source).glob("*.safetensors")
    silent = Path(source).is_dir() and sum(file.stat().st_size for file in files) < LARGE
    with no_bars() if silent else nullcontext():
        yield


@contextmanager
def no_bars() -> Iterator[None]:
    """Show none of transformers' progress bars inside the block; the caller's own setting comes back after it."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def device_named(name: str | torch.device) -> torch.device:
    """The torch device of that name.

    Raises:
        KoffError: There is none here, or none that holds numbers.
    """
    try:
        found = torch.empty(0, device=name).device
        if found.type == "meta":
            raise RuntimeError("it holds no numbers")
        return found
    except (RuntimeError, AssertionError) as error:
        raise KoffError(f"device {str(name)!r} cannot be used here: {str(error).splitlines()[0]}") from error
