"""AnnealSparsity: decides WHEN. It sets the target at every step, keeps the mask on the ramp, hardens once."""

from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from koff_lightning.sparsity import SparsitySchedule
from koff_lightning.specs.timing import check_anneal
from koff_lightning.support.errors import KoffError
from koff_lightning.support.wording import difference
from koff_lightning.training.module import KOFFModule
from koff_lightning.training.optim import total_steps


class AnnealSparsity(Callback):
    """Memory warm-up, ramp of the target, hold, hardening, consolidation: a pure function of the optimizer step.

    Args:
        warmup: Share of all steps before the ramp, in which memories train on the dense model.
        ramp: Share in which the target rises from 0.
        hold: Share at the full target before the mask is fixed; in the remaining steps memories train under the fixed
            mask. None holds the target to the end: the mask is fixed after the last step.
        shape: How the target rises during the ramp.
    """

    def __init__(
        self,
        warmup: float = 0.05,
        ramp: float = 0.15,
        hold: float | None = 0.05,
        shape: Literal["linear", "cosine", "cubic"] = "linear",
    ) -> None:
        check_anneal(warmup, ramp, hold, shape)
        self.fractions = {"warmup": warmup, "ramp": ramp, "hold": hold}
        self.shape = shape
        self._steps: int | None = None  # steps of the schedule; of a resumed run, from its checkpoint
        self._begun: dict[str, Any] | None = None  # options with which a resumed run began, from its checkpoint
        self._used: dict[str, float] = {}  # state of the mask in the present step, for the log

    def on_fit_start(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Lay out the schedule over the run's steps; a resumed run keeps the steps of its checkpoint."""
        asked = total_steps(trainer)
        if trainer.ckpt_path is None:  # forget an earlier run with this callback
            self._steps = self._begun = None
        self._steps = self._steps or asked
        shares = self.fractions
        if trainer.fast_dev_run and trainer.ckpt_path is None and shares["hold"] is not None:
            shares = {"warmup": 0.0, "ramp": 1 / asked, "hold": 0.0}  # one step with the mask, then fixed
        schedule = SparsitySchedule(pl_module.sparsity.target, self._steps, **shares, shape=self.shape)
        if not pl_module.mask_is_fixed:
            self._refuse_other_course(schedule, asked, bool(trainer.fast_dev_run))
            waits = (pl_module.lora or pl_module.kv) and not pl_module.joint
            if waits and schedule.harden_step >= self._steps:
                raise KoffError(
                    "model.joint false trains the memories once the mask is fixed, and anneal fixes it after the last "
                    f"step ({self._steps}): give a hold that ends before, as paper/rows/prune_recover.yaml does"
                )
        pl_module.schedule = schedule
        self._hold_back_stops(trainer, pl_module)

    @staticmethod
    def _hold_back_stops(trainer: Trainer, module: KOFFModule) -> None:
        """Let EarlyStopping look once the mask is fixed: pruning makes figures worse, and a run stopped then has none.

        Its own test of when not to look is asked too. A callback that was held back in another run is so anew.
        """
        for callback in trainer.callbacks:
            if isinstance(callback, EarlyStopping):
                own = partial(type(callback)._should_skip_check, callback)
                callback._should_skip_check = lambda t, own=own: own(t) or not module.mask_is_fixed
                if not module.mask_is_fixed:
                    after = f"once the mask is fixed, after step {module.schedule.harden_step}"
                    rank_zero_info(f"{type(callback).__name__} looks at {callback.monitor} {after}")

    def _refuse_other_course(self, schedule: SparsitySchedule, asked: int, cut_short: bool) -> None:
        if self._begun and (differences := difference(self._begun, self._course(), "anneal")):
            raise KoffError(
                f"a mask that is not fixed yet keeps its course, but {differences}: use the anneal options of the run "
                "that goes on, or start a new one"
            )
        if schedule.harden_step > asked and not cut_short:
            raise KoffError(
                f"the run that goes on was laid out over {schedule.steps} steps and fixes its mask after step "
                f"{schedule.harden_step}, but is now to end after {asked}: its mask would never be fixed. Give "
                f"--trainer.max_steps {schedule.steps}"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: KOFFModule, batch: object, batch_idx: int) -> None:
        """Prepare step `trainer.global_step`."""
        step, schedule, model = trainer.global_step, pl_module.schedule, pl_module.model
        model.target = schedule.target_at(step)
        model.gates.gate.anneal(schedule.progress(step))
        if not pl_module.learns_mask:
            return
        if pl_module.learns_now:
            if step == schedule.ramp_step:
                model.gates.order_by_prior(model.budget.costs, pl_module.sparsity.spread)
            if pl_module.sparsity.penalty == "lagrangian":
                model.shift_to_target(model.target, pl_module.sparsity.band)
        self._used = self.state_of_mask(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: KOFFModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Harden after the last step of the mask, so that a checkpoint of this step holds the final mask; then log."""
        if not pl_module.learns_mask:
            return
        schedule = pl_module.schedule
        if trainer.global_step >= schedule.harden_step and not pl_module.mask_is_fixed:
            if schedule.harden_step <= schedule.ramp_step:
                self._order_unlearned(pl_module)
            pl_module.model.harden()
            self._used = self.state_of_mask(pl_module)
        pl_module.log_dict(self._used, batch_size=1)

    def _order_unlearned(self, module: KOFFModule) -> None:
        """Order the logits of a mask that no step learns: by the Fisher scores of the warm-up, else at random."""
        gates = module.model.gates
        if gates.order is None and gates.importance.sum() == 0:
            rank_zero_warn(
                f"of {self._steps} steps none learns the mask, by the shares of anneal, and none has observed what "
                "units are worth: those that go are drawn by chance. Give more steps, or larger shares"
            )
            chance = torch.Generator().manual_seed(int(gates.seed))
            gates.order = torch.rand(len(gates.logits), generator=chance).to(gates.logits.device)
        gates.order_by_prior(module.model.budget.costs, module.sparsity.spread)

    @staticmethod
    @torch.no_grad()
    def state_of_mask(module: KOFFModule) -> dict[str, float]:
        """For the log: target, soft and hard sparsity, temperature of the gates, multipliers of the penalty."""
        model = module.model
        expected, realised = float(model.expected_sparsity()), model.realised_sparsity()
        if module.phase == "warmup":  # all gates stand at one, whatever their logits
            expected = realised = 0.0
        return {
            "sparsity/target": model.target,
            "sparsity/expected": expected,
            "sparsity/realised": realised,
            "sparsity/temperature": model.gates.gate.temperature,
            **{f"penalty/{name}": float(p.mean()) for name, p in module.penalty.named_parameters()},
        }

    def state_dict(self) -> dict[str, Any]:
        """Steps and options of the schedule: a resumed run keeps them, even if it is asked for more steps."""
        return {"steps": self._steps, "course": self._course()}

    def _course(self) -> dict[str, Any]:
        return self.fractions | {"shape": self.shape}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore steps and options; `on_fit_start` makes the schedule."""
        self._steps = state["steps"]
        self._begun = state.get("course")  # older checkpoints do not say
