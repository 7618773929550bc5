"""`koff plan`: memory per GPU, tokens per second and hours of a run, from its config alone, before anything starts."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from koff_lightning.commands.published_sizes import PUBLISHED
from koff_lightning.support.errors import KoffError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from koff_lightning.training.planning import Counts, Step

GIB, MIB = 2**30, 2**20
AUTO = "auto"  # of model.activation_checkpointing
# Dense bf16 TFLOP/s and GiB by the vendors' data sheets (H100, H200, B200: SXM).
GPUS = {
    "a100": (312, 80),
    "l40s": (362, 48),
    "rtx4090": (165, 24),
    "h100": (989, 80),
    "h200": (989, 141),
    "b200": (2250, 180),
    "mi300x": (1307, 192),
}
UTILISATION = 0.35  # share of that which training reaches: an assumption, as no GPU has been measured by this project
ROOM = 0.92  # share of a GPU for what is counted; the rest is left to driver, collectives and fragmentation


def plan(
    *,
    config: list[str] | None = None,
    gpus: int = 1,
    gpu: str = "h100",
    gpu_memory: float | None = None,
    tflops: float | None = None,
    model_config: str | None = None,
    further: list[str] | None = None,
) -> None:
    """Estimate memory per GPU, tokens per second and hours of a run (docs/scaling.md). Reads no weights.

    Args:
        config: Config of `koff fit`; may be given several times, as there.
        gpus: Processes of the run, one for each GPU.
        gpu: What they are: a100, l40s, rtx4090, h100, h200, b200 or mi300x.
        gpu_memory: GiB of each; by default what such a GPU has.
        tflops: TFLOP/s that training reaches on each; by default 35 % of the vendor's figure for bf16.
        model_config: A config.json in place of the backbone's, which may be out of reach.
        further: Further options of `koff fit`, as they stand after a lone `--`.
    """
    if not config:
        raise KoffError("give the run's config: koff plan --config llama_12pct.yaml (`koff configs` lists them)")
    if gpu.lower() not in GPUS:
        raise KoffError(
            f"gpu must be one of {', '.join(GPUS)}; got {gpu!r}. For another leave --gpu out and "
            "give --gpu-memory and --tflops"
        )
    peak, size = GPUS[gpu.lower()]
    size = size if gpu_memory is None else gpu_memory
    for name, value in {"gpus": gpus, "gpu_memory": size, "tflops": 1.0 if tflops is None else tflops}.items():
        if not value > 0:
            raise KoffError(f"{name} must be more than 0; got {value}")
    from koff_lightning.training.planning import count  # imports what is heavy

    options = [*(word for name in config for word in ("--config", name)), *(further or [])]
    run = _read(options, gpus, model_config, bf16=True)
    counts = count(run.step)
    if run.options["model"]["activation_checkpointing"] == AUTO and _needs(run, counts) > size * ROOM * GIB:
        run = replace(run, step=replace(run.step, checkpointing=True))
        counts = count(run.step)
    for line in [*run.about(size), "", *_memory(run, counts, size), "", *_time(run, counts, tflops, peak)]:
        print(line)


def planned(options: list[str], gpus: int = 1, on_cpus: bool = False) -> tuple[int, float]:
    """Tokens of a micro-batch and bytes at the peak, both on each device, of `koff fit` with these options.

    Args:
        options: Options of `koff fit`.
        gpus: Processes of the run.
        on_cpus: Their devices are the processors that are here.
    """
    from koff_lightning.training.planning import count, memory

    run = _read(options, gpus, None, bf16=None)
    step = replace(run.step, gpu=not on_cpus)
    return step.rows * step.length, sum(memory(step, count(step), gpus, run.sharded).values())


# ------------------------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class _Run:
    """A run as far as its cost depends on it."""

    options: dict[str, Any]
    step: "Step"
    source: str  # of the backbone's sizes
    gpus: int
    sharded: bool

    def about(self, size: float) -> list[str]:
        """The line that says what is planned."""
        model, ways = self.options["model"], "sharded weights" if self.sharded else "whole weights on each"
        many = f", {ways}" if self.gpus > 1 else ""
        return [
            f"{model['backbone']} ({self.source}), {self.gpus} x {size:g} GiB{many}; {self.step.rows} rows of "
            f"{self.step.length} tokens on each, {len(self.step.domains)} domains, "
            f"activations {'recomputed' if self.step.checkpointing else 'kept'}, "
            f"KL {self._teacher}, {self.options['trainer']['precision']}"
        ]

    @property
    def _teacher(self) -> str:
        loss = self.step.loss
        return "off" if not loss.kl else "with a stored teacher" if loss.teacher == "stored" else "with a teacher pass"

    @property
    def accumulate(self) -> int:
        """Micro-batches of an optimizer step."""
        return self.options["trainer"]["accumulate_grad_batches"]


def _read(words: list[str], gpus: int, model_config: str | None, bf16: bool | None) -> _Run:
    """Resolve the options of a run as `koff fit` does on devices with bf16 or without; None: on those that are here."""
    from koff_lightning.commands.parsing.precision import choose, has_bf16
    from koff_lightning.commands.training_cli import resolved
    from koff_lightning.loading import torch_dtype
    from koff_lightning.specs.memories import KVSpec, LoraSpec
    from koff_lightning.specs.sparsity import SparsitySpec
    from koff_lightning.specs.training import LossSpec, RetentionSpec
    from koff_lightning.training.planning import Step

    options = resolved(["fit", *words])
    model, data, trainer = options["model"], options["data"], options["trainer"]
    sections = SimpleNamespace(**model), SimpleNamespace(**trainer)
    choose(*sections, has_bf16(trainer["accelerator"], model["backbone"]) if bf16 is None else bf16)
    model["dtype"], trainer["precision"] = sections[0].dtype, sections[1].precision or "32-true"
    if model.get("artifact"):
        raise KoffError("koff plan knows runs on a whole backbone; model.artifact names one that was cut already")
    config, source = _sizes(model, model_config)
    step = Step(
        config=config,
        domains=list(data["domains"]),
        rows=data["batch_size"],
        length=data["seq_len"],
        dtype=torch_dtype(model["dtype"]),
        precision=trainer["precision"],
        checkpointing=model["activation_checkpointing"] is True,  # of `auto` see `plan`
        sparsity=SparsitySpec(**model["sparsity"]),
        lora=model["lora"] and LoraSpec(**model["lora"]),
        kv=model["kv"] and KVSpec(**model["kv"]),
        loss=LossSpec(**model["loss"]),
        shared=model["shared_memory"],
        retention=model["retention"] and RetentionSpec(**model["retention"]),
    )
    strategy = trainer["strategy"]
    path = strategy["class_path"] if isinstance(strategy, dict) else str(strategy)
    return _Run(options, step, source, gpus, gpus > 1 and path.endswith("ShardedStrategy"))


def _sizes(model: dict[str, Any], given: str | None) -> tuple["PreTrainedConfig", str]:
    """The backbone's config, and where it comes from; the hub is asked last."""
    from transformers import AutoConfig

    from koff_lightning.loading import load_config

    if given is not None:
        path = Path(given).expanduser()
        if path.name != "config.json" or not path.is_file():
            raise KoffError(f"model_config must be a file config.json of a model; got {given!r}")
        return load_config(str(path.parent)), str(path)
    if model["backbone"] in PUBLISHED:
        sizes = dict(PUBLISHED[model["backbone"]])
        return AutoConfig.for_model(sizes.pop("model_type"), **sizes), "its published sizes"
    try:
        config = load_config(
            model["backbone"], revision=model["revision"], trust_remote_code=model["trust_remote_code"]
        )
    except KoffError as error:
        if Path(model["backbone"]).expanduser().exists():  # its own config is there, and what is wrong with it is said
            raise
        raise KoffError(f"{error}; or give the model's config.json with --model-config") from error
    return config, "its config"


# ------------------------------------------------------------------------------------------------- what is told


def _needs(run: _Run, counts: "Counts") -> float:
    """Bytes on each GPU at the peak."""
    from koff_lightning.training.planning import memory

    return sum(memory(run.step, counts, run.gpus, run.sharded).values())


def _memory(run: _Run, counts: "Counts", size: float) -> list[str]:
    """The table of memory, the verdict, and what would help."""
    from koff_lightning.training.planning import memory

    rows = memory(run.step, counts, run.gpus, run.sharded)
    total, room = sum(rows.values()) / GIB, size * ROOM
    shown = {k: v for k, v in rows.items() if v} | {"together": total * GIB}
    lines = ["memory of each GPU at its peak, GiB", *(f"  {k:<32}{_cell(v)}" for k, v in shown.items())]
    kept = f"{room:.1f} GiB, {ROOM:.0%} of {size:g} (the rest: driver, collectives, fragmentation)"
    if total <= room:
        told = _size(total * GIB) if total < 0.1 else f"{total:.1f}"  # the unit stands behind the next number
        return [*lines, f"fits: {told} of {kept}"]
    return [*lines, f"does not fit: {total:.1f} of {kept}", *_advice(run, counts, room * GIB)]


def _advice(run: _Run, counts: "Counts", room: float) -> list[str]:
    """What to change, the cheapest first, until it fits."""
    from koff_lightning.training.planning import count

    known = {(run.step.checkpointing, run.step.rows): counts}  # a count takes seconds, and these alone change

    def needs(run: _Run) -> float:
        what = run.step.checkpointing, run.step.rows
        if what not in known:
            known[what] = count(run.step)
        return _needs(run, known[what])

    words: list[str] = []
    if not run.step.checkpointing:
        words += ["--model.activation_checkpointing=true"]
        run = replace(run, step=replace(run.step, checkpointing=True))
        if needs(run) <= room:
            return _change(words, needs(run))
    if run.gpus > 1 and not run.sharded:
        words += ["--config hardware/fsdp.yaml"]
        run = replace(run, sharded=True)
        if needs(run) <= room:
            return _change(words, needs(run))
    least, most = (needs(replace(run, step=replace(run.step, rows=rows))) for rows in (1, run.step.rows))
    if least > room:
        more = "more GPUs, " if run.sharded else "more GPUs with --config hardware/fsdp.yaml, "
        return [
            f"even one row takes {_size(least)}{' with ' + ' '.join(words) if words else ''}: "
            f"take {more}shorter rows (data.seq_len), smaller memories (model.lora.rank, model.kv.slots) or a smaller "
            "model"
        ]
    rows, before = int(1 + (room - least) / max(1.0, most - least) * (run.step.rows - 1)), run.step.rows
    while rows > 1 and needs(replace(run, step=replace(run.step, rows=rows))) > room:
        rows -= 1  # a straight line from one row to all is a first guess
    run = replace(run, step=replace(run.step, rows=rows))
    words += [f"--data.batch_size={rows}", f"--trainer.accumulate_grad_batches={-(-before * run.accumulate // rows)}"]
    return _change(words, needs(run))


def _change(words: list[str], total: float) -> list[str]:
    return [f"fits with {' '.join(words)}: {_size(total)}"]


def _cell(size: float) -> str:
    """Bytes in GiB under a head that says so; in MiB, and so told, where that would round to nothing."""
    return f"{size / GIB:8.2f}" if size >= GIB / 100 else f"{size / MIB:8.2f} MiB"


def _size(size: float) -> str:
    """Bytes as a person writes them."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / MIB:.1f} MiB"


def _time(run: _Run, counts: "Counts", given: float | None, peak: float) -> list[str]:
    """Tokens per second and hours, and what they rest on."""
    tokens, flops, general = run.step.rows * run.step.length, counts.flops, []
    if counts.retention:
        every = run.step.retention.every
        flops += counts.retention / every
        general = [f"with general text, {counts.retention / counts.flops:.2f} of a step more, in one of {every} steps"]
    steps, each = run.options["trainer"]["max_steps"], tokens * run.accumulate * run.gpus
    lines = [f"{flops / tokens / 1e9:.2f} GFLOP per token, {each:,} tokens per step", *general]
    if given is None and run.step.precision != "bf16-mixed":
        return [
            *lines,
            f"no time told: give --tflops, since what is known of GPUs is for bf16-mixed, not {run.step.precision}",
        ]
    reached = given or peak * UTILISATION
    speed = reached * 1e12 * run.gpus / (flops / tokens)
    why = "as given" if given else f"{UTILISATION:.0%} of the data sheet's, an assumption"
    lines.append(f"{speed:,.0f} tokens/s with {reached:.0f} TFLOP/s on each GPU ({why}; communication not counted)")
    if steps < 1:
        return [*lines, "no hours told: set trainer.max_steps"]
    hours = steps * each / speed / 3600
    lines.append(f"{hours:.2f} hours for {steps:,} steps, {steps * each:,} tokens; evaluation not counted")
    return lines
