"""The paper's claims as rules that were fixed before the runs (docs/claims.md): what is measured, and what decides.

A claim has parts. A part is decided when the interval of its figure lies wholly on one side of its bound. A claim is
supported when all its parts hold, not supported when one fails, and not decided otherwise. The intervals are wide
enough for all claims at once (Bonferroni). Within a claim a wrong "supported" needs all parts, so no more is needed for
it; a wrong "not supported" needs one, so its chance adds up over the parts, to about 5 % over all of them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from koff_lightning.metrics import CONTEXT
from koff_lightning.studies.bootstrap import Interval, Sample, interval
from koff_lightning.studies.claims.arms import AFTER

MARGIN = 0.01  # of dense bits per byte: a loss below it counts as "ability kept"
RECOVERED = 0.95  # share of what a mask alone loses that the memories must win back
Word = Literal["supported", "not supported", "not decided"]
Figure = Callable[[Mapping[str, Any]], Any]  # of the arms' bits per byte


@dataclass(frozen=True)
class Part:
    """A figure and the bound on one side of which it must lie.

    Args:
        words: The figure as a formula of arms.
        arms: Arms that it needs.
        figure: The figure from the arms' bits per byte.
        bound: The bound.
        above: It must lie above the bound, not below.
        inside: Of tokens alone that have much of their text before them, see `paired.PairedDraws`.
    """

    words: str
    arms: tuple[str, ...]
    figure: Figure
    bound: float = 0.0
    above: bool = False
    inside: bool = False


def _ratio(one: str, other: str, above: bool = False, inside: bool = False) -> Part:
    """`one` loses less (or more) than MARGIN against `other`."""
    return Part(f"{one} / {other} - 1", (one, other), lambda x: x[one] / x[other] - 1, MARGIN, above, inside)


def _less(one: str, other: str) -> Part:
    """`one` has fewer bits per byte than `other`."""
    return Part(f"{one} - {other}", (one, other), lambda x: x[one] - x[other])


CLAIMS: dict[str, tuple[str, tuple[Part, ...]]] = {
    "a": ("KOFF keeps the unpruned model's ability", (_ratio("koff", "dense"),)),
    "a, within": (
        f"and that within texts as well, where {CONTEXT[-1]} tokens or more were read before",
        (_ratio("koff", "dense", inside=True),),
    ),
    "a, fair": (
        "and the ability that the unpruned model has with the same memories",
        (_ratio("koff", "dense_memory"),),
    ),
    "b": (
        "the same pruning without memories degrades sharply",
        (
            _ratio("no_memory", "dense", above=True),
            Part(
                f"(no_memory - koff) - {RECOVERED} (no_memory - dense)",
                ("no_memory", "koff", "dense"),
                lambda x: x["no_memory"] - x["koff"] - RECOVERED * (x["no_memory"] - x["dense"]),
                above=True,
            ),
        ),
    ),
    "b, fair": (
        "memories at least halve what pruning costs",
        (
            Part(
                "(no_memory - dense) - 2 (koff - dense_memory)",
                ("no_memory", "dense", "koff", "dense_memory"),
                lambda x: x["no_memory"] - x["dense"] - 2 * (x["koff"] - x["dense_memory"]),
                above=True,
            ),
        ),
    ),
    "c": (
        "LoRA and KV complement each other: both beat each alone at equal parameters",
        (_less("koff", "lora_equal"), _less("koff", "kv_equal")),
    ),
    "d": (
        "learning jointly beats mask first, memories after",
        (_less("koff", "two_stage"), *(_less("koff", arm) for arm in AFTER)),
    ),
}
LEVEL = 1 - 0.05 / len(CLAIMS)


@dataclass(frozen=True)
class Finding:
    """What came of a part."""

    part: Part
    found: Interval | None
    word: Word
    why: str = ""


@dataclass(frozen=True)
class Verdict:
    """What came of a claim."""

    name: str
    claim: str
    word: Word
    findings: tuple[Finding, ...]


def judge(sample_of: Callable[[Part], Sample]) -> list[Verdict]:
    """Decide all claims.

    Args:
        sample_of: Paired draws of a part's arms over the seeds that they share; none of a seed, where an arm has no
            run.
    """
    verdicts = []
    for name, (claim, parts) in CLAIMS.items():
        findings = tuple(_find(part, sample_of(part)) for part in parts)
        words = {finding.word for finding in findings}
        word = next(w for w in ("not supported", "not decided", "supported") if w in words)
        verdicts.append(Verdict(name, claim, word, findings))
    return verdicts


def _find(part: Part, sample: Sample) -> Finding:
    if not sample.seeds:
        why = f"no common seed of {', '.join(part.arms)}"
        return Finding(part, None, "not decided", why + " in which such tokens were counted" * part.inside)
    found = interval(part.figure(sample.measured), part.figure(sample.draws), LEVEL)
    if len(sample.seeds) == 1:
        return Finding(part, found, "not decided", "one seed tells nothing about the next")
    sides = {"below": found.high < part.bound, "above": found.low > part.bound}
    if not any(sides.values()):
        return Finding(part, found, "not decided")
    return Finding(part, found, "supported" if sides["above" if part.above else "below"] else "not supported")
