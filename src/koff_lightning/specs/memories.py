"""What a domain's memory is made of: the options of its LoRA adapter and of its key-value memory."""

import math
from dataclasses import dataclass, field
from typing import Literal

from koff_lightning.placement import ALL, check_words
from koff_lightning.specs.kinds import check_values
from koff_lightning.support.errors import KoffError
from koff_lightning.units import LORA_TARGETS

MAX_SLOTS = 8192  # the largest memory that was studied (Cartridges)


@dataclass
class LoraSpec:
    """One LoRA adapter per domain.

    Args:
        rank: Rank r of the update B A.
        alpha: Numerator of the scale alpha / r; the paper's r 256 and alpha 128 halve the update B A.
        targets: Linears that get an adapter.
        layers: Layers that get one: all, top:18, top:64%, or a list of numbers from 0.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: list[str] = field(default_factory=lambda: list(LORA_TARGETS))
    layers: list[int] | str = ALL

    def __post_init__(self) -> None:
        check_values(self, "lora")
        if not 1 <= self.rank <= 1024:
            raise KoffError(
                f"lora.rank must be between 1 and 1024; got {self.rank} (set model.lora to null for no LoRA)"
            )
        if not 0 < self.alpha < math.inf:
            raise KoffError(f"lora.alpha must be positive and finite; got {self.alpha}")
        unknown = sorted(set(self.targets) - set(LORA_TARGETS))
        if unknown or not self.targets:
            raise KoffError(
                f"lora.targets must be some of {', '.join(LORA_TARGETS)}; got {', '.join(unknown) or 'none'}"
            )
        check_words(self.layers, "lora.layers")


@dataclass
class KVSpec:
    """One learned key-value memory per domain.

    Args:
        slots: Number P of key-value pairs per kv head and layer.
        layers: Layers that get them: all, top:18, top:64%, or a list of numbers from 0.
        init: What they start from: the domain's own text as the model reads it, or normal noise.
        std: Standard deviation of the noise.
        frozen_first: Keep slot 0 as it starts; else it is trained like the others.
    """

    slots: int = 16
    layers: list[int] | str = ALL
    init: Literal["text", "normal"] = "text"
    std: float = 0.02
    frozen_first: bool = True

    def __post_init__(self) -> None:
        check_values(self, "kv")
        least = 1 + self.frozen_first
        if not least <= self.slots <= MAX_SLOTS:
            why = " (slot 0 is frozen)" if self.frozen_first else ""
            raise KoffError(
                f"kv.slots must be between {least} and {MAX_SLOTS}{why}; got {self.slots} (null for no KV memory)"
            )
        if not 0 < self.std < math.inf:
            raise KoffError(f"kv.std must be positive and finite; got {self.std}")
        check_words(self.layers, "kv.layers")
