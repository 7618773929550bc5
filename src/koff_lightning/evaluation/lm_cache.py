"""Answers that lm-eval keeps (`--use_cache`): a file for each model and way of reading, no answer that is no number."""

import hashlib
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from koff_lightning.listed_files import MANIFEST
from koff_lightning.support.errors import KoffError


def cache_of(path: str, column: str, model: str, *options: str | int | None) -> str:
    """Beginning of a cache file's name; lm-eval adds `_rank0.db`.

    Args:
        path: What the user gave.
        column: Way of reading.
        model: Artifact, checkpoint or dense model.
        options: What else the answers depend on, as the dtype.
    """
    told = repr((*_state(Path(model).expanduser()), *options))
    return f"{path}_{column}_{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def _state(place: Path) -> tuple[object, ...]:
    """Where a model is, and what changes with its weights: of one of the hub the commit that the copy here is of."""
    if (manifest := place / MANIFEST).is_file():  # holds the hashes of all weights
        return str(place.resolve()), hashlib.sha256(manifest.read_bytes()).hexdigest()
    files = sorted(place.iterdir()) if place.is_dir() else [place] if place.is_file() else []
    if not files:
        copy = try_to_load_from_cache(str(place), "config.json")  # it has been loaded by now
        return (str(place), Path(copy).parent.name) if isinstance(copy, str) else (str(place),)
    return str(place.resolve()), *((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def refuse_cached_nan(samples: Iterable[dict[str, Any]], cache: str) -> None:
    """Raise KoffError when an answer is no finite number: lm-eval keeps answers before they can be checked.

    Args:
        samples: Samples of all tasks, as lm-eval logs them.
        cache: As from `cache_of`.
    """
    if broken := sum(not math.isfinite(value) for row in samples for value in _numbers(row["resps"])):
        raise KoffError(
            f"{broken} log-likelihoods in the cache {cache}_rank0.db are not finite, so the scores mean nothing: "
            "remove it; the weights hold nan or inf, or their dtype overflows (try --dtype float32)"
        )


def _numbers(value: object) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)
