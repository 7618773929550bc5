"""Bits per byte of every domain's held-out text under conditions of one's own making."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from koff_lightning.decomposition import Batch, Decomposition
from koff_lightning.metrics import BitsPerByte
from koff_lightning.support.errors import KoffError

if TYPE_CHECKING:
    import pandas as pd

Condition = Callable[[Batch], Tensor]


def score(batches: Iterable[Batch], conditions: Mapping[str, Condition]) -> "pd.DataFrame":
    """Measure held-out text under several conditions.

    Args:
        batches: As the data module gives them, with `num_bytes`.
        conditions: Name -> what gives the negative log-likelihood of each row of a batch in nats, [B].

    Returns:
        Bits per byte; one line per domain, in order of appearance, one column per condition.

    Raises:
        KoffError: There is no text.
    """
    import pandas as pd

    meters: dict[tuple[str, str], BitsPerByte] = {}
    for batch in batches:
        for name, condition in conditions.items():
            nats = condition(batch).cpu()  # [B]
            for row, domain in enumerate(batch["domains"]):
                meter = meters.setdefault((domain, name), BitsPerByte())
                meter.update(nats[row], batch["num_bytes"][row])
    if not meters:
        raise KoffError("there is no held-out text to score: give some")
    domains = dict.fromkeys(domain for domain, _ in meters)
    table = {name: [float(meters[domain, name].compute()) for domain in domains] for name in conditions}
    return pd.DataFrame(table, index=pd.Index(list(domains), name="domain"))


def under(module: Decomposition, memory: str | None) -> Condition:
    """The condition that all rows read one memory (None: no memory) under the mask."""
    return lambda batch: _nats(module, batch, [memory] * len(batch["domains"]))


def own_memory(module: Decomposition) -> Condition:
    """The condition that every row reads its own domain's memory under the mask; none where there is none."""
    have = set(module.memories.domains)
    return lambda batch: _nats(module, batch, [d if d in have else None for d in batch["domains"]])


def _nats(module: Decomposition, batch: Batch, memories: list[str | None]) -> Tensor:
    return module.row_nats(moved(batch, module) | {"domains": memories}, "koff")


def dense(module: Decomposition) -> Condition:
    """The condition of the dense model."""
    return lambda batch: module.row_nats(moved(batch, module), "dense")


def moved(batch: Batch, module: Decomposition) -> Batch:
    """The batch on the device of the model."""
    device = module.backbone.device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
