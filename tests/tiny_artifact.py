"""A small artifact by the real export, and the gated model it was made from, to compare with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_model
from tokenizers import decoders, processors
from torch import Tensor, nn
from toy_text import toy_tokenizer
from transformers import AutoTokenizer

from koff_lightning.artifact.export import export
from koff_lightning.decomposition import Decomposition
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.specs.sparsity import SparsitySpec

DOMAINS = ("de", "fr", "law")
VOCABULARY = 320  # the toy tokenizer's 300 and some


@dataclass
class Made:
    """An artifact and where it comes from."""

    folder: Path
    module: Decomposition

    @torch.no_grad()
    def gated(self, ids: Tensor, mask: Tensor, rows: Sequence[str | None]) -> Tensor:
        """Logits [B, T, V] of the gated model."""
        self.module.gates.set(self.module.hard_mask().float()[None])
        self.module.memories.activate(rows)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        return self.module.backbone(**inputs, use_cache=False).logits


def tiny_decomposition(
    folder: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    uniform: bool = False,
    chat: bool = False,
    bos: bool = True,
    tie: bool = False,
    changes: dict[str, Any] | None = None,
    target: float = 0.3,
    **options: Any,
) -> Decomposition:
    """A hardened decomposition of a random model saved in `folder / "dense"`, its memories full of noise.

    `changes` go into the dense model's config; with `target` 0 nothing is removed.
    """
    dense = folder / "dense"
    if not dense.exists():
        _tokenizer(dense, chat, bos)
        config = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": None, "tie_word_embeddings": tie}
        tiny_model(family, vocab_size=VOCABULARY, **config | (changes or {})).save_pretrained(dense)
    defaults = {"lora": LoraSpec(rank=3, alpha=6.0), "kv": KVSpec(slots=5), "domains": DOMAINS}
    defaults["sparsity"] = SparsitySpec(target=target, min_channels=4)
    module = Decomposition(str(dense), **defaults | options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if target:
            module.gates.harden(_mask(module, uniform))
        slots = [b for name, b in module.memories.named_buffers() if "sink" in name]
        for tensor in (*module.memories.lora_parameters(), *module.memories.kv_parameters(), *slots):
            nn.init.normal_(tensor, std=0.3 if tensor.ndim == 3 else 0.1)  # KV [K, P, dh], LoRA [r, in]
    return module.eval()


def _tokenizer(folder: Path, chat: bool, bos: bool) -> None:
    """The toy tokenizer, able to decode; with `bos` it has a start token and puts it before every text."""
    toy_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    if not bos:
        tokenizer.bos_token = None
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    tokenizer.save_pretrained(folder)


def _mask(module: Decomposition, uniform: bool) -> Tensor:
    """A random mask, bool [U]; `uniform` removes a third of the neurons of each layer, other ones in each."""
    if not uniform:
        return module.budget.harden(torch.rand(len(module.gates.logits)))
    parts = [torch.rand(group.size) for group in module.gates.groups]
    kinds = [group.kind for group in module.gates.groups]
    return torch.cat([p >= p.sort()[0][len(p) // 3 * (k == "channel")] for p, k in zip(parts, kinds, strict=True)])


def tiny_artifact(
    folder: Path, family: str = "llama", layout: str = "ragged", *, with_code: bool = False, **options: Any
) -> Made:
    """Export a `tiny_decomposition` to `folder / layout`."""
    module = tiny_decomposition(folder, family, **options)
    domain = module.domains[0] if layout == "merged" else None
    export(module, folder / layout, layout=layout, domain=domain, with_code=with_code, prove=False)
    return Made(folder / layout, module)


def left_padded(rows: int = 4, length: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask, each [rows, length], of texts of unequal length with padding before them."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor([length - 2 * row for row in range(rows)])
    return ids, (torch.arange(length) >= (length - lengths)[:, None]).long()
