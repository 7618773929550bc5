"""Whether vLLM computes what our runtime does, and how fast: artifacts and answers are made here, compared in its venv.

    .venv/bin/python recipes/engines/in_vllm.py make DIR
    .venv-vllm/bin/python recipes/engines/in_vllm.py check DIR --record docs/results/engines.json
    .venv-vllm/bin/python recipes/engines/in_vllm.py speed DIR --record docs/results/engines.json
    .venv-vllm/bin/python recipes/engines/in_vllm.py stock DIR --record docs/results/engines.json

`make` writes small random models of every family, layout and scaled rotary embedding, head size 32 (vLLM's attention on
a CPU takes no 16), pruned, with seven memories: LoRA and slots, LoRA alone, slots alone; and what our runtime continues
24 prompts with. `check` has vLLM continue all of them in one batch, twice, so that the second time they come out of its
prefix cache, between requests that must be refused. `make engines` does both.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # else what samples is compiled first, for half a minute
}
TOKENS, TOP = 24, 5
ROWS, COUNT = 24, 48  # texts and new tokens of what is timed
TIMED = {"enable_prefix_caching": False, "max_num_batched_tokens": 1024}
DOMAINS = {  # name -> LoRA's rank, slots
    "de": (3, 5), "fr": (3, 5), "law": (3, 40), "lora-one": (2, None), "lora-two": (8, None),
    "slots-one": (None, 9), "slots-two": (None, 33),
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 8.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
CASES: dict[str, dict[str, Any]] = {
    "llama-ragged": {},
    "mistral-ragged": {"family": "mistral"},
    "qwen2-ragged": {"family": "qwen2"},
    "qwen3-ragged": {"family": "qwen3"},
    "llama-uniform": {"layout": "uniform", "uniform": True},
    "llama-masked": {"layout": "masked"},
    "llama-merged": {"layout": "merged"},
    "llama-deci": {"layout": "deci"},
    "llama3-rope-ragged": {"family": "llama3_rope"},
    "yarn-rope-ragged": {"changes": {"rope_parameters": YARN}},
    "linear-rope-ragged": {"changes": {"rope_parameters": LINEAR}},
}
# Of the model that is timed: the same shapes in our classes (ragged) and, as plain Llama, in vLLM's own (uniform).
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8}
SIZES |= {"num_key_value_heads": 4, "head_dim": 32}
KINDS = {"LoRA and slots": (8, 32), "LoRA": (8, None), "slots": (None, 32)}  # three domains each, for equal work
# What differs between the engines of the cases, so that each way of reading is met: shorter parts of a prompt than
# slots, larger blocks, a cache that does not hold all texts at a time.
ENGINES: dict[str, dict[str, Any]] = {
    "qwen3-ragged": {"max_num_batched_tokens": 32, "max_num_seqs": 24},
    "mistral-ragged": {"block_size": 64},
    "qwen2-ragged": {"num_gpu_blocks_override": 24},
}


# ------------------------------------------------------------------------------------------- in the project's venv


def make(work: Path, names: list[str], sizes: list[int]) -> None:
    """Artifacts and our answers; `sizes` are of the model that is timed."""
    import torch

    torch.set_num_threads(1)
    for name in names:
        if not (work / name / "answers.json").is_file():
            artifact(work / name, **CASES[name])
            (work / name / "answers.json").write_text(json.dumps(answers(work / name / "artifact")), encoding="utf-8")
            print(name, "made", flush=True)
    if not (work / "speed").exists():
        timed = {name: KINDS[kind] for kind, names in timed_domains().items() for name in names}
        for layout in ("ragged", "uniform"):
            changes = dict(zip(SIZES, sizes, strict=True))
            artifact(work / "speed" / layout, layout=layout, domains=timed, changes=changes, uniform=True)


def timed_domains() -> dict[str, list[str]]:
    """Kind of memory -> the names of its domains, in the model that is timed."""
    return {kind: [f"{kind.lower().replace(' ', '-')}-{number}" for number in range(3)] for kind in KINDS}


def artifact(
    folder: Path,
    family: str = "llama",
    layout: str = "ragged",
    domains: dict[str, tuple[int | None, int | None]] = DOMAINS,
    **options: Any,
) -> None:
    """One small artifact with all memories."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from tiny_artifact import tiny_decomposition

    from koff_lightning.artifact.export import export
    from koff_lightning.specs.memories import KVSpec, LoraSpec

    changes = {"head_dim": 32} | options.pop("changes", {})
    folder.parent.mkdir(exist_ok=True)
    first = next(iter(domains))
    module = tiny_decomposition(folder, family, changes=changes, domains=[first], **options)
    for name, (rank, slots) in domains.items():
        if name != first:
            module.memories.add(name, rank and LoraSpec(rank=rank, alpha=2.0 * rank), slots and KVSpec(slots=slots))
    torch.manual_seed(1)
    sinks = [buffer for name, buffer in module.memories.named_buffers() if "sink" in name]
    for tensor in (*module.memories.lora_parameters(), *module.memories.kv_parameters(), *sinks):
        torch.nn.init.normal_(tensor, std=0.3 if tensor.ndim == 3 else 0.1)
    domain = first if layout == "merged" else None
    export(module, folder / "artifact", layout=layout, domain=domain, prove=False)


def answers(folder: Path) -> list[dict[str, Any]]:
    """Three prompts with every memory and with none, continued by our runtime."""
    import torch

    from koff_lightning import load_decomposed

    model, rows = load_decomposed(folder), []
    memories = [None, *model.domains]
    numbers = torch.Generator().manual_seed(0)
    for length in (3, 30, 70):
        prompt = torch.randint(3, 300, (length,), generator=numbers)
        ids, steps = prompt.repeat(len(memories), 1), []
        for _ in range(TOKENS):
            with torch.no_grad():
                scores = model(ids, domains=memories).logits[:, -1].float().log_softmax(-1)
            best = scores.topk(TOP)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            steps.append([list(zip(*pair, strict=True)) for pair in pairs])
            ids = torch.cat([ids, best.indices[:, :1]], dim=1)
        for place, memory in enumerate(memories):
            tokens, top = ids[place, length:].tolist(), [step[place] for step in steps]
            rows.append({"ids": prompt.tolist(), "memory": memory, "tokens": tokens, "top": top})
    return rows


# ------------------------------------------------------------------------------------------------ in vLLM's venv


class Engine:
    """vLLM over an artifact, in this process.

    Args:
        folder: The artifact.
        bare: The backbone alone: no LoRA, no connector.
        options: Of `vllm.LLM`.
    """

    def __init__(self, folder: Path, bare: bool = False, **options: Any) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        from koff_lightning.serving.vllm.slots import FOLDER, find

        given = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 32, "max_num_batched_tokens": 256}
        given |= {"enforce_eager": True, "block_size": 32, "enable_prefix_caching": True}
        if bare:
            self.held, self.loras = {}, {}
            self.llm = LLM(str(folder / "backbone"), **given | options)
            return
        homes = sorted(path for path in (folder / "memories").iterdir() if path.is_dir())
        self.held = {home.name: find(folder / "memories", home.name) for home in homes}
        adapted = [home for home in homes if (home / "adapter_config.json").is_file()]
        self.loras = {home.name: LoRARequest(home.name, n, str(home)) for n, home in enumerate(adapted, 1)}
        connector = {"kv_connector": "KoffMemories", "kv_role": "kv_consumer"}
        connector["kv_connector_extra_config"] = {FOLDER: str(folder / "memories")}
        # As many places as adapters: a row without one must not take the last.
        lora = {"enable_lora": True, "max_loras": len(adapted), "max_lora_rank": 8} if adapted else {}
        self.llm = LLM(str(folder / "backbone"), kv_transfer_config=connector, **given | lora | options)

    def request(self, ids: list[int], memory: str | None, count: int = TOKENS, **changes: Any) -> tuple[Any, Any, Any]:
        """A prompt, its parameters and its LoRA; `changes` make it a wrong one."""
        from vllm import SamplingParams

        from koff_lightning.serving.vllm.slots import KEY, with_places

        held = self.held.get(memory)
        prompt: dict[str, Any] = {"prompt_token_ids": with_places(ids, held.slots if held else 0)}
        extra = None
        if held is not None:
            prompt["cache_salt"] = changes.pop("salt", held.salt)
            extra = {"kv_transfer_params": {changes.pop("key", KEY): changes.pop("called", memory)}}
        options = {"temperature": 0, "max_tokens": count, "logprobs": TOP, "ignore_eos": True, "extra_args": extra}
        return prompt, SamplingParams(**options | changes), self.loras.get(memory)

    def __call__(self, requests: list[tuple[Any, Any, Any]]) -> list[Any]:
        """What comes of requests that are under way together."""
        prompts, parameters, loras = zip(*requests, strict=True)
        lora = list(loras) if self.loras else None
        return self.llm.generate(list(prompts), list(parameters), lora_request=lora, use_tqdm=False)

    def close(self) -> None:
        """Free what it holds."""
        del self.llm
        gc.collect()


def compared(rows: list[dict[str, Any]], outputs: list[Any], ranks: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Arm -> equal texts, of how many, and the largest difference of a log-probability."""
    arms: dict[str, dict[str, Any]] = {}
    for row, output in zip(rows, outputs, strict=True):
        found = output.outputs[0]
        tokens, due = list(found.token_ids), row["tokens"]
        same = next((at for at, pair in enumerate(zip(due, tokens, strict=False)) if pair[0] != pair[1]), len(tokens))
        gap = max(
            (
                abs(found.logprobs[step][token].logprob - value)
                for step in range(min(same + 1, len(tokens)))
                for token, value in row["top"][step]
                if token in found.logprobs[step]
            ),
            default=float("inf"),
        )
        rank, slots = ranks.get(row["memory"], (None, None))
        kind = {(False, False): "bare", (True, False): "lora", (False, True): "kv", (True, True): "both"}
        arm = arms.setdefault(kind[bool(rank), bool(slots)], {"equal": 0, "of": 0, "gap": 0.0})
        arm["equal"] += same == TOKENS
        arm["of"] += 1
        arm["gap"] = max(arm["gap"], float(f"{gap:.1e}"))
    return arms


def check(work: Path, names: list[str], record: Path | None) -> bool:
    """Whether all rows of all cases are equal and all that must be refused is; writes the record."""
    sound = True
    for name in names:
        folder, rows = work / name / "artifact", json.loads((work / name / "answers.json").read_text(encoding="utf-8"))
        start = time.process_time()
        engine = Engine(folder, **ENGINES.get(name, {}))
        about = json.loads((folder / "koff.json").read_text(encoding="utf-8"))
        ranks = {domain: (card["rank"], card["slots"]) for domain, card in about["domains"].items()}
        for turn in ("cold", "warm"):
            wrong = wrongs(engine, rows)
            outputs = engine([engine.request(row["ids"], row["memory"]) for row in rows] + list(wrong.values()))
            arms = compared(rows, outputs[: len(rows)], ranks)
            for label, output in zip(wrong, outputs[len(rows) :], strict=True):
                if output.outputs[0].finish_reason != "error":
                    print(f"{name}: {label} was answered ({output.outputs[0].finish_reason})", flush=True)
                    sound = False
            sound &= all(arm["equal"] == arm["of"] and arm["gap"] < 1e-4 for arm in arms.values())
            print(f"{name:<20}{turn:<6}{json.dumps(arms)}  {len(wrong)} refused", flush=True)
        print(f"{name:<20}{time.process_time() - start:.0f} s of processor time", flush=True)
        engine.close()
        if record is not None:
            put(record, name, about["layout"], arms)
    return sound


def wrongs(engine: Engine, rows: list[dict[str, Any]]) -> dict[str, tuple[Any, Any, Any]]:
    """Requests that must fail, each for itself."""
    ids = rows[-1]["ids"]
    memory = next((name for name, held in engine.held.items() if held.slots), None)
    if memory is None:
        return {}
    made = {
        "an unknown memory": {"called": "nobody"},
        "a name that leads out of the folder": {"called": "../de"},
        "a misspelt key": {"key": "koff_memry"},
        "no salt": {"salt": None},
        "another memory's salt": {"salt": engine.held[memory].salt[:-1] + "x"},
        "log-probabilities of the prompt": {"prompt_logprobs": 1},
    }
    return {label: engine.request(ids, memory, **changes) for label, changes in made.items()}


def speed(work: Path, rounds: int, record: Path | None, dtype: str) -> None:
    """Tokens per second: texts of one domain, of every domain in turn, and of several together.

    One domain's time is the mean over the domains of a kind in the same round.
    """
    engine = Engine(work / "speed" / "ragged" / "artifact", dtype=dtype, **TIMED)
    kinds = timed_domains()
    batches: dict[str, tuple[Engine, list[str | None]]] = {"bare": (engine, [None] * ROWS)}
    for kind, names in kinds.items():
        batches |= {f"{kind}: {name}": (engine, [name] * ROWS) for name in names}
        batches[f"{kind}: mixed"] = (engine, names * (ROWS // len(names)))

    def mixed(times: dict[str, list[float]]) -> dict[str, list[float]]:
        ratios = {}
        for kind, names in kinds.items():
            alone = [statistics.mean(ts) for ts in zip(*(times[f"{kind}: {name}"] for name in names), strict=True)]
            ratios[kind] = ratio(alone, times[f"{kind}: mixed"])
        return ratios

    compared = f"{ROWS} texts of 24 and {COUNT} tokens of one domain, and of several domains together"
    race("speed", batches, rounds, mixed, record, compared)


def stock(work: Path, rounds: int, record: Path | None, dtype: str) -> None:
    """Tokens per second of a bare backbone: in our class for unequal widths, and as plain Llama in vLLM's own class.

    Both have the same shapes, so the same arithmetic; an engine that reads no memory cannot stand beside one that does.
    """
    layouts = {"ours": "ragged", "stock": "uniform"}
    options = {"bare": True, "dtype": dtype} | TIMED
    engines = {name: Engine(work / "speed" / layout / "artifact", **options) for name, layout in layouts.items()}
    batches: dict[str, tuple[Engine, list[str | None]]] = {name: (one, [None] * ROWS) for name, one in engines.items()}
    compared = f"{ROWS} texts of 24 and {COUNT} tokens, the same shapes in our class and in vLLM's own"
    race("stock", batches, rounds, lambda ts: {"ours": ratio(ts["stock"], ts["ours"])}, record, compared)


def race(
    name: str,
    batches: dict[str, tuple[Engine, list[str | None]]],
    rounds: int,
    ratios: Callable[[dict[str, list[float]]], dict[str, list[float]]],
    record: Path | None,
    compared: str,
) -> None:
    """Run every batch once in each round, every other round backwards, and print and record what it took.

    Processor time says what is computed, wall time what was waited for, other programs included.

    Args:
        name: Of the record's entry, and of the command.
        batches: Label -> engine, and the memory of each row.
        rounds: After one that warms up.
        ratios: Label -> seconds of each round, into label -> how much faster.
        record: JSON to put it in.
        compared: What the entry says of it.
    """
    clocks = {"processor": time.process_time, "wall": time.perf_counter}
    times: dict[str, dict[str, list[float]]] = {clock: {label: [] for label in batches} for clock in clocks}
    found: dict[str, Any] = {}
    for number in range(rounds + 1):
        for label in list(batches)[:: 1 if number % 2 else -1]:
            engine, memories = batches[label]
            made = [engine.request([3 + (place + at) % 300 for at in range(24)], m, COUNT, logprobs=None)
                    for place, m in enumerate(memories)]  # fmt: skip
            start = {clock: read() for clock, read in clocks.items()}
            outputs = engine(made)
            took = {clock: read() - start[clock] for clock, read in clocks.items()}
            if any(len(output.outputs[0].token_ids) != COUNT for output in outputs):
                raise SystemExit(f"{label}: not all {ROWS} texts have {COUNT} tokens")
            if number:
                for clock, one in took.items():
                    times[clock][label].append(one)
        if number:
            found = {"rounds": number}
            for clock, by_label in times.items():
                rates = {label: spread([ROWS * COUNT / one for one in ts], 1) for label, ts in by_label.items()}
                found[clock] = {"tokens_per_second": rates, "ratio": ratios(by_label)}
            print(json.dumps(found), flush=True)
    if record is not None:
        from record import write

        command = f"python recipes/engines/in_vllm.py {name} DIR --rounds {rounds}"
        write(record, f"vllm-{name}", engine="vLLM", compared=compared, command=command, figures=found)


def ratio(slow: list[float], fast: list[float]) -> list[float]:
    """How many times as fast the second are, pair by pair: median, least, greatest."""
    return spread([one / other for one, other in zip(slow, fast, strict=True)], 3)


def spread(values: list[float], digits: int) -> list[float]:
    """Median, least, greatest."""
    return [round(value, digits) for value in (statistics.median(values), min(values), max(values))]


def put(record: Path, name: str, layout: str, arms: dict[str, Any]) -> None:
    """Write a case into the record."""
    from record import write

    write(
        record,
        f"vllm-{name}",
        engine="vLLM",
        layout=layout,
        compared=f"greedy tokens of texts ({TOKENS} each) under way together, and the log-probabilities of the "
        f"{TOP} likeliest at every step, with our runtime in float32; then again out of the prefix cache",
        command="python recipes/engines/in_vllm.py check DIR",
        arms=arms,
    )


def main() -> None:
    """Do what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "check", "speed", "stock"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="of `speed` and `stock`")
    parser.add_argument("--sizes", type=int, nargs=len(SIZES), default=list(SIZES.values()), metavar="N",
                        help=f"of the model that is timed, {', '.join(SIZES)}; on a GPU take a real one's")  # fmt: skip
    parser.add_argument("--dtype", default="float32", help="of `speed` and `stock`; bfloat16 on a GPU")
    parser.add_argument("--record", type=Path, help="JSON to put what is found in")
    options = parser.parse_args()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    sys.path.insert(0, str(Path(__file__).parent))
    if options.what == "make":
        make(options.work, options.cases, options.sizes)
    elif options.what in ("speed", "stock"):
        {"speed": speed, "stock": stock}[options.what](options.work, options.rounds, options.record, options.dtype)
    elif not check(options.work, options.cases, options.record):
        sys.exit("vLLM and our runtime differ")


if __name__ == "__main__":
    main()
