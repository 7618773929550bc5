"""Penalties that hold the mask to its target: a price on what is kept, in nats, added to the loss.

Each takes the sparsity as `Budget.measured` gives it, its target, and the loss on data. Sparsity is a scalar, or [S] if
each of S kinds of unit has to meet the target by itself; the S prices are then added up.
"""

import torch
from torch import Tensor, nn


class LagrangianPenalty(nn.Module):
    """lam1 (s - t) + lam2 (s - t)^2, minimised over the mask and maximised over the multipliers (CoFi; Sheared-LLaMA).

    Our choice: lam2 starts at `stiffness` instead of 0. Multipliers that start from nothing grow too late for the ramp
    and then overshoot, and short runs have no time to recover (docs/log.md).

    Args:
        stiffness: First value of lam2.
        kinds: S, the kinds of unit, each with a pair of multipliers of its own; None for a single pair.
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
        """Args: sparsity; the target, which only switches the price on. Returns nats."""
        return (-self.weight * sparsity if target > 0 else 0 * sparsity).sum()


class HingePenalty(nn.Module):
    """weight * max(0, a - (1 - t)), a = 1 - s the active share: a price until the target is met (KOFF paper).

    Args:
        weight: The paper's lambda.
        autoscale: Multiply by the loss on data, detached: `weight` is then relative to that loss. This is our reading
            of the paper's "auto-scaling", which it does not define.
        both_sides: weight * |a - (1 - t)| instead, which also pulls a mask back that runs ahead of a rising target.
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
    # `plain_lagrangian`: multipliers start at 0 and nothing shifts the logits, as published;
    # the KOFF paper reports that it collapses (Table 5).
    return LagrangianPenalty(kinds=kinds) if name == "lagrangian" else LagrangianPenalty(0.0, kinds)
