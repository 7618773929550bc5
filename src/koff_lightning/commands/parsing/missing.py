"""What a command names and is not there: looked for before torch and Lightning are imported, which takes seconds.

Text, models, checkpoints, and what an earlier command has left. Only what is certainly missing is refused; what may be
on the hub, or matched by a pattern, is left to whoever reads it.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from koff_lightning.commands.parsing.option_types import as_meant
from koff_lightning.support.errors import KoffError, refused_by
from koff_lightning.support.json_files import read_json_object
from koff_lightning.support.names import AUTO, HUB_ID, may_be_had, refuse_no_memory, refuse_no_model, refuse_no_run
from koff_lightning.support.offline import is_asked

# Options that name what an earlier command has left.
CHECKPOINTS = ("ckpt_path", "model.mask", "model.prior", "model.warm_start")
ARTIFACTS = {"inspect": "folder", "generate": "model", "chat": "model", "serve": "artifact", "push": "artifact"}
ARTIFACTS |= {"router fit": "model", "router test": "model", "convert gguf": "folder"} | dict.fromkeys(
    ("memory list", "memory add", "memory remove", "memory compose", "memory cartridge"), "folder"
)
# Options that name memories of that artifact.
DOMAINS = {"generate": ["domain"], "chat": ["domain"], "push": ["domain"], "memory remove": ["domain"]}
DOMAINS |= {"memory compose": ["a", "b"]}
# Read a memory that is not in the artifact: by which option, what it is, and where there are some.
MEMORIES = {
    "memory add": ("memory", "memory", "DIR/memories/NAME of an exported model is one"),
    "memory cartridge": ("from", "adapter", "`koff memory cartridge DIR NAME --out FOLDER` writes one, as peft does"),
}
# Take what is on this machine alone, as to change it or to send it.
CHANGING = ("memory add", "memory remove", "memory compose", "push", "router fit")
NO_CHECKPOINT = "no such file. `koff fit` leaves one in runs/.../checkpoints/last.ckpt"


def refuse_missing(verb: str, given: Sequence[tuple[str, str | None]]) -> None:
    """Refuse a tool's checkpoint, artifact, memory or run that is not there.

    Raises:
        KoffError: It is missing.
    """
    values = dict(given)
    if (ckpt := values.get("ckpt")) is not None and not Path(ckpt).expanduser().exists():
        raise KoffError(f"checkpoint {ckpt}: {NO_CHECKPOINT}")
    if folder := ARTIFACTS.get(verb):
        _refuse_no_artifact(values.get(folder), verb not in CHANGING)
        named = [value for name, value in given if name in DOMAINS.get(verb, []) and value is not None]
        refuse_no_domain(values.get(folder), named)
    option, kind, hint = MEMORIES.get(verb, ("", "", ""))
    memory = values.get(option)
    if memory is not None and not Path(memory).expanduser().exists():
        raise KoffError(f"{kind} {memory!r}: no such folder. {hint}")
    _refuse_no_runs(given if verb == "analyze" else [])


def refuse_missing_of_run(verb: str, options: Iterable[tuple[str, object]]) -> None:
    """Refuse a run whose checkpoint, backbone or text is missing.

    Args:
        verb: Of training.
        options: Names and values of its options, those of its configs too; what is said last counts.

    Raises:
        KoffError: All that is missing.
    """
    values: dict[str, object] = {}
    texts: dict[str, dict[str, object]] = {"data.domains": {}, "data.retention": {}}
    for name, value in options:
        values[name] = value
        section = ".".join(name.split(".", 2)[:2])
        if name in texts:
            texts[name] = dict(_mapping(value))
            for domain, source in texts[name].items():
                _refuse_other_fields(domain, source)
        elif section in texts:
            domain, _, part = name.removeprefix(f"{section}.").partition(".")
            _refuse_other_fields(domain, {part.split(".")[0].removesuffix("+"): value} if part else value)
            texts[section][domain] = _with_part(texts[section].get(domain), part, value) if part else value
    if verb in ("validate", "test", "predict") and not values.get("ckpt_path"):
        raise KoffError(f"koff {verb} scores what a run has trained: give its --ckpt_path")
    backbone, artifact = values.get("model.backbone"), values.get("model.artifact")
    if is_asked():  # then all that is missing is told at once, also what would have to be fetched (needs.py)
        return
    looks = [partial(_refuse_missing_text, found) for found in texts.values() if found]
    if isinstance(artifact, str) and artifact not in ("", "null"):
        looks.insert(0, partial(_refuse_no_artifact, artifact, also_on_hub=False))
    elif isinstance(backbone, str) and not {"prefetch-only", "prefetch_only"} & set(values):  # which fetches it
        looks.insert(0, partial(refuse_no_model, backbone))
    if missing := refused_by(looks):
        raise KoffError("\n".join(missing))


def _refuse_other_fields(domain: str, source: object) -> None:
    """Refuse a field of a domain that none has: the parser would take the whole for a path. A class is left to it."""
    given = _mapping(source)
    if given and not {"class_path", "init_args"} & set(given):
        from koff_lightning.data.sources import refuse_other_fields

        refuse_other_fields(domain, given)


def _with_part(source: object, part: str, value: object) -> dict[str, object]:
    """A domain's source in full, of which an option of its own sets one part; only files are of interest here."""
    source = as_meant(source)
    whole = source if isinstance(source, dict) else {"files": source}
    return whole | ({part: value} if part in ("files", "heldout_files") else {})


def _refuse_missing_text(domains: dict[str, object]) -> None:
    """Look for the files and bundled text of all domains, unless some are far away."""
    from koff_lightning.data.remote import is_remote
    from koff_lightning.data.sources import as_sources, refuse_missing_files

    try:
        sources = as_sources({name: as_meant(value) for name, value in domains.items()})
        entries = [entry for source in sources.values() for entry in source.file_entries + source.heldout_entries]
        far = any(map(is_remote, entries))
    except (KoffError, TypeError, AttributeError, ValueError):  # for the parser to say
        return
    if not far:
        refuse_missing_files(sources)


def _mapping(value: object) -> dict[str, object]:
    """An option's mapping, if it is one that can be read here."""
    value = as_meant(value)
    return value if isinstance(value, dict) else {}


def _refuse_no_runs(given: Sequence[tuple[str, str | None]]) -> None:
    """Refuse places to analyze that hold no run, as far as that shows: a pattern, or what is on the hub, is left."""
    for name, value in given:
        place = {"model": value, "against": (value or "").partition("=")[2]}.get(name)
        if not place or set(place) & set("*?[,"):
            continue
        if Path(place).expanduser().exists() or not (HUB_ID.fullmatch(place) and may_be_had(place)):
            refuse_no_run(Path(place).expanduser())


def refuse_no_checkpoint(name: str, value: str) -> None:
    """Refuse the value of one of `CHECKPOINTS` where no file is."""
    if value in ("last", "best", "hpc", "null", "") or "://" in value or Path(value).expanduser().exists():
        return
    hint = ", and `last` stands for the newest of the run's folder" if name == "ckpt_path" else ""
    raise KoffError(f"{name} {value}: {NO_CHECKPOINT}{hint}")


def refuse_no_domain(folder: str | None, domains: Iterable[str]) -> None:
    """Refuse domains that an artifact in a folder here has no memory for; one that cannot be read is left.

    Raises:
        KoffError: It has no memory for one of them.
    """
    domains = list(domains)
    place = Path(folder or "").expanduser()
    if not (folder and domains and (place / "koff.json").is_file()):
        return
    known = None
    with suppress(KoffError):  # whoever reads all of it says what is wrong with it
        known = read_json_object(place / "koff.json").get("domains")
    if isinstance(known, dict):
        refuse_no_memory([name for name in domains if name != AUTO], known, place)


def _refuse_no_artifact(folder: str | None, also_on_hub: bool) -> None:
    if folder is None or Path(folder).expanduser().exists():
        return
    on_hub = also_on_hub and HUB_ID.fullmatch(folder)
    if on_hub and may_be_had(folder):
        return
    off = ", and no copy of it from the hub, which is switched off" if on_hub else ""
    raise KoffError(
        f"artifact {str(Path(folder).expanduser())!r}: no such folder{off}. `koff export --ckpt CHECKPOINT --out DIR` "
        "makes one"
    )
