"""What frozen weights are kept in and a step is computed in, where a config does not say it.

On a GPU with bfloat16 both are bfloat16: half the memory and, on matrix units, many times the speed; what is trained
stays fp32. So too on a processor with instructions for it where the backbone is of some size: SmolLM2-135M takes a
step in 0.4 of the time there (docs/results/bench.md). Everywhere else both are fp32. A run that takes up a checkpoint
does as the run that wrote it did, wherever either runs: other weights would be another model. The choice goes into the
saved config.
"""

from pathlib import Path
from typing import Any

import torch

from koff_lightning.artifact.checkpoint import read_checkpoint
from koff_lightning.loading import TINY

AUTO = "auto"
SMALL = 2**25  # bytes
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")  # in which what is trained stays fp32
SLOW = (
    15  # times that the layers' products take in bf16 of those in fp32 without the instructions: docs/results/bench.md
)


def has_bf16(accelerator: str, backbone: str) -> bool:
    """Whether a run with this `trainer.accelerator` and `model.backbone` computes faster in bfloat16."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return accelerator in ("auto", "cpu") and _processor_has_bf16() and not _is_small(backbone)


def _processor_has_bf16() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _is_small(backbone: str) -> bool:
    """Whether the files of a local backbone are too small to gain anything; what is on a hub is not."""
    path = Path(backbone).expanduser()
    if not path.exists():
        return backbone == TINY
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) < SMALL  # a link may lead nowhere


def take_up(model: Any, trainer: Any, checkpoint: str | Path | None) -> None:
    """Fill in `model.dtype: auto` and a `trainer.precision` of null as the run of a checkpoint had them.

    Args:
        model: Options of the model, by attributes; where no run goes on, its mask, prior or warm_start may be of a run.
        trainer: Options of the trainer.
        checkpoint: Of the run that goes on, if one does.

    Raises:
        KoffError: A checkpoint cannot be read.
    """
    path = checkpoint or model.mask or model.prior or model.warm_start
    if path is None or (model.dtype != AUTO and trainer.precision is not None):
        return
    content = read_checkpoint(path, mmap=True)
    if model.dtype == AUTO:
        model.dtype = content["hyper_parameters"].get("dtype", AUTO)
    if checkpoint and trainer.precision is None:  # older ones do not say; where nothing was said theirs was this
        said = content["koff"].get("precision", "32-true")
        trainer.precision = said if said in PRECISIONS else None


def choose(model: Any, trainer: Any, bf16: bool) -> None:
    """Fill in `model.dtype: auto` and a `trainer.precision` of null by what the device can do.

    Args:
        model: Options of the model, by attributes.
        trainer: Those of the trainer.
        bf16: Whether the device computes this backbone faster in bfloat16.
    """
    if model.dtype == AUTO:  # koff-tiny is too small to gain anything
        model.dtype = "bfloat16" if bf16 and model.backbone != TINY else "float32"
    if trainer.precision is None and bf16 and model.dtype == "bfloat16":
        trainer.precision = "bf16-mixed"


def told(model: Any, trainer: Any) -> str | None:
    """What to say of a choice: that it is half precision, or that it is slow here; None where it is plain fp32."""
    half = model.dtype != "float32" or str(trainer.precision) in ("bf16-mixed", "16-mixed", "bf16-true", "16-true")
    if not half:
        return None
    if (trainer.accelerator == "cpu" or not torch.cuda.is_available()) and not _processor_has_bf16():
        return (
            f"this processor has no instructions for half precision: a step of a real model takes some {SLOW} times as "
            "long as in fp32 (--model.dtype float32 --trainer.precision 32-true)"
        )
    return f"frozen weights in {model.dtype}, steps in {trainer.precision or '32-true'}, what is trained in fp32"
