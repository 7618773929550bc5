"""A classifier of texts that may also say "none of them", and how its threshold is found.

A text is sent to its likeliest domain where that domain's probability reaches a threshold, else to none: the bare
backbone. Short texts are told apart with less certainty, so there is a threshold for each of three sizes. Each is such
that of the domains' own text, kept out of training, a given share falls below it.

Letters: N texts, D domains.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from koff_lightning.support.errors import KoffError

SIZES = (128, 512)  # UTF-8 bytes up to which a text is short, and middling
SHORTEST, LONGEST = 24, 1024  # characters of a training piece, drawn evenly by their logarithm
CALIBRATION = 10  # one part in so many is kept for the thresholds


class Classifier(Protocol):
    """What a router needs of a classifier."""

    def probabilities(self, texts: Sequence[str]) -> Any:
        """Probability of each domain for each text, [N, D] in [0, 1]."""


@dataclass(frozen=True)
class Router:
    """Picks a domain, or none, for each text.

    Args:
        domains: Its answers, in the order of the classifier's columns.
        classifier: Tells them apart.
        thresholds: Least probability of an answer for short, middling and long texts (`SIZES`).
    """

    domains: tuple[str, ...]
    classifier: Classifier
    thresholds: tuple[float, ...]

    def route(self, texts: Sequence[str]) -> list[str | None]:
        """The domain of each text; None for none of them, and for a text that is empty or all spaces.

        A text's answer does not depend on the others.

        Raises:
            KoffError: `texts` is not a list of texts.
        """
        if isinstance(texts, str) or (odd := [text for text in texts if not isinstance(text, str)]):
            given = "one text" if isinstance(texts, str) else type(odd[0]).__name__
            raise KoffError(f"route takes a list of texts, one for each row; got {given}")
        rows: list[str | None] = [None] * len(texts)
        full = [row for row, text in enumerate(texts) if text.strip()]
        if not full:
            return rows
        chances = self.classifier.probabilities([texts[row] for row in full])  # [N, D]
        for row, chance in zip(full, chances, strict=True):
            best = int(chance.argmax())
            if float(chance[best]) >= self.thresholds[size_of(texts[row])]:
                rows[row] = self.domains[best]
        return rows


def size_of(text: str) -> int:
    """0 for a short text, 1 for a middling and 2 for a long one."""
    return bisect_left(SIZES, len(text.encode("utf-8", "replace")))


def calibrated(
    domains: Sequence[str], classifier: Classifier, texts: Mapping[str, Sequence[str]], none_rate: float
) -> Router:
    """The router whose thresholds let `none_rate` of these texts fall to none, of each size alike.

    Args:
        domains: In the order of the classifier's columns.
        classifier: Trained.
        texts: Texts of each domain, none of which it was trained on.
        none_rate: Share in [0, 1).
    """
    best: list[list[float]] = [[] for _ in range(len(SIZES) + 1)]
    for part in texts.values():
        for text, chance in zip(part, classifier.probabilities(part), strict=True):
            best[size_of(text)].append(float(chance.max()))
    everything = [value for values in best for value in values]
    thresholds = tuple(float(np.quantile(values or everything, none_rate)) for values in best)
    return Router(tuple(domains), classifier, thresholds)


def training_pieces(documents: Sequence[str], size: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Pieces to train on, and others to calibrate with, of 24 to 1,024 characters.

    Every other piece is the beginning of its document, as a prompt is; the rest are from places drawn at random. What
    is calibrated with comes from other documents, or from the ends of documents where there are fewer than ten.

    Args:
        documents: Training text of one domain.
        size: Characters of all pieces together, about.
        seed: Seed of the draw.

    Raises:
        KoffError: The documents are too few or too short to be cut into pieces.
    """
    rng = np.random.default_rng(seed)
    documents = [documents[i] for i in rng.permutation(len(documents)) if documents[i].strip()]
    if len(documents) >= CALIBRATION:
        kept, rest = documents[::CALIBRATION], [d for i, d in enumerate(documents) if i % CALIBRATION]
    else:
        cuts = [len(d) - len(d) // CALIBRATION for d in documents]
        kept = [d[cut:] for d, cut in zip(documents, cuts, strict=True)]
        rest = [d[:cut] for d, cut in zip(documents, cuts, strict=True)]
    found = _pieces(rest, size, rng), _pieces(kept, size // CALIBRATION, rng)
    if not all(found):
        raise KoffError("a router needs some kilobytes of training text of every domain")
    return found


def _pieces(documents: Sequence[str], size: int, rng: np.random.Generator) -> list[str]:
    """Of every document its share of `size`, but two of the longest pieces at least, until there are `size` of all."""
    share = max(2 * LONGEST, size // max(len(documents), 1))
    pieces: list[str] = []
    total = 0
    for document in documents:
        taken = 0
        for number in range(share):
            if taken >= min(share, len(document)) or total >= size:
                break
            length = int(math.exp(rng.uniform(math.log(SHORTEST), math.log(LONGEST))))
            start = 0 if number % 2 == 0 else int(rng.integers(0, max(len(document) - length, 0) + 1))
            piece = document[start : start + length]
            taken, total = taken + len(piece), total + len(piece)
            pieces += [piece] if piece.strip() else []
    return pieces
