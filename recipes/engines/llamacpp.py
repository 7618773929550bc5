"""What llama.cpp makes of an artifact: bits per byte by type of weights, and how fast it decodes.

    python recipes/engines/llamacpp.py bytes DIR --record docs/results/engines.json
    python recipes/engines/llamacpp.py speed --record docs/results/engines.json

`bytes` scores an artifact over bundled domains on their held-out text, each domain with its own memory. `speed` takes a
random model with the shapes of SmolLM2-135M and koff-tiny's vocabulary, dense and with 12 % of its body removed (widths
in multiples of 32), a memory of rank 8 and 16 slots; runs of all engines in turn, processor time of one thread. Both
write their figures into the record (record.py).
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
from record import write
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from koff_lightning import load_decomposed
from koff_lightning.artifact.export import export
from koff_lightning.data.readers import Fields, read_records
from koff_lightning.data.sources import bundled_file
from koff_lightning.data.split import BadLines
from koff_lightning.decomposition import Decomposition
from koff_lightning.loading import load_tokenizer
from koff_lightning.serving.llama_model import LlamaModel
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.specs.sparsity import SparsitySpec

WINDOW = 256  # tokens that are scored together
KINDS = {"f32": "f32", "f16": "f16", "q8_0": "f16"}  # of the weights -> of the token cache


def windows(tokenizer: PreTrainedTokenizerBase, domain: str, most: int) -> tuple[list[list[int]], int]:
    """Held-out text as rows of at most `WINDOW` tokens, the start token first, and the bytes that they stand for."""
    rows, size = [], 0
    for _, document in read_records(bundled_file(domain, "heldout"), Fields(), BadLines(domain, "fail")):
        ids = tokenizer(document.text).input_ids
        for start in range(1, len(ids), WINDOW - 1):
            row = ids[start : start + WINDOW - 1]
            rows.append([ids[0], *row])
            size += len(tokenizer.decode(row).encode())
        if size > most:
            break
    return rows, size


def bits(logits: torch.Tensor, ids: list[int]) -> float:
    """Bits that the tokens after the first cost by logits [T, V]."""
    scores = logits[:-1].double().log_softmax(-1)
    return -float(scores.gather(1, torch.tensor(ids[1:])[:, None]).sum()) / math.log(2)


@torch.no_grad()
def bytes_(folder: Path, most: int) -> dict:
    """Bits per byte of each domain under our runtime and under llama.cpp."""
    own = load_decomposed(folder, dtype="float32")
    texts = {domain: windows(own.tokenizer, domain, most) for domain in own.domains}
    found = {"own runtime, f32": {}} | {f"llama.cpp, {kind}": {} for kind in KINDS}
    for domain, (rows, size) in texts.items():
        cost = sum(bits(own(torch.tensor([row]), domains=domain).logits[0], row) for row in rows)
        found["own runtime, f32"][domain] = cost / size
    for kind, cache in KINDS.items():
        llama = LlamaModel(folder, kind=kind, cache=cache, rows=1, threads=1)
        for domain, (rows, size) in texts.items():
            cost = 0.0
            for row in rows:
                text = llama.begin(domain)
                cost += bits(llama.read([(text, row)], everywhere=True)[0], row)
                llama.end(text)
            found[f"llama.cpp, {kind}"][domain] = cost / size
        llama.close()
    for name, figures in found.items():
        print(f"{name:<20}" + "  ".join(f"{domain} {value:.4f}" for domain, value in figures.items()), flush=True)
    return {"bytes": sum(size for _, size in texts.values()), "bits_per_byte": found}


# ------------------------------------------------------------------------------------------------------- speed


def random_artifacts(work: Path, layers: int) -> dict[str, Path]:
    """Dense, and pruned by 12 % with a memory, of the shapes of SmolLM2-135M."""
    load_tokenizer("koff-tiny").save_pretrained(work / "model")
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": 4096}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=1)).save_pretrained(work / "model")
    for name, target in (("dense", 0.0), ("pruned", 0.12)):
        module = Decomposition(
            str(work / "model"),
            domains=["de"],
            lora=LoraSpec(rank=8) if target else None,
            kv=KVSpec(slots=16) if target else None,
            sparsity=SparsitySpec(target=target, multiple_of=32 if target else 1),
        )
        if target:
            module.gates.harden(module.budget.harden(torch.rand(len(module.gates.logits))))
            for tensor in (*module.memories.lora_parameters(), *module.memories.kv_parameters()):
                torch.nn.init.normal_(tensor, std=0.02)
        export(module.eval(), work / name, prove=False)
    return {name: work / name for name in ("dense", "pruned")}


class Own:
    """Our runtime, one text."""

    def __init__(self, folder: Path, memory: str | None) -> None:
        self.model, self.memory = load_decomposed(folder), memory

    def __call__(self, prompt: list[int], count: int) -> None:
        """Continue a prompt by `count` tokens."""
        self.model.generate(
            torch.tensor([prompt]), domains=self.memory, max_new_tokens=count, min_new_tokens=count, do_sample=False
        )


class Llama:
    """llama.cpp, one text."""

    def __init__(self, folder: Path, memory: str | None, kind: str) -> None:
        self.model = LlamaModel(folder, kind=kind, cache=KINDS[kind], rows=1, context=512, threads=1)
        self.memory = memory

    def __call__(self, prompt: list[int], count: int) -> None:
        """Continue a prompt by `count` tokens."""
        text = self.model.begin(self.memory)
        logits = self.model.read([(text, prompt)])[0]
        for _ in range(count):
            logits = self.model.read([(text, [int(logits[-1].argmax())])])[0]
        self.model.end(text)


def speed(rounds: int, count: int, layers: int) -> dict:
    """Tokens per second of processor time, each engine's runs in turn with the others'."""
    prompt = torch.randint(3, 4000, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    times: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as work:
        made = random_artifacts(Path(work), layers)
        runs = {}
        for name, memory in (("dense", None), ("pruned", None), ("pruned", "de")):
            label = f"{name}{', LoRA and KV memory' if memory else ''}"
            runs[f"own runtime, f32: {label}"] = Own(made[name], memory)
            for kind in KINDS:
                runs[f"llama.cpp, {kind}: {label}"] = Llama(made[name], memory, kind)
        for number in range(rounds + 1):
            for name, run in runs.items():
                run(prompt, 2)
                start = time.process_time()
                run(prompt, 2)
                middle = time.process_time()
                run(prompt, 2 + count)
                if number:  # the first round warms up
                    times.setdefault(name, []).append(time.process_time() - middle - (middle - start))
    found = {name: [round(count / t, 1) for t in (median(t), max(t), min(t))] for name, t in times.items()}
    for name, (middle, least, most) in found.items():
        print(f"{name:<50}{middle:8.1f} tokens/s ({least} to {most})", flush=True)
    return {"tokens": count, "rounds": rounds, "layers": layers, "tokens_per_second": found}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["bytes", "speed"])
    parser.add_argument("folder", nargs="?", type=Path, help="artifact over bundled domains, for `bytes`")
    parser.add_argument("--bytes", type=int, default=20_000, dest="most", help="held-out text of each domain")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, default=30, help="of the model of `speed`")
    parser.add_argument("--record", type=Path, help="JSON to put the figures in")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scores = options.what == "bytes"
    figures = bytes_(options.folder, options.most) if scores else speed(options.rounds, options.tokens, options.layers)
    if options.record:
        compared = {
            "bytes": "bits per byte by type of weights, beside our runtime in f32, held-out text of the bundled domains"
        }
        compared["speed"] = "tokens per second of processor time of one text, beside our runtime, SmolLM2-135M's shapes"
        command = f"python recipes/engines/llamacpp.py {' '.join(sys.argv[1:])}"
        run = f"llamacpp-{options.what}"
        write(
            options.record, run, engine="llama.cpp", compared=compared[options.what], command=command, figures=figures
        )


if __name__ == "__main__":
    main()
