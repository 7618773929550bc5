"""`--offline`: no network for anybody, and all that is missing is named before a run begins.

The libraries read their switches when they are imported, so `switch_off` comes before any of them: this module imports
nothing heavy until it is asked what is missing.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from koff_lightning.errors import KoffError

SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
ASKED = "KOFF_OFFLINE"  # ours, for the processes that a run starts
TELEMETRY = ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")


def switch_off() -> None:
    """Switch off the network for huggingface_hub, transformers, datasets, evaluate and what reports to them."""
    os.environ.update(dict.fromkeys((ASKED, *SWITCHES, *TELEMETRY), "1"))


def is_asked() -> bool:
    """Whether this process, or the one that started it, was given `--offline`."""
    return ASKED in os.environ


def refuse_missing(config: Any) -> None:
    """Look for everything that a run will want.

    Args:
        config: Of the verb, with sections model, data and lm_eval.

    Raises:
        KoffError: Something is neither on this machine's disk nor in its caches; all such things are listed.
    """
    missing = []
    for what, look in wanted(config):
        try:
            look()
        except KoffError as error:
            missing.append(f"\n  {what}: {error}")
    if missing:
        raise KoffError(
            f"{len(missing)} thing(s) that the run needs are missing, and --offline forbids to fetch them:"
            f"{''.join(missing)}\nwhere there is a network, `koff prepare --prefetch-only` with the same --config "
            "fetches models, hub datasets and evaluation data"
        )


def wanted(config: Any) -> Iterator[tuple[str, Callable[[], object]]]:
    """What a run wants, each with a function that finds it, or raises KoffError."""
    from koff_lightning.backbone import load_config
    from koff_lightning.data import DomainDataModule

    model = config.model
    if not model.artifact:
        yield "backbone", lambda: load_config(model.backbone, **pinned(model))
        yield "weights", lambda: find_weights(model.backbone, model.revision)
    yield "tokenizer", lambda: tokenizer_of(config)
    data = DomainDataModule(**config.data.as_dict())
    for name, source in data.sources.items():
        yield f"domain {name}", lambda source=source: find_domain(data, source, config)
    for task in config.lm_eval.tasks or ():
        yield f"task {task.task}", lambda task=task: find_task(task.task, config.lm_eval.include_path)


def pinned(model: Any) -> dict[str, Any]:
    """Which of a hub model's versions the options of a model mean."""
    return {"revision": model.revision, "trust_remote_code": model.trust_remote_code}


def tokenizer_of(config: Any) -> Any:
    """The tokenizer that a run with this config takes."""
    from koff_lightning.artefact.extend import backbone_of
    from koff_lightning.backbone import load_tokenizer

    if config.data.tokenizer:
        return load_tokenizer(config.data.tokenizer)
    model = config.model
    return load_tokenizer(backbone_of(model.artifact) if model.artifact else model.backbone, **pinned(model))


def find_domain(data: Any, source: Any, config: Any) -> None:
    """Raise KoffError unless a domain's text is there: tokenised, as files, or in the cache of the hub."""
    from koff_lightning.data.sources import HUB, domain_shards

    if any(entry.startswith(HUB) for entry in source.entries):
        data.tokenizer = tokenizer_of(config)
        if data.stored(source):
            return
    domain_shards(source)


def find_task(name: str, include_path: str | None) -> None:
    """Load a task of lm-eval with its data, or raise KoffError."""
    from koff_lightning.evaluation.lm_tasks import load_tasks

    load_tasks([name], include_path)


def is_on_hub(source: str) -> bool:
    """Whether a backbone or tokenizer is named by its hub id."""
    from koff_lightning.backbone import TINY

    return source != TINY and not source.endswith(".gguf") and not Path(source).expanduser().exists()


def find_weights(source: str, revision: str | None) -> None:
    """Raise KoffError where a hub model's weights are not all in the cache."""
    import json

    from huggingface_hub import try_to_load_from_cache

    if not is_on_hub(source):
        return

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
