"""Calibration text: the same number of training tokens from every domain, for what is measured once and not learned."""

import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from koff_lightning.data.packing import PackedRows, collate
from koff_lightning.support.errors import KoffError


class CalibrationText:
    """Batches of whole training rows, equally many of every domain, drawn without replacement. Never held-out text.

    Args:
        train: Packed training rows by domain; rows that hold padding are left out.
        num_tokens: Tokens of all domains together, rounded up to whole rows of every domain.
        batch_size: Rows per batch.
        seed: Seed of the draw.

    Attributes:
        num_tokens: Tokens of all batches together.

    Raises:
        KoffError: A domain has too little text.
    """

    def __init__(self, train: Mapping[str, PackedRows], num_tokens: int, batch_size: int, seed: int = 0) -> None:
        if num_tokens < 1:
            raise KoffError(f"calibration_tokens must be 1 or more; got {num_tokens}")
        self._train, self._batch_size = train, batch_size
        self._refs: list[tuple[str, int]] = []  # domain and number of each row
        self.num_tokens = 0
        for name, packed in train.items():
            length = packed.tokens.shape[1]
            rows, whole = -(-num_tokens // (len(train) * length)), packed.whole
            if rows > whole:
                raise KoffError(
                    f"domain '{name}' has {whole * length} tokens of training text in whole rows of {length}, "
                    f"calibration wants {rows * length} of each domain: "
                    + (
                        f"give --calibration_tokens {whole * length * len(train)} or less, or longer text"
                        if whole
                        else "give it longer text, or a smaller data.seq_len"
                    )
                )
            order = np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(whole)
            self._refs += [(name, int(row)) for row in np.sort(order[:rows])]
            self.num_tokens += rows * length

    def __len__(self) -> int:
        return -(-len(self._refs) // self._batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for first in range(0, len(self._refs), self._batch_size):
            refs = self._refs[first : first + self._batch_size]
            yield collate([(name, self._train[name], row) for name, row in refs])


def most_tokens(train: Mapping[str, PackedRows]) -> int:
    """Tokens in whole rows of the domain that has the fewest."""
    return min(packed.whole * packed.tokens.shape[1] for packed in train.values())
