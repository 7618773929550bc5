"""Where the adapters of a memory sit, and what a memory says: the tokens that it makes likelier."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from koff_lightning.backbone import layer_of
from koff_lightning.decomposition import Batch, Decomposition
from koff_lightning.studies.analysis.scoring import moved

if TYPE_CHECKING:
    import pandas as pd


@torch.no_grad()
def adapter_norms(module: Decomposition) -> "pd.DataFrame":
    """Size of what each adapter adds to each linear.

    Returns:
        One line per domain and adapted linear: `domain`, `layer`, `linear` (its name in the layer), `norm` (Frobenius,
        of (alpha / r) B A) and `relative` (to the frozen weight's).
    """
    import pandas as pd

    rows = []
    for domain in module.memories.domains:
        lora, weights = module.memories.lora(domain), module.memories.weights(domain)
        for path in dict.fromkeys(name.rpartition(".lora_")[0] for name in weights):
            down, up = (weights[f"{path}.lora_{half}.weight"].double() for half in "AB")  # [r, in], [out, r]
            norm = ((up.mT @ up) * (down @ down.mT)).sum().clamp(min=0).sqrt() * lora.alpha / lora.rank  # of B A
            frozen = module.backbone.get_submodule(path).base_layer.weight.float().norm()
            about = {"domain": domain, "layer": layer_of(path), "linear": path.rpartition(".")[2]}
            rows.append(about | {"norm": float(norm), "relative": float(norm / frozen)})
    return pd.DataFrame(rows, columns=["domain", "layer", "linear", "norm", "relative"])


@torch.no_grad()
def promoted_tokens(
    module: Decomposition, batches: Iterable[Batch], tokenizer: PreTrainedTokenizerBase, count: int = 10
) -> "pd.DataFrame":
    """A glimpse of what a memory adds: the tokens nearest to the mean change of the last hidden state (logit lens).

    Args:
        module: From `open_run`.
        batches: Held-out text; rows of domains without a memory are passed over.
        tokenizer: Tokenizer of the backbone.
        count: Tokens on either side.

    Returns:
        One line per domain and rank: `domain`, `rank` from 1, `promoted` and `suppressed`, tokens as text, with how
        much their logits rise, `promoted_by`, and fall, `suppressed_by`.
    """
    import pandas as pd

    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    mask = module.hard_gates()
    for batch in batches:
        here = moved(batch, module)
        memories = [name if name in module.memories.domains else None for name in batch["domains"]]
        states = []
        for rows in (memories, [None] * len(memories)):
            with module.under(rows, mask):
                states.append(module.hidden(here))  # [B, T, d]
        counted = here["labels"] != -100
        for row, name in enumerate(memories):
            if name is not None:
                change = (states[0][row] - states[1][row])[counted[row]].double().sum(0).cpu()  # [d]
                sums[name] = sums.get(name, 0) + change
                counts[name] = counts.get(name, 0) + int(counted[row].sum())
    head, rows = module.head.detach().cpu().double(), []
    for name, total in sums.items():
        logits = head @ (total / counts[name])  # [V]
        best, worst = logits.topk(count), (-logits).topk(count)
        for rank, (up, down) in enumerate(zip(best.indices.tolist(), worst.indices.tolist(), strict=True)):
            words = {"promoted": tokenizer.decode([up]), "suppressed": tokenizer.decode([down])}
            by = {"promoted_by": float(best.values[rank]), "suppressed_by": float(worst.values[rank])}
            rows.append({"domain": name, "rank": rank + 1} | words | by)
    return pd.DataFrame(rows, columns=["domain", "rank", "promoted", "suppressed", "promoted_by", "suppressed_by"])
