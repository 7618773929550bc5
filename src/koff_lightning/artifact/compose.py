"""Two memories made into one, without training. An experiment: neither part has ever met the other.

What it computes, for memories a and b with weights w_a and w_b:

*   LoRA: the update of every linear is w_a (alpha_a / r_a) B_a A_a + w_b (alpha_b / r_b) B_b A_b, exactly, as one
    adapter of rank r_a + r_b; the same as peft's `add_weighted_adapter` with `combination_type="cat"`.
*   KV memory: the slots of both, P_a + P_b of them, each with the key and value that it has, so at the position that it
    has: the two lie over one window before the text, and one softmax shares the attention out among them. The weights
    have no part in it, and it makes no difference which memory comes first. Source: Cartridges (arXiv 2506.06266),
    which joins memories by concatenation.

A memory that lacks one of the parts adds nothing to that part.
"""

import math

import torch
from torch import Tensor

from koff_lightning.kv_memory import KVMemory
from koff_lightning.memory import MemoryBank
from koff_lightning.placement import placed, shown
from koff_lightning.specs.memories import LoraSpec
from koff_lightning.support.errors import KoffError


def compose(bank: MemoryBank, a: str, b: str, as_: str, weights: tuple[float, float] = (0.5, 0.5)) -> None:
    """Add to a bank the memory that two of its memories make together (see above); they stay as they are.

    Args:
        bank: Holds both.
        a: Domain of the first.
        b: Domain of the second.
        as_: Domain of the new one.
        weights: Weights of the two adapters.

    Raises:
        KoffError: One of them is not there or is the other, the name is unsafe or taken, a weight is no number, their
            slots lie in unlike layers, or rank or slots of the two together are too many.
    """
    if a == b or bank.shared:
        raise KoffError(f"two memories are wanted, got {a!r} and {b!r}, which are one: name different domains")
    if not all(math.isfinite(weight) for weight in weights):
        raise KoffError(f"weights must be finite numbers, got {weights[0]} and {weights[1]}")
    spec, matrices = _lora(bank, {a: weights[0], b: weights[1]})
    slots = {name: bank.slots(name) for name in (a, b) if bank.slots(name) is not None}
    if len({tuple(memory.layers) for memory in slots.values()}) > 1:
        where = " and ".join(f"{shown(memory.layers)} ({name})" for name, memory in slots.items())
        raise KoffError(f"KV slots in unlike layers cannot be joined: {where}; take memories of one kv.layers")
    parts = [memory.tensors() for memory in slots.values()]
    joined = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]} if parts else None
    bank.add(as_, spec, joined and KVMemory.from_tensors(joined, depth=bank.depth), matrices)


def _lora(bank: MemoryBank, weights: dict[str, float]) -> tuple[LoraSpec | None, dict[str, Tensor] | None]:
    """The adapters' weighted sum as one adapter with alpha equal to its rank."""
    specs = {domain: bank.lora(domain) for domain in weights}
    specs = {domain: spec for domain, spec in specs.items() if spec is not None}
    if not specs:
        return None, None
    rank = sum(spec.rank for spec in specs.values())
    targets = list(dict.fromkeys(target for spec in specs.values() for target in spec.targets))
    layers = sorted({layer for spec in specs.values() for layer in placed(spec.layers, bank.depth)})
    joint = LoraSpec(rank, float(rank), targets, layers)
    joined: dict[str, Tensor] = {}  # zeros where a memory has no adapter
    for path in bank.paths(joint):
        linear = bank.model.get_submodule(path)
        joined[f"{path}.lora_A.weight"] = torch.zeros(rank, linear.in_features, device=bank.model.device)
        joined[f"{path}.lora_B.weight"] = torch.zeros(linear.out_features, rank, device=bank.model.device)
    start = 0
    for domain, spec in specs.items():
        for name, matrix in bank.weights(domain).items():
            dim = 0 if "lora_A" in name else 1  # A [r, in], B [out, r]
            factor = weights[domain] * spec.alpha / spec.rank if dim == 0 else 1.0
            joined[name].narrow(dim, start, spec.rank).copy_(factor * matrix)
        start += spec.rank
    return joint, joined
