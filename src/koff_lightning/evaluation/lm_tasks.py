"""lm-eval's tasks: find them by name, load their data, and refuse now what would fail in mid-evaluation.

Besides lm-eval's own there are those of `tasks/`. `koff_general` and `koff_multilingual` name benchmarks of the field
and need the Hugging Face hub or its cache. `koff_bpb`, `koff_continuation` and `koff_cloze`, a task per bundled domain
each, need nothing: their documents ship with the package (how they are made: recipes/koff_tiny/build_tasks.py).
"""

import difflib
import json
import logging
import lzma
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from traceback import walk_tb
from types import TracebackType
from typing import TYPE_CHECKING, Any

from koff_lightning.support.errors import KoffError, NoSuchNameError
from koff_lightning.support.wording import nearest

if TYPE_CHECKING:
    from datasets import Dataset
    from lm_eval.tasks import TaskManager

FOLDER = Path(__file__).parents[1] / "tasks"
SUPPORTED = ">=0.4.13,<0.5"  # of lm-eval: before, it breaks on transformers 5; after, its insides may have moved
USED = 0.75  # share of the held-out documents, in the order of the file, that the tasks are made from
Loaded = Mapping[str, Any]  # what TaskManager.load returns: tasks, groups, group_map


def check_version() -> None:
    """Raise KoffError unless the installed lm-eval is one that this release was written for."""
    from packaging.specifiers import SpecifierSet

    if (installed := version("lm-eval")) not in SpecifierSet(SUPPORTED):
        raise KoffError(
            f"lm-eval {installed} is installed, but {SUPPORTED} is needed: pip install 'lm-eval{SUPPORTED}'"
        )


def documents(suite: str, domain: str, **_: object) -> dict[str, "Dataset"]:
    """The documents of an offline task, as lm-eval's `custom_dataset` gives them: {"test": rows}.

    `bpb` reads the bundled held-out text itself, a row {"id", "text"} for each document. The other suites have rows
    {"id", "context", "choices", "answer"}, made by recipes/koff_tiny/build_tasks.py.
    """
    from datasets import Dataset

    bpb = suite == "bpb"
    rows = heldout_documents(domain) if bpb else _rows(FOLDER / "data" / f"{suite}_{domain}.jsonl.xz")
    return {"test": Dataset.from_list(rows)}


def heldout_documents(domain: str) -> list[dict[str, str]]:
    """The bundled held-out documents that tasks may use; the rest of the file is for development."""
    rows = _rows(FOLDER.parent / "tiny" / "corpora" / f"{domain}.heldout.jsonl.xz")
    return rows[: int(USED * len(rows))]


def bits_of_known_bytes(doc: dict[str, Any], results: Sequence[float]) -> dict[str, tuple[float, int]]:
    """Bits per byte of the bytes that the tokenizer knows, as a run's own; of all where the model does not say those.

    What it costs to predict an unknown token counts, so that no text looks well predicted because it cannot be read.
    """
    return {"bits_per_byte": (results[0], getattr(results[0], "num_bytes", len(doc["text"].encode())))}


def _rows(path: Path) -> list[dict[str, Any]]:
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def load_tasks(
    names: Sequence[str], include_path: str | None = None, metadata: Mapping[str, Any] | None = None
) -> Loaded:
    """Load tasks, groups and tags by name, with their data.

    Args:
        names: As lm-eval takes them: names, patterns such as `belebele_*`, or paths of YAML files.
        include_path: Folder of further tasks.
        metadata: For tasks that want some.

    Raises:
        KoffError: No such task, or its data cannot be had.
    """
    check_version()
    given = [name for name in names if name]
    if not given:
        raise KoffError("no task is named: for example --tasks koff_continuation,koff_cloze (offline) or koff_general")
    manager = _manager(tuple(given), include_path, json.dumps(dict(metadata or {}), default=str))
    wanted = [part for name in given for part in _matches(manager, name)]
    try:
        with quiet():
            return manager.load(list(dict.fromkeys(wanted)))
    except KoffError:
        raise
    except Exception as error:  # whatever the data's own code does: datasets, hub, network, files
        raise KoffError(_no_data(given, error)) from error


def _manager(names: tuple[str, ...], include_path: str | None, metadata: str) -> "TaskManager":
    """An index of our tasks and the user's alone where that is enough: to read all of lm-eval's takes seconds."""
    if include_path is not None and not Path(include_path).is_dir():
        raise KoffError(f"include_path {include_path!r} is no folder: give one that holds the tasks' YAML files")
    small, wanted = _index(include_path, metadata, False), []
    for name in names:
        ours = isinstance(name, str) and name.startswith("koff_")  # lm-eval's own have no such names
        found = small.match_tasks([name]) if ours else [name]
        if not found:
            raise _no_task(name, small)
        wanted += found
    return small if all(_holds(small, name) for name in wanted) else _index(include_path, metadata, True)


def _holds(index: "TaskManager", name: str) -> bool:
    """Whether a task, or a group with all that it names, is in this index."""
    entry = index.task_index.get(name) if isinstance(name, str) else None
    group = entry is not None and "group" in (entry.cfg or {})
    return entry is not None and all(_holds(index, child) for child in (entry.cfg.get("task", ()) if group else ()))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence lm-eval's log, which speaks to its developers, and tokenizers' word on long text, which lm-eval cuts.

    And the bar without a name that each of its tasks draws for putting its questions together.
    """
    from lm_eval.api import task

    logs = [logging.getLogger(name) for name in ("lm_eval", "transformers.tokenization_utils_base")]
    before, bar = [log.level for log in logs], task.tqdm
    for log in logs:
        log.setLevel(logging.ERROR)
    task.tqdm = partial(bar, disable=True)
    try:
        yield
    finally:
        task.tqdm = bar
        for log, level in zip(logs, before, strict=True):
            log.setLevel(level)


def bundled_index() -> "TaskManager":
    """The index of our tasks, for callers of lm-eval that have loaded theirs: it would read all of its own."""
    return _index(None, "{}", False)


@cache
def _index(include_path: str | None, metadata: str, whole: bool) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    paths = [str(FOLDER), *([include_path] if include_path else [])]
    return TaskManager(include_path=paths, include_defaults=whole, metadata=json.loads(metadata))


def _matches(manager: "TaskManager", name: str) -> list[str]:
    if name.endswith(".yaml"):
        path = Path(name).expanduser()
        if path.is_file():
            return [str(path.resolve())]
        raise KoffError(f"task file {name}: no such file")
    found = manager.match_tasks([name])
    if not found:
        raise _no_task(name, manager)
    return found


def _no_task(name: str, manager: "TaskManager") -> NoSuchNameError:
    near = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.5)
    hint = f" Did you mean {', '.join(map(repr, near))}?" if near else ""
    return NoSuchNameError(f"lm-eval {version('lm-eval')} has no task {name!r}.{hint} `lm-eval ls tasks` lists its own")


def _no_data(names: Sequence[str], error: BaseException) -> str:
    """Which task, which data, and how to get it; or that the task cannot be made of its data."""
    task = _task_in(error.__traceback__)
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if task is None or not task.DATASET_PATH:
        return f"tasks {', '.join(names)} cannot be loaded: {reason}"
    if not any(frame.f_code.co_name == "download" for frame, _ in walk_tb(error.__traceback__)):
        return (
            f"task {task.config.task!r} cannot be made of its data ({type(error).__name__}: {reason}): correct its "
            "YAML file or its documents"
        )
    place = ", ".join(repr(part) for part in (task.DATASET_PATH, task.DATASET_NAME) if part)
    return (
        f"task {task.config.task!r} has no data here: dataset {place} cannot be had ({reason}). Where there is a "
        f'network run python -c "import datasets; datasets.load_dataset({place})" and copy the folder HF_HOME (by '
        "default ~/.cache/huggingface) here; or take tasks that need none: koff_bpb, koff_continuation, koff_cloze"
    )


def _task_in(trace: TracebackType | None) -> Any:
    """The task that was being made when an error came up; lm-eval does not say."""
    makers = [frame.f_locals.get("self") for frame, _ in walk_tb(trace)]
    return next((maker for maker in makers if hasattr(maker, "DATASET_PATH") and hasattr(maker, "config")), None)


def check_safe(tasks: Loaded, confirmed: bool = False) -> None:
    """Raise KoffError when a task runs code that the model writes and nobody has confirmed that."""
    unsafe = [name for name, task in tasks["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not confirmed:
        raise KoffError(
            f"task {unsafe[0]!r} runs code that the model writes: only `koff lm-eval --confirm_run_unsafe_code` does so"
        )


def check_room(requests: Sequence[Any], default: int, max_length: int) -> None:
    """Raise KoffError where requests want so many tokens of answer that nothing could be read before them.

    Args:
        requests: Of type `generate_until`, with their options.
        default: Tokens of an answer where a request does not say.
        max_length: Tokens that the model reads and writes.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    most = max((normalize_gen_kwargs(request.args[1], default)["max_gen_toks"] for request in requests), default=0)
    if most >= max_length:
        raise KoffError(
            f"a task lets answers have {most} tokens, and question and answer together have {max_length} here: give "
            f"--gen_kwargs max_gen_toks={max_length // 2}, a larger --max_length, or leave the task out"
        )


def check_samples(tasks: Loaded, samples: Any) -> None:
    """Raise KoffError unless lm-eval's `samples`, which it takes as they come, name samples of tasks that are asked.

    Args:
        tasks: As loaded.
        samples: Task -> indices of its samples, from 0; None for all samples of all tasks.
    """
    if samples is None:
        return
    if not isinstance(samples, Mapping) or not samples:
        raise KoffError(
            f'samples must name tasks and their samples, as {{"koff_cloze_de": [0, 7]}}, or a file that does; got '
            f"{samples!r}"
        )
    for name, asked in samples.items():
        if name in tasks.get("groups", {}):
            raise KoffError(f"samples: {name!r} is a group: name its tasks")
        if name not in tasks["tasks"]:
            raise KoffError(f"samples: no task {name!r} is asked for.{nearest(name, tasks['tasks'])}")
        total = len(tasks["tasks"][name].eval_docs)
        if not isinstance(asked, list) or not asked:
            raise KoffError(f"samples: {name!r} must have a list of one sample at least; got {asked!r}")
        if odd := [index for index in asked if type(index) is not int or not 0 <= index < total]:
            raise KoffError(f"samples: {name!r} has the samples 0 to {total - 1}; got {odd[0]!r}")


def check_counts(tasks: Loaded, limit: float | None, num_fewshot: int | None, ranks: int) -> None:
    """Raise KoffError when a task would have no sample left, fewer than processes, or a negative number of examples.

    Args:
        tasks: As loaded.
        limit: Samples per task; a share of them below 1; None for all.
        num_fewshot: Examples before each question; None for what the task says.
        ranks: Number of processes.
    """
    if num_fewshot is not None and num_fewshot < 0:
        raise KoffError(f"num_fewshot must be 0 or more; got {num_fewshot}")
    if limit is not None and not 0 < limit < math.inf:
        raise KoffError(f"limit must be a number of samples, or a share of them below 1; got {limit}")
    for name, task in tasks["tasks"].items():
        total = len(task.eval_docs)
        count = total if limit is None else min(total, math.ceil(total * limit) if limit < 1 else int(limit))
        if count < ranks:
            raise KoffError(
                f"task {name!r} has {total} samples, of which limit {limit} leaves {count} for {ranks} process"
                f"{'es: each needs one' if ranks > 1 else ': one at least is needed'}"
            )
