"""Cut removed units out of weights, adapters and KV memories: the masked model becomes physically smaller.

Pure functions from dictionaries of tensors to new ones; no module is touched. The cut model computes what the masked
one does, up to the rounding of shorter sums.

A tensor is assigned to a linear by its name: `<path>.weight` and `.bias`, and peft's `<path>.lora_A...weight` and
`.lora_B...weight` (as named in files or in modules), each with or without peft's prefix. Tensors of other modules, and
those of groups that lose nothing, are passed through as they are.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from koff_lightning.backbone import PrunableGroup
from koff_lightning.support.errors import KoffError

PEFT_PREFIX = "base_model.model."

State = dict[str, Tensor]
# Path of a linear (or layer of a KV memory) -> (dimension to cut: 0 rows, 1 columns; bool mask of those that stay).
_Plan = dict[str, tuple[int, Tensor]]


def masks(groups: Sequence[PrunableGroup], kept: Tensor) -> list[tuple[PrunableGroup, Tensor]]:
    """Each group with its own part of a hard mask.

    Args:
        groups: The units, as listed from the model that is cut.
        kept: Bool [U] over all units, in the order of the groups.

    Raises:
        KoffError: The mask has another number of units.
    """
    sizes = [group.size for group in groups]
    if kept.dtype != torch.bool or kept.shape != (sum(sizes),):
        raise KoffError(
            f"a hard mask of {sum(sizes)} units is wanted, got {kept.dtype} {list(kept.shape)}: mask and units belong "
            "to different models"
        )
    return list(zip(groups, kept.split(sizes), strict=True))


def whole_units(groups: Sequence[PrunableGroup], kept: Tensor) -> tuple[list[PrunableGroup], Tensor]:
    """The part of a mask that makes linears smaller: whole units, and neurons whose gate or up channel is closed.

    Closed channels of other linears are not among them: their rows stay, filled with zeros (`close_rows`).

    Args:
        groups: The units, as listed from the model that is cut.
        kept: Hard mask, bool [U].

    Returns:
        Groups of whole units and the hard mask over them; both as given if all groups are whole units.
    """
    found: dict[tuple[int, str], tuple[PrunableGroup, Tensor]] = {}
    for group, mask in masks(groups, kept):
        whole = group if group.consumer else group.whole
        if whole is not None:
            place = (whole.layer, whole.kind)
            found[place] = whole, mask & found[place][1] if place in found else mask
    parts = [mask for _, mask in found.values()]
    return [group for group, _ in found.values()], torch.cat(parts) if parts else kept[:0]


def physical(groups: Sequence[PrunableGroup], kept: Tensor) -> int:
    """Exact number of parameters by which the cut model is smaller; the nominal count is `Budget.report`.

    A neuron goes with all its weights if its gate or up channel is closed. Closed channels of other linears stay as
    zeros and do not count.
    """
    return sum(int((~mask).sum()) * group.params_per_unit for group, mask in masks(*whole_units(groups, kept)))


def close_rows(state: Mapping[str, Tensor], groups: Sequence[PrunableGroup], kept: Tensor) -> State:
    """Weights, biases and adapters with zeros in the rows of closed channels; shapes stay."""
    plan = {group.producers[0][0]: (0, mask) for group, mask in masks(groups, kept) if not group.consumer}
    return _edit(state, plan, _zero)


def cut_state(state: Mapping[str, Tensor], groups: Sequence[PrunableGroup], kept: Tensor) -> State:
    """Weights or adapters without the removed units, and with zeros in the rows of closed channels that stay.

    Args:
        state: Name -> tensor of the uncut model, or of a part of it.
        groups: The units, as listed from the model that is cut.
        kept: Hard mask, bool [U].

    Raises:
        KoffError: A tensor does not have the size of its units: it is cut already, or of another model.
    """
    return _edit(close_rows(state, groups, kept), _linears(groups, kept), _cut)


def zero_state(state: Mapping[str, Tensor], groups: Sequence[PrunableGroup], kept: Tensor) -> State:
    """The same with zeros where `cut_state` cuts; shapes stay."""
    return _edit(close_rows(state, groups, kept), _linears(groups, kept), _zero)


def with_bias(state: Mapping[str, Tensor], groups: Sequence[PrunableGroup], bias: Tensor) -> State:
    """Weights with `bias` added to the biases of the consumers, which get one if they have none.

    Args:
        state: Weights under the plain model's names.
        groups: The units, as listed from the model that is cut.
        bias: [groups, d], a row for each group's consumer.
    """
    biased = dict(state)
    for group, row in zip(groups, bias.cpu(), strict=True):
        name, dtype = f"{group.consumer}.bias", state[f"{group.consumer}.weight"].dtype
        biased[name] = (row + state[name].to(row) if name in state else row).to(dtype)
    return biased


def cut_kv(tensors: Mapping[str, Tensor], groups: Sequence[PrunableGroup], kept: Tensor) -> State:
    """A KV memory, `layers.{i}.key` and `layers.{i}.value` each [K, P, dh], without the removed kv heads."""
    return _edit(tensors, _heads(groups, kept), _cut)


def zero_kv(tensors: Mapping[str, Tensor], groups: Sequence[PrunableGroup], kept: Tensor) -> State:
    """The same with zeros in place of the removed kv heads."""
    return _edit(tensors, _heads(groups, kept), _zero)


def grow_state(state: Mapping[str, Tensor], groups: Sequence[PrunableGroup], held: Tensor) -> State:
    """The reverse of `cut_state`: weights or adapters in the uncut model's shapes, with zeros for units not in `held`.

    Raises:
        KoffError: A tensor has another size than the units that are held.
    """
    return _edit(state, _linears(groups, held), _grow, lambda mask: int(mask.sum()))


def grow_kv(tensors: Mapping[str, Tensor], groups: Sequence[PrunableGroup], held: Tensor) -> State:
    """The reverse of `cut_kv`: zeros for the kv heads not in `held`."""
    return _edit(tensors, _heads(groups, held), _grow, lambda mask: int(mask.sum()))


def plain_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Weights under the plain model's names, on the CPU: without adapters, and without the copies of tied ones."""
    tied = model.all_tied_weights_keys
    return {
        name.replace(".base_layer.", "."): tensor.detach().cpu()
        for name, tensor in model.state_dict().items()
        if name not in tied and ".lora_A." not in name and ".lora_B." not in name
    }


def merge_lora(state: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scaling: float) -> State:
    """Weights with an adapter merged into them: W + scaling * B A, summed in fp32 or better and rounded once.

    Args:
        state: Weights, of the same shapes that the adapter was made or cut for.
        adapter: `<path>.lora_A.weight` [r, in] and `<path>.lora_B.weight` [out, r] of every adapted linear.
        scaling: alpha / r.

    Raises:
        KoffError: The weights lack a linear of the adapter, or have it in another shape.
    """
    merged = dict(state)
    for name, down in adapter.items():
        path, side, _ = name.removeprefix(PEFT_PREFIX).partition(".lora_A")
        if not side:
            continue
        weight, up = merged.get(f"{path}.weight"), adapter[name.replace(".lora_A", ".lora_B")]
        if weight is None or weight.shape != (up.shape[0], down.shape[1]):
            raise KoffError(
                f"the adapter's {path} is {[up.shape[0], down.shape[1]]}, that of the weights is "
                f"{'missing' if weight is None else list(weight.shape)}: adapter and weights belong to different models"
            )
        dtype = torch.promote_types(weight.dtype, torch.float32)
        merged[f"{path}.weight"] = (weight.to(dtype) + scaling * (up.to(dtype) @ down.to(dtype))).to(weight.dtype)
    return merged


def _linears(groups: Sequence[PrunableGroup], kept: Tensor) -> _Plan:
    plan: _Plan = {}
    for group, mask in masks(*whole_units(groups, kept)):
        plan |= {path: (0, mask.repeat_interleave(rows)) for path, rows in group.producers}
        plan[group.consumer] = (1, mask.repeat_interleave(group.width))
    return plan


def _heads(groups: Sequence[PrunableGroup], kept: Tensor) -> _Plan:
    return {f"layers.{group.layer}": (0, mask) for group, mask in masks(groups, kept) if group.kind == "kv_group"}


def _edit(
    state: Mapping[str, Tensor],
    plan: _Plan,
    change: Callable[[Tensor, int, Tensor], Tensor],
    size: Callable[[Tensor], int] = len,
) -> State:
    """Apply `change` to each tensor of a planned linear along the planned dimension, which has `size(mask)` entries.

    Tensors that lack this dimension stay: A [r, in] has no rows of units, B [out, r] and a bias [out] no columns.
    """
    edited = {}
    for name, tensor in state.items():
        path, part = _owner(name, plan)
        edited[name] = tensor
        if not path:
            continue
        dim, mask = plan[path]
        lacks = (part[0] == "lora_B" or part[-1] == "bias") if dim else part[0] == "lora_A"
        if lacks or mask.all():
            continue
        if tensor.shape[dim] != size(mask):
            raise KoffError(
                f"{name} has {tensor.shape[dim]} {'columns' if dim else 'rows'}, its units have {size(mask)}: it is "
                "cut already, or mask and weights belong to different models"
            )
        edited[name] = change(tensor, dim, mask.to(tensor.device))
    return edited


def _owner(name: str, plan: _Plan) -> tuple[str, list[str]]:
    """The path in the plan that a tensor's name begins with (or ""), and the rest of the name, split at its dots."""
    whole = path = name.removeprefix(PEFT_PREFIX)
    while path and path not in plan:
        path = path.rpartition(".")[0]
    return path, whole[len(path) + 1 :].split(".")


def _cut(tensor: Tensor, dim: int, mask: Tensor) -> Tensor:
    return tensor.detach().index_select(dim, mask.nonzero()[:, 0])


def _zero(tensor: Tensor, dim: int, mask: Tensor) -> Tensor:
    return tensor.detach().index_fill(dim, (~mask).nonzero()[:, 0], 0)


def _grow(tensor: Tensor, dim: int, mask: Tensor) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = len(mask)
    return tensor.new_zeros(shape).index_copy_(dim, mask.nonzero()[:, 0], tensor.detach())
