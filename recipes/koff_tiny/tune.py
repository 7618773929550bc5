"""Compare settings of a shipped config on development documents; writes docs/results/tuning.md, or tuning_NAME.md.

    python recipes/koff_tiny/tune.py --jobs 2
    python recipes/koff_tiny/tune.py --config smollm2_12pct.yaml --steps 100 --shares 0.12 --seeds 0 -- FURTHER OPTIONS

Development documents are those of the last quarter of each bundled held-out file that reports with the config's
`max_heldout_bytes` leave out. The tasks are built from the first three quarters. So nothing that is reported was
chosen on the text that it is reported for.
A run whose results.json exists is not repeated.
"""

import argparse
import json
import lzma
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml

from koff_lightning.data.readers import Document
from koff_lightning.data.split import fill

ROOT = Path(__file__).resolve().parents[2]
CORPORA = ROOT / "src" / "koff_lightning" / "tiny" / "corpora"
HELDOUT_BYTES = 60_000  # of a domain, that reports score: data.max_heldout_bytes of the config
# What differs from the config. `after` trains the memories on the one-shot Fisher mask, the control that a learned mask
# has to beat; `prior` starts a learned mask in the order of that mask.
FISHER = "{runs}/fisher-{share}/checkpoints/last.ckpt"
AFTER, PRIOR = f"--model.mask={FISHER}", f"--model.prior={FISHER}"


def course(ramp: float, hold: float) -> list[str]:
    """Options of a schedule."""
    return [f"--anneal.ramp={ramp}", f"--anneal.hold={hold}"]


TINY: dict[str, list[str]] = {
    "as configured": [],
    "ramp 0.40, hold 0.15": course(0.40, 0.15),
    "ramp 0.08, hold 0.02": course(0.08, 0.02),
    "ramp 0.05, hold 0.15": course(0.05, 0.15),
    "prior": [PRIOR],
    "prior, ramp 0.08, hold 0.02": [PRIOR, *course(0.08, 0.02)],
    "warm-up 0.20, mask at once": ["--anneal.warmup=0.20", *course(0, 0.004)],
    "after": [AFTER],
}
SMOLLM2: dict[str, list[str]] = {
    "as configured": [],
    "lora_lr 1e-3": ["--model.optim.lora_lr=1e-3"],
    "ramp 0.40, hold 0.15": course(0.40, 0.15),
    "warm-up 0.20, mask at once": ["--anneal.warmup=0.20", *course(0, 0.01)],
    "lora_lr 4e-3": ["--model.optim.lora_lr=4e-3"],
    "kv_lr 1.5e-2": ["--model.optim.kv_lr=1.5e-2"],
    "kl 0.5": ["--model.loss.kl=0.5"],
}
QWEN: dict[str, list[str]] = {
    "as configured": [],
    "lora_lr 2e-3": ["--model.optim.lora_lr=2e-3"],
    "lora_lr 1e-3": ["--model.optim.lora_lr=1e-3"],
}
SETTINGS = {"tiny_12pct.yaml": TINY, "smollm2_12pct.yaml": SMOLLM2, "qwen25_coder_1_5b_12pct.yaml": QWEN}


def development_text(folder: Path, config: str) -> dict[str, dict[str, str]]:
    """Write each domain's training text and its development documents as files; the domains for a config."""
    folder.mkdir(parents=True, exist_ok=True)
    domains = {}
    for name in yaml.safe_load((ROOT / "configs" / config).read_text(encoding="utf-8"))["data"]["domains"]:
        train, held = (_lines(CORPORA / f"{name}.{part}.jsonl.xz") for part in ("train", "heldout"))
        documents = [Document(row["id"], row["text"]) for row in map(json.loads, held)]
        reported = set(fill(documents, HELDOUT_BYTES))
        late = range(3 * len(held) // 4, len(held))
        held = [held[i] for i in late if documents[i].text not in reported]
        files = folder / f"{name}.train.jsonl", folder / f"{name}.development.jsonl"
        for file, lines in zip(files, (train, held), strict=True):
            file.write_text("".join(lines), encoding="utf-8")
        domains[name] = {"files": str(files[0]), "heldout_files": str(files[1])}
    return domains


def _lines(path: Path) -> list[str]:
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return file.readlines()


def call(verb: str, folder: Path, options: argparse.Namespace, *words: str) -> None:
    """Run the command with one thread; what it says goes to a file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "koff_lightning", verb, "--config", options.config]
    command += ["--config", str(Path(options.runs) / "domains.yaml"), *words]
    with (folder / "log.txt").open("w") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def run(name: str, share: float, seed: int, options: argparse.Namespace) -> dict:
    """Run one setting, or read what it left."""
    folder = Path(options.runs) / f"{name.replace(' ', '_')}-{share}-{seed}"
    words = [f"--trainer.default_root_dir={folder}", f"--trainer.max_steps={options.steps}", "--export.enabled=false"]
    words += [f"--seed_everything={seed}", f"--data.seed={seed}", f"--model.sparsity.target={share}"]
    if not (folder / "results.json").exists():
        own = (word.format(runs=options.runs, share=share) for word in SETTINGS[options.config][name])
        call("fit", folder, options, *words, *options.further, *own)
    result = json.loads((folder / "results.json").read_text())
    print(f"{folder.name}: {result['mean']['koff_bpb']:.4f}", flush=True)
    return result


def main() -> None:
    """Run what is missing, then write the table."""
    parser = argparse.ArgumentParser(description="Compare settings on development documents.")
    parser.add_argument("--config", default="tiny_12pct.yaml", choices=SETTINGS)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=2, help="runs at one time, one thread each")
    parser.add_argument("--runs", default="runs/koff_tiny_tuning")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.12, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("further", nargs="*", help="options of koff fit for all runs, after --")
    options = parser.parse_args()
    settings = SETTINGS[options.config]
    domains = development_text(Path(options.runs) / "text", options.config)
    (Path(options.runs) / "domains.yaml").write_text(json.dumps({"data": {"domains": domains}}))
    for share in options.shares if any(FISHER in word for words in settings.values() for word in words) else []:
        if not Path(FISHER.format(runs=options.runs, share=share)).exists():
            folder = Path(options.runs) / f"fisher-{share}"
            words = ["--method=fisher", "--seed=0", "--no-score", f"--sparsity={share}", f"--out={folder}"]
            call("baseline", folder, options, *words, *options.further)
    if any(word.endswith("loss.teacher=stored") for word in options.further):
        call("prepare", Path(options.runs) / "teacher", options, "--teacher", *options.further)
    cases = [(name, share, seed) for name in settings for share in options.shares for seed in options.seeds]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = dict(zip(cases, pool.map(lambda case: run(*case, options), cases), strict=True))
    write_page(options, results)


def write_page(options: argparse.Namespace, results: dict[tuple[str, float, int], dict]) -> None:
    """The table of all settings, as a page of docs/results."""
    runs = [(share, seed) for share in options.shares for seed in options.seeds]
    rows = [f"| setting | {' | '.join(f'{share:.0%}, seed {seed}' for share, seed in runs)} |"]
    rows.append("| --- " * (len(runs) + 1) + "|")
    for name in SETTINGS[options.config]:
        means = [results[name, share, seed]["mean"] for share, seed in runs]
        cells = [f"{mean['koff_bpb']:.4f} ({mean['memory_off_bpb']:.4f})" for mean in means]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    table, dense = "\n".join(rows), means[0]["dense_bpb"]
    tiny = options.config == "tiny_12pct.yaml"
    told = """`after`: memories on the frozen
one-shot Fisher mask. `prior`: a learned mask whose logits start in the order of that mask."""
    page = "tuning.md" if tiny else f"tuning_{options.config.split('_')[0]}.md"
    (ROOT / "docs" / "results" / page).write_text(f"""# Settings of {options.config}, compared on development text

Command: `python {" ".join(map(shlex.quote, sys.argv))}`.

Bits per byte of development documents (of the last quarter of each bundled held-out file those that no report scores),
mean over domains: KOFF, in brackets its mask with memories off; dense {dense:.4f}. {told if tiny else ""}

{table}
""")


if __name__ == "__main__":
    main()
