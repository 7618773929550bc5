"""RunReport: what a run leaves behind. Scores held-out text, prints a table, writes results.json and plots."""

import json
import os
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.model_helpers import is_overridden
from rich import get_console
from rich.console import Console

from koff_lightning.callbacks.anneal import AnnealSparsity
from koff_lightning.callbacks.checkpoints import save_the_end
from koff_lightning.callbacks.lm_eval import LMEval
from koff_lightning.callbacks.progress import LINE_SECONDS, predicted_tokens
from koff_lightning.data import DomainDataModule
from koff_lightning.reports import plots, results
from koff_lightning.specs.idle import idle_options
from koff_lightning.support import ranks
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import write_atomically
from koff_lightning.support.names import GENERAL
from koff_lightning.support.versions import versions
from koff_lightning.surgery import masks
from koff_lightning.training.ending import may_be_left
from koff_lightning.training.eval_mode import eval_mode
from koff_lightning.training.module import KOFFModule

SCORED = ("input_ids", "labels", "domains", "num_bytes")  # what scoring reads of a batch
MOST = 200  # points of the mask's history that are kept


class RunReport(Callback):
    """Report of `fit`: table on the terminal; `results.json`, `documents.json` and `plots/` in `default_root_dir`.

    Where there is general text, that too, and its `general_documents.json`.

    `test` prints the table; `predict` writes `predictions.jsonl`, a line for each row of text. With `fast_dev_run`
    nothing is written.
    """

    def __init__(self) -> None:
        self.has_begun = False  # to train
        self.history = MaskHistory()
        self.results: results.Figures = {}
        self.documents: results.Documents = {}
        self._tokens = torch.tensor(0)  # on this rank; stays on the device, since reading it would wait for the step
        self._seconds, self._since = 0.0, 0.0
        self._predictions: list[dict[str, Any]] = []

    # --------------------------------------------------------------------------------------------------- fit

    def on_fit_start(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Begin to count, where no run goes on; refuse now what would fail at the end, tell what does nothing."""
        if trainer.ckpt_path is None:  # another run with this callback, before
            self.history, self.results, self.documents = MaskHistory(), {}, {}
            self._tokens, self._seconds, self._since = torch.tensor(0), 0.0, 0.0
        refuse_unscored_data(trainer.datamodule)
        own = pl_module.sparsity if pl_module.mask_source is None else None  # else it may be another run's
        if idle := idle_options(own, pl_module.kv, pl_module.loss, pl_module.retention, pl_module.mask_is_fixed):
            _say(trainer, f"set, but without effect: model.{', model.'.join(idle)}")

    def on_train_start(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Start to measure time."""
        self.has_begun = True
        self._since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: KOFFModule, outputs: Any, batch: dict[str, Any], batch_idx: int
    ) -> None:
        """Count tokens, remember the mask."""
        self._tokens = predicted_tokens(batch) + self._tokens.to(batch["labels"].device)
        if pl_module.learns_mask and trainer.global_step:
            self.history.record(trainer.global_step, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Save, score and print. Every rank takes part: metrics and sharded weights need them all."""
        if trainer.fast_dev_run:  # two steps are worth no score
            return
        save_the_end(trainer)
        self._seconds, self._since = self._elapsed(), 0.0
        since = time.perf_counter()
        _say(trainer, f"scoring held-out text: {', '.join(pl_module.modes)}")
        with may_be_left(trainer):
            score(trainer, pl_module)
        tokens = trainer.strategy.reduce(self._tokens.to(pl_module.device), reduce_op="sum")
        self.documents = pl_module.documents.compute()
        self.results = _figures(trainer, pl_module, self.documents) | {
            "seed": int(seed) if (seed := os.environ.get("PL_GLOBAL_SEED")) else None,
            "steps": trainer.global_step,
            "tokens": int(tokens),
            "seconds": self._seconds,
            "seconds_scoring": time.perf_counter() - since,
            "config": resolved_config(trainer, pl_module),
            "versions": versions(),
        }
        print_figures(trainer, self.results)
        _log(trainer, self.results)

    def on_fit_end(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Write, after everything else is done and printed.

        Raises:
            KoffError: The disk did not take it.
        """
        scored = [callback for callback in trainer.callbacks if isinstance(callback, LMEval)]
        if not self.results and trainer.global_step:  # stopped between its last checkpoint and its report, and resumed
            for callback in (*scored, self):
                callback.on_train_end(trainer, pl_module)
        if not trainer.is_global_zero or trainer.fast_dev_run or not self.results:
            return
        for callback in scored:
            if callback.scores:
                self.results["lm_eval"] = callback.scores
        root = Path(trainer.default_root_dir)
        results.write_documents(root, self.documents, self.results)
        write_atomically(root / "results.json", results.as_json(self.results))
        for name, figure in self._figures(pl_module).items():
            plots.save(figure, root / "plots", name)
        _say(trainer, f"wrote {root / 'results.json'} and {root / 'plots'}")

    def _figures(self, module: KOFFModule) -> dict[str, plots.Figure | None]:
        general = self.results.get("general", {}).get("texts", {})
        texts = self.results["domains"] | {f"{GENERAL}{name}": row for name, row in general.items()}
        # Without a mask to learn there is nothing to draw, nor are an earlier run's pictures of one to stay.
        figures = {"bits_per_byte": plots.domain_bars(texts), "sparsity": None, "sparsity_by_layer": None}
        if points := self.history.points:
            groups = [(group.layer, group.kind) for group in module.model.gates.groups]
            figures["sparsity"] = plots.sparsity_over_training(points, module.sparsity.denominator)
            figures["sparsity_by_layer"] = plots.sparsity_by_layer(points, groups)
        return figures

    def _elapsed(self) -> float:
        """Seconds of training, earlier parts of a resumed run included."""
        return self._seconds + (time.perf_counter() - self._since if self._since else 0.0)

    def on_exception(self, trainer: Trainer, pl_module: KOFFModule, exception: BaseException) -> None:
        """Say what is left of a run that was cut short."""
        said = "No checkpoint had been saved" in str(exception) or "--ckpt_path" in str(exception)
        if has_trained(trainer) and not (said or isinstance(exception, SystemExit)):
            _say(trainer, what_was_saved(trainer))

    # ---------------------------------------------------------------------------------------- test, predict

    def on_test_start(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Keep Lightning's list of the same figures off the terminal."""
        trainer.test_loop.verbose = False

    def on_test_epoch_end(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """The same table, of the checkpoint under test."""
        self.documents = pl_module.documents.compute()
        self.results = _figures(trainer, pl_module, self.documents)
        print_figures(trainer, self.results)

    def on_predict_start(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Start with no rows."""
        self._predictions = []

    def on_predict_batch_end(self, trainer: Trainer, pl_module: KOFFModule, outputs: Any, *_: Any) -> None:
        """Collect the rows of a batch."""
        self._predictions += outputs

    def on_predict_end(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Gather the ranks' predictions and write them."""
        parts = ranks.gather(self._predictions)
        if trainer.is_global_zero:
            path = Path(trainer.default_root_dir) / "predictions.jsonl"
            rows = [row for part in parts for row in part]
            write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            _say(trainer, f"wrote {path}: {len(rows)} rows")

    # ----------------------------------------------------------------------------------------- checkpoints

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on counting from, with the tokens of all ranks. A collective call."""
        tokens = sum(ranks.gather(int(self._tokens)))
        return {"history": self.history.state_dict(), "tokens": tokens, "seconds": self._elapsed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what a checkpoint holds."""
        self.history.load_state_dict(state["history"])
        self._tokens, self._seconds = torch.tensor(0 if rank_zero_only.rank else state["tokens"]), state["seconds"]


def score(trainer: Trainer, module: KOFFModule) -> None:
    """Fill the module's metrics in all modes with held-out text; modes and random state are as before afterwards."""
    loader = trainer.datamodule.test_dataloader()
    limit = trainer.limit_test_batches
    batches = min(limit, len(loader)) if isinstance(limit, int) else int(limit * len(loader))
    said = time.perf_counter()
    with eval_mode(module), trainer.precision_plugin.forward_context():
        module.on_test_epoch_start()
        for index, batch in enumerate(islice(loader, batches)):
            module.test_step(trainer.strategy.batch_to_device(batch), index)
            if time.perf_counter() - said > LINE_SECONDS:
                said = time.perf_counter()
                _say(trainer, f"scored {index + 1} of {batches} batches")


def refuse_unscored_data(data: LightningDataModule | None) -> None:
    """Refuse data whose held-out text could not be scored once a run is over.

    Raises:
        KoffError: There are no test batches, nobody knows how many, or the first lacks what is scored.
    """
    if data is None:
        raise KoffError("the report scores held-out text at the end: give trainer.fit a datamodule with test batches")
    if isinstance(data, DomainDataModule):
        return
    name = f"{type(data).__name__}.test_dataloader"
    if not is_overridden("test_dataloader", data, LightningDataModule):
        raise KoffError(f"the report scores held-out text at the end, and there is no {name}: write one")
    loader = data.test_dataloader()
    batch = next(iter(loader), None) if hasattr(loader, "__iter__") and hasattr(loader, "__len__") else None
    if lacks := [key for key in SCORED if not isinstance(batch, Mapping) or key not in batch]:
        raise KoffError(
            f"the report scores held-out text at the end: {name} must give a loader of known length, each batch a "
            f"dictionary with {', '.join(SCORED)}; the first batch has no {lacks[0]}"
        )


def _log(trainer: Trainer, figures: results.Figures) -> None:
    """Held-out scores to all loggers, by the names that `koff test` gives them; general text as of `general/NAME`."""
    rows = {"": figures["mean"]} | {f"/{domain}": row for domain, row in figures["domains"].items()}
    rows |= {f"/{GENERAL}{name}": row for name, row in figures.get("general", {}).get("texts", {}).items()}
    scores = {
        f"test/{name}{domain}": value
        for domain, row in rows.items()
        for name, value in row.items()
        if value is not None
    }
    for logger in trainer.loggers:
        logger.log_metrics(scores, trainer.global_step - 1)  # counts from 0
        logger.save()


def _figures(trainer: Trainer, module: KOFFModule, documents: results.Documents) -> results.Figures:
    """Figures of the evaluation that just ran, from all ranks."""
    held_out = module.held_out(module.modes)
    num_bytes, num_tokens = (_all_of(trainer, module, name) for name in ("num_bytes", "num_tokens"))
    memories = len(set(module.model.memories.names.values())) if module.lora or module.kv else 0
    figures = results.held_out_figures(held_out, num_bytes, num_tokens, memories)
    figures |= results.mask_and_size(module.model, module.extends) | results.by_context(documents)
    return figures | results.general_figures(documents, memories)


def _all_of(trainer: Trainer, module: KOFFModule, name: str) -> dict[str, int]:
    """A count of the held-out text by domain, over all ranks."""
    counts = torch.stack([getattr(module.bpb[f"koff/{domain}"], name) for domain in module.domains])
    counts = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
    return dict(zip(module.domains, map(round, counts), strict=True))


def resolved_config(trainer: Trainer, module: KOFFModule) -> dict[str, Any]:
    """The resolved options of the command line; without one those of the module."""
    for callback in trainer.callbacks:
        if isinstance(callback, SaveConfigCallback):
            return yaml.safe_load(callback.parser.dump(callback.config, skip_none=False))
    return {"model": dict(module.hparams)}


def has_trained(trainer: Trainer) -> bool:
    """Whether there are steps of a run to lose, so that its report says what is left when it is cut short."""
    return trainer.state.fn == "fit" and trainer.global_step > 0


def what_was_saved(trainer: Trainer) -> str:
    """The newest checkpoint, as the option that resumes from it; times of files would not tell, clocks go back.

    It is what this run has saved last, or else what it went on from: `best_model_path` may be older, also than that.
    """
    paths = [*(callback._last_checkpoint_saved for callback in trainer.checkpoint_callbacks), trainer.ckpt_path]
    saved = [path for path in paths if path and Path(path).exists()]
    return (
        f"go on from the last checkpoint with --ckpt_path {saved[0]}" if saved else "no checkpoint had been saved yet"
    )


def print_figures(trainer: Trainer, figures: results.Figures) -> None:
    """The table and what stands below it, on rank 0."""
    if trainer.is_global_zero:
        console = get_console() if get_console().is_terminal else Console(width=100, force_jupyter=False)
        console.print(results.table(figures))
        for line in results.sentences(figures):
            console.print(line, highlight=False, soft_wrap=True)


def _say(trainer: Trainer, line: str) -> None:
    if trainer.is_global_zero:
        print(line, flush=True)


class MaskHistory:
    """Sparsity of the whole and of each group of units, at up to 200 evenly spaced steps.

    A point is a plain dict: `step`; `target`, `expected` and `realised` sparsity in the target's denominator;
    `removed`, the share of each group's units that a mask taken now would remove, in the order of `gates.groups`.
    """

    def __init__(self) -> None:
        self.points: list[dict[str, Any]] = []
        self.every = 1

    def record(self, step: int, module: KOFFModule) -> None:
        """Add a point after optimizer step number `step` (from 1), if it is due."""
        if step % self.every or (self.points and self.points[-1]["step"] == step):
            return
        state = AnnealSparsity.state_of_mask(module)
        parts = masks(module.model.gates.groups, module.model.hard_mask())
        shares = [1 - part.float().mean().item() for _, part in parts]
        course = {name: float(state[f"sparsity/{name}"]) for name in ("target", "expected", "realised")}
        self.points.append({"step": step, "removed": shares} | course)
        if len(self.points) > MOST:  # the length of the run need not be known: halve the points, double the spacing
            self.every *= 2
            self.points = [point for point in self.points if point["step"] % self.every == 0]

    def state_dict(self) -> dict[str, Any]:
        """The points and their spacing in steps, as plain values for a checkpoint."""
        return {"points": self.points, "every": self.every}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what a checkpoint holds."""
        self.points, self.every = list(state["points"]), state["every"]
