"""How much is removed: exact accounting in parameters, the target over time, and hardening to a budget.

Sparsity is always the removed parameters divided by one of three denominators: `body` (all linears of the layers, as in
Sheared-LLaMA), `total` (the whole model, as in "model X minus 12 %") or `units` (all prunable units). All three are
reported; `sparsity.denominator` chooses the one that the target is in. Shapes: U units over all groups.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from koff_lightning.backbone import PrunableGroup
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.support.errors import KoffError
from koff_lightning.surgery import physical
from koff_lightning.tracking import EVERY

Phase = Literal["warmup", "ramp", "hold", "consolidate"]


class Steps(NamedTuple):
    """Sets of units that are removed together, S in number; in most runs each unit is a step of its own.

    Attributes:
        of_unit: The step of each unit, long [U].
        costs: Parameters of each step, long [S].
        scores: Mean score of its units, [S].
        follows: Whether it can only be taken after the step before it, S entries.
    """

    of_unit: Tensor
    costs: Tensor
    scores: Tensor
    follows: list[bool]


class Budget:
    """Parameter accounting of one backbone's units: what each costs, and what a mask therefore removes."""

    def __init__(
        self,
        groups: list[PrunableGroup],
        counts: dict[str, int],
        spec: SparsitySpec,
        kv_groups: Sequence[int] | None = None,
    ) -> None:
        """Count the parameters of every unit.

        Args:
            groups: From `prunable_groups` of the plain backbone.
            counts: From `parameter_counts` of the same.
            spec: Options of the run.
            kv_groups: Numbers of kv groups that layout `uniform` may leave in all layers (`uniform_kv_groups`); None
                for any.

        Raises:
            KoffError: The target cannot be reached while every layer keeps its minimum of units.
        """
        self.groups, self.spec, self._kv_groups = groups, spec, kv_groups
        self.costs = torch.cat([torch.full((g.size,), g.params_per_unit, dtype=torch.int64) for g in groups])  # [U]
        self.is_channel = torch.cat([torch.full((g.size,), g.kind == "channel") for g in groups])  # [U]
        self.in_ffn = torch.cat([torch.full((g.size,), g.in_ffn) for g in groups])  # [U]
        names = list(dict.fromkeys(group.kind for group in groups))
        kind = torch.cat([torch.full((g.size,), names.index(g.kind)) for g in groups])  # [U]
        self.kinds = {name: (kind == place).nonzero()[:, 0] for place, name in enumerate(names)}  # indices, long
        self.denominators = {**counts, "units": int(self.costs.sum())}
        self._shares: Tensor | None = None
        self._check_reach()

    def _check_reach(self) -> None:
        """Refuse a target that cannot be reached while every layer keeps its minimum, or not in layout `uniform`."""
        spec, unscored = self.spec, self._protected(torch.zeros(len(self.costs)))
        steps = self._steps(unscored)
        removable = steps.costs[steps.scores < math.inf]
        most, share = int(removable.sum()) / self.denominators[spec.denominator], spec.denominator
        if spec.scope == "local":
            free = unscored < math.inf  # bool [U]
            most, share = min((float(free[units].double().mean()), name) for name, units in self.kinds.items())
        if spec.target > most:
            raise KoffError(
                f"sparsity.target {spec.target} of {share} cannot be reached: with {spec.min_channels} "
                f"neurons and {spec.min_kv_groups} kv groups kept per layer, at most {most:.4f} can be removed"
            )
        self._check_uniform(steps)

    def _check_uniform(self, steps: Steps) -> None:
        """Refuse layout `uniform` with kv groups if removing the fewest that it allows already exceeds the target."""
        kv = steps.of_unit[~self.is_channel].unique()
        if not self.spec.uniform or not self.spec.target or not len(kv):
            return
        share = int(steps.costs[kv].min()) / self.denominators[self.spec.denominator]
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
        """Sparsity for keep probabilities [U], by the soft count and by the hard one (gates more often closed)."""
        return self.expected(keep), self.expected((keep > 0.5).float())

    def scopes(self) -> list[tuple[Tensor | slice, Callable[[Tensor], tuple[Tensor, Tensor]]]]:
        """Sets of units that each have to meet the target (all, or kind by kind): indices, and how to count them."""
        if self.spec.scope == "global":
            return [(EVERY, self.counts)]
        return [(units, _counts_of_kind) for units in self.kinds.values()]

    def measured(self, keep: Tensor) -> Tensor:
        """The sparsity that the penalty is given: a scalar, or [S] (one for each kind of unit) with scope `local`.

        Its value is the mean of the soft and the hard count, its gradient that of the soft one: with the soft count
        alone on target, the hard count lags by many points. The published penalties take the soft count alone.
        """
        both, found = self.spec.penalty in ("lagrangian", "fixed"), []
        for units, counts in self.scopes():
            soft, hard = counts(keep[units])
            found.append(soft + ((hard - soft) / 2).detach() if both else soft)
        return found[0] if self.spec.scope == "global" else torch.stack(found)

    def report(self, kept: Tensor) -> dict[str, float]:
        """Nominal sparsity of a mask (bool [U]) in all three denominators, and of FFN and attention units.

        Nominal: each closed gate counts with its own parameters, a channel with its row. What an export really removes
        is `physical`.
        """
        gone, kept = self.costs.double() * ~kept.cpu(), kept.cpu()
        rates = {name: gone.sum().item() / size for name, size in self.denominators.items()}
        for name, chosen in (("ffn", self.in_ffn), ("attention", ~self.in_ffn)):
            rates[name] = gone[chosen].sum().item() / max(self.costs[chosen].sum().item(), 1)
        return rates

    def by_kind(self, kept: Tensor) -> dict[str, float]:
        """Share of the units of each kind that a mask (bool [U]) removes: the paper's local sparsity; nominal too."""
        return {name: (~kept.cpu()[units]).double().mean().item() for name, units in self.kinds.items()}

    def physical(self, kept: Tensor) -> dict[str, float]:
        """Parameters that an export under a mask (bool [U]) is smaller by, and their share of `body` and of `total`."""
        gone = physical(self.groups, kept.cpu())
        return {"parameters": gone} | {name: gone / self.denominators[name] for name in ("body", "total")}

    def kept_parameters(self, kept: Tensor) -> int:
        """Parameters of the exported backbone under a mask (bool [U])."""
        return self.denominators["total"] - physical(self.groups, kept.cpu())

    def harden(self, scores: Tensor, target: float | None = None) -> Tensor:
        """Remove the lowest-scored units until no further one fits into the budget; bool [U], True = kept.

        Greedy with skipping: a kv group that would overshoot the target is skipped and neurons fill the rest, so the
        sparsity ends below the target by less than the cheapest unit. Each layer keeps its minimum. With `multiple_of`
        or layout `uniform` several units leave together in a step (`_steps`), ranked by their mean score, and the
        sparsity ends below the target by less than the cheapest step that is left.
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
        """Remove the units whose gate is more often closed than open, by keep probabilities [U]; bool [U], True = kept.

        Each layer keeps its minimum. Nothing holds the result to the target.
        """
        keep = keep.detach().float().cpu()
        return (keep > 0.5) | (self._protected(keep) == math.inf)

    def _within(self, scores: Tensor, size: float) -> Tensor:
        """The greedy choice of `harden`, for scores [U] (infinite for units that stay) and a budget of parameters."""
        of_unit, costs, scores, follows = self._steps(scores)
        left = math.floor(size * (1 + 1e-12))  # parameters; target * size may be rounded to just below a whole number
        order, price, least = torch.argsort(scores, stable=True), costs.tolist(), int(costs.min())
        gone = [False] * len(price)
        for step in order[scores[order] < math.inf].tolist():
            if left < least:
                break
            if price[step] <= left and (not follows[step] or gone[step - 1]):
                gone[step] = True
                left -= price[step]
        return ~torch.tensor(gone)[of_unit]

    def _steps(self, scores: Tensor) -> Steps:
        """Which units are removed together, by scores [U]."""
        if not self.spec.uniform and self.spec.multiple_of == 1:
            return Steps(torch.arange(len(scores)), self.costs, scores, [False] * len(scores))
        first: dict[tuple[object, ...], int] = {}  # (layer, or None for all if uniform; kind) -> its first step
        steps, follows = [], []
        for group, part in zip(self.groups, scores.split([g.size for g in self.groups]), strict=True):
            blocks = self._blocks(group)
            name = (None if self.spec.uniform else group.layer, group.kind)
            if name not in first:
                first[name] = len(follows)
                follows += [place > 0 for place in range(int(blocks[-1]) + 1)]
            steps.append(first[name] + blocks[part.argsort(stable=True).argsort()])
        index, zeros = torch.cat(steps), torch.zeros(len(follows), dtype=torch.float64)
        counts = zeros.index_add(0, index, torch.ones(len(index), dtype=zeros.dtype))
        costs = zeros.long().index_add(0, index, self.costs)
        return Steps(index, costs, zeros.index_add(0, index, scores.double()) / counts, follows)

    def _blocks(self, group: PrunableGroup) -> Tensor:
        """For the units of a group, from the lowest score up, the number of the step in which each leaves, [size]."""
        ranks = torch.arange(group.size)
        if group.kind == "channel":  # the first step is smaller if the dense width is no multiple
            return (ranks + -group.size % self.spec.multiple_of) // self.spec.multiple_of
        allowed = range(group.size) if not self.spec.uniform or self._kv_groups is None else self._kv_groups
        gone = [group.size - n for n in allowed if n < group.size]  # units, after each step
        stops = torch.tensor(gone).sort().values
        return torch.searchsorted(stops, ranks, right=True)

    def _protected(self, scores: Tensor) -> Tensor:
        """Scores in which the best units of every group, its minimum, are infinite and so never removed.

        Gate and up channels of a layer protect the same neurons. A neuron goes as soon as either of its channels does,
        so its score is the lower of the two.
        """
        parts = scores.split([group.size for group in self.groups])
        places = [(group.layer, (group.whole or group).kind) for group in self.groups]
        lowest: dict[tuple[int, str], Tensor] = {}
        for place, part in zip(places, parts, strict=True):
            lowest[place] = torch.minimum(lowest.get(place, part), part)
        least = [min(self._minimum(group), group.size) for group in self.groups]
        best = [lowest[place].topk(number).indices for place, number in zip(places, least, strict=True)]
        return torch.cat([part.index_fill(0, stay, math.inf) for part, stay in zip(parts, best, strict=True)])


def _counts_of_kind(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Soft and hard sparsity of the units of one kind, which all cost the same, for keep probabilities [U_k]."""
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
