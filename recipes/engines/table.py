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
    said: dict[str, list[str]] = {"all": [], "part": [], "none": []}
    for engine in ENGINES:
        mine = [run for run in runs if run["engine"] == engine and "arms" in run]
        had = [run for run in mine if computed(run)]
        if (
            had
            and {run["layout"] for run in had} == set(LAYOUTS)
            and all(len(computed(r)) == len(r["arms"]) for r in mine)
        ):
            said["all"].append(engine)
        elif had:
            said["part"].append(f"{engine} ({_part(mine)})")
        else:
            said["none"].append(engine)
    return "\n".join([
        f"- Every layout with LoRA and KV memories: {', '.join(said['all']) or 'none'}.",
        f"- A part: {'; '.join(said['part']) or 'none'}.",
        f"- {NOT_RUN.capitalize()}, or without success: {', '.join(said['none']) or 'none'}.",
    ])  # fmt: skip


def _part(runs: list[Run]) -> str:
    """Which arms in which layouts."""
    where: dict[str, list[str]] = {}  # in which layouts -> arms
    for arm in ARMS:
        done = [layout for layout in LAYOUTS if any(r["layout"] == layout and arm in computed(r) for r in runs)]
        lost = [
            layout
            for layout in LAYOUTS
            if layout not in done and any(r["layout"] == layout and arm in r["arms"] for r in runs)
        ]
        if done:
            few = (
                f"in {_names(done)}"
                if len(lost) >= len(done)
                else f"except in {_names(lost)}"
                if lost
                else "everywhere"
            )
            where.setdefault(few, []).append(arm)
    return ", ".join(f"{_words(arms)} {few}" for few, arms in where.items())


def _names(layouts: list[str]) -> str:
    return ", ".join(f"`{layout}`" for layout in layouts)


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
    """All runs of layouts, a table for each engine."""
    parts = []
    for engine in ENGINES:
        mine = [run for run in runs if run["engine"] == engine and run["layout"] is not None]
        lines = [f"### {engine}", ""]
        if not mine:
            parts.append("\n".join([*lines, f"{NOT_RUN.capitalize()}."]))
            continue
        for run in mine:
            releases = ", ".join(f"{package} {release}" for package, release in run["versions"].items())
            about = f"{run['compared'][0].upper()}{run['compared'][1:]}; {run['date']}, {run['processor']}; {releases}."
            lines += [about, ""] if about not in lines else []
        lines += [f"| run | {' | '.join(ARMS.values())} | command |", "|---" * (2 + len(ARMS)) + "|"]
        lines += [_row(run) for run in mine]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _row(run: Run) -> str:
    cells = [f'<a id="{run["run"]}"></a>{run["run"]}']
    if "not_run" in run:
        cells += [f"{NOT_RUN}: {run['not_run']}", *[""] * (len(ARMS) - 1)]
    else:
        cells += [_came(run["arms"].get(arm)) for arm in ARMS]
    return "| " + " | ".join(cell.replace("|", "/") for cell in [*cells, f"`{run['command']}`"]) + " |"


def _came(came: dict[str, Any] | None) -> str:
    if came is None:
        return ""
    by = f" (by {came['by']})" if "by" in came else ""
    if "refused" in came:
        return f"refused: {came['refused']}{by}"
    return f"{came['equal']} of {came['of']}" + (f", {came['gap']:.1e}" if "gap" in came else "") + by


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
