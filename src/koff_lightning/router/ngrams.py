"""Texts told apart by their byte n-grams: hashed counts and a linear model. No tokenizer, no download, any script.

What a text becomes, so that another program can read the files:

    bytes   the first `BYTES` bytes of its UTF-8
    hash    of every n-gram of 1 to `LONGEST` bytes FNV-1a in 32 bits (offset 2166136261, prime 16777619; source:
            draft-eastlake-fnv), folded to BITS bits: (h >> BITS) ^ (h & (2 ** BITS - 1)), again modulo 2 ** BITS
    value   log(1 + how often the bucket was hit), all buckets together scaled to length 1 in the Euclidean norm
    chance  of each domain sigmoid(weight [D, 2 ** BITS] times the values, plus bias [D])

Each domain is told from all others together, so a text may be like none of them. A softmax over the domains has to
share one out: of a router that knew no Chinese it sent all Chinese somewhere, with as much confidence as its own text.

Shapes: N texts, D domains, F = 2 ** BITS buckets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LONGEST, BITS, BYTES = 4, 16, 4096
_OFFSET, _PRIME = np.uint32(2166136261), np.uint32(16777619)
PENALTY = 0.01  # inverse of scikit-learn's C: weak, since held-out text is told apart best so


@dataclass(frozen=True)
class NgramClassifier:
    """A linear model over hashed n-grams.

    Args:
        weight: fp32 [D, F].
        bias: fp32 [D].
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]

    def probabilities(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Of each domain against all others, [N, D] in [0, 1]; a row depends on its own text alone."""
        logits = np.empty((len(texts), len(self.bias)))
        for row, text in enumerate(texts):
            buckets, values = features(text)
            logits[row] = self.weight[:, buckets].astype(np.float64) @ values + self.bias
        return 1 / (1 + np.exp(-logits.clip(-500, 500)))


def features(text: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Buckets that a text's n-grams fall into, ascending, and their values; both empty where there is no text."""
    raw = np.frombuffer(text.encode("utf-8", "replace")[:BYTES], np.uint8).astype(np.uint32)
    hashed = np.full(len(raw), _OFFSET, np.uint32)
    found = []
    for n in range(1, min(LONGEST, len(raw)) + 1):
        hashed = (hashed[: len(raw) - n + 1] ^ raw[n - 1 :]) * _PRIME  # wraps at 2 ** 32, as it shall
        found.append(((hashed >> np.uint32(BITS)) ^ hashed) & np.uint32(2**BITS - 1))
    buckets, counts = np.unique(np.concatenate([*found, np.zeros(0, np.uint32)]), return_counts=True)
    values = np.log1p(counts.astype(np.float64))
    return buckets.astype(np.int64), values / float(np.linalg.norm(values))


def fit_ngrams(texts: Sequence[str], labels: Sequence[int]) -> NgramClassifier:
    """Train on texts, each with the number of its domain; every domain counts alike, however much text it has."""
    from scipy.sparse import csr_matrix
    from sklearn.linear_model import LogisticRegression  # takes seconds, and only training needs it

    rows = [features(text) for text in texts]
    ends = np.cumsum([0, *(len(buckets) for buckets, _ in rows)])
    parts = np.concatenate([values for _, values in rows]), np.concatenate([buckets for buckets, _ in rows])
    table = csr_matrix((*parts, ends), shape=(len(rows), 2**BITS))
    models = [
        LogisticRegression(C=1 / PENALTY, class_weight="balanced", max_iter=500, tol=1e-3).fit(table, own)
        for own in (np.asarray(labels) == number for number in range(max(labels) + 1))
    ]
    weight, bias = np.concatenate([m.coef_ for m in models]), np.concatenate([m.intercept_ for m in models])
    return NgramClassifier(*(np.ascontiguousarray(part, np.float32) for part in (weight, bias)))
