"""What bits per byte by lm-eval cost beside the scoring of the same text in a run, in seconds of the processor.

    python recipes/scale/rolling.py --documents 1 --turns 2

koff-tiny, a mask of 12 % and one memory, both untrained; one thread; held-out documents of each of its seven domains.
"""

import argparse
import json
import lzma
import time
from collections.abc import Callable
from pathlib import Path

import torch

import koff_lightning
from koff_lightning import KVSpec, LoraSpec, SparsitySpec
from koff_lightning.decomposition import Decomposition
from koff_lightning.evaluation.harness import KoffLM
from koff_lightning.evaluation.rolling import log_likelihoods, windows_of

CORPORA = Path(koff_lightning.__file__).parent / "tiny" / "corpora"
DOMAINS = ("de", "en", "es", "fr", "python", "ru", "zh")


def texts(count: int) -> list[str]:
    """The first held-out documents of each domain."""
    found = []
    for name in DOMAINS:
        with lzma.open(CORPORA / f"{name}.heldout.jsonl.xz", "rt", encoding="utf-8") as file:
            found += [json.loads(line)["text"] for line in file][:count]
    return found


def in_a_run(model: Decomposition, ids: list[int], length: int, rows: int) -> None:
    """Score a text as `koff fit` does, in rows of `length` tokens."""
    whole = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    for part in whole.split(rows):
        model.token_nats({"input_ids": part, "labels": part, "domains": ["de"] * len(part)}, "koff")


def seconds(work: Callable[[], object]) -> float:
    """Of the processor."""
    since = time.process_time()
    work()
    return time.process_time() - since


def main() -> None:
    """Time each way in turn."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=4, help="of each domain")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Decomposition("koff-tiny", ["de"], SparsitySpec(target=0.12), LoraSpec(), KVSpec(init="normal")).eval()
    model.harden()
    lm = KoffLM(model, "de", device="cpu", batch_size=8)
    each = [lm.tok_encode(text, add_special_tokens=False) for text in texts(options.documents)]
    flat = [token for ids in each for token in (lm.prefix_token_id, *ids)]
    windows = [windows_of(ids, lm.prefix_token_id, lm.max_length) for ids in each]
    read = sum(len(before) + len(after) - 1 for parts in windows for before, after in parts)
    print(f"{len(each)} documents, {sum(map(len, each)):,} tokens, read by windows: {read:,}")
    head = lm.model.model.get_output_embeddings()
    ways = {
        "koff lm-eval": lambda: log_likelihoods(windows, lm.model.hidden, head, 8, silent=True),
        "in a run, rows of 256": lambda: in_a_run(model, flat, 256, 8),
        "in a run, rows of 1,024": lambda: in_a_run(model, flat, 1024, 1),
    }
    for _ in range(options.turns):
        for name, work in ways.items():
            print(f"{name:26}{seconds(work):6.2f} s", flush=True)


if __name__ == "__main__":
    main()
