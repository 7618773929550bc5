"""Tokens of the text that ships with the package, kept on the disk from the first run on.

Tokenising it takes longer than all steps of a short run, and it is always the same text. It is small, so no one needs
to ask for it with `koff prepare`, which is for text of one's own. What cannot be kept is made each time.
"""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from koff_lightning.data.encoding import TokenStream, makers, tokenize
from koff_lightning.data.sources import DomainSource
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import own_cache, replacing

Tokenise = Callable[[Sequence[str], PreTrainedTokenizerBase, bool], TokenStream]


def tokens_of(source: DomainSource) -> Tokenise:
    """How the text of a source is tokenised: with what earlier runs have kept, where all of it is bundled."""
    return kept_tokens if len(source.bundled_entries) == len(source.entries) else tokenize


def kept_tokens(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, append_eos: bool = False) -> TokenStream:
    """As `tokenize`, from $KOFF_CACHE/bundled if it is there, and put there if it is not."""
    if not tokenizer.is_fast:  # it does not say what it is made of
        return tokenize(texts, tokenizer, append_eos)
    try:
        file = own_cache() / "bundled" / f"{_key(texts, tokenizer, append_eos)}.npz"
    except KoffError:  # there is no place
        return tokenize(texts, tokenizer, append_eos)
    with suppress(Exception):  # a damaged file raises whatever its damage leads to, some of a dozen kinds
        return _read(file)
    stream = tokenize(texts, tokenizer, append_eos)
    with suppress(OSError):
        _write(file, stream)
    return stream


def _key(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, append_eos: bool) -> str:
    """A hash of all that the tokens depend on, our code and the libraries' versions included."""
    about = (makers(), append_eos)
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    digest = hashlib.sha256(f"{about} {special} {tokenizer.backend_tokenizer.to_str()}".encode())
    for text in texts:
        raw = text.encode()
        digest.update(len(raw).to_bytes(8, "little"))
        digest.update(raw)
    return digest.hexdigest()[:32]


def _read(file: Path) -> TokenStream:
    """What was written; zip files tell by their sums where they are damaged."""
    with file.open("rb") as raw, np.load(raw) as held:
        return TokenStream(**{name: held[name] for name in held.files})


def _write(file: Path, stream: TokenStream) -> None:
    """In full or not at all; of two processes that write the same each may be the one."""
    with replacing(file) as part, part.open("wb") as out:
        np.savez(out, **asdict(stream))
