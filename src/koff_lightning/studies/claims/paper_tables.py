"""The paper's tables (paper.yaml): the rows of each and the arms that fill them. Nothing heavy is imported here.

So a table or an arm that there is not is told before anything else (commands/parsing/first_look.py).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from koff_lightning.support.errors import KoffError
from koff_lightning.support.wording import nearest


@dataclass(frozen=True)
class Arm:
    """What a run adds to the config.

    Args:
        overlays: Configs that ship with the package, laid over it in this order.
        options: Options of `koff fit`.
        steps: Share of the config's steps.
    """

    overlays: Sequence[str] = ()
    options: Sequence[str] = ()
    steps: float = 1.0


@dataclass(frozen=True)
class Row:
    """A line of a table; `others` has the paper's figures of other models than the table's own, by the model's name."""

    label: str
    arm: str
    paper: Mapping[str, float]
    figure: str = "koff"
    others: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table of the paper, and the model and data that it is of there."""

    title: str
    setting: str
    rows: Sequence[Row]

    def of(self, backbone: str) -> "Table":
        """The same with the paper's figures of this backbone, a hub id or folder, where the paper has them."""
        name = backbone.rstrip("/").rpartition("/")[2]
        if not any(name in row.others for row in self.rows):
            return self
        _, _, rest = self.setting.partition(",")
        rows = [replace(row, paper=row.others.get(name, {})) for row in self.rows]
        return replace(self, setting=f"{name},{rest}", rows=rows)


@cache
def given() -> dict[str, Any]:
    """What paper.yaml says."""
    text = Path(__file__).with_name("paper.yaml").read_text(encoding="utf-8")
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # the same, ten times as fast


def tables() -> dict[str, Table]:
    """All tables by name."""
    return {
        name: Table(table["title"], table["setting"], [Row(**row) for row in table["rows"]])
        for name, table in given()["tables"].items()
    }


def chosen(names: str | None, arms: str | None = None) -> dict[str, Table]:
    """The tables of these names with commas between, and of them the rows of these arms; None for all.

    Raises:
        KoffError: No such table, or no row of an arm in them.
    """
    known = tables()
    wanted = [name.strip() for name in names.split(",")] if names is not None else list(known)
    for name in wanted:
        if name not in known:
            hint = "" if name.isdigit() else nearest(name, known)  # one number is like any other
            raise KoffError(
                f"no table {name!r}.{hint} There are {', '.join(known)}; docs/reproduce.md tells what there is of the "
                "paper's others"
            )
    found = {name: known[name] for name in wanted}
    if arms is None:
        return found
    kept, there = [arm.strip() for arm in arms.split(",")], needed(found.values())
    for arm in kept:
        if arm not in there:
            raise KoffError(f"no row of arm {arm!r} in the tables.{nearest(arm, there)} There are {', '.join(there)}")
    found = {name: replace(table, rows=[row for row in table.rows if row.arm in kept]) for name, table in found.items()}
    return {name: table for name, table in found.items() if table.rows}


def needed(tables: Iterable[Table]) -> list[str]:
    """Their arms, each once."""
    return list(dict.fromkeys(row.arm for table in tables for row in table.rows))
