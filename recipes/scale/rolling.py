"""What bits per byte by lm-eval cost beside the scoring of the same text in a run, in seconds of the processor.

    python recipes/scale/rolling.py --documents 1 --turns 2

koff-tiny, a mask of 12 % and seven memories, all untrained; one thread; held-out documents of each of its domains. A
run scores a text dense, under its own memory, without memory and under one of the others.
"""

import argparse
import json
import lzma
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch

import koff_lightning
from koff_lightning import KVSpec, LoraSpec, SparsitySpec
from koff_lightning.decomposition import MODES, Decomposition
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


def in_a_run(model: Decomposition, ids: list[int], length: int, modes: Sequence[str]) -> None:
    """Score a text as `koff fit` does, in rows of `length` tokens."""
    whole = torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
    for mode in modes:
        for part in whole.split(max(1, 2048 // length)):
            model.token_nats({"input_ids": part, "labels": part, "domains": ["de"] * len(part)}, mode)


def by_lm_eval(model: Decomposition, texts: list[list[int]], length: int, domains: Sequence[str]) -> None:
    """Score texts as the task `koff_bpb` does, in windows of `length` tokens, under the memory of each domain."""
    for name in domains:
        lm = KoffLM(model, name, device="cpu", batch_size=8, max_length=length)
        windows = [windows_of(ids, lm.prefix_token_id, length, lm.opening) for ids in texts]
        log_likelihoods(windows, lm.model.hidden, lm.model.model.get_output_embeddings(), 8, silent=True)


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
    parser.add_argument("--lengths", default="256,1024", help="tokens read at once, with commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Decomposition("koff-tiny", [*DOMAINS], SparsitySpec(target=0.12), LoraSpec(), KVSpec(init="normal")).eval()
    model.harden()
    lm = KoffLM(model, "de", device="cpu")
    each = [lm.tok_encode(text, add_special_tokens=False) for text in texts(options.documents)]
    flat = [token for ids in each for token in (lm.prefix_token_id, *ids)]
    print(f"{len(each)} documents, {sum(map(len, each)):,} tokens; seconds of the processor")
    for length in map(int, options.lengths.split(",")):
        ways: dict[str, tuple[Callable[[], None], Callable[[], None]]] = {
            "one memory": (
                partial(by_lm_eval, model, each, length, DOMAINS[:1]),
                partial(in_a_run, model, flat, length, ["koff"]),
            ),
            "seven memories, a run's four modes": (
                partial(by_lm_eval, model, each, length, DOMAINS),
                partial(in_a_run, model, flat, length, MODES),
            ),
        }
        for name, (ours, run) in ways.items():
            pairs = [(seconds(ours), seconds(run)) for _ in range(options.turns)]
            ratios = [ours / run for ours, run in pairs]
            ours_in, run_in = (median(pair[way] for pair in pairs) for way in (0, 1))
            spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{length:5}, {name}: koff lm-eval {ours_in:.2f}, run {run_in:.2f}, ratio {spread}", flush=True)


if __name__ == "__main__":
    main()
