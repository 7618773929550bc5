"""The paper's statements on its tables as rules that were fixed before the runs: what is measured, and what decides.

A statement is made of figures that it needs below zero. It is supported when the intervals of all of them lie below
zero, contradicted when that of one lies above, else not decided. The intervals are wide enough for all statements at
once (Bonferroni), as in verdicts.py: a wrong "supported" needs all figures of a statement; a wrong "contradicted" needs
one, so its chance adds up over the figures, to about 3 % over all of them.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from koff_lightning.studies.bootstrap import Sample, interval

Figure = tuple[str, str]  # an arm, and how its model is read: koff, dense, memory_off, swapped
Removed = Callable[[Figure], float | None]  # share of the body that a figure's runs closed, mean over seeds
# A stretch is gradual where a point of sparsity costs less than this share of what it costs in the sharp one.
SHARP = 0.5


class Paired(Protocol):
    """Resampled bits per byte of named figures, paired over documents and seeds."""

    def of(self, arms: tuple[str, ...]) -> Sample:
        """The figures over the seeds that they share."""
        ...


@dataclass(frozen=True)
class Part:
    """A weighted sum of bits per byte that a statement needs below zero.

    Args:
        words: The sum as a formula of arms.
        weights: Weight of each figure.
    """

    words: str
    weights: Mapping[Figure, float]


@dataclass(frozen=True)
class Statement:
    """Something the paper says: that one figure has fewer bits per byte than another."""

    says: str
    source: str
    fewer: Figure
    than: Figure

    @property
    def figures(self) -> list[Figure]:
        """All that it reads."""
        return [self.fewer, self.than]

    def parts(self, removed: Removed) -> Iterator[Part]:
        """Their difference."""
        yield _difference(self.fewer, self.than)


@dataclass(frozen=True)
class Below:
    """That a curve lies below another at each of several places: pairs (fewer, than), one behind the other."""

    says: str
    source: str
    each: Sequence[tuple[Figure, Figure]]

    @property
    def figures(self) -> list[Figure]:
        """All that it reads."""
        return [figure for pair in self.each for figure in pair]

    def parts(self, removed: Removed) -> Iterator[Part]:
        """The difference at each place."""
        for fewer, than in self.each:
            yield _difference(fewer, than)


@dataclass(frozen=True)
class Bend:
    """That a curve is gradual in one stretch and sharp in a later one, each from a figure to a figure.

    Bits per byte must be lost in the sharp stretch, and a point of sparsity must cost less than SHARP of that in the
    gradual one. Sparsity is the share of the body that the runs really closed, mean over seeds, not the target.
    """

    says: str
    source: str
    gradual: tuple[Figure, Figure]
    sharp: tuple[Figure, Figure]

    @property
    def figures(self) -> list[Figure]:
        """All that it reads."""
        return list(dict.fromkeys([*self.gradual, *self.sharp]))

    def parts(self, removed: Removed) -> Iterator[Part]:
        """What the sharp stretch costs, with the sign turned; and by how much a point costs less in the gradual one."""
        yield _difference(*self.sharp)
        widths = [_width(stretch, removed) for stretch in (self.gradual, self.sharp)]
        words = [f"({_name(to)} - {_name(since)}) / sparsity" for since, to in (self.gradual, self.sharp)]
        weights = dict.fromkeys(self.figures, 0.0)
        for (since, to), width, sign in zip((self.gradual, self.sharp), widths, (1.0, -SHARP), strict=True):
            weights[to] += sign / width if width else math.nan
            weights[since] -= sign / width if width else math.nan
        yield Part(f"{words[0]} - {SHARP:g} {words[1]}", weights)


AnyStatement = Statement | Below | Bend


def as_statement(given: Mapping[str, Any]) -> AnyStatement:
    """A statement of paper.yaml by the fields that it has."""
    said = given["says"], given["source"]
    if "each" in given:
        return Below(*said, [(tuple(fewer), tuple(than)) for fewer, than in given["each"]])
    kind, names = (Bend, ("gradual", "sharp")) if "sharp" in given else (Statement, ("fewer", "than"))
    ends = [tuple(map(tuple, given[name])) if kind is Bend else tuple(given[name]) for name in names]
    return kind(*said, *ends)


def level(statements: Sequence[AnyStatement]) -> float:
    """Level of the intervals: wide enough for all statements at once, whichever tables are filled."""
    return 1 - 0.05 / max(1, len(statements))


def verdict(statement: AnyStatement, paired: Paired, at: float, removed: Removed) -> dict[str, Any]:
    """What the intervals say of a statement; one seed tells nothing about the next.

    Args:
        statement: Which.
        paired: Bits per byte, by "arm figure".
        at: Level of the intervals.
        removed: Share of the body that each figure's runs closed.

    Returns:
        The statement in plain values, `parts` (words and interval, None without runs), `verdict`, `seeds`.
    """
    sample = paired.of(tuple(map(_key, statement.figures)))
    several, parts, words = len(sample.seeds) > 1, [], []
    for part in statement.parts(removed):
        found = None
        if sample.seeds and not any(map(math.isnan, part.weights.values())):
            value, draws = (_sum(part, values) for values in (sample.measured, sample.draws))
            found = interval(value, draws, at)
        parts.append({"words": part.words} | (asdict(found) if found else {"value": None, "low": None, "high": None}))
        low, high = (found.low, found.high) if found and several else (-math.inf, math.inf)
        words.append("supported" if high < 0 else "contradicted" if low > 0 else "not decided")
    told = {"parts": parts, "verdict": next(w for w in ("contradicted", "not decided", "supported") if w in words)}
    return asdict(statement) | told | {"seeds": len(sample.seeds)}


def _sum(part: Part, values: Mapping[str, Any]) -> Any:
    return np.sum([weight * values[_key(figure)] for figure, weight in part.weights.items()], axis=0)


def _difference(one: Figure, other: Figure) -> Part:
    return Part(f"{_name(one)} - {_name(other)}", {one: 1.0, other: -1.0})


def _width(stretch: tuple[Figure, Figure], removed: Removed) -> float | None:
    """What a stretch has of sparsity; None where that is not known, or is nothing."""
    since, to = map(removed, stretch)
    return to - since if since is not None and to is not None and to > since else None


def _key(figure: Figure) -> str:
    return " ".join(figure)


def _name(figure: Figure) -> str:
    """As a formula has it: the arm, and how it is read where that is not with its own memory."""
    arm, read = figure
    return arm if read == "koff" else read if read == "dense" else f"{arm}, {read}"
