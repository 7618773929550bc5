"""The course of the mask over a run, thinned to a number of points that does not grow with the run."""

from typing import Any

from koff_lightning.callbacks.anneal import AnnealSparsity
from koff_lightning.training.module import KOFFModule

MOST = 200  # points kept


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
        shares = [1 - part.float().mean().item() for _, part in module.model.gates.per_group(module.model.hard_mask())]
        course = {name: float(state[f"sparsity/{name}"]) for name in ("target", "expected", "realised")}
        self.points.append({"step": step, "removed": shares} | course)
        if len(self.points) > MOST:  # the length of the run need not be known: halve the points, double the spacing
            self.every *= 2
            self.points = [point for point in self.points if point["step"] % self.every == 0]

    def state_dict(self) -> dict[str, Any]:
        """Everything, plain."""
        return {"points": self.points, "every": self.every}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.points, self.every = list(state["points"]), state["every"]
