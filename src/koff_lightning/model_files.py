"""The folder of a model as it comes from anyone, looked at before transformers reads it.

`from_pretrained` does more than load weights: it applies an adapter that lies beside them, gets quantisers and kernels
that config.json names, follows a weight index out of the folder, and leaves out tensors that it has no place for. Here
the folder's files are held to what they are for: names stay inside, nothing but weights is loaded, sizes are sizes.
"""

import math
import os
import re
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from inspect import getattr_static
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load
from torch import Tensor

from koff_lightning.support.errors import KoffError
from koff_lightning.support.json_files import kind, read_json_object, wrong_value

INDEX = ".index.json"
SINGLE = ("model.safetensors", "pytorch_model.bin")  # the first that is there is read, its index only without it
FLOATS = ("F64", "F32", "F16", "BF16")  # of safetensors
FLOATS_OF_TORCH = dict(zip((torch.float64, torch.float32, torch.float16, torch.bfloat16), FLOATS, strict=True))

# What config.json may not ask for, with the reason. Our own attention takes the place of the file's in any case.
_FOREIGN = {
    "transformers_weights": "names another weight file",
    "experts_implementation": "asks for a kernel",
    "fusion_config": "asks for other modules",
    "kernel_config": "asks for kernels",
    "use_kernels": "asks for kernels",
    "distributed_config": "asks for several processes",
    "configuration_files": "names another config, which would be read in its place",
    "per_layer_config": "gives layers options of their own",
    "attribute_map": "gives its entries other names",
}
_UNKNOWN = {
    "final_logit_softcapping": "caps its logits, and losses here are computed from the plain ones",
    "attn_logit_softcapping": "caps its attention scores, and slots of a memory would be read without a cap",
    "use_bidirectional_attention": "lets tokens see those that come after them",
}
_ATTENTION = ("eager", "sdpa", "flex_attention", "koff")  # the others may be fetched from the hub, and run
_NEUTRAL = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}

_SIZES = {
    "hidden_size": 2**18,
    "intermediate_size": 2**20,
    "num_hidden_layers": 2**11,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**12,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**40,
    "sliding_window": 2**40,
}
_NUMBERS = {
    "rms_norm_eps": (0, 1),
    "rope_theta": (1e-3, 1e18),
    "attention_dropout": (0, 1),
    "initializer_range": (0, 1e3),
    "query_pre_attn_scalar": (1e-3, 1e6),
}
_KINDS = {
    "model_type": (str,),
    "hidden_act": (str,),
    "hidden_activation": (str,),
    "tie_word_embeddings": (bool,),
    "attention_bias": (bool,),
    "mlp_bias": (bool,),
    "rope_parameters": (dict,),
    "rope_scaling": (dict,),
    "architectures": (list,),
    "layer_types": (list,),
    "koff_layers": (list,),
    "block_configs": (list,),
    "quantization_config": (dict,),
    "auto_map": (dict,),
}
_OF_TOKENIZERS = {  # in tokenizer_config.json
    "model_max_length": (int, float),
    "padding_side": (str,),
    "truncation_side": (str,),
    "tokenizer_class": (str,),
    "chat_template": (str, list),
    "added_tokens_decoder": (dict,),
    "add_bos_token": (bool,),
    "add_eos_token": (bool,),
}
_TOKENS = ("bos_token_id", "pad_token_id", "eos_token_id")
# Entries of tokenizer_config.json that transformers may open as they stand, beside all whose name ends in `_file`; and
# two that end so, which it does not: older releases wrote down there where a tokenizer came from.
_OPENED, _NOT_OPENED = ("vocab", "merges"), ("added_tokens_file", "special_tokens_map_file")


def check_config(config: Mapping[str, Any], source: str) -> None:
    """Check what config.json, or the head of a GGUF, says.

    Args:
        config: Entries of config.json.
        source: Where they are from, for the message.

    Raises:
        KoffError: It asks for more than weights, is of a quantised model, or has an entry of a wrong kind or size.
    """
    where = f"backbone {source!r}: its config"
    for name in ("quantization_config", "compression_config"):  # the second was compressed-tensors' own
        if config.get(name) is not None:
            raise KoffError(f"{where} is of {_quantised(config[name])}: get the unquantised weights")
    if found := [name for name in _FOREIGN if config.get(name) not in (None, False)]:
        raise KoffError(f"{where} {_FOREIGN[found[0]]} ({found[0]}), which a backbone does not do: remove that entry")
    if found := [name for name in _UNKNOWN if config.get(name) not in (None, False)]:
        raise KoffError(f"{where} sets {found[0]}: it {_UNKNOWN[found[0]]}; take another backbone")
    if name := next(filter(_is_no_entry, config), None):
        raise KoffError(f"{where} has an entry {name!r}, which transformers calls and no config sets: remove it")
    for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        if config.get(name) not in (None, *_ATTENTION):
            raise KoffError(
                f"{where} asks for the attention {config[name]!r}, which may be code of others: remove its {name}"
            )
    for name, due in _NEUTRAL.items():
        if config.get(name) not in (None, due):
            raise KoffError(f"{where} sets {name} to {config[name]!r}, which no run can use: remove that entry")
    faults = [wrong_value(config, name, (int,), 1, high) for name, high in _SIZES.items()]
    faults += [wrong_value(config, name, (int, float), low, high) for name, (low, high) in _NUMBERS.items()]
    faults += [wrong_value(config, name, kinds, 0, 0) for name, kinds in _KINDS.items()]
    faults += [_wrong_token(config, name, config.get("vocab_size")) for name in _TOKENS]
    ropes = {name: config.get(name) for name in ("rope_parameters", "rope_scaling")}
    faults += [_wrong_rope(rope, name) for name, rope in ropes.items() if isinstance(rope, Mapping)]
    if fault := next(filter(None, faults), None):
        raise KoffError(f"{where} cannot be used: {fault}")


def _is_no_entry(name: str) -> bool:
    """Whether an entry would take the place of a method of transformers' configs, or of what they work out."""
    from transformers import PreTrainedConfig

    found = getattr_static(PreTrainedConfig, name, None)
    return callable(getattr(found, "__func__", found)) or (isinstance(found, property) and found.fset is None)


def _quantised(about: object) -> str:
    method = about.get("quant_method") if isinstance(about, Mapping) else None
    named = f" ({method})" if isinstance(method, str) else ""
    return f"a quantised model{named}, whose packed weights can be neither cut nor adapted"


def _wrong_token(config: Mapping[str, Any], name: str, size: object) -> str | None:
    """What is wrong with a token's number, where -1 stands for none as null does.

    Beyond the vocabulary there is no token: no text would ever end with such an end token, and nothing would say so.
    """
    value = config.get(name)
    ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
    if any(entry is not None and type(entry) is not int for entry in ids):
        return f"{name} is {kind(value)}"
    given = [entry for entry in ids if entry is not None]
    if odd := [entry for entry in given if not -1 <= entry < _SIZES["vocab_size"]]:
        return f"{name} is {str(odd[0])[:20]}, which is no token's number"
    if type(size) is int and (beyond := [entry for entry in given if entry >= size]):
        rest = f"beyond the {size} rows of the embeddings: set it to null or to a token that is there"
        return f"{name} {beyond[0]} is {rest}"
    return None


def _wrong_rope(rope: Mapping[str, Any], name: str) -> str | None:
    """Scalings as transformers writes them: numbers, but for the name and the lists of longrope; may be nested."""
    for key, value in rope.items():
        if isinstance(value, Mapping):
            fault = _wrong_rope(value, f"{name}.{key}")
        elif key in ("rope_type", "type"):
            fault = wrong_value(rope, key, (str,), 0, 0)
        elif key in ("long_factor", "short_factor", "mrope_section"):
            fault = None if value is None or isinstance(value, list) else f"{key} is {kind(value)}"
        else:
            low = _NUMBERS["rope_theta"][0] if key == "rope_theta" else 1e-9 if "factor" in key else 0
            fault = wrong_value(rope, key, (int, float, bool), low, 1e18)
        if fault:
            return f"{name}: {fault}"
    return None


def check_links(folder: Path) -> None:
    """Raise KoffError if anything below a folder, hidden or not, is a link out of it, or neither file nor folder.

    The hub's own cache keeps a model as links to `blobs` beside its snapshots, which is no way out.
    """
    home = folder.resolve()
    snapshot = next((place for place in (home, *home.parents) if place.parent.name == "snapshots"), None)
    blobs = snapshot.parent.parent / "blobs" if snapshot else home
    for path in sorted(folder.rglob("*")):
        target = Path(os.path.realpath(path))
        if path.is_symlink() and not (target.is_relative_to(home) or target.is_relative_to(blobs)):
            raise KoffError(f"{path} is a link to {os.readlink(path)}, outside the folder: put the file itself there")
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise KoffError(f"{path} is a pipe or a device, which may never end: put a file there, or remove it")


def check_folder(folder: Path, source: str) -> None:
    """Check the files of a model's folder, but for what config and weights say.

    Raises:
        KoffError: Weights lie there twice, outside, in pieces that are not listed, or quantised, or an adapter does.
    """
    check_links(folder)
    if (folder / "generation_config.json").exists():
        own = read_json_object(folder / "generation_config.json")  # transformers leaves out one that it cannot read
        size = read_json_object(folder / "config.json").get("vocab_size") if (folder / "config.json").exists() else None
        if fault := next(filter(None, (_wrong_token(own, name, size) for name in _TOKENS)), None):
            raise KoffError(f"{folder / 'generation_config.json'} cannot be used: {fault}")
    if (folder / "adapter_config.json").exists():
        raise adapter_beside(source)
    if parts := sorted(path.name for path in folder.glob("shard-*-model-*-of-*.safetensors")):
        raise KoffError(f"backbone {source!r}: {parts[0]} is of a sharded checkpoint: save the model in one piece")
    for single in SINGLE:
        index = folder / f"{single}{INDEX}"
        if (folder / single).exists() and index.exists():
            raise KoffError(
                f"backbone {source!r}: {single} lies beside {index.name}, and they may hold different weights: remove "
                "the one that is out of date"
            )
        if index.exists():
            _check_index(index)
        if (folder / single).exists() or index.exists():
            break


def tensors_in(content: bytes, name: str | Path) -> dict[str, Tensor]:
    """The tensors in the content of a safetensors file.

    Raises:
        KoffError: It is none; `name` is the file's, for the message.
    """
    try:
        return load(content)
    except (SafetensorError, KeyError, ValueError) as error:  # a dtype that torch does not have is a KeyError
        raise KoffError(f"{name} is not a sound safetensors file ({error}): get it again") from error


def not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of a tensor that holds NaN or infinity, None if there is none; by its sum, which takes one reading."""
    wide = {name: torch.float64 if tensor.dtype == torch.float64 else torch.float32 for name, tensor in tensors.items()}
    found = (name for name, part in tensors.items() if part.is_floating_point() and part.numel() and not part.is_meta)
    return next((name for name in found if not tensors[name].sum(dtype=wide[name]).isfinite()), None)


def check_tokenizer(folder: Path) -> None:
    """Raise KoffError if a file of a tokenizer's folder is a link out of it, or one with options holds no names."""
    check_links(folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "config.json"):
        content = read_json_object(folder / name) if (folder / name).exists() else {}
        if name == "tokenizer_config.json":
            faults = [wrong_value(content, entry, kinds, 0, math.inf) for entry, kinds in _OF_TOKENIZERS.items()]
            if fault := next(filter(None, [*faults, _named_elsewhere(content)]), None):
                raise KoffError(f"{folder / name} cannot be used: {fault}")
    vocabularies = ("tokenizer.json", "vocab.json", "tekken.json")
    alone = (folder / "tokenizer.model").exists() and not any((folder / name).exists() for name in vocabularies)
    if alone and find_spec("sentencepiece") is None:  # transformers would ask for another package
        raise KoffError(
            f"{folder} holds its tokenizer as tokenizer.model alone, which takes the packages sentencepiece and "
            "protobuf to read: install them, or save it once with them, which writes tokenizer.json"
        )


def _named_elsewhere(content: Mapping[str, Any]) -> str | None:
    """What tokenizer_config.json has transformers read in place of the files beside it."""
    files = content.get("fast_tokenizer_files") or []
    if not isinstance(files, list) or not all(isinstance(file, str) and Path(file).name == file for file in files):
        return f"fast_tokenizer_files is {files!s:.80}, where names of files beside it are due"
    if content.get("init_inputs"):
        return "init_inputs gives the tokenizer's class further arguments: remove that entry"
    for name, value in content.items():
        opened = name in _OPENED or (name.endswith("_file") and name not in _NOT_OPENED)
        if opened and isinstance(value, str) and os.path.exists(value):
            return f"{name} names {value}, which is not a file of this folder: remove that entry"
    return None


def adapter_beside(source: str) -> KoffError:
    """What to say of an adapter among the weights of a model, which transformers would apply without a word."""
    return KoffError(
        f"backbone {source!r}: adapter_config.json lies among its files, so an adapter would change its weights: merge "
        "the adapter into them, or remove its files"
    )


def _check_index(index: Path) -> None:
    """Names of a weight index are of files beside it; each file holds what the index says, and the index says all."""
    content = read_json_object(index)
    names = content.get("weight_map")
    if not isinstance(names, dict) or not names or not isinstance(content.setdefault("metadata", {}), dict):
        raise KoffError(f"{index} has no weight_map of tensors to files: get it again")
    for file in names.values():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or file.startswith("."):
            raise KoffError(f"{index} names {file!r}, which is no file beside it: get it again")
        if not (index.parent / file).is_file():
            raise KoffError(f"{index} names {file}, which is missing: the download is incomplete; get it again")
    if not index.name.startswith("model.safetensors"):
        return
    for file in sorted(set(names.values())):
        listed = {name for name, holder in names.items() if holder == file}
        if odd := sorted(listed ^ set(heads(index.parent / file))):
            fault = "lacks" if odd[0] in listed else "holds, against its index,"
            raise KoffError(f"{index.parent / file} {fault} {odd[0]}: index and weights belong to different models")


def heads(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape of each tensor in a safetensors file, by name.

    Raises:
        KoffError: The file is not sound.
    """
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        if path.exists() and not os.access(path, os.R_OK):  # which safetensors calls "not there"
            raise KoffError(f"cannot read {path}: you may not: correct its rights") from error
        raise KoffError(
            f"cannot load backbone {str(path)!r}: it is not a sound safetensors file ({error}): get it again"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """The files of weights that transformers reads from a folder: safetensors, pickled tensors only without them."""
    for single in SINGLE:
        if (folder / single).exists():
            return [folder / single]
        if (index := folder / f"{single}{INDEX}").exists():
            return sorted({folder / name for name in read_json_object(index)["weight_map"].values()})
    return []


def _pickled_heads(path: Path) -> dict[str, tuple[str, list[int]]]:
    """As `heads`, of a file that torch wrote; none where it cannot be read, which transformers says when it tries."""
    try:
        held = torch.load(path, map_location="meta", weights_only=True, mmap=is_zipfile(path))
    except Exception:  # a file made to do harm can raise anything
        return {}
    tensors = {name: part for name, part in held.items() if isinstance(part, Tensor)} if isinstance(held, dict) else {}
    dtypes = {name: str(part.dtype).removeprefix("torch.") for name, part in tensors.items()}
    return {str(name): (FLOATS_OF_TORCH.get(part.dtype, dtypes[name]), [*part.shape]) for name, part in tensors.items()}


def check_weights(folder: Path, layers: int | None, source: str) -> None:
    """Check what the heads of the files of weights say, before a model of the config's size is made.

    Raises:
        KoffError: A tensor is not of floating point or there twice, or the config speaks of more layers than there are
            tensors.
    """
    read = {True: heads, False: _pickled_heads}
    files = weight_files(folder)
    tensors = {name: head for path in files for name, head in read[path.suffix == ".safetensors"](path).items()}
    places: dict[str, str] = {}
    for name in sorted(tensors):  # with and without the prefix it means the same, and one of two would be dropped
        place = re.sub(r"^(model\.)+", "", name)
        if (other := places.setdefault(place, name)) != name:
            raise KoffError(
                f"backbone {source!r}: its files hold one tensor twice, as {other} and as {name}: keep the right one"
            )
    if odd := sorted(name for name, (dtype, _) in tensors.items() if dtype not in FLOATS):
        raise KoffError(
            f"backbone {source!r}: its weights hold {odd[0]} as {tensors[odd[0]][0]}, as of "
            f"{_quantised(None)}: get the unquantised weights"
        )
    if tensors and layers is not None and layers > len(tensors):
        raise KoffError(
            f"backbone {source!r}: its config speaks of {layers} layers, its files lack them: they hold {len(tensors)} "
            "tensors in all"
        )


def refuse_leftovers(source: str, unexpected: Iterable[str], mismatched: Iterable[object]) -> None:
    """Raise KoffError if files hold tensors that the model of their config has no place for.

    Args:
        source: Folder or hub id, for the message.
        unexpected: Names that the model does not have.
        mismatched: Tensors of another shape.
    """
    left = sorted(unexpected) or sorted(str(entry) for entry in mismatched)
    if left:
        raise KoffError(
            f"backbone {source!r}: its files hold {len(left)} tensors that the model of its config has no place for, "
            f"first {left[0]}: config and weights belong to different models"
        )
