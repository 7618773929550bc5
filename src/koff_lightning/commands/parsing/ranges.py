"""Values out of range: told before torch and Lightning are imported, by the rules that the run itself goes by.

A rule looks at a section as a whole. It is asked only where all that a command says of its section is plain; what comes
from a file of its own, as a class, or by `KEY+` is left to the parser, which knows more.
"""

from collections.abc import Callable, Container, Iterable, Mapping
from contextlib import suppress
from inspect import signature
from typing import Any

from koff_lightning.commands.parsing.option_types import InDoubtError, as_read, typed
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.specs.text import check_data
from koff_lightning.specs.timing import check_anneal, check_lm_eval, check_placement
from koff_lightning.specs.training import LossSpec, OptimSpec, RetentionSpec

Rows = Mapping[str, Mapping[str, Any]]  # of the table, by the options' names

RULES: dict[str, Callable[..., object]] = {  # section -> what refuses its values, in the order in which a run asks
    "model.lora": LoraSpec,
    "model.kv": KVSpec,
    "model.retention": RetentionSpec,
    "model.sparsity": SparsitySpec,
    "model.loss": LossSpec,
    "model.optim": OptimSpec,
    "data": check_data,
    "anneal": check_anneal,
    "placement": check_placement,
    "lm_eval": check_lm_eval,
}


def refuse_out_of_range(verb: str, options: Iterable[tuple[str, object]], rows: Rows) -> None:
    """Refuse values that the classes of a run would refuse.

    Args:
        verb: Of training.
        options: Names and values of its options, those of its configs too; what is said last counts. Where a config was
            not read, or not wholly, `config` is among them.
        rows: The table's rows of its options, by name.

    Raises:
        KoffError: As the class of a section says it.
    """
    options = list(options)
    names = {name.replace("-", "_") for name, _ in options}
    if names & {"config", "print_config"} or any(name.endswith(".help") for name in names):
        return  # the last two end before anything is made of the options
    rules = RULES
    if verb == "prepare":  # makes the data alone, and with --prefetch-only nothing
        rules = {} if "prefetch_only" in names else {"data": check_data}
    if verb == "baseline":  # makes no memories
        rules = {section: rule for section, rule in RULES.items() if section not in ("model.lora", "model.kv")}
        options += [("model.sparsity.target", value) for name, value in options if name == "sparsity"]
    for section, rule in rules.items():
        wanted = signature(rule).parameters
        with suppress(InDoubtError):
            if given := _given(section, wanted, options, rows):
                rule(**_defaults(section, wanted, rows) | given)


def _given(section: str, wanted: Container[str], options: list[tuple[str, object]], rows: Rows) -> dict[str, object]:
    """What is said of the options of a section that its rule looks at; empty where nothing is, or null at last.

    Raises:
        InDoubtError: Not all of it is plain.
    """
    given: dict[str, object] = {}
    for name, value in options:
        option = name.removeprefix(f"{section}.")
        if name == section and as_read(value) is None:
            given = {}  # and what follows starts from the defaults
        elif f"{section}.".startswith(f"{name}."):
            raise InDoubtError
        elif option != name and option in wanted:
            given[option] = typed(value, rows[name]["type"])
        elif option != name and f"{section}.{option.partition('.')[0]}" not in rows:
            raise InDoubtError
    return given


def _defaults(section: str, wanted: Iterable[str], rows: Rows) -> dict[str, object]:
    """The values that the table has for all options that a rule looks at."""
    of_section = {option: rows[f"{section}.{option}"] for option in wanted}
    return {option: typed(row["default"] or None, row["type"]) for option, row in of_section.items()}
