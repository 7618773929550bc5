"""The head of a GGUF file as it comes from anyone: what it says of its model, checked before anything else reads it.

transformers takes sizes and weights from it, and neither the scaling of the rotary embedding nor tensors that its table
does not name. Both are read, or refused, here. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from koff_lightning.support.errors import KoffError

ROPE_FREQS = "rope_freqs.weight"  # [head_dim / 2], what the inverse frequencies are divided by
_LARGEST_HEAD = 2**28  # bytes; vocabularies of 250,000 tokens take 10 MiB
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOAT32 = 0

# What the metadata of an architecture may say: sizes, which transformers reads, and scalings, which are read here.
_SIZES = ("context_length", "block_count", "feed_forward_length", "embedding_length", "vocab_size", "rope.freq_base")
_SIZES += ("rope.dimension_count", "attention.head_count", "attention.head_count_kv")
_SIZES += ("attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length")
_WINDOW = "attention.sliding_window"  # transformers reads that of Gemma 3, and of no other family here
# For what is missing of these transformers takes defaults of its own, which need not be llama.cpp's.
_NEEDED = ("block_count", "embedding_length", "feed_forward_length", "attention.layer_norm_rms_epsilon")
_NEEDED += ("attention.head_count", "attention.head_count_kv")
_SCALING = ("type", "factor", "original_context_length", "attn_factor", "yarn_beta_fast", "yarn_beta_slow", "finetuned")
# Parts of names that change what a model computes: entries with one that are not in these lists are refused.
_MATTERS = ("rope", "attention", "expert", "scale", "softcap", "window", "norm", "ssm")


@dataclass(frozen=True)
class GgufHead:
    """Head of a GGUF file: what stands before the weights.

    Args:
        metadata: Its entries; of an array only its length.
        tensors: Name -> dimensions, the fastest first.
        rope_freqs: The factors of the rotary embedding, double [head_dim / 2]; None where it has none.
    """

    metadata: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    rope_freqs: np.ndarray | None

    @property
    def family(self) -> str:
        """Architecture of the model, such as llama."""
        return str(self.metadata.get("general.architecture"))

    def own(self, name: str) -> Any:
        """An entry of its architecture; None where it has none."""
        return self.metadata.get(f"{self.family}.{name}")


class _Reader:
    """A position in the head; every step is checked against the end of the file."""

    def __init__(self, content: bytes) -> None:
        self.content, self.at = content, 0

    def take(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{form}")
        if self.at + size > len(self.content):
            raise ValueError("it ends within its head")
        self.at += size
        return struct.unpack_from(f"<{form}", self.content, self.at - size)

    def text(self) -> str:
        (length,) = self.take("Q")
        if length > len(self.content) - self.at:
            raise ValueError("a text in its head goes beyond its end")
        self.at += length
        return self.content[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.take(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"it holds a value of the unknown type {kind}")
        entry, count = self.take("IQ")
        if count > len(self.content) - self.at or entry == _ARRAY:
            raise ValueError("an array in its head goes beyond its end, or holds arrays")
        if entry in _SCALARS:
            size = count * struct.calcsize(f"<{_SCALARS[entry]}")
            if size > len(self.content) - self.at:
                raise ValueError("an array in its head goes beyond its end, or holds arrays")
            self.at += size
        else:
            for _ in range(count):
                self.value(entry)
        return count


def read_head(path: Path) -> GgufHead:
    """Read and check the head of a GGUF file.

    Raises:
        KoffError: It is no GGUF, is cut off, or its head says what cannot be.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            content = file.read(_LARGEST_HEAD)
    except OSError as error:
        raise KoffError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return _head(_Reader(content), path, size)
    except (ValueError, struct.error) as error:
        raise KoffError(
            f"cannot load backbone {str(path)!r}: it is no sound GGUF file ({error}): get it again"
        ) from error


def _head(reader: _Reader, path: Path, size: int) -> GgufHead:
    if reader.take("4s") != (b"GGUF",):
        raise ValueError("it does not begin as one")
    version, tensors, entries = reader.take("IQQ")
    if version not in (2, 3):
        raise ValueError(f"it is of version {version}, 2 and 3 are read")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        name = reader.text()
        if name in metadata:
            raise ValueError(f"it says {name} twice")
        metadata[name] = reader.value(reader.take("I")[0])
    places: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name, (count,) = reader.text(), reader.take("I")
        if count > 4 or name in places:
            raise ValueError(f"tensor {name} has {count} dimensions, or is there twice")
        dims = reader.take(f"{count}Q")
        places[name] = (dims, *reader.take("IQ"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**16:
        raise ValueError(f"it aligns its tensors at {alignment}")
    start = -(-reader.at // alignment) * alignment
    for name, (dims, kind, offset) in places.items():
        if start + offset + _bytes(name, dims, kind) > size:
            raise ValueError(f"tensor {name} goes beyond its end")
    return GgufHead(metadata, {name: dims for name, (dims, *_) in places.items()}, _freqs(path, start, places))


def _bytes(name: str, dims: tuple[int, ...], kind: int) -> int:
    """Size of a tensor in the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except ValueError:
        raise ValueError(f"tensor {name} is of the unknown type {kind}") from None
    if not dims or min(dims) < 1 or dims[0] % block:
        raise ValueError(f"tensor {name} has the dimensions {list(dims)}")
    return math.prod(dims) // block * size


def _freqs(path: Path, start: int, places: Mapping[str, tuple[tuple[int, ...], int, int]]) -> np.ndarray | None:
    if ROPE_FREQS not in places:
        return None
    dims, kind, offset = places[ROPE_FREQS]
    if kind != _FLOAT32 or len(dims) != 1:
        raise ValueError(f"{ROPE_FREQS} is not a row of 32-bit numbers")
    values = np.fromfile(path, dtype="<f4", count=dims[0], offset=start + offset).astype(np.float64)
    if not (np.isfinite(values) & (values > 0)).all():
        raise ValueError(f"{ROPE_FREQS} holds numbers that divide nothing")
    return values


def check_head(head: GgufHead, source: str) -> None:
    """Raise KoffError if the metadata says what no model here computes, or the weights lie in several files."""
    pre, said = f"{head.family}.", f"backbone {source!r}: its metadata"
    sizes = (*_SIZES, _WINDOW) if head.family == "gemma3" else _SIZES
    for name in head.metadata:
        own, scaling = name.removeprefix(pre), name.removeprefix(f"{pre}rope.scaling.")
        known = own in sizes or scaling in _SCALING
        if name.startswith(pre) and not known and any(part in own for part in _MATTERS):
            raise KoffError(f"{said} has {name}, which is not supported: take the model's safetensors")
        if name.startswith(pre) and known and own in sizes and not _is_number(head.metadata[name]):
            raise KoffError(f"{said} says {head.metadata[name]!r} for {name}, where a number is due")
    if (count := head.metadata.get("split.count", 0)) not in (0, 1):
        raise KoffError(f"backbone {source!r} is one of {count} files: join them with llama-gguf-split --merge")
    if odd := [name for name in head.tensors if name.startswith(("rope_factors", "blk.0.rope_factors"))]:
        raise KoffError(
            f"backbone {source!r}: {odd[0]} scales its rotary embedding by length (longrope), not supported"
        )
    if head.own("attention.key_length") != head.own("attention.value_length"):
        raise KoffError(f"{said} gives keys and values different lengths, which is not supported")


def check_sizes(head: GgufHead, source: str) -> None:
    """Raise KoffError if the metadata of a supported model lacks what transformers would guess."""
    needed = (*_NEEDED, _WINDOW, "rope.freq_base") if head.family == "gemma3" else _NEEDED
    if missing := [name for name in needed if head.own(name) is None]:
        raise KoffError(
            f"backbone {source!r}: its metadata lacks {head.family}.{missing[0]}, without which its numbers are not "
            "known: get the file again"
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def rope_parameters(head: GgufHead, theta: float, size: int, source: str) -> dict[str, Any]:
    """The rotary embedding as transformers' config describes it, scaling included.

    Args:
        head: Head of the file.
        theta: Base of the frequencies.
        size: Dimensions of a head.
        source: Name of the file, for messages.

    Raises:
        KoffError: A scaling that cannot be read.
    """
    kind = head.own("rope.scaling.type")
    factor = head.own("rope.scaling.factor")
    plain = {"rope_type": "default", "rope_theta": theta}
    where = f"backbone {source!r}: the scaling of its rotary embedding"
    if (dims := head.own("rope.dimension_count")) not in (None, size):
        raise KoffError(f"{where} covers {dims} of {size} dimensions, which is not supported: take its safetensors")
    if head.rope_freqs is not None:
        if kind not in (None, "none"):
            raise KoffError(f"{where} is told twice, by {ROPE_FREQS} and as {kind!r}: take its safetensors")
        return plain | _llama3(head.rope_freqs, theta, size, where)
    if kind in (None, "none") or (
        kind in ("linear", "yarn") and factor == 1 and head.own("rope.scaling.attn_factor") is None
    ):
        if kind in (None, "none") and factor not in (None, 1.0):
            raise KoffError(f"{where} has a factor, {factor}, and no type: take its safetensors")
        return plain
    if kind not in ("linear", "yarn") or not _is_number(factor):
        raise KoffError(f"{where} is {kind!r} with factor {factor}; linear and yarn are read: take its safetensors")
    if kind == "linear":
        return plain | {"rope_type": "linear", "factor": float(factor)}
    return plain | _yarn(head, float(factor), where)


def _yarn(head: GgufHead, factor: float, where: str) -> dict[str, Any]:
    """In llama.cpp cos and sin are multiplied by attn_factor (1 + 0.1 ln factor), all of it transformers' factor."""
    parts = {name: head.own(f"rope.scaling.{name}") for name in _SCALING if name not in ("type", "factor", "finetuned")}
    if odd := [name for name, value in parts.items() if value is not None and not _is_number(value)]:
        raise KoffError(f"{where} gives {parts[odd[0]]!r} for {odd[0]}")
    if parts["original_context_length"] is None:
        raise KoffError(f"{where} is yarn without an original_context_length: take its safetensors")
    found: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    found["original_max_position_embeddings"] = int(parts["original_context_length"])
    for name in ("beta_fast", "beta_slow"):
        if parts[f"yarn_{name}"] is not None:
            found[name] = float(parts[f"yarn_{name}"])
    if parts["attn_factor"] is not None:
        found["attention_factor"] = float(parts["attn_factor"]) * (1 + 0.1 * math.log(factor))
    return found


def _llama3(freqs: np.ndarray, theta: float, size: int, where: str) -> dict[str, Any]:
    """The scaling of Llama 3 that gives these factors: the file holds what comes of it, a config its parameters."""
    if len(freqs) != size // 2:
        raise KoffError(f"{where} has {len(freqs)} factors for {size // 2} frequencies: get the file again")
    factor = float(round(float(freqs.max()), 3))
    if np.allclose(freqs, 1):
        return {}
    turns = theta ** -(np.arange(0, size, 2) / size) / (2 * math.pi)  # per position
    for original in (8192, *(2**power for power in range(4, 21))):
        smooth = np.clip((original * turns - 1) / (4 - 1), 0, 1)  # low_freq_factor 1, high_freq_factor 4
        if np.allclose(1 / ((1 - smooth) / factor + smooth), freqs, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": original,
            }
    raise KoffError(f"{where} ({ROPE_FREQS}) is not that of Llama 3, so no config can tell it: take its safetensors")


def expected_tensors(names: list[str], layers: int, family: str) -> set[str]:
    """The names in a GGUF of the tensors of a model, from their names in transformers."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    arch = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == family)
    table = get_tensor_name_map(arch, layers)
    found = {table.get_name(name, try_suffixes=(".weight", ".bias")) for name in names}
    return {name for name in found if name is not None} | {ROPE_FREQS}
