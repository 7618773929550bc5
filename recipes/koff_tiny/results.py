"""Measure koff-tiny: KOFF against its controls over seeds, and the curve of sparsity; writes docs/results/.

    python recipes/koff_tiny/results.py --jobs 2

Every run is a plain `koff fit` with one thread, in a folder of its own under --runs; a run whose results.json exists is
not repeated, so an interrupted measurement goes on where it stopped.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ARMS = {"koff": [], "no_memory": ["ablations/no_memory.yaml"], "dense_memory": ["ablations/dense_memory.yaml"]}
CURVE = (0.05, 0.12, 0.25, 0.40, 0.50, 0.60)
SHOWN = ("dense_bpb", "koff_bpb", "memory_off_bpb", "swapped_bpb")
DOCS = Path(__file__).resolve().parents[2] / "docs" / "results"


Job = tuple[str, float, str]  # arm, target, and the seed or "curve"


def plan(seeds: list[int]) -> list[Job]:
    """Every run: what answers the claim first, then the curve."""
    main = [(arm, 0.12, str(seed)) for seed in seeds for arm in ARMS]
    return main + [(arm, target, "curve") for target in CURVE for arm in ("koff", "no_memory")]


def run(job: Job, options: argparse.Namespace) -> dict:
    """Run one job, or read what it left."""
    arm, target, which = job
    folder = Path(options.runs) / f"{arm}-{target:.2f}-{which}"
    seed = options.seeds[0] if which == "curve" else which
    given = json.dumps([options.config, options.more, options.curve])
    if not (folder / "results.json").exists():
        command = [sys.executable, "-m", "koff_lightning", "fit", "--config", options.config]
        command += [part for overlay in ARMS[arm] for part in ("--config", overlay)]
        command += [f"--seed_everything={seed}", f"--data.seed={seed}", f"--trainer.default_root_dir={folder}"]
        command += ["--export.enabled=false"]  # only the figures are wanted
        command += [] if arm == "dense_memory" else [f"--model.sparsity.target={target}"]
        command += options.more + (options.curve.split() if which == "curve" else [])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "options.json").write_text(given)
        with (folder / "log.txt").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, stdout=log, stderr=log, check=True, env=environment)
    if (folder / "options.json").read_text() != given:
        raise SystemExit(f"{folder} holds a run with other options: give another --runs")
    print(f"done: {folder.name}", flush=True)
    return json.loads((folder / "results.json").read_text())


def spread(values: list[float | None]) -> str:
    """Mean and, over several seeds, standard deviation; nothing for an arm without memories to swap."""
    if None in values:
        return ""
    mean = statistics.mean(values)
    return f"{mean:.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def compared(results: list[dict]) -> list[str]:
    """Cells of one row: the four figures of `results` (one by seed) and the ratio of KOFF to dense."""
    cells = [spread([result[name] for result in results]) for name in SHOWN]
    return [*cells, spread([result["koff_bpb"] / result["dense_bpb"] for result in results])]


def write(results: dict[Job, dict], options: argparse.Namespace) -> None:
    """The table over seeds and the curve, as Markdown and JSON."""
    seeds = [str(seed) for seed in options.seeds]
    one, curve = results["koff", 0.12, seeds[0]], results["koff", 0.12, "curve"]
    given = [*([f'--curve="{options.curve}"'] if options.curve else []), *options.more]
    head = ["dense", "with memory", "memory off", "other domain's memory", "with memory / dense"]
    arms = [[arm, *compared([results[arm, 0.12, seed]["mean"] for seed in seeds])] for arm in ARMS]
    domains = [
        [name, *compared([results["koff", 0.12, seed]["domains"][name] for seed in seeds])] for name in one["domains"]
    ]
    points = []
    for target in CURVE:
        koff, alone = (results[arm, target, "curve"]["mean"] for arm in ("koff", "no_memory"))
        removed = results["koff", target, "curve"]["sparsity"]["body"]
        points.append([f"{removed:.1%}", *compared([koff])[1:3], compared([koff])[-1], *compared([alone])[1::3]])
    columns = ["removed of body", "KOFF", "memory off", "KOFF / dense", "mask without memories", "the same / dense"]
    text = f"""# koff-tiny: KOFF and its controls

Command: `{" ".join(["python recipes/koff_tiny/results.py", *given])}`

Config `{options.config}`, {one["steps"]} steps of {one["tokens"] // one["steps"]:,} predicted tokens,
seeds {", ".join(seeds)}. Bits per byte of held-out text, mean over domains, ± standard deviation over
seeds. Less is better.

## 12 % of the body

{table(["arm", *head], arms)}

KOFF by domain:

{table(["domain", *head], domains)}

## The curve (seed {seeds[0]}, {curve["steps"]} steps)

{table(columns, points)}
"""
    (DOCS / "koff_tiny.md").write_text(text)
    kept = ("mean", "domains", "sparsity", "parameters", "seconds", "steps", "tokens")
    plain = [
        {"arm": arm, "target": target, "run": which} | {key: result[key] for key in kept}
        for (arm, target, which), result in results.items()
    ]
    (DOCS / "koff_tiny.json").write_text(json.dumps(plain, indent=1) + "\n")


def main() -> None:
    """Run what is missing, then write the tables."""
    parser = argparse.ArgumentParser(description="Measure koff-tiny; further arguments go to every `koff fit`.")
    parser.add_argument("--config", default="tiny_12pct.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at one time, one thread each")
    parser.add_argument("--curve", default="", help="further arguments of the curve's runs alone")
    parser.add_argument("--runs", default="runs/koff_tiny_results")
    options, options.more = parser.parse_known_args()
    jobs = plan(options.seeds)
    with ThreadPoolExecutor(options.jobs) as pool:
        results = dict(zip(jobs, pool.map(lambda job: run(job, options), jobs), strict=True))
    DOCS.mkdir(parents=True, exist_ok=True)
    write(results, options)


if __name__ == "__main__":
    main()
