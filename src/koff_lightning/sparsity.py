"""How much is removed: exact accounting in parameters, the target over time, and hardening to a budget.

Sparsity is always removed parameters over a named denominator: Sheared-LLaMA counts the body, "model X minus 12 %" the
total; both and the share of prunable units are reported. Shapes: U units over all groups.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from koff_lightning.backbone import PrunableGroup
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.support.errors import KoffError
from koff_lightning.surgery import physical
from koff_lightning.tracking import EVERY

Phase = Literal["warmup", "ramp", "hold", "consolidate"]


class Budget:
    """Parameter accounting of one backbone's units: what each costs, and what a mask therefore removes."""

    def __init__(
        self,
        groups: list[PrunableGroup],
        counts: dict[str, int],
        spec: SparsitySpec,
        kv_groups: Sequence[int] | None = None,
    ) -> None:
        """Price every unit.

        Args:
            groups: From `prunable_groups` of the plain backbone.
            counts: From `parameter_counts` of it.
            spec: Options of the run.
            kv_groups: How many kv groups layout `uniform` may leave in every layer (`uniform_kv_groups`); None for any.

        Raises:
            KoffError: The target cannot be reached under the units that every layer keeps.
        """
        self.groups, self.spec, self._kv_groups = groups, spec, kv_groups
        self.costs = torch.cat([torch.full((g.size,), g.params_per_unit, dtype=torch.int64) for g in groups])  # [U]
        self.is_channel = torch.cat([torch.full((g.size,), g.kind == "channel") for g in groups])  # [U]
        self.in_ffn = torch.cat([torch.full((g.size,), g.in_ffn) for g in groups])  # [U]
        names = list(dict.fromkeys(group.kind for group in groups))
        kind = torch.cat([torch.full((g.size,), names.index(g.kind)) for g in groups])  # [U]
        self.kinds = {name: (kind == place).nonzero()[:, 0] for place, name in enumerate(names)}  # -> its units, long
        self.denominators = {**counts, "units": int(self.costs.sum())}
        self._shares: Tensor | None = None
        self._check_reach()

    def _check_reach(self) -> None:
        """Refuse a target that the units which every layer keeps put out of reach, and a layout that cannot say it."""
        spec = self.spec
        steps, costs, scores, _ = self._steps(self._protected(torch.zeros(len(self.costs))))
        removable = costs[scores < math.inf]
        most, share = int(removable.sum()) / self.denominators[spec.denominator], spec.denominator
        if spec.scope == "local":
            free = self._protected(torch.zeros(len(self.costs))) < math.inf  # bool [U]
            most, share = min((float(free[units].double().mean()), name) for name, units in self.kinds.items())
        if spec.target > most:
            raise KoffError(
                f"sparsity.target {spec.target} of {share} cannot be reached: with {spec.min_channels} "
                f"neurons and {spec.min_kv_groups} kv groups kept per layer, at most {most:.4f} can be removed"
            )
        self._check_uniform(steps, costs)

    def _check_uniform(self, steps: Tensor, costs: Tensor) -> None:
        """Refuse kv groups in a uniform layout of which not even one step fits the target: the user would wonder."""
        kv = steps[~self.is_channel].unique()
        if not self.spec.uniform or not self.spec.target or not len(kv):
            return
        share = int(costs[kv].min()) / self.denominators[self.spec.denominator]
        if share > self.spec.target:
            raise KoffError(
                f"sparsity.layout uniform: removing kv groups from every layer takes at least {share:.1%} of "
                f"{self.spec.denominator} in this model (a Llama config takes only head counts that divide the hidden "
                f"size), more than the target {self.spec.target:.1%}: set sparsity.units to [channel]"
            )

    def _minimum(self, group: PrunableGroup) -> int:
        return self.spec.min_channels if group.in_ffn else self.spec.min_kv_groups

    def expected(self, keep: Tensor) -> Tensor:
        """Differentiable sparsity in the chosen denominator for keep probabilities or gates [U]."""
        if self._shares is None or self._shares.device != keep.device:
            self._shares = (self.costs.double() / self.denominators[self.spec.denominator]).float().to(keep.device)
        return ((1 - keep) * self._shares).sum()

    def counts(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Sparsity by the soft count of keep probabilities [U], and by the hard one: gates mostly closed."""
        return self.expected(keep), self.expected((keep > 0.5).float())

    def scopes(self) -> list[tuple[Tensor | slice, Callable[[Tensor], tuple[Tensor, Tensor]]]]:
        """Units that have the target for themselves (indices), each with its soft and hard counts."""
        if self.spec.scope == "global":
            return [(EVERY, self.counts)]
        return [(units, _counts_of_kind) for units in self.kinds.values()]

    def measured(self, keep: Tensor) -> Tensor:
        """The sparsity that the penalty sees: scalar, or [S] of each kind with scope `local`.

        It is the mean of the soft and the hard count, with the gradient of the soft one: held to the soft one alone,
        the hard one lags by many points. The published penalties see the soft count alone.
        """
        both, seen = self.spec.penalty in ("lagrangian", "fixed"), []
        for units, counts in self.scopes():
            soft, hard = counts(keep[units])
            seen.append(soft + ((hard - soft) / 2).detach() if both else soft)
        return seen[0] if self.spec.scope == "global" else torch.stack(seen)

    def report(self, kept: Tensor) -> dict[str, float]:
        """Nominal counts of a mask (bool [U]): sparsity in all three denominators, and per type of unit.

        Nominal is what the closed gates are priced at, a channel at its row; `physical` is what an export removes.
        """
        gone, kept = self.costs.double() * ~kept.cpu(), kept.cpu()
        rates = {name: gone.sum().item() / size for name, size in self.denominators.items()}
        for name, chosen in (("ffn", self.in_ffn), ("attention", ~self.in_ffn)):
            rates[name] = gone[chosen].sum().item() / max(self.costs[chosen].sum().item(), 1)
        return rates

    def by_kind(self, kept: Tensor) -> dict[str, float]:
        """Nominal too: the share that a mask (bool [U]) removes of each kind of unit, the paper's local sparsity."""
        return {name: (~kept.cpu()[units]).double().mean().item() for name, units in self.kinds.items()}

    def physical(self, kept: Tensor) -> dict[str, float]:
        """What a cut export lacks under a mask (bool [U]): parameters, and their share of body and of total."""
        gone = physical(self.groups, kept.cpu())
        return {"parameters": gone} | {name: gone / self.denominators[name] for name in ("body", "total")}

    def kept_parameters(self, kept: Tensor) -> int:
        """Parameters of the cut backbone under a mask (bool [U]): a physical count."""
        return self.denominators["total"] - physical(self.groups, kept.cpu())

    def harden(self, scores: Tensor, target: float | None = None) -> Tensor:
        """Remove the lowest-scored units until no further one fits into the budget; bool [U], True = kept.

        Greedy with skip: a kv group that would overshoot is passed over and neurons fill the rest, so the result is
        below the target by less than the cheapest unit. Each layer keeps its minimum. With `multiple_of` or layout
        `uniform` units leave in steps of several at once (`_steps`), each scored by its mean, and the result is below
        the target by less than the cheapest step that is left.
        """
        scores = self._protected(scores.detach().float().cpu())
        target = self.spec.target if target is None else target
        if self.spec.scope == "global":
            return self._within(scores, target * self.denominators[self.spec.denominator])
        kept = torch.ones(len(scores), dtype=torch.bool)
        for units in self.kinds.values():
            own = torch.full_like(scores, math.inf).index_copy(0, units, scores[units])
            kept &= self._within(own, target * int(self.costs[units].sum()))
        return kept

    def threshold(self, keep: Tensor) -> Tensor:
        """Remove the units that are more often closed than open by their keep probabilities [U]; bool [U], True = kept.

        Each layer keeps its minimum; what is removed comes to whatever it comes to.
        """
        keep = keep.detach().float().cpu()
        return (keep > 0.5) | (self._protected(keep) == math.inf)

    def _within(self, scores: Tensor, size: float) -> Tensor:
        """The greedy choice of `harden` for scores [U], infinite for units that stay, and so many parameters."""
        steps, costs, scores, follows = self._steps(scores)
        left = math.floor(size + 1e-4)  # parameters; 0.3 * 10 is 3
        order, price, least = torch.argsort(scores, stable=True), costs.tolist(), int(costs.min())
        gone = [False] * len(price)
        for step in order[scores[order] < math.inf].tolist():
            if left < least:
                break
            if price[step] <= left and (not follows[step] or gone[step - 1]):
                gone[step] = True
                left -= price[step]
        return ~torch.tensor(gone)[steps]

    def _steps(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor, list[bool]]:
        """Which units leave together: the step of each unit, long [U]; cost and mean score of each step, [S].

        The list says of each step whether it can only be taken after the one before it.
        """
        if not self.spec.uniform and self.spec.multiple_of == 1:
            return torch.arange(len(scores)), self.costs, scores, [False] * len(scores)
        first: dict[tuple[object, ...], int] = {}  # of a layer (of all layers, if uniform) and a kind: its first step
        steps, follows = [], []
        for group, part in zip(self.groups, scores.split([g.size for g in self.groups]), strict=True):
            blocks = self._blocks(group)  # of the lowest score first
            name = (None if self.spec.uniform else group.layer, group.kind)
            if name not in first:
                first[name] = len(follows)
                follows += [place > 0 for place in range(int(blocks[-1]) + 1)]
            steps.append(first[name] + blocks[part.argsort(stable=True).argsort()])
        index, zeros = torch.cat(steps), torch.zeros(len(follows), dtype=torch.float64)
        counts = zeros.index_add(0, index, torch.ones(len(index), dtype=zeros.dtype))
        costs = zeros.long().index_add(0, index, self.costs)
        return index, costs, zeros.index_add(0, index, scores.double()) / counts, follows

    def _blocks(self, group: PrunableGroup) -> Tensor:
        """For the units of a group from the lowest score up: the number of the step in which each leaves, [size]."""
        ranks = torch.arange(group.size)
        if group.kind == "channel":  # the first step is smaller if the width is no multiple to begin with
            return (ranks + -group.size % self.spec.multiple_of) // self.spec.multiple_of
        allowed = range(group.size) if not self.spec.uniform or self._kv_groups is None else self._kv_groups
        stops = torch.tensor([group.size - n for n in allowed if n < group.size]).sort().values  # removed after a step
        return torch.searchsorted(stops, ranks, right=True)

    def _protected(self, scores: Tensor) -> Tensor:
        """Scores with the best `minimum` units of every group set to infinity, so that they are never removed.

        Of gate and up channels the same ones: a neuron is worth what its lesser half is, since it goes with that.
        """
        parts = scores.split([group.size for group in self.groups])
        places = [(group.layer, (group.whole or group).kind) for group in self.groups]
        worth: dict[tuple[int, str], Tensor] = {}
        for place, part in zip(places, parts, strict=True):
            worth[place] = torch.minimum(worth.get(place, part), part)
        least = [min(self._minimum(group), group.size) for group in self.groups]
        best = [worth[place].topk(number).indices for place, number in zip(places, least, strict=True)]
        return torch.cat([part.index_fill(0, stay, math.inf) for part, stay in zip(parts, best, strict=True)])


def _counts_of_kind(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Soft and hard sparsity of units of one price by their keep probabilities [U_k]."""
    return (1 - keep).mean(), (keep <= 0.5).float().mean()


@dataclass(frozen=True)
class SparsitySchedule:
    """Target and phase as pure functions of the optimizer step (method: warm-up, ramp, hold, harden, consolidate)."""

    target: float
    steps: int
    warmup: float = 0.05
    ramp: float = 0.15
    hold: float | None = 0.05  # None: to the end
    shape: Literal["linear", "cosine", "cubic"] = "linear"

    @property
    def ramp_step(self) -> int:
        """First step with gates in use."""
        return round(self.warmup * self.steps)

    @property
    def harden_step(self) -> int:
        """First step with the mask fixed."""
        if self.hold is None:
            return self.steps
        return round((self.warmup + self.ramp + self.hold) * self.steps)

    def phase(self, step: int) -> Phase:
        """Name of the phase that optimizer step `step` (from 0) belongs to."""
        if step < self.ramp_step:
            return "warmup"
        if step >= self.harden_step:
            return "consolidate"
        return "ramp" if step < self.ramp_step + self.ramp * self.steps else "hold"

    def target_at(self, step: int) -> float:
        """Sparsity that step `step` aims for, in the units of `target`."""
        x = min(max((step - self.ramp_step + 1) / max(self.ramp * self.steps, 1), 0.0), 1.0)
        shaped = {"linear": x, "cosine": (1 - math.cos(math.pi * x)) / 2, "cubic": 1 - (1 - x) ** 3}[self.shape]
        return self.target * shaped

    def progress(self, step: int) -> float:
        """Share of the mask phase (ramp and hold) that is over, in [0, 1]."""
        return min(max((step - self.ramp_step) / max(self.harden_step - self.ramp_step, 1), 0.0), 1.0)
