"""Would other text of the same domains give the same specific neurons? And if not, how much text would it take?

Two halves of the documents are analysed apart; the Jaccard index of what they select is the stability. Where it is too
low, halves of other sizes are simulated from the rates measured, and the size at which they would agree is named.
"""

import math
from dataclasses import dataclass

import numpy as np

from koff_lightning.studies.analysis.activations import Activations
from koff_lightning.studies.analysis.lape import BAR, RATE, Bools, Floats, identify
from koff_lightning.support.errors import KoffError

GOAL = 0.8  # our choice: four of five neurons found by either half are found by both
DOUBLINGS = range(-10, 17)  # sizes of half that are simulated, in powers of two of the one at hand


@dataclass(frozen=True)
class Stability:
    """How far two halves of the text agree.

    Attributes:
        jaccard: Share of the neurons selected by either half that both select.
        by_domain: The same of the neurons assigned to each domain; nan where neither half assigns any.
        chance: What two random selections of that size would share.
        tokens: Tokens counted of the domain that has the fewest, both halves.
        needed: About how many it would take to reach the goal; None where it is reached or no size reached it.
        enough: Whether the goal is reached.
        sentence: All this for a reader, in one line.
    """

    jaccard: float
    by_domain: dict[str, float]
    chance: float
    tokens: int
    needed: int | None
    enough: bool
    sentence: str


def stability(activations: Activations, rate: float = RATE, bar: float = BAR) -> Stability:
    """Select specific neurons on either half of the documents and compare.

    Args:
        activations: Sums over both halves.
        rate: Share of neurons to select, as for `identify`.
        bar: Quantile of all rates that counts as active.

    Raises:
        KoffError: One domain only, or a domain with all its text in one half.
    """
    first, second = (identify(activations.rates(half), activations.domains, rate, bar) for half in (0, 1))
    found = jaccard(first.selected, second.selected)
    pairs = zip(activations.domains, first.assigned.T, second.assigned.T, strict=True)
    tokens = int(activations.tokens.sum(0).min())
    share = float(first.selected.mean())
    enough = found >= GOAL
    needed = None if enough or math.isnan(found) else _needed(activations, rate, bar, found)
    text = f"the halves of the text agree on {found:.0%} of the specific neurons ({tokens:,} tokens of each domain"
    if math.isnan(found):
        text = f"no neuron is specific in either half of the text ({tokens:,} tokens of each domain or more)"
    elif enough:
        text += " or more)"
    elif needed is None:
        text += f" or more), less than {GOAL:.0%}, and no amount of text that was simulated would change that: the "
        text += "neurons at the edge of the selection are too alike"
    else:
        text += f" or more), less than {GOAL:.0%}: about {needed:,} of each are needed"
    chance = share / (2 - share)
    return Stability(found, {d: jaccard(a, b) for d, a, b in pairs}, chance, tokens, needed, enough, text)


def jaccard(first: Bools, second: Bools) -> float:
    """Size of the intersection over that of the union, of two sets given as bool [N]; nan where both are empty."""
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else math.nan


def _needed(activations: Activations, rate: float, bar: float, found: float) -> int | None:
    """Tokens of each domain, both halves, at which simulated halves reach the goal.

    Tokens of a text are not independent, so a half is worth less than its count: how much less is read off the size at
    which simulated halves agree as the real ones did.
    """
    rates, domains = activations.rates(), activations.domains
    half = int(activations.tokens.sum(0).min()) / 2
    random = np.random.default_rng(0)
    curve: list[tuple[float, float]] = []  # (log2 of the size, Jaccard index)
    for doubling in DOUBLINGS:
        agreed = _simulated(rates, domains, max(round(half * 2.0**doubling), 1), (rate, bar), random)
        curve.append((doubling, max(agreed, curve[-1][1] if curve else 0.0)))  # more text is no worse
        if agreed > max(GOAL, found):
            break
    if curve[-1][1] < GOAL:
        return None
    logs, values = zip(*curve, strict=True)
    at_goal, at_found = np.interp([GOAL, found], values, logs)
    return math.ceil(2 * half * 2.0 ** max(at_goal - at_found, 0.0))


def _simulated(
    rates: Floats, domains: list[str], tokens: int, shares: tuple[float, float], random: np.random.Generator
) -> float:
    """Jaccard index of the selections of two texts of so many independent tokens of each domain; mean of two pairs."""
    found = []
    for _ in range(2):
        drawn = [random.binomial(tokens, rates) / tokens for _ in range(2)]
        try:
            first, second = (identify(part, domains, *shares).selected for part in drawn)
        except KoffError:
            return 0.0
        found.append(jaccard(first, second))
    return float(np.nan_to_num(found).mean())
