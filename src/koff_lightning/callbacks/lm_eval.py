"""LMEval: scores lm-eval's tasks on the live model while it trains, which the training does not notice."""

import io
import math
import time
from collections.abc import Iterator, Set
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_warn

from koff_lightning.callbacks.checkpoints import save_the_end
from koff_lightning.evaluation import lm_tasks
from koff_lightning.evaluation.lm_scores import CLASH, Scores, show
from koff_lightning.specs.timing import check_lm_eval
from koff_lightning.support import ranks
from koff_lightning.support.ending import Ended
from koff_lightning.support.errors import KoffError
from koff_lightning.support.wording import nearest
from koff_lightning.training.ending import may_be_left
from koff_lightning.training.eval_mode import eval_mode
from koff_lightning.training.module import KOFFModule
from koff_lightning.training.strategies import ShardedStrategy

if TYPE_CHECKING:
    from koff_lightning.evaluation.harness import KoffLM

OTHER_MODES = ("dense", "memory_off")


@dataclass
class LMEvalTask:
    """One of lm-eval's tasks, groups or tags, under one domain's memory.

    Args:
        task: Name of the task, or path of its YAML file.
        domain: Whose memory is read.
        num_fewshot: Examples before each question; by default what the task says.
        limit: Samples of the task, or a share of them below 1; by default all.
    """

    task: str
    domain: str
    num_fewshot: int | None = None
    limit: float | None = None


@dataclass(frozen=True)
class _Part:
    """One task scored in one arm."""

    column: str  # domain, `dense` or `memory_off`
    domain: str | None
    spec: LMEvalTask
    tasks: lm_tasks.Loaded

    @property
    def names(self) -> set[str]:
        """Names of all that is scored: tasks and groups."""
        return {*self.tasks["tasks"], *self.tasks.get("groups", {})}


class LMEval(Callback):
    """Score lm-eval tasks during the run and at its end; logged as `lm_eval/<domain>/<task>/<metric>` on every rank.

    A monitor can name these. Modes, random state, gates and memories are as before afterwards, so that a run trains the
    same with and without it. The work is shared out over the ranks. The last scores stand in `results.json` and in
    checkpoints, so that a resumed run goes on with them.

    Args:
        tasks: What to score; none by default.
        every_n_steps: Optimizer steps between evaluations; null for the end alone.
        dense: Score the dense model too, once: `lm_eval/dense/...`.
        memory_off: Score the pruned model without memories too: `lm_eval/memory_off/...`.
        strict: Stop the run when an evaluation fails; otherwise it warns and trains on. An error that one of several
            processes meets alone (memory, say) stops the run all the same: the others wait for it in mid-evaluation.
        batch_size: Rows at a time, or `auto` for as many as the GPU takes.
        include_path: Folder of further tasks; `koff fit` wants `--allow-custom-classes` with it, since tasks are code.
    """

    def __init__(
        self,
        tasks: list[LMEvalTask] | None = None,
        every_n_steps: int | None = None,
        dense: bool = False,
        memory_off: bool = False,
        strict: bool = False,
        batch_size: int | str = 8,
        include_path: str | None = None,
    ) -> None:
        check_lm_eval(every_n_steps, batch_size)
        self.tasks = [LMEvalTask(**task) if isinstance(task, dict) else task for task in tasks or []]
        self.every_n_steps, self.strict = every_n_steps, strict
        self.batch_size, self.include_path = batch_size, include_path
        self.modes = [arm for arm, asked in zip(OTHER_MODES, (dense, memory_off), strict=True) if asked]
        self.scores: dict[str, Scores] = {}  # column -> the last scores
        self.seconds = 0.0  # of all evaluations
        self._parts: list[_Part] = []
        self._tokenizer: Any = None
        self._seen = 0  # step of the last evaluation
        self._group: Any = None  # in which several ranks meet after an error

    def setup(self, trainer: Trainer, pl_module: KOFFModule, stage: str) -> None:
        """Load tasks and data, and refuse now what could not be scored later."""
        if stage != "fit":
            return
        if self.tasks and "dense" in self.modes and "dense" not in pl_module.modes:
            raise KoffError("lm_eval.dense: a run that extends an artifact has no dense model at hand")
        if clash := set(self.modes) & set(pl_module.domains):
            raise KoffError(f"lm_eval.{clash.pop()}: {CLASH}")
        self._parts = []
        # Sharded weights are gathered in each forward: after an error the ranks may be out of step whoever met it
        if self.tasks and trainer.world_size > 1 and not isinstance(trainer.strategy, ShardedStrategy):
            self._group = ranks.side_group()
        for spec in self.tasks:
            for part in self._parts_of(spec, trainer, pl_module):
                self._refuse_ambiguous(part)
                if part.domain or not part.names <= self._named(part.column):  # `dense` and such need each task once
                    self._parts.append(part)
        refuse_unscored(
            trainer, {f"lm_eval/{part.column}/{name}" for part in self._parts for name in score_names(part.tasks)}
        )

    def _named(self, column: str) -> set[str]:
        """Tasks and groups that stand in a column so far."""
        return {name for part in self._parts if part.column == column for name in part.names}

    def _refuse_ambiguous(self, part: _Part) -> None:
        """Refuse a second way to score what stands in the same place."""
        for other in (known for known in self._parts if known.column == part.column):
            if not (twice := sorted({*part.tasks["tasks"]} & {*other.tasks["tasks"]})):
                continue
            if part.domain:
                raise KoffError(f"lm_eval: task {twice[0]!r} is named twice for domain {part.domain!r}: leave one out")
            if (part.spec.limit, part.spec.num_fewshot) != (other.spec.limit, other.spec.num_fewshot):
                raise KoffError(
                    f"lm_eval.{part.column}: task {twice[0]!r} has another limit or num_fewshot for domain "
                    f"{part.spec.domain!r} than for {other.spec.domain!r}, so that no score compares with both: give "
                    "both the same"
                )

    def on_train_start(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Show monitors the scores of a resumed run, and nan where there is none yet; make up for what was stopped."""
        refuse_early_looks(trainer, self.every_n_steps)
        self._publish(trainer)
        if trainer.global_step and self._is_due(trainer):
            self._evaluate(trainer, pl_module)

    def _parts_of(self, spec: LMEvalTask, trainer: Trainer, module: KOFFModule) -> list[_Part]:
        if spec.domain not in module.domains:
            raise KoffError(
                f"lm_eval: task {spec.task!r} is asked of domain {spec.domain!r}, but this run has memories for "
                f"{', '.join(module.domains)}"
            )
        with lm_tasks.quiet():
            tasks = lm_tasks.load_tasks([spec.task], self.include_path)
        lm_tasks.check_safe(tasks)
        lm_tasks.check_counts(tasks, spec.limit, spec.num_fewshot, trainer.world_size)
        writing = [name for name, task in tasks["tasks"].items() if task.OUTPUT_TYPE == "generate_until"]
        if writing and isinstance(trainer.strategy, ShardedStrategy):
            raise KoffError(
                f"lm_eval: task {writing[0]!r} lets the model write, which sharded weights cannot do in step: score it "
                "afterwards with `koff lm-eval`"
            )
        return [_Part(spec.domain, spec.domain, spec, tasks), *(_Part(arm, None, spec, tasks) for arm in self.modes)]

    def on_train_batch_end(self, trainer: Trainer, pl_module: KOFFModule, *_: object) -> None:
        """Evaluate where it is due, before a checkpoint of this step is saved."""
        if self._is_due(trainer):
            with suppress(Ended):  # after this batch; a resumed run makes up for it
                self._evaluate(trainer, pl_module)

    def _is_due(self, trainer: Trainer) -> bool:
        step = trainer.global_step
        return step == trainer.estimated_stepping_batches or bool(
            self.every_n_steps and step and step % self.every_n_steps == 0
        )

    def on_train_end(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Evaluate if the run has ended early; show the scores."""
        if self._parts and self._seen != trainer.global_step:
            save_the_end(trainer)
        self._evaluate(trainer, pl_module)
        if self.scores and trainer.is_global_zero:
            show(self.scores)

    def _evaluate(self, trainer: Trainer, module: KOFFModule) -> None:
        if not self._parts or self._seen == trainer.global_step:
            return
        since = time.perf_counter()
        scored: dict[str, Scores] = {}
        for part in self._parts:
            if part.column == "dense" and part.names <= self.scores.get("dense", {}).keys():
                continue  # it does not change
            try:
                found = self._score(part, trainer, module)
                for scores in (scored, self.scores):
                    scores[part.column] = scores.get(part.column, {}) | found
            except Exception as error:
                if self.strict or not self._is_shared(error, trainer):
                    raise  # an error of one rank: the others wait for it in lm-eval's collectives
                reason = error if isinstance(error, KoffError) else f"{type(error).__name__}: {error}"
                rank_zero_warn(
                    f"lm_eval: {part.spec.task} ({part.column}) failed at step {trainer.global_step}, training goes "
                    f"on: {reason}"
                )
        self._seen = trainer.global_step  # not before: what a signal ends is made up for by the run that goes on
        self.seconds += time.perf_counter() - since
        self._log(trainer, scored)

    def _is_shared(self, error: Exception, trainer: Trainer) -> bool:
        """Whether all ranks have met an error in this evaluation, so that none is left in the middle of it."""
        if trainer.world_size == 1 or isinstance(error, KoffError):  # ours are raised by all alike
            return True
        return self._group is not None and ranks.all_meet(self._group)  # sharded weights have no group: see `setup`

    def _score(self, part: _Part, trainer: Trainer, module: KOFFModule) -> Scores:
        from koff_lightning.evaluation.harness import score

        # Several ranks share the work: one that left would let the others wait.
        leaving = may_be_left(trainer) if trainer.world_size == 1 else nullcontext()
        with leaving, eval_mode(module), trainer.precision_plugin.forward_context(), _silence():
            return score(self._reader(part, trainer, module), part.tasks, part.spec.num_fewshot, part.spec.limit)

    def _reader(self, part: _Part, trainer: Trainer, module: KOFFModule) -> "KoffLM":
        from koff_lightning.evaluation.harness import KoffLM
        from koff_lightning.evaluation.scored_models import tokenizer_of

        if self._tokenizer is None:
            self._tokenizer = getattr(trainer.datamodule, "tokenizer", None) or tokenizer_of(module.model)
        return KoffLM(
            module.model,
            part.domain,
            part.column == "dense",
            tokenizer=self._tokenizer,
            batch_size=self.batch_size,
            rows=getattr(trainer.datamodule, "seq_len", None),
            open_with_start=getattr(trainer.datamodule, "open_with_start", False),
            logits_cache=not isinstance(trainer.strategy, ShardedStrategy),  # ranks must make equally many forwards
        )

    def _log(self, trainer: Trainer, scored: dict[str, Scores]) -> None:
        """To loggers what was scored in this step, whatever `log_every_n_steps` is; to monitors the last of each."""
        self._publish(trainer)
        for logger in trainer.loggers:
            figures = _flat(scored) | {"lm_eval/seconds": self.seconds}
            logger.log_metrics(figures, trainer.global_step - 1)  # counts from 0

    def _publish(self, trainer: Trainer) -> None:
        """Put the last scores where monitors look; what has none is nan, else a checkpoint by it would end the run."""
        figures = dict.fromkeys(monitors(trainer), math.nan) | _flat(self.scores)
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in figures.items()})

    def _asked(self) -> list[Any]:
        """What makes scores comparable: they are restored for the same questions only."""
        return [[asdict(spec) for spec in self.tasks], self.modes, self.include_path]

    def state_dict(self) -> dict[str, Any]:
        """The last scores and their step."""
        return {"asked": self._asked(), "scores": self.scores, "step": self._seen, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there, unless something else is asked now."""
        if state["asked"] == self._asked():
            self.scores, self._seen, self.seconds = state["scores"], state["step"], state["seconds"]


def _flat(columns: dict[str, Scores]) -> dict[str, float]:
    """Scores by the names that they are logged under; no standard errors."""
    return {
        f"lm_eval/{column}/{task}/{metric}": value
        for column, scores in columns.items()
        for task, row in scores.items()
        for metric, value in row.items()
        if "_stderr" not in metric
    }


@contextmanager
def _silence() -> Iterator[None]:
    """Keep lm-eval's bars and notices off the terminal, where the run shows its own."""
    with lm_tasks.quiet(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


# --------------------------------------------- checkpoints and early stopping that go by scores


def monitors(trainer: Trainer) -> list[str]:
    """Scores that checkpoints and early stopping go by."""
    names = [getattr(callback, "monitor", None) or "" for callback in trainer.callbacks]
    return [name for name in names if name.startswith("lm_eval/")]


def score_names(tasks: lm_tasks.Loaded) -> set[str]:
    """The scores that tasks will have, as `<task or group>/<metric>` with the metrics of `lm_scores.plain`."""
    found = {name: _metrics(task) for name, task in tasks["tasks"].items()}
    for name, group in tasks.get("groups", {}).items():
        below = {pair for task in group.get_all_tasks() for pair in _metrics(task)}
        found[name] = {
            (metric, kind)
            for metric, kind in below
            for averaged in group.aggregate_metric_list or ()
            if metric == averaged.metric and (averaged.filter_list is None or kind in averaged.filter_list)
        }
    return {
        f"{name}/{metric}" + ("" if kind == "none" else f".{kind}")
        for name, pairs in found.items()
        for metric, kind in pairs
    }


def _metrics(task: Any) -> set[tuple[str, str]]:
    """Metric and filter of every score of one task; lm-eval's filter `none` is that of tasks which name none."""
    filters = task.get_config("filter_list") or [{"name": "none"}]
    return {(metric, each["name"]) for metric in task.aggregation() for each in filters}


def refuse_unscored(trainer: Trainer, known: Set[str]) -> None:
    """Refuse a monitor of a score that no evaluation gives: Lightning would say so in the middle of the run.

    Args:
        trainer: With its callbacks.
        known: The scores that there will be, `lm_eval/<column>/<task or group>/<metric>`.

    Raises:
        KoffError: A callback monitors a score that is not among them.
    """
    for name in monitors(trainer):
        if name not in known:
            raise KoffError(
                f"a callback monitors {name!r}, which this run does not score: lm_eval.tasks gives "
                f"{', '.join(sorted(known)) or 'nothing'}.{nearest(name, known)}"
            )


def refuse_early_looks(trainer: Trainer, every_n_steps: int | None) -> None:
    """Refuse early stopping that looks before the first score: it would end the run at a nan.

    Args:
        trainer: Knows its loaders, as from `on_train_start` on.
        every_n_steps: Optimizer steps between evaluations; None for the end alone.

    Raises:
        KoffError: An EarlyStopping looks at a score before the first evaluation.
    """
    first = every_n_steps or trainer.estimated_stepping_batches
    for callback in trainer.callbacks:
        if not isinstance(callback, EarlyStopping) or not (callback.monitor or "").startswith("lm_eval/"):
            continue
        if callback.check_finite and (look := _first_look(trainer, callback)) < first:
            when = f"at step {first}" if every_n_steps else "at the end alone"
            raise KoffError(
                f"EarlyStopping looks at {callback.monitor!r} at step {math.ceil(look)}, but the first score comes "
                f"{when}, so that the run would end there: set lm_eval.every_n_steps to {max(1, int(look))} or less, "
                "let it look later, or give it check_finite: false"
            )


def _first_look(trainer: Trainer, stopping: EarlyStopping) -> float:
    """Optimizer step at which early stopping looks first: when an epoch ends, or a validation."""
    epoch, batches = trainer.num_training_batches, trainer.val_check_batch or 0  # 0: validation goes by the clock
    if stopping._check_on_train_epoch_end:
        batches = epoch
    elif not trainer.enable_validation:
        return math.inf
    elif (every := trainer.check_val_every_n_epoch or 1) > 1:
        batches += (every - 1) * epoch
    return batches / trainer.accumulate_grad_batches
