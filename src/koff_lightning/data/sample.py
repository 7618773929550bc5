"""Sampled Chunk Initialisation: the tokens from which a domain's memory starts."""

import zlib

import numpy as np
import torch

from koff_lightning.data.encoding import TokenStream
from koff_lightning.support.errors import KoffError

CHUNK = 64  # tokens taken from one place,
MAX_CHUNKS = 8  # or more where that would take more places than this
SPACING = (64, 16, 4, 1)  # chunks from one place in a document to the next; a smaller one where those are too few


def sampled_chunks(domain: str, stream: TokenStream, num_tokens: int, *, seed: int, start: int | None) -> torch.Tensor:
    """Chunks from several places of the text, in seeded order, [num_tokens].

    The beginnings of documents serve, and of long ones (4,096 tokens or more) also places inside, so that a domain that
    is one book does not start from its title page. The start token `start`, if all documents begin with it (talks as a
    template writes them need not), comes at the very beginning only. The same tokens on every call and every rank.

    Raises:
        KoffError: The text is shorter than `num_tokens`.
    """
    chunk_len = max(CHUNK, -(-num_tokens // MAX_CHUNKS))
    has_bos = start is not None and bool((stream.tokens[stream.starts] == start).all())
    begins, lengths = stream.starts + has_bos, stream.lengths - has_bos  # [D] of the text without BOS
    for spacing in SPACING:
        counts = np.maximum(1, lengths // (spacing * chunk_len))  # [D] places in each document
        number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # of a place in its document
        first = np.repeat(begins, counts) + number * spacing * chunk_len
        end = np.minimum(first + chunk_len, np.repeat(begins + lengths, counts))
        order = np.random.default_rng([seed, zlib.crc32(domain.encode())]).permutation(len(first))
        chunks = [stream.tokens[:1]] if has_bos else []
        chunks.append(stream.tokens[first[order[0]] : end[order[0]]][: chunk_len - has_bos])
        chunks += [stream.tokens[begin:stop] for begin, stop in zip(first[order[1:]], end[order[1:]], strict=True)]
        if (found := sum(map(len, chunks))) >= num_tokens:
            return torch.from_numpy(np.concatenate(chunks)[:num_tokens].astype(np.int64))
    raise KoffError(
        f"the training text of domain '{domain}' is too short for a memory of {num_tokens} slots: chunks of "
        f"{chunk_len} tokens from all of its {len(lengths)} document(s) give {found}. Add text, or take fewer slots"
    )
