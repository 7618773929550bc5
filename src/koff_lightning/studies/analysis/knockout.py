"""What the two parts of a memory, LoRA adapter and KV slots, are worth alone and together."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import Tensor, nn

from koff_lightning.decomposition import Batch, Decomposition
from koff_lightning.lora import RoutedLinear
from koff_lightning.memory import MemoryBank
from koff_lightning.studies.analysis.scoring import Condition, own_memory, score

if TYPE_CHECKING:
    import pandas as pd

OFF = {"none": ("lora", "kv"), "lora": ("kv",), "kv": ("lora",), "both": ()}  # what stays on -> what is switched off


@contextmanager
def part_off(bank: MemoryBank, part: str) -> Iterator[None]:
    """Inside the block no row has one part of its memory: `lora` or `kv`.

    Rows are to be activated inside it: what was stacked for the last ones is not looked at again.
    """
    if part == "kv":
        slots, bank.kv = bank.kv, nn.ModuleDict()
    else:
        linears = [module for module in bank.model.modules() if isinstance(module, RoutedLinear)]
        scalings = [linear.scaling for linear in linears]
        for linear in linears:
            linear.scaling = {}
    try:
        yield
    finally:
        if part == "kv":
            bank.kv = slots
        else:
            for linear, scaling in zip(linears, scalings, strict=True):
                linear.scaling = scaling


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


def _without(bank: MemoryBank, parts: tuple[str, ...], inner: Condition) -> Callable[[Batch], Tensor]:
    """The condition that some parts are off."""
    if not parts:
        return inner

    def condition(batch: Batch) -> Tensor:
        with part_off(bank, parts[0]):
            return _without(bank, parts[1:], inner)(batch)

    return condition
