"""What each domain's memory is worth on every domain's text."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from koff_lightning.decomposition import Batch, Decomposition
from koff_lightning.studies.analysis.scoring import dense, score, under
from koff_lightning.support.errors import KoffError

if TYPE_CHECKING:
    import pandas as pd


CALLED = {"dense": "without a mask", "none": "without a memory"}  # the columns that are no memory's


@dataclass(frozen=True)
class Transfer:
    """Bits per byte of each domain's text (lines) under `dense`, `none` and each memory (columns).

    Attributes:
        bpb: The table.
        bytes_per_token: Of each domain's text; None where only `bpb` is known.
    """

    bpb: "pd.DataFrame"
    bytes_per_token: "pd.Series | None" = None

    @property
    def perplexity(self) -> "pd.DataFrame":
        """The same table as perplexities per token, the paper's measure, which depend on the tokenizer."""
        return (2.0 ** self.bpb.mul(self.bytes_per_token, axis=0).clip(upper=1000.0)).rename_axis("domain")

    @property
    def memories(self) -> list[str]:
        """Names of the memories."""
        return [name for name in self.bpb.columns if name not in CALLED]

    @property
    def by_domain(self) -> "pd.Series":
        """Of each domain with a memory: bits per byte under the others' memories, on average, less those under its own.

        Empty where there are not two memories.
        """
        import pandas as pd

        own = [name for name in self.bpb.index if name in self.memories and len(self.memories) > 1]
        gains = [self.bpb.loc[d, [m for m in self.memories if m != d]].mean() - self.bpb.loc[d, d] for d in own]
        return pd.Series(gains, index=pd.Index(own, name="domain"), name="advantage", dtype=float)

    @property
    def advantage(self) -> float:
        """Diagonal advantage: the mean of `by_domain`; positive when memories are specific to their domains."""
        return float(self.by_domain.mean())

    def zscores(self) -> "pd.DataFrame":
        """Bits per byte under the memories, standardised within each domain's line; 0 where a line does not vary."""
        part = self.bpb[self.memories]
        spread = part.std(axis=1, ddof=0)
        return part.sub(part.mean(axis=1), axis=0).div(spread.where(spread > 0, 1.0), axis=0)

    def linkage(self) -> NDArray[np.float64]:
        """Average-linkage tree of the memories by what they do to all text (scipy's format), [memories - 1, 4].

        Memories are compared by their columns of `zscores`, Euclidean.

        Raises:
            KoffError: Fewer than two memories.
        """
        from scipy.cluster.hierarchy import linkage
        from scipy.spatial.distance import pdist

        if len(self.memories) < 2:
            raise KoffError(f"memories are grouped from two on; there is {', '.join(self.memories) or 'none'}")
        return linkage(pdist(self.zscores().T.to_numpy()), method="average", optimal_ordering=True)

    def order(self) -> list[str]:
        """The memories as the leaves of the tree lie, like ones beside each other."""
        from scipy.cluster.hierarchy import leaves_list

        if len(self.memories) < 2:
            return self.memories
        return [self.memories[leaf] for leaf in leaves_list(self.linkage())]


def transfer(module: Decomposition, batches: Iterable[Batch]) -> Transfer:
    """Score every domain's held-out text under every memory, under none, and with the dense model.

    Args:
        module: From `open_run`.
        batches: Held-out text.

    Raises:
        KoffError: A domain has the name of another column.
    """
    if clash := sorted(CALLED.keys() & set(module.memories.domains)):
        raise KoffError(
            f"a domain is called {clash[0]!r}, which is what the table calls the model {CALLED[clash[0]]}: give it "
            "another name"
        )
    memories = {name: under(module, name) for name in module.memories.domains}
    batches = list(batches)
    bpb = score(batches, {"dense": dense(module), "none": under(module, None)} | memories)
    return Transfer(bpb, _bytes_per_token(batches))


def _bytes_per_token(batches: Sequence[Batch]) -> "pd.Series":
    """UTF-8 bytes of each domain's text over the tokens that are predicted in it."""
    import pandas as pd

    size, tokens = Counter(), Counter()
    for batch in batches:
        predicted = Decomposition.targets(batch)[1].sum(1).tolist()  # [B]
        for domain, count, bytes_ in zip(batch["domains"], predicted, batch["num_bytes"].tolist(), strict=True):
            size[domain] += bytes_
            tokens[domain] += count
    return pd.Series({domain: size[domain] / max(count, 1) for domain, count in tokens.items()}, dtype=float)
