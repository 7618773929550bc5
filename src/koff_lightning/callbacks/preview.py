"""Preview: what a run is about to do, shown before the first step of `koff fit --dry-run`."""

from collections import Counter
from itertools import islice, pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from koff_lightning.module import KOFFModule

BATCHES = 16  # that are looked at
SHOWN = 72  # characters of text


class Preview(Callback):
    """Prints the parameter budget and how text lies in rows. Goes with `fast_dev_run`, which writes nothing."""

    def on_fit_start(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Print, once the model and the data are there."""
        if trainer.is_global_zero:
            batches = list(islice(iter(trainer.datamodule.train_dataloader()), BATCHES))
            print("\n".join(["", *budget(pl_module), "", *rows(batches, trainer.datamodule.tokenizer), ""]), flush=True)


def budget(module: KOFFModule) -> list[str]:
    """Parameters of each kind: frozen, to be removed, trained. A line each."""
    sizes, spec = module.budget.denominators, module.sparsity
    names = {f"LoRA of {d}": module.memories.lora_parameters(d) for d in module.domains}
    names |= {f"KV memory of {d}": module.memories.kv_parameters(d) for d in module.domains}
    if module.learns_mask:
        names |= {"mask": [module.gates.logits]}
    lines = [
        f"backbone  {module.source}: {sizes['total']:,} parameters, frozen; {sizes['body']:,} in its layers",
        f"to remove {round(spec.target * sizes[spec.denominator]):,}: {100 * spec.target:g} % of {spec.denominator} "
        f"({sizes['units']:,} are in the {module.gates.logits.numel():,} units that can go)",
    ]
    trained = [(name, sum(p.numel() for p in tensors)) for name, tensors in names.items()]
    return lines + [f"trained   {size:>13,}  {name}" for name, size in trained if size]


def rows(batches: list[dict[str, Any]], tokenizer: Any) -> list[str]:
    """Shares of the domains, filling and cuts of training rows, and the first row of each domain with its documents."""
    domains: Counter[str] = Counter()
    first: dict[str, list[torch.Tensor]] = {}
    used = size = segments = 0
    for batch in batches:
        for row, domain in enumerate(batch["domains"]):
            parts = _segments(batch, row)
            domains[domain] += 1
            first.setdefault(domain, parts)
            used, size = used + sum(map(len, parts)), size + batch["input_ids"].shape[1]
            segments += len(parts)
    total = domains.total()
    lines = [
        f"first {total} training rows of {size // total} tokens: {100 * used / size:.1f} % full, "
        f"{segments / total:.1f} documents or pieces of documents in each",
        f"domains   {', '.join(f'{name} {100 * count / total:.0f} %' for name, count in domains.items())}",
    ]
    for domain, parts in first.items():
        texts = [_shown(tokenizer.decode(part.tolist()), SHOWN) for part in parts[:3]]
        more = [f"... and {len(parts) - 3} more"] if len(parts) > 3 else []
        lines += [f"a row of {domain}:", *(f"  {len(p):>5} | {t}" for p, t in zip(parts, texts, strict=False))]
        lines += [f"        {text}" for text in more]
    return lines


def _segments(batch: dict[str, Any], row: int) -> list[torch.Tensor]:
    """The documents, or pieces of them, of one row, as token ids; padding is not one."""
    ids, labels = batch["input_ids"][row], batch["labels"][row]
    positions = batch["position_ids"][row] if batch.get("position_ids") is not None else torch.arange(len(ids))
    starts = [*(positions == 0).nonzero()[:, 0].tolist(), len(ids)]
    spans = [(start, end) for start, end in pairwise(starts) if (labels[start:end] >= 0).any()]
    return [ids[start:end] for start, end in spans]


def _shown(text: str, width: int) -> str:
    """Beginning and end of a text in one line; what is left out shows as ' ... '."""
    text = repr(text)[1:-1]
    return text if len(text) <= width else f"{text[: width // 2 - 2]} ... {text[-width // 2 + 3 :]}"
