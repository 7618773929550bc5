"""lm-eval's scores as plain numbers, and the table of tasks by domains."""

from collections.abc import Mapping
from typing import Any

from rich import box, get_console
from rich.console import Console
from rich.table import Column, Table

Scores = dict[str, dict[str, float]]  # task or group -> metric -> value
CLASH = "a domain has that name, so their scores could not be told apart"  # another column's, with no memory
# What stands in the table, of what a task has. Of two normalisations the one by bytes or characters, never by tokens.
MAIN = ("acc_bytes", "acc_norm", "acc", "exact_match", "bits_per_byte", "byte_perplexity", "f1")


def plain(results: Mapping[str, Mapping[str, Any]]) -> Scores:
    """lm-eval's `results` with numbers only: names such as `acc`, or `exact_match.strict` where a filter is named."""
    return {
        task: {
            key.removesuffix(",none").replace(",", "."): float(value)
            for key, value in row.items()
            if "," in key and isinstance(value, int | float)
        }
        for task, row in results.items()
    }


def main_metric(row: Mapping[str, float]) -> str | None:
    """The metric of a task that a table shows; None when it has none, as a group without an aggregate."""
    names = [name for name in row if "_stderr" not in name]
    return next((known for known in MAIN if known in names), names[0] if names else None)


def table(columns: Mapping[str, Scores]) -> Table:
    """A row for each task, a column for each way of reading the text; plus or minus is one standard error.

    Args:
        columns: Name of a domain, `none` or `dense` -> scores.
    """
    made = Table(box=box.SIMPLE_HEAD)
    made.add_column("task")
    made.add_column("metric")
    for name in columns:
        made.add_column(name, justify="right", no_wrap=True)
    for task in dict.fromkeys(task for scores in columns.values() for task in scores):
        rows = [scores.get(task, {}) for scores in columns.values()]
        metric = next((found for row in rows if (found := main_metric(row))), None)
        if metric is not None:
            made.add_row(task, metric, *(_cell(row, metric) for row in rows))
    return made


def show(columns: Mapping[str, Scores]) -> None:
    """Print the table; where it is wider than the terminal, or than 100 characters of a file, its long form."""
    console = get_console() if get_console().is_terminal else Console(width=100, force_jupyter=False)
    wide = table(columns)
    console.print(
        wide
        if console.measure(wide, options=console.options.update_width(10_000)).maximum <= console.width
        else long_table(columns)
    )


def long_table(columns: Mapping[str, Scores]) -> Table:
    """A row for each task and each way of reading the text.

    Args:
        columns: As for `table`.
    """
    made = Table("task", "metric", "read with", Column("score", justify="right"), box=box.SIMPLE_HEAD)
    for task in dict.fromkeys(task for scores in columns.values() for task in scores):
        for name, scores in columns.items():
            if (metric := main_metric(scores.get(task, {}))) is not None:
                made.add_row(task, metric, name, _cell(scores[task], metric))
    return made


def _cell(row: Mapping[str, float], metric: str) -> str:
    if metric not in row:
        return "-"
    name, dot, filtered = metric.partition(".")
    error = row.get(f"{name}_stderr{dot}{filtered}")
    return f"{row[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")
