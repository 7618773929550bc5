"""What a run found out: the figures of `results.json` and their table."""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from torch import Tensor

from koff_lightning.artifact.folder import Manifest
from koff_lightning.decomposition import MODES, Decomposition
from koff_lightning.metrics import CONTEXT
from koff_lightning.support.files import write_atomically
from koff_lightning.support.mask_words import sparsity_lines
from koff_lightning.support.names import GENERAL
from koff_lightning.surgery import masks, whole_units

Figures = dict[str, Any]
Documents = dict[str, dict[str, dict[str, list[Any]]]]  # domain -> arm -> what `DocumentScores` counts, by document


def mask_and_size(model: Decomposition, extends: Manifest | None = None) -> Figures:
    """Hard counts of the mask in force, or of the artifact that is extended: sparsity, kept units, parameters."""
    mask = _mask(model) if extends is None else _mask_of_artifact(extends)
    memory = {domain: _stored_size(model, domain) for domain in model.domains}
    owner = {model.memories.names[domain]: size for domain, size in memory.items()}  # a shared memory is stored once
    backbone, stored = mask["parameters"]["backbone_kept"], mask["parameters"]["stored"]
    mask["parameters"] |= {
        "memory": memory,
        "active": backbone + max(memory.values()),
        "active_by_domain": {domain: backbone + size for domain, size in memory.items()},
        "stored": stored + sum(owner.values()),
    }
    return mask


def _stored_size(model: Decomposition, domain: str) -> int:
    """Parameters of one memory as it is stored: without those that only removed units would use."""
    bank = model.memories
    size, weights, slots = bank.size(domain), bank.weights(domain), bank.slots(domain)
    for group, kept in masks(*whole_units(model.gates.groups, model.hard_mask())):
        parts = [(path, "lora_B", 1, rows) for path, rows in group.producers]
        parts.append((group.consumer, "lora_A", 0, group.width))
        sides = [(weights.get(f"{path}.{half}.weight"), rank, width) for path, half, rank, width in parts]
        each = sum(width * matrix.shape[rank] for matrix, rank, width in sides if matrix is not None)
        if slots is not None and group.kind == "kv_group" and group.layer in slots.layers:
            each += 2 * slots.slots * slots.key[group.layer].shape[2]
        size -= each * int((~kept).sum())
    return size


def _mask(model: Decomposition) -> Figures:
    kept, spec = model.hard_mask(), model.sparsity
    backbone = model.budget.kept_parameters(kept) + model.added_parameters()
    return {
        "sparsity": {
            "target": spec.target,
            "denominator": spec.denominator,
            "hardened": bool(model.gates.hardened),
            **model.budget.report(kept),
            "by_kind": model.budget.by_kind(kept),
            "physical": model.budget.physical(kept),
        },
        "kept_units": kept_units(model, kept),
        "parameters": {
            "dense_total": model.budget.denominators["total"],
            "backbone_kept": backbone,
            "stored": backbone,
        },
    }


def kept_units(model: Decomposition, kept: Tensor) -> list[Figures]:
    """How many units of each group a mask (bool [U]) keeps."""
    return [
        {"layer": group.layer, "kind": group.kind, "kept": int(part.sum()), "of": group.size}
        for group, part in masks(model.gates.groups, kept)
    ]


def _mask_of_artifact(manifest: Manifest) -> Figures:
    size = manifest.parameters
    return {
        "sparsity": {**manifest.sparsity, "hardened": True},
        "kept_units": [{key: group[key] for key in ("layer", "kind", "kept", "of")} for group in manifest.kept],
        "parameters": {
            "dense_total": size["dense_total"],
            "backbone_kept": size["backbone"],
            "stored": size["stored"],
        },
    }


def held_out_figures(
    held_out: dict[str, dict[str, float]], num_bytes: dict[str, int], num_tokens: dict[str, int], memories: int
) -> Figures:
    """Bits per byte and perplexity per token by domain, and their means over domains.

    Args:
        held_out: {domain: {arm: bits per byte}}; not-a-number where a domain had no text.
        num_bytes: Bytes of held-out text behind them.
        num_tokens: Tokens of it that were predicted: perplexity is exp(nats / tokens), so it depends on the tokenizer.
        memories: How many different memories there are; with fewer than two none can be swapped.

    Returns:
        `domains`: by domain, for every arm `ARM_bpb` and `ARM_ppl`, None where it has no figure; `mean` of them over
        the domains with text, None for an arm that lacks one of these; `heldout_bytes` and `heldout_tokens`.
    """
    arms = [arm for arm in MODES if arm != "swapped" or memories > 1]
    domains = {}
    for domain, row in held_out.items():
        bits = {arm: _number(row[arm]) if arm in arms and arm in row else None for arm in MODES}
        bytes_per_token = num_bytes[domain] / max(num_tokens[domain], 1)
        domains[domain] = {f"{arm}_bpb": value for arm, value in bits.items()} | {
            f"{arm}_ppl": None if value is None else _number(2.0 ** min(value * bytes_per_token, 1000.0))
            for arm, value in bits.items()
        }
    keys = [f"{arm}_{unit}" for unit in ("bpb", "ppl") for arm in MODES]
    with_text = [row for row in domains.values() if any(value is not None for value in row.values())]
    mean = {key: _mean([row[key] for row in with_text]) for key in keys}
    return {"domains": domains, "mean": mean, "heldout_bytes": num_bytes, "heldout_tokens": num_tokens}


def general_figures(documents: Documents, memories: int) -> Figures:
    """The same of text that belongs to no domain, from its documents; nothing where none was scored.

    Args:
        documents: Of all held-out text; general text is told by its name.
        memories: How many different memories there are, each of which is another's to such text.

    Returns:
        Under `general` what `held_out_figures` returns, its `domains` under `texts`.
    """
    held_out, num_bytes, num_tokens = {}, {}, {}
    for name, arms in split_general(documents)[1].items():
        row = next(iter(arms.values()))
        num_bytes[name], num_tokens[name] = round(sum(row["bytes"])), round(np.sum(row["tokens"]))
        bits = {arm: sum(row["nats"]) / math.log(2) for arm, row in arms.items()}
        held_out[name] = {arm: value / num_bytes[name] if num_bytes[name] else math.nan for arm, value in bits.items()}
    figures = held_out_figures(held_out, num_bytes, num_tokens, memories + 1)
    return {"general": {"texts": figures.pop("domains")} | figures} if held_out else {}


def split_general(documents: Documents) -> tuple[Documents, Documents]:
    """Documents of the domains, and those of general text by its name alone."""
    general = {name: arms for name, arms in documents.items() if name.startswith(GENERAL)}
    own = {name: arms for name, arms in documents.items() if name not in general}
    return own, {name.removeprefix(GENERAL): arms for name, arms in general.items()}


def by_context(documents: Documents) -> Figures:
    """How well tokens are predicted by how many of their text stand before them in their row, K classes.

    A memory knows its domain before any text is read, so it gains most where texts begin.

    Returns:
        Under `by_context`: `tokens_before` (fewest, of each class), `tokens` by domain, `nats_per_token` by arm and
        domain, and `against_dense` by arm: the ratio of the means over those domains that have such tokens. Nothing
        where the data module does not number its documents.
    """
    documents, _ = split_general(documents)
    if not documents:
        return {}
    tokens = {domain: np.sum(arms["koff"]["tokens"], axis=1) for domain, arms in documents.items()}  # [K] each
    names = [arm for arm in MODES if all(arm in arms for arms in documents.values())]

    def per_token(arm: str, domain: str) -> NDArray[np.float64]:
        """Nats per token of each class, [K]; 0 where there are none."""
        return np.sum(documents[domain][arm]["nats_by_context"], axis=1) / np.maximum(tokens[domain], 1)

    nats = {arm: {domain: per_token(arm, domain) for domain in documents} for arm in names}
    means = {arm: np.sum(list(rows.values()), axis=0) for arm, rows in nats.items()}
    against = {
        arm: [_number(one / dense) if dense else None for one, dense in zip(mean, means["dense"], strict=True)]
        for arm, mean in means.items()
        if arm != "dense" and "dense" in means
    }
    plain = {
        arm: {
            domain: [_number(x) if n else None for x, n in zip(row, tokens[domain], strict=True)]
            for domain, row in rows.items()
        }
        for arm, rows in nats.items()
    }
    counts = {domain: list(map(int, row)) for domain, row in tokens.items()}
    found = {"tokens_before": list(CONTEXT), "tokens": counts, "nats_per_token": plain, "against_dense": against}
    return {"by_context": found}


def table(results: Figures) -> Table:
    """Held-out bits per byte: a row for each domain and their mean."""
    shown = Table(
        title="held-out text, bits per byte (less is better)", title_justify="left", title_style="", box=box.SIMPLE_HEAD
    )
    shown.add_column("domain", overflow="fold")
    for name in ("bytes", "dense", "koff", "koff/dense", "memory off", "swapped"):
        shown.add_column(name, justify="right", no_wrap=True)
    for domain, row in results["domains"].items():
        shown.add_row(domain, f"{results['heldout_bytes'][domain]:,}", *_cells(row))
    shown.add_section()
    shown.add_row("mean", f"{sum(results['heldout_bytes'].values()):,}", *_cells(results["mean"]), style="bold")
    if general := results.get("general"):
        shown.add_section()
        for name, row in general["texts"].items():
            shown.add_row(f"{GENERAL}{name}", f"{general['heldout_bytes'][name]:,}", *_cells(row))
    return shown


def sentences(results: Figures) -> list[str]:
    """Sparsity and parameters, a line each."""
    rates, size = results["sparsity"], results["parameters"]
    dense, active, stored = size["dense_total"], size["active"], size["stored"]
    lines = [
        *sparsity_lines(rates),
        f"parameters  dense {_count(dense)}, backbone kept {_count(size['backbone_kept'])}",
        f"            active (with one memory) {_count(active)}: {_change(active, dense)}",
        f"            stored (with all) {_count(stored)}: {_change(stored, dense)}",
    ]
    if koff := results.get("by_context", {}).get("against_dense", {}).get("koff"):
        ends = [f"{first} to {last - 1}" for first, last in pairwise(CONTEXT)] + [f"{CONTEXT[-1]} or more"]
        told = ", ".join(f"{ratio:.4f} ({end})" for ratio, end in zip(koff, ends, strict=True) if ratio is not None)
        lines.insert(0, f"koff/dense  {told}: by tokens of a text already read")
    if rates["target"] and rates["hardened"] and rates["units"] == 0:
        lines.append(
            "            the threshold closed no gate, so the backbone is whole: train longer, raise sparsity.weight "
            "or optim.mask_lr, or set sparsity.harden to budget"
        )
    if rates["target"] and not rates["hardened"]:
        lines.append(
            "            the run ended before its mask was fixed: these figures are of the mask of that moment"
        )
    return lines


def as_json(results: Figures) -> str:
    """Plain JSON; what has no JSON type (a path in a config) as its text."""
    return json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False, default=str) + "\n"


def write_documents(root: Path, documents: Documents, results: Figures) -> None:
    """Write `documents.json`, a line for each domain, of D documents and K classes of context (`metrics.CONTEXT`).

    {domain: {"bytes": [D], "nats": {arm: [D]}, "tokens": [K, D], "nats_by_context": {arm: [K, D]}}}. The sums of its
    nats and bytes are the figures of `results`; an arm without a figure there is left out. General text goes to
    `general_documents.json` in the same form. Nothing is written where the data module does not number its documents,
    and what an earlier run left under a name that is not written is removed: it would be taken for this run's.

    Raises:
        KoffError: The disk did not take it.
    """
    own, general = split_general(documents)
    texts = results.get("general", {}).get("texts", {})
    for file, part, figures in (
        ("documents.json", own, results["domains"]),
        ("general_documents.json", general, texts),
    ):
        lines = []
        for name, arms in part.items():
            shown = {arm: row for arm, row in arms.items() if figures[name][f"{arm}_bpb"] is not None}
            scores = {what: next(iter(arms.values()))[what] for what in ("bytes", "tokens")}
            scores |= {what: {arm: row[what] for arm, row in shown.items()} for what in ("nats", "nats_by_context")}
            lines.append(f"{json.dumps(name)}: {json.dumps(scores, allow_nan=False)}")
        if not lines:
            (root / file).unlink(missing_ok=True)
        else:
            write_atomically(root / file, "{\n" + ",\n".join(lines) + "\n}\n")


def _cells(row: dict[str, float | None]) -> list[str]:
    dense, koff, off, swapped = (row[f"{arm}_bpb"] for arm in MODES)
    ratio = None if dense is None or koff is None else koff / dense
    return ["-" if value is None else f"{value:.4f}" for value in (dense, koff, ratio, off, swapped)]


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    """None where one is: over the other domains alone an arm would not compare with those that have all."""
    return sum(values) / len(values) if values and None not in values else None


def _count(n: int) -> str:
    for size, sign in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if n >= size:
            return f"{n / size:.3f}{sign}"
    return str(n)


def _change(now: int, before: int) -> str:
    return f"{100 * (now / before - 1):+.1f} % against dense"
