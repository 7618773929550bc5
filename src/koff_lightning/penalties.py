"""What holds the mask to its target: a price on what is kept, in nats, added to the loss.

All take the sparsity that `Budget.measured` finds, a scalar or [S] where each of S kinds of unit has the target for
itself, and the target; with several, their prices are added.
"""

import torch
from torch import Tensor, nn


class LagrangianPenalty(nn.Module):
    """lam1 (s - t) + lam2 (s - t)^2, minimised over the mask and maximised over the multipliers (CoFi; Sheared-LLaMA).

    Our choice: lam2 starts stiff instead of at 0. A price that must first be found by ascent lags the ramp, overshoots,
    and short runs have no time to come back (docs/log.md).

    Args:
        stiffness: First lam2.
        kinds: S, each with multipliers of its own; None for one pair.
    """

    def __init__(self, stiffness: float = 20.0, kinds: int | None = None) -> None:
        super().__init__()
        shape = () if kinds is None else (kinds,)
        self.linear = nn.Parameter(torch.full(shape, 0.0))
        self.quadratic = nn.Parameter(torch.full(shape, stiffness))

    def forward(self, sparsity: Tensor, target: float, data: Tensor | None = None) -> Tensor:
        """Args: sparsity and its target. Returns nats."""
        gap = sparsity - target
        return (self.linear * gap + self.quadratic.clamp(min=0) * gap.square()).sum()


class FixedPenalty(nn.Module):
    """A constant price on what is kept; the sparsity that results is whatever the price buys (the ablation)."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, sparsity: Tensor, target: float, data: Tensor | None = None) -> Tensor:
        """Args: sparsity; the target only switches the price on. Returns nats."""
        return (-self.weight * sparsity if target > 0 else 0 * sparsity).sum()


class HingePenalty(nn.Module):
    """weight * max(0, a - (1 - t)), a the share that is active: a price until the target is met (KOFF paper).

    Args:
        weight: The paper's lambda.
        autoscale: Multiply by the loss on data, detached, so that the weight says how many times that loss the whole
            gap costs. This is our reading of the paper's "auto-scaling", which it does not define.
        both_sides: weight * |a - (1 - t)| instead, which calls a mask that runs ahead of a rising target back to it.
    """

    def __init__(self, weight: float, autoscale: bool = False, both_sides: bool = False) -> None:
        super().__init__()
        self.weight, self.autoscale, self.both_sides = weight, autoscale, both_sides

    def forward(self, sparsity: Tensor, target: float, data: Tensor | None = None) -> Tensor:
        """Args: sparsity, its target, and the loss on data (scalar). Returns nats."""
        gap = (1 - sparsity) - (1 - target)
        price = self.weight * (gap.abs() if self.both_sides else gap.relu()).sum()  # relu: no slope once it is met
        return price * data.detach() if self.autoscale and data is not None else price


def make_penalty(name: str, weight: float, autoscale: bool = False, kinds: int | None = None) -> nn.Module:
    """The penalty that `SparsitySpec.penalty` names; `kinds` as in `LagrangianPenalty`."""
    if name in ("hinge", "absolute"):
        return HingePenalty(weight, autoscale, both_sides=name == "absolute")
    if name == "fixed":
        return FixedPenalty(weight)
    # Multipliers from nothing and no tracking, as published; the KOFF paper reports that it collapses (Table 5).
    return LagrangianPenalty(kinds=kinds) if name == "lagrangian" else LagrangianPenalty(0.0, kinds)
