"""One-shot masks to compare with: every unit's score from the weights and one reading of calibration text.

In the units, the budget and the hardening of a learned mask (docs/baselines.md has the formulas, their sources, and
where we differ from them):

    random     uniform noise
    magnitude  ||w||_2 over all weights of the unit
    wanda_sp   sum over the unit's columns j of ||X_j||_2 * ||W_:j||_1 (An et al. 2024, after Sun et al. 2024)
    flap       mean over the unit's columns j of Var(X_j) * ||W_:j||_2^2, standardised by layer and kind (the same)
    fisher     squared gradient of the loss by the unit's gate, per parameter: the prior of a learned mask by itself

X is the input of the unit's consumer, W its weight. Of an output channel, which has no consumer, it is the input of its
own linear, and what the formulas say of columns is summed over the channel's row. Memories play no part: they are off,
and the gates open.

Shapes: U units in all, U_g of group g, C_g = U_g * width input columns of its consumer, N tokens, d hidden, B rows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from koff_lightning.backbone import PrunableGroup, hidden_states, inputs_of, prunable_groups
from koff_lightning.data.packing import IGNORED
from koff_lightning.gates import BackboneGates
from koff_lightning.losses import head_loss
from koff_lightning.specs.training import LossSpec
from koff_lightning.support.errors import KoffError
from koff_lightning.support.wording import nearest
from koff_lightning.surgery import masks

Method = Literal["magnitude", "wanda_sp", "flap", "random", "fisher"]
READ_TEXT = ("wanda_sp", "flap", "fisher")
NO_TEXT = f"there is no calibration text: {', '.join(READ_TEXT)} score units by what the model does with it; give some"


def scores(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]] | None,
    method: Method,
    groups: Sequence[PrunableGroup] | None = None,
    seed: int = 0,
) -> Tensor:
    """Importance of every unit, in the order of which a budget removes units from the lowest up.

    Args:
        model: The dense backbone.
        batches: Calibration text, as the data module gives it (`input_ids` [B, T], `position_ids` or `attention_mask`);
            `fisher` wants `labels` too; `magnitude` and `random` read none.
        method: `magnitude`, `wanda_sp`, `flap`, `random` or `fisher`.
        groups: The units, by default all prunable ones of the model.
        seed: Seed of `random`.

    Returns:
        fp32 [U] on the CPU.

    Raises:
        KoffError: An unknown method, no calibration text, or scores that are not finite.
    """
    if method not in get_args(Method):
        raise KoffError(
            f"method must be one of {', '.join(get_args(Method))}; got {method!r}.{nearest(method, get_args(Method))}"
        )
    groups = prunable_groups(model) if groups is None else groups
    if method == "random":
        random = torch.Generator().manual_seed(seed)
        return torch.rand(sum(group.size for group in groups), generator=random)
    if method == "fisher":
        return _finite(_fisher(model, batches or (), groups), method, groups)
    read = input_moments(model, batches or (), groups) if method in READ_TEXT else {}
    return scores_from(model, read, method, groups)


def scores_from(
    model: PreTrainedModel, read: Mapping[str, "Moments"], method: Method, groups: Sequence[PrunableGroup]
) -> Tensor:
    """The same from what `input_moments` found, fp32 [U]."""
    return _finite([_SCORES[method](model, group, read.get(group.gated)) for group in groups], method, groups)


def _finite(parts: Sequence[Tensor], method: Method, groups: Sequence[PrunableGroup]) -> Tensor:
    """The scores of all groups as one, fp32 [U]; KoffError names the first layer with one that is no number."""
    values = torch.cat(list(parts)).float().cpu()
    if not values.isfinite().all():
        where = next(g for g, part in zip(groups, parts, strict=True) if not part.isfinite().all())
        raise KoffError(
            f"{method}: the scores of {where.gated} are not finite: its weights or its inputs overflow; use "
            "--model.dtype float32"
        )
    return values


# ------------------------------------------------------------------------------------------------- calibration


class Moments:
    """Count, mean and scatter of the columns of many matrices [N, C], put together batch by batch (Chan et al. 1979).

    Each batch is centred before it is squared, in fp32; batches are added in fp64 on the CPU.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.scatter = torch.zeros((), dtype=torch.float64)  # [C], after the first batch

    def add(self, rows: Tensor) -> None:
        """Take in rows [N, C]."""
        rows, new = rows.float(), len(rows)
        if not new:
            return
        centre = rows.mean(0)
        scatter, mean = (rows - centre).square().sum(0).double().cpu(), centre.double().cpu()
        total, step = self.count + new, mean - self.mean
        self.scatter = self.scatter + scatter + step.square() * self.count * new / total
        self.mean, self.count = self.mean + step * new / total, total

    @property
    def variance(self) -> Tensor:
        """Sample variance of each column, [C]."""
        return self.scatter / max(self.count - 1, 1)

    @property
    def norm(self) -> Tensor:
        """L2 norm of each column over all rows, [C]."""
        return (self.scatter + self.count * self.mean.square()).sqrt()


@torch.no_grad()
def input_moments(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], groups: Sequence[PrunableGroup]
) -> dict[str, Moments]:
    """Read text with the dense model and note what reaches each gated linear; tokens under a padding mask do not count.

    Returns:
        Module path of the linear -> moments of its input columns.

    Raises:
        KoffError: There is no text, or not a second token.
    """
    moments = {group.gated: Moments() for group in groups}
    real: Tensor | None = None  # bool [B, T] of the batch being read

    def note(place: Moments) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: place.add(inputs[0].flatten(0, 1) if real is None else inputs[0][real])

    hooks = [model.get_submodule(path).register_forward_pre_hook(note(place)) for path, place in moments.items()]
    try:
        for batch in batches:
            inputs = inputs_of(batch, model.device)
            mask = inputs.get("attention_mask")
            real = None if mask is None else mask.bool()
            hidden_states(model, **inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if min(place.count for place in moments.values()) < 2:
        raise KoffError(NO_TEXT)
    return moments


def compensation(
    model: PreTrainedModel, read: Mapping[str, Moments], groups: Sequence[PrunableGroup], kept: Tensor
) -> Tensor:
    """FLAP's bias: the mean of what the removed columns contributed to each consumer, W_:removed mean(X_removed).

    Args:
        model: The dense backbone.
        read: From `input_moments`.
        groups: The units.
        kept: Hard mask, bool [U].

    Returns:
        fp32 [groups, d] on the CPU.

    Raises:
        KoffError: Some units are output channels, which nothing reads columns of.
    """
    if channels := sorted({group.kind for group in groups if not group.consumer}):
        raise KoffError(
            f"--compensate makes up for removed columns; sparsity.units has output channels ({', '.join(channels)}): "
            "give --compensate false"
        )
    biases = []
    for group, part in masks(groups, kept.cpu()):
        gone = ~part.repeat_interleave(group.width)  # [C_g]
        biases.append(_weight(model, group.consumer) @ (read[group.consumer].mean * gone))
    return torch.stack(biases).float()


# ---------------------------------------------------------------------------------------------------- formulas


def _magnitude(model: PreTrainedModel, group: PrunableGroup, read: None) -> Tensor:
    """L2 norm of all parameters of each unit, as places within the layer, [U_g]."""
    squares = _by_unit(group, _weight(model, group.consumer).square().sum(0)) if group.consumer else 0
    for path, _ in group.producers:
        for parameter in (_weight(model, path), _linear(model, path).bias):
            if parameter is not None:
                squares = squares + parameter.double().cpu().view(group.size, -1).square().sum(1)
    return _places(squares.sqrt())


def _wanda_sp(model: PreTrainedModel, group: PrunableGroup, read: Moments) -> Tensor:
    """Sum of |W_ij| * ||X_j||_2 over a unit's columns, as places within the layer, [U_g]."""
    if not group.consumer:
        return _places(_weight(model, group.gated).abs() @ read.norm)
    return _places(_by_unit(group, read.norm * _weight(model, group.consumer).abs().sum(0)))


def _flap(model: PreTrainedModel, group: PrunableGroup, read: Moments) -> Tensor:
    """Var(X_j) * ||W_:j||_2^2, standardised over the layer's columns of this kind, mean over a unit's, [U_g]."""
    squares = _weight(model, group.gated).square()
    fluctuation = read.variance * squares.sum(0) if group.consumer else squares @ read.variance  # [C_g]
    deviation = fluctuation.std(correction=0).clamp(min=torch.finfo(torch.float64).tiny)
    return _by_unit(group, (fluctuation - fluctuation.mean()) / deviation) / group.width


def _fisher(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Any]], groups: Sequence[PrunableGroup]
) -> list[Tensor]:
    """Mean over rows of (d CE of the row / d gate)^2 at open gates, per parameter of the unit, [U_g] of each group.

    The empirical Fisher information of removing a unit, as the warm-up of a run collects it (gates.py); no memory here.
    """
    total, rows = [torch.zeros(group.size, dtype=torch.float64) for group in groups], 0
    for batch in batches:
        for place, slope in zip(total, _gate_slopes(model, batch, groups), strict=True):
            place += slope.double().square().sum(0).cpu()
        rows += len(batch["input_ids"])
    if not rows:
        raise KoffError(NO_TEXT)
    return [place / rows / group.params_per_unit for place, group in zip(total, groups, strict=True)]


def _gate_slopes(
    model: PreTrainedModel, batch: Mapping[str, Any], groups: Sequence[PrunableGroup]
) -> tuple[Tensor, ...]:
    """Gradient of each row's mean cross-entropy by its own gates, [B, U_g] of each group."""
    inputs = inputs_of(batch, model.device)
    labels = batch["labels"][:, 1:].to(model.device)  # [B, T - 1]
    gates = BackboneGates(list(groups)).to(model.device)
    handles = gates.attach(model)
    try:
        with torch.enable_grad():
            probe = gates.probe(len(labels))  # [B, U]
            gates.set(probe)
            hidden = hidden_states(model, **inputs)[:, :-1]  # [B, T - 1, d]
            predicted = labels != IGNORED
            weights = (predicted / predicted.sum(1, keepdim=True).clamp(min=1))[predicted]  # [N]
            head, spec = model.get_output_embeddings().weight.detach(), LossSpec(kl=0)
            loss, _, _ = head_loss(hidden[predicted], None, head, labels[predicted], weights, spec)
            (slopes,) = torch.autograd.grad(loss, probe)
            return slopes.split(gates.sizes, dim=1)
    finally:
        for handle in handles:
            handle.remove()


_SCORES = {"magnitude": _magnitude, "wanda_sp": _wanda_sp, "flap": _flap}


def _places(values: Tensor) -> Tensor:
    """The share of the group's units that are no more important, [U_g]: the lowest has 1 / U_g, the highest 1.

    A budget over such scores takes the same share from every layer and kind, as both methods do: what they compare is
    not on one scale across layers.
    """
    shares = (values.argsort(stable=True).argsort().double() + 1) / len(values)
    return shares.where(values.isfinite(), torch.nan)


def _by_unit(group: PrunableGroup, columns: Tensor) -> Tensor:
    """Sum over the columns of each unit: a kv group owns those of all its query heads, [C_g] -> [U_g]."""
    return columns.view(group.size, group.width).sum(1)


def _linear(model: PreTrainedModel, path: str) -> nn.Module:
    module = model.get_submodule(path)
    return getattr(module, "base_layer", module)  # without the adapters of a memory


def _weight(model: PreTrainedModel, path: str) -> Tensor:
    """Weight [out, in] in fp64 on the CPU, where differences of large sums are safe on any device."""
    return _linear(model, path).weight.detach().double().cpu()
