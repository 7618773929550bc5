"""Gates that switch prunable units: what a gate is (`HardConcrete`, `ShrinkingReLU`) and where it acts.

One flat vector of logits holds the units of all groups: sampling, counting and hardening are one operation.

Shapes: U units in all, U_g of group g, C_g = U_g * width input columns of its consumer, R = 1 or rows of the batch.
"""

import math
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from koff_lightning.backbone import PrunableGroup
from koff_lightning.support import ranks
from koff_lightning.support.in_force import InForce
from koff_lightning.tracking import EVERY, shift_to_target


class HardConcrete:
    """Stochastic gate in [0, 1] with mass at both ends (Louizos et al. 2018, eq. 10-12).

    `logits` are the paper's log alpha. Constants as in CoFi and Sheared-LLaMA.

    Args:
        beta: Temperature of the sigmoid that makes a sample. Below 1 a gate is mostly 0 or 1; at 2, as in the KOFF
            paper, mostly between.
        beta_end: Temperature at the end of the mask phase, to which it falls linearly; None keeps it.
        initial: First logit of every unit; None for the default.
    """

    rate, bound = 1.0, 8.0
    gamma, zeta, eps = -0.1, 1.1, 1e-6
    learns_closed = False  # at 0 the clamp of a sample has no slope

    def __init__(self, beta: float = 2 / 3, beta_end: float | None = None, initial: float | None = None) -> None:
        self.beta, self._course = beta, (beta, beta if beta_end is None else beta_end)
        self.initial = 3.0 if initial is None else initial  # P(m > 0) = 0.99 at the start

    @property
    def offset(self) -> float:
        """Where a gate is as often zero as not: -1.5986 at beta 2/3."""
        return self.beta * math.log(-self.gamma / self.zeta)

    @property
    def temperature(self) -> float:
        """Of the sigmoid that makes a sample."""
        return self.beta

    def sample(self, logits: Tensor, rows: int = 1, random: torch.Generator | None = None) -> Tensor:
        """Independent draws for each row, [rows, U]. fp32: in bf16 1 - eps rounds to 1 and the logit to inf."""
        noise = torch.rand(rows, logits.numel(), device=logits.device, generator=random).clamp_(self.eps, 1 - self.eps)
        soft = torch.sigmoid((torch.logit(noise) + logits) / self.beta)
        return (soft * (self.zeta - self.gamma) + self.gamma).clamp(0, 1)

    def keep(self, logits: Tensor) -> Tensor:
        """P(m > 0), the differentiable count of kept units, [U]."""
        return torch.sigmoid(logits - self.offset)

    def shift(self, logits: Tensor, delta: Tensor | float) -> Tensor:
        """Logits that keep more (delta > 0) or fewer units; every gate moves alike, so their order stays."""
        return logits + delta

    def sharpen(self, logits: Tensor) -> Tensor:
        """Logits further from the point where a gate is open half the time; which side they are on stays."""
        return self.offset + 1.2 * (logits - self.offset)

    def prior(self, order: Tensor) -> Tensor:
        """First logits for units in an order given as normal scores, [U]."""
        return self.initial + order

    def anneal(self, progress: float) -> None:
        """Set beta for a share `progress` in [0, 1] of the mask phase."""
        start, end = self._course
        self.beta = start + (end - start) * min(max(progress, 0.0), 1.0)


class ShrinkingReLU:
    """Deterministic gate max(z, 0) with an annealed soft count (DDP, arXiv 2603.08065, as in its released code).

    Kept units may be amplified (m > 1). The threshold `mu` falls from 0.5 to 0.1 by a square-root schedule. `width`, on
    either side of it, is where the soft count is neither 0 nor 1: mu at the start of a step, less after `sharpen`.
    """

    rate, bound = 0.1, 4.0  # z moves in a range a tenth of the logits'
    learns_closed = True
    start, end, slope, stretch = 0.5, 0.1, 2.4, (-0.1, 1.1)

    def __init__(self, initial: float | None = None) -> None:
        self.initial = 1.0 if initial is None else initial
        self.anneal(0.0)

    @property
    def temperature(self) -> float:
        """Threshold of the gates, mu."""
        return self.mu

    def sample(self, logits: Tensor, rows: int = 1, random: torch.Generator | None = None) -> Tensor:
        """The gate itself, [1, U]; straight-through so that a unit at zero can come back."""
        return (logits + (logits.clamp(min=0) - logits).detach()).unsqueeze(0)

    def keep(self, logits: Tensor) -> Tensor:
        """Soft count: 0 at z = mu - width, 1 at mu + width; straight-through outside, [U]."""
        low, high = self.stretch
        soft = torch.sigmoid((logits - self.mu) * self.slope / self.width) * (high - low) + low
        return soft + (soft.clamp(0, 1) - soft).detach()

    def shift(self, logits: Tensor, delta: Tensor | float) -> Tensor:
        """Move the units near the threshold most: a uniform shift would rescale every kept activation.

        The exact flow du/dt = 1 / (1 + u^2) of u = (z - mu) / (2 width), so that no two units ever change places.
        """
        span = 2 * self.width
        u = (logits - self.mu) / span
        time = u + u**3 / 3 + delta / span
        return self.mu + span * 2 * torch.sinh(torch.asinh(1.5 * time) / 3)  # root of u + u^3 / 3 = time

    def sharpen(self, logits: Tensor) -> Tensor:
        """The same z, for stretching it would rescale activations: the width is less until the next step."""
        self.width /= 1.2
        return logits

    def prior(self, order: Tensor) -> Tensor:
        """First z, [U]: around 1, and narrow enough that hardly any unit starts below the threshold."""
        return self.initial + 0.04 * order

    def anneal(self, progress: float) -> None:
        """Set mu for a share `progress` in [0, 1] of the mask phase."""
        self.mu = self.width = self.start - (self.start - self.end) * math.sqrt(min(max(progress, 0.0), 1.0))


GATES = {"hc": HardConcrete, "ddp": ShrinkingReLU}


class _Product(torch.autograd.Function):
    """x [B, T, C] times gates [R, 1, C] that have no slope at 0, of which the backward keeps the product alone.

    An adapter or activation that reads the product keeps it in any case, so x itself need not stay: where a gate is not
    0, it is product / gate.
    """

    @staticmethod
    def forward(ctx, x, gates):  # noqa: ANN001, ANN205
        product = x * gates
        ctx.save_for_backward(product, gates)
        return product

    @staticmethod
    def backward(ctx, slope):  # noqa: ANN001, ANN205
        product, gates = ctx.saved_tensors
        x = product / gates.where(gates != 0, 1)  # before the slope comes in: fp16 has no room for slope * product
        return slope * gates, x.mul_(slope).sum_to_size(gates.shape)


class BackboneGates(nn.Module):
    """The mask: logits of all units, and the hooks by which they act on the backbone.

    A gate of a whole unit multiplies the INPUT of the outermost (LoRA-wrapped) consumer, so the base path and LoRA see
    the same gated activation and a zero gate equals a removed column (checked by the tests of surgery). A gate of a
    channel multiplies the OUTPUT of the outermost linear, y = z (W x + b + s B A x): no adapter brings it back.
    """

    kept: Tensor  # bool [U], the hardened mask
    importance: Tensor  # [U]
    hardened: Tensor  # bool [], whether `kept` is in force
    bias: Tensor | None  # [groups, d], what the removed units leave behind at each consumer's output

    def __init__(self, groups: list[PrunableGroup], kind: str = "hc", **options: float | None) -> None:
        """Args: units of all layers; kind of gate, `hc` or `ddp`; and its options."""
        super().__init__()
        self.groups, self.gate = groups, GATES[kind](**options)
        self.sizes = [group.size for group in groups]
        units = sum(self.sizes)
        self.logits = nn.Parameter(torch.full((units,), self.gate.initial))  # [U] fp32
        self.register_buffer("kept", torch.ones(units, dtype=torch.bool))
        self.register_buffer("hardened", torch.tensor(False))
        self.register_buffer("importance", torch.zeros(units))  # squared gate gradients of the warm-up
        self.register_buffer("seed", torch.tensor(torch.initial_seed() % 2**31))  # of all draws of a run
        self.register_buffer("bias", None)
        self.order: Tensor | None = None  # [U], a prior given from elsewhere instead of `importance`
        self._probe: Tensor | None = None
        self._in_force: InForce[list[Tensor] | None] = InForce(None)

    def attach(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Hang the hooks. After LoRA injection: a hook on an inner `base_layer` would leave the adapter ungated.

        Returns:
            Their handles, for gates that do not stay.
        """
        handles: list[RemovableHandle] = []
        for index, group in enumerate(self.groups):
            module = model.get_submodule(group.gated)
            inner = getattr(module, "base_layer", None)
            if inner is not None and (inner._forward_pre_hooks or inner._forward_hooks):
                raise RuntimeError(f"{group.gated}: a gate sits inside the adapter; attach gates after injection")
            if not group.consumer:
                handles.append(module.register_forward_hook(self._output_hook(index)))
                continue
            handles.append(module.register_forward_pre_hook(self._hook(index)))
            handles.append(module.register_forward_hook(self._compensation(index)))
        return handles

    def _gated(self, x: Tensor, values: Tensor, kept: bool = False) -> Tensor:
        """What a gate lets through: x [B, T, C] times its values [R, 1, C]; `kept`: what made x keeps it anyway."""
        values = values.to(x.dtype)
        plain = kept or self.gate.learns_closed or not values.requires_grad
        plain = plain or torch.compiler.is_compiling()  # it chooses itself what to keep
        return x * values if plain else _Product.apply(x, values)

    def _hook(self, index: int) -> object:
        kept = self.groups[index].kind == "kv_group"  # by attention, whose backward needs what it gave

        def multiply(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            columns = self._columns
            if columns is None:
                return None
            return (self._gated(inputs[0], columns[index], kept), *inputs[1:])  # [B, T, C_g]

        return multiply

    def _output_hook(self, index: int) -> object:
        def multiply(_: nn.Module, __: object, output: Tensor) -> Tensor | None:
            if self._columns is None:
                return None
            return self._gated(output, self._columns[index])  # [B, T, U_g]

        return multiply

    def _compensation(self, index: int) -> object:
        def add(_: nn.Module, __: object, output: Tensor) -> Tensor | None:
            if self._columns is None or self.bias is None:
                return None
            return output + self.bias[index].to(output.dtype)  # [B, T, d]

        return add

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
        if (bias := state.get(f"{prefix}bias")) is not None:  # a mask with compensation; others have none
            self.bias = torch.zeros_like(bias, device=self.logits.device)
        super()._load_from_state_dict(state, prefix, *rest)

    @property
    def _columns(self) -> list[Tensor] | None:
        """Of each group [R, 1, C_g]; None = all gates at one, nothing multiplied."""
        return self._in_force.value

    def set(self, values: Tensor | None) -> None:
        """Put gate values [R, U] in force until the next call; None switches the gates off (dense model).

        Outside of `off` for all threads. They stay after the forward, because a checkpointed layer reads them again in
        the backward, which may run in another thread.
        """
        if values is None:
            self._in_force.set(None)
            return
        parts = values.split(self.sizes, dim=1)
        columns = [
            part.repeat_interleave(group.width, dim=1).unsqueeze(1) if group.width > 1 else part.unsqueeze(1)
            for part, group in zip(parts, self.groups, strict=True)
        ]
        self._in_force.set(columns)

    def probe(self, rows: int) -> Tensor:
        """Gates at one, [rows, U], whose gradient `observe` collects after the backward."""
        self._probe = torch.ones(rows, self.logits.numel(), device=self.logits.device, requires_grad=True)
        return self._probe

    @torch.no_grad()
    def observe(self, scale: float = 1.0) -> None:
        """Add each gate's squared gradient per row: the empirical Fisher information of removing the unit, [U].

        Args:
            scale: What the loss was multiplied by for the backward.
        """
        if self._probe is not None:
            slope = torch.zeros_like(self._probe) if self._probe.grad is None else self._probe.grad  # [rows, U]
            # Of the rows of all ranks, which start the ramp alike; in a rank's loss each counts `ranks.count()` times.
            seen = ranks.total((slope / (scale * ranks.count())).square().sum(0))  # [U]
            self.importance += seen.where(seen.isfinite().all(), 0.0)  # a step that is skipped leaves no trace
        self._probe = None

    @torch.no_grad()
    def order_by_prior(self, costs: Tensor, spread: float) -> None:
        """Start the logits normally distributed in the order of importance per parameter, or in one that was given.

        Only the order of the prior is used: the scale of Fisher scores says nothing about gates. Without observations
        the logits stay equal.
        """
        if self.order is None and self.importance.sum() == 0:
            return
        worth = self.importance / costs.to(self.importance) if self.order is None else self.order
        rank = worth.argsort(stable=True).argsort()  # [U]
        quantile = (rank + 0.5) / len(rank)
        self.logits.copy_(self.gate.prior(spread * torch.special.ndtri(quantile)))

    @torch.no_grad()
    def shift_to_target(
        self,
        target: float,
        band: float,
        counts: Callable[[Tensor], tuple[Tensor, Tensor]],
        units: Tensor | slice = EVERY,
    ) -> None:
        """Move the logits, or those of `units` (indices), by the least that brings both `counts` to the target.

        See tracking.py; `counts` takes the keep probabilities of the units that move.
        """
        part = self.logits[units]
        shift_to_target(self.gate, part, target, band, counts)
        self.logits[units] = part

    def draw(self, rows: int = 1, place: tuple[int, ...] = ()) -> Tensor:
        """Gate values for one micro-batch, [R, U]: hardened mask, or a sample while training.

        The noise depends on the run's seed and on `place` (step, micro-batch, rank) alone, so a resumed run draws what
        an uninterrupted one would have drawn.
        """
        if self.hardened:
            return self.kept.float().unsqueeze(0)
        random = torch.Generator(self.logits.device)
        random.manual_seed(zlib.crc32(repr((int(self.seed), *place)).encode()))
        return self.gate.sample(self.logits, rows, random)

    def off(self) -> AbstractContextManager[None]:
        """The dense model inside the block, in this thread, or what is `set` there; what was in force comes back."""
        return self._in_force.scope(None)

    @torch.no_grad()
    def harden(self, kept: Tensor) -> None:
        """Fix the mask: from here on gates are exactly `kept` (bool [U]) and the logits no longer act."""
        self.kept.copy_(kept)
        self.hardened.fill_(True)
