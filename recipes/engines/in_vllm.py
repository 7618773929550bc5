"""Whether vLLM computes what our runtime does, and how fast: artifacts and answers are made here, compared in its venv.

    .venv/bin/python recipes/engines/in_vllm.py make DIR
    .venv-vllm/bin/python recipes/engines/in_vllm.py check DIR --record docs/results/engines.json
    .venv-vllm/bin/python recipes/engines/in_vllm.py speed DIR --record docs/results/engines.json

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
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8}
SPEED = {"changes": SIZES | {"num_key_value_heads": 4}}  # of the model that is timed
# What differs between the engines of the cases, so that each way of reading is met: shorter parts of a prompt than
# slots, larger blocks, a cache that does not hold all texts at a time.
ENGINES: dict[str, dict[str, Any]] = {
    "qwen3-ragged": {"max_num_batched_tokens": 32, "max_num_seqs": 24},
    "mistral-ragged": {"block_size": 64},
    "qwen2-ragged": {"num_gpu_blocks_override": 24},
}


# ------------------------------------------------------------------------------------------- in the project's venv


def make(work: Path, names: list[str]) -> None:
    """Artifacts and our answers."""
    import torch

    torch.set_num_threads(1)
    for name in names:
        if not (work / name / "answers.json").is_file():
            artifact(work / name, **CASES[name])
            (work / name / "answers.json").write_text(json.dumps(answers(work / name / "artifact")), encoding="utf-8")
            print(name, "made", flush=True)
    if not (work / "speed").exists():
        artifact(work / "speed", **SPEED)


def artifact(folder: Path, family: str = "llama", layout: str = "ragged", **options: Any) -> None:
    """One small artifact with all memories."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    from tiny_artifact import tiny_decomposition

    from koff_lightning.artifact.export import export
    from koff_lightning.memory import KVSpec, LoraSpec

    changes = {"head_dim": 32} | options.pop("changes", {})
    module = tiny_decomposition(folder, family, changes=changes, domains=["de"], **options)
    for name, (rank, slots) in DOMAINS.items():
        if name != "de":
            module.memories.add(name, rank and LoraSpec(rank=rank, alpha=2.0 * rank), slots and KVSpec(slots=slots))
    torch.manual_seed(1)
    sinks = [buffer for name, buffer in module.memories.named_buffers() if "sink" in name]
    for tensor in (*module.memories.lora_parameters(), *module.memories.kv_parameters(), *sinks):
        torch.nn.init.normal_(tensor, std=0.3 if tensor.ndim == 3 else 0.1)
    domain = "de" if layout == "merged" else None
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
        options: Of `vllm.LLM`.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        from koff_lightning.serving.vllm.slots import FOLDER, find

        homes = sorted(path for path in (folder / "memories").iterdir() if path.is_dir())
        self.held = {home.name: find(folder / "memories", home.name) for home in homes}
        adapted = [home for home in homes if (home / "adapter_config.json").is_file()]
        self.loras = {home.name: LoRARequest(home.name, n, str(home)) for n, home in enumerate(adapted, 1)}
        connector = {"kv_connector": "KoffMemories", "kv_role": "kv_consumer"}
        connector["kv_connector_extra_config"] = {FOLDER: str(folder / "memories")}
        # As many places as adapters: a row without one must not take the last.
        lora = {"enable_lora": True, "max_loras": len(adapted), "max_lora_rank": 8} if adapted else {}
        given = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 32, "max_num_batched_tokens": 256}
        given |= {"enforce_eager": True, "block_size": 32, "enable_prefix_caching": True}
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


def speed(work: Path, rounds: int, record: Path | None) -> None:
    """Tokens per second: texts of one domain, of every domain in turn, and of several together.

    A round runs every batch once, every other round backwards. One domain's time is the mean over the domains of a kind
    in the same round. Processor time says what is computed, wall time what was waited for, other programs included.
    """
    engine = Engine(work / "speed" / "artifact", enable_prefix_caching=False, max_num_batched_tokens=1024)
    kinds = {
        "LoRA and slots": ["de", "fr", "law"],
        "LoRA": ["lora-one", "lora-two"],
        "slots": ["slots-one", "slots-two"],
    }
    rows, count = 24, 48
    batches: dict[str, list[str | None]] = {"bare": [None] * rows}
    for kind, names in kinds.items():
        batches |= {f"{kind}: {name}": [name] * rows for name in names}
        batches[f"{kind}: mixed"] = names * (rows // len(names))
    clocks = {"processor": time.process_time, "wall": time.perf_counter}
    times: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in batches} for clock in clocks}
    found: dict[str, Any] = {}
    for number in range(rounds + 1):
        for name in list(batches)[:: 1 if number % 2 else -1]:
            made = [engine.request([3 + (place + at) % 300 for at in range(24)], m, count, logprobs=None)
                    for place, m in enumerate(batches[name])]  # fmt: skip
            start = {clock: read() for clock, read in clocks.items()}
            outputs = engine(made)
            took = {clock: read() - start[clock] for clock, read in clocks.items()}
            if any(len(output.outputs[0].token_ids) != count for output in outputs):
                raise SystemExit(f"{name}: not all {rows} texts have {count} tokens")
            if number:  # the first round warms up
                for clock, one in took.items():
                    times[clock][name].append(one)
        if number:
            found = {"rounds": number} | {clock: rates(times[clock], kinds, rows * count) for clock in clocks}
            print(json.dumps(found), flush=True)
    if record is not None:
        from record import write

        write(
            record,
            "vllm-speed",
            engine="vLLM",
            compared=f"{rows} texts of 24 and {count} tokens of one domain, and of several domains together",
            command=f"python recipes/engines/in_vllm.py speed DIR --rounds {rounds}",
            figures=found,
        )


def rates(times: dict[str, list[float]], kinds: dict[str, list[str]], tokens: int) -> dict[str, Any]:
    """Batch -> tokens per second, kind -> those of mixed domains by those of one; median, least and greatest."""
    found = {"tokens_per_second": {name: spread([tokens / one for one in ts], 1) for name, ts in times.items()}}
    ratios = {}
    for kind, names in kinds.items():
        alone = [statistics.mean(ts) for ts in zip(*(times[f"{kind}: {name}"] for name in names), strict=True)]
        pairs = zip(alone, times[f"{kind}: mixed"], strict=True)
        ratios[kind] = spread([one / mixed for one, mixed in pairs], 3)
    return found | {"mixed_by_one": ratios}


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
    parser.add_argument("what", choices=["make", "check", "speed"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--rounds", type=int, default=5, help="of `speed`")
    parser.add_argument("--record", type=Path, help="JSON to put what is found in")
    options = parser.parse_args()
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    sys.path.insert(0, str(Path(__file__).parent))
    if options.what == "make":
        make(options.work, options.cases)
    elif options.what == "speed":
        speed(options.work, options.rounds, options.record)
    elif not check(options.work, options.cases, options.record):
        sys.exit("vLLM and our runtime differ")


if __name__ == "__main__":
    main()
