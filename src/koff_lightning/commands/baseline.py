"""`koff baseline`: a mask from one reading of calibration text, as a checkpoint like those of `koff fit`.

Its units, its budget and its hardening are those of a learned mask, so it is tested, exported and trained on alike.
"""

import time
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from koff_lightning.artifact.layouts import layout_named
from koff_lightning.callbacks.report import RunReport, resolved_config
from koff_lightning.data import check_vocabulary
from koff_lightning.evaluation import baselines
from koff_lightning.reports import results
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import write_atomically
from koff_lightning.support.versions import versions
from koff_lightning.training.module import KOFFModule

# Options of this verb alone.
OWN = ("method", "out", "backbone", "sparsity", "seed", "calibration_tokens", "compensate", "score")

CALIBRATION_TOKENS = 131_072  # 1,024 rows of 128, as FLAP reads (docs/baselines.md)


class KoffTrainer(Trainer):
    """Lightning's trainer with one verb more."""

    def baseline(
        self,
        model: KOFFModule,
        datamodule: LightningDataModule,
        method: baselines.Method,
        out: str | None = None,
        backbone: str | None = None,
        sparsity: float | None = None,
        seed: int = 0,
        calibration_tokens: int | None = None,
        compensate: bool = True,
        score: bool = True,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Make a one-shot mask: the control that a learned one is compared with.

        Writes `checkpoints/last.ckpt`, `config.yaml` and `results.json`. Test it with `koff test`, export it with `koff
        export --ckpt`, train memories under it with `koff fit --model.mask`, or start a learned mask from it with `koff
        fit --model.prior`.

        Args:
            model: A model without memories.
            datamodule: Domains whose training text calibrates.
            method: `magnitude`, `wanda_sp`, `flap`, `random` or `fisher`.
            out: Folder to write; by default that of the config's runs and the method.
            backbone: Short for --model.backbone.
            sparsity: Short for --model.sparsity.target.
            seed: Seed of the draw of calibration text, and of `random`.
            calibration_tokens: Training tokens to read, of all domains together, equally many of each (`wanda_sp`,
                `flap` and `fisher` read text). By default 131,072, or what there is where that is less.
            compensate: Let the mean of what `flap` removes stay behind as biases, which the layouts ragged, masked and
                merged can store.
            score: Score held-out text under the mask afterwards; --no-score leaves it out.
            ckpt_path: Not used; it stands in the configs that `koff fit` saves, which this verb takes too.
            weights_only: Not used, like ckpt_path.

        Raises:
            KoffError: Several processes, too little calibration text, or a disk that does not take the files.
        """
        if self.world_size > 1:
            raise KoffError("koff baseline runs in one process: leave --trainer.devices and hardware configs out")
        since = time.perf_counter()
        _set_up(self, model, datamodule)
        read = harden_by(model, datamodule, method, calibration_tokens, seed, compensate)
        seconds = time.perf_counter() - since
        root = Path(self.default_root_dir)
        options = _write_options(self, model, root)
        path = root / "checkpoints" / "last.ckpt"
        try:
            self.save_checkpoint(path, weights_only=True)
        except OSError as error:
            raise KoffError(f"cannot write {path}: {error.strerror or error}") from error
        for name in ("results.json", "documents.json", "general_documents.json"):
            (root / name).unlink(missing_ok=True)  # of an earlier mask, which is gone now
        print(f"wrote {path}: {method}, {read:,} tokens of calibration text, {seconds:.1f} s", flush=True)
        if score:
            about = {"baseline": {"method": method, "calibration_tokens": read}, "seed": seed, "seconds": seconds}
            _score(self, model, datamodule, about | {"config": options, "versions": versions()})


def resolve(options: Namespace) -> None:
    """Let the verb's short options speak for those of the run, and leave memories out.

    Args:
        options: Parsed options of `koff baseline`; changed in place.

    Raises:
        KoffError: Options that do not go with a one-shot mask.
    """
    model, trainer = options.model, options.trainer
    for name in ("artifact", "warm_start", "mask", "prior"):
        if model[name] is not None:
            raise KoffError(f"koff baseline makes a mask of its own from the dense model: leave model.{name} out")
    if options.method == "flap" and options.compensate and not layout_named(model.sparsity.layout).takes_biases:
        raise KoffError(
            f"sparsity.layout {model.sparsity.layout} asks for a plain config, which has no place for the biases by "
            "which flap makes up for what it removes: give --compensate false, or another layout"
        )
    model.lora = model.kv = None
    if options.backbone is not None:
        model.backbone = options.backbone
    if options.sparsity is not None:
        model.sparsity.target = options.sparsity
    if not model.sparsity.target:
        raise KoffError("a one-shot mask removes something: give --sparsity, the share to remove, such as 0.12")
    if options.out is not None or trainer.default_root_dir is not None:
        trainer.default_root_dir = options.out or f"{trainer.default_root_dir}-{options.method}"
    trainer.logger = False  # the folder has one run; `koff test` makes a log of its own


@torch.no_grad()
def harden_by(
    module: KOFFModule, data: Any, method: baselines.Method, num_tokens: int | None, seed: int, compensate: bool = True
) -> int:
    """Fix the module's mask by a one-shot method; the scores stay as its logits.

    Args:
        module: Built, with nothing learned yet.
        data: Set up, with `calibration_text`.
        method: Name of the method.
        num_tokens: Tokens of calibration text; None for CALIBRATION_TOKENS, or what there is where that is less.
        seed: Seed of the draw of text, and of `random`.
        compensate: Whether what `flap` removes leaves its mean behind as a bias.

    Returns:
        How many tokens were read.
    """
    gates, backbone, read = module.model.gates, module.model.backbone, {}
    text = None
    if method in baselines.READ_TEXT:
        if num_tokens is None:
            most = data.most_calibration_text() * len(data.domain_names)
            num_tokens = min(CALIBRATION_TOKENS, max(most, 1))  # where there are none, the next line says whose
        text = data.calibration_text(num_tokens, seed)
    with module.model.under():
        if method == "flap":
            read = baselines.input_moments(backbone, text, gates.groups)
            values = baselines.scores_from(backbone, read, method, gates.groups)
        else:
            values = baselines.scores(backbone, text, method, gates.groups, seed)
    gates.logits.copy_(values)
    gates.harden(module.model.budget.harden(values))  # scores are no logits: there is no threshold in them
    if compensate and method == "flap":
        gates.bias = baselines.compensation(backbone, read, gates.groups, gates.kept).to(gates.logits.device)
    return 0 if text is None else text.num_tokens


def _set_up(trainer: Trainer, module: KOFFModule, data: LightningDataModule) -> None:
    """Set up data, module and device as Lightning does before a loop: calibration runs outside of one."""
    trainer.strategy.connect(module)
    module.trainer = data.trainer = trainer
    data.setup()
    module.configure_model()
    check_vocabulary(data.tokenizer, module.model.backbone.get_input_embeddings().num_embeddings)
    module.to(trainer.strategy.root_device)


def _write_options(trainer: Trainer, module: KOFFModule, root: Path) -> dict[str, Any]:
    """Write config.yaml, which `koff test --config` and `koff fit --config` take; returns all options."""
    options = resolved_config(trainer, module)
    for callback in trainer.callbacks:
        if isinstance(callback, SaveConfigCallback):
            callback.already_saved = True  # else it writes the options of this verb, which the others do not know
    shared = {name: value for name, value in options.items() if name not in OWN}
    write_atomically(root / "config.yaml", yaml.safe_dump(shared, sort_keys=False, allow_unicode=True))
    return options


def _score(trainer: Trainer, module: KOFFModule, data: LightningDataModule, about: dict[str, Any]) -> None:
    trainer.test(module, data)  # its report prints the table
    report = next((callback for callback in trainer.callbacks if isinstance(callback, RunReport)), None)
    if report is not None:
        path = Path(trainer.default_root_dir) / "results.json"
        results.write_documents(path.parent, report.documents, report.results)
        write_atomically(path, results.as_json(report.results | about))
        print(f"wrote {path}", flush=True)
