"""Artifacts on the Hugging Face hub: push one, or single memories; pull one, or with some of its memories.

Tokens are huggingface_hub's affair alone: `hf auth login`, or HF_TOKEN. What is pulled is checked like any artifact.
"""

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from koff_lightning.artifact.folder import BACKBONE, MANIFEST, MEMORIES, Manifest, read_manifest, verify
from koff_lightning.artifact.memory_files import listed, read_card, unlisted
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import hash_file, own_cache, write_atomically

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_KEPT = ("README.md", "LICENSE*", "koff.json", "export_report.json", f"{BACKBONE}/*")


def push(folder: str | Path, repo: str, memories: Sequence[str] | None = None, private: bool = True) -> str:
    """Upload an artifact, or some of its memories into a repository that holds the same backbone; one commit.

    Files that the hub has already are not sent again, so a push that was cut short goes on when it is repeated.

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
    manifest, repo = verify(folder), _name(repo)
    if unknown := [name for name in memories or () if name not in manifest.domains]:
        raise KoffError(f"{folder} has no memory for {unknown[0]!r}; it has {', '.join(manifest.domains) or 'none'}")
    with _said(repo), TemporaryDirectory() as work:
        api = HfApi(library_name="koff-lightning")
        if memories is None:
            api.create_repo(repo, private=private, exist_ok=True)
            there = {name for name in api.list_repo_files(repo) if name != ".gitattributes"}
            operations = [_add(folder, path) for path in _files(folder, folder)]
            card = _card(folder, repo).encode()
            operations = [one for one in operations if one.path_in_repo != "README.md"]
            operations.append(CommitOperationAdd("README.md", card))
            gone = there - {one.path_in_repo for one in operations}
            operations += [CommitOperationDelete(name) for name in sorted(gone) if _ours(name)]
            words = f"Artifact with {len(manifest.domains)} memories"
        else:
            api.hf_hub_download(repo, MANIFEST, local_dir=work)
            remote = _of_the_same(repo, read_manifest(work), manifest)
            operations = []
            for name in memories:
                home = folder / MEMORIES / name
                operations += [_add(folder, path) for path in _files(folder, home)]
                remote = unlisted(remote, name) if name in remote.domains else remote
                remote = listed(remote, read_card(home), hash_file(home / "memory.json"))
            operations.append(CommitOperationAdd(MANIFEST, remote.to_json().encode()))
            words = f"Memory {', '.join(memories)}"
        return str(api.create_commit(repo, operations, commit_message=words).commit_url)


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
    from huggingface_hub import HfApi

    name, _, given = repo.partition("@")
    name, revision = _name(name), revision or given or None
    target = Path(out).expanduser() if out is not None else None
    if target is not None and target.exists() and any(path.name != ".cache" for path in target.iterdir()):
        raise KoffError(f"{target} is there already: give another --out, or remove it")
    with _said(name):
        api = HfApi(library_name="koff-lightning")
        commit = api.model_info(name, revision=revision).sha
        target = target or own_cache() / "hub" / f"{name.replace('/', '--')}@{commit}{_suffix(memories)}"
        if (target / MANIFEST).is_file():  # written last, below
            return target
        first = Path(api.hf_hub_download(name, MANIFEST, revision=commit, local_dir=target / ".cache" / "koff"))
        manifest = Manifest.from_json(json.loads(first.read_text(encoding="utf-8")), first)
        wanted = list(manifest.domains) if memories is None else list(memories)
        if unknown := [domain for domain in wanted if domain not in manifest.domains]:
            raise KoffError(f"{name} has no memory for {unknown[0]!r}; it has {', '.join(manifest.domains) or 'none'}")
        patterns = [kept for kept in _KEPT if kept != MANIFEST] + [f"{MEMORIES}/{domain}/*" for domain in wanted]
        api.snapshot_download(name, revision=commit, local_dir=target, allow_patterns=patterns)
    for domain in set(manifest.domains) - set(wanted):
        manifest = unlisted(manifest, domain)
    shutil.rmtree(target / ".cache", ignore_errors=True)
    write_atomically(target / MANIFEST, manifest.to_json())
    try:
        verify(target)
    except KoffError:
        (target / MANIFEST).unlink()  # so that it is fetched again, not taken for whole
        raise
    return target


def local_folder(source: str | Path) -> Path:
    """The folder of an artifact: as given, or pulled from the hub where `org/name[@revision]` names no folder here.

    Raises:
        KoffError: As `pull`.
    """
    path = Path(source).expanduser()
    if path.exists() or not HUB_ID.fullmatch(str(source)):
        return path
    return pull(str(source))


def _name(repo: str) -> str:
    if "@" in repo or not HUB_ID.fullmatch(repo):
        raise KoffError(f"a repository of the hub is named org/name; got {repo!r}")
    return repo


def _suffix(memories: Sequence[str] | None) -> str:
    return "" if memories is None else f"+{'+'.join(sorted(memories))}"


def _ours(name: str) -> bool:
    """Whether a file of the repository is of an artifact, so that a push may take it away."""
    return name.startswith((f"{BACKBONE}/", f"{MEMORIES}/"))


def _files(root: Path, below: Path) -> Iterator[Path]:
    paths = sorted(path for path in below.rglob("*") if path.is_file())
    yield from (path for path in paths if not any(part.startswith(".") for part in path.relative_to(root).parts))


def _add(folder: Path, path: Path) -> "CommitOperationAdd":
    from huggingface_hub import CommitOperationAdd

    return CommitOperationAdd(path.relative_to(folder).as_posix(), path)


def _card(folder: Path, repo: str) -> str:
    """The backbone's card, told from the root of the repository."""
    text = (folder / BACKBONE / "README.md").read_text(encoding="utf-8")
    text = text.replace('load_decomposed("DIR")                     # the folder above this one, with its memories', "")
    text = text.replace("model = \n", f'model = load_decomposed("{repo}")\n')
    return text.replace('"DIR/backbone"', f'"{repo}", subfolder="backbone"').replace("`../memories/`", "`memories/`")


def _of_the_same(repo: str, remote: Manifest, own: Manifest) -> Manifest:
    """The manifest of a repository whose backbone takes the memories of the artifact here."""
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


@contextmanager
def _said(repo: str) -> Iterator[None]:
    """One line for what the hub or the network says."""
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
        raise KoffError(f"the hub is not asked for {repo}: the network is switched off, or not there") from error
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
            raise KoffError(f"the hub answered {status} for {repo}{hint}") from error
        # Which HTTP library it is depends on the release of huggingface_hub.
        if type(cause).__module__.partition(".")[0] not in ("httpx", "httpx2", "httpcore", "requests", "urllib3"):
            raise
        raise KoffError(f"the hub cannot be reached for {repo} ({type(cause).__name__}): try again") from error
