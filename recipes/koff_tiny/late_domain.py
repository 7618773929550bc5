"""Measure what it costs a domain to join late: trained for a finished artifact instead of jointly with the others.

    python recipes/koff_tiny/late_domain.py --jobs 2

Per seed: a joint run over all seven domains, a run without the late one, and the late one added to its artifact with as
many rows and steps. All by cross-entropy alone, since an artifact holds no dense model to learn from. A run whose
results.json exists is not repeated.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

DOMAINS = ("en", "de", "fr", "es", "ru", "zh", "python")
DOCS = Path(__file__).resolve().parents[2] / "docs" / "results"


def fit(folder: Path, seed: int, *options: str) -> dict:
    """One `koff fit` with one thread; its results."""
    if not (folder / "results.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "koff_lightning", "fit", *options, "--model.loss.kl=0"]
        command += [f"--seed_everything={seed}", f"--data.seed={seed}", f"--trainer.default_root_dir={folder}"]
        with (folder / "log.txt").open("w") as log:
            subprocess.run(command, stdout=log, stderr=log, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    print(f"done: {folder.name}", flush=True)
    return json.loads((folder / "results.json").read_text())


def early(options: argparse.Namespace, seed: int) -> dict:
    """All domains but the late one, then the late one added."""
    folder = Path(options.runs) / f"others-{seed}"
    others = folder.with_suffix(".yaml")
    others.parent.mkdir(parents=True, exist_ok=True)
    config = yaml.safe_load(Path(options.config).read_text())
    del config["data"]["domains"][options.late]
    config["data"]["batch_size"] -= 1
    others.write_text(yaml.safe_dump(config))
    fit(folder, seed, "--config", str(others))
    added = ["--config", "add_domain.yaml", f"--model.artifact={folder / 'artifact'}"]
    added += [f"--data.domains.{options.late}=bundled:{options.late}", "--data.batch_size=1"]
    return fit(
        Path(options.runs) / f"late-{seed}", seed, *added, f"--trainer.max_steps={config['trainer']['max_steps']}"
    )


def joint(options: argparse.Namespace, seed: int) -> dict:
    """All domains together."""
    return fit(Path(options.runs) / f"joint-{seed}", seed, "--config", options.config, "--export.enabled=false")


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def main() -> None:
    """Run what is missing, then print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", default=str(Path(__file__).resolve().parents[2] / "configs" / "tiny_12pct.yaml"))
    parser.add_argument("--late", default="fr", choices=DOMAINS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", default="runs/koff_tiny_late")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [(pool.submit(early, options, seed), pool.submit(joint, options, seed)) for seed in options.seeds]
        pairs = [(late.result(), together.result()) for late, together in jobs]
    late = [row["domains"][options.late] for row, _ in pairs]
    together = [row["domains"][options.late] for _, row in pairs]
    dense = together[0]["dense_bpb"]
    worse = [a["koff_bpb"] / b["koff_bpb"] - 1 for a, b in zip(late, together, strict=True)]
    name = Path(options.config).name
    text = f"""# koff-tiny: a domain that joins late

Command: `python recipes/koff_tiny/late_domain.py --late {options.late}`

Config `{name}` with `--model.loss.kl=0`, seeds {", ".join(map(str, options.seeds))}; bits per byte of held-out
text of `{options.late}`, ± standard deviation over seeds. Late: the mask was learned from the other domains alone, then
the memory was trained for the finished artifact (`add_domain.yaml`), with as many steps and rows of the domain as in
the joint run.

| | with memory | memory off |
|---|---|---|
| dense | {dense:.4f} | |
| joint | {spread([row["koff_bpb"] for row in together])} | {spread([row["memory_off_bpb"] for row in together])} |
| late | {spread([row["koff_bpb"] for row in late])} | {spread([row["memory_off_bpb"] for row in late])} |

Late against joint, by seed: {", ".join(f"{100 * value:+.2f} %" for value in worse)}.
"""
    print(text)
    (DOCS / "late_domain.md").write_text(text)


if __name__ == "__main__":
    main()
