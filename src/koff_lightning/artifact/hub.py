"""Artifacts on the Hugging Face hub: push one, or single memories; pull one, or with some of its memories.

Tokens are huggingface_hub's affair alone: `hf auth login`, or HF_TOKEN. What is pulled is checked like any artifact.
"""

import hashlib
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from koff_lightning.artifact.folder import MEMORIES, REPORT, ROUTER, Manifest, read_manifest, read_versioned, verify
from koff_lightning.artifact.memory_files import check_memories, listed, read_card, unlisted
from koff_lightning.listed_files import BACKBONE, MANIFEST, paths_below
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import hash_file, lock, own_cache, write_atomically
from koff_lightning.support.names import HUB_ID, repo_id

_KEPT = ("README.md", "LICENSE", REPORT, f"{BACKBONE}/*")
_ELSEWHERE = "*../*"  # names that would lead out of the folder; huggingface_hub reads backslashes as slashes here


def push(folder: str | Path, repo: str, memories: Sequence[str] | None = None, private: bool = True) -> str:
    """Upload an artifact, or some of its memories into a repository that holds the same backbone; one commit.

    Files that the hub has already are not sent again, so a push that was cut short goes on when it is repeated. What
    the repository holds of a part that is pushed anew, and is no longer in it, goes with the same commit.

    Args:
        folder: The artifact.
        repo: `org/name`; made if it is not there.
        memories: Domains; None for the whole artifact.
        private: Whether a repository that is made is private.

    Returns:
        The address of the commit.

    Raises:
        KoffError: The artifact is not sound or has no such memory, the repository holds another backbone, or the hub
            cannot be reached or refuses.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = Path(folder).expanduser()
    manifest, repo = verify(folder), repo_id(repo)
    manifest.refuse_others(memories or (), folder)
    check_memories(folder, manifest)
    with _said(repo), TemporaryDirectory() as work:
        api = HfApi(library_name="koff-lightning")
        if memories is None:
            api.create_repo(repo, private=private, exist_ok=True)
        # What is decided here is decided for this commit: who pushes at the same time is not overwritten.
        parent = api.model_info(repo).sha
        there = api.list_repo_files(repo, revision=parent)
        if memories is None:
            paths = [path for path in sorted(paths_below(folder, ".")) if path != "README.md"]
            operations = [CommitOperationAdd(path, folder / path) for path in paths]
            operations.append(CommitOperationAdd("README.md", _card(folder, repo).encode()))
            replaced, words = (BACKBONE, MEMORIES, ROUTER), f"Artifact with {len(manifest.domains)} memories"
        else:
            api.hf_hub_download(repo, MANIFEST, revision=parent, local_dir=work)
            remote = _of_the_same(repo, read_manifest(work), manifest)
            operations = []
            for name in dict.fromkeys(memories):
                home = folder / MEMORIES / name
                paths = sorted(paths_below(folder, f"{MEMORIES}/{name}"))
                operations += [CommitOperationAdd(path, folder / path) for path in paths]
                remote = unlisted(remote, name) if name in remote.domains else remote
                remote = listed(remote, read_card(home), hash_file(home / "memory.json"))
            operations.append(CommitOperationAdd(MANIFEST, remote.to_json().encode()))
            replaced, words = tuple(f"{MEMORIES}/{name}" for name in memories), f"Memory {', '.join(memories)}"
        gone = set(there) - {one.path_in_repo for one in operations}
        below = tuple(f"{place}/" for place in replaced)
        operations += [CommitOperationDelete(name) for name in sorted(gone) if name.startswith(below)]
        return str(api.create_commit(repo, operations, commit_message=words, parent_commit=parent).commit_url)


def pull(
    repo: str,
    out: str | Path | None = None,
    memories: Sequence[str] | None = None,
    revision: str | None = None,
) -> Path:
    """Download an artifact, whole or with some of its memories, and check it.

    A download that was cut short goes on where it stopped.

    Args:
        repo: `org/name`, or `org/name@revision`.
        out: Folder to make; by default one in the cache, which a later call finds again.
        memories: Domains to take; None for all, an empty list for the backbone alone.
        revision: Branch, tag or commit.

    Returns:
        The folder.

    Raises:
        KoffError: No such repository, revision or memory, no artifact, one that is not sound, a folder that is there
            already, or the hub cannot be reached.
    """
    name, _, given = repo.partition("@")
    name, revision, part = repo_id(name), revision or given or None, _suffix(memories)
    target = Path(out).expanduser() if out is not None else None
    try:
        with _said(name):
            from huggingface_hub import HfApi

            commit = HfApi(library_name="koff-lightning").model_info(name, revision=revision).sha
    except _NotReachedError:
        if target is None and (kept := _kept(name, revision, part)):
            return kept
        raise
    target = target or _cached(name, commit, part)
    begun = target / ".cache" / "koff" / f"{name.replace('/', '--')}@{commit}{part}"  # there until all is checked
    if out is not None and not begun.is_dir() and _is_taken(target):
        raise KoffError(f"{target} is there already: give another --out, or remove it")
    with _said(name, target), _alone(target):
        if (target / MANIFEST).is_file() and not begun.is_dir():  # somebody else pulled it while this one waited
            return target
        manifest = _download(name, commit, target, begun, memories)
        write_atomically(target / MANIFEST, manifest.to_json())
        shutil.rmtree(target / ".cache" / "huggingface", ignore_errors=True)  # what is wrong is fetched again
        try:
            check_memories(target, verify(target))
        except KoffError:
            (target / MANIFEST).unlink()
            raise
        shutil.rmtree(target / ".cache", ignore_errors=True)
    return target


def _download(name: str, commit: str, target: Path, begun: Path, memories: Sequence[str] | None) -> Manifest:
    """Fetch the files of an artifact but for its manifest, which is returned: that of what was asked for."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="koff-lightning")
    first = Path(api.hf_hub_download(name, MANIFEST, revision=commit, local_dir=begun))
    manifest = Manifest.from_json(read_versioned(first), first)
    wanted = list(manifest.domains) if memories is None else list(memories)
    manifest.refuse_others(wanted, name)
    for domain in set(manifest.domains) - set(wanted):
        manifest = replace(unlisted(manifest, domain), router=None)  # it picks among all of them
    patterns = [*_KEPT, *(f"{MEMORIES}/{domain}/*" for domain in wanted), *([f"{ROUTER}/*"] if manifest.router else [])]
    api.snapshot_download(name, revision=commit, local_dir=target, allow_patterns=patterns, ignore_patterns=_ELSEWHERE)
    return manifest


def local_folder(source: str | Path) -> Path:
    """The folder of an artifact: as given, or pulled from the hub where `org/name[@revision]` names no folder here.

    Raises:
        KoffError: As `pull`.
    """
    if not isinstance(source, str | Path):
        raise KoffError(f"the folder of an artifact is wanted, or org/name of one on the hub; got {source!r}")
    path = Path(source).expanduser()
    if path.exists() or not HUB_ID.fullmatch(str(source)):
        return path
    try:
        return pull(str(source))
    except KoffError as error:
        raise KoffError(f"no folder {source} here, and from the hub: {error}") from error


def artifact_or_same(source: str) -> str:
    """The folder of the artifact that `org/name[@revision]` names on the hub; whatever else is named, as it is.

    Raises:
        KoffError: As `pull`.
    """
    name, _, revision = source.partition("@")
    if Path(source).expanduser().exists() or source.endswith(".ckpt") or not HUB_ID.fullmatch(source):
        return source
    try:
        with _said(name):
            from huggingface_hub import HfApi

            found = HfApi(library_name="koff-lightning").file_exists(name, MANIFEST, revision=revision or None)
    except KoffError:  # a dense model may be in the hub's cache; what is wrong is said where it is loaded
        found = _kept(name, revision or None, "") is not None
    return str(pull(source)) if found else source


def _is_taken(target: Path) -> bool:
    return target.exists() and (not target.is_dir() or any(path.name != ".cache" for path in target.iterdir()))


def _cached(name: str, commit: str, part: str) -> Path:
    return own_cache() / "hub" / f"{name.replace('/', '--')}@{commit}{part}"


def _kept(name: str, revision: str | None, part: str) -> Path | None:
    """What was last pulled into the cache, for where there is no network; a revision is known by its commit alone."""
    begins, whole = f"{name.replace('/', '--')}@{revision or ''}", re.compile(r".*@[0-9a-f]{40}" + re.escape(part))
    places = (own_cache() / "hub").glob("*")
    found = [path for path in places if path.name.startswith(begins) and whole.fullmatch(path.name)]
    found = [path for path in found if (path / MANIFEST).is_file() and not (path / ".cache").exists()]
    return max(found, key=lambda path: (path / MANIFEST).stat().st_mtime, default=None)


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Wait until no other process pulls into the same folder."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock(target.with_name(f".{target.name}.lock"), wait=True):
        yield


def _suffix(memories: Sequence[str] | None) -> str:
    """Tells a folder with some of the memories from others; their names may be more than a file name holds."""
    return "" if memories is None else f"+{hashlib.sha256(' '.join(sorted(memories)).encode()).hexdigest()[:12]}"


def _card(folder: Path, repo: str) -> str:
    """The backbone's card, told from the root of the repository."""
    card = folder / BACKBONE / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {repo}\n"
    whole = 'load_decomposed("DIR")                     # the folder above this one, with its memories'
    text = text.replace(whole, f'load_decomposed("{repo}")')
    return text.replace('"DIR/backbone"', f'"{repo}", subfolder="backbone"').replace("`../memories/`", "`memories/`")


def _of_the_same(repo: str, remote: Manifest, own: Manifest) -> Manifest:
    """The manifest of a repository whose backbone takes the memories of the artifact here."""
    if own.form.folds or remote.form.folds:
        raise KoffError(f"a memory of layout 'merged' is part of its backbone: push the whole artifact to {repo}")
    if own.form.shapes != remote.form.shapes:
        raise KoffError(
            f"{repo} holds an artifact of layout {remote.layout!r}, here it is {own.layout!r}: its memories have other "
            "shapes; export the run again in that layout"
        )
    for what, here, there in (
        ("backbone", own.base["hash"], remote.base["hash"]),
        ("mask", own.mask_hash, remote.mask_hash),
        ("tokenizer", own.tokenizer_hash, remote.tokenizer_hash),
    ):
        if here != there:
            raise KoffError(
                f"{repo} holds an artifact of another {what} ({there[:12]}, here {here[:12]}): none fits it"
            )
    return remote


class _NotReachedError(KoffError):
    """The hub was not asked, or did not answer."""


@contextmanager
def _said(repo: str, folder: Path | None = None) -> Iterator[None]:
    """One line for what the hub, the network or the disk (where `folder` lies) says."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise _NotReachedError(f"the hub is not asked for {repo}: the network is switched off, or not there") from error
    except GatedRepoError as error:
        raise KoffError(f"{repo} is gated: accept its terms on the hub, then `hf auth login`") from error
    except RevisionNotFoundError as error:
        raise KoffError(f"{repo} has no such revision") from error
    except RepositoryNotFoundError as error:
        raise KoffError(f"no repository {repo} on the hub, or it is private: `hf auth login` first") from error
    except EntryNotFoundError as error:
        raise KoffError(f"{repo} holds no {MANIFEST}, so it is no artifact") from error
    except Exception as error:
        cause = error.__cause__ if type(error) is RuntimeError else error  # an upload in a thread wraps what went wrong
        if isinstance(cause, HfHubHTTPError):
            status = getattr(cause.response, "status_code", "?")
            hint = ": `hf auth login` with a token that may write" if status in (401, 403) else ""
            hint = ": somebody else has pushed to it meanwhile, push again" if status in (409, 412) else hint
            raise KoffError(f"the hub answered {status} for {repo}{hint}") from error
        # Which HTTP library it is depends on the release of huggingface_hub.
        foreign = type(cause).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
        if isinstance(cause, OSError) and folder is not None and not foreign:
            raise KoffError(f"cannot write {folder}: {cause.strerror or cause}") from error
        if not foreign:
            raise
        raise _NotReachedError(f"the hub cannot be reached for {repo} ({type(cause).__name__}): try again") from error
