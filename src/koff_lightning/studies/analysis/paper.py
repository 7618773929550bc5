"""The paper's statements on its analyses as rules that were fixed before the runs (docs/analysis.md).

A statement has figures, each with a side of a bound on which its interval must lie over all studied runs. It is
supported when all do, contradicted when one lies on the other side, else not decided; one run decides nothing, since it
tells nothing about the next seed. The intervals are wide enough for all statements at once (Bonferroni), as in
claims/verdicts.py: a wrong "contradicted" needs one figure, and its chance adds up over the ten, to 5 %.

Letters: S runs, R resamples, N neurons, A figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from koff_lightning.studies.analysis.ranking import ends
from koff_lightning.studies.analysis.tables import Bools, Floats
from koff_lightning.studies.bootstrap import RESAMPLES, Interval, interval, over_seeds, student

if TYPE_CHECKING:
    import pandas as pd

NEAR = 0.9  # alignment with the dense model's embeddings above which they count as near; one is the same
SPECIFIC = "specific neurons are removed more often than the average"
GENERAL = "general neurons are removed less often than the average"
MIDDLE = "of k and v the first and the last layer lose less than the middle ones"
K_MORE = "k loses more than v"
STAYS = "with memories off, embeddings stay near the dense model's"
SOURCES = {SPECIFIC: "table 3", GENERAL: "table 3", MIDDLE: "figure 4", K_MORE: "figure 4", STAYS: "appendix B"}
LEVEL = 1 - 0.05 / len(SOURCES)
MEASURES = ("cka", "neighbours", "centroids")
Word = Literal["supported", "contradicted", "not decided"]


@dataclass(frozen=True)
class Verdict:
    """What came of a statement; `figures` has the lines of the table that decide it."""

    says: str
    word: Word
    figures: "pd.DataFrame"


def ends_lines(rates: Floats, removed: Mapping[str, Sequence[Bools]]) -> list[dict[str, Any]]:
    """Table 3 over all runs: by how much more the ends of the ranking are removed than the average neuron.

    Args:
        rates: Rates of activity by domain, [N, D].
        removed: What is removed, by name (`gate` and `up`, or `neuron`), bool [N] of each run.
    """
    classes = dict(zip((SPECIFIC, GENERAL), ends(rates), strict=True))
    if not classes[SPECIFIC].any():
        return []
    lines = []
    for name, masks in removed.items():
        measured, drawn = _over_average(list(classes.values()), np.array(masks))
        draws = over_seeds(drawn, measured)  # [R, A]
        for place, says in enumerate(classes):
            found = interval(measured[place].mean(), draws[:, place], LEVEL)
            lines.append(_line(says, f"share removed of {name}, less that of all", found, 0, place == 0, len(masks)))
    return lines


def _over_average(classes: Sequence[Bools], masks: Bools) -> tuple[Floats, Floats]:
    """Share removed of each class less that of all neurons, [A, S], and over neurons drawn within the classes.

    Args:
        classes: Disjoint, bool [N] each.
        masks: Removed neurons of each run, bool [S, N].

    Returns:
        [A, S] as measured, and [R, A, S].
    """
    random = np.random.default_rng(0)
    parts = [*classes, ~np.any(classes, axis=0)]
    sizes = np.array([part.sum() for part in parts])
    measured, drawn = [], []
    for part in parts:  # the shares removed of a class, as measured and of so many of its neurons drawn
        patterns, counts = np.unique(masks[:, part], axis=1, return_counts=True)  # bool [S, P], [P]
        total = max(int(counts.sum()), 1)
        times = random.multinomial(total, counts / total, RESAMPLES) if len(counts) else np.zeros((RESAMPLES, 0))
        measured.append(patterns @ counts / total)  # [S]
        drawn.append(times @ patterns.T / total)  # [R, S]
    shares, draws = np.array(measured), np.array(drawn)  # [A + 1, S], [A + 1, R, S]
    weights = sizes / sizes.sum()
    of_all, of_all_drawn = weights @ shares, np.einsum("a,ars->rs", weights, draws)
    return shares[:-1] - of_all, (draws[:-1] - of_all_drawn).transpose(1, 0, 2)


def layer_lines(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Figure 4 over all runs: k and v by layer. Of key-value groups k and v are one, and only the layers compare.

    Args:
        runs: Of each run its groups, with `layer`, `kind`, `kept` and `of`.
    """
    kinds = {group["kind"] for run in runs for group in run}
    own = [kind for kind in ("k_channel", "v_channel") if kind in kinds] or ["kv_group"]
    shares = [_by_layer(run, own) for run in runs]  # [K, L] each
    depths = {share.shape for share in shares}
    if len(depths) > 1 or not kinds & set(own):
        return []
    table, lines = np.array(shares), []  # [S, K, L]
    depth = table.shape[2]
    if depth > 2:
        middle = table[:, :, depth // 3 : depth - depth // 3].mean((1, 2))  # [S]
        for name, place in (("first", 0), ("last", -1)):
            found = student(table[:, :, place].mean(1) - middle, LEVEL)
            words = f"share removed of the {name} layer, less that of the middle third"
            lines.append(_line(MIDDLE, words, found, 0, False, len(runs)))
    if len(own) == 2:
        found = student(table[:, 0].mean(1) - table[:, 1].mean(1), LEVEL)
        lines.append(_line(K_MORE, "share removed of k, less that of v", found, 0, True, len(runs)))
    return lines


def _by_layer(run: Sequence[Mapping[str, Any]], kinds: Sequence[str]) -> Floats:
    """Shares removed of each kind in each layer, [K, L]; of a layer that has no such units none is removed."""
    of = {(group["kind"], group["layer"]): 1 - group["kept"] / group["of"] for group in run if group["of"]}
    layers = sorted({group["layer"] for group in run})
    return np.array([[of.get((kind, layer), 0.0) for layer in layers] for kind in kinds])


def similarity_lines(measured: "pd.DataFrame", drawn: "pd.DataFrame") -> list[dict[str, Any]]:
    """Appendix B over all runs: three measures of alignment with memories off.

    Args:
        measured: Table `similarity`.
        drawn: Table `similarity_draws`: the same rows of text drawn for all runs.
    """
    own = measured[measured["view"] == "memory_off"]
    values = own[list(MEASURES)].to_numpy().T  # [A, S]
    draws = np.stack([drawn[drawn["run"] == run][list(MEASURES)].to_numpy() for run in own["run"]], axis=2)  # [R, A, S]
    moved = over_seeds(draws, values)  # [R, A]
    return [
        _line(STAYS, name, interval(values[place].mean(), moved[:, place], LEVEL), NEAR, True, values.shape[1])
        for place, name in enumerate(MEASURES)
    ]


def _line(says: str, figure: str, found: Interval, bound: float, above: bool, runs: int) -> dict[str, Any]:
    about = {"says": says, "source": SOURCES[says], "figure": figure}
    return (
        about
        | {"value": found.value, "low": found.low, "high": found.high, "bound": bound, "above": above}
        | {"runs": runs}
    )


def judge(table: "pd.DataFrame") -> list[Verdict]:
    """The verdict on each statement of which the table has figures."""
    return [Verdict(says, _word(lines), lines) for says, lines in table.groupby("says", sort=False)]


def _word(lines: "pd.DataFrame") -> Word:
    if lines["runs"].min() < 2:
        return "not decided"
    over, under = lines["low"] > lines["bound"], lines["high"] < lines["bound"]
    right, wrong = over.where(lines["above"], under), under.where(lines["above"], over)
    return "contradicted" if wrong.any() else "supported" if right.all() else "not decided"
