"""Train koff-tiny for a while, with checkpoints, validation and lm-eval, and watch memory and open files.

    python recipes/reliability/soak.py --minutes 20

Prints the slope of the resident memory after the first quarter, by least squares over samples of every two seconds,
and the files and threads that were open then and at the end. The exit status is 1 if more files are open, or if memory
grows by more than 1 MiB per minute and the growth is more than three times its standard error.
"""

import argparse
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from scipy.stats import linregress

EVERY = 2.0  # seconds
TASK = {"task": "koff_cloze_de", "domain": "de", "limit": 8}
OPTIONS = {
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 1_000_000,
        "log_every_n_steps": 1,
        "check_val_every_n_epoch": None,
        "val_check_interval": 20,
        "limit_val_batches": 4,
        "limit_test_batches": 14,
    },
    "checkpoint": {"every_n_train_steps": 10},
    "lm_eval": {"tasks": [TASK], "every_n_steps": 30},
    "export": {"enabled": False},
}


def watch(process: subprocess.Popen, minutes: float) -> list[tuple[float, float, int, int]]:
    """Minutes, MiB, open files and threads of a process, until it has trained so long and is asked to end."""
    since, samples = time.monotonic(), []
    home = Path(f"/proc/{process.pid}")
    while process.poll() is None and (now := (time.monotonic() - since) / 60) < minutes:
        pages = int((home / "statm").read_text().split()[1])
        files, threads = len(os.listdir(home / "fd")), len(os.listdir(home / "task"))
        samples.append((now, pages * resource.getpagesize() / 2**20, files, threads))
        time.sleep(EVERY)
    process.send_signal(signal.SIGTERM)
    process.wait()
    return samples


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=20)
    minutes = parser.parse_args().minutes
    with tempfile.TemporaryDirectory() as work, (Path(work) / "said.txt").open("w") as said:
        (Path(work) / "soak.yaml").write_text(yaml.safe_dump(OPTIONS))
        command = ["-m", "koff_lightning", "fit", "--config", "tiny_12pct.yaml", "--config", f"{work}/soak.yaml"]
        options = ["--trainer.default_root_dir", f"{work}/run", "--trainer.enable_progress_bar", "false"]
        process = subprocess.Popen([sys.executable, *command, *options], stdout=said, stderr=said)
        samples = watch(process, minutes)
        log = next(Path(work).rglob("metrics.csv"), None)
        steps = log.read_text().count("\n") if log else 0
        if process.returncode != 128 + signal.SIGTERM:
            print((Path(work) / "said.txt").read_text()[-3000:])
            return 1
    later = [sample for sample in samples if sample[0] >= samples[-1][0] / 4]
    line = linregress([t for t, *_ in later], [m for _, m, *_ in later])
    (_, first, files, threads), (_, last, files_at_end, threads_at_end) = later[0], later[-1]
    peak = max(memory for _, memory, *_ in samples)
    print(f"{samples[-1][0]:.1f} minutes, {steps} rows in the log, {len(samples)} samples, peak {peak:.0f} MiB")
    print(f"memory {first:.0f} MiB after a quarter, {last:.0f} at the end: {line.slope:+.3f} MiB per minute")
    most = max(files_open for *_, files_open, _ in later)
    print(f"(standard error {line.stderr:.3f}); threads {threads} -> {threads_at_end}")
    print(f"open files {files} -> {files_at_end}, at most {most}")
    return int(files_at_end > files or line.slope > max(1.0, 3 * line.stderr))


if __name__ == "__main__":
    sys.exit(main())
