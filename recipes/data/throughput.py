"""How fast text becomes batches, beside how fast koff-tiny's training takes them, and how full the rows are.

    OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false python recipes/data/throughput.py

Everything runs in this process on one core, without workers, and is measured in seconds of the processor, so that other
programs on the machine hardly matter. The text is the bundled training text of all domains, in documents of the size of
web pages and in each kind of file.
Training steps are those of `python recipes/scale/bench.py` (no KL, the faster kind), measured in turn with
the data. Prints the tables of docs/results/data.md.
"""

import argparse
import gzip
import json
import lzma
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pyarrow.parquet
import torch

from koff_lightning.data import DomainDataModule, bundled_domains
from koff_lightning.data.readers import Fields, read_records
from koff_lightning.data.sources import bundled_file

sys.path.insert(0, str(Path(__file__).parents[1] / "scale"))
from bench import batch_of, koff_step

SEQ_LEN, ROWS = 256, 7
PAGE = 4000  # characters of a document


def zstd(content: bytes) -> bytes:
    """Compress as .zst files are."""
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


PACKERS = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.xz": lzma.compress, "jsonl.zst": zstd}


def write_corpus(folder: Path, kind: str, parts: int = 4) -> dict[str, str]:
    """Write the bundled training text of every domain as files of one kind; returns the domains."""
    for name in bundled_domains():
        texts = [document.text for _, document in read_records(bundled_file(name, "train"), Fields(), print)]
        pages = [text[first : first + PAGE] for text in texts for first in range(0, len(text), PAGE)]
        for part in range(parts):
            mine, path = pages[part::parts], folder / f"{name}-{part}.{kind}"
            if kind == "parquet":
                pyarrow.parquet.write_table(pyarrow.table({"text": mine}), path)
            else:
                lines = "".join(json.dumps({"text": page}, ensure_ascii=False) + "\n" for page in mine)
                path.write_bytes(PACKERS[kind](lines.encode()))
    return {name: f"{folder}/{name}-*.{kind}" for name in bundled_domains()}


def module_of(domains: dict[str, str], *, streaming: bool, **options: object) -> DomainDataModule:
    """The data of tiny_12pct.yaml from these files."""
    return DomainDataModule(
        domains, "koff-tiny", SEQ_LEN, ROWS, max_heldout_bytes=60_000, streaming=streaming, **options
    )


def batches_of(data: DomainDataModule, steps: int) -> Iterator[object]:
    """Its training batches, as a trainer would get them."""
    data.trainer = SimpleNamespace(accumulate_grad_batches=1, max_steps=steps, world_size=1)
    return iter(data.train_dataloader())


def seconds(do: Callable[[], object]) -> float:
    """Seconds of the processor that something takes."""
    start = time.process_time()
    do()
    return time.process_time() - start


def rate(batches: Iterator[object], count: int) -> float:
    """Tokens per second of the next `count` batches."""
    return count * SEQ_LEN * ROWS / seconds(lambda: list(islice(batches, count)))


def fullness(data: DomainDataModule, rows: int) -> float:
    """Share of tokens that are no padding, in so many rows of each domain."""
    padding = total = 0
    for stream in data._reading().streams(0, 0, 1, {}).values():
        for packed, row in islice(stream, rows):
            padding += packed.padding * (row == len(packed) - 1)
            total += SEQ_LEN
    return 1 - padding / total


def main() -> None:
    """Print all figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="pairs of training steps and batches")
    parser.add_argument("--steps", type=int, default=5, help="training steps of a round")
    parser.add_argument("--batches", type=int, default=150, help="batches of a round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    domains = bundled_domains()
    batch, data = batch_of(domains, ROWS, SEQ_LEN, "cpu")
    step = koff_step(batch, data, rank=4, slots=16, device="cpu", backbone="koff-tiny")
    step()
    training: list[float] = []

    def pair(batches: Iterator[object], rounds: int) -> list[tuple[float, float]]:
        found = []
        for _ in range(rounds):
            taken = options.steps * SEQ_LEN * ROWS / seconds(lambda: [step() for _ in range(options.steps)])
            training.append(taken)
            found.append((rate(batches, options.batches), taken))
        return found

    print("| text | way | tokens/s | times training (lowest to highest round) |\n|---|---|---|---|")
    for kind in (*PACKERS, "parquet"):
        with tempfile.TemporaryDirectory() as folder:
            corpus = write_corpus(Path(folder), kind)
            data = module_of(corpus, streaming=True)
            data.setup()
            report(kind, "streamed", pair(batches_of(data, 10**6), options.rounds if kind == "jsonl" else 2))
            if kind == "jsonl":
                full = fullness(data, 2000)
                memory = module_of(corpus, streaming=False, cache=f"{folder}/cache")
                spent = seconds(memory.setup)
                tokens = sum(rows.tokens.size for rows in (*memory._train.values(), *memory._heldout.values()))
                memory.prepare(memory.tokenizer)
                cached = module_of(corpus, streaming=False, cache=f"{folder}/cache")
                opening = seconds(cached.setup)
                lines = [f"read, tokenised and packed once: {tokens:,} tokens, {tokens / spent:,.0f} tokens/s"]
                lines.append(f"opened from the cache in {opening:.2f} s instead of {spent:.2f} s")
                report(kind, "from the cache", pair(batches_of(cached, 10**6), 2))
    low, high = min(training), max(training)
    print(f"\ntraining consumes {statistics.median(training):,.0f} tokens/s ({low:,.0f} to {high:,.0f})")
    print(f"streamed rows are {full:.2%} full", *lines, sep="\n")


def report(kind: str, way: str, pairs: list[tuple[float, float]]) -> None:
    """Print a line of the table."""
    ratios = [data / training for data, training in pairs]
    rates = [data for data, _ in pairs]
    print(
        f"| {kind} | {way} | {statistics.median(rates):,.0f} | {statistics.median(ratios):.0f} "
        f"({min(ratios):.0f} to {max(ratios):.0f}) |",
        flush=True,
    )


if __name__ == "__main__":
    main()
