"""A verb's options, read from its function: what stands before `*` in the signature by place, the rest by name.

A parameter with a default is always an option. One of type `list[str]` may be given several times, each time with one
value that is taken as it stands: a prompt is text, not YAML. One of type `bool` needs no value, and one of type
`bool | str` may do without. Dashes in a name are as good as underscores; a trailing underscore, which Python wants
where a name is a word of its own, is not part of it.
A function whose one parameter is `argv` parses its words itself.
What follows a lone `--` goes as it stands to the parameter `further`, for verbs that pass options on.
"""

import inspect
from collections.abc import Callable
from typing import Any, get_args

from koff_lightning.support.errors import KoffError
from koff_lightning.support.wording import one_line


def parse(verb: str, run: Callable[..., object], argv: list[str]) -> dict[str, Any]:
    """The keyword arguments for `run` that the words after `koff VERB` stand for.

    Raises:
        KoffError: Words that the function's signature does not allow.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parameters = inspect.signature(run).parameters
    if list(parameters) == ["argv"]:
        return {"argv": argv}
    flags = {name for name, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY}
    about = (inspect.getdoc(run) or "").split("\n\n")[0]
    parser = ArgumentParser(prog=f"koff {verb}", description=about, exit_on_error=False)
    parser.add_function_arguments(run, as_group=False, as_positional=True, skip=flags)
    parser.add_function_arguments(run, as_group=False, skip=set(parameters) - flags)
    _drop_underscores(parser)
    words, lists = _split(argv, {name: parameter.annotation for name, parameter in parameters.items()})
    try:
        options = parser.parse_args(words)
    except ArgumentError as error:
        names = [n.rstrip("_") for n, p in parameters.items() if n in flags or p.default is not p.empty]
        raise KoffError(f"{verb}: {one_line(str(error), names).rstrip('_')}") from error
    return options.as_dict() | lists


def _split(argv: list[str], types: dict[str, object]) -> tuple[list[str], dict[str, list[str]]]:
    """The words in the parser's spelling; and the options of type `list[str]`, which it would read as YAML."""
    rest: list[str] = []
    lists: dict[str, list[str]] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if word == "--" and "further" in types:
            lists["further"] = words[:]
            words.clear()
        elif not flag.startswith("--") or name not in types:
            rest.append(word)
        elif list[str] in (types[name], *get_args(types[name])) and (equals or words):
            lists.setdefault(name, []).append(value if equals else words.pop(0))
        elif not equals and _stands_alone(types[name], words):
            rest.append(f"--{name}=true")
        else:
            rest.append(f"--{name}{equals}{value}")
    return rest, lists


def _stands_alone(kind: object, words: list[str]) -> bool:
    """Whether an option has no value among the words that follow it."""
    if bool in get_args(kind):
        return not words or words[0].startswith("--")
    return kind is bool and words[:1] not in (["true"], ["false"])


def _drop_underscores(parser: Any) -> None:
    for action in parser._actions:
        if action.option_strings and action.dest.endswith("_"):
            action.option_strings = [f"--{action.dest.rstrip('_')}"]
            action.metavar = action.dest.rstrip("_").upper()
            parser._option_string_actions[action.option_strings[0]] = action
