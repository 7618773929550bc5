"""Put the removed specialists of one domain back, and see who profits.

If what they knew has moved into the domain's memory, they help its text while the memory is off and hardly while it is
on. Any neuron that comes back helps a little, so as many other removed neurons of the same layers are the control.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from koff_lightning.decomposition import Batch, Decomposition
from koff_lightning.studies.analysis.masks import mask_of
from koff_lightning.studies.analysis.scoring import Condition, own_memory, score, under
from koff_lightning.support.errors import KoffError
from koff_lightning.units import NEURONS

if TYPE_CHECKING:
    import pandas as pd

Bools, Ints = NDArray[np.bool_], NDArray[np.integer]


@contextmanager
def reinserted(module: Decomposition, neurons: Bools) -> Iterator[None]:
    """Inside the block these neurons (bool [N]) are kept as well, gate and up, as they are in the dense model."""
    gates = module.gates
    before = gates.kept.clone()
    for kind in NEURONS:
        own = torch.cat([torch.full((g.size,), g.kind == kind) for g in gates.groups]).to(before.device)  # bool [U]
        if own.any():
            gates.kept[own] |= torch.from_numpy(neurons).to(before.device)
    try:
        yield
    finally:
        gates.kept.copy_(before)


def reinsertion(
    module: Decomposition,
    assigned: Bools,
    domains: Sequence[str],
    batches: Sequence[Batch],
    controls: int = 3,
    seed: int = 0,
) -> "pd.DataFrame":
    """Re-insert the removed specialists of each domain in turn.

    Args:
        module: From `open_run`.
        assigned: Which neurons are specific to which domain, bool [N, D] (`Specialists.assigned`).
        domains: Names of the D domains.
        batches: Held-out text, of these domains at least.
        controls: Random sets to compare with.
        seed: Seed of these sets.

    Returns:
        One line per domain: `domain`; `neurons` put back, how many of its specialists were removed; bits per byte of
        its text with memories off (`off_before`, `off_after`, and `off_control`, the mean over random sets) and with
        its own memory (`on_before`, `on_after`, `on_control`); `others_gain`, by how much less the other
        domains' text takes with memories off. Figures are nan where nothing was removed, the control's also where no
        others are left.

    Raises:
        KoffError: A domain without held-out text, or specialists of another model.
    """
    import pandas as pd

    mask = mask_of(module)
    if assigned.shape != (len(mask.removed), len(domains)):
        raise KoffError(
            f"specialists of {list(assigned.shape)} neurons and domains for a model of {len(mask.removed)} neurons and "
            f"{len(domains)} domains: give those of this model"
        )
    batches, random = list(batches), np.random.default_rng(seed)
    conditions = {"off": under(module, None), "on": own_memory(module)}
    before = score(batches, conditions)
    if missing := [name for name in domains if name not in before.index]:
        raise KoffError(f"domain {missing[0]!r} has no held-out text: give some, or leave the domain out")
    rows = []
    for place, domain in enumerate(domains):
        back = mask.removed & assigned[:, place]
        others = mask.removed & ~assigned[:, place]
        row = {"domain": domain, "neurons": int(back.sum())}
        row |= {f"{arm}_before": before.loc[domain, arm] for arm in conditions}
        if back.any():
            after = _scored(module, back, batches, conditions)
            row |= {f"{arm}_after": after.loc[domain, arm] for arm in conditions}
            row["others_gain"] = (before["off"] - after["off"]).drop(domain).mean()
            sets = [_alike(back, others, mask.layer, random) for _ in range(controls)]
            own = [batch for batch in batches if domain in batch["domains"]]
            tables = [_scored(module, each, own, conditions) for each in sets if each is not None]
            row |= {f"{arm}_control": _mean([table.loc[domain, arm] for table in tables]) for arm in conditions}
        rows.append(row)
    names = ["domain", "neurons"] + [f"{arm}_{when}" for arm in conditions for when in ("before", "after", "control")]
    return pd.DataFrame(rows).reindex(columns=[*names, "others_gain"])


def _scored(
    module: Decomposition, neurons: Bools, batches: Sequence[Batch], conditions: dict[str, Condition]
) -> "pd.DataFrame":
    with reinserted(module, neurons):
        return score(batches, conditions)


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _alike(wanted: Bools, pool: Bools, layer: Ints, random: np.random.Generator) -> Bools | None:
    """As many neurons of each layer as are wanted, from the pool, bool [N]; None where a layer has too few."""
    chosen = np.zeros_like(wanted)
    for number in np.unique(layer[wanted]):
        count, free = int((wanted & (layer == number)).sum()), np.flatnonzero(pool & (layer == number))
        if len(free) < count:
            return None
        chosen[random.choice(free, count, replace=False)] = True
    return chosen
