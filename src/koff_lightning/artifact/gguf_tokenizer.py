"""A tokenizer as llama.cpp reads it from a GGUF: vocabulary, merges, special tokens, and how it splits a text first.

llama.cpp knows pre-tokenizers by name only, each with a pattern of its own in its source. One that has no name there
would give other tokens without a word, so it is refused.
"""

import json
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase

from koff_lightning.support.errors import KoffError

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_TEKKEN += r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_TEKKEN += r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKS = r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"

_Steps = tuple[tuple[str, str | bool], ...]
_BYTES: _Steps = (("ByteLevel", False),)
_GPT2: _Steps = (("ByteLevel", True),)
# (steps, whether words of the vocabulary skip the merges) -> llama.cpp's name (src/llama-vocab.cpp). koff-tiny splits
# as Qwen 3.5 does: the two patterns differ in how they are written, not in what they match.
_NAMES: dict[tuple[_Steps, bool], str] = {
    (_GPT2, False): "gpt-2",
    ((("Digits", True), *_GPT2), False): "smollm",
    ((("Split", _WORDS + r"|\p{N}" + _REST), *_BYTES), False): "qwen2",
    ((("Split", _WORDS + r"|\p{N}{1,3}" + _REST), *_BYTES), True): "llama-bpe",
    ((("Split", _WORDS + r"|\p{N}{1,3}" + _REST), *_BYTES), False): "smaug-bpe",
    ((("Split", _TEKKEN), *_BYTES), True): "tekken",
    ((("Split", rf"'(?i:[sdmt]|ll|ve|re)|{_MARKS}|\s*[\r\n]|\s+(?!\S)|\s+"), *_BYTES), False): "qwen35",
}


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise KoffError, as `write_tokenizer` would, where llama.cpp would tokenise a text otherwise."""
    _pre_tokenizer(_content(tokenizer))
    _around(tokenizer)


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int, ends: list[int]) -> str:
    """Add a tokenizer to the metadata of a GGUF.

    Args:
        writer: Writer of the file.
        tokenizer: The backbone's.
        size: Rows of the embedding; ids without a token get a name that no text has.
        ends: Ids that end a text, by the model's generation config.

    Returns:
        llama.cpp's name of its pre-tokenizer.

    Raises:
        KoffError: llama.cpp would tokenise a text otherwise, or a GGUF cannot hold this kind of tokenizer.
    """
    content = _content(tokenizer)
    name = _pre_tokenizer(content)
    model, added = content["model"], {token["id"]: token for token in content["added_tokens"]}
    tokens = {number: token for token, number in model["vocab"].items()}
    tokens |= {number: token["content"] for number, token in added.items()}
    if (beyond := max(tokens)) >= size:
        raise KoffError(f"the tokenizer has a token {beyond}, the model's embedding only {size} rows")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([tokens.get(number, f"[PAD{number}]") for number in range(size)])
    writer.add_token_types([_kind(number, tokens, added) for number in range(size)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    first, last = _around(tokenizer)
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)
    for kind in ("bos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(number)
    ends = list(dict.fromkeys([*([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]), *ends]))
    adds = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)  # a file has room for three
    for number, add in zip(ends, adds, strict=False):
        add(number)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)
    return name


def _content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    if not tokenizer.is_fast:
        raise KoffError("a tokenizer without tokenizer.json cannot be written to a GGUF: convert it with transformers")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    kind, bytes_too = content["model"]["type"], content["model"].get("byte_fallback")
    if kind != "BPE" or bytes_too:
        kind = f"{kind} with byte fallback" if bytes_too else kind
        raise KoffError(
            f"a GGUF is written with byte-level BPE only, this tokenizer is {kind} (SentencePiece): use another engine"
        )
    normalizer = (content["normalizer"] or {}).get("type")
    if normalizer not in (None, "NFC"):  # that of Qwen, which llama.cpp leaves out everywhere
        raise KoffError(f"llama.cpp has no normalizer {normalizer!r}, as this tokenizer has: use another engine")
    return content


def _pre_tokenizer(content: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer splits a text before it merges."""
    whole = content["pre_tokenizer"] or {"type": "none"}
    parts = whole["pretokenizers"] if whole["type"] == "Sequence" else [whole]
    steps = tuple(_step(part) for part in parts)
    name = _NAMES.get((steps, bool(content["model"].get("ignore_merges"))))
    if name is None:
        raise KoffError(
            "llama.cpp has no name for this tokenizer's pre-tokenizer, so a text would become other tokens there: "
            f"{json.dumps([list(step) for step in steps])[:400]}; known are {', '.join(_NAMES.values())}"
        )
    return name


def _step(part: dict[str, Any]) -> tuple[str, str | bool]:
    kind = part["type"]
    if kind == "Split" and part["behavior"] == "Isolated" and not part["invert"]:
        return kind, part["pattern"].get("Regex", "")
    if kind == "Digits":
        return kind, part["individual_digits"]
    if kind == "ByteLevel" and not part["add_prefix_space"]:
        return kind, part["use_regex"]
    return kind, json.dumps(part)


def _kind(number: int, tokens: dict[int, str], added: dict[int, dict[str, Any]]) -> gguf.TokenType:
    if number not in tokens:
        return gguf.TokenType.UNUSED
    if number not in added:
        return gguf.TokenType.NORMAL
    return gguf.TokenType.CONTROL if added[number]["special"] else gguf.TokenType.USER_DEFINED


def _around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the start token comes before a text by itself, and the end token after it."""
    bare = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    for first in (False, True):
        for last in (False, True):
            start, end = [tokenizer.bos_token_id] * first, [tokenizer.eos_token_id] * last
            if whole == start + bare + end:
                return first, last
    raise KoffError(f"llama.cpp puts at most the start and the end token around a text, this tokenizer makes {whole}")
