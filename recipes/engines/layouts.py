"""Whether engines compute what we do: a small artifact of each layout, bare, LoRA, KV memory and both, for the record.

    python recipes/engines/layouts.py --record docs/results/engines.json
    python recipes/engines/layouts.py --engines PEFT,llama.cpp --layouts ragged

The model is a random Llama of two layers with the tests' tokenizer (tests/tiny_artifact.py), in float32, a third of its
neurons and key-value groups gone; one domain has LoRA and slots, one LoRA alone, one slots alone. Our own runtime is
compared with the dense model under its mask, each other engine with our runtime. An engine that ends in an error has
refused; one that reads only a part of a memory says other tokens, and the record then says how few were equal.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from record import ARMS, LAYOUTS, write
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from koff_lightning import load_decomposed
from koff_lightning.artifact.cartridge import to_cartridge
from koff_lightning.artifact.export import export
from koff_lightning.artifact.memory_files import KV_FILE
from koff_lightning.backbone import rotary_inv_freqs
from koff_lightning.decomposition import Decomposition
from koff_lightning.kv_memory import KVMemory
from koff_lightning.specs.memories import KVSpec, LoraSpec

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from tiny_artifact import VOCABULARY, tiny_decomposition

MEMORIES = {"bare": None, "lora": "fr", "kv": "law", "both": "de"}
TEXTS, TOKENS = 8, 12
Logits = Callable[[list[int]], Tensor]  # ids -> logits [V] of the next token
Greedy = list[tuple[list[int], Tensor]]  # of each text, tokens and the log-probabilities [TOKENS, V] they come from
How = dict[str, str]  # `by` of an arm


def made(work: Path, layout: str, slots: bool = True) -> tuple[Path, Decomposition]:
    """An artifact, and what it was made from; without slots where they are not wanted."""
    options = {"kv": KVSpec(slots=5) if slots else None, "uniform": layout == "uniform"}
    module = tiny_decomposition(work, **options)
    for name, lora, kv in [("fr", LoraSpec(rank=2, alpha=5.0), None), ("law", None, KVSpec(slots=9))]:
        module.memories.remove(name)
        module.memories.add(name, lora, kv)
    torch.manual_seed(1)
    sinks = [buffer for name, buffer in module.memories.named_buffers() if "sink" in name]
    for tensor in (*module.memories.lora_parameters(), *module.memories.kv_parameters(), *sinks):
        nn.init.normal_(tensor, std=0.3 if tensor.ndim == 3 else 0.1)
    folder = work / f"{layout}{'' if slots else '-no-slots'}"
    export(module, folder, layout=layout, domain="de" if layout == "merged" else None, prove=False)
    return folder, module


def prompts() -> list[list[int]]:
    """Texts of unequal length."""
    numbers = torch.Generator().manual_seed(0)
    lengths = [3, 30, 7, 60, 2, 9, 5, 11][:TEXTS]
    return [torch.randint(3, VOCABULARY, (length,), generator=numbers).tolist() for length in lengths]


@torch.no_grad()
def greedy(logits: Logits) -> Greedy:
    """The likeliest continuation of every text, each by itself."""
    found = []
    for prompt in prompts():
        ids, rows = list(prompt), []
        for _ in range(TOKENS):
            rows.append(logits(ids).float().log_softmax(-1))
            ids.append(int(rows[-1].argmax()))
        found.append((ids[-TOKENS:], torch.stack(rows)))
    return found


def came(found: Greedy, due: Greedy) -> dict[str, float]:
    """What the record says of two: equal texts, and the largest difference up to the first other token."""
    equal, gap = 0, 0.0
    for (tokens, scores), (right, exact) in zip(found, due, strict=True):
        equal += tokens == right
        same = next((at for at, pair in enumerate(zip(tokens, right, strict=True)) if pair[0] != pair[1]), TOKENS - 1)
        gap = max(gap, float((scores[: same + 1] - exact[: same + 1]).abs().max()))
    return {"equal": equal, "of": len(due), "gap": float(f"{gap:.1e}")}


# --------------------------------------------------------------------------------------------------- engines


def masked(module: Decomposition, memory: str | None) -> Logits:
    """The dense model under its mask."""

    def logits(ids: list[int]) -> Tensor:
        module.gates.set(module.hard_mask().float()[None])
        module.memories.activate([memory])
        return module.backbone(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]

    return logits


def own(folder: Path, memory: str | None) -> tuple[Greedy, How]:
    """Our runtime."""
    model = load_decomposed(folder)
    return greedy(lambda ids: model(torch.tensor([ids]), domains=memory).logits[0, -1]), {}


def _plain(model: nn.Module) -> Greedy:
    return greedy(lambda ids: model(input_ids=torch.tensor([ids])).logits[0, -1])


def in_transformers(folder: Path, memory: str | None) -> tuple[Greedy, How]:
    """Plain transformers; memories by its own way of loading adapters."""
    model = AutoModelForCausalLM.from_pretrained(folder / "backbone").eval()
    if memory is not None:
        model.load_adapter(str(folder / "memories" / memory))
    return _plain(model), {} if memory is None else {"by": "load_adapter"}


def in_peft(folder: Path, memory: str | None) -> tuple[Greedy, How]:
    """PEFT, slots as a CARTRIDGE."""
    model = AutoModelForCausalLM.from_pretrained(folder / "backbone").eval()
    if memory is None:
        return _plain(model), {"by": "transformers"}
    place = folder / "memories" / memory
    if (place / "adapter_config.json").is_file():
        return _plain(PeftModel.from_pretrained(model, place).eval()), {}
    slots = KVMemory.from_tensors(load_file(place / KV_FILE), depth=model.config.num_hidden_layers)
    with tempfile.TemporaryDirectory() as cartridge:
        to_cartridge(slots, rotary_inv_freqs(model), Path(cartridge))
        return _plain(PeftModel.from_pretrained(model, cartridge).eval()), {"by": "koff memory cartridge"}


def in_llamacpp(folder: Path, memory: str | None) -> tuple[Greedy, How]:
    """llama.cpp, all texts together."""
    from koff_lightning.serving.llama_model import LlamaModel

    llama = LlamaModel(folder, kind="f32", cache="f32", rows=TEXTS, threads=1)
    texts = [llama.begin(memory) for _ in range(TEXTS)]
    rows = [[row[-1]] for row in llama.read(list(zip(texts, prompts(), strict=True)))]
    for _ in range(TOKENS - 1):
        step = llama.read([(text, [int(row[-1].argmax())]) for text, row in zip(texts, rows, strict=True)])
        for row, more in zip(rows, step, strict=True):
            row.append(more[-1])
    llama.close()
    return [([int(one.argmax()) for one in row], torch.stack(row).log_softmax(-1)) for row in rows], {
        "by": "koff convert gguf"
    }


RUNS = {"koff-lightning": own, "transformers": in_transformers, "PEFT": in_peft, "llama.cpp": in_llamacpp}


def arms(work: Path, engine: str, layout: str) -> dict[str, dict]:
    """What came of each arm."""
    folder, module = made(work, layout)
    found = {}
    for arm, memory in MEMORIES.items():
        if layout == "merged" and arm in ("lora", "both"):
            continue  # the LoRA is in the weights
        memory = "de" if layout == "merged" and memory else memory
        try:
            if engine == "koff-lightning":
                if layout == "merged" and memory is None:
                    folder, module = made(work / "no-slots", layout, slots=False)
                due = greedy(masked(module, "de" if layout == "merged" else memory))
            else:
                due = own(folder, memory)[0]
            got, how = RUNS[engine](folder, memory)
            found[arm] = came(got, due) | how
        except Exception as error:  # whatever theirs raise is the finding
            found[arm] = {"refused": _line(error, work)}
        if layout == "merged":
            folder, module = made(work / arm, layout)
        print(f"{engine:<15}{layout:<9}{ARMS[arm]:<12}{found[arm]}", flush=True)
    return found


def _line(error: Exception, work: Path) -> str:
    """The first sentence of an error, short, without the folder that it ran in."""
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return first.replace(f"{work}/", "").partition(". ")[0][:200]


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default=",".join(RUNS))
    parser.add_argument("--layouts", default=",".join(LAYOUTS))
    parser.add_argument("--record", type=Path, help="JSON to put the runs in")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for engine in options.engines.split(","):
        for layout in options.layouts.split(","):
            with tempfile.TemporaryDirectory() as work:
                found = arms(Path(work), engine, layout)
            if options.record:
                record(options.record, engine, layout, found)


def record(path: Path, engine: str, layout: str, found: dict[str, dict]) -> None:
    """Put a run into the record."""
    beside = "the dense model under its mask" if engine == "koff-lightning" else "our runtime"
    write(
        path,
        f"{engine.lower().replace('.', '')}-{layout}",
        engine=engine,
        layout=layout,
        compared=f"{TOKENS} greedy tokens of {TEXTS} texts and their log-probabilities beside {beside}, float32",
        command=f"python recipes/engines/layouts.py --engines {engine} --layouts {layout}",
        arms=found,
    )


if __name__ == "__main__":
    main()
