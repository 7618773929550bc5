"""Names that become folders, parameters and options: one rule."""

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import own_cache
from koff_lightning.support.wording import nearest

AUTO = "auto"  # in place of a domain's name: ask the router
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")  # org/name, org/name@revision
FETCHED = ("smollm2", "qwen2.5-coder-1.5b")  # models that `koff fetch` knows (commands/fetch.py)
TAKEN = {  # words that mean something where a domain is named: a memory called so could not be asked for, or told apart
    AUTO: "asks the router",
    "all": "stands for all domains",
    "none": "stands for the backbone without a memory",
    "dense": "stands for the dense model",
    "null": "is read as no domain",
}
GENERAL = "general/"  # begins the names of general text among held-out rows; no domain's name has a slash
_NUMBER = re.compile(r"-?[\d.]+")
_SAFE = re.compile(r"[A-Za-z0-9_-]{1,64}")


def word_of(source: object) -> str:
    """The word by which a model is named; a path is one.

    Raises:
        KoffError: The model itself is given, or something else.
    """
    if not isinstance(source, str | os.PathLike):
        raise KoffError(
            f"backbone must be a hub id, a folder, a .gguf file or 'koff-tiny'; got {type(source).__name__}. Save a "
            "model of your own with save_pretrained, its tokenizer too, and give the folder"
        )
    return os.fspath(source)


def refuse_no_model(source: str) -> None:
    """Refuse the name of a backbone that can only be a path, and of one where nothing is.

    Raises:
        KoffError: There is no such folder or file, nor, where the hub is switched off, a copy.
    """
    is_path = source.count("/") > 1 or source.startswith((".", "/", "~")) or source.endswith(".gguf")
    path = Path(source).expanduser()
    if is_path and not (path.is_file() if source.endswith(".gguf") else path.exists()):
        if source.endswith(".gguf"):
            raise KoffError(
                f"backbone {source!r}: no such file. `koff fetch NAME` gets one ({' or '.join(FETCHED)}); a hub id or "
                "a folder also works"
            )
        raise KoffError(
            f"backbone {source!r}: no such folder. Give a folder, a .gguf file, a hub id (owner/name) or 'koff-tiny'"
        )
    if _NUMBER.fullmatch(source) and not path.exists():
        raise KoffError(
            f"backbone {source!r} is a number, and no such folder: give a folder, a .gguf file, a hub id (owner/name) "
            "or 'koff-tiny'"
        )
    if "/" not in source and source != "koff-tiny" and (hint := nearest(source, ["koff-tiny"])) and not path.exists():
        raise KoffError(f"backbone {source!r}: no such folder.{hint}")
    if not is_path and source not in ("", "koff-tiny") and not path.exists() and not may_be_had(source):
        raise KoffError(
            f"backbone {source!r}: no such folder here, and no copy of it from the hub, which is switched off: give a "
            "folder, a .gguf file, a hub id (owner/name) or 'koff-tiny'"
        )


def repo_id(name: str) -> str:
    """The same name of a repository on the hub, without a revision.

    Raises:
        KoffError: The hub takes none of that name.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        if "@" not in name and HUB_ID.fullmatch(name):
            return name
    except HFValidationError:
        pass
    raise KoffError(f"a repository of the hub is named org/name; got {name!r}")


def may_be_had(name: str) -> bool:
    """Whether a hub's model or artifact may be had: a copy is in a cache, or the hub is not switched off."""
    from huggingface_hub import constants  # nothing heavy

    kept = name.partition("@")[0].replace("/", "--")
    return (
        not constants.HF_HUB_OFFLINE
        or Path(constants.HF_HUB_CACHE, f"models--{kept}").exists()
        or any((own_cache() / "hub").glob(f"{kept}@*"))
    )


def refuse_no_memory(domains: Iterable[str], known: Collection[str], where: object) -> None:
    """Raise KoffError unless the artifact at `where`, whose memories are of the domains `known`, has each of these."""
    if unknown := [name for name in domains if name not in known]:
        raise KoffError(f"{where} has no memory for {unknown[0]!r}; it has {', '.join(known) or 'none'}")


def refuse_no_run(path: Path) -> None:
    """Refuse a place where nothing is, and a folder that holds neither an exported model nor a checkpoint.

    Raises:
        KoffError: The folder holds no run; what has files that only look wrong is left to whoever reads it.
    """
    if not path.exists():
        raise KoffError(f"{path}: no such run: give a checkpoint, or the folder of a run or of an exported model")
    marks = ("koff.json", "artifact/koff.json", "config.json")  # the last is of a model, which has a word of its own
    if not path.is_dir() or any((path / name).is_file() for name in marks):
        return
    for place, folders, files in os.walk(path):
        linked = any(os.path.islink(os.path.join(place, name)) for name in folders)
        if linked or any(name.endswith(".ckpt") for name in (*folders, *files)):
            return
    if (path / "results.json").exists() or any(path.glob("version_*")) or (path / "checkpoints").exists():
        raise KoffError(
            f"{path} is the folder of a run without a checkpoint or an exported model: it has saved none yet, or they "
            "were moved. Give the place where they are, or train it with `koff fit`"
        )
    raise KoffError(
        f"{path} holds neither a checkpoint nor koff.json of an exported model: give the folder of a run, a checkpoint "
        "or what `koff export` wrote"
    )


def check_name(name: object) -> None:
    """Refuse a domain's name that is not safe as the name of a folder.

    Raises:
        KoffError: It is no text of 1 to 64 letters, digits, `_` and `-`.
    """
    if not isinstance(name, str) or not _SAFE.fullmatch(name):
        raise KoffError(
            f"domain name {name!r} is not safe as a file name: use 1 to 64 of the letters a-z A-Z, digits, '_' and '-'"
        )


def refuse_taken(names: Iterable[str]) -> None:
    """Refuse names for new domains that are words; artifacts and checkpoints that have such a one are still read.

    Raises:
        KoffError: One of them is in `TAKEN`.
    """
    for name in names:
        if name in TAKEN:
            raise KoffError(
                f"a domain cannot be called {name!r}, which {TAKEN[name]} where a domain is asked for: give it another "
                "name"
            )


def check_names(names: Iterable[str]) -> None:
    """The same of several, of which no two may be alike."""
    if isinstance(names, str):
        raise KoffError(f"domains must be a list of names; got the text {names!r}: give [{names!r}]")
    names = list(names)
    for name in names:
        check_name(name)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise KoffError(f"domain {twice[0]!r} is given more than once")
