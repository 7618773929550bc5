"""How much the pruned model's view of text is still the dense model's: CKA, shared neighbours, class centroids.

The paper's appendix B compares embeddings of the dense and the pruned model with memories off. Here an embedding is the
mean last hidden state of a row of held-out text.

Letters: R rows of text, d hidden, K neighbours.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from koff_lightning.decomposition import Batch, Decomposition
from koff_lightning.studies.analysis.scoring import moved
from koff_lightning.studies.bootstrap import AT_ONCE, RESAMPLES
from koff_lightning.support.errors import KoffError

if TYPE_CHECKING:
    import pandas as pd

NEIGHBOURS = 10


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two embeddings of the same rows, [R, d] each (Kornblith et al., ICML 2019)."""
    x, y = (values.double() - values.double().mean(0) for values in (x, y))
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def shared_neighbours(x: Tensor, y: Tensor, k: int = NEIGHBOURS) -> float:
    """Mean share of a row's K nearest rows, by cosine, that are the same in both embeddings, [R, d] each."""
    near = [_nearest(values.double(), k) for values in (x, y)]  # bool [R, R] each
    return float((near[0] & near[1]).sum() / near[0].sum())


def _nearest(x: Tensor, k: int) -> Tensor:
    x = torch.nn.functional.normalize(x, dim=1)
    alike = (x @ x.T).fill_diagonal_(-torch.inf)  # [R, R]
    return torch.zeros_like(alike, dtype=torch.bool).scatter_(1, alike.topk(k, dim=1).indices, True)


def centroid_cosine(x: Tensor, y: Tensor, classes: Sequence[str]) -> float:
    """Mean over classes of the cosine between a class's mean embedding in either model, [R, d] each."""
    cosines = []
    for name in dict.fromkeys(classes):
        rows = torch.tensor([other == name for other in classes])
        cosines.append(torch.cosine_similarity(x[rows].double().mean(0), y[rows].double().mean(0), dim=0))
    return float(torch.stack(cosines).mean())


@torch.no_grad()
def embedded(module: Decomposition, batches: Sequence[Batch], view: str) -> Tensor:
    """Mean last hidden state of each row, [R, d]: `dense`, `memory_off` (mask alone) or `koff` (its own memory)."""
    have, means = set(module.memories.domains), []
    for batch in batches:
        batch = moved(batch, module)
        own = [domain if domain in have and view == "koff" else None for domain in batch["domains"]]
        with module.under(own, None if view == "dense" else module.hard_gates()):
            hidden = module.hidden(batch).float()  # [B, T, d]
        real = (batch["labels"] != -100).unsqueeze(-1)  # [B, T, 1]
        means.append(((hidden * real).sum(1) / real.sum(1).clamp(min=1)).cpu())
    return torch.cat(means)


def resampled(x: Tensor, y: Tensor, classes: Sequence[str], k: int = NEIGHBOURS) -> Tensor:
    """The three measures over rows drawn within their classes, [RESAMPLES, 3]; the same draws for the same classes.

    Neighbours are those among all rows: of drawn ones, copies of a row would be its nearest.

    Args:
        x: Embeddings, [R, d].
        y: Others of the same rows, [R, d'].
        classes: Class of each row.
        k: K.
    """
    x, y = x.double(), y.double()
    near = [_nearest(values, k) for values in (x, y)]
    shared = (near[0] & near[1]).double().sum(1) / k  # [R]
    grams = [values @ values.T for values in (x, y)]  # [R, R] each
    names, random, parts = list(dict.fromkeys(classes)), np.random.default_rng(0), []
    members = [np.array([name == other for other in classes]) for name in names]
    step = max(1, AT_ONCE // len(x))
    for first in range(0, RESAMPLES, step):
        times = np.zeros((min(step, RESAMPLES - first), len(x)))  # [r, R]
        for rows in members:
            times[:, rows] = random.multinomial(rows.sum(), np.full(rows.sum(), 1 / rows.sum()), len(times))
        weights = torch.from_numpy(times)
        x_y, x_x, y_y = (_alignment(weights, grams[i], grams[j]) for i, j in ((0, 1), (0, 0), (1, 1)))
        cosines = [_centroids(weights[:, rows], x[rows], y[rows]) for rows in map(torch.from_numpy, members)]
        measures = x_y / (x_x * y_y).sqrt(), weights @ shared / len(x), torch.stack(cosines).mean(0)
        parts.append(torch.stack(measures, 1))
    return torch.cat(parts)


def _alignment(weights: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Sum of products of two Gram matrices [R, R], centred over rows that count `weights` [r, R] times, [r]."""
    size = weights.sum(1)
    ones, others = weights @ one, weights @ other  # [r, R]
    inner = ((weights @ (one * other)) * weights).sum(1)
    cross = (weights * ones * others).sum(1)
    return inner - 2 * cross / size + (ones * weights).sum(1) * (others * weights).sum(1) / size**2


def _centroids(weights: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Cosine of the mean embeddings of rows [n, d] that count `weights` [r, n] times, [r]."""
    return torch.cosine_similarity(weights @ x, weights @ y, dim=1)


def similarity(module: Decomposition, batches: Sequence[Batch], k: int = NEIGHBOURS) -> dict[str, "pd.DataFrame"]:
    """Compare the mask alone, and the mask under each row's own memory, with the dense model.

    Args:
        module: Opened.
        batches: Held-out text.
        k: K.

    Returns:
        `similarity`, a line for each view: rows, cka, neighbours, centroids; one is the dense model itself. And
        `similarity_draws`, the same of the mask alone over rows drawn anew, a line for each draw.

    Raises:
        KoffError: Fewer rows than neighbours.
    """
    import pandas as pd

    classes = [domain for batch in batches for domain in batch["domains"]]
    if len(classes) <= k:
        raise KoffError(f"similarity needs more than {k} rows of held-out text, got {len(classes)}")
    dense = embedded(module, batches, "dense")
    lines, drawn = [], None
    for view in ("memory_off", "koff"):
        x = embedded(module, batches, view)
        drawn = resampled(dense, x, classes, k) if drawn is None else drawn
        about = {"view": view, "rows": len(x), "cka": linear_cka(dense, x)}
        lines.append(
            about | {"neighbours": shared_neighbours(dense, x, k), "centroids": centroid_cosine(dense, x, classes)}
        )
    draws = pd.DataFrame(drawn.numpy(), columns=["cka", "neighbours", "centroids"])
    return {"similarity": pd.DataFrame(lines), "similarity_draws": draws}
