"""Sampled Chunk Initialisation: the tokens from which a domain's memory starts."""

import zlib

import numpy as np
import torch

from koff_lightning.data.packing import TokenStream
from koff_lightning.support.errors import KoffError

CHUNK = 64  # tokens taken from one document,
MAX_CHUNKS = 8  # or more where that would take more documents than this


def beginnings(domain: str, stream: TokenStream, num_tokens: int, *, seed: int, has_bos: bool) -> torch.Tensor:
    """Chunks from the beginnings of several documents, in seeded order, [num_tokens].

    BOS (if the tokenizer has one) comes at the very beginning only. The same tokens on every call and every rank.

    Raises:
        KoffError: The text is shorter than `num_tokens`.
    """
    chunk_len = max(CHUNK, -(-num_tokens // MAX_CHUNKS))
    order = np.random.default_rng([seed, zlib.crc32(domain.encode())]).permutation(len(stream.lengths))
    chunks: list[np.ndarray] = []
    for first, length in zip(stream.starts[order], stream.lengths[order], strict=True):
        skip = int(has_bos and len(chunks) > 0)
        chunks.append(stream.tokens[first + skip : first + min(length, skip + chunk_len)])
        if sum(map(len, chunks)) >= num_tokens:
            return torch.from_numpy(np.concatenate(chunks)[:num_tokens].astype(np.int64))
    raise KoffError(
        f"the training text of domain '{domain}' is too short for a memory of {num_tokens} slots: chunks of "
        f"{chunk_len} tokens from all of its {len(order)} document(s) give {sum(map(len, chunks))}. "
        "Add text, or take fewer slots"
    )
