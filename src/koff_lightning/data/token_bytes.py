"""Which bytes of a text its tokens stand for, and which of them a tokenizer does not know."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

_SIGN = "\U00012000"  # a cuneiform sign, which is in no vocabulary
BYTE_LEVEL = {sign: byte for byte, sign in bytes_to_unicode().items()}  # byte-level BPE's letters -> bytes


@dataclass(frozen=True)
class Unread:
    """What a tokenizer does with characters that it does not know.

    Args:
        token: Id of its unknown token; None if it has none.
        left_out: Whether it drops them.
    """

    token: int | None
    left_out: bool


def unread(tokenizer: PreTrainedTokenizerBase) -> Unread:
    """What a tokenizer does with characters that it does not know: found out by trying a rare one.

    Its attributes are no help: a model may have an unknown token that they do not name, or lack the one they name.
    """
    ids, known = tokenizer(_SIGN, add_special_tokens=False)["input_ids"], _SIGN.encode()
    raw = [piece.strip() for piece in pieces_of(tokenizer, ids)]
    if b"".join(raw) == known:  # by its bytes
        return Unread(tokenizer.unk_token_id, left_out=False)
    odd = [token for token, piece in zip(ids, raw, strict=True) if piece not in known]
    return Unread(odd[0], left_out=False) if odd else Unread(None, left_out=True)


def bytes_of_first(
    text: str, ids: list[int], encoded: BatchEncoding, number: int, tokenizer: PreTrainedTokenizerBase, there: Unread
) -> int:
    """UTF-8 bytes of the text that its first token covers, without the space that some tokenizers put first."""
    raw = pieces_of(tokenizer, ids[:1])[0]
    if there.left_out:  # before it too
        return len(raw.lstrip())
    if len(ids) == 1:
        return len(text.encode())
    if not tokenizer.is_fast:
        whole = text.encode()
        return next((len(part) for part in (raw, raw.lstrip()) if whole.startswith(part)), len(raw.lstrip()))
    one, two = encoded.token_to_chars(number, 0), encoded.token_to_chars(number, 1)
    before = len(text[: two.start].encode())
    if two.start >= one.end:
        return before
    shared = text[two.start].encode()  # the character that both tokens have a part in
    part = next((n for n in range(len(shared) - 1, 0, -1) if raw.endswith(shared[:n])), 0)
    if part == 0 and raw.strip():  # a tokenizer that rewrites characters: no byte of this one is surely predicted
        part = len(shared)
    return before + part


def bytes_of_unknown(
    text: str, ids: list[int], encoded: BatchEncoding, number: int, tokenizer: PreTrainedTokenizerBase, there: Unread
) -> list[int]:
    """UTF-8 bytes of the text that each unknown token replaces, in order; if they are dropped, all in one number."""
    if there.left_out:
        size = sum(map(len, text.encode().split()))  # of white space some leave all out, and lose nothing
        return [max(0, size - sum(len(part) for raw in pieces_of(tokenizer, ids) for part in raw.split()))]
    places = [] if there.token is None else [place for place, token in enumerate(ids) if token == there.token]
    if not places:
        return []
    if not tokenizer.is_fast:  # it does not say where a token lies: what the known ones do not account for
        known = sum(map(len, pieces_of(tokenizer, [token for token in ids if token != there.token])))
        return [max(0, len(text.encode()) - known)] + [0] * (len(places) - 1)
    spans = [encoded.token_to_chars(number, place) for place in places]
    return [len(text[span.start : span.end].encode()) for span in spans]


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[bytes]:
    """The bytes of each token; empty for ids that the tokenizer has no entry for.

    A vocabulary is byte-level if it has byte-level BPE's sign for a space; else its letters are just letters.
    """
    by_bytes = not tokenizer.is_fast or tokenizer.backend_tokenizer.token_to_id("Ġ") is not None
    return [_raw(piece or "", by_bytes) for piece in tokenizer.convert_ids_to_tokens(list(ids))]


def _raw(piece: str, by_bytes: bool = True) -> bytes:
    """The bytes of a vocabulary's entry, in any of the three ways in which vocabularies write bytes."""
    if byte := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(byte[1])
    if by_bytes and all(sign in BYTE_LEVEL for sign in piece):
        return bytes(BYTE_LEVEL[sign] for sign in piece)
    return piece.replace("▁", " ").encode()
