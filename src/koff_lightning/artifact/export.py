"""Turn a decomposition into an artifact: check that it can be done, write it in full, prove it, or leave nothing."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from koff_lightning.artifact import proof
from koff_lightning.artifact.layouts import memory_shapes
from koff_lightning.artifact.parts import Order, write_parts
from koff_lightning.decomposition import Decomposition
from koff_lightning.loading import load_tokenizer
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import check_free, new_folder


def export(
    module: Decomposition,
    out: str | Path,
    layout: str | None = None,
    domain: str | None = None,
    with_code: bool = False,
    overwrite: bool = False,
    prove: bool = True,
    config: dict[str, Any] | None = None,
) -> proof.Report:
    """Write an artifact and prove it. The module stays as it is.

    Args:
        module: With its mask fixed, or one that learned none.
        out: The artifact's folder. It appears there in full, or not at all.
        layout: How the backbone is stored (layouts.py); by default as `sparsity.layout` was trained for.
        domain: Whose LoRA to fold in, for layout `merged`.
        with_code: Put the code of the koff_* model types beside the weights, for people without koff-lightning.
        overwrite: Replace an artifact that is there.
        prove: Load the artifact in a fresh process and compare it with the module.
        config: Resolved options of the run, for the manifest; what looks like a secret is left out.

    Returns:
        The proof's report, as in `export_report.json`.

    Raises:
        KoffError: The mask is not fixed, the layout cannot express it, the folder is taken, the disk is full, or the
            proof failed; what failed is then kept in `out` + `.failed`.
    """
    layout = layout or getattr(module.sparsity, "layout", "ragged")
    _check(module, layout, domain, with_code)
    out = Path(out).expanduser().resolve()
    check_free(out, overwrite)
    tokenizer = load_tokenizer(
        module.source,
        revision=module.loading.get("revision"),
        trust_remote_code=module.loading.get("trust_remote_code", False),
    )
    memories = _memories(module, domain)
    with new_folder(out, overwrite) as folder:
        write_parts(Order(module, layout, memories, domain, with_code, tokenizer, config), folder)
        if not prove:
            return proof.write_report(folder, {"passed": None, "error": "written without proof"})
        arms = memories if domain else {None: None} | memories
        report = proof.prove(module, folder, arms, tokenizer)
        if not report["passed"]:
            raise KoffError(f"{out} was not written: {_fault(report)}; what failed is in {_set_aside(folder, out)}")
    return report


def summary(out: Path, size: dict[str, Any], report: dict[str, Any]) -> str:
    """What was written and what the proof found, in a line."""
    found, count = "not proven", len(size["active"])
    if report["passed"]:
        found = (
            "a fresh process computes the same from it "
            f"(logits to {report['relative_diff']:.0e} of the largest, greedy tokens {report['greedy']})"
        )
    return (
        f"wrote {out}: backbone {size['backbone'] / 1e6:.3f} M of {size['dense_total'] / 1e6:.3f} M parameters, "
        f"{count} {'memory' if count == 1 else 'memories'}; {found}"
    )


def _check(module: Decomposition, layout: str, domain: str | None, with_code: bool) -> None:
    """Refuse what cannot be exported, before anything is written."""
    memory_shapes(layout)  # refuses an unknown layout
    if module.learns_mask and not module.gates.hardened:
        raise KoffError(
            "the mask of this run is not fixed yet, so nothing can be cut: export a later checkpoint of it "
            "(the mask is fixed after the shares anneal.warmup, ramp and hold of its steps)"
        )
    if module.learns_mask and module.gates.kept.all() and not module.budget.harden(module.gates.logits).all():
        raise KoffError(
            f"the mask is fixed but removes nothing, and the run's target is {module.sparsity.target}: the whole "
            "backbone would be exported; take a checkpoint whose mask is as its run left it"
        )
    if odd := [name for name, tensor in _to_write(module) if not tensor.isfinite().all()]:
        raise KoffError(
            f"{odd[0]} holds nan or inf, so an artifact would answer nonsense ({len(odd)} tensors in all): export an "
            "earlier checkpoint of the run"
        )
    if any(hasattr(p, "to_local") for p in module.parameters()):
        raise KoffError("this model is spread over several processes: export its checkpoint (koff export --ckpt)")
    if (layout == "merged") != (domain is not None):
        raise KoffError("layout 'merged' folds one domain's LoRA in: give --layout merged and --domain together")
    if domain is not None and domain not in module.domains:
        raise KoffError(f"there is no domain {domain!r} to merge; the run has {', '.join(module.domains)}")
    if with_code and layout not in ("ragged", "merged", "deci"):
        raise KoffError(f"layout {layout!r} needs no code of ours: leave --with-code out")


def _to_write(module: Decomposition) -> Iterator[tuple[str, Tensor]]:
    """What training has made of the artifact: memories and compensation, by their names in the state dict."""
    parts = ("memories.", "gates.bias")
    return ((n, t) for n, t in module.state_dict().items() if n.startswith(parts) or ".lora_A." in n or ".lora_B." in n)


def _memories(module: Decomposition, merged: str | None) -> dict[str, str]:
    """Name of each memory to write -> a domain that reads it; a shared memory is written once."""
    if merged is not None:
        return {merged: merged}
    if module.lora is None and module.kv is None:
        return {}
    readers: dict[str, str] = {}
    for domain, name in module.memories.names.items():
        readers.setdefault(name, domain)
    return readers


def _fault(report: proof.Report) -> str:
    """Why a proof failed."""
    if report["error"]:
        return f"a fresh process could not use it ({report['error']})"
    if odd := [str(case["memory"]) for case in report["memories"] if not case["finite"]]:
        return f"the model itself computes nan or inf (memory {', '.join(odd)}): there is nothing to compare with"
    if report["relative_diff"] > report["tolerance"]:
        return (
            f"a fresh process computes other logits from it (off by {report['relative_diff']:.1e} of the largest one, "
            f"allowed are {report['tolerance']:.0e})"
        )
    if not report["tokenizer_equal"]:
        return "a fresh process gets other token ids from its tokenizer"
    wrong = [str(case["memory"]) for case in report["memories"] if case["greedy"] == "different"]
    return f"a fresh process generates other tokens from it (memory {', '.join(wrong)})"


def _set_aside(folder: Path, out: Path) -> Path:
    """Keep what failed, for whoever wants to know why."""
    failed = out.with_name(f"{out.name}.failed")
    check_free(failed, overwrite=True)
    shutil.rmtree(failed, ignore_errors=True)  # of an earlier export
    return folder.rename(failed)
