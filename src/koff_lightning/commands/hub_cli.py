"""`koff push` and `koff pull`: artifacts on the Hugging Face hub."""

from koff_lightning.support.names import repo_id


def push(artifact: str, repo: str, *, domain: list[str] | None = None, public: bool = False) -> None:
    """Upload an exported model to the hub, or some of its memories into a repository of the same backbone.

    What the hub has already is not sent again, so the same command goes on with a push that was cut short.

    Args:
        artifact: Folder that `koff export` wrote.
        repo: org/name; made if it is not there.
        domain: Domain whose memory to push, once for each; by default the whole exported model.
        public: Make a new repository public; by default it is private.
    """
    repo_id(repo)  # before the imports, which take seconds
    from koff_lightning.artifact import hub

    print(f"pushed: {hub.push(artifact, repo, domain, private=not public)}")


def pull(repo: str, *, out: str | None = None, domain: list[str] | None = None, revision: str | None = None) -> None:
    """Download an exported model from the hub, whole or with some of its memories, and check every file.

    Args:
        repo: org/name.
        out: Folder to make; by default the name in this folder.
        domain: Domain whose memory to take, once for each; by default all.
        revision: Branch, tag or commit.
    """
    repo_id(repo.partition("@")[0])
    from koff_lightning.artifact import hub

    folder = hub.pull(repo, out or repo.partition("@")[0].rpartition("/")[2], domain, revision)
    print(f"wrote {folder}: koff inspect {folder} tells what it is")
