"""PlaceMemories: lets a run decide in which layers its memories sit, under a budget of their parameters."""

from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info

from koff_lightning.decomposition import Batch
from koff_lightning.memory import Part
from koff_lightning.placement import shown
from koff_lightning.specs.timing import check_placement
from koff_lightning.support import ranks
from koff_lightning.support.errors import KoffError
from koff_lightning.training.ending import in_mid_step
from koff_lightning.training.module import KOFFModule

Place = tuple[Part, int]  # a part of the memories in one layer


class PlaceMemories(Callback):
    """Drops the layers whose LoRA or KV is worth least for its parameters, in rounds, until the budget is met.

    Each layer has a gate for its LoRA and one for its KV, of all domains alike. A round closes every gate in turn, by
    itself, and measures by how many nats training text then costs more: what removing it costs, not an estimate. The
    cheapest per parameter go, and between the rounds the rest learn to do without them. What is dropped is gone from
    model, optimizer and checkpoint, as if `lora.layers` and `kv.layers` had named the rest.

    Args:
        keep: Share of the memories' parameters that stays; null to leave memories where they are.
        first: Share of the run before the first round.
        last: Share of the run before the last round.
        rounds: Rounds in all; each leaves the same share of what the one before left.
        window: Steps that a round measures in, the one before it the last; of each the last micro-batch per device.
    """

    def __init__(
        self, keep: float | None = None, first: float = 0.3, last: float = 0.6, rounds: int = 4, window: int = 4
    ) -> None:
        check_placement(keep, first, last, rounds, window)
        self.keep, self.first, self.last, self.rounds, self.window = keep, first, last, rounds, window
        self._worth: dict[str, float] = {}  # part.layer -> nats, summed up for the next round
        self._whole: int | None = None  # parameters of a memory when the run began

    def on_fit_start(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Refuse a budget where there is nothing to place; note what a memory has."""
        if self.keep is None:
            return
        if trainer.ckpt_path is None:  # another run with this callback, before
            self._worth, self._whole = {}, None
        if pl_module.lora is None and pl_module.kv is None:
            raise KoffError("placement.keep is set, but model.lora and model.kv are null: there is nothing to place")
        self._whole = self._whole or sum(_sizes(pl_module).values())

    def on_train_start(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Refuse rounds that would measure memories before they have learned anything."""
        if self.keep is None:
            return
        if (schedule := pl_module.schedule) is None:
            raise KoffError("placement counts steps by the schedule: give the trainer AnnealSparsity() as a callback")
        begins = next(step for step in range(schedule.steps + 1) if self.round_at(step, schedule.steps))
        if not pl_module.joint and not pl_module.mask_is_fixed and begins <= schedule.harden_step:
            raise KoffError(
                f"placement.first {self.first} holds the first round after step {begins}, but with model.joint false "
                f"memories learn only from step {schedule.harden_step} on: set placement.first and last higher"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: KOFFModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        """Hold a round when one is due, before a checkpoint of this step is saved."""
        if self.keep is None or in_mid_step(trainer):
            return
        step, steps = trainer.global_step, pl_module.schedule.steps
        if not any(self.round_at(step + ahead, steps) for ahead in range(self.window)):
            return
        for (part, layer), nats in self.worth(pl_module, batch).items():
            self._worth[f"{part}.{layer}"] = self._worth.get(f"{part}.{layer}", 0.0) + nats
        if number := self.round_at(step, steps):
            sizes = _sizes(pl_module)
            worth = {(part, layer): self._worth.get(f"{part}.{layer}", 0.0) for part, layer in sizes}
            kept, self._worth = self.chosen(sizes, worth, self.keep ** (number / self.rounds)), {}
            pl_module.model.place(kept)
            _forget(pl_module, trainer)
            said = ", ".join(f"{part} in layers {shown(layers)}" for part, layers in kept.items())
            rank_zero_info(f"memories after step {trainer.global_step}: {said}")

    def round_at(self, step: int, steps: int) -> int:
        """Number, from 1, of the round after step `step` of so many; 0 for none, the last where several fall on it."""
        span = (self.last - self.first) / max(self.rounds - 1, 1)
        due = [max(1, round((self.first + span * number) * steps)) for number in range(self.rounds)]
        return max((number for number, at in enumerate(due, 1) if at == step), default=0)

    def chosen(self, sizes: dict[Place, int], worth: dict[Place, float], share: float) -> dict[Part, list[int]]:
        """Layers of each part that are left where the least worth per parameter go; a part keeps one layer."""
        left = dict(sizes)
        for place in sorted(sizes, key=lambda place: worth[place] / sizes[place]):
            if sum(left.values()) <= share * self._whole:
                break
            if sum(part == place[0] for part, _ in left) > 1:
                del left[place]
        return {part: sorted(layer for own, layer in left if own == part) for part, _ in left}

    @torch.no_grad()
    def worth(self, module: KOFFModule, batch: Batch) -> dict[Place, float]:
        """By how many nats the batches of all ranks cost more, under the mask, without each part in each layer."""
        model, places = module.model, list(_sizes(module))
        nats = [model.token_nats(batch, "koff").sum()]
        for part, layer in places:
            with model.memories.closed(part, layer):
                nats.append(model.token_nats(batch, "koff").sum())
        total = ranks.total(torch.stack(nats))
        return dict(zip(places, (total[1:] - total[0]).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """What the budget is a share of, and what the next round has measured so far; the model says what is left."""
        return {"whole": self._whole, "worth": self._worth}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the placement that a checkpoint holds."""
        self._whole, self._worth = state["whole"], dict(state["worth"])


def _sizes(module: KOFFModule) -> dict[Place, int]:
    """Parameters of a memory by part and layer; those of all domains are alike."""
    return module.model.memories.sizes(module.domains[0])


def _forget(module: KOFFModule, trainer: Trainer) -> None:
    """Take what is gone out of the optimizer, whose state is then that of a run that never had it."""
    alive = set(module.parameters())
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter in alive]
        for gone in [parameter for parameter in optimizer.state if parameter not in alive]:
            del optimizer.state[gone]
