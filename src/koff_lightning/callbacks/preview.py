"""Preview: what a run is about to do, shown by `koff fit --dry-run` before any weight is loaded."""

from collections import Counter
from itertools import islice, pairwise
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer

from koff_lightning.backbone import without_weights
from koff_lightning.data import DomainDataModule
from koff_lightning.decomposition import price
from koff_lightning.loading import load_config
from koff_lightning.memory import MemoryBank
from koff_lightning.training.module import KOFFModule

BATCHES = 16  # that are looked at
SHOWN = 72  # characters of text


class Preview(Callback):
    """Prints the parameter budget and how text lies in rows. Goes with `fast_dev_run`, which writes nothing."""

    def setup(self, trainer: Trainer, pl_module: KOFFModule, stage: str) -> None:
        """Print, once the data is there; the model is built after this."""
        if stage == "fit" and trainer.is_global_zero:
            data = trainer.datamodule
            batches = list(islice(iter(data.train_dataloader()), BATCHES))
            lines = ["", *budget(pl_module), "", *rows(batches, data.tokenizer), cuts(data), ""]
            print("\n".join(lines), flush=True)


def budget(module: KOFFModule) -> list[str]:
    """Parameters of each kind: frozen, to be removed, trained. A line each; counted without weights."""
    config = load_config(module.source, **{k: v for k, v in module.loading.items() if k != "dtype"})
    model, spec = without_weights(config), module.sparsity
    priced = price(model, module.sparsity)
    sizes, units = priced.denominators, priced.costs
    memories = MemoryBank(model, module.domains, module.lora, module.kv, module.shared_memory)
    names = {f"LoRA of {d}": memories.lora_parameters(d) for d in module.domains}
    names |= {f"KV memory of {d}": memories.kv_parameters(d) for d in module.domains}
    if module.learns_mask:
        names |= {"mask": [units]}  # a number each
    lines = [
        f"backbone  {module.source}: {sizes['total']:,} parameters, frozen; {sizes['body']:,} in its layers",
        f"to remove {round(spec.target * sizes[spec.denominator]):,}: {100 * spec.target:g} % of {spec.denominator} "
        f"({sizes['units']:,} are in the {len(units):,} units that can go)",
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


def cuts(data: DomainDataModule) -> str:
    """How many documents do not lie in one row."""
    found = ", ".join(f"{name} {cut} of {total}" for name, (cut, total) in data.cut_documents().items())
    return f"documents cut at the end of a row, to go on in another{' (in a sample)' * data.streaming}: {found}"


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
