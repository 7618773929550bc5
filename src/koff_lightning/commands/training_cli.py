"""The verbs of training, of preparing it and of baselines: LightningCLI over our classes, and what users see.

Every option is a typed, documented argument of a class; nothing is decided here but names, folders and words.
"""

import json
import os
import secrets
import signal
import time
from contextlib import nullcontext, redirect_stdout, suppress
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from koff_lightning.callbacks import (
    AnnealSparsity,
    Checkpoints,
    ContinuedLog,
    ExportArtifact,
    GradientCoverage,
    KoffProgress,
    LMEval,
    PlaceMemories,
    Preview,
    RunReport,
)
from koff_lightning.callbacks.report import what_was_saved
from koff_lightning.commands.baseline import resolve
from koff_lightning.commands.needs import needs_of, refuse_missing
from koff_lightning.commands.parsing.class_names import (
    SWITCH,
    only_known_classes,
    refuse_remote_code,
    refuse_task_files,
)
from koff_lightning.commands.parsing.config_files import find_configs, limited_yaml, take_paths_as_paths, utf8_files
from koff_lightning.commands.parsing.first_look import NO_DOMAINS
from koff_lightning.commands.parsing.foreign_errors import (
    NO_BACKEND,
    NO_GPU,
    is_bad_input,
    is_lightnings,
    lightnings_words,
    own_words,
    systems_words,
)
from koff_lightning.commands.parsing.lack_of_memory import lack_of_memory_told
from koff_lightning.commands.parsing.option_values import refuse_meaningless
from koff_lightning.commands.parsing.precision import AUTO, choose, has_bf16, hint_of, refuse_words, take_up, told
from koff_lightning.commands.parsing.quiet_terminal import keep_the_terminal_quiet
from koff_lightning.commands.prepare import VerbTrainer
from koff_lightning.data import DomainDataModule, bundled_domains
from koff_lightning.support.ending import Ended, ended_by
from koff_lightning.support.errors import KoffError
from koff_lightning.support.names import refuse_taken
from koff_lightning.support.offline import is_asked
from koff_lightning.support.secrets import without_secrets
from koff_lightning.support.wording import one_line
from koff_lightning.support.yaml_files import refuse_duplicate_keys
from koff_lightning.training.checkpoints import AtomicCheckpointIO, newest_checkpoint
from koff_lightning.training.ending import GRACE, is_loss_of_a_rank
from koff_lightning.training.module import KOFFModule
from koff_lightning.training.resume import refuse_other_options
from koff_lightning.training.run_folder import alone_in, new_version
from koff_lightning.training.strategies import check
from koff_lightning.training.trainer_options import (
    refuse_callbacks,
    refuse_endless,
    refuse_no_steps,
    refuse_options,
    refuse_separate_copies,
)

# The callbacks that every run has, by the name of their section.
CALLBACKS = {
    "anneal": AnnealSparsity,
    "placement": PlaceMemories,
    "checkpoint": Checkpoints,
    "export": ExportArtifact,
    "lm_eval": LMEval,
}


LESS_MEMORY = (
    "Take a smaller data.batch_size (with trainer.accumulate_grad_batches), data.seq_len or model.loss.chunk, or "
    "model.activation_checkpointing true"
)


class SavedConfig(SaveConfigCallback):
    """The resolved config of a run, as it is saved and reported: without secrets."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *args: object, **options: object) -> None:
        super().__init__(parser, without_secrets(config), *args, **options)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """As Lightning's, which fails if the first logger has no folder."""
        self.save_to_log_dir = trainer.log_dir is not None
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Then the folder is that of the run. Lightning calls this on rank 0 alone."""
        if not self.save_to_log_dir:
            root = Path(trainer.default_root_dir)
            root.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, root / self.config_filename, skip_none=False, overwrite=True, multifile=False)


DRY_RUN = "--trainer.fast_dev_run=2"
BARE = {  # words without a value, and what the parser takes for them
    "--dry-run": DRY_RUN,
    "--prefetch-only": "--prefetch_only=true",
    "--no-score": "--score=false",
    "--teacher": "--teacher=true",
    SWITCH: SWITCH,
}


class KoffCLI(LightningCLI):
    """LightningCLI with one-line errors and one folder per run."""

    def __init__(self, *classes: type, args: list[str], allow_custom: bool, **options: object) -> None:
        self._verb, self._words, self._allow_custom = args[0], args, allow_custom
        self._own_code = allow_custom or classes != (KOFFModule, DomainDataModule)
        self._report, self._version = RunReport(), None
        try:
            super().__init__(*classes, args=args, **options)
        except BaseException:
            if self._version and not self._report.has_begun:
                self._version.remove()
            raise

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give the callbacks that every run has their own sections, and take the domains' names from the data."""
        for section, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, section)
        parser.set_defaults({"checkpoint.every_n_train_steps": 100, "checkpoint.save_last": True})
        parser.set_defaults({"model.dtype": AUTO})
        parser.link_arguments("data.domains", "model.domains", compute_fn=_names)
        take_paths_as_paths(parser, "data.domains")
        take_paths_as_paths(parser, "data.retention")

    def subcommands(self) -> dict[str, set[str]]:
        """The verb at hand, with the arguments that are no options; parsers of the others would take half a second."""
        ours = {"baseline": {"model", "datamodule"}, "prepare": {"config"}}
        return {self._verb: (LightningCLI.subcommands() | ours)[self._verb]}

    def before_instantiate_classes(self) -> None:
        """Some options stand for others; what a config may not say, and what lacks without network, is said now."""
        for section, kind in {"model": KOFFModule, "data": DomainDataModule, "trainer": Trainer, **CALLBACKS}.items():
            refuse_meaningless(kind, self.config[self.subcommand][section], section)
        model, trainer = self.config[self.subcommand].model, self.config[self.subcommand].trainer
        refuse_options(trainer)
        refuse_words(model, trainer, self.subcommand)
        if self.subcommand == "baseline":
            resolve(self.config.baseline)  # which may name the backbone, by which the dtype is chosen
        take_up(model, trainer, self._goes_on_from())
        choose(model, trainer, has_bf16(trainer.accelerator, model.backbone))
        if self.subcommand == "fit" and (line := told(model, trainer)):
            rank_zero_info(line)
        lm_eval = self.config[self.subcommand].lm_eval
        if not self._allow_custom:
            refuse_task_files(lm_eval.include_path, [spec.task for spec in lm_eval.tasks or ()])
            refuse_remote_code(model.trust_remote_code, self._words)
        if DRY_RUN in self._words:  # whatever a config says; two steps of the optimizer, of so many batches each
            trainer.fast_dev_run = 2 * max(1, trainer.accumulate_grad_batches)
        if self.subcommand == "fit":
            refuse_endless(trainer)
            refuse_taken([] if self._goes_on_from() else model.domains)
        if is_asked():
            refuse_missing(needs_of(self.config[self.subcommand]))

    def instantiate_classes(self) -> None:
        """Build what the verb needs: preparing needs no model and no trainer."""
        if self.subcommand == "prepare":
            return
        try:
            super().instantiate_classes()
        except Exception as error:  # what jsonargparse and Lightning say of values that types allow
            if not is_bad_input(error):
                raise
            said = one_line(str(error), ())
            raise own_words(error) or KoffError(NO_GPU if said.startswith(NO_BACKEND) else said) from error

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        """Parse; what is wrong is said in one line."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            verb = self._subcommand_parsers[args[0]]
            said = one_line(str(error), _option_names(verb.get_defaults()))
            raise own_words(error) or KoffError(said + hint_of(said)) from error

    def _set_seed(self) -> None:
        """As Lightning does, but `true` is a random seed, as its own help says, which the saved config then names."""
        options = self.config[self.subcommand]
        if options.get("seed_everything") is True:
            options.seed_everything = secrets.randbelow(2**32)
        if not 0 <= (seed := options.get("seed_everything") or 0) < 2**32:
            raise KoffError(f"seed_everything must be from 0 to 4294967295; got {seed}")
        super()._set_seed()

    def _parse_ckpt_path(self) -> None:
        """Options come from configs and the command line alone.

        LightningCLI would let the checkpoint's hyperparameters override them silently (Lightning pull request 21455).
        """

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """Add what every run has unless the trainer's options switch it off: loggers, checkpoints, progress, report."""
        trainer = self._get(self.config_init, "trainer")
        self.trainer_defaults["callbacks"] = [GradientCoverage(), self._report, ContinuedLog()]
        if trainer.fast_dev_run:
            self.trainer_defaults["callbacks"].append(Preview())
        if trainer.enable_progress_bar is not False:
            self.trainer_defaults["callbacks"].append(KoffProgress())
        if trainer.enable_checkpointing is False or trainer.fast_dev_run:
            self._parser(self.subcommand).callback_keys.remove("checkpoint")
        if trainer.logger is None and not trainer.fast_dev_run:
            self._version = new_version(trainer.default_root_dir)
            kwargs["logger"] = _default_loggers(self._version.folder)
        kwargs["plugins"] = [*_as_list(trainer.plugins), AtomicCheckpointIO()]
        run = super().instantiate_trainer(**kwargs)
        if self.subcommand != "baseline":  # which says itself that it runs in one process
            check(run)  # here no process has been started yet
        refuse_callbacks(run)
        if self.subcommand == "fit":
            refuse_no_steps(run)
            refuse_separate_copies(run)
        run.callbacks.sort(key=lambda callback: isinstance(callback, ExportArtifact))  # after the report, if it fails
        return run

    def _run_subcommand(self, subcommand: str) -> None:
        """Run; RunReport has said what was saved when that is cut short."""
        if subcommand == "prepare":
            config = self.config.prepare
            with lack_of_memory_told("Take a smaller data.batch_size or data.seq_len"):
                VerbTrainer.prepare(config, config.out, config.prefetch_only, config.prefetch_bytes, config.teacher)
            return
        if subcommand not in ("fit", "baseline") and not self._get(self.config_init, "ckpt_path"):
            raise KoffError(f"koff {subcommand} scores what a run has trained: give its --ckpt_path")
        try:
            writes = subcommand == "fit" and not self.trainer.fast_dev_run
            with (
                ended_by(),
                alone_in(self.trainer.default_root_dir) if writes else nullcontext(),
                lack_of_memory_told(LESS_MEMORY),
            ):
                super()._run_subcommand(subcommand)
        except SystemExit as stop:
            if rank_zero_only.rank:  # rank 0 speaks for all
                raise SystemExit(stop.code) from None
            status = stop.code if stop.code != 1 else 128 + signal.SIGINT  # 1 is Lightning's answer to Ctrl-C
            raise Ended(status, getattr(stop, "advice", "") or self._how_to_go_on(writes)) from None
        except BrokenPipeError:  # nobody reads what is printed any more
            raise
        except OSError as error:  # a full disk, say
            raise KoffError(systems_words(error, self.trainer)) from error
        except Exception as error:
            if is_loss_of_a_rank(error):
                time.sleep(GRACE + 1)  # whoever knows which rank is gone says so meanwhile, and ends this one
                said = f"rank {rank_zero_only.rank} has lost another rank: {' '.join(str(error).split())}"
                raise KoffError(f"{said}; {what_was_saved(self.trainer)}") from error
            if not is_lightnings(error) or self._own_code:  # who wrote some of it wants to know where
                raise
            raise KoffError(lightnings_words(error)) from error

    def _how_to_go_on(self, writes: bool) -> str:
        """What a run that was asked to end leaves behind."""
        saved = what_was_saved(self.trainer)
        return "" if not writes else "go on with --ckpt_path last" if "--ckpt_path" in saved else saved

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, object]:
        """Let `--ckpt_path last` stand for the newest intact checkpoint of all runs in the folder."""
        options = super()._prepare_subcommand_kwargs(subcommand)
        if options.get("ckpt_path") == "last":
            root = self.trainer.default_root_dir
            options["ckpt_path"] = newest = self._newest
            if newest is None and subcommand != "fit":
                raise KoffError(f"--ckpt_path last: there is no checkpoint below {root}")
            rank_zero_info(f"going on from {newest}" if newest else f"no checkpoint below {root} yet: starting anew")
        warm_start = None if subcommand == "baseline" else self.model.warm_start
        for path, verb in ((warm_start, "warm_start"), (options.get("ckpt_path"), subcommand)):
            if path and Path(path).expanduser().exists():
                refuse_other_options(path, self.model, verb)
        return options

    def _goes_on_from(self) -> str | Path | None:
        """The checkpoint that a verb takes up as a whole, if any."""
        given = None if self.subcommand in ("baseline", "prepare") else self.config[self.subcommand].get("ckpt_path")
        if given in ("best", "hpc"):
            raise KoffError(f"--ckpt_path {given}: give a checkpoint file, or `last`")
        return self._newest if given == "last" else given

    @cached_property
    def _newest(self) -> Path | None:
        """The newest checkpoint of all runs in the folder; looked for once, since all of them are read for it."""
        config = self.config[self.subcommand]
        folders = config.trainer.default_root_dir or os.getcwd(), config.checkpoint.dirpath
        return newest_checkpoint([folder for folder in folders if folder])


def run(
    argv: list[str], module: type[KOFFModule] = KOFFModule, data: type[DomainDataModule] = DomainDataModule
) -> None:
    """Run one of the training verbs.

    Args:
        argv: The verb and its options; `--dry-run` shows what a run would do, takes two steps and writes nothing.
        module: Class of `model`.
        data: Class of `data`.

    Raises:
        KoffError: Bad options or input, or an interrupted run.
    """
    keep_the_terminal_quiet()
    argv = [BARE.get(word.replace("_", "-"), word) for word in argv]
    allow_custom = SWITCH in argv
    argv, configs = find_configs(_with_text(argv) if argv[0] == "baseline" else argv)
    argv = [word for word in argv if word != SWITCH]
    for config in configs:
        refuse_duplicate_keys(config)
    try:
        with only_known_classes(allow_custom), utf8_files(), limited_yaml():
            KoffCLI(
                module,
                data,
                trainer_class=VerbTrainer,
                args=argv,
                allow_custom=allow_custom,
                seed_everything_default=0,
                auto_configure_optimizers=False,
                save_config_callback=SavedConfig,
                save_config_kwargs={"overwrite": True},
                trainer_defaults={
                    "devices": 1,  # more than one needs a strategy: hardware/ddp.yaml
                    "default_root_dir": f"runs/{'+'.join(path.stem for path in configs) or 'unnamed'}",
                    "enable_model_summary": False,  # it counts adapters as backbone; the report says what is what
                },
                parser_kwargs={"prog": "koff", "exit_on_error": False},
            )
    except MisconfigurationException as error:  # options of the trainer that do not go together
        raise KoffError(" ".join(str(error).split())) from error


def resolved(words: list[str]) -> dict[str, Any]:
    """All options of a run, as `koff VERB ... --print_config` tells them.

    Args:
        words: The verb and its options.

    Raises:
        KoffError: Bad options.
    """
    text = StringIO()
    with redirect_stdout(text), suppress(SystemExit):  # it has printed what was asked for
        run([*words, "--print_config"])
    options = yaml.safe_load(text.getvalue())
    refuse_remote_code(options["model"]["trust_remote_code"], words)  # who asks may look at the model
    return options


def _with_text(argv: list[str]) -> list[str]:
    """The words after `koff baseline`, which reads all bundled text unless told what to read."""
    if any(word.startswith(("--config", "-c", "--data")) for word in argv):
        return argv
    return [*argv, "--data.domains", json.dumps({name: f"bundled:{name}" for name in bundled_domains()})]


def _names(domains: dict[str, object] | None) -> list[str]:
    if not domains:
        raise KoffError(NO_DOMAINS)
    return list(domains)


def _as_list(value: object) -> list[object]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _option_names(defaults: Namespace) -> set[str]:
    """Dotted option names of a parser as a user writes them."""
    return {name.replace(".init_args.", ".") for name in defaults.keys() if "__" not in name}  # noqa: SIM118


def _default_loggers(folder: Path) -> list[Logger]:
    """Both in a run's `version_N`, which is also where Lightning saves config.yaml and the checkpoints."""
    version = int(folder.name.removeprefix("version_"))
    return [kind(str(folder.parent), name="", version=version) for kind in (CSVLogger, TensorBoardLogger)]
