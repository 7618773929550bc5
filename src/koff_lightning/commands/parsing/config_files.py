"""Config files: those that ship with the package, how files are found by name, and how they are read."""

import builtins
import shutil
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from koff_lightning.support.errors import KoffError
from koff_lightning.support.wording import nearest
from koff_lightning.support.yaml_files import DEEPEST, compose

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

SHIPPED = Path(__file__).parents[2] / "configs"


def shipped_configs() -> dict[str, str]:
    """Name -> description, which is the first line of the file: `demo.yaml`, `ablations/lora_only.yaml`, ..."""
    files = sorted(SHIPPED.rglob("*.yaml"), key=lambda file: (len(file.relative_to(SHIPPED).parts), file))
    return {
        file.relative_to(SHIPPED).as_posix(): file.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# ")
        for file in files
    }


def list_configs(*, name: str | None = None, copy: bool | str = False) -> None:
    """Print the configs that ship with the package, a line each; or print or copy one of them.

    Args:
        name: Which, as listed; the word after the verb stands for it too: `koff configs demo.yaml`.
        copy: Write that config to a file of your own, by default of the same name in this folder, instead of printing.

    Raises:
        KoffError: No such config, or a file that is there already or cannot be written.
    """
    if name is not None:
        _show_or_copy(name, copy)
        return
    if copy is not False:
        raise KoffError("configs: which config? koff configs demo.yaml --copy")
    configs = shipped_configs()
    width = max(map(len, configs)) + 2
    columns = max(shutil.get_terminal_size((1000, 24)).columns, 2 * width)  # a line each where it is no terminal
    for name, description in configs.items():
        line = f"{name:<{width}}{description}"
        print(textwrap.fill(line, columns, subsequent_indent=" " * width, break_on_hyphens=False))


def _show_or_copy(name: str, copy: str | bool) -> None:
    if name not in shipped_configs():
        raise KoffError(f"no config {name!r} ships with the package.{_like(name)} `koff configs` lists them")
    text = (SHIPPED / name).read_text(encoding="utf-8")
    if copy is False:
        print(text, end="")
        return
    path = Path(Path(name).name if copy is True else copy).expanduser()
    try:
        with path.open("x", encoding="utf-8") as file:  # never over a file that is there
            file.write(text)
    except OSError as error:
        raise KoffError(f"cannot write {path}: {error.strerror}") from error
    print(f"wrote {path}: koff fit {path}")


def _places(name: str) -> tuple[Path, Path]:
    return Path(name).expanduser(), SHIPPED / name


def is_config(name: str) -> bool:
    """Whether there is a config of that name, as `find_config` looks for it."""
    return any(path.is_file() for path in _places(name))


def find_config(name: str) -> Path:
    """Path of a config: a file as named, else the shipped one of that name.

    Raises:
        KoffError: There is neither a file nor a shipped config of that name.
    """
    for path in _places(name):
        if path.is_file():
            return path
    raise KoffError(
        f"config {name!r} is neither a file here nor one that ships with the package."
        f"{_like(name)} `koff configs` lists them"
    )


def _like(name: str) -> str:
    """A hint at the config of a name like this; that all end alike makes none of them like it."""
    if f"{name}.yaml" in shipped_configs():
        return f" Did you mean '{name}.yaml'?"
    known = (config.removesuffix(".yaml") for config in shipped_configs())
    return nearest(name.removesuffix(".yaml"), known).replace("'?", ".yaml'?")


def find_configs(argv: list[str]) -> tuple[list[str], list[Path]]:
    """Replace the value of every `--config` (`-c`) by the path it stands for.

    Returns:
        The arguments to parse, and the config files in their order.
    """
    found: list[str] = []
    paths: list[Path] = []
    for index, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag == "--config" and equals:
            paths.append(find_config(value))
            found.append(f"--config={paths[-1]}")
        elif index and argv[index - 1] in ("--config", "-c"):
            paths.append(find_config(word))
            found.append(str(paths[-1]))
        else:
            found.append(word)
    return found, paths


@contextmanager
def utf8_files() -> Iterator[None]:
    """Configs are read and written in UTF-8 inside the block, whatever the encoding of the locale is."""
    from jsonargparse import _core, _paths  # they open files in the locale's; here, as listing configs needs no parser

    def utf8(file: Any, mode: str = "r", **options: Any) -> Any:
        return builtins.open(file, mode, **({} if "b" in mode else {"encoding": "utf-8"}) | options)

    for module in (_core, _paths):
        module.open = utf8  # stands before the builtin of that name
    try:
        yield
    finally:
        for module in (_core, _paths):
            del module.open


@contextmanager
def limited_yaml() -> Iterator[None]:
    """What options hold, and the files that some name in place of it, is read inside the block as configs are.

    The parser's own reader ends the process at a line of brackets.
    """
    from jsonargparse import get_loader, set_loader
    from jsonargparse._loaders_dumpers import get_loader_exceptions

    own, exceptions = get_loader("yaml"), get_loader_exceptions("yaml")

    def read(value: str) -> Any:
        try:
            if len(value) > DEEPEST:  # else it cannot be too deep
                compose(value, "what an option holds, or the file that it names,")
        except KoffError as error:
            if not isinstance(error.__cause__, yaml.YAMLError):  # text that is no YAML may be a text
                raise
        return own(value)

    set_loader("yaml", read, exceptions)
    try:
        yield
    finally:
        set_loader("yaml", own, exceptions)


def take_paths_as_paths(parser: "ArgumentParser", option: str) -> None:
    """Never open a file that a value of this option names.

    Where an option takes a class or a list, the parser reads a string that is the name of a file as a config with the
    value in it, so the text of a corpus could choose what else is read.
    """
    action = next(action for action in parser._actions if action.dest == option)
    action._enable_path = False
