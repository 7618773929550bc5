"""What the two parts of a memory, LoRA adapter and KV slots, are worth alone and together."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from torch import Tensor

from koff_lightning.decomposition import Batch, Decomposition
from koff_lightning.memory import MemoryBank, Part
from koff_lightning.studies.analysis.scoring import Condition, own_memory, score

if TYPE_CHECKING:
    import pandas as pd

# What stays on -> what is switched off.
OFF: dict[str, tuple[Part, ...]] = {"none": ("lora", "kv"), "lora": ("kv",), "kv": ("lora",), "both": ()}


def knockout(module: Decomposition, batches: Iterable[Batch]) -> "pd.DataFrame":
    """Score every domain's text with its own memory, with one part of it, and without.

    Args:
        module: From `open_run`.
        batches: Held-out text.

    Returns:
        Bits per byte, one line per domain: `none`, `lora` (the adapter alone), `kv` (the slots alone), `both`, and
        `synergy`, by how much both together gain more than the sum of what each gains alone.
    """
    whole = own_memory(module)
    table = score(batches, {name: _without(module.memories, parts, whole) for name, parts in OFF.items()})
    gains = {name: table["none"] - table[name] for name in OFF}
    return table.assign(synergy=gains["both"] - gains["lora"] - gains["kv"])


def _without(bank: MemoryBank, parts: Iterable[Part], inner: Condition) -> Condition:
    """The condition that some parts are off."""

    def condition(batch: Batch) -> Tensor:
        with ExitStack() as stack:
            for part in parts:
                stack.enter_context(bank.closed(part))
            return inner(batch)

    return condition
