"""Whether a device computes what the CPU does, and one way what another does; in fp32 and bf16, small shapes.

Shapes: B rows, T tokens, N new tokens, d hidden, V words.
"""

import itertools
from typing import Any

import torch
from findings import DTYPES, Findings, gap
from random_models import TINY, batch_of, sliced, tiny_model
from torch import Tensor

from koff_lightning import LossSpec, attention
from koff_lightning.backbone import allow_recomputation, hidden_states
from koff_lightning.decomposition import Decomposition
from koff_lightning.training.objective import Objective

FAMILIES = ("llama", "qwen2", "qwen3")
LENGTH, NEW = 48, 8


def correct(say: Findings, device: str, tiny: bool) -> None:
    """Every check, for every dtype and family; one that fails does not stop the others."""
    before, attention.MERGE_FROM = attention.MERGE_FROM, 0  # as in long rows
    try:
        for (name, dtype), family in itertools.product(DTYPES.items(), FAMILIES):
            about = {"family": family, "dtype": name}
            with tiny_model(family, dtype, device) as module:
                batch = batch_of(4, LENGTH, TINY["vocab_size"], device)
                for check in (_rows, _packed, _padded, _sliced, _generated, _recomputed, _elsewhere):
                    with say.trying(what=check.__doc__.partition(".")[0].lower(), **about):
                        check(say, about, module, batch, device)
    finally:
        attention.MERGE_FROM = before


def _masked(module: Decomposition, domains: list[str], **inputs: Tensor) -> Tensor:
    """Hidden states [B, T, d] under the domains' memories and the hard mask."""
    with torch.no_grad(), module.under(domains, module.hard_gates()):
        return module.hidden(inputs)


def _rows(say: Findings, about: dict[str, str], module: Decomposition, batch: dict[str, Any], device: str) -> None:
    """Rows together and alone."""
    ids, domains = batch["input_ids"], batch["domains"]
    alone = [_masked(module, [domain], input_ids=ids[row : row + 1]) for row, domain in enumerate(domains)]
    together = _masked(module, domains, input_ids=ids)
    say(what="rows together and alone", **about, gap=gap(torch.cat(alone), together))


def _packed(say: Findings, about: dict[str, str], module: Decomposition, batch: dict[str, Any], device: str) -> None:
    """Packed and apart."""
    ids, domains = batch["input_ids"], batch["domains"]
    places = (torch.arange(LENGTH, device=device) % 24).expand(len(ids), -1)  # [B, T]
    packed = _masked(module, domains, input_ids=ids, position_ids=places)[:, 24:]
    say(what="packed and apart", **about, gap=gap(packed, _masked(module, domains, input_ids=ids[:, 24:])))


def _padded(say: Findings, about: dict[str, str], module: Decomposition, batch: dict[str, Any], device: str) -> None:
    """Padded and whole."""
    ids, domains = batch["input_ids"], batch["domains"]
    mask = torch.ones_like(ids)  # [B, T]
    mask[0, :7] = 0
    mask[1, -5:] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    padded = _masked(module, domains, input_ids=ids, attention_mask=mask, position_ids=places)
    gaps = []
    for row, domain in enumerate(domains[:3]):
        there = mask[row].bool()
        whole = _masked(module, [domain], input_ids=ids[row : row + 1, there])[0]
        gaps.append(gap(padded[row, there], whole))
    say(what="padded and whole", **about, gap=max(gaps, key=lambda value: (value != value, value)))


def _sliced(say: Findings, about: dict[str, str], module: Decomposition, batch: dict[str, Any], device: str) -> None:
    """Gated and sliced."""
    cut, bank = sliced(module, device)
    removed = 1 - sum(p.numel() for p in cut.parameters()) / sum(p.numel() for p in module.backbone.parameters())
    with torch.no_grad(), bank.scope(bank.routes_of(batch["domains"])):
        small = hidden_states(cut, input_ids=batch["input_ids"])
    gated = _masked(module, batch["domains"], input_ids=batch["input_ids"])
    say(what="gated and sliced", **about, gap=gap(small, gated), removed=removed)


def _generated(say: Findings, about: dict[str, str], module: Decomposition, batch: dict[str, Any], device: str) -> None:
    """Generated with a cache and computed without."""
    ids, model = batch["input_ids"][:, :16], module.backbone
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    with torch.no_grad(), module.under(batch["domains"], module.hard_gates()):
        found = model.generate(input_ids=ids, use_cache=True, **options)
        cached = torch.stack(found.logits, dim=1)  # [B, N, V]
        anew = model(input_ids=found.sequences, use_cache=False).logits[:, len(ids[0]) - 1 : -1]  # [B, N, V]
        without = model.generate(input_ids=ids, use_cache=False, **options).sequences
    say(what="generated with a cache and computed without", **about, gap=gap(cached, anew))
    differ = float((without != found.sequences).float().mean())  # in bf16 two words may be as likely to the last bit
    figure = {"gap": differ} if about["dtype"] == "fp32" else {"share": differ}
    say(what="greedy tokens with and without a cache", **about, **figure)


def _recomputed(
    say: Findings, about: dict[str, str], module: Decomposition, batch: dict[str, Any], device: str
) -> None:
    """Gradients recomputed and kept."""
    gates = torch.rand(len(batch["domains"]), len(module.gates.logits), device=device)  # [B, U]
    kept, again = (_gradients(module, batch, gates, way) for way in (False, True))
    say(what="gradients recomputed and kept", **about, gap=gap(again, kept))
    here = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in batch.items()}
    module.to("cpu")
    there = _gradients(module, here, gates.cpu(), False)
    module.to(device)
    say(what="gradients on device and CPU", **about, gap=gap(kept.cpu(), there))


def _elsewhere(say: Findings, about: dict[str, str], module: Decomposition, batch: dict[str, Any], device: str) -> None:
    """Device and CPU."""
    here = _masked(module, batch["domains"], input_ids=batch["input_ids"]).cpu()
    module.to("cpu")
    there = _masked(module, batch["domains"], input_ids=batch["input_ids"].cpu())
    say(what="device and CPU", **about, gap=gap(here, there))


def _gradients(module: Decomposition, batch: dict[str, Any], gates: Tensor, again: bool) -> Tensor:
    """Of all that a step trains under these gates [B, U], in one row."""
    module.zero_grad()
    gates = gates.clone().requires_grad_()
    if again:
        allow_recomputation(module.backbone)
    objective = Objective(module, LossSpec(1.0, 1.0), again)
    objective(batch, gates, batch["domains"], module.domain_of_row(batch)).loss.backward()
    return torch.cat([p.grad.flatten() for p in (*module.parameters(), gates) if p.grad is not None])
