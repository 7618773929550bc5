"""A first look at the words of a command, before torch and Lightning are imported, which takes seconds.

Only what is certainly wrong is refused, by the table of options; everything else is left to the parser, which knows
more.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from koff_lightning.commands.parsing.config_files import find_config, is_config
from koff_lightning.commands.parsing.missing import (
    CHECKPOINTS,
    refuse_missing,
    refuse_missing_of_run,
    refuse_no_checkpoint,
)
from koff_lightning.commands.parsing.option_table import LIGHTNINGS, NAMED, Options, Row, is_as_recorded
from koff_lightning.commands.parsing.option_types import as_meant, is_simple, parts_of, refuse_wrong_type
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


def look(verb: str, words: Sequence[str]) -> None:
    """Refuse what is certainly wrong among the words after `koff VERB`.

    Raises:
        KoffError: No such option, a value of the wrong type, or a checkpoint or artifact that is not there.
    """
    options = Options(verb)
    if options.trains:
        _look_at_run(words, options)
    else:
        _look_at_tool(words, options)


def _look_at_run(words: Sequence[str], options: Options) -> None:
    """Look at each option of the words and configs, then at the run as a whole."""
    given = list(_given(words, options))
    leaves = [leaf for name, value in given for leaf in _leaves_of(name, value, options)]
    for name, value in leaves:
        _check(name, value, options)
    has_config = any(name == "config" for name, _ in given)
    reads_all = options.verb == "baseline" and not any(name.startswith(("config", "data")) for name, _ in given)
    names = [name for name, value in leaves if value is not None]
    if not reads_all and not any(name in ("config", "data") or name.startswith("data.domains") for name in names):
        raise KoffError(NONE_NAMED if has_config else NO_DOMAINS)
    refuse_missing_of_run(options.verb, leaves)
    refuse_out_of_range(options.verb, leaves, options)


def _look_at_tool(words: Sequence[str], options: Options) -> None:
    """Look at each option of a tool, and at those of `koff fit` after a lone `--`; then for what they name."""
    verb = options.verb
    rest = [*words[words.index("--") + 1 :]] if verb in NAMED and "--" in words else []
    try:
        given = list(_given(words, options))
        for where, pairs in ((options, given), (Options("fit"), _given(rest, Options("fit")))):
            for name, value in pairs:
                _check(name, value, where)
        if due := [name for name in options.due() if name not in dict(given)]:
            names = ", ".join(name if name in options.placed else f"--{name}" for name in due)
            raise KoffError(f"the following arguments are required: {names}")
    except KoffError as error:
        raise KoffError(f"{verb}: {error}") from None
    for name, value in given:
        if verb in NAMED and name == "config" and value:
            _content(find_config(value))
    refuse_missing(verb, given)
    _refuse_no_arm(verb, dict(given))


def _refuse_no_arm(verb: str, values: dict[str, str | None]) -> None:
    """Refuse tables and arms that there are not, of the verbs whose every run is an arm."""
    names = {name: value for name in ("tables", "arms") if (value := values.get(name)) not in (None, "null")}
    if names and verb == "reproduce":
        from koff_lightning.studies.claims import paper_tables

        paper_tables.chosen(names.get("tables"), names.get("arms"))
    if names and verb == "claims":
        from koff_lightning.studies.claims.arms import chosen

        chosen(names["arms"])


def _given(words: Sequence[str], options: Options) -> Iterator[tuple[str, str | None]]:
    """Names and values among words, up to a lone `--`; a value that is not there is None."""
    places, rest = list(options.placed), list(words)
    while rest and (word := rest.pop(0)) != "--":
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--") if options.trains else flag.removeprefix("--").replace("-", "_")
        if options.trains and word == "-c" and rest:
            yield "config", rest.pop(0)
        elif not word.startswith("--"):
            if word.startswith("-") or not places:
                _refuse_alone(word, options)
            yield places.pop(0), word
        elif name in options.placed:
            _refuse_unknown(name, options)
        elif equals or (rest and _takes(options.get(name), rest[0], options.trains)):
            yield name, value if equals else rest.pop(0)
        elif options.trains and {"str", "int", "float"} & {*parts_of(options.get(name, {}).get("type", ""))}:
            raise KoffError(f"--{name} wants a value ({options[name]['type']})")
        else:
            yield name, None


def _takes(row: Row | None, word: str, trains: bool) -> bool:
    """Whether an option's value is the next word; a value of type `list of str` is taken as it stands."""
    kind = row["type"] if row else ""
    if kind == "bool" and not trains:
        return word in ("true", "false")
    return not word.startswith("--") or ("list of str" in kind and not trains)


def _leaves_of(name: str, value: object, options: Options) -> Iterator[tuple[str, object]]:
    """Names and values that an option stands for: those of a config or a section, down to what the table has.

    A config that is not read here, or not wholly, stands among them as `config`.
    """
    if name == "config" and isinstance(value, str) and value:
        content = _content(find_config(value))
        name, value = (name, value) if content is None else ("", content)
    found = as_meant(value)
    if not isinstance(found, dict) or not options.has_below(name) or {"class_path", "init_args"} & set(found):
        yield name, value
        return
    for key, inner in found.items():
        if "." in str(key):  # a later section of that name may take its place, or not
            yield "config", key
        yield from _leaves_of(f"{name}.{key}" if name else str(key), inner, options)


def _content(config: Path) -> dict[str, object] | None:
    """What a config says; None where looking through it is for the parser.

    Raises:
        KoffError: It holds something else than options.
    """
    import yaml

    if config.stat().st_size > LARGEST_CONFIG:
        return None
    try:
        text = config.read_text(encoding="utf-8")
        content = None if "&" in text else yaml.safe_load(text)  # anchors may stand for far more than they take
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError):
        return None
    if content is not None and not isinstance(content, dict):
        kind = "a list" if isinstance(content, list) else "a single word, number or text"
        raise KoffError(
            f"{config} holds {kind}, wanted are sections of options, as data: and below it domains: (`koff configs "
            "demo.yaml` prints a config)"
        )
    return content


def _check(name: str, value: object, options: Options) -> None:
    """Look at one option by itself."""
    name, adds = name.removesuffix("+"), name.endswith("+")
    if name.endswith(".help") or (options.trains and name.replace("_", "-") in HELD_BY_PARSER):
        return
    row = options.find(name)
    if row is None:
        _refuse_unknown(name, options)
    kind = row["type"] if row else ""
    if options.trains and (options.has_below(name) or kind.startswith("dict")):
        _refuse_word_for_section(name, value)
    plain = isinstance(value, str | bool | int | float)
    if plain and not (kind.startswith("list") and (adds or not options.trains)):  # which is given value by value
        refuse_wrong_type(name, value, kind)
    if name in CHECKPOINTS and isinstance(value, str):
        refuse_no_checkpoint(name, value)


def _refuse_unknown(name: str, options: Options) -> None:
    """Refuse an option that the table lacks, unless another release of Lightning or a class named there may have it."""
    section, _, _ = name.partition(".")
    if options.verb in NAMED and Options("fit").has_below(section):
        raise KoffError(
            f"{name} is an option of the runs: it goes after a lone --, koff {options.verb} ... -- --{name} VALUE"
        )
    if options.has_below(name) or (options.trains and name == "model.domains"):  # which the parser takes from the data
        return
    parts = name.split(".")
    above = [".".join(parts[:n]) for n in range(1, len(parts))]
    of_class = any(part in options and not is_simple(options[part]["type"]) for part in above)
    if of_class and not options.has_below(above[-1]):
        return
    if options.trains and section in LIGHTNINGS and not is_as_recorded("lightning"):
        return
    hint = nearest(name, options.named)
    same = name if name in options else next((other for other in options if other in MODELS), None)
    if same and not hint and not options.trains and name in (*MODELS, *options):  # what other verbs call it
        places = " ".join(options.placed).upper()
        placed = f" Here the {same} goes without --, by its place: {places}"
        hint = placed if same in options.placed else f" Did you mean {same!r}?"
    raise KoffError(f"no option {name!r}.{hint or ' --help lists them'}")


def _refuse_word_for_section(name: str, value: object) -> None:
    """Refuse a word where a section's options belong; a file may hold them, or a mapping in YAML."""
    if not isinstance(value, str) or value in ("", "null") or ":" in value or Path(value).expanduser().exists():
        return
    hint = f". To go on from a checkpoint: --ckpt_path {value}" if name == "checkpoint" else ""
    hint = f". The model itself: --model.backbone {value}" if name == "model" else hint
    raise KoffError(f"{name} has options of its own, a file of them or a mapping is wanted; got {value!r}{hint}")


def _refuse_alone(word: str, options: Options) -> None:
    verb = options.verb
    if word.startswith("-"):
        raise KoffError(f"no option {word!r}: names are written out, after --. `koff {verb} --help` lists them")
    if options.trains:
        hint = f". Did you mean '{word}.yaml'?" if is_config(f"{word}.yaml") else ""
        raise KoffError(
            f"{word!r} stands alone: configs come first (koff {verb} demo.yaml), each other value has a name{hint}"
        )
    due = [name for name in options.due() if name in options.named]
    hint = f" Perhaps --{(due or options.named)[0]} {word}?" if due or len(options.named) == 1 else ""
    raise KoffError(f"{word!r} stands alone, wanted is an option with a name.{hint} `koff {verb} --help` lists them")
