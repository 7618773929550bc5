"""`koff export`: make an artifact of a checkpoint."""

from pathlib import Path
from typing import Literal

from koff_lightning.support.quick_imports import quick_imports


def export_checkpoint(
    *,
    ckpt: str,
    out: str,
    layout: Literal["ragged", "uniform", "deci", "masked", "merged"] | None = None,
    domain: str | None = None,
    with_code: bool = False,
    overwrite: bool = False,
    check: str | None = None,
    backbone: str | None = None,
    device: str = "cpu",
) -> None:
    """Write a checkpoint as a smaller model and its memories, and prove that they compute the same.

    Args:
        ckpt: Checkpoint of `koff fit`, saved after its mask was fixed.
        out: Folder to write.
        layout: `ragged` gives each layer its own widths, `uniform` all the same ones, `deci` block configs for other
            engines, `masked` zeros in the original shapes, `merged` folds one domain's LoRA in. By default `ragged`,
            or `uniform` for a run that was trained for it. For llama.cpp: `koff convert gguf`, of what this writes.
        domain: Domain whose LoRA `merged` folds in.
        with_code: Put the code of the model type beside the weights, for people without koff-lightning.
        overwrite: Replace an artifact that is there.
        check: Engines to ask afterwards what they can take, with commas: hf,peft,vllm,sglang,gguf.
        backbone: Where the backbone is, if it is no longer where the run found it.
        device: Torch device for the proof.
    """
    with quick_imports():
        from koff_lightning.artifact import engines
        from koff_lightning.artifact.checkpoint import from_checkpoint
        from koff_lightning.artifact.export import export, summary
        from koff_lightning.loading import device_named
        from koff_lightning.training.run_folder import run_config, run_results

    asked = engines.names(check) if check is not None else []  # refuses unknown ones before the work
    module = from_checkpoint(ckpt, backbone)
    module.to(device_named(device))
    config = run_config(Path(ckpt))
    results = run_results(Path(ckpt), config)
    report = export(
        module, out, layout, domain, with_code=with_code, overwrite=overwrite, config=config, results=results
    )
    print(summary(Path(out), report))
    if asked:
        print(engines.text(engines.check(out, asked)))
