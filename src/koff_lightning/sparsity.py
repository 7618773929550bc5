"""How much is removed: exact accounting in parameters, the target over time, the penalty, and hardening to a budget.

Sparsity is always removed parameters over a named denominator: Sheared-LLaMA counts the body, "model X minus 12 %" the
total; both and the share of prunable units are reported. Shapes: U units over all groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from koff_lightning.backbone import PrunableGroup
from koff_lightning.support.errors import KoffError

Phase = Literal["warmup", "ramp", "hold", "consolidate"]


@dataclass
class SparsitySpec:
    """What to remove and how the mask is learned.

    Args:
        target: Share of the denominator's parameters to remove; 0 learns no mask.
        denominator: What the target is a share of: `body` (linears of all layers), `total` (all parameters) or `units`
            (parameters of the prunable units).
        units: Kinds of prunable units: FFN neurons (`channel`) and kv heads with their queries (`kv_group`).
        gate: `hc` (hard concrete) or `ddp` (deterministic shrinking ReLU).
        penalty: `lagrangian` tracks the target with learned multipliers; `fixed` adds weight * expected sparsity.
        weight: Penalty weight for `fixed`, in nats per unit of sparsity.
        band: Widest gap allowed between tracked sparsity and the ramp (`lagrangian` only), in absolute sparsity.
        prior: Order the logits after warm-up by each gate's squared gradient (`fisher`), or start them equal (`none`).
        spread: Standard deviation of the logits that the prior sets.
        min_channels: FFN neurons that every layer keeps.
        min_kv_groups: kv groups that every layer keeps.
        layout: At hardening each layer gets its own widths (`ragged`), or all get the same (`uniform`: a plain Llama or
            Qwen config then describes the cut model).
        multiple_of: FFN neurons of a layer are removed so that a multiple of this many stays. With 8 the smaller
            matrix products run as fast per neuron as the dense ones (docs/results/serving.md); 1 is finest.
    """

    target: float = 0.12
    denominator: Literal["body", "total", "units"] = "body"
    units: list[str] = field(default_factory=lambda: ["channel", "kv_group"])
    gate: Literal["hc", "ddp"] = "hc"
    penalty: Literal["lagrangian", "fixed"] = "lagrangian"
    weight: float = 1.0
    band: float = 0.004
    prior: Literal["fisher", "none"] = "fisher"
    spread: float = 4.0
    min_channels: int = 64
    min_kv_groups: int = 1
    layout: Literal["ragged", "uniform"] = "ragged"
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.target < 1:
            raise KoffError(
                f"sparsity.target must lie in [0, 1): the share to remove, 0.12 for 12 %; got {self.target}"
            )
        if self.min_channels < 1 or self.min_kv_groups < 1:
            raise KoffError(
                "sparsity.min_channels and sparsity.min_kv_groups must be at least 1: no layer may lose all its units"
            )
        if self.multiple_of < 1:
            raise KoffError(f"sparsity.multiple_of must be at least 1; got {self.multiple_of}")
        if not 0 < self.band <= 0.5:
            raise KoffError(f"sparsity.band must lie in (0, 0.5]; got {self.band}")
        for name, value in {"spread": self.spread, "weight": self.weight}.items():
            if not 0 <= value < math.inf:
                raise KoffError(f"sparsity.{name} must be >= 0 and finite; got {value}")
        for name, kinds in get_type_hints(SparsitySpec).items():  # the command line checks these, Python does not
            if get_origin(kinds) is Literal and getattr(self, name) not in get_args(kinds):
                raise KoffError(f"sparsity.{name} must be {' or '.join(get_args(kinds))}; got {getattr(self, name)}")

    @property
    def uniform(self) -> bool:
        """Whether all layers are to get the same widths."""
        return self.layout == "uniform"


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
            spec: What to remove.
            kv_groups: How many kv groups layout `uniform` may leave in every layer (`uniform_kv_groups`); None for any.

        Raises:
            KoffError: The target cannot be reached under the units that every layer keeps.
        """
        self.groups, self.spec, self._kv_groups = groups, spec, kv_groups
        self.costs = torch.cat([torch.full((g.size,), g.params_per_unit, dtype=torch.int64) for g in groups])  # [U]
        self.is_channel = torch.cat([torch.full((g.size,), g.kind == "channel") for g in groups])  # [U]
        self.denominators = {**counts, "units": int(self.costs.sum())}
        self._shares: Tensor | None = None
        steps, costs, scores, _ = self._steps(self._protected(torch.zeros(len(self.costs))))
        removable = costs[scores < math.inf]
        most = int(removable.sum()) / self.denominators[spec.denominator]
        if spec.target > most:
            raise KoffError(
                f"sparsity.target {spec.target} of {spec.denominator} cannot be reached: with {spec.min_channels} "
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
        return self.spec.min_channels if group.kind == "channel" else self.spec.min_kv_groups

    def expected(self, keep: Tensor) -> Tensor:
        """Differentiable sparsity in the chosen denominator for keep probabilities or gates [U]."""
        if self._shares is None or self._shares.device != keep.device:
            self._shares = (self.costs.double() / self.denominators[self.spec.denominator]).float().to(keep.device)
        return ((1 - keep) * self._shares).sum()

    def counts(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Sparsity by the soft count of keep probabilities [U], and by the hard one: gates mostly closed."""
        return self.expected(keep), self.expected((keep > 0.5).float())

    def tracked(self, keep: Tensor) -> Tensor:
        """What the penalty holds to the ramp: the mean of both counts, with the gradient of the soft one.

        Tracking the soft count alone lets the hard one lag by many points.
        """
        soft, hard = self.counts(keep)
        return soft + ((hard - soft) / 2).detach()

    def report(self, kept: Tensor) -> dict[str, float]:
        """Hard counts of a mask (bool [U]): sparsity in all three denominators, and per type of unit."""
        gone, kept = self.costs.double() * ~kept.cpu(), kept.cpu()
        rates = {name: gone.sum().item() / size for name, size in self.denominators.items()}
        for name, chosen in (("ffn", self.is_channel), ("attention", ~self.is_channel)):
            rates[name] = gone[chosen].sum().item() / max(self.costs[chosen].sum().item(), 1)
        return rates

    def kept_parameters(self, kept: Tensor) -> int:
        """Parameters of the backbone that remain under a mask (bool [U])."""
        return self.denominators["total"] - int(self.costs[~kept.cpu()].sum())

    def harden(self, scores: Tensor, target: float | None = None) -> Tensor:
        """Remove the lowest-scored units until no further one fits into the budget; bool [U], True = kept.

        Greedy with skip: a kv group that would overshoot is passed over and neurons fill the rest, so the result is
        below the target by less than the cheapest unit. Each layer keeps its minimum. With `multiple_of` or layout
        `uniform` units leave in steps of several at once (`_steps`), each scored by its mean, and the result is below
        the target by less than the cheapest step.
        """
        scores = self._protected(scores.detach().float().cpu())
        steps, costs, scores, follows = self._steps(scores)
        size = self.denominators[self.spec.denominator]
        left = math.floor((self.spec.target if target is None else target) * size + 1e-4)  # parameters; 0.3 * 10 is 3
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
        """Scores with the best `minimum` units of every group set to infinity, so that they are never removed."""
        parts = []
        for group, part in zip(self.groups, scores.split([g.size for g in self.groups]), strict=True):
            best = part.topk(min(self._minimum(group), group.size)).indices
            parts.append(part.index_fill(0, best, math.inf))
        return torch.cat(parts)


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


class LagrangianPenalty(nn.Module):
    """lam1 (s - t) + lam2 (s - t)^2, minimised over the mask and maximised over the multipliers (CoFi; Sheared-LLaMA).

    Our choice: lam2 starts stiff instead of at 0. A price that must first be found by ascent lags the ramp, overshoots,
    and short runs have no time to come back (docs/log.md).
    """

    def __init__(self, stiffness: float = 20.0) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.tensor(0.0))
        self.quadratic = nn.Parameter(torch.tensor(stiffness))

    def forward(self, sparsity: Tensor, target: float) -> Tensor:
        """Args: tracked sparsity (scalar) and its target. Returns nats."""
        gap = sparsity - target
        return self.linear * gap + self.quadratic.clamp(min=0) * gap.square()


class FixedPenalty(nn.Module):
    """A constant price on what is kept; the sparsity that results is whatever the price buys (the ablation)."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, sparsity: Tensor, target: float) -> Tensor:
        """Args: tracked sparsity (scalar); the target only switches the price on. Returns nats."""
        return -self.weight * sparsity if target > 0 else 0 * sparsity
