"""What a study says, in sentences that carry their intervals. Verdicts follow from the intervals by fixed rules."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from koff_lightning.studies.analysis.paper import SOURCES, Verdict, judge
from koff_lightning.studies.analysis.study import Study
from koff_lightning.studies.analysis.transfer import Transfer
from koff_lightning.studies.bootstrap import student

if TYPE_CHECKING:
    import pandas as pd

NAMES = {"specific": "Specific neurons", "G2": "General neurons (G2)"}


@dataclass(frozen=True)
class Finding:
    """One sentence or two.

    Attributes:
        verdict: `yes` or `no` where an interval decides, `open` where it does not, `note` for what is no question.
        text: Plain text.
    """

    verdict: Literal["yes", "no", "open", "note"]
    text: str


def findings(found: Study) -> list[Finding]:
    """All that can be said, the main question first."""
    said: list[Finding] = []
    tables = found.tables
    if "pooled" in tables:
        pooled = tables["pooled"][lambda t: t["kind"] == found.settings.name]
        tests = tables["enrichment"][lambda t: t["kind"] == found.settings.name]
        for name, words in NAMES.items():
            if len(tests):
                said.append(_removal(pooled[pooled["class"] == name], tests[tests["class"] == name], words))
    if len(statements := tables.get("statements", ())):
        said += [_statement(verdict) for verdict in judge(statements)]
    if "ratios" in tables:
        rows = tables["ratios"].query("`class` == 'specific' and within == 'layers'")
        said += [_ratio(row) for _, row in rows.iterrows()]
    if "transfer" in tables:
        said += _transfer(tables["transfer"])
    if "knockout" in tables:
        said.append(_knockout(tables["knockout"]))
    if "causal" in tables:
        said += _causal(tables["causal"])
    if "stability" in found.about:
        text = found.about["stability"]
        said.append(Finding("note", f"Is there enough text? {text[0].upper()}{text[1:]}."))
    return said


def _removal(pooled: "pd.DataFrame", tests: "pd.DataFrame", words: str) -> Finding:
    """Of one class: its pooled odds ratios, and its tests in all studied runs.

    There is a verdict where both comparisons have the same: within layers, and among neurons as active and important.
    """
    both, marked = tests["both"].mean(), tests["marked"].mean()
    base = (tests["removed"] / tests["neurons"]).mean()
    if not marked:
        return Finding("note", f"{words}: there are none.")
    several = f" (mean of {len(tests)} runs)" if len(tests) > 1 else ""
    text = f"{words}: {both:.3g} of {marked:.3g} are removed{several}, {both / marked:.0%} where {base:.0%} of all are."
    verdicts = set()
    for _, row in pooled.iterrows():
        within = "of the same layer" + (", activity and importance" if row["within"] == "cells" else "")
        if math.isnan(row["low"]):
            text += f" Against others {within} nothing can be said: too few."
            verdicts.add("open")
            continue
        text += f" Odds {row['odds_ratio']:.2f} times those of others {within} {_between(row['low'], row['high'])}."
        verdicts.add(_side(row))
    return Finding(verdicts.pop() if len(verdicts) == 1 else "open", text)


def _statement(found: Verdict) -> Finding:
    """Of the paper, by the rules of paper.py."""
    figures = "; ".join(
        f"{row['figure']} {row['value']:.3f}"
        + (f" [{row['low']:.3f}, {row['high']:.3f}]" if np.isfinite(row["low"]) else "")
        + (f" ({'above' if row['above'] else 'below'} {row['bound']:g} wanted)" if row["bound"] else "")
        for _, row in found.figures.iterrows()
    )
    several = " One run decides nothing." if found.figures["runs"].min() < 2 else ""
    if not several and not np.isfinite(found.figures["low"]).all():
        several = " Runs that agree exactly give no interval."
    text = f"The paper, {SOURCES[found.says]}: {found.says}. At this scale {found.word}: {figures}.{several}"
    return Finding({"supported": "yes", "contradicted": "no"}.get(found.word, "open"), text)


def _side(row: "pd.Series") -> Literal["yes", "no", "open"]:
    return "yes" if row["low"] > 1 else "no" if row["high"] < 1 else "open"


def _ratio(row: "pd.Series") -> Finding:
    asked = f"More selective than {row['against']}?"
    if math.isnan(row["low"]):
        return Finding("open", f"{asked} It cannot be told: {row['note'] or 'no interval'}.")
    verdict = "open" if row["note"] else _side(row)  # one seed says nothing of how the next would prune
    text = f"{asked} The odds ratio for specific neurons is {row['ratio']:.2f} times that of {row['against']} "
    return Finding(
        verdict, f"{text}{_between(row['low'], row['high'])}" + (f"; {row['note']}." if row["note"] else ".")
    )


def _transfer(table: "pd.DataFrame") -> list[Finding]:
    runs = [Transfer(part.drop(columns="run").set_index("domain")) for _, part in table.groupby("run")]
    costs = np.array([run.advantage for run in runs])
    if np.isnan(costs).any():  # one memory only
        return []
    own, best = [], []
    for run in runs:
        lines = run.bpb.loc[run.by_domain.index]
        own += [line["none"] - line[domain] for domain, line in lines.iterrows()]
        best += [line[run.memories].idxmin() == domain for domain, line in lines.iterrows()]
    text = (
        f"Are memories specific to their domains? Another domain's memory costs {costs.mean():.4f} bits per byte more "
    )
    text += f"than the own one, which gains {np.mean(own):.4f} over none; among the memories, the own one is "
    text += f"best for {np.mean(best):.0%} of domains."
    return [Finding("yes" if all(best) else "open" if costs.mean() > 0 else "no", text)]


def _knockout(table: "pd.DataFrame") -> Finding:
    mean = table[["none", "lora", "kv", "both", "synergy"]].mean()
    lora, kv, both = (mean["none"] - mean[name] for name in ("lora", "kv", "both"))
    text = f"The adapter alone gains {lora:.4f} bits per byte, the slots alone {kv:.4f}, both {both:.4f}: "
    return Finding(
        "note", text + f"{abs(mean['synergy']):.4f} {'more' if mean['synergy'] > 0 else 'less'} than their sum."
    )


def _causal(table: "pd.DataFrame") -> list[Finding]:
    known = table.dropna(subset=["off_after", "off_control", "on_after", "on_control"])
    if not table["neurons"].any():
        return [Finding("note", "No neuron that is specific to a domain was removed, so none can be put back.")]
    if known.empty:
        text = (
            f"Has the knowledge moved? {table['neurons'].sum()} removed specialists were put back, but without as many "
        )
        return [Finding("note", f"{text}other removed neurons of the same layers to compare with.")]
    off, on = (1000 * (known[f"{arm}_before"] - known[f"{arm}_after"]) for arm in ("off", "on"))
    control, control_on = (1000 * (known[f"{arm}_before"] - known[f"{arm}_control"]) for arm in ("off", "on"))
    over = f"Mean over {len(known)} domains and runs." if len(known) > 1 else "One domain in one run."
    text = f"Has the knowledge moved? Put back, {known['neurons'].sum()} removed specialists gain their domains "
    text += (
        f"{off.mean():.2f} thousandths of a bit per byte with memories off and {on.mean():.2f} with them on; as many "
    )
    text += "others of the same layers gain "
    text += f"{control.mean():.2f} (off) and {control_on.mean():.2f} (on). {over}"
    # What a memory has taken over of the specialists, beyond what it has of other neurons: by domain, over its runs.
    moved = ((off - on) - (control - control_on)).groupby(known["domain"]).mean()
    if len(moved) < 3:
        return [Finding("open", text)]
    found = student(moved.to_numpy())
    text += f" Specialists lose {found.value:.2f} more of their gain to the memory than the others do "
    text += f"{_between(found.low, found.high)}, an interval over {len(moved)} domains."
    return [Finding("yes" if found.low > 0 else "no" if found.high < 0 else "open", text)]


def _between(low: float, high: float) -> str:
    return "(no interval)" if math.isnan(low) or math.isnan(high) or low == -math.inf else f"[{low:.2f}, {high:.2f}]"
