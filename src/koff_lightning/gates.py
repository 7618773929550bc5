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
from koff_lightning.support.errors import KoffError
from koff_lightning.support.in_force import InForce
from koff_lightning.tracking import EVERY, shift_to_target


class HardConcrete:
    """Stochastic gate in [0, 1] that is exactly 0 or 1 with some probability (Louizos et al. 2018, eq. 10-12).

    `logits` are the paper's log alpha. Constants as in CoFi and Sheared-LLaMA.

    Args:
        beta: Temperature of a sample's sigmoid. Below 1 a gate is mostly 0 or 1; at 2, as in the KOFF paper, mostly in
            between.
        beta_end: Temperature at the end of the mask phase, reached linearly; None keeps `beta`.
        initial: First logit of every unit; None for the default.
    """

    rate, bound = 1.0, 8.0
    gamma, zeta, eps = -0.1, 1.1, 1e-6
    learns_closed = False  # a gate at 0 has no gradient: the sample is clamped there

    def __init__(self, beta: float = 2 / 3, beta_end: float | None = None, initial: float | None = None) -> None:
        self.beta, self._course = beta, (beta, beta if beta_end is None else beta_end)
        self.initial = 3.0 if initial is None else initial  # P(m > 0) = 0.99 at the start

    @property
    def offset(self) -> float:
        """Logit at which a gate is 0 with probability 1/2: -1.5986 at beta 2/3."""
        return self.beta * math.log(-self.gamma / self.zeta)

    @property
    def temperature(self) -> float:
        """Of a sample's sigmoid; logged."""
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
        """Logits that keep more (delta > 0) or fewer units. All move alike, so the order of the units stays."""
        return logits + delta

    def sharpen(self, logits: Tensor) -> Tensor:
        """Logits further from the one at which a gate is open half the time, each on its own side of it."""
        return self.offset + 1.2 * (logits - self.offset)

    def prior(self, order: Tensor) -> Tensor:
        """First logits [U] from the units' ranks, given as quantiles of a normal distribution [U]."""
        return self.initial + order

    def anneal(self, progress: float) -> None:
        """Set beta for a share `progress` in [0, 1] of the mask phase."""
        start, end = self._course
        self.beta = start + (end - start) * min(max(progress, 0.0), 1.0)


class ShrinkingReLU:
    """Deterministic gate max(z, 0) with an annealed soft count (DDP, arXiv 2603.08065, as in its released code).

    The logits are z. A unit may be amplified (m > 1). It counts as kept from the threshold `mu`, which falls from 0.5
    to 0.1 by a square-root schedule; within `width` of it the soft count is between 0 and 1. `width` equals mu when a
    step starts, and `sharpen` narrows it.
    """

    rate, bound = 0.1, 4.0  # z moves in a range a tenth as wide as that of hard-concrete logits
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
        """The gate itself, [1, U]; gradient 1 also below 0 (straight-through), so that a closed unit can come back."""
        return (logits + (logits.clamp(min=0) - logits).detach()).unsqueeze(0)

    def keep(self, logits: Tensor) -> Tensor:
        """Soft count [U]: 0 at z = mu - width, 1 at mu + width, with a gradient also outside (straight-through)."""
        low, high = self.stretch
        soft = torch.sigmoid((logits - self.mu) * self.slope / self.width) * (high - low) + low
        return soft + (soft.clamp(0, 1) - soft).detach()

    def shift(self, logits: Tensor, delta: Tensor | float) -> Tensor:
        """As `HardConcrete.shift`, but units near the threshold move most: a uniform shift would rescale activations.

        u = (z - mu) / (2 width) follows du/dt = 1 / (1 + u^2), solved exactly, so the order of the units stays.
        """
        span = 2 * self.width
        u = (logits - self.mu) / span
        time = u + u**3 / 3 + delta / span
        return self.mu + span * 2 * torch.sinh(torch.asinh(1.5 * time) / 3)  # root of u + u^3 / 3 = time

    def sharpen(self, logits: Tensor) -> Tensor:
        """Narrow the width until the next step. z stays: stretching it would rescale activations."""
        self.width /= 1.2
        return logits

    def prior(self, order: Tensor) -> Tensor:
        """As `HardConcrete.prior`: around 1, and so close to it that hardly any unit starts below the threshold."""
        return self.initial + 0.04 * order

    def anneal(self, progress: float) -> None:
        """Set mu for a share `progress` in [0, 1] of the mask phase."""
        self.mu = self.width = self.start - (self.start - self.end) * math.sqrt(min(max(progress, 0.0), 1.0))


GATES = {"hc": HardConcrete, "ddp": ShrinkingReLU}


class _Product(torch.autograd.Function):
    """x [B, T, C] times gates [R, 1, C], saving for the backward only the product and not x.

    What comes next (an adapter, an activation) saves the product anyway, so this costs no memory. The backward needs x
    for the gates' gradient and finds it as product / gate, except where a gate is 0: there x is lost and the gradient
    is 0, which is right for gates that have none at 0.
    """

    @staticmethod
    def forward(ctx, x, gates):  # noqa: ANN001, ANN205
        product = x * gates
        ctx.save_for_backward(product, gates)
        return product

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        product, gates = ctx.saved_tensors
        x = product / gates.where(gates != 0, 1)  # divided first: grad * product may overflow in fp16
        return grad * gates, x.mul_(grad).sum_to_size(gates.shape)


class BackboneGates(nn.Module):
    """The mask: logits of all units, and the hooks by which gates act on the backbone.

    The gate of a whole unit multiplies the INPUT of its consumer, outside of the LoRA wrapper: base weight and adapter
    see the same gated activation, and a gate at 0 equals a removed column of both (see tests/test_surgery.py). The gate
    of a channel multiplies the OUTPUT of its linear, outside of the wrapper too, y = z (W x + b + s B A x), so that no
    adapter brings a closed channel back.
    """

    kept: Tensor  # bool [U], the hardened mask
    importance: Tensor  # [U], squared gradients of the gates, summed over the warm-up
    hardened: Tensor  # bool [], whether `kept` is in force
    bias: Tensor | None  # [groups, d], added to each consumer's output in place of the removed units (one-shot masks)

    def __init__(self, groups: list[PrunableGroup], kind: str = "hc", **options: float | None) -> None:
        """Args: units of all layers; kind of gate, `hc` or `ddp`; and its options."""
        super().__init__()
        self.groups, self.gate = groups, GATES[kind](**options)
        self.sizes = [group.size for group in groups]
        units = sum(self.sizes)
        self.logits = nn.Parameter(torch.full((units,), self.gate.initial))  # [U] fp32
        self.register_buffer("kept", torch.ones(units, dtype=torch.bool))
        self.register_buffer("hardened", torch.tensor(False))
        self.register_buffer("importance", torch.zeros(units))
        self.register_buffer("seed", torch.tensor(torch.initial_seed() % 2**31))  # of all samples of a run
        self.register_buffer("bias", None)
        self.order: Tensor | None = None  # [U], scores that order the units instead of `importance`
        self._probe: Tensor | None = None  # [rows, U], see `probe`
        self._in_force: InForce[list[Tensor] | None] = InForce(None)

    def attach(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Register the hooks. Only after LoRA is injected: a hook on the inner `base_layer` leaves the adapter ungated.

        Returns:
            Handles that remove the hooks again.
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
            handles.append(module.register_forward_pre_hook(self._input_hook(index)))
            handles.append(module.register_forward_hook(self._bias_hook(index)))
        return handles

    def _gated(self, x: Tensor, values: Tensor, kept: bool = False) -> Tensor:
        """Multiply x [B, T, C] by gate values [R, 1, C]; `kept`: whether autograd keeps x in any case."""
        values = values.to(x.dtype)
        plain = kept or self.gate.learns_closed or not values.requires_grad
        plain = plain or torch.compiler.is_compiling()  # the compiler decides by itself what to keep
        return x * values if plain else _Product.apply(x, values)

    def _input_hook(self, index: int) -> Callable[..., tuple[Tensor, ...] | None]:
        kept = self.groups[index].kind == "kv_group"  # x is the output of attention, which its backward reads

        def multiply(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            columns = self._columns
            if columns is None:
                return None
            return (self._gated(inputs[0], columns[index], kept), *inputs[1:])  # [B, T, C_g]

        return multiply

    def _output_hook(self, index: int) -> Callable[..., Tensor | None]:
        def multiply(_: nn.Module, __: object, output: Tensor) -> Tensor | None:
            if self._columns is None:
                return None
            return self._gated(output, self._columns[index])  # [B, T, U_g]

        return multiply

    def _bias_hook(self, index: int) -> Callable[..., Tensor | None]:
        def add(_: nn.Module, __: object, output: Tensor) -> Tensor | None:
            if self._columns is None or self.bias is None:
                return None
            return output + self.bias[index].to(output.dtype)  # [B, T, d]

        return add

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: object) -> None:
        if (bias := state.get(f"{prefix}bias")) is not None:  # only some masks have it: make room for it
            self.bias = torch.zeros_like(bias, device=self.logits.device)
        super()._load_from_state_dict(state, prefix, *rest)

    @property
    def _columns(self) -> list[Tensor] | None:
        """Gate values in force for each group, [R, 1, C_g]; None if nothing is to be multiplied (all gates at one)."""
        return self._in_force.value

    def set(self, values: Tensor | None) -> None:
        """Put gate values [R, U] in force until the next call; None switches the gates off (dense model).

        They hold for all threads, and inside of `off` for this one. They stay in force after the forward: with
        activation checkpointing the backward, which may run in another thread, computes layers again and needs them.
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
        """Gates at one, [rows, U]: they change nothing, and `observe` reads their gradient after the backward."""
        self._probe = torch.ones(rows, self.logits.numel(), device=self.logits.device, requires_grad=True)
        return self._probe

    @torch.no_grad()
    def observe(self, scale: float = 1.0) -> None:
        """Add the squared gradients of the probed gates, row by row, to `importance`: the empirical Fisher information.

        Args:
            scale: Loss scale, by which the loss was multiplied for the backward.
        """
        if self._probe is not None:
            grad = torch.zeros_like(self._probe) if self._probe.grad is None else self._probe.grad  # [rows, U]
            # Over the rows of all ranks, so that all start the ramp alike. A rank's loss is weighted by their number.
            fisher = ranks.total((grad / (scale * ranks.count())).square().sum(0))  # [U]
            self.importance += fisher.where(fisher.isfinite().all(), 0.0)  # a step that is skipped leaves no trace
        self._probe = None

    @torch.no_grad()
    def order_by_prior(self, costs: Tensor, spread: float) -> None:
        """Set the first logits: normally distributed, in the order of importance per parameter, or of `order` if given.

        Only ranks are used, since the scale of Fisher scores says nothing about gates. If nothing was observed, the
        logits stay equal.

        Args:
            costs: Parameters of each unit, [U].
            spread: Standard deviation of the logits.
        """
        if self.order is None and self.importance.sum() == 0:
            return
        scores = self.importance / costs.to(self.importance) if self.order is None else self.order
        rank = scores.argsort(stable=True).argsort()  # [U]
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
        """Shift the logits of `units` (indices) to the target, see tracking.py.

        `counts` takes the keep probabilities of these units alone.
        """
        part = self.logits[units]
        shift_to_target(self.gate, part, target, band, counts)
        self.logits[units] = part

    def draw(self, rows: int = 1, place: tuple[int, ...] = ()) -> Tensor:
        """Gate values for one micro-batch, [R, U]: the hardened mask, or a sample as long as it is learned.

        The noise depends only on the run's seed and on `place` (step, micro-batch, rank), so a resumed run draws the
        same as an uninterrupted one.
        """
        if self.hardened:
            return self.kept.float().unsqueeze(0)
        random = torch.Generator(self.logits.device)
        random.manual_seed(zlib.crc32(repr((int(self.seed), *place)).encode()))
        return self.gate.sample(self.logits, rows, random)

    def off(self) -> AbstractContextManager[None]:
        """Inside the block, in this thread: no gates, or those `set` there. Afterwards what was in force before."""
        return self._in_force.scope(None)

    @torch.no_grad()
    def harden(self, kept: Tensor) -> None:
        """Fix the mask: from here on gates are exactly `kept` (bool [U]) and the logits no longer act.

        Raises:
            KoffError: `kept` is something else: scores, or a mask of other units.
        """
        if kept.dtype != torch.bool or kept.shape != self.kept.shape:
            raise KoffError(
                f"a mask is a bool of each unit, in the order of gates.groups, True for those that stay: wanted "
                f"torch.bool {list(self.kept.shape)}, got {kept.dtype} {list(kept.shape)}"
            )
        self.kept.copy_(kept)
        self.hardened.fill_(True)
