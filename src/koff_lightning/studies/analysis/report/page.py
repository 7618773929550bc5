"""One self-contained page: figures as inline SVG, tables, words. No script, and nothing is asked of any server."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

from koff_lightning.studies.analysis.report import words
from koff_lightning.studies.analysis.report.findings import Finding
from koff_lightning.studies.analysis.study import Study

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = Path(__file__).with_name("page.css")
MARK = {"yes": "✔", "no": "✘", "open": "?", "note": "·"}
# Colours of the figures that follow the page from light to dark.
LEGEND = "✔ and ✘: the figures decide, by the rules under “How it was measured”; ? they do not."
OPEN = 14  # lines of a table that is shown unfolded
THEMED = {"#000000": "var(--ink)", "#dddddd": "var(--rule)"}


def render(found: Study, said: Sequence[Finding], figures: Mapping[str, "Figure"]) -> str:
    """The whole page.

    Args:
        found: The study.
        said: What it says.
        figures: By name.
    """
    parts = [_head(found), _answers(said, found), _numbers(found)]
    for part in words.words()["sections"]:
        body = [f"<p>{words.linked(part['text'])}</p>"]
        body += [_figure(name, figures[name]) for name in part["figures"] if name in figures]
        body += [_table(found, name) for name in part["tables"] if name in found.tables]
        if len(body) > 1:
            parts.append(_section(part["title"], body))
    parts.append(_section("What to doubt", [words.doubts(found)]))
    parts.append(_section("How it was measured", [words.methods(found)]))
    parts.append(_section("Sources", [words.sources()]))
    title = escape(f"Where did the knowledge go? {', '.join(found.about['runs'])}")
    style = STYLE.read_text(encoding="utf-8")
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{''.join(parts)}</main>\n</body>\n</html>\n"
    )


def _head(found: Study) -> str:
    runs = found.about["runs"]
    dense = next(iter(runs.values()))
    about = f"{_several(len(runs), 'run')} of {dense['dense']} (hash {dense['base_hash'][:12]}): {', '.join(runs)}"
    return f"<header>\n<h1>Where did the knowledge go?</h1>\n<p class=lead>{escape(about)}</p>\n</header>\n"


def _answers(said: Sequence[Finding], found: Study) -> str:
    items = [
        f'<li class="{line.verdict}"><span class=mark>{MARK[line.verdict]}</span><span>{escape(line.text)}</span></li>'
        for line in said
    ]
    missing = [f"<li>{escape(question)}: {escape(reason)}</li>" for question, reason in found.missing.items()]
    left = f"<div class=missing><p>Not answered</p><ul>{''.join(missing)}</ul></div>" if missing else ""
    return _section("What was found", [f"<ul class=findings>{''.join(items)}</ul><p class=small>{LEGEND}</p>{left}"])


def _numbers(found: Study) -> str:
    runs, text = found.about["runs"], found.about["text"]
    removed = [run["removed_of_body"] for run in runs.values()]
    first = next(iter(runs.values()))
    tokens = sum(text["watched_tokens"].values())
    cards = {
        "removed of the body": f"{100 * sum(removed) / len(removed):.1f} %",
        "FFN neurons of the dense model": f"{len(found.tables['neurons']):,}",
        "domains with a memory": str(len(first["memories"])),
        "tokens in which neurons were watched": f"{tokens:,}",
        "bytes of held-out text": f"{sum(text['heldout_bytes'].values()):,}",
    }
    cells = [f"<div><b>{value}</b><span>{label}</span></div>" for label, value in cards.items()]
    return f"<div class=cards>{''.join(cells)}</div>\n"


def _section(title: str, body: Sequence[str]) -> str:
    name = re.sub(r"[^a-z]+", "-", title.lower()).strip("-")
    inner = "\n".join(body)
    return f'<section id="{name}">\n<h2>{escape(title)}</h2>\n{inner}\n</section>\n'


def _figure(name: str, figure: "Figure") -> str:
    about = words.words()["figures"][name]
    caption = f"<figcaption>{escape(about['caption'])}</figcaption>"
    drawn = svg(figure, name, about["alt"])
    return f'<figure id="figure-{name}">\n<div class=scroll tabindex=0>{drawn}</div>\n{caption}\n</figure>\n'


def svg(figure: "Figure", name: str, alt: str) -> str:
    """A figure as an SVG element: with a text for those who do not see it, ids of its own, and the page's colours."""
    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue().decode()
    text = text[text.index("<svg") :]
    for plain, themed in THEMED.items():
        text = text.replace(plain, themed)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{name}-", text)
    label = escape(alt, quote=True)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _table(found: Study, name: str) -> str:
    about, table = words.words()["tables"][name], found.tables[name]
    table = table[[column for column in about["columns"].split() or table if column in table]]
    head = "".join(f"<th{_side(table[column].iloc[0])}>{escape(column)}</th>" for column in table)
    lines = [
        "".join(f"<td{_side(value)}>{_cell(value)}</td>" for value in line)
        for line in table.itertuples(index=False, name=None)
    ]
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    folded = f"<summary>{escape(about['title'])} ({_several(len(table), 'line')})</summary>"
    html = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return (
        f"<details{' open' if len(table) <= OPEN else ''}>{folded}<div class=scroll tabindex=0>{html}</div></details>\n"
    )


def _side(value: object) -> str:
    """Words stand to the left, numbers to the right."""
    return " class=word" if isinstance(value, str) else ""


def _cell(value: object) -> str:
    if isinstance(value, list):
        return escape(", ".join(map(str, value)))
    if not isinstance(value, float):
        return "–" if value is None else escape(str(value))
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.4g}"


def _several(count: int, word: str) -> str:
    return f"{count} {word}{'s' * (count != 1)}"
