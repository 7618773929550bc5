"""Where the text of a domain comes from: text that ships with the package, local files, datasets on the hub."""

import errno
import glob
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from koff_lightning.data.hub_copy import find_copy
from koff_lightning.data.readers import Fields, format_of, written
from koff_lightning.data.remote import RemoteFile, find_remote, is_remote
from koff_lightning.data.shards import FileShard, Shard, hub_shards, is_out_of_reach
from koff_lightning.support.errors import KoffError, refused_by
from koff_lightning.support.names import check_name
from koff_lightning.support.secrets import without_secrets
from koff_lightning.support.wording import nearest

BUNDLED, HUB = "bundled:", "hub:"
BUNDLED_DIR = Path(__file__).resolve().parents[1] / "tiny" / "corpora"
Side = Literal["training", "held out", "by hash"]
Chat = Literal["all", "answers"]  # what of a talk is predicted


@dataclass(frozen=True)
class DomainSource:
    """Text of one domain.

    Args:
        files: ``bundled:<name>``, a file, a glob (``**`` for any depth), an address (``s3://``, ``gs://``,
            ``https://``), ``hub:<dataset>`` or ``hub:<dataset>@<revision>``, or a list of these. Kinds of file: jsonl,
            csv, txt (one document per file), each also .gz, .xz or .zst, and parquet.
        text_field: Field or column that holds the text.
        id_field: Field or column that holds the document id; documents without one are split by their text.
        weight: Share of the training rows relative to the other domains.
        heldout_files: Files or globs whose documents are all held out; all of `files` is then training text. By
            default documents of `files` are held out by the hash of their id.
        subset: Subset of hub datasets, which the hub also calls configuration: ``deu_Latn`` of FineWeb-2, say.
        split: Split of hub datasets.
        where: Only records with one of these values in a field: ``{topic: [history, geography]}``; of a field that
            holds a list one of its values is enough.
        chat: Documents are talks, in a field ``messages`` (or text_field) or in ``prompt`` and ``completion``, and are
            written by the tokenizer's chat template: ``answers`` predicts what the assistant says alone, ``all`` all of
            it.
        max_documents: At most so many documents of `files`, the first in file order of those that `where` wants; what
            is held out by hash is held out of these.
    """

    files: str | list[str]
    text_field: str = "text"
    id_field: str = "id"
    weight: float = 1.0
    heldout_files: str | list[str] | None = None
    subset: str | None = None
    split: str = "train"
    where: dict[str, Any] | None = None
    chat: Chat | None = None
    max_documents: int | None = None

    @property
    def fields(self) -> Fields:
        """Where a record holds its document; `where` in the order of its names, each with all its values."""
        items = [(name, value if isinstance(value, list) else [value]) for name, value in (self.where or {}).items()]
        where = tuple((name, tuple(map(written, values))) for name, values in sorted(items))
        return Fields(self.text_field, self.id_field, bool(self.chat), where)

    @property
    def choice(self) -> list[Any]:
        """What of the records is taken, where that is not all: with it two texts of the same files are told apart."""
        limit = [{"max_documents": self.max_documents}] if self.max_documents else []
        return ([self.fields.where] if self.where else []) + limit

    @property
    def entries(self) -> list[str]:
        """`files` as a list."""
        return [self.files] if isinstance(self.files, str) else list(self.files)

    @property
    def bundled_entries(self) -> list[str]:
        """Names of bundled domains among `files`."""
        return [entry.removeprefix(BUNDLED) for entry in self.entries if entry.startswith(BUNDLED)]

    @property
    def hub_entries(self) -> list[str]:
        """Datasets of the hub among `files`, each as name or name@revision."""
        return [entry.removeprefix(HUB) for entry in self.entries if entry.startswith(HUB)]

    @property
    def file_entries(self) -> list[str]:
        """Files and globs among `files`."""
        return [entry for entry in self.entries if not entry.startswith((BUNDLED, HUB))]

    @property
    def heldout_entries(self) -> list[str]:
        """`heldout_files` as a list, empty where the split is by hash."""
        return [self.heldout_files] if isinstance(self.heldout_files, str) else list(self.heldout_files or [])


def as_sources(domains: Mapping[str, DomainSource | Mapping[str, Any] | str | list[str]]) -> dict[str, DomainSource]:
    """Check names and weights and write the short forms (one entry, a list of entries) in full.

    Raises:
        KoffError: No domain, a name that is not safe as a file name, two names that differ in case only, a domain
            without files, bundled text together with heldout_files, or a weight that is not a finite number above 0.
    """
    if not domains:
        raise KoffError("data.domains is empty: name at least one domain, for example 'de: bundled:de'")
    if not isinstance(domains, Mapping):
        raise KoffError(f"data.domains must be a mapping of names to text, such as 'de: bundled:de'; got {domains!r}")
    sources: dict[str, DomainSource] = {}
    for name, value in domains.items():
        _check_name(name, sources)
        source = _as_source(name, value)
        if not source.entries:
            raise KoffError(
                f"domain '{name}' has an empty list of files: give at least one file, glob or 'bundled:<name>'"
            )
        if isinstance(source.weight, bool) or not (math.isfinite(source.weight) and source.weight > 0):
            raise KoffError(f"domain '{name}': weight must be a finite number above 0, got {source.weight}")
        _check_heldout_files(name, source)
        _check_where(name, source)
        _check_max_documents(name, source)
        if source.chat not in (None, "all", "answers"):
            raise KoffError(f"domain '{name}': chat must be 'all' or 'answers' (or null for text), got {source.chat!r}")
        if source.chat and source.bundled_entries:
            raise KoffError(f"domain '{name}': bundled text holds no talks: leave chat out")
        sources[name] = source
    return sources


def as_shares(sources: Mapping[str, DomainSource], temperature: float) -> dict[str, float]:
    """Shares of the domains, weight ** (1 / temperature), in units of the largest: no weight is too large for a float.

    Raises:
        KoffError: A share that is too small beside the largest for a float to hold it.
    """
    logs = {name: math.log(source.weight) / temperature for name, source in sources.items()}
    shares = {name: math.exp(log - max(logs.values())) for name, log in logs.items()}
    for name, share in shares.items():
        if not share > 0:  # also where it is no number: the temperature is too small for any weight
            raise KoffError(
                f"domain '{name}': its weight of {sources[name].weight} at data.temperature={temperature} is a share "
                "of nothing beside the other domains: raise data.temperature, or bring the weights closer together"
            )
    return shares


def _as_source(name: str, value: Any) -> DomainSource:
    if not isinstance(value, Mapping | DomainSource):
        value = {"files": value}
    if isinstance(value, Mapping):
        refuse_other_fields(name, value)
        try:
            value = DomainSource(**value)
        except TypeError as error:
            raise KoffError(f"domain '{name}': {error}. Its fields are those of DomainSource") from error
    heldout = value.heldout_files
    return replace(value, files=_words(name, value.files), heldout_files=heldout and _words(name, heldout))


def _words(name: str, files: Any) -> str | list[str]:
    """Entries of a domain as words, paths among them too; text itself is refused."""
    entries = files if isinstance(files, list | tuple) else [files]
    if odd := [entry for entry in entries if not isinstance(entry, str | os.PathLike)]:
        raise KoffError(
            f"domain '{name}' names its text: files, globs, 'hub:<dataset>' or 'bundled:<name>'; got "
            f"{type(odd[0]).__name__}. Write text from Python to a file first, such as "
            "dataset.to_parquet('mine.parquet') or a jsonl"
        )
    words = [os.fspath(entry) for entry in entries]
    return words if isinstance(files, list | tuple) else words[0]


def refuse_other_fields(name: str, given: Iterable[str]) -> None:
    """Raise KoffError where a domain is given a field that none has."""
    known = [field.name for field in fields(DomainSource)]
    if odd := [field for field in given if field not in known]:
        raise KoffError(
            f"domain '{name}' has no field {odd[0]!r:.60}.{nearest(str(odd[0]), known)} It may have {', '.join(known)}"
        )


def _check_heldout_files(name: str, source: DomainSource) -> None:
    if source.heldout_files is None:
        return
    if not source.heldout_entries:
        raise KoffError(
            f"domain '{name}': heldout_files is empty: name a file or glob, or leave it out to split by hash"
        )
    bundled = [entry for entry in source.heldout_entries + source.entries if entry.startswith(BUNDLED)]
    if bundled:
        raise KoffError(
            f"domain '{name}': '{bundled[0]}' comes already split and cannot be combined with heldout_files: leave "
            "heldout_files out, or make the bundled text a domain of its own"
        )
    hub = [entry for entry in source.heldout_entries if entry.startswith(HUB)]
    if hub:
        raise KoffError(f"domain '{name}': heldout_files names local files, got '{hub[0]}'")


def _check_where(name: str, source: DomainSource) -> None:
    if source.where in (None, {}):
        return
    for field, value in source.where.items() if isinstance(source.where, Mapping) else [("", None)]:
        values = value if isinstance(value, list) else [value]
        if not isinstance(field, str) or not values or any(not isinstance(v, str | int | float) for v in values):
            raise KoffError(
                f"domain '{name}': where names fields, each with a value or a list of them, as in "
                f"{{topic: [history, geography]}}; got {source.where!r}"
            )
        if any(isinstance(v, bool) for v in values) and any(isinstance(v, str) for v in values):
            raise KoffError(  # YAML reads an unquoted no as false
                f"domain '{name}': where.{field} holds {values!r}: put words such as no, off and yes in quotes"
            )
    if source.bundled_entries:
        raise KoffError(f"domain '{name}': bundled text has no fields to choose by: leave where out")


def _check_max_documents(name: str, source: DomainSource) -> None:
    limit = source.max_documents
    if limit is None:
        return
    if type(limit) is not int or limit < 1:
        raise KoffError(f"domain '{name}': max_documents must be 1 or more (or null for no limit), got {limit!r}")
    if source.bundled_entries:
        raise KoffError(f"domain '{name}': bundled text comes already split: leave max_documents out")


def _check_name(name: object, known: Mapping[str, DomainSource]) -> None:
    if not isinstance(name, str):  # YAML reads an unquoted no as false (and 1 as a number)
        raise KoffError(f"domain name {name!r} is not text: put it in quotes, for example 'no': (Norwegian) or '1':")
    check_name(name)
    clash = next((other for other in known if other.lower() == name.lower()), None)
    if clash is not None:
        raise KoffError(
            f"duplicate domain names '{clash}' and '{name}': they would share a file on some systems; rename one"
        )


def domain_shards(source: DomainSource, streamed: bool = False) -> list[tuple[Shard, Side]]:
    """All shards of a domain and which side their documents are on; held-out ones first, then in the order given.

    Args:
        source: The domain.
        streamed: Take the copy of a hub dataset's first documents where there is no network.

    Raises:
        KoffError: Files, bundled text or hub datasets that are not there, or a file on both sides.
    """
    files = expand_files(source.file_entries)
    heldout_files = expand_files(source.heldout_entries)
    both = set(map(_itself, files)) & set(map(_itself, heldout_files))
    if both:
        raise KoffError(
            f"{without_secrets(min(map(str, both)))} is among the files and the heldout_files of one "
            "domain: name it in one of them"
        )
    fields = source.fields
    rest: Side = "training" if heldout_files else "by hash"
    shards: list[tuple[Shard, Side]] = [(FileShard(path, fields), "held out") for path in heldout_files]
    for split, side in (("heldout", "held out"), ("train", "training")):
        shards += [(FileShard(bundled_file(name, split)), side) for name in source.bundled_entries]
    shards += [(FileShard(path, fields), rest) for path in files]
    for repo in source.hub_entries:
        what = repo, source.subset, source.split, fields
        copied = find_copy(*what) if streamed and is_out_of_reach(repo) else []
        shards += [(shard, rest) for shard in copied or hub_shards(*what)]
    return shards


def bundled_domains() -> list[str]:
    """Names of the domains whose text ships with the package."""
    return sorted(path.name.split(".")[0] for path in BUNDLED_DIR.glob("*.train.jsonl.xz"))


def bundled_file(name: str, split: str) -> Path:
    """Path of one split of a bundled domain, or a KoffError that lists the bundled domains."""
    if name not in bundled_domains():
        raise KoffError(f"unknown bundled domain '{name}'; bundled are: {', '.join(bundled_domains()) or 'none'}")
    return BUNDLED_DIR / f"{name}.{split}.jsonl.xz"


def expand_files(patterns: list[str]) -> list[Path | RemoteFile]:
    """Expand files and globs, each pattern in sorted order, a file that matches twice only once.

    Raises:
        KoffError: Patterns that match nothing, a folder, or a file of unknown kind; all of them are told.
    """
    found: dict[object, Path | RemoteFile] = {}
    problems: list[str] = []
    for pattern in patterns:
        try:
            for match in _matches(pattern):
                format_of(match)  # refuse an unknown kind before hours of reading, not after
                found.setdefault(_itself(match), match)  # however it is named, a file is read once
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                problems.append(f"'{pattern:.40}...' is too long for the name of a file: write text to a file first")
                continue
            if not isinstance(error, PermissionError):
                raise
            problems.append(f"you may not look at '{error.filename}': correct the rights of its folder")
        except KoffError as error:
            problems.append(str(error))
    if problems:
        raise KoffError("; ".join(problems))
    return list(found.values())


def _itself(file: Path | RemoteFile) -> object:
    """What tells two files apart, whatever names they are given by."""
    return file.resolve() if isinstance(file, Path) else file.url


def _matches(pattern: str) -> list[Path] | list[RemoteFile]:
    if is_remote(pattern):
        return find_remote(pattern)
    path = Path(pattern).expanduser()
    if not pattern.strip():
        raise KoffError("a file has an empty name: give its path, a glob or 'bundled:<name>'")
    if path.is_dir():
        raise KoffError(f"'{pattern}' is a folder: name the files in it, for example '{path / '*.jsonl'}'")
    matches = [path] if path.is_file() else list(filter(Path.is_file, map(Path, glob.glob(str(path), recursive=True))))
    if not matches:
        raise KoffError(f"no file matches '{pattern}' (looked in {Path.cwd()}): correct the path or glob")
    return sorted(matches)


def refuse_missing_files(sources: Mapping[str, DomainSource]) -> None:
    """Look for the files and the bundled text of all domains, before any is read.

    Raises:
        KoffError: What is not there, of every domain.
    """
    problems: list[str] = []
    for name, source in sources.items():
        looks = [partial(expand_files, source.file_entries + source.heldout_entries)]
        looks += [partial(bundled_file, bundled, "train") for bundled in source.bundled_entries]
        if missing := refused_by(looks):
            problems.append(f"domain '{name}': {'; '.join(missing)}")
    if problems:
        raise KoffError(
            f"{len(problems)} domains lack text:\n  " + "\n  ".join(problems) if problems[1:] else problems[0]
        )
