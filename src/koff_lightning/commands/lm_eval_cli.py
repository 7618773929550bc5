"""`koff lm-eval`: lm-eval's own options and files, over a model and the domains that it is read with."""

import argparse
import io
import logging
import re
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Self

from koff_lightning.commands.lm_eval_columns import columns_of, named, score_column
from koff_lightning.commands.parsing.class_names import SWITCH, refuse_task_files
from koff_lightning.commands.parsing.lack_of_memory import lack_of_memory_told
from koff_lightning.commands.parsing.missing import NO_CHECKPOINT, refuse_no_domain
from koff_lightning.specs.timing import check_batch_size
from koff_lightning.support.errors import KoffError
from koff_lightning.support.forms import fault_in
from koff_lightning.support.json_files import read_json_object
from koff_lightning.support.launched import count, device_of, first_speaks, joined, rank, refuse_copies
from koff_lightning.support.names import refuse_no_model
from koff_lightning.support.offline import is_asked
from koff_lightning.support.quick_imports import quick_imports
from koff_lightning.support.wording import one_line
from koff_lightning.support.yaml_files import read_yaml

if TYPE_CHECKING:
    from koff_lightning.evaluation.harness import KoffLM
    from koff_lightning.evaluation.lm_scores import Scores
    from koff_lightning.evaluation.lm_tasks import Loaded

# lm-eval's options that are ours here, or that send results elsewhere: the files of --output_path hold all of them.
TAKEN = ("model", "model_args", "device", "verbosity", "show_config", "check_integrity", "trust_remote_code")
ELSEWHERE = ("wandb_args", "wandb_config_args", "trackio_args", "hf_hub_log_args")
_RUNS_CODE = ("trust_remote_code", "confirm_run_unsafe_code")
_TOLD_BY_THEMSELVES = ("batch_size", "seed")  # of more kinds than lm-eval's own type hints have
_BY_WORD = f"If you trust it, say so on the command line, or add {SWITCH}"
ROWS = "8"  # at a time, unless --batch_size says otherwise


def lm_eval(argv: list[str]) -> None:
    """Score a model on lm-eval's tasks, under each domain asked for; processes that torchrun has started share them.

    Args:
        argv: The words after `koff lm-eval`.

    Raises:
        KoffError: Bad options, no such model, domain or task, no data, or scores that are no numbers.
    """
    scores: dict[str, Scores] = {}
    with ExitStack() as written:
        with first_speaks():
            options, settings = _asked(argv)
            with quick_imports():
                from koff_lightning.evaluation import harness
            largest = 64 if settings.max_batch_size is None else settings.max_batch_size  # 64 is HFLM's own
            for value, name in ((settings.batch_size, "batch_size"), (largest, "max_batch_size")):
                check_batch_size(value, f"lm-eval: {name}")
            from koff_lightning.evaluation.lm_files import files_written
            from koff_lightning.evaluation.lm_scores import show
            from koff_lightning.evaluation.one_bar import one_bar
            from koff_lightning.evaluation.scored_models import load_model, opens_with_start, rows_of

            tasks = _tasks(settings, options)
            options.device = device_of(options.device)
            sizes = {"batch_size": settings.batch_size, "max_batch_size": largest, "max_length": options.max_length}
            options.rows = None if options.max_length else rows_of(options.model)
            as_run = {"rows": options.rows, "open_with_start": opens_with_start(options.model)}
            written.enter_context(files_written(settings.output_path, settings.use_cache))
        written.enter_context(lack_of_memory_told("Take a smaller --batch_size, or another --device"))
        with joined(options.device):
            with first_speaks():
                model = load_model(options.model, options.backbone, options.device, options.dtype)
                columns = columns_of(options, model)
            with one_bar(len(columns), shown=rank() == 0) as bar:
                for column in columns:
                    with first_speaks():
                        lm = harness.KoffLM(model, column.domain, column.dense, **as_run, **sizes)
                        _check_max_length(lm, options.max_length)
                        _check_chat_template(lm, settings.apply_chat_template, options.model)
                        bar(column.name)
                        scores[column.name] = score_column(lm, tasks, settings, options, column)
                    settings.write_out = False  # the other columns are asked the same
        if rank():
            return
        show(scores)
        if options.rows and any(task.OUTPUT_TYPE == "loglikelihood_rolling" for task in tasks["tasks"].values()):
            read = f"whole texts are read {lm.rows} tokens at a time, as its run read them"
            print(f"{read}; --max_length N reads otherwise")


def _asked(argv: list[str]) -> tuple[argparse.Namespace, Any]:
    """What is asked for: our options and lm-eval's, looked at as far as that needs no heavy import."""
    from koff_lightning.evaluation.lm_tasks import check_version

    check_version()
    if rank():
        logging.disable(logging.WARNING)  # the first process warns
    options = _given(argv)
    refuse_copies("lm-eval")
    if not options.model or not (options.tasks or options.config):
        raise KoffError("lm-eval: give --model (artifact, checkpoint or dense model) and --tasks")
    if options.config and not options.allow_custom_classes:
        _refuse_code(Path(options.config).expanduser())
    _refuse_no_model(options.model, options.domain)
    settings = _settings(options)
    settings.write_out = settings.write_out and rank() == 0
    if count() > 1 and settings.use_cache:  # one that knows all its answers would leave the others waiting
        raise KoffError(
            f"lm-eval: --use_cache keeps answers by process, and here are {count()}: leave it out, or start one"
        )
    from koff_lightning.artifact.hub import artifact_or_same

    options.model = artifact_or_same(options.model)
    if is_asked():
        from koff_lightning.commands.needs import model_needs, refuse_missing, task_needs

        refuse_missing([*model_needs(options.model), *task_needs(settings.tasks, settings.include_path)])
    return options, settings


def _given(argv: list[str]) -> argparse.Namespace:
    """The options as lm-eval's parser reads them, some of which it refuses with exceptions that argparse lets pass."""
    try:
        return _parser().parse_args(argv)
    except KoffError:
        raise
    except ValueError as error:
        raise KoffError(f"lm-eval: {' '.join(str(error).split())}") from error


def _refuse_no_model(model: str, domains: str | None) -> None:
    """Raise KoffError if it shows without heavy imports that a model or a domain is not there."""
    if model.endswith(".ckpt") and not Path(model).expanduser().exists():
        raise KoffError(f"checkpoint {model}: {NO_CHECKPOINT}")
    if not model.endswith(".ckpt") and not is_asked():  # then all that is missing is told at once
        refuse_no_model(model)
    if domains != "all":
        refuse_no_domain(model, named(domains))


def _tasks(settings: Any, options: argparse.Namespace) -> "Loaded":
    """The tasks that are asked for, which can be asked as they are."""
    from koff_lightning.evaluation import lm_tasks

    with lm_tasks.quiet():
        tasks = lm_tasks.load_tasks(settings.tasks, settings.include_path, settings.metadata)
    lm_tasks.check_safe(tasks, settings.confirm_run_unsafe_code)
    lm_tasks.check_counts(tasks, settings.limit, settings.num_fewshot, count())
    lm_tasks.check_samples(tasks, settings.samples or options.samples)  # lm-eval takes {} for nothing said
    for name, some in (settings.samples or {}).items():
        if len(some) < count():
            few = f"lm-eval: --samples has {len(some)} of task {name!r} for {count()} processes"
            raise KoffError(f"{few}: each needs one")
    return tasks


def _refuse_code(path: Path) -> None:
    """Raise KoffError if a config says what runs code: whoever asks says that on the command line."""
    content = _content(path)
    tasks = content.get("tasks") or []
    named = tasks.split(",") if isinstance(tasks, str) else tasks if isinstance(tasks, list) else [tasks]
    refuse_task_files(content.get("include_path"), [str(task).strip() for task in named])
    if odd := [name for name in _RUNS_CODE if content.get(name) not in (None, False)]:
        raise KoffError(f"lm-eval: --config {path} says {odd[0]}, which lets code of others run. {_BY_WORD}")


def _content(path: Path) -> dict[str, Any]:
    """What a config of lm-eval says."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise KoffError(f"lm-eval: --config {path} must hold names and values")
    from lm_eval.config.evaluate_config import EvaluatorConfig

    of_known_kind = {name: value for name, value in content.items() if name not in _TOLD_BY_THEMSELVES}
    if found := fault_in(of_known_kind, EvaluatorConfig, "config"):
        raise KoffError(f"lm-eval: --config {path} cannot be used: {found}")
    return content


def _check_chat_template(lm: "KoffLM", asked: bool | str, model: str) -> None:
    """Refuse a template that the tokenizer does not have."""
    try:
        lacking = asked and not lm.chat_template(asked)
    except ValueError as error:  # of several templates none has that name
        raise KoffError(f"lm-eval: {' '.join(str(error).split())}") from error
    if lacking:
        raise KoffError(f"lm-eval: the tokenizer of {model} has no chat template: leave --apply_chat_template out")


def _check_max_length(lm: "KoffLM", asked: int | None) -> None:
    """Refuse what is longer than the model allows, or too short for a word with something before it."""
    allowed = getattr(lm.model.config, "max_position_embeddings", None)
    if asked is not None and not 2 <= asked <= (allowed or asked):
        most = f" and at most {allowed}, what the model allows" if allowed else ""
        raise KoffError(f"lm-eval: --max_length must be at least 2{most}; got {asked}")


def _parser() -> argparse.ArgumentParser:
    """lm-eval's own parser of `lm-eval run`, without what is ours, and with ours."""
    from lm_eval._cli.run import Run

    made = Run.create(argparse.ArgumentParser().add_subparsers())._parser
    made.allow_abbrev = False
    made.prog, made.usage, made.epilog = "koff lm-eval", "koff lm-eval --model MODEL --tasks TASKS [options]", None
    made.description = (
        "Score an artifact, a checkpoint or a dense model on lm-eval's tasks, under each domain asked for."
    )
    size = next(action for action in made._actions if action.dest == "batch_size")
    path = next(action for action in made._actions if action.dest == "output_path")
    path.help = "Folder for results (required with --log_samples); each column has files of its own in it"
    size.help = size.help.replace("default: 1", f"default: {ROWS}; of --config 1")
    for action in [a for a in made._actions if a.dest in (*TAKEN, *ELSEWHERE)]:
        for word in action.option_strings:
            made._option_string_actions.pop(word)
        made._remove_action(action)
        for group in made._action_groups:
            if action in group._group_actions:
                group._group_actions.remove(action)
    ours = made.add_argument_group("koff")
    ours.add_argument(
        "--model", help="folder of an artifact, .ckpt of `koff fit`, or dense model (id, folder, .gguf, koff-tiny)"
    )
    ours.add_argument(
        "--domain", "--domains", help="whose memory to read: names with commas, `all`, or `auto`: the router's"
    )
    ours.add_argument("--memory_off", "--memory-off", action="store_true", help="a column `none`: without memory")
    ours.add_argument("--dense", action="store_true", help="a column `dense`: the model that was decomposed")
    ours.add_argument("--backbone", help="where the backbone of a checkpoint is, if it has moved")
    ours.add_argument(SWITCH, action="store_true", help="let --config name task files, whose Python is run")
    ours.add_argument("--device", help="torch device; by default a GPU if there is one")
    ours.add_argument("--dtype", help="of the backbone; by default as it is stored")
    ours.add_argument(
        "--max_length",
        type=int,
        help="tokens read at once, at most; by default what the model allows, and of whole texts the rows of its run",
    )

    def refuse(message: str) -> NoReturn:
        names = [word.lstrip("-") for action in made._actions for word in action.option_strings]
        message = re.sub(r"invalid (functools\.partial\(.*\)|\w+_\w+) value", "invalid value", message)  # its own words
        raise KoffError(f"lm-eval: {one_line(message, names)}")

    made.error = refuse
    return made


def _settings(options: argparse.Namespace) -> Any:
    """lm-eval's own check of its options."""
    from lm_eval.config.evaluate_config import EvaluatorConfig

    own = (
        "model",
        "domain",
        "memory_off",
        "dense",
        "backbone",
        "device",
        "dtype",
        "max_length",
        "allow_custom_classes",
    )
    given = {name: value for name, value in vars(options).items() if name not in own}
    if not options.config:
        given.setdefault("batch_size", ROWS)

    class Settings(EvaluatorConfig):
        """lm-eval's options, whose config files are read in UTF-8 on every system, and with limits on their size."""

        @staticmethod
        def load_yaml_config(config_path: str) -> dict[str, Any]:
            return _content(Path(config_path).expanduser())

        def _process_arguments(self) -> Self:
            named = isinstance(self.samples, str) and not self.samples.lstrip().startswith("{")
            if named and (path := Path(self.samples).expanduser()).is_file():
                self.samples = read_json_object(path)
            if isinstance(self.tasks, str):  # of a config
                self.tasks = self.tasks.split(",")
            return super()._process_arguments()

    try:
        with redirect_stdout(io.StringIO()):  # it prints what a config says, which not every terminal can show
            return Settings.from_cli(argparse.Namespace(**given))
    except (ValueError, TypeError, OSError) as error:
        raise KoffError(f"lm-eval: {' '.join(str(error).split())}") from error
