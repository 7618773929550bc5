"""The paper's tables as rows of runs (paper.yaml): what makes each arm, and the tables with the paper's figures beside.

An arm is a plain `koff fit` over one resolved config, as in arms.py; its runs are made by the same machine (runs.py).
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from koff_lightning.reports import plots, results
from koff_lightning.studies.claims import paper_tables
from koff_lightning.studies.claims.arms import Run
from koff_lightning.studies.claims.paired import Done, PairedDraws
from koff_lightning.studies.claims.paper_tables import Arm, Row, Table
from koff_lightning.studies.claims.statements import AnyStatement, Figure, as_statement, level, verdict
from koff_lightning.support.files import write_atomically
from koff_lightning.support.versions import versions

COLUMNS = ("mmlu", "bbl", "ppl", "sparsity")  # that the paper's tables have
SHARES = ("body", "units", "physical")  # of a table's columns: removed, of gated, physical
CURVE = "fig 2"  # the table that is drawn too


@dataclass(frozen=True)
class Protocol:
    """All tables, the arms that fill them, and the paper's statements on them."""

    arms: Mapping[str, Arm]
    tables: Mapping[str, Table]
    statements: Sequence[AnyStatement] = field(default_factory=list)

    @property
    def level(self) -> float:
        """Level of the intervals, the same whichever tables are filled."""
        return level(self.statements)


def paper() -> Protocol:
    """The paper's (arXiv 2605.29075v1)."""
    given = paper_tables.given()
    arms = {name: Arm(**arm) for name, arm in given["arms"].items()}
    statements = [as_statement(one) for one in given["statements"]]
    return Protocol(arms, paper_tables.tables(), statements)


def command(run: Run, arm: Arm, out: Path, max_steps: int) -> list[str]:
    """The words after `koff` that make a run.

    Args:
        run: Which one.
        arm: Its arm.
        out: Folder of all runs; `config.yaml` there is the resolved config.
        max_steps: Steps of the config.
    """
    overlays = [word for name in arm.overlays for word in ("--config", name)]
    seeds = [f"--seed_everything={run.seed}", f"--data.seed={run.seed}"]
    here = [f"--trainer.default_root_dir={out / run.name}", "--export.enabled=false"]
    steps = [] if arm.steps == 1 else [f"--trainer.max_steps={max(1, round(arm.steps * max_steps))}"]
    return ["fit", "--config", str(out / "config.yaml"), *overlays, *arm.options, *steps, *seeds, *here]


def report(protocol: Protocol, tables: Mapping[str, Table], done: Done) -> dict[str, Any]:
    """The tables' figures and the verdicts on the statements that the runs can judge.

    Args:
        protocol: Whose statements are judged.
        tables: Those to fill.
        done: Results of the runs that there are, with `documents`.
    """
    arms = {run.arm for run in done}
    of = {f"{arm} {figure}": ((arm,), figure) for arm in arms for figure in ("koff", "dense", "memory_off", "swapped")}
    paired = PairedDraws(done, of)
    return {
        "tables": {
            name: {"title": table.title, "setting": table.setting, "rows": [_row(row, done) for row in table.rows]}
            for name, table in tables.items()
        },
        "statements": [
            verdict(one, paired, protocol.level, partial(_removed, done))
            for one in protocol.statements
            if {arm for arm, _ in one.figures} <= arms
        ],
        "level": protocol.level,
        "seeds": sorted({run.seed for run in done}),
        "versions": versions(),
    }


def _row(row: Row, done: Done) -> dict[str, Any]:
    found = [result for run, result in sorted(done.items(), key=lambda item: item[0].seed) if run.arm == row.arm]
    ours = {unit: _spread([one["mean"][f"{row.figure}_{unit}"] for one in found]) for unit in ("ppl", "bpb")}
    for name in ("body", "units"):
        ours[name] = _spread([0.0 if row.figure == "dense" else one["sparsity"][name] for one in found])
    ours["physical"] = _spread(
        [0.0 if row.figure == "dense" else one["sparsity"].get("physical", {}).get("body") for one in found]
    )
    ours["general"] = _spread([_general(one, row.figure) for one in found])
    told = {key: value for key, value in asdict(row).items() if key != "others"}
    return told | {"ours": ours, "seeds": len(found)}


def _general(result: Mapping[str, Any], figure: str) -> float | None:
    """Bits per byte of general text, which has no memory of its own: under any domain's, bare where there is none."""
    means = result.get("general", {}).get("mean", {})
    read = ("swapped", "memory_off") if figure == "koff" else (figure,)
    return next((found for name in read if (found := means.get(f"{name}_bpb")) is not None), None)


def _removed(done: Done, figure: Figure) -> float | None:
    """Share of the body that the runs of a figure closed, mean over seeds."""
    if figure[1] == "dense":
        return 0.0
    spread = _spread([result["sparsity"]["body"] for run, result in done.items() if run.arm == figure[0]])
    return spread and spread["mean"]


def _spread(values: Sequence[float | None]) -> dict[str, float | None] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return {"mean": statistics.fmean(known), "sd": statistics.stdev(known) if len(known) > 1 else None}


def write(out: Path, about: Mapping[str, Any]) -> None:
    """Write reproduce.json, reproduce.md, and the curve of Figure 2 where its rows were run.

    Args:
        out: Folder.
        about: A report, with `command`, `backbone` and `failures`.

    Raises:
        KoffError: The disk did not take it.
    """
    write_atomically(out / "reproduce.json", results.as_json(dict(about)))
    write_atomically(out / "reproduce.md", markdown(about))
    points = curve(about["tables"].get(CURVE, {"rows": []})["rows"])
    plots.save(plots.quality_by_sparsity(points), out / "plots", "sparsity")


def curve(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Points of the curve of Figure 2: bits per byte by the share of the body that each run really closed."""
    points = []
    for row in rows:
        bpb, removed = row["ours"]["bpb"], row["ours"]["body"]
        if bpb is not None and removed is not None:
            arm = row["figure"] if row["figure"] != "koff" else row["arm"].rstrip("_0123456789")
            points.append({"arm": arm, "removed": removed["mean"], **bpb})
    return points


def markdown(about: Mapping[str, Any]) -> str:
    """A report as text: the paper's figures beside ours, then the statements."""
    parts = [
        "# The paper's tables, and ours\n",
        f"`{about['command']}`, {about['backbone']}, seeds {', '.join(map(str, about['seeds']))}.\n",
        "Columns P are the paper's (arXiv 2605.29075), of the models it names. The others are of this run: held-out "
        "text under the domain's own memory unless the row says otherwise, mean and standard deviation over seeds. PPL "
        'is per token, bpb bits per byte; both are means over domains. "Removed" is the nominal share of linears of '
        'all layers, "of gated" of what has a gate, "physical" the share that a cut export really lacks. "General" is '
        "bits per byte of general text, where there is some: under a memory of whichever domain, bare in rows without "
        "memories, so that only rows of one kind can be compared.\n",
    ]
    for name, table in about["tables"].items():
        parts.append(f"## {'Table ' if name[0].isdigit() else ''}{name}: {table['title']}\n")
        parts.append(f"The paper: {table['setting']}.\n")
        parts.append(_markdown_table(table["rows"]))
    parts.append("## What the paper says, at this scale\n")
    parts.append(
        f"Supported: the {about['level']:.1%} interval of the figure in bits per byte (documents and seeds resampled, "
        "paired) lies below zero; contradicted: above. A statement of several figures needs all of them. The intervals "
        "are wide enough for all of the paper's statements at once (Bonferroni, 5 % over all). One seed decides "
        "nothing. Rules fixed before the runs.\n"
    )
    lines = ["| statement | paper | figure, bits per byte | verdict |", "|---|---|---|---|"]
    for one in about["statements"]:
        words = "; ".join(map(_part, one["parts"]))
        lines.append(f"| {one['says']} | {one['source']} | {words} | {one['verdict']} |")
    parts.append("\n".join(lines) + "\n")
    if about["failures"]:
        parts.append("## Runs that came to nothing\n")
        said = {one["run"]: one["tail"].strip().splitlines() or ["it said nothing"] for one in about["failures"]}
        parts += [f"- {run}: {lines[-1]}\n" for run, lines in said.items()]
    return "\n".join(parts)


def _part(part: Mapping[str, Any]) -> str:
    if part["value"] is None:
        return f"{part['words']}: -"
    return f"{part['words']}: {part['value']:+.4f} [{part['low']:+.4f}, {part['high']:+.4f}]"


def _markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    theirs = [column for column in COLUMNS if any(column in row["paper"] for row in rows)]
    general = ["general"] if any(row["ours"].get("general") for row in rows) else []
    head = ["row", *(f"P {column}" for column in theirs), "PPL", "bpb", *general]
    head += ["removed", "of gated", "physical", "seeds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        paper = "".join(f"{row['paper'].get(column, '-')} | " for column in theirs)
        ours = row["ours"]
        cells = [_cell(ours["ppl"], 2), _cell(ours["bpb"], 4), *(_cell(ours[name], 4) for name in general)]
        cells += [_percent(ours[key]) for key in SHARES]
        lines.append(f"| {row['label']} | {paper}{' | '.join(cells)} | {row['seeds']} |")
    return "\n".join(lines) + "\n"


def _cell(spread: Mapping[str, float | None] | None, digits: int) -> str:
    if spread is None:
        return "-"
    sd = "" if spread["sd"] is None else f" ± {spread['sd']:.{digits}f}"
    return f"{spread['mean']:.{digits}f}{sd}"


def _percent(spread: Mapping[str, float | None] | None) -> str:
    return "-" if spread is None else f"{100 * spread['mean']:.2f} %"
