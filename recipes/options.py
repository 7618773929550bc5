"""Write the table of all options (options.json) and its page (docs/options.md) from the parsers: `make options`."""

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docstring_parser import parse
from lightning.pytorch.cli import LightningArgumentParser

from koff_lightning.cli import TOOLS, TRAINING
from koff_lightning.commands import training_cli
from koff_lightning.commands.parsing.option_table import FILE, LIGHTNINGS, Row

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
SECTIONS = ("model", "data", "anneal", "placement", "export", "lm_eval", "checkpoint", "trainer")  # ours first
WORDS = {  # without a value; training_cli turns them into options
    "fit": {"dry-run": "Show the parameter budget and the text, take two steps, write nothing."},
    "prepare": {"prefetch-only": "Fetch what a run needs, for a machine without network; tokenise nothing."},
    "baseline": {"no-score": "Do not score held-out text under the mask."},
}
# In place of what Lightning says to those who call it from Python.
MEANINGS = {
    "ckpt_path": "Checkpoint to go on from or to score: a file, or `last` for the newest intact one of the run.",
    "weights_only": "Read a checkpoint without running code of it, whatever it holds: leave this alone.",
    "verbose": "No effect: the report prints the scores.",
    "return_predictions": "No effect: predictions are written to predictions.jsonl.",
    "trainer.default_root_dir": "Folder of the run: what it leaves is written there.",
}


def collect() -> dict[str, Any]:
    """The table, as options.json holds it."""
    verbs: dict[str, Any] = {}
    shared: list[Row] = []
    for verb, about in TRAINING.items():
        rows = _training_options(parser_of(verb))
        own = [row for row in rows if row["name"].split(".")[0] not in SECTIONS and row["name"] != "seed_everything"]
        words = [
            {"name": name, "type": "", "default": "", "meaning": text} for name, text in WORDS.get(verb, {}).items()
        ]
        verbs[verb] = {"about": f"{about[0].upper()}{about[1:]}.", "trains": True, "options": [*words, *own]}
        shared = [row for row in rows if row["name"].split(".")[0] in SECTIONS or row["name"] == "seed_everything"]
    for verb, (place, _) in TOOLS.items():
        module, function = place.split(":")
        run = getattr(import_module(f"koff_lightning.{module}"), function)
        if list(inspect.signature(run).parameters) != ["argv"]:  # those have a parser of another project
            verbs[verb] = {"about": _about(run), "trains": False, "options": _tool_options(run)}
    return {"versions": {"lightning": version("lightning")}, "shared": shared, "verbs": verbs}


def parser_of(verb: str) -> LightningArgumentParser:
    """The parser of a training verb, before it has parsed anything."""
    found: list[LightningArgumentParser] = []

    class Stop(Exception):
        pass

    def stop(cli: training_cli.KoffCLI, parser: LightningArgumentParser, args: list[str]) -> None:
        found.append(cli._subcommand_parsers[verb])
        raise Stop

    before = training_cli.KoffCLI.parse_arguments
    training_cli.KoffCLI.parse_arguments = stop
    try:
        training_cli.run([verb])
    except Stop:
        return found[0]
    finally:
        training_cli.KoffCLI.parse_arguments = before
    raise AssertionError("the parser was never asked")


def _training_options(parser: LightningArgumentParser) -> list[Row]:
    rows = []
    for action in parser._actions:
        kind = getattr(action, "_typehint", None)
        if kind is None or not action.option_strings or action.dest.endswith(".help"):
            continue
        rows.append(_row(action.dest, kind, action.default, action.help))
        for part in get_args(kind):
            if is_dataclass(part) and NoneType in get_args(kind):  # LoRA or none: its options stand below it
                rows += _fields(part, f"{action.dest}.")
    order = {name: number for number, name in enumerate(SECTIONS)}
    return sorted(rows, key=lambda row: order.get(row["name"].split(".")[0], -1))  # stable: the parser's order within


def _fields(kind: type, before: str) -> list[Row]:
    told = {part.arg_name: part.description for part in parse(inspect.getdoc(kind) or "").params}
    hints = get_type_hints(kind)
    rows = []
    for field in fields(kind):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        rows.append(_row(before + field.name, hints[field.name], default, told.get(field.name)))
    return rows


def _tool_options(run: Callable[..., object]) -> list[Row]:
    told = {part.arg_name: part.description for part in parse(inspect.getdoc(run) or "").params}
    hints = get_type_hints(run)
    rows = []
    for name, parameter in inspect.signature(run).parameters.items():
        if name == "further":
            continue
        default = inspect.Parameter.empty if parameter.default is parameter.empty else parameter.default
        row = _row(name.rstrip("_"), hints[name], default, told.get(name))
        by_place = parameter.kind is not parameter.KEYWORD_ONLY and parameter.default is parameter.empty
        rows.append(row | ({"by_place": True} if by_place else {}))
    return rows


def _row(name: str, kind: Any, default: Any, meaning: str | None) -> Row:
    """One option; a default of null says nothing, since its meaning does."""
    if name == "trainer.default_root_dir":
        default = "runs/ and the names of the configs"
    plain = "" if default in (None, MISSING, inspect.Parameter.empty) else _plain(default)
    text = MEANINGS.get(name) or re.sub(r"\s*Defaults?( to)?:? ``[^`]*``\.?", "", " ".join((meaning or "").split()))
    return {"name": name, "type": type_words(kind), "default": plain, "meaning": text.replace("``", "`")}


def _plain(value: Any) -> str:
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif hasattr(value, "as_dict"):
        value = value.as_dict()
    return value if isinstance(value, str) else json.dumps(value, default=str)


def type_words(kind: Any) -> str:
    """A type as a person writes it: `int or null`, `'hc', 'ddp'`, `list of str`."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(dict.fromkeys(type_words(part) for part in get_args(kind)))
    if get_origin(kind) is Literal:
        return ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is not None:
        inner = [type_words(part) for part in get_args(kind) if part is not Ellipsis]
        return f"{get_origin(kind).__name__.lower()} of {' to '.join(inner)}".replace("sequence of", "list of")
    return "null" if kind is NoneType else getattr(kind, "__name__", str(kind))


def _about(run: Callable[..., object]) -> str:
    return " ".join((inspect.getdoc(run) or "").split("\n\n")[0].split())


def page(found: dict[str, Any]) -> str:
    """docs/options.md.

    Args:
        found: As `collect` gives it.
    """
    lines = [
        "# Every option",
        "",
        "Written by `make options` from the classes and functions themselves; a test holds it to them. A verb's "
        "help says the same: `koff VERB --help`. Units stand in the meanings: tokens, bytes (of UTF-8), steps (of the "
        "optimizer), shares (between 0 and 1). Names are written out in full: abbreviations are refused.",
        "",
        "A config of the training verbs nests the same names: `--model.sparsity.target 0.12` is "
        "`model: {sparsity: {target: 0.12}}`. `koff VERB CONFIG.yaml` is short for `koff VERB --config CONFIG.yaml`. "
        "`koff lm-eval --help` lists lm-eval's options and ours.",
        "",
        "## The training verbs: fit, validate, test, predict, prepare, baseline",
        "",
    ]
    training = [verb for verb, about in found["verbs"].items() if about["trains"]]
    for verb in training:
        lines += [
            f"### koff {verb}",
            "",
            found["verbs"][verb]["about"],
            "",
            *_rows(found["verbs"][verb]["options"]),
            "",
        ]
    for section in ("", *SECTIONS):
        rows = [row for row in found["shared"] if (row["name"].split(".")[0] if "." in row["name"] else "") == section]
        titles = {
            "": "Any training verb",
            "trainer": "`trainer`: Lightning's own",
            "checkpoint": "`checkpoint`: Lightning's",
        }
        lines += [f"### {titles.get(section, f'`{section}`')}", "", *_rows(rows), ""]
    lines += ["## The other verbs", ""]
    for verb in [verb for verb in found["verbs"] if verb not in training]:
        about = found["verbs"][verb]
        lines += [f"### koff {verb}", "", about["about"], "", *_rows(about["options"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _rows(rows: list[Row]) -> list[str]:
    if not rows:
        return ["No options of its own."]
    lines = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        cells = (f"`{row['name']}`" if row.get("by_place") else f"`--{row['name']}`", row["type"], row["default"])
        texts = [*(cell.replace("|", "\\|") for cell in cells), row["meaning"].replace("|", "\\|")]
        lines.append(f"| {' | '.join(texts)} |")
    return lines


def as_json(found: dict[str, Any]) -> str:
    """options.json."""
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def ours(found: dict[str, Any]) -> dict[str, Any]:
    """The table without what Lightning's release decides."""
    shared = [row for row in found["shared"] if row["name"].split(".")[0] not in LIGHTNINGS]
    own = ("ckpt_path", "weights_only", "return_predictions")  # of Lightning's methods
    verbs = {
        verb: about | {"options": [row for row in about["options"] if row["name"] not in own]}
        for verb, about in found["verbs"].items()
    }
    return {"shared": shared, "verbs": verbs}


if __name__ == "__main__":
    made = collect()
    FILE.write_text(as_json(made), encoding="utf-8")
    PAGE.write_text(page(made), encoding="utf-8")
