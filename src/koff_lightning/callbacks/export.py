"""ExportArtifact: at the end of a run, write what it has learned as a folder that others can use."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from subprocess import Popen
from typing import Literal

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from koff_lightning.artifact import proof
from koff_lightning.artifact.export import export, summary
from koff_lightning.artifact.folder import read_manifest
from koff_lightning.artifact.layouts import layout_named
from koff_lightning.artifact.memories import add_from_bank, check_free_name
from koff_lightning.callbacks.report import RunReport, resolved_config
from koff_lightning.listed_files import MANIFEST
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import check_free, refuse_unwritable
from koff_lightning.training.module import KOFFModule

FOLDER = "artifact"


class ExportArtifact(Callback):
    """Write and prove `artifact/` in `default_root_dir` when `fit` ends; that of an earlier run there is replaced.

    Where that one has memories of domains that this run does not know, as added ones, the run is refused.

    A run that extends an artifact puts its memories there instead. A run whose mask was never fixed writes none, nor
    does one with `fast_dev_run`.

    Args:
        enabled: Write it; without, `koff export --ckpt` does the same later.
        layout: How the backbone is stored (docs/artifacts.md). null takes the one that
            `sparsity.layout` was trained for.
        with_code: Put the code of the model type beside the weights, for people without koff-lightning.
        prove: Load the artifact in a fresh process and compare it with the model.
    """

    def __init__(
        self,
        enabled: bool = True,
        layout: Literal["ragged", "uniform", "deci", "masked"] | None = None,
        with_code: bool = False,
        prove: bool = True,
    ) -> None:
        if layout is not None:
            layout_named(layout)  # refuses an unknown one
        self.enabled, self.layout, self.with_code, self.prove = enabled, layout, with_code, prove
        self._begun: Popen[str] | None = None  # the process that will prove it

    def on_fit_start(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Refuse now what would fail at the end."""
        if self._writes(trainer) and pl_module.extends is not None:
            folder = Path(pl_module.artifact).expanduser()
            for domain in pl_module.domains:
                check_free_name(pl_module.extends, folder, domain)
            refuse_unwritable(folder.resolve().parent, "model.artifact")  # a changed copy takes its place
        elif self._writes(trainer):
            if self.layout == "uniform" and not pl_module.sparsity.uniform and not pl_module.mask_is_fixed:
                raise KoffError(
                    "export.layout uniform wants a mask that leaves all layers equally wide: set "
                    "model.sparsity.layout uniform too, so that it is learned like that, or leave export.layout out"
                )
            check_free(_folder(trainer), overwrite=True)
            _refuse_loss(_folder(trainer), pl_module.domains)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """After the last step: let the process that will prove the artifact import what it needs meanwhile."""
        last = 0 < trainer.max_steps <= trainer.global_step
        if last and self.prove and self._writes(trainer) and pl_module.extends is None and pl_module.mask_is_fixed:
            self._begun = proof.begin()

    def on_exception(self, trainer: Trainer, pl_module: KOFFModule, exception: BaseException) -> None:
        """End the process that was to prove the artifact."""
        self._leave()

    def _leave(self) -> None:
        if self._begun is not None and self._begun.poll() is None:
            self._begun.kill()
            self._begun.communicate()
        self._begun = None

    def on_fit_end(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        """Write, after the report and the last checkpoint.

        Raises:
            KoffError: The disk did not take it, the layout cannot express the mask, or the proof failed.
        """
        if self._writes(trainer):
            try:
                self._write(trainer, pl_module)
            finally:
                self._leave()

    def _write(self, trainer: Trainer, pl_module: KOFFModule) -> None:
        if pl_module.extends is not None:
            texts = (resolved_config(trainer, pl_module).get("data") or {}).get("domains") or {}
            add_from_bank(pl_module.artifact, pl_module.model.memories, pl_module.domains, texts)
            print(f"added {', '.join(pl_module.domains)} to {pl_module.artifact}", flush=True)
            if pl_module.extends.router is not None:
                again = shlex.join(["koff", "router", "fit", "--model", str(pl_module.artifact)])
                print(f"its router picks among the others and is refused until it is fitted anew: {again}", flush=True)
            return
        out = _folder(trainer)
        if not pl_module.mask_is_fixed:
            print(f"no {out}: the run ended before its mask was fixed, so nothing can be cut", flush=True)
            return
        if any(hasattr(p, "to_local") for p in pl_module.parameters()):
            print(f"no {out}: the weights are spread over several processes; `koff export --ckpt` makes it", flush=True)
            return
        how = ", and loading it in a fresh process to compare its answers" if self.prove else ""
        print(f"writing {out}{how}", flush=True)
        report = export(
            pl_module.model,
            out,
            self.layout,
            with_code=self.with_code,
            overwrite=True,
            prove=self.prove,
            config=resolved_config(trainer, pl_module),
            begun=self._begun,
            results=next(
                (r.results for r in trainer.callbacks if isinstance(r, RunReport) and "steps" in r.results), None
            ),
        )
        print(summary(out, report), _next_steps(out), sep="\n", flush=True)

    def _writes(self, trainer: Trainer) -> bool:
        return self.enabled and trainer.is_global_zero and not trainer.fast_dev_run


def _next_steps(out: Path) -> str:
    """What to do with the artifact of a run that has ended, a line each; the commands run as they stand."""
    at, domains = shlex.quote(str(out)), [*read_manifest(out).domains]
    memory = f" --domain {domains[0]} --compare dense" if domains else ""
    return "\n".join(
        [
            "next:",
            f"  koff inspect {at}     # in Python: koff_lightning.load_decomposed({str(out)!r})",
            f"  koff generate --model {at}{memory} --prompt 'How it begins'",
            f"  koff analyze --model {at}     # which neurons left, as a page",
        ]
    )


def _refuse_loss(artifact: Path, domains: Sequence[str]) -> None:
    """Refuse to replace an artifact with memories that this run does not make; say it where a router would go."""
    try:
        manifest = read_manifest(artifact) if (artifact / MANIFEST).is_file() else None
    except KoffError:
        return  # damaged: there is nothing to be used, and so nothing to lose
    if manifest and (lost := [name for name in manifest.domains if name not in domains]):
        raise KoffError(
            f"{artifact} has the memory of {lost[0]!r}, which this run does not make and would delete: move the folder "
            "away, give this run another --trainer.default_root_dir, or --export.enabled=false to write none"
        )
    if manifest and manifest.router is not None:
        rank_zero_warn(f"{artifact} has a router, which goes when this run replaces it: copy the folder to keep it")


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.default_root_dir) / FOLDER


ExportArtefact = ExportArtifact  # its name in configs of 0.1.0
