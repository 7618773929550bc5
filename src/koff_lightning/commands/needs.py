"""What a run needs besides the program: a model, text, evaluation data. Each can be looked for and fetched."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache

from koff_lightning.artifact.folder import backbone_of
from koff_lightning.data import DomainDataModule, DomainSource
from koff_lightning.data.hub_copy import make_copy
from koff_lightning.data.retries import with_retries
from koff_lightning.data.shards import fetch_hub, hub_shards
from koff_lightning.data.sources import domain_shards
from koff_lightning.data.split import BadLines
from koff_lightning.evaluation.lm_tasks import load_tasks
from koff_lightning.loading import TINY, load_config, load_tokenizer
from koff_lightning.support.errors import KoffError, refused_by

OF_TOKENIZERS = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")
FILES = (*OF_TOKENIZERS, "*.safetensors")
SECOND_COPIES = ("consolidated*", "original/*")  # of the same weights, in the layout of those who trained them


@dataclass(frozen=True)
class Need:
    """Something that a run needs.

    Args:
        what: Name of it, for messages.
        find: Raises KoffError unless it is on this machine.
        fetch: Brings it here, where a network can.
    """

    what: str
    find: Callable[[], object]
    fetch: Callable[[], object] | None = None


def needs_of(config: Any) -> Iterator[Need]:
    """List the models, text and task data that a run needs.

    Args:
        config: Config of a verb of training, with sections model, data and lm_eval.
    """
    model = config.model
    if not model.artifact:
        yield from model_needs(model.backbone, model.revision, model.trust_remote_code)
    if (name := config.data.tokenizer) and _is_on_hub(name):
        yield Need(f"tokenizer {name}", partial(load_tokenizer, name), partial(_fetch, name, None, OF_TOKENIZERS))
    data = DomainDataModule(**config.data.as_dict())
    for kind, text in (("domain", data), ("retention", data.general)):
        for name, source in text.sources.items() if text else ():
            find = partial(_find_text, text, source, config)
            fetch = partial(_fetch_text, text, name, config) if source.hub_entries else None
            yield Need(f"{kind} {name}", find, fetch)
    yield from task_needs([task.task for task in config.lm_eval.tasks or ()], config.lm_eval.include_path)


def model_needs(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Iterator[Need]:
    """The files of a model that is named by its hub id."""
    if _is_on_hub(source):
        pinned = {"revision": revision, "trust_remote_code": trust_remote_code}

        def find() -> None:
            load_config(source, **pinned)
            load_tokenizer(source, **pinned)
            _find_weights(source, revision)

        yield Need(f"model {source}", find, partial(_fetch, source, revision))


def task_needs(names: Iterable[str], include_path: str | None) -> Iterator[Need]:
    """The data of lm-eval's tasks."""
    for name in names:
        load = partial(load_tasks, [name], include_path)
        yield Need(f"task {name}", load, load)


def refuse_missing(needs: Iterable[Need]) -> None:
    """Refuse a run that lacks something on this machine.

    Raises:
        KoffError: Something is neither on this machine's disk nor in its caches; all such things are listed.
    """
    missing = _failures((need.what, need.find) for need in needs)
    if missing:
        raise KoffError(
            f"{len(missing)} thing(s) that are needed are missing, and --offline forbids to fetch them:"
            f"{''.join(missing)}\nwhere there is a network, `koff prepare --prefetch-only` with the same --config "
            "fetches models, hub datasets and evaluation data"
        )


def fetch_all(needs: Iterable[Need]) -> None:
    """Fetch everything that can be fetched; prints what is here then.

    Raises:
        KoffError: Something cannot be had; all such things are listed, the others are fetched.
    """

    def fetch(need: Need) -> None:
        with_retries(need.fetch, need.what)
        print(f"{need.what}: is here", flush=True)

    failed = _failures((need.what, partial(fetch, need)) for need in needs if need.fetch)
    if failed:
        raise KoffError(f"{len(failed)} thing(s) cannot be fetched:{''.join(failed)}")


def _failures(deeds: Iterable[tuple[str, Callable[[], object]]]) -> list[str]:
    """Do everything; what fails as lines."""
    return [f"\n  {what}: {said[0]}" for what, do in deeds if (said := refused_by([do]))]


def tokenizer_of(config: Any) -> Any:
    """The tokenizer that a run with this config takes."""
    model = config.model
    if config.data.tokenizer:
        return load_tokenizer(config.data.tokenizer)
    source = backbone_of(model.artifact) if model.artifact else model.backbone
    load_config(source, revision=model.revision, trust_remote_code=model.trust_remote_code)
    return load_tokenizer(source, revision=model.revision, trust_remote_code=model.trust_remote_code)


def _find_text(data: DomainDataModule, source: DomainSource, config: Any) -> None:
    """Raise KoffError unless a domain's text is there: tokenised, as files, or in the cache of the hub."""
    if not _is_tokenised(data, source, config):
        domain_shards(source, streamed=data.streaming)


def _fetch_text(data: DomainDataModule, name: str, config: Any) -> None:
    """Download a domain's hub datasets, unless it is tokenised already; of those that are streamed copy the head.

    Of what is read up to `max_train_bytes` the rows are stored: all of it may be terabytes.
    """
    source = data.sources[name]
    if data.streaming:
        _copy_heads(data, name, config.get("prefetch_bytes"))
    elif _is_tokenised(data, source, config):
        return
    elif data.max_train_bytes is not None:
        data.tokenizer = data.tokenizer or tokenizer_of(config)
        data.tokenise(name)
    else:
        for repo in source.hub_entries:
            fetch_hub(repo, source.subset, source.split)


def _copy_heads(data: DomainDataModule, name: str, num_bytes: int | None) -> None:
    source = data.sources[name]
    if num_bytes is None or num_bytes <= 0:
        raise KoffError(
            f"data.streaming reads {', '.join(f'hub:{repo}' for repo in source.hub_entries)} bit by bit, and all of it "
            f"may be terabytes: say how many bytes of text to copy of each dataset, --prefetch_bytes=1000000000 say; "
            f"got {num_bytes}"
        )
    for repo in source.hub_entries:
        shards = hub_shards(repo, source.subset, source.split, source.fields)
        make_copy(repo, shards, num_bytes, BadLines(name, data.on_bad_line, endless=True))


def _is_tokenised(data: DomainDataModule, source: DomainSource, config: Any) -> bool:
    """Whether `koff prepare` has read a domain of the hub; where there is no tokenizer or no whole entry: no."""
    with suppress(KoffError):
        if not source.hub_entries:  # the files must be there in any case, and to look them up means to hash them
            return False
        data.tokenizer = data.tokenizer or tokenizer_of(config)
        return data.stored(source) is not None
    return False


def _is_on_hub(source: str) -> bool:
    return source != TINY and not source.endswith(".gguf") and not Path(source).expanduser().exists()


def _fetch(source: str, revision: str | None, files: tuple[str, ...] = FILES) -> None:
    snapshot_download(source, revision=revision, allow_patterns=files, ignore_patterns=SECOND_COPIES)


def _find_weights(source: str, revision: str | None) -> None:
    """Raise KoffError where a hub model's weights are not all in the cache."""

    def cached(file: str) -> str | None:
        path = try_to_load_from_cache(source, file, revision=revision)
        return path if isinstance(path, str) else None

    if cached("model.safetensors"):
        return
    index = cached("model.safetensors.index.json")
    if index is None:
        raise KoffError(f"the weights of {source} are not in the cache")
    files = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    absent = sorted(file for file in files if not cached(file))
    if absent:
        raise KoffError(f"{len(absent)} of {len(files)} files of weights of {source} are not in the cache")
