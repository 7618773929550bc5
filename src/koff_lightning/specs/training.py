"""How a run trains: the options of its loss, of retention and of its optimizer."""

import math
from dataclasses import dataclass
from typing import Literal

from koff_lightning.specs.kinds import check_values
from koff_lightning.support.errors import KoffError


@dataclass
class LossSpec:
    """Weights of the objective L = ce * CE + kl * KL(dense || student).

    Args:
        ce: Weight of next-token cross-entropy on the text.
        kl: Weight of the divergence from the dense model; 0 saves the teacher's forward pass.
        chunk: Tokens whose logits exist at one time, at most: on a CPU as many as make 28 MiB of them, or a
            sixth of the model's width if that is more.
        top_k: Tokens of the vocabulary that the divergence looks at: those which the dense model finds likeliest, 100
            in the paper (appendix D). null for all.
        tail: With `top_k`, what becomes of the others: `drop` leaves them out of both distributions, which are
            normalised over the k alone (the paper); `bucket` counts them as one outcome more.
        teacher: Where the dense model's part comes from: `live`, a pass of its own in every step, or `stored`, what
            `koff prepare --teacher` has written of its likeliest tokens (needs `top_k`).
    """

    ce: float = 1.0
    kl: float = 2.0  # CE + 2 KL as in DDP (arXiv 2603.08065)
    chunk: int = 1024
    top_k: int | None = None
    tail: Literal["drop", "bucket"] = "drop"
    teacher: Literal["live", "stored"] = "live"

    def __post_init__(self) -> None:
        check_values(self, "loss")
        if not (self.ce >= 0 and self.kl >= 0 and 0 < self.ce + self.kl < math.inf):
            raise KoffError(f"loss.ce and loss.kl must be >= 0, finite and not both 0; got {self.ce} and {self.kl}")
        if self.chunk < 1:
            raise KoffError(f"loss.chunk must be at least 1 token; got {self.chunk}")
        if self.top_k is not None and self.top_k < 2:
            raise KoffError(f"loss.top_k must be at least 2 (100 in the paper), or null for all; got {self.top_k}")
        if self.teacher == "stored" and not (self.kl and self.top_k):
            raise KoffError(
                "loss.teacher: stored holds the dense model's likeliest tokens: set loss.top_k (100 in the paper) "
                f"and a loss.kl above 0; got {self.top_k} and {self.kl}"
            )

    @property
    def top_k_alone(self) -> bool:
        """Whether the loss looks at the teacher's k tokens and at nothing else, so that no other logit is made."""
        return not self.ce and self.top_k is not None and self.tail == "drop"


@dataclass
class RetentionSpec:
    """Retention: every so many steps the same loss on general text too, under a memory drawn at random (eq. 2).

    Args:
        every: Optimizer steps from one with general text to the next: 20, 50 or 100 in the paper.
        weight: Weight mu of that loss.
        updates: What it moves: the `mask` alone, and then only while one is learned (section 3.4 of the paper), or
            `both` the mask and the drawn memory (its appendix D).
    """

    every: int = 20
    weight: float = 1.0
    updates: Literal["mask", "both"] = "mask"

    def __post_init__(self) -> None:
        check_values(self, "retention")
        if self.every < 1:
            raise KoffError(
                f"retention.every must be at least 1 step; got {self.every} (model.retention: null for none)"
            )
        if not 0 < self.weight < math.inf:
            raise KoffError(f"retention.weight must be positive and finite; got {self.weight}")

    def is_due(self, step: int) -> bool:
        """Whether optimizer step number `step` (from 0) takes general text: the last of every `every`."""
        return (step + 1) % self.every == 0


@dataclass
class OptimSpec:
    """Learning rates and how they change over a run.

    Args:
        mask_lr: For the mask logits, in hard-concrete logits per step; scaled for other gates; constant.
        multiplier_lr: For the Lagrange multipliers, by ascent; constant.
        lora_lr: Peak for LoRA, in an LR course of linear warm-up and cosine decay.
        kv_lr: Peak for the KV memories, same course.
        warmup: Share of all steps in which the memories' rate rises.
        final: Share of the peak rate that is left at the end.
        clip: Largest gradient norm of all LoRA, and of all KV parameters.
        on_nonfinite: What to do when a loss or gradient is no finite number: `stop` the run, or `skip` the step.
    """

    mask_lr: float = 0.1
    multiplier_lr: float = 0.1
    lora_lr: float = 1e-3
    kv_lr: float = 5e-3
    warmup: float = 0.03
    final: float = 0.1
    clip: float = 1.0
    on_nonfinite: Literal["stop", "skip"] = "stop"

    def __post_init__(self) -> None:
        check_values(self, "optim")
        rates = {k: getattr(self, k) for k in ("mask_lr", "multiplier_lr", "lora_lr", "kv_lr", "clip")}
        bad = [f"{k}={v}" for k, v in rates.items() if not v > 0 or math.isinf(v)]
        if bad:
            raise KoffError(f"optim: rates and clip must be positive and finite; got {', '.join(bad)}")
        if not (0 <= self.warmup < 1 and 0 <= self.final <= 1):
            raise KoffError(f"optim.warmup and optim.final are shares of 1; got {self.warmup} and {self.final}")
