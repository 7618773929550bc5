"""What `koff serve` gives under load: tokens per second of mixed domains beside one, and a long run of many clients.

    python recipes/scale/serving.py speed                           # the engine alone, pairs of runs in turn
    python recipes/scale/serving.py soak --clients 64 --minutes 10  # over HTTP, a server in a process of its own
    python recipes/scale/serving.py beside --rounds 3               # over HTTP, short requests beside a heavy one

Masks and memories are random, as speed does not depend on what was learned. `speed` prints medians of the paired ratios
with the least and the greatest; on one CPU thread the time is that of the processor. `soak` compares every answer with
the one that was given to the same request when nobody else asked, and prints how the server's resident memory moved
after the first quarter of the time. `beside` prints how long heavy requests take alone, and how long short ones wait
that are sent one after another while a heavy one is under way. The exit status of `soak` is 1 where an answer differs
or memory grows by more than 1 MiB per minute and three times its standard error.
"""

import argparse
import asyncio
import contextlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2 as httpx
import torch
from scipy.stats import linregress

from koff_lightning.commands.serving_bench import _artifact, _clock
from koff_lightning.serving.engine import Options
from koff_lightning.serving.own import OwnEngine
from koff_lightning.specs.sparsity import SparsitySpec


def artifact(folder: str, backbone: str, domains: int) -> Path:
    """An artifact with random memories of rank 8 and 16 slots."""
    names = [f"d{i}" for i in range(domains)]
    return _artifact(Path(folder) / "artifact", backbone, SparsitySpec(target=0.12), names, 8, 16, "float32")


async def run(engine: OwnEngine, arms: list[str | None], prompt: int, new: int) -> float:
    """Seconds in which the engine continues a text for each of the arms, all at once."""

    async def one(number: int, arm: str | None) -> None:
        ids = [3 + (7 * number + 13 * place) % 1000 for place in range(prompt)]
        async for _ in engine.stream(ids, arm, Options(new, ignore_end=True)):
            pass

    clock = _clock()
    start = clock()
    await asyncio.gather(*(one(*pair) for pair in enumerate(arms)))
    return clock() - start


async def speed(folder: Path, options: argparse.Namespace) -> None:
    """Print tokens per second of one domain, and of the others beside it."""
    rows = options.rows
    engine = OwnEngine(folder, rows)
    names = list(engine.memories())
    ways: dict[str, list[str | None]] = {
        "every row another domain": [names[row % len(names)] for row in range(rows)],
        "half of the rows bare": [names[row] if row % 2 else None for row in range(rows)],
        "no memory": [None] * rows,
    }
    for what, arms in ways.items():
        pairs = []
        for _ in range(options.rounds + 1):
            one = await run(engine, names[:1] * rows, options.prompt, options.new)
            pairs.append((one, await run(engine, arms, options.prompt, options.new)))
        ratios = [one / other for one, other in pairs[1:]]  # the first does not count
        rate = rows * options.new / statistics.median(one for one, _ in pairs[1:])
        print(
            f"{what}: {statistics.median(ratios):.2f} x the tokens/s of one domain ({min(ratios):.2f} to "
            f"{max(ratios):.2f}), which has {rate:.0f} tokens/s",
            flush=True,
        )
    await engine.close()


@contextlib.contextmanager
def serving(folder: Path, threads: int) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its address and the number of its process."""
    words = [sys.executable, "-m", "koff_lightning", "serve", str(folder), "--port", "0", "--name", "tiny"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            said = server.stdout.readline().split()
            yield next(word for word in said if word.startswith("http")).rstrip(","), server.pid
        finally:
            server.terminate()


def beside(address: str, process: int, options: argparse.Namespace) -> None:
    """Print what heavy requests take alone, and what short ones wait beside each."""
    short = {"model": "tiny", "prompt": [5] * 32, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    heavy = {
        "64 prompts of 900 tokens, scored": _heavy(900, {"max_tokens": 0, "echo": True, "logprobs": 1}),
        "64 prompts of 300 tokens, 200 new ones each": _heavy(300, {"max_tokens": 200, "ignore_eos": True}),
    }

    def ask(body: dict[str, object]) -> tuple[float, float]:
        start, used = time.monotonic(), processor_time(process)
        httpx.post(f"{address}/v1/completions", json=body, timeout=600).raise_for_status()
        return time.monotonic() - start, processor_time(process) - used

    ask(short)
    print(f"the short request alone: {told([ask(short)[0] for _ in range(9)])} s")
    for what, body in heavy.items():
        alone = [ask(body) for _ in range(options.rounds)]
        times = told([wall for wall, _ in alone]), told([used for _, used in alone])
        print(f"{what}: alone {times[0]} s, processor {times[1]} s")
        waits, took = [], []
        for _ in range(options.rounds):
            with ThreadPoolExecutor() as pool:
                asked = pool.submit(ask, body)
                time.sleep(1)
                while not asked.done():
                    waits.append(ask(short)[0])
            took.append(asked.result()[0])
        print(f"    beside {len(waits)} short ones {told(took)} s; each of these {told(waits)} s", flush=True)


def _heavy(length: int, how: dict[str, object]) -> dict[str, object]:
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 1000) for _ in range(length)] for _ in range(64)]
    return {"model": "tiny:d0", "prompt": prompts, "temperature": 0} | how


def told(values: list[float]) -> str:
    """Median, least and greatest."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def processor_time(process: int) -> float:
    """Seconds of the processor that a process has taken; Linux only."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def soak(address: str, process: int, options: argparse.Namespace) -> int:
    """Let clients ask for a while; how it ends, as exit status."""
    rng = random.Random(0)
    names = [model["id"] for model in httpx.get(f"{address}/v1/models").json()["data"]]
    bodies = []
    for number in range(40):
        prompt = [rng.randrange(3, 1000) for _ in range(rng.randrange(1, 60))]
        body = {"model": names[number % len(names)], "prompt": prompt, "max_tokens": rng.randrange(1, 40)}
        bodies.append(body | {"temperature": 0, "return_token_ids": True})

    def ask(client: httpx.Client, body: dict[str, object]) -> list[int]:
        answer = client.post(f"{address}/v1/completions", json=body, timeout=120)
        return answer.raise_for_status().json()["choices"][0]["token_ids"]

    with httpx.Client() as client:
        due = [ask(client, body) for body in bodies]
    until, counts, wrong = time.monotonic() + 60 * options.minutes, [0] * options.clients, []

    def work(number: int) -> None:
        own = random.Random(number)
        with httpx.Client() as client:
            while time.monotonic() < until:
                which = own.randrange(len(bodies))
                try:
                    got = ask(client, bodies[which])
                except httpx.HTTPError as error:
                    got = [repr(error)]
                if got != due[which]:
                    wrong.append((which, got))
                counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(options.clients)]
    for thread in threads:
        thread.start()
    samples, start = [], time.monotonic()
    while time.monotonic() < until:
        time.sleep(2)
        samples.append(((time.monotonic() - start) / 60, resident(process)))
    for thread in threads:
        thread.join()
    late = samples[len(samples) // 4 :]
    fit = linregress(*zip(*late, strict=True))
    print(
        f"{sum(counts)} answers to {options.clients} clients in {options.minutes:g} minutes, {len(wrong)} other than "
        f"alone; resident memory {late[0][1]:.0f} MiB after a quarter, {late[-1][1]:.0f} MiB at the end: "
        f"{fit.slope:+.2f} MiB per minute (standard error {fit.stderr:.2f})"
    )
    print(*wrong[:3], sep="\n")
    return int(bool(wrong) or fit.slope > max(1, 3 * fit.stderr))


def resident(process: int) -> float:
    """Resident memory of a process, MiB; Linux only."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def main() -> int:
    """Measure."""
    parser = argparse.ArgumentParser(description="koff serve under load.")
    parser.add_argument("what", choices=["speed", "soak", "beside"])
    parser.add_argument("--backbone", default="koff-tiny")
    parser.add_argument("--rows", type=int, default=16, help="texts in a batch")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=7, help="counted pairs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        made = artifact(folder, options.backbone, options.rows)
        if options.what == "speed":
            asyncio.run(speed(made, options))
            return 0
        with serving(made, options.threads) as (address, process):
            if options.what == "soak":
                return soak(address, process, options)
            beside(address, process, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
