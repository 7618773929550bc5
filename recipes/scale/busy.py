"""Time a short `koff fit` alone and beside processes that take every core: threads that spin, that sleep, or only one.

Usage: python recipes/scale/busy.py [--rounds 2] [--beside 8] [--steps 12]

Prints a line per run (wall seconds, processor seconds) and the medians. "spin" is OpenMP's own default; "sleep" is what
`koff` asks for. Runs of all kinds take turns, so what else the machine does meets all of them.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

WAYS = {  # of the first, libgomp's default where nothing is set
    "spin": {"GOMP_SPINCOUNT": "300000"},
    "sleep": {},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


@contextmanager
def company(number: int) -> Iterator[None]:
    """Keep so many processes computing."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def timed(way: str, steps: int) -> tuple[float, float]:
    """Wall and processor seconds of one run."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        words = ["fit", "demo.yaml", f"--trainer.max_steps={steps}", "--data.max_heldout_bytes=2000"]
        command = [sys.executable, "-m", "koff_lightning", *words, f"--trainer.default_root_dir={folder}"]
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | WAYS[way]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - start, sum(after[:2]) - sum(before[:2])


def main() -> None:
    """Run all pairs and print them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--beside", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    for beside in (0, options.beside):
        taken: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way, times in taken.items():
                with company(beside):
                    times.append(timed(way, options.steps))
                wall, cpu = times[-1]
                print(f"{beside} beside, {way}: {wall:.1f} s, {cpu:.1f} s of processor", flush=True)
        for way, times in taken.items():
            wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"{beside} beside, {way}, median: {wall:.1f} s, {cpu:.1f} s of processor", flush=True)


if __name__ == "__main__":
    main()
