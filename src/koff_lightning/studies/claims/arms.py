"""The arms of the claims report: what each one is, and the command that makes it (docs/claims.md).

An arm is a plain `koff fit` or `koff baseline` over one resolved config. Three more need no run of their own: `dense`,
`memory_off` and `swapped` are scored by the run of `koff`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from koff_lightning.support.errors import KoffError
from koff_lightning.support.wording import nearest

METHODS = ("magnitude", "wanda_sp", "flap", "random", "fisher")
ABLATIONS = ("dense_memory", "no_memory", "two_stage", "shared_memory", "lora_only", "kv_only")  # overlays of configs/
EQUAL = ("lora_equal", "kv_equal")  # one kind of memory with the parameters of both
PRIOR = "fisher_prior"  # KOFF whose logits start in the order of the one-shot mask instead of the warm-up's
LEARNED = ("koff", *ABLATIONS, *EQUAL, "ddp", PRIOR)
AFTER = {f"{method}_memory": method for method in METHODS}  # arm -> the one-shot mask on which its memories train
TAKES = AFTER | {PRIOR: "fisher"}  # arm -> the one-shot mask that it needs
ARMS = (*LEARNED, *METHODS, *AFTER)
FREE = ("dense", "memory_off", "swapped")
ABOUT = {
    "dense": "the frozen model",
    "dense_memory": "memories on the dense model (fair control)",
    "koff": "KOFF, each domain with its memory",
    "memory_off": "the same mask, memories off",
    "swapped": "the same mask, another domain's memory",
    "no_memory": "mask learned without memories",
    "two_stage": "first the mask, then the memories",
    "shared_memory": "one memory for all domains",
    "lora_only": "LoRA alone",
    "kv_only": "KV alone",
    "lora_equal": "LoRA alone, parameters of both",
    "kv_equal": "KV alone, parameters of both",
    "ddp": "KOFF with ddp gates",
    PRIOR: "KOFF in the order of the one-shot Fisher mask",
    **{method: f"one-shot mask, {method}" for method in METHODS},
    **{arm: f"one-shot mask, {method}, then memories" for arm, method in AFTER.items()},
}


@dataclass(frozen=True)
class Run:
    """One arm at one sparsity (a share of the config's denominator) with one seed."""

    arm: str
    sparsity: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.arm}-{self.sparsity:g}-{self.seed}"

    @property
    def needs(self) -> "Run | None":
        """The run whose mask this one takes."""
        return Run(TAKES[self.arm], self.sparsity, self.seed) if self.arm in TAKES else None


def chosen(names: str | None) -> list[str]:
    """The arms to run, with those that they need, in the order of ARMS.

    Args:
        names: Arms with commas between; None for all.

    Raises:
        KoffError: No such arm.
    """
    wanted = [name.strip() for name in names.split(",")] if names is not None else list(ARMS)
    for name in wanted:
        if name in FREE:
            raise KoffError(f"arm {name!r} needs no run of its own: the run of koff scores it")
        if name not in ARMS:
            raise KoffError(f"no arm {name!r}.{nearest(name, ARMS)} There are {', '.join(ARMS)}")
    return [arm for arm in ARMS if arm in wanted or any(TAKES.get(name) == arm for name in wanted)]


def equal_memories(model: Mapping[str, Any]) -> dict[str, Any]:
    """LoRA rank and KV slots that alone have the parameters of both, or the least above them.

    Args:
        model: Section `model` of a resolved config.

    Returns:
        Parameters of one domain's memory before anything is removed: `both`, and for each kind alone its `rank` or
        `slots`, its `parameters` and their `ratio` to both.

    Raises:
        KoffError: The config has no LoRA or no KV memory.
    """
    from koff_lightning.specs.memories import KVSpec, LoraSpec

    if not model["lora"] or not model["kv"]:
        raise KoffError(f"{' and '.join(EQUAL)} need a config with model.lora and model.kv: leave them out with --arms")
    lora, kv = LoraSpec(**model["lora"]), KVSpec(**model["kv"])
    of_lora, of_kv = _size(model, lora, None), _size(model, None, kv)
    both = of_lora + of_kv
    rank = math.ceil(both * lora.rank / of_lora)
    slots = math.ceil(both * kv.slots / of_kv)
    sizes = {"rank": rank * of_lora // lora.rank, "slots": slots * of_kv // kv.slots}
    alone = {"rank": rank, "alpha": lora.alpha * rank / lora.rank}, {"slots": slots}
    return {"both": both} | {
        arm: given | {"parameters": sizes[key], "ratio": sizes[key] / both}
        for arm, given, key in zip(EQUAL, alone, sizes, strict=True)
    }


def _size(model: Mapping[str, Any], lora: Any, kv: Any) -> int:
    """Parameters of a memory on the backbone; no weights are loaded for it."""
    from koff_lightning.backbone import without_weights
    from koff_lightning.loading import load_config
    from koff_lightning.memory import MemoryBank

    config = load_config(model["backbone"], revision=model["revision"], trust_remote_code=model["trust_remote_code"])
    return MemoryBank(without_weights(config), ["one"], lora, kv).size("one")


def command(run: Run, out: Path, equal: Mapping[str, Any], sparsity: Mapping[str, Any]) -> list[str]:
    """The words after `koff` that make a run.

    Args:
        run: Which one.
        out: Folder of all runs; `config.yaml` there is the resolved config.
        equal: As from `equal_memories`; needed by its two arms only.
        sparsity: Section `model.sparsity` of the resolved config.
    """
    folder, config = out / run.name, ["--config", str(out / "config.yaml")]
    if run.arm in METHODS:
        options = [f"--method={run.arm}", f"--sparsity={run.sparsity:g}", f"--seed={run.seed}", f"--out={folder}"]
        no_place = sparsity["layout"] == "uniform" or any(kind.endswith("_channel") for kind in sparsity["units"])
        biases = ["--compensate=false"] if run.arm == "flap" and no_place else []
        return ["baseline", *config, *options, *biases]
    seeds = [f"--seed_everything={run.seed}", f"--data.seed={run.seed}"]
    options = [*seeds, f"--trainer.default_root_dir={folder}", "--export.enabled=false"]
    if run.arm != "dense_memory":
        options.append(f"--model.sparsity.target={run.sparsity:g}")
    return ["fit", *config, *_own_options(run, out, equal, sparsity), *options]


def _own_options(run: Run, out: Path, equal: Mapping[str, Any], sparsity: Mapping[str, Any]) -> Sequence[str]:
    """What makes a `koff fit` this arm."""
    if run.arm in ABLATIONS:
        return ["--config", f"ablations/{run.arm}.yaml"]
    if run.arm == "lora_equal":
        given = equal["lora_equal"]
        sizes = [f"--model.lora.rank={given['rank']}", f"--model.lora.alpha={given['alpha']:g}"]
        return ["--config", "ablations/lora_only.yaml", *sizes]
    if run.arm == "kv_equal":
        return ["--config", "ablations/kv_only.yaml", f"--model.kv.slots={equal['kv_equal']['slots']}"]
    if run.arm == "ddp":
        return ["--model.sparsity.gate=ddp", *_without_temperature(sparsity)]
    option = "prior" if run.arm == PRIOR else "mask"
    return [f"--model.{option}={out / run.needs.name / 'checkpoints' / 'last.ckpt'}"] if run.needs else []


def _without_temperature(sparsity: Mapping[str, Any]) -> list[str]:
    """What takes back the temperatures of a config, of which ddp gates know none; nothing where it names none."""
    from koff_lightning.specs.sparsity import SparsitySpec

    if (sparsity["beta"], sparsity["beta_end"]) == (SparsitySpec.beta, None):
        return []
    return [f"--model.sparsity.beta={SparsitySpec.beta}", "--model.sparsity.beta_end=null"]
