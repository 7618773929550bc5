"""The words of the page, from words.yaml: what each part shows, how it was measured, what to doubt, sources."""

import re
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

import yaml

from koff_lightning.studies.analysis.study import Study

ENOUGH_RUNS = 3


@cache
def words() -> dict[str, Any]:
    """The file."""
    return yaml.safe_load(Path(__file__).with_name("words.yaml").read_text(encoding="utf-8"))


def linked(text: str) -> str:
    """Text as HTML, with the [names] of sources as references."""
    numbers = {name: place for place, name in enumerate(words()["sources"], 1)}
    return re.sub(r"\[(\w+)\]", lambda m: f'<a href="#source-{m[1]}">[{numbers[m[1]]}]</a>', escape(text))


def sources() -> str:
    """The list that references point to."""
    items = []
    for name, source in words()["sources"].items():
        link = f' <a href="{source["url"]}">{escape(source["label"])}</a>' if "url" in source else ""
        items.append(f'<li id="source-{name}">{escape(source["title"])}.{link}</li>')
    return f"<ol>{''.join(items)}</ol>"


def methods(found: Study) -> str:
    """How every figure comes about, with this study's own settings."""
    s, text = found.settings, found.about["text"]
    named = {
        "origin": text["origin"],
        "tokens": _listed(text["watched_tokens"]),
        "heldout": _listed(text["heldout_bytes"]),
        "bar": f"{100 * s.bar:g}",
        "rate": f"{100 * s.rate:g}",
        "draws": f"{s.draws:,}",
        "resamples": f"{s.resamples:,}",
    }
    entries = {title: linked(body.format(**named)) for title, body in words()["methods"].items()}
    return "<dl>" + "".join(f"<dt>{escape(title)}</dt><dd>{body}</dd>" for title, body in entries.items()) + "</dl>"


def doubts(found: Study) -> str:
    """What a careful reader would ask about these figures."""
    count, lines = len(found.about["runs"]), list(words()["doubts"])
    if count < ENOUGH_RUNS:
        runs = "is one run" if count == 1 else f"are {count} runs"
        lines.insert(0, f"There {runs}: how much another seed would differ is not known. Give several --model.")
    if "ratios" not in found.tables:
        lines.insert(0, "No other mask was compared with (--against): whether any pruner would do the same is open.")
    if (stable := found.about.get("stability")) and "less than" in stable:
        lines.insert(0, f"Too little text: {stable}.")
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{domain} {count:,}" for domain, count in counts.items())
