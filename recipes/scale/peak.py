"""How far `koff plan` is from the peak memory of real runs: `python recipes/scale/peak.py` prints the table.

Each case is a `koff fit` of two steps on the CPU, one after the other in a process of their own. A run of the bundled
model goes before them, so that what libraries load late does not count. Memory is that of the process as Linux counts
it: the most during training beyond what it had before the model was loaded. The C library is told to give freed blocks
of 64 KiB or more back at once (MALLOC_MMAP_THRESHOLD_), since otherwise what it hoards is counted; `--hoard` leaves
that out.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
DOMAINS = ("en", "de", "fr", "es", "ru", "zh", "python")
MODELS = {  # name: hidden, FFN, layers, heads, kv heads
    "koff-tiny": None,
    "20M": (384, 1024, 10, 6, 2),
    "60M": (640, 1728, 12, 10, 5),
}
CASES = [  # model, rows, tokens, options
    ("koff-tiny", 7, 256, {}),
    ("koff-tiny", 14, 256, {"model.loss.kl": 0}),
    ("koff-tiny", 14, 256, {"model.activation_checkpointing": "true"}),
    ("koff-tiny", 3, 600, {"trainer.accumulate_grad_batches": 2}),
    ("20M", 7, 128, {}),
    ("20M", 7, 128, {"model.loss.kl": 0, "model.lora.rank": 16}),
    ("20M", 7, 256, {"model.activation_checkpointing": "true"}),
    ("20M", 7, 128, {"model.dtype": "bfloat16", "trainer.precision": "bf16-mixed"}),
    ("60M", 7, 64, {}),
    ("60M", 7, 64, {"model.activation_checkpointing": "true"}),
]


def backbone(name: str, folder: Path) -> str:
    """A random Llama with the bundled tokenizer, saved in `folder`; or the bundled model itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from koff_lightning.loading import load_tokenizer

    if MODELS[name] is None:
        return name
    if not (folder / name).exists():
        hidden, ffn, layers, heads, kv = MODELS[name]
        tokenizer = load_tokenizer("koff-tiny")
        sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": kv, "vocab_size": len(tokenizer)}
        LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return str(folder / name)


def words(model: str, rows: int, length: int, options: dict[str, object]) -> list[str]:
    """The options of `koff fit` for a case."""
    given = {"model.backbone": model, "data.batch_size": rows, "data.seq_len": length, "model.loss.kl": 2, **options}
    return ["--config", "tiny_12pct.yaml", *(f"--{name}={value}" for name, value in given.items())]


def fit(options: list[str], folder: str) -> None:
    """`koff fit` of two steps on little text."""
    from koff_lightning.cli import main

    short = {"max_steps": 2, "limit_test_batches": 1, "limit_val_batches": 0, "logger": "false", "accelerator": "cpu"}
    short |= {"default_root_dir": folder, "enable_progress_bar": "false", "enable_checkpointing": "false"}
    little = ["--data.max_train_bytes=60000", "--data.max_heldout_bytes=2000", "--export.enabled=false"]
    if status := main(["fit", *options, *little, *(f"--trainer.{name}={value}" for name, value in short.items())]):
        raise SystemExit(status)


def measured(cases: list[list[str]]) -> list[float]:
    """Bytes at the peak of each run's training beyond what the process held before it; runs in a child."""
    from koff_lightning.training.module import KOFFModule

    peaks: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        fit(words("koff-tiny", 7, 64, {"model.activation_checkpointing": "true"}), folder)
        KOFFModule.on_train_start = lambda _: Path("/proc/self/clear_refs").write_text("5") and None
        KOFFModule.on_train_end = lambda _: peaks.append(status("VmHWM") - before)
        for options in cases:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            before = status("VmRSS")
            fit(options, folder)
    return peaks


def status(field: str) -> float:
    """A field of /proc/self/status in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def in_child(cases: list[list[str]], hoard: bool = False) -> list[float]:
    """`measured` in a fresh process."""
    command = [sys.executable, __file__, "--measure", json.dumps(cases)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if hoard else GIVE_BACK)
    child = subprocess.run(command, capture_output=True, text=True, env=environment)
    if child.returncode:
        raise RuntimeError(child.stderr[-2000:])
    return json.loads(child.stdout.splitlines()[-1])


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description="Peak memory of runs on the CPU beside what koff plan says.")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--hoard", action="store_true", help="leave the C library as it is")
    parser.add_argument("--only", help="numbers of cases, with commas")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(json.loads(options.measure))))
        return
    from koff_lightning.commands.plan import planned

    cases = CASES if options.only is None else [CASES[int(number)] for number in options.only.split(",")]
    print(
        "| model | rows x tokens | options | plan, MiB | measured, MiB | plan / measured |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        given = [words(backbone(model, Path(folder)), *rest) for model, *rest in cases]
        peaks = in_child(given, options.hoard)
        for (model, rows, length, further), option, peak in zip(cases, given, peaks, strict=True):
            plan, said = (
                planned(option, on_cpus=True)[1],
                ", ".join(f"{name}={value}" for name, value in further.items()) or "-",
            )
            figures = f"{plan / 2**20:.0f} | {peak / 2**20:.0f} | {plan / peak:.2f}"
            print(f"| {model} | {rows} x {length} | {said} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
