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
from koff_lightning.loading import TINY, torch_dtype
from koff_lightning.losses import has_products
from koff_lightning.support.errors import KoffError

AUTO = "auto"
SMALL = 2**25  # bytes
PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")  # in which what is trained stays fp32
SHORT = {"16": "16-mixed", "bf16": "bf16-mixed", "32": "32-true", "64": "64-true"}  # Lightning's older names
ROUNDS = ": small steps would be rounded away. Use bf16-mixed, and model.dtype for the frozen weights"
CASTS = {  # what is trained; and what to take in their place
    "16-true": ROUNDS,
    "bf16-true": ROUNDS,
    "64-true": ", which stays fp32 here. Use 32-true, and model.dtype float64 for the frozen weights",
}
COMPUTES_IN = {"16-mixed": "float16", "bf16-mixed": "bfloat16"}  # else in the dtype of the frozen weights


def has_bf16(accelerator: str, backbone: str) -> bool:
    """Whether a run with this `trainer.accelerator` and `model.backbone` computes faster in bfloat16."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return accelerator in ("auto", "cpu") and _processor_has_bf16() and not _is_small(backbone)


def _processor_has_bf16() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _processor_has(dtype: str) -> bool:
    """Whether the processor multiplies matrices of this dtype by instructions for it, as all do for fp32 and fp64."""
    if dtype == "float16":
        return has_products("fp16")
    return dtype != "bfloat16" or _processor_has_bf16()


def _on_cpu(accelerator: Any) -> bool:
    """Whether this `trainer.accelerator` stands for the CPU; `gpu` without a GPU is refused elsewhere."""
    gpu = torch.cuda.is_available() or torch.backends.mps.is_available()
    return accelerator == "cpu" or (accelerator == "auto" and not gpu)


def _full_name(precision: Any) -> str | None:
    return None if precision is None else SHORT.get(str(precision), str(precision))


def hint_of(refusal: str) -> str:
    """What to add to the parser's words, which know no `auto` for a precision."""
    return " Leave it out (null) for what suits the device." if refusal.startswith("trainer.precision must be") else ""


def refuse_words(model: Any, trainer: Any, verb: str) -> None:
    """Refuse a `model.dtype` or `trainer.precision` whose word alone says that it cannot do, before anything is loaded.

    Args:
        model: Options of the model, by attributes; a dtype by another name, as half, gets its first.
        trainer: Those of the trainer; a precision by an older name gets its present one.
        verb: Only `fit` trains; `prepare` may run on another machine than the run, and computes in no precision.

    Raises:
        KoffError: It cannot; what to give instead is said.
    """
    if model.dtype != AUTO:
        model.dtype = str(torch_dtype(model.dtype)).removeprefix("torch.")
    trainer.precision = precision = _full_name(trainer.precision)
    if verb == "prepare" or precision is None:
        return
    if verb == "fit" and precision in CASTS:
        raise KoffError(f"trainer.precision {precision!r} casts what is trained{CASTS[precision]}")
    if precision.startswith("transformer-engine"):
        raise KoffError(
            f"trainer.precision {precision!r} would put other layers into the backbone and cast what is trained, which "
            "koff cannot work with: use bf16-mixed"
        )
    if precision == "16-mixed" and _on_cpu(trainer.accelerator):
        raise KoffError(
            "trainer.precision '16-mixed' needs a GPU, and this run is on the CPU: use bf16-mixed, or null for what "
            "suits the processor"
        )


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
        KoffError: A checkpoint cannot be read, or its run computed in what this device cannot.
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
        if said == "16-mixed" and _on_cpu(trainer.accelerator):
            raise KoffError(
                f"the run of {path} computed in 16-mixed, which needs a GPU, and this one is on the CPU: give "
                "--trainer.precision bf16-mixed or 32-true"
            )


def choose(model: Any, trainer: Any, bf16: bool) -> None:
    """Fill in `model.dtype: auto` and a `trainer.precision` of null by what the device can do.

    Args:
        model: Options of the model, by attributes.
        trainer: Those of the trainer.
        bf16: Whether the device computes this backbone faster in bfloat16.
    """
    if model.dtype == AUTO:  # koff-tiny is too small to gain anything
        model.dtype = "bfloat16" if bf16 and model.backbone != TINY else "float32"
    trainer.precision = _full_name(trainer.precision)
    if trainer.precision is None and bf16 and model.dtype == "bfloat16":
        trainer.precision = "bf16-mixed"


def told(model: Any, trainer: Any) -> str | None:
    """What to say of a choice: what is half precision, or that it is slow here; None where it is plain fp32."""
    precision = _full_name(trainer.precision) or "32-true"
    computes_in = COMPUTES_IN.get(precision, str(torch_dtype(model.dtype)).removeprefix("torch."))
    if computes_in == model.dtype == "float32":
        return None
    on_cpu = trainer.accelerator == "cpu" or not torch.cuda.is_available()
    if on_cpu and not _processor_has(computes_in):  # SmolLM2's shape, two layers: 3.2 times (docs/results/bench.md)
        return (
            f"this processor has no instructions for half precision in {computes_in}: a step takes several times as "
            "long as in fp32 (--model.dtype float32 --trainer.precision 32-true)"
        )
    return f"frozen weights in {model.dtype}, steps in {precision}, what is trained in fp32"
