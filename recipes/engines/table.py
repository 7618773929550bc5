"""Write what the documentation says of engines from the record of runs (record.py).

    python recipes/engines/table.py    # into README.md, docs/engines.md and docs/results/engines.md

Each page has a place between two comments, `<!-- engines -->` and `<!-- /engines -->`, which is this script's.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from record import ARMS, ENGINES, LAYOUTS, read

ROOT = Path(__file__).parents[2]
NOT_RUN = "not run here"
_PLACE = re.compile(r"(<!-- engines -->\n)(?:.*\n)??(<!-- /engines -->)", re.DOTALL)
Run = dict[str, Any]


def computed(run: Run) -> list[str]:
    """The arms of a run in which every text came out equal."""
    arms = run.get("arms", {})
    return [arm for arm in ARMS if arm in arms and "refused" not in arms[arm] and arms[arm]["equal"] == arms[arm]["of"]]


def of(runs: list[Run], engine: str, layout: str) -> list[Run]:
    """The runs that say something of a cell."""
    return [run for run in runs if (run["engine"], run["layout"]) == (engine, layout)]


def short(runs: list[Run]) -> str:
    """Three lines for the README: who computes everything, who a part, whom nobody here has run."""
    sorts: dict[str, list[str]] = {"all": [], "part": [], "none": []}
    for engine in ENGINES:
        mine = [run for run in runs if run["engine"] == engine and "arms" in run]
        wanted, had = sum(len(run["arms"]) for run in mine), sum(len(computed(run)) for run in mine)
        if mine and had == wanted and {run["layout"] for run in mine} == set(LAYOUTS):
            sorts["all"].append(engine)
        elif had:
            most = max(mine, key=lambda run: len(computed(run)))
            where = ", ".join(f"`{layout}`" for layout in LAYOUTS if any(map(computed, of(mine, engine, layout))))
            parts = _words([arm for arm in computed(most) if arm != "bare"]) or "no memories"
            sorts["part"].append(f"{engine} ({parts}; {where})")
        else:
            sorts["none"].append(engine)
    said = {kind: "; ".join(names) if kind == "part" else ", ".join(names) for kind, names in sorts.items()}
    return "\n".join([
        f"- Every layout with LoRA and KV memories: {said['all'] or 'none'}.",
        f"- A part: {said['part'] or 'none'}.",
        f"- {NOT_RUN.capitalize()}: {said['none'] or 'none'}.",
    ])  # fmt: skip


def overview(runs: list[Run]) -> str:
    """Layouts by engines; each cell says what was equal and names its run."""
    lines = [f"| | {' | '.join(ENGINES)} |", "|---" * (1 + len(ENGINES)) + "|"]
    for layout in LAYOUTS:
        lines.append(f"| `{layout}` | " + " | ".join(_cell(of(runs, engine, layout)) for engine in ENGINES) + " |")
    return "\n".join(lines)


def _cell(runs: list[Run]) -> str:
    said = []
    for run in runs:
        link = f"[{run['run']}](results/engines.md#{run['run']})"
        if "arms" in run:
            done, lost = computed(run), [arm for arm in ARMS if arm in run["arms"] and arm not in computed(run)]
            words = f"{_words(done)}: equal" if done else ""
            words += "; " * bool(done and lost) + (f"{_words(lost)}: no" if lost else "")
            said.append(f"{words} ({link})")
        else:
            said.append(f"{NOT_RUN} ({link})")
    return "<br>".join(said) or NOT_RUN


def _words(arms: list[str]) -> str:
    return ", ".join("both" if arm == "both" else ARMS[arm] for arm in arms)


def details(runs: list[Run]) -> str:
    """All runs of layouts, one below the other."""
    parts = []
    for run in runs:
        if run["layout"] is None:
            continue
        releases = ", ".join(f"{package} {release}" for package, release in run["versions"].items())
        lines = [f"### {run['run']}", "", f"    {run['command']}", ""]
        lines += [f"{run['compared']}; {run['date']}, {run['processor']}; {releases}.", ""]
        if "not_run" in run:
            lines.append(f"{NOT_RUN.capitalize()}: {run['not_run']}.")
        else:
            lines += ["| read | texts equal | largest difference | by |", "|---|---|---|---|"]
            lines += [_row(ARMS[arm], run["arms"][arm]) for arm in ARMS if arm in run["arms"]]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _row(label: str, came: dict[str, Any]) -> str:
    by = came.get("by", "")
    if "refused" in came:
        return f"| {label} | refused | {came['refused'].replace('|', '/')} | {by} |"
    gap = f"{came['gap']:.1e}" if "gap" in came else ""
    return f"| {label} | {came['equal']} of {came['of']} | {gap} | {by} |"


PAGES = {"README.md": short, "docs/engines.md": overview, "docs/results/engines.md": details}


def pages(runs: list[Run]) -> dict[Path, str]:
    """Page -> what it should say."""
    found = {}
    for name, make in PAGES.items():
        page = ROOT / name
        parts = _PLACE.split(page.read_text(encoding="utf-8"))  # what is before the place, its comments, the rest
        if len(parts) != 4:
            raise SystemExit(f"{name}: one place for the engines is wanted, found {len(parts) // 3}")
        found[page] = f"{parts[0]}{parts[1]}{make(runs)}\n{parts[2]}{parts[3]}"
    return found


def main() -> None:
    """Write the pages."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for page, text in pages(read()).items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
