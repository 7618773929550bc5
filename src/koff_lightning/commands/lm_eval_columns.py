"""One column of `koff lm-eval`: a way of reading, scored by lm-eval's own `simple_evaluate`, and its files."""

import argparse
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from koff_lightning.support.errors import KoffError
from koff_lightning.support.launched import one_is_first
from koff_lightning.support.names import AUTO, refuse_no_memory

if TYPE_CHECKING:
    from koff_lightning.evaluation.harness import KoffLM
    from koff_lightning.evaluation.lm_scores import Scores
    from koff_lightning.evaluation.lm_tasks import Loaded


SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")  # in the order of --seed


@dataclass(frozen=True)
class Column:
    """One way of reading: the name of its column, the memory, and whether it is the dense model."""

    name: str
    domain: str | None = None
    dense: bool = False


def named(domains: str | None) -> list[str]:
    """Names with commas between, each once."""
    return [*filter(None, dict.fromkeys((domains or "").split(",")))]


def columns_of(options: argparse.Namespace, model: Any) -> list[Column]:
    """What is asked for; without a word about it the model as it is, without memory."""
    from koff_lightning.evaluation.lm_scores import CLASH
    from koff_lightning.evaluation.scored_models import check_router, domains_of

    known = domains_of(model)
    asked = known if options.domain == "all" else named(options.domain)
    if options.domain and not asked:
        raise KoffError(f"lm-eval: {options.model} has no memories: leave --domain out")
    if AUTO in asked and AUTO not in known:
        check_router(model, options.model)
    refuse_no_memory([name for name in asked if name != AUTO], known, options.model)
    columns = [Column(name, name) for name in asked]
    if options.memory_off or not (asked or options.dense):
        columns.append(Column("none" if known else "dense"))
    if options.dense:
        columns.append(Column("dense", dense=True))
    if clash := [column.name for column in columns if column.domain is None and column.name in known]:
        raise KoffError(f"lm-eval: {clash[0]}: {CLASH}")
    return columns


def score_column(lm: "KoffLM", tasks: "Loaded", settings: Any, options: argparse.Namespace, column: Column) -> "Scores":
    """One column by lm-eval's `simple_evaluate`; its files are written below `<output_path>/<column>`."""
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker

    from koff_lightning.evaluation.lm_cache import cache_of, refuse_cached_nan
    from koff_lightning.evaluation.lm_scores import plain
    from koff_lightning.evaluation.lm_tasks import bundled_index, quiet

    where = settings.output_path and os.path.join(settings.output_path, column.name)
    tracker = EvaluationTracker(output_path=where)
    cache = settings.use_cache and cache_of(
        settings.use_cache,
        column.name,
        options.model,
        options.backbone,
        options.dtype,
        options.max_length or options.rows,
        *([] if lm.opening is None else [f"windows open with {lm.opening}"]),
    )
    about = {"path": options.model, "domain": column.domain, "dense": column.dense}
    about |= {name: size for name in ("max_length", "rows") if (size := getattr(options, name))}
    with quiet(), few_questions(bool(where)), one_is_first():
        found = simple_evaluate(
            lm,
            model_args=about,
            tasks=roots(tasks),
            task_manager=bundled_index(),
            num_fewshot=settings.num_fewshot,
            batch_size=settings.batch_size,
            use_cache=cache,
            limit=settings.limit,
            samples=settings.samples,
            write_out=settings.write_out,
            log_samples=settings.log_samples or bool(cache),
            evaluation_tracker=tracker,
            system_instruction=settings.system_instruction,
            apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=bool(settings.fewshot_as_multiturn),
            gen_kwargs=settings.gen_kwargs,
            predict_only=settings.predict_only,
            **dict(zip(SEEDS, settings.seed or [None] * 4, strict=True)),
            confirm_run_unsafe_code=settings.confirm_run_unsafe_code,
            metadata=settings.metadata,
            **settings.cache_requests,
        )
    lm.check_finite()
    if found is None:  # of several processes the first one has the scores
        return {}
    samples = found.pop("samples", None)
    if cache:
        refuse_cached_nan([row for rows in samples.values() for row in rows], cache)
        samples = samples if settings.log_samples else None
    tracker.save_results_aggregated(results=found, samples=samples)
    for name in samples or ():
        tracker.save_results_samples(task_name=name, samples=samples[name])
    return plain(found["results"])


@contextmanager
def few_questions(written: bool) -> Iterator[None]:
    """Keep lm-eval from asking git, and from asking pip and the compiler, for seconds, what no file will hold.

    Args:
        written: Whether results are written, which then say on what machine they were made.
    """
    from lm_eval import evaluator

    asked = evaluator.get_git_commit_hash, evaluator.add_env_info, evaluator.print_writeout
    evaluator.get_git_commit_hash = lambda: None  # of the folder that the user stands in
    evaluator.print_writeout = _print_question  # its own speaks in its log, of which errors alone are shown
    if not written:
        evaluator.add_env_info = lambda results: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash, evaluator.add_env_info, evaluator.print_writeout = asked


def _print_question(task: Any) -> None:
    """Print the first request of a task, and its right answer, for `--write_out`."""
    for request in task.instances[:1]:
        print(f"{task.config.task}, as the model is asked:\n{request.args[0]}")
        print(f"{task.config.task}, right answer (or its number): {task.doc_to_target(request.doc)}\n")


def roots(tasks: "Loaded") -> list[Any]:
    """Tasks and groups that stand in no other group, as `simple_evaluate` takes them."""
    groups: Mapping[str, Any] = tasks.get("groups", {})
    inner = {child for group in groups.values() for child in group.child_names}
    return [made for part in (groups, tasks["tasks"]) for name, made in part.items() if name not in inner]
