"""Compare settings of the tiny config on development documents; writes docs/results/tuning.md.

    python recipes/koff_tiny/tune.py --jobs 2

Development documents are the last quarter of each bundled held-out file. Reports score the first 60 kB and the tasks
are built from the first three quarters, so nothing that is reported was chosen on the text that it is reported for.
A run whose results.json exists is not repeated.
"""

import argparse
import json
import lzma
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORPORA = ROOT / "src" / "koff_lightning" / "tiny" / "corpora"
DOMAINS = ("en", "de", "fr", "es", "ru", "zh", "python")
# What differs from the config; seeds 0 and 1 of the config itself show how much is chance.
SETTINGS: dict[str, list[str]] = {
    "as configured": [],
    "as configured, seed 1": ["--seed_everything=1", "--data.seed=1"],
    "loss.kl 0": ["--model.loss.kl=0"],
    "loss.kl 1": ["--model.loss.kl=1"],
    "loss.kl 4": ["--model.loss.kl=4"],
    "lora_lr 6e-3": ["--model.optim.lora_lr=6e-3"],
    "kv_lr 3e-3": ["--model.optim.kv_lr=3e-3"],
    "kv_lr 3e-2": ["--model.optim.kv_lr=3e-2"],
    "mask_lr 0.3": ["--model.optim.mask_lr=0.3"],
    "spread 2": ["--model.sparsity.spread=2"],
    "ramp 0.25, hold 0.10": ["--anneal.ramp=0.25", "--anneal.hold=0.10"],
    "ramp 0.55, hold 0.15": ["--anneal.ramp=0.55", "--anneal.hold=0.15"],
    "rank 3, 32 slots (equal bytes)": ["--model.lora.rank=3", "--model.lora.alpha=6", "--model.kv.slots=32"],
    "rank 2, 48 slots (equal bytes)": ["--model.lora.rank=2", "--model.lora.alpha=4", "--model.kv.slots=48"],
}


def development_text(folder: Path) -> dict[str, dict[str, str]]:
    """Write each domain's training text and its development documents as files; the domains for a config."""
    folder.mkdir(parents=True, exist_ok=True)
    domains = {}
    for name in DOMAINS:
        train, held = (_lines(CORPORA / f"{name}.{part}.jsonl.xz") for part in ("train", "heldout"))
        files = folder / f"{name}.train.jsonl", folder / f"{name}.development.jsonl"
        for file, lines in zip(files, (train, held[3 * len(held) // 4 :]), strict=True):
            file.write_text("".join(lines), encoding="utf-8")
        domains[name] = {"files": str(files[0]), "heldout_files": str(files[1])}
    return domains


def _lines(path: Path) -> list[str]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return file.readlines()


def run(name: str, options: argparse.Namespace) -> dict:
    """Run one setting, or read what it left."""
    folder = Path(options.runs) / name.replace(" ", "_")
    command = [sys.executable, "-m", "koff_lightning", "fit", "--config", options.config]
    command += ["--config", str(Path(options.runs) / "domains.yaml"), f"--trainer.default_root_dir={folder}"]
    command += [f"--trainer.max_steps={options.steps}", "--export.enabled=false", *SETTINGS[name]]
    if not (folder / "results.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "log.txt").open("w") as log:
            subprocess.run(command, stdout=log, stderr=log, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    result = json.loads((folder / "results.json").read_text())
    print(f"{name}: {result['mean']['koff_bpb']:.4f}", flush=True)
    return result


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description="Compare settings on development documents.")
    parser.add_argument("--config", default="tiny_12pct.yaml")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--jobs", type=int, default=2, help="runs at one time, one thread each")
    parser.add_argument("--runs", default="runs/koff_tiny_tuning")
    options = parser.parse_args()
    domains = development_text(Path(options.runs) / "text")
    (Path(options.runs) / "domains.yaml").write_text(json.dumps({"data": {"domains": domains}}))
    with ThreadPoolExecutor(options.jobs) as pool:
        results = dict(zip(SETTINGS, pool.map(lambda name: run(name, options), SETTINGS), strict=True))
    rows = ["| setting | KOFF | memory off | KOFF / dense |", "| --- | --- | --- | --- |"]
    for name, result in sorted(results.items(), key=lambda item: item[1]["mean"]["koff_bpb"]):
        koff, off, dense = (result["mean"][f"{arm}_bpb"] for arm in ("koff", "memory_off", "dense"))
        rows.append(f"| {name} | {koff:.4f} | {off:.4f} | {koff / dense:.4f} |")
    table = "\n".join(rows)
    (ROOT / "docs" / "results" / "tuning.md").write_text(f"""# Settings of the tiny config, compared on development text

Command: `python recipes/koff_tiny/tune.py --steps {options.steps}`, config `{options.config}`.

Bits per byte of development documents (the last quarter of each bundled held-out file, which no report scores), mean
over domains, best first. One seed each: the two seeds of the config as it is show how much is chance.

{table}
""")


if __name__ == "__main__":
    main()
