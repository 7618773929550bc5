"""`koff bench serve`: what the smaller backbone and its memories cost and save when they are used.

Masks and memories are random: speed does not depend on what was learned. Every comparison runs its two sides in turn in
one process, so that drift of the machine's speed cancels in the ratio; medians of the paired ratios are printed. On one
CPU thread the time is that of the processor, which leaves out what other programs take of it.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.autograd.profiler import profile
from transformers import DynamicCache, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from koff_lightning.artifact.decomposed import DecomposedModel, load_decomposed
from koff_lightning.artifact.export import export
from koff_lightning.backbone import cache_argument, kv_shapes, parameter_counts
from koff_lightning.commands.parsing.counts import check_counts
from koff_lightning.decomposition import Decomposition
from koff_lightning.loading import device_named, load_backbone
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.support.errors import KoffError, require

Run = Callable[[], object]


def bench_serving(
    backbone: str = "koff-tiny",
    sparsities: Sequence[float] = (0.12, 0.25, 0.50),
    rank: int = 8,
    slots: int = 16,
    memories: int = 100,
    prompt: int = 512,
    multiple_of: int = 1,
    rounds: int = 9,
    device: str = "cpu",
    dtype: str = "float32",
    threads: int | None = None,
) -> None:
    """Time pruned backbones, memories and switching against the dense model.

    Args:
        backbone: Hub id, folder, `.gguf` file or `koff-tiny`.
        sparsities: Shares of the body to remove.
        rank: LoRA rank of every memory.
        slots: KV slots of every memory.
        memories: How many memories to load beside one backbone.
        prompt: Tokens of the prefill.
        multiple_of: FFN neurons that stay in a layer are a multiple of this many, as by `sparsity.multiple_of`.
        rounds: Counted pairs of each comparison.
        device: Torch device.
        dtype: Dtype of the backbone.
        threads: CPU threads; torch's own choice when null.
    """
    if memories < 16:
        raise KoffError(f"bench: at least 16 memories are wanted, for a batch of 16 domains; got {memories}")
    require(bool(sparsities), "bench: sparsities names no share to remove: give one or more, as [0.12]")
    check_counts(rounds=rounds, prompt=prompt, threads=1 if threads is None else threads)
    device = str(device_named(device))
    torch.set_num_threads(threads or torch.get_num_threads())
    print(
        f"{backbone}, {device}, {dtype}, {torch.get_num_threads()} threads, {rounds} pairs; random masks and memories; "
        f"widths in multiples of {multiple_of}; {'processor' if _clock() is time.process_time else 'wall'} time"
    )
    disable_progress_bar()
    dense = load_backbone(backbone, dtype=dtype).to(device)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for share in sparsities:
            names = [f"d{i}" for i in range(2)]
            sparsity = SparsitySpec(target=share, multiple_of=multiple_of)
            path = _artifact(Path(folder) / f"{share}", backbone, sparsity, names, rank, slots, dtype)
            pruned = load_decomposed(path, device=device, domains=names[:1])
            _pruned_against_dense(dense, pruned, share, prompt, rounds)
            merged = _artifact(Path(folder) / f"m{share}", backbone, sparsity, names, rank, slots, dtype, merged=True)
            _memory_cost(pruned, load_decomposed(merged, device=device), rounds)
        names = [f"d{i}" for i in range(memories)]
        sparsity = SparsitySpec(target=sparsities[0], multiple_of=multiple_of)
        path = _artifact(Path(folder) / "many", backbone, sparsity, names, rank, slots, dtype)
        _many_memories(path, names, device, rounds)


def _artifact(
    path: Path,
    backbone: str,
    sparsity: SparsitySpec,
    names: list[str],
    rank: int,
    slots: int,
    dtype: str,
    merged: bool = False,
) -> Path:
    """Export a decomposition with a random mask and random memories."""
    with torch.inference_mode(False):
        model = Decomposition(backbone, names, sparsity, LoraSpec(rank, 2 * rank), KVSpec(slots), dtype=dtype)
        torch.manual_seed(0)
        model.gates.harden(model.budget.harden(torch.rand(len(model.gates.logits))))
        size = model.backbone.config.vocab_size
        for name in names:
            with model.under():
                model.memories.kv[model.memories.key(name)].initialise_(model.backbone, torch.randint(size, (slots,)))
        for parameter in model.memories.lora_parameters():
            torch.nn.init.normal_(parameter, std=0.01)
        layout = {"layout": "merged", "domain": names[0]} if merged else {}
        export(model, path, prove=False, **layout)
    return path


def _pruned_against_dense(
    dense: PreTrainedModel, pruned: DecomposedModel, share: float, prompt: int, rounds: int
) -> None:
    """Prefill and decode without a memory, with the gain that the fewer multiplications allow."""
    ids = torch.randint(dense.config.vocab_size, (1, prompt), device=dense.device)
    pruned.memories.activate([None])
    in_products = _share_of_products(_prefill(dense, ids)())
    for what, make in (("prefill", _prefill), ("decode", _decode)):
        gain, low, high = _ratio(make(dense, ids), make(pruned.backbone, ids), rounds)
        line = f"{share:>4.0%} removed  {what:<8} {gain:.3f} x as fast as dense ({low:.2f} to {high:.2f})"
        if what == "prefill":
            fewer = _multiplications(dense, prompt) / _multiplications(pruned.backbone, prompt)
            allowed = 1 / (1 - in_products + in_products / fewer)  # Amdahl's law
            line += f"; {fewer:.3f} x fewer multiplications in {in_products:.0%} of the time allow {allowed:.3f} x: "
            line += f"{(gain - 1) / (allowed - 1):.0%} of that gain"
        _say(line)


def _memory_cost(model: DecomposedModel, merged: DecomposedModel, rounds: int) -> None:
    """What a memory adds to a decode step; the same with its LoRA merged into the weights."""
    ids = torch.randint(model.backbone.config.vocab_size, (1, 128), device=model.backbone.device)
    bare, own = _decode(model.backbone, ids, model, [None]), _decode(model.backbone, ids, model, model.domains[:1])
    for what, run in (("a memory", own), ("merged", _decode(merged.backbone, ids, merged, merged.domains[:1]))):
        ratio, low, high = _ratio(run, bare, rounds)
        print(
            f"              {what} adds {ratio - 1:+.1%} to a decode step ({low - 1:+.1%} to {high - 1:+.1%})",
            flush=True,
        )
    ratio, low, high = _ratio(_decode(merged.backbone, ids, merged, [None]), bare, rounds)
    _say(f"              merged LoRA alone adds {ratio - 1:+.1%} ({low - 1:+.1%} to {high - 1:+.1%})")


def _many_memories(path: Path, names: list[str], device: str, rounds: int) -> None:
    """Load many memories beside one backbone, switch among them, and serve 16 of them in one batch."""
    model = load_decomposed(path, device=device, domains=[])
    start = time.perf_counter()
    for name in names:
        model.add_memory(path / "memories" / name)
    seconds = time.perf_counter() - start
    size = sum(file.stat().st_size for file in (path / "memories").rglob("*.safetensors"))
    _say(f"{len(names)} memories, {size / 2**20:.0f} MiB, loaded in {seconds:.2f} s")
    switches = []
    for name in names:
        start = time.perf_counter()
        model.memories.activate([name])
        switches.append(time.perf_counter() - start)
    print(
        f"switching takes {1e3 * statistics.median(switches):.3f} ms (at most {1e3 * max(switches):.3f} ms)", flush=True
    )
    ids = torch.randint(model.backbone.config.vocab_size, (16, 64), device=model.backbone.device)
    for what, make in (("prefill", _prefill), ("decode", _decode)):
        many, one = make(model.backbone, ids, model, names[:16]), make(model.backbone, ids, model, names[:1] * 16)
        ratio, low, high = _ratio(many, one, rounds)
        print(
            f"16 rows, 16 domains, {what:<8} {ratio:.2f} x the time of one domain ({low:.2f} to {high:.2f})", flush=True
        )


def _prefill(
    model: PreTrainedModel, ids: torch.Tensor, owner: DecomposedModel | None = None, domains: Sequence[str | None] = ()
) -> Run:
    def run() -> None:
        model(input_ids=ids, use_cache=True, logits_to_keep=1)

    return _routed(run, owner, domains)


def _decode(
    model: PreTrainedModel, ids: torch.Tensor, owner: DecomposedModel | None = None, domains: Sequence[str | None] = ()
) -> Run:
    """Eight decode steps after a prompt; the cache is cut back after each so that all runs see the same length."""
    cache = DynamicCache()
    kept = {cache_argument(model): cache, "use_cache": True}
    if owner is not None:
        owner.memories.activate(list(domains))
    model(input_ids=ids, logits_to_keep=1, **kept)

    def run() -> None:
        for _ in range(8):
            model(input_ids=ids[:, -1:], **kept)
        cache.crop(-8)

    return _routed(run, owner, domains)


def _routed(run: Run, owner: DecomposedModel | None, domains: Sequence[str | None]) -> Run:
    """Switch memories outside the measured time; an unmeasured pass fills what is kept between steps."""

    def prepare() -> Run:
        if owner is not None:
            owner.memories.activate(list(domains))
            run()
        return run

    return prepare


def _ratio(first: Run, second: Run, rounds: int) -> tuple[float, float, float]:
    """Median, least and greatest ratio of the times of two runs, taken in turn after two pairs that do not count."""
    pairs = [(_seconds(first()), _seconds(second())) for _ in range(rounds + 2)][2:]
    ratios = [a / b for a, b in pairs]
    return statistics.median(ratios), min(ratios), max(ratios)


def _seconds(run: Run) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    clock = _clock()
    start = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def _clock() -> Callable[[], float]:
    """With one thread and no GPU nothing is waited for but the processor."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time if alone else time.perf_counter


def _multiplications(model: PreTrainedModel, tokens: int) -> int:
    """Multiplications of a prefill: linears of all layers, attention, one row of the head."""
    config = model.config
    queries_per_head = config.num_attention_heads // config.num_key_value_heads
    width = sum(heads * queries_per_head * size for heads, size in kv_shapes(model))
    attention = width * tokens * tokens  # scores and values, each over the causal half of the square
    return parameter_counts(model)["body"] * tokens + attention + config.vocab_size * config.hidden_size


def _share_of_products(run: Run) -> float:
    """Share of a run's time that is spent in matrix products and attention."""
    run()
    cuda = torch.cuda.is_available()
    with profile(use_device="cuda" if cuda else None, use_kineto=cuda) as record:  # on the CPU Kineto prints its steps
        run()
    events = record.key_averages()
    on_device = any(event.self_device_time_total for event in events)
    times = [(e.key, e.self_device_time_total if on_device else e.self_cpu_time_total) for e in events]
    names = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product", "_flash", "_efficient")
    products = tuple(f"aten::{name}" for name in names)
    return sum(time for name, time in times if name.startswith(products)) / sum(time for _, time in times)


def _say(line: str) -> None:
    print(line, flush=True)
