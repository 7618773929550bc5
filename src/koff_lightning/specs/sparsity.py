"""What to remove and how the mask is learned: the options of the sparsity."""

import math
from dataclasses import dataclass, field
from typing import Literal

from koff_lightning.specs.kinds import check_values
from koff_lightning.support.errors import KoffError
from koff_lightning.units import check_kinds


@dataclass
class SparsitySpec:
    """What to remove and how the mask is learned.

    Args:
        target: Share of the denominator's parameters to remove; 0 learns no mask.
        denominator: What the target is a share of: `body` (linears of all layers), `total` (all parameters) or `units`
            (parameters of the prunable units).
        units: Kinds of prunable units: FFN neurons (`channel`) and kv heads with their queries (`kv_group`); or output
            channels of single linears (`gate_channel`, `up_channel`, `down_channel`, `k_channel`, `v_channel`,
            `q_channel`, `o_channel`), whose price is their row. No weight may belong to two kinds.
        gate: `hc` (hard concrete) or `ddp` (deterministic shrinking ReLU).
        beta: Temperature of `hc`; the KOFF paper has 2.
        beta_end: Temperature of `hc` at the end of the mask phase, to which it falls linearly; null keeps `beta`.
        initial: First logit of every unit; null for the gate's own (3 for `hc`, 1 for `ddp`).
        penalty: `lagrangian` tracks the target with learned multipliers; `fixed` adds weight * what is kept, whatever
            the target; `hinge` adds weight * what is active beyond 1 - target; `absolute` adds weight * the gap on
            either side of it; `plain_lagrangian` has multipliers that start at 0 and no tracking (an ablation).
        weight: Penalty weight for `fixed`, `hinge` and `absolute`, in nats per unit of sparsity.
        autoscale: Multiply `hinge` or `absolute` by the loss on data, so that `weight` is relative to it.
        scope: Whether the target is one of all units together (`global`) or of each kind by itself (`local`, with
            denominator `units`).
        harden: How the mask is fixed: to the exact budget (`budget`), or by closing every gate that is more often
            closed than open, whatever that comes to (`threshold`).
        band: Widest gap allowed between tracked sparsity and the ramp (`lagrangian` only), in absolute sparsity.
        prior: Order the logits after warm-up by each gate's squared gradient (`fisher`), or start them equal (`none`).
        spread: Standard deviation of the logits that the prior sets.
        min_channels: FFN neurons that every layer keeps, of untied gate and up channels both; of down channels as many.
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
    beta: float = 2 / 3
    beta_end: float | None = None
    initial: float | None = None
    penalty: Literal["lagrangian", "fixed", "hinge", "absolute", "plain_lagrangian"] = "lagrangian"
    weight: float = 1.0
    autoscale: bool = False
    scope: Literal["global", "local"] = "global"
    harden: Literal["budget", "threshold"] = "budget"
    band: float = 0.004
    prior: Literal["fisher", "none"] = "fisher"
    spread: float = 4.0
    min_channels: int = 64
    min_kv_groups: int = 1
    layout: Literal["ragged", "uniform"] = "ragged"
    multiple_of: int = 1

    def __post_init__(self) -> None:
        check_values(self, "sparsity")
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
        check_kinds(self.units)
        self._check_gate()
        self._check_together()

    def _check_gate(self) -> None:
        betas = {"beta": self.beta, "beta_end": self.beta_end}
        for name, value in betas.items():
            if value is not None and not 0 < value < math.inf:
                raise KoffError(f"sparsity.{name} must be > 0 and finite; got {value}")
        if self.gate == "ddp" and (self.beta, self.beta_end) != (SparsitySpec.beta, None):
            raise KoffError("sparsity.beta and sparsity.beta_end are of gate hc: with gate ddp leave them out")
        if self.initial is not None and not math.isfinite(self.initial):
            raise KoffError(f"sparsity.initial must be finite; got {self.initial}")

    def _check_together(self) -> None:
        """Refuse options that are sound alone and say nothing, or two things, together."""
        hinge = self.penalty in ("hinge", "absolute")
        if hinge and not self.target:
            raise KoffError(
                f"sparsity.penalty {self.penalty} with sparsity.target 0 would press on nothing: give a target, or "
                "leave the penalty out to learn no mask"
            )
        if self.autoscale and not hinge:
            raise KoffError(f"sparsity.autoscale scales penalty hinge or absolute; got penalty {self.penalty}")
        if self.scope == "local" and self.denominator != "units":
            raise KoffError(
                "sparsity.scope local takes the target of each kind of unit by itself: set sparsity.denominator to "
                f"units; got {self.denominator}"
            )
        channels = [kind for kind in self.units if kind not in ("channel", "kv_group")]
        if channels and (self.uniform or self.multiple_of > 1):
            option = "layout uniform" if self.uniform else f"multiple_of {self.multiple_of}"
            raise KoffError(
                f"sparsity.{option} is of whole units; channels of single linears ({', '.join(channels)}) leave other "
                "widths: set sparsity.layout to ragged and sparsity.multiple_of to 1"
            )
        if self.harden == "threshold" and (self.uniform or self.multiple_of > 1):
            raise KoffError("sparsity.harden threshold leaves any widths: layout uniform and multiple_of want budget")

    def gate_options(self) -> dict[str, float | None]:
        """Arguments of the gate beside its kind."""
        of_hc = {"beta": self.beta, "beta_end": self.beta_end} if self.gate == "hc" else {}
        return {"initial": self.initial} | of_hc

    @property
    def uniform(self) -> bool:
        """Whether all layers are to get the same widths."""
        return self.layout == "uniform"
