"""Text -> token ids: of documents, which a model is trained and scored on, and of prompts, which it continues.

One rule for both: the tokenizer's start token comes first, once, if the tokenizer has one, and no end token follows.
The special tokens that a tokenizer adds by itself are not used: after an end token behind a prompt a model would go on
with another text, and if training has a start token, prompts must have one too.
"""

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchEncoding, PreTrainedTokenizerBase

from koff_lightning import __version__
from koff_lightning.data.token_bytes import bytes_of_first, bytes_of_unknown, unread
from koff_lightning.loading import tokenizer_hash
from koff_lightning.support.errors import KoffError
from koff_lightning.support.time_limit import within

CODE = Path(__file__).parent
TEXTS_PER_CALL = 1024  # large enough to keep all cores of a fast tokenizer busy, small enough for its Python lists
# Characters that are tokenised at once, and those of one document: tokenizers take some 160 bytes of memory for each.
CHARACTERS_PER_CALL, LONGEST_PART = 2**20, 2**19
# Seconds of a call of a tokenizer, and more for each character: a hundred times what slow ones take.
SECONDS, SECONDS_PER_CHARACTER = 10.0, 1e-4


@dataclass(frozen=True)
class TokenStream:
    """Tokenised documents, joined end to end."""

    tokens: NDArray[np.int32]  # [N]
    lengths: NDArray[np.int64]  # [D] tokens of each document, 2 or more
    num_bytes: NDArray[np.int64]  # [D] UTF-8 bytes of each document's text that is predicted and known
    # [D] UTF-8 bytes of each document's text that became the unknown token, or no token; empty if not counted
    unknown_bytes: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    # [N] False for tokens that are not to be predicted, as a talk's questions; empty if all are
    predicted: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))

    @property
    def starts(self) -> NDArray[np.int64]:
        """Index of each document's first token, [D]."""
        return np.cumsum(self.lengths) - self.lengths


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that a text's tokens depend on, special tokens included."""
    what = f"{tokenizer.bos_token_id} {tokenizer.pad_token_id} {tokenizer_hash(tokenizer)}"
    return hashlib.sha256(what.encode()).hexdigest()[:16]


def makers() -> list[str]:
    """The code that makes rows of text: clones of one release, and environments of other libraries, share the cache."""
    code = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(CODE.glob("*.py"))))
    return [__version__, code.hexdigest(), tokenizers.__version__, transformers.__version__]


def start_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token ids before every document and every prompt: the start token, or none."""
    return [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]


def opening(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The start token, if the tokenizer itself puts it before text: then its model has seen it before all text.

    None if the start token only separates documents, as SmolLM2's, or if there is none, as in Qwen.
    """
    start = tokenizer.bos_token_id
    ids, plain = (encode(tokenizer, "a", add_special_tokens=added)["input_ids"] for added in (True, False))
    return start if start is not None and ids[: 1 + len(plain)] == [start, *plain] else None


def encode(tokenizer: PreTrainedTokenizerBase, text: str | list[str], **options: Any) -> BatchEncoding:
    """Call the tokenizer on one text or several, in bounded time.

    A tokenizer.json from anyone may hold a regular expression that backtracks without end: the library stops that after
    ten million steps, but starts again at the next character.

    Args:
        tokenizer: Of the backbone.
        text: What to encode; a long text in parts, as `tokenize` makes them.
        options: Of the tokenizer's call.

    Raises:
        KoffError: It takes a hundred times as long as slow tokenizers do, or the text is not valid Unicode.
    """
    size = len(text) if isinstance(text, str) else sum(map(len, text))

    def too_long() -> KoffError:
        return KoffError(
            f"the tokenizer has not encoded {size:,} characters after {limit:.0f} s of processor time: a pattern in "
            "its tokenizer.json goes back and forth over the text; take the tokenizer from its maker anew"
        )

    limit = SECONDS + SECONDS_PER_CHARACTER * size
    try:
        return within(limit, partial(tokenizer, text, **options), too_long)
    except TypeError as error:  # of the library; Python keeps bytes of the command line that are no UTF-8 in this way
        if not re.search("[\ud800-\udfff]", text if isinstance(text, str) else "".join(text)):
            raise
        raise KoffError("the text holds what is no character (bytes that are no UTF-8): write it in UTF-8") from error


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of text that a model is to continue: the start token once, the text, no end token.

    Special tokens in the text are recognised, as chat templates write them. So if the text begins with the start token,
    no second one is put before it.
    """
    ids, start = encode(tokenizer, text, add_special_tokens=False, verbose=False)["input_ids"], start_tokens(tokenizer)
    return ids if ids[: len(start)] == start else start + ids


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, each [B, T], padded on the left; see `encode_prompt`.

    Raises:
        KoffError: A prompt of no tokens, or no list of texts.
    """
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise KoffError(f"prompts must be a list of texts, one or more; got {str(prompts)[:40]!r}")
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    if empty := [number for number, row in enumerate(rows, 1) if not row]:
        raise KoffError(
            f"prompt {empty[0]} is empty, and this tokenizer has no start token to put before it: give some text"
        )
    return left_padded(rows, tokenizer.pad_token_id or 0)  # masked, so any token will do


def left_padded(rows: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and mask, each [B, T], of rows of any lengths, padded on the left."""
    ids = pad_sequence([torch.tensor(row) for row in rows], True, pad, "left")
    return ids, pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], True, 0, "left")


def encode_and_count(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], int]:
    """Token ids of a text without special tokens, and how many of its UTF-8 bytes the tokenizer does not know."""
    encoded = encode(tokenizer, text, add_special_tokens=False)
    ids = encoded["input_ids"]
    return ids, sum(bytes_of_unknown(text, ids, encoded, 0, tokenizer, unread(tokenizer)))


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, append_eos: bool = False) -> TokenStream:
    """Tokenise documents; each begins with the start token, if the tokenizer has one.

    What looks like a special token in a document (`</s>` in HTML) is text. A document of a single token predicts
    nothing and is left out. Documents of more than `LONGEST_PART` characters are tokenised in parts, to bound memory.

    `num_bytes` counts only what is predicted. Without a start token that leaves out the bytes of the first token, even
    if it is a part of a character. It also leaves out bytes that the tokenizer does not know: those that became the
    unknown token, whose prediction still costs nats, so that text that cannot be read never looks well predicted; and
    those that a tokenizer without an unknown token drops.

    Args:
        texts: The documents.
        tokenizer: Tokenizer of the backbone.
        append_eos: Put the end token behind each document, if there is one; it stands for no bytes.
    """
    start = start_tokens(tokenizer)
    end = [tokenizer.eos_token_id] if append_eos and tokenizer.eos_token_id is not None else []
    pieces: list[list[NDArray[np.int32]]] = [[] for _ in texts]  # the tokens of each document, in parts
    num_bytes, unknown_bytes = np.zeros((2, len(texts)), np.int64)
    there = unread(tokenizer)

    def take_in(call: list[tuple[int, str]]) -> None:
        """Tokenise the texts of a call. A function, so that the tokenizer's output is freed before the next call."""
        encoded = encode(
            tokenizer,
            [part for _, part in call],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )
        for number, ((document, part), ids) in enumerate(zip(call, encoded["input_ids"], strict=True)):
            is_first = not (start or pieces[document])  # the part's first token is not predicted
            given = bytes_of_first(part, ids, encoded, number, tokenizer, there) if is_first and ids else 0
            unknown = bytes_of_unknown(part, ids, encoded, number, tokenizer, there)
            unknown_bytes[document] += sum(unknown)
            in_both = is_first and bool(ids) and ids[0] == there.token
            num_bytes[document] += len(part.encode()) - given - sum(unknown[in_both:])
            pieces[document].append(np.array(ids, dtype=np.int32))

    for call in _calls(texts):
        take_in(call)
    lengths = np.array([len(start) + sum(map(len, parts)) for parts in pieces], dtype=np.int64)
    kept = np.flatnonzero(lengths >= 2)
    around = np.array(start, np.int32), np.array(end, np.int32)
    tokens = [piece for document in kept for piece in (around[0], *pieces[document], around[1])]
    return TokenStream(
        tokens=np.concatenate(tokens) if tokens else np.zeros(0, np.int32),
        lengths=lengths[kept] + len(end),
        num_bytes=num_bytes[kept],
        unknown_bytes=unknown_bytes[kept],
    )


def _calls(texts: Sequence[str]) -> Iterator[list[tuple[int, str]]]:
    """Yield groups of (index of the document, text) to tokenise in one call; long documents in parts."""
    call: list[tuple[int, str]] = []
    size = 0
    for document, text in enumerate(texts):
        for part in _parts(text):
            if call and (len(call) == TEXTS_PER_CALL or size + len(part) > CHARACTERS_PER_CALL):
                yield call
                call, size = [], 0
            call.append((document, part))
            size += len(part)
    if call:
        yield call


def _parts(text: str) -> Iterator[str]:
    """A text in parts of at most `LONGEST_PART` characters, cut where a line begins, else where a word ends."""
    first = 0
    while len(text) - first > LONGEST_PART:
        limit = first + LONGEST_PART
        line, word = text.rfind("\n", first + 1, limit) + 1, text.rfind(" ", first + 1, limit)
        cut = line if line > first else word if word > first else limit
        yield text[first:cut]
        first = cut
    yield text[first:] if first else text


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> None:
    """Raise KoffError for a tokenizer with ids for which the backbone has no embedding."""
    beyond = {number: token for token, number in tokenizer.get_vocab().items() if number >= num_embeddings}
    if beyond:
        first = min(beyond)
        raise KoffError(
            f"the tokenizer does not match the backbone: it has ids up to {max(beyond)}, the backbone embeds "
            f"{num_embeddings} tokens, so {beyond[first]!r} ({first}) has no row. Leave data.tokenizer unset to use "
            "the backbone's own; if that is the one, take the token out of its files (tokenizer_config.json, "
            "tokenizer.json), or save the tokenizer that the model was trained with beside it"
        )
