"""A first look at the words of a command, before torch and Lightning are imported, which takes seconds.

Only what is certainly wrong is refused, by the table of options; everything else is left to the parser, which knows
more.
"""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from koff_lightning.commands.parsing.config_files import find_config, is_config
from koff_lightning.commands.parsing.missing import (
    CHECKPOINTS,
    refuse_missing,
    refuse_missing_of_run,
    refuse_no_checkpoint,
)
from koff_lightning.commands.parsing.option_table import LIGHTNINGS, NAMED, Row, is_as_recorded, is_training, rows_of
from koff_lightning.commands.parsing.option_types import (
    InDoubtError,
    as_read,
    is_simple,
    parts_of,
    refuse_no_list,
    refuse_wrong_type,
)
from koff_lightning.commands.parsing.ranges import refuse_out_of_range
from koff_lightning.support.errors import KoffError
from koff_lightning.support.wording import nearest

LARGEST_CONFIG = 100_000  # bytes of a config that is looked through here
HELD_BY_PARSER = ("print-config", "config", "allow-custom-classes")  # of every training verb
MODELS = ("model", "artifact", "folder", "ckpt", "ckpt_path", "checkpoint")  # what verbs call it, or users do
NO_DOMAINS = "data.domains is empty: give a --config (`koff configs` lists them) or --data.domains.NAME SOURCE"
NONE_NAMED = (
    "data.domains is empty, no config given names it: add --config domains/law.yaml, say (`koff configs` lists "
    "more), or --data.domains.NAME SOURCE"
)
ALONE = ""  # stands for the name of a word that belongs to no option


def look(verb: str, words: Sequence[str]) -> None:
    """Refuse what is certainly wrong among the words after `koff VERB`.

    Raises:
        KoffError: No such option, a value of the wrong type, or a checkpoint or artifact that is not there.
    """
    rows = rows_of(verb)
    try:
        given = list(_given(words, rows, is_training(verb)))
        _look_at_options(verb, given, rows)
        if verb in NAMED:
            _look_at_the_rest(words)
    except KoffError as error:
        raise error if is_training(verb) else KoffError(f"{verb}: {error}") from None
    if not is_training(verb):
        _refuse_lack(verb, given, rows)
    takes = is_training(verb) or verb in NAMED
    configs = [find_config(value) for name, value in given if value and name == "config" and takes]
    for config in configs:
        _refuse_no_sections(config)
    if is_training(verb):
        _look_at_run(verb, given, configs, rows)
    refuse_missing(verb, given)
    _refuse_no_arm(verb, dict(given))


def _look_at_options(verb: str, given: Sequence[tuple[str, str | None]], rows: dict[str, Row]) -> None:
    """Look at each option by itself."""
    for name, value in given:
        if name == ALONE:
            _refuse_alone(verb, value, rows, is_training(verb))
        wants_value = name in rows and {"str", "int", "float"} & {*parts_of(rows[name]["type"])}
        if value is None and is_training(verb) and wants_value:
            raise KoffError(f"--{name} wants a value ({rows[name]['type']})")
        if verb in NAMED and name not in rows and _has_more(name.split(".")[0], rows_of("fit")):
            raise KoffError(
                f"{name} is an option of the runs: it goes after a lone --, koff {verb} ... -- --{name} VALUE"
            )
        _check(name, value, rows, is_training(verb))


def _refuse_lack(verb: str, given: Sequence[tuple[str, str | None]], rows: dict[str, Row]) -> None:
    """Refuse a tool's command without an option that it must have."""
    if due := [row for row in rows.values() if _is_due(row) and row["name"] not in dict(given)]:
        names = ", ".join(f"{'' if row.get('by_place') else '--'}{row['name']}" for row in due)
        raise KoffError(f"{verb}: the following arguments are required: {names}")


def _look_at_run(
    verb: str, given: Sequence[tuple[str, str | None]], configs: Sequence[Path], rows: dict[str, Row]
) -> None:
    """Look at a run as a whole, its configs among it: whether it names text, what is missing or out of range."""
    if verb != "baseline" and not configs and not any(name.startswith("data") for name, _ in given):
        raise KoffError(NO_DOMAINS)
    for config in configs:
        look_into(verb, config)
    leaves = list(_leaves_of(given, rows))
    if configs and not any(name in ("config", "data") or name.startswith("data.domains") for name, _ in leaves):
        raise KoffError(NONE_NAMED)
    refuse_missing_of_run(verb, leaves)
    refuse_out_of_range(verb, leaves, rows)


def _look_at_the_rest(words: Sequence[str]) -> None:
    """Refuse what is certainly wrong among the options of `koff fit` that stand after a lone `--`."""
    rows = rows_of("fit")
    for name, value in _given([*words[words.index("--") + 1 :]] if "--" in words else [], rows, True):
        if name != ALONE:
            _check(name, value, rows, True)


def _refuse_no_arm(verb: str, values: dict[str, str | None]) -> None:
    """Refuse tables and arms that there are not, of the verbs whose every run is an arm."""
    names = {name: value for name in ("tables", "arms") if (value := values.get(name)) not in (None, "null")}
    if names and verb == "reproduce":
        from koff_lightning.studies.claims import paper_tables

        paper_tables.chosen(names.get("tables"), names.get("arms"))
    if names and verb == "claims":
        from koff_lightning.studies.claims.arms import chosen

        chosen(names["arms"])


def _is_due(row: Row) -> bool:
    """Whether a tool's option must be given: it has neither a default nor null."""
    return row["default"] == "" and row["type"] and "null" not in parts_of(row["type"])


def _leaves_of(given: Sequence[tuple[str, str | None]], rows: dict[str, Row]) -> Iterator[tuple[str, object]]:
    """Names and values of the words and of the configs that they name, in their order.

    A config that is not read here, or not wholly, stands among them as `config`.
    """
    for name, value in given:
        found = value
        if name == "config" and value:
            found = _content(find_config(value))
        elif value is not None and value[:1] == "{" and _has_more(name, rows):
            with suppress(InDoubtError):
                found = as_read(value)
        if isinstance(found, dict):
            yield from _leaves(found, rows, "" if name == "config" else f"{name}.")
        else:
            yield name, value


def look_into(verb: str, config: Path) -> None:
    """Refuse unknown options of a config file, and values of a wrong type.

    Raises:
        KoffError: As `look`.
    """
    rows = rows_of(verb)
    for name, value in _leaves(_content(config), rows):
        _check(name, value, rows, is_training(verb))


def _refuse_no_sections(config: Path) -> None:
    """Refuse a config that holds something else than options; one that cannot be read is left to the parser."""
    content = _content(config)
    if content is not None and not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else "a single word, number or text"
        raise KoffError(
            f"{config} holds {kind}, wanted are sections of options, as data: and below it domains: (`koff configs "
            "demo.yaml` prints a config)"
        )


def _content(config: Path) -> object:
    """What a config says; None where looking through it is for the parser."""
    import yaml

    if config.stat().st_size > LARGEST_CONFIG:
        return None
    try:
        text = config.read_text(encoding="utf-8")
        return None if "&" in text else yaml.safe_load(text)  # anchors may stand for far more than they take
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError):
        return None


def _given(words: Sequence[str], rows: dict[str, Row], trains: bool) -> Iterator[tuple[str, str | None]]:
    """Names and values among words; a value that is not there is None."""
    places = [row["name"] for row in rows.values() if row.get("by_place")]
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--":  # what follows is for another verb
            return
        if trains and word == "-c" and rest:
            yield "config", rest.pop(0)
            continue
        if not word.startswith("--"):
            if places and not word.startswith("-"):
                yield places.pop(0), word
            elif not places:
                yield ALONE, word
            continue
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--") if trains else flag.removeprefix("--").replace("-", "_")
        if rows.get(name, {}).get("by_place") and rows[name]["default"] == "":
            _refuse_unknown(name, rows, trains)
        yield name, value if equals else rest.pop(0) if rest and _takes(rows.get(name), rest[0], trains) else None


def _takes(row: Row | None, word: str, trains: bool) -> bool:
    """Whether an option's value is the next word; a value of type `list of str` is taken as it stands."""
    kind = row["type"] if row else ""
    if kind == "bool" and not trains:
        return word in ("true", "false")
    return not word.startswith("--") or ("list of str" in kind and not trains)


def _leaves(options: object, rows: dict[str, Row], before: str = "") -> Iterator[tuple[str, object]]:
    """Dotted names and values of a config, down to the options that the table has."""
    if not isinstance(options, dict):
        return
    for key, value in options.items():
        name = f"{before}{key}"
        if "." in str(key):  # a later section of that name may take its place, or not
            yield "config", key
        if isinstance(value, dict) and _has_more(name, rows) and not {"class_path", "init_args"} & set(value):
            yield from _leaves(value, rows, f"{name}.")
        else:
            yield name, value


def _has_more(name: str, rows: dict[str, Row]) -> bool:
    """Whether it is a section, of which the table has the options."""
    return any(other.startswith(f"{name}.") for other in rows)


def _check(name: str, value: object, rows: dict[str, Row], trains: bool) -> None:
    name, adds = name.removesuffix("+"), name.endswith("+")
    if name.endswith(".help") or (trains and name.replace("_", "-") in HELD_BY_PARSER):
        return
    row = rows.get(name) or rows.get(name.replace("_", "-")) or rows.get(name.replace("-", "_"))
    if row is None:
        _refuse_unknown(name, rows, trains)
    if trains and (_has_more(name, rows) or (row or {}).get("type", "")[:4] == "dict"):
        _refuse_word_for_section(name, value)
    if row is not None and isinstance(value, str | bool | int | float):
        refuse_wrong_type(name, value, row["type"])
        if trains and not adds:  # a tool's is given value by value
            refuse_no_list(name, value, row["type"])
        if name in CHECKPOINTS and isinstance(value, str):
            refuse_no_checkpoint(name, value)


def _refuse_unknown(name: str, rows: dict[str, Row], trains: bool) -> None:
    if trains and name == "model.domains":  # taken from data.domains: the parser says so
        return
    parts = name.split(".")
    above = [".".join(parts[:n]) for n in range(1, len(parts))]
    if _has_more(name, rows):  # a section as a whole
        return
    if any(part in rows and not is_simple(rows[part]["type"]) for part in above):  # of a class that is named there
        known = [other for other in rows if other.startswith(f"{above[-1]}.")]
        if not known:
            return
    if trains and parts[0] in LIGHTNINGS and not is_as_recorded("lightning"):
        return
    names = [row["name"] for row in rows.values() if trains or not row.get("by_place") or row["default"]]
    hint = nearest(name, names)
    row = rows.get(name) or next((row for row in rows.values() if row["name"] in MODELS), {})
    if row and not hint and not trains and name in (*MODELS, *rows):  # what other verbs call it, or its place has
        places = " ".join(other["name"].upper() for other in rows.values() if other.get("by_place"))
        placed = f" Here the {row['name']} goes without --, by its place: {places}"
        hint = placed if row.get("by_place") else f" Did you mean {row['name']!r}?"
    raise KoffError(f"no option {name!r}.{hint or ' --help lists them'}")


def _refuse_word_for_section(name: str, value: object) -> None:
    """Refuse a word where a section's options belong; a file may hold them, or a mapping in YAML."""
    if not isinstance(value, str) or value in ("", "null") or ":" in value or Path(value).expanduser().exists():
        return
    hint = f". To go on from a checkpoint: --ckpt_path {value}" if name == "checkpoint" else ""
    hint = f". The model itself: --model.backbone {value}" if name == "model" else hint
    raise KoffError(f"{name} has options of its own, a file of them or a mapping is wanted; got {value!r}{hint}")


def _refuse_alone(verb: str, word: str, rows: dict[str, Row], trains: bool) -> None:
    if word.startswith("-"):
        raise KoffError(f"no option {word!r}: names are written out, after --. `koff {verb} --help` lists them")
    if trains:
        hint = f". Did you mean '{word}.yaml'?" if is_config(f"{word}.yaml") else ""
        raise KoffError(
            f"{word!r} stands alone: configs come first (koff {verb} demo.yaml), each other value has a name{hint}"
        )
    named = [row["name"] for row in rows.values() if not row.get("by_place")]
    due = [row["name"] for row in rows.values() if _is_due(row) and not row.get("by_place")]
    hint = f" Perhaps --{(due or named)[0]} {word}?" if due or len(named) == 1 else ""
    raise KoffError(f"{word!r} stands alone, wanted is an option with a name.{hint} `koff {verb} --help` lists them")
