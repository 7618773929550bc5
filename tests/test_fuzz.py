"""A handful of the spoilt configs and corpora of recipes/reliability/fuzz.py, which runs a thousand of each."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from koff_lightning.cli import main

FUZZ = Path(__file__).parents[1] / "recipes" / "reliability" / "fuzz.py"
SMALL = "data: {domains: {de: bundled:de}}\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: {kv: {slots: 4000000000}}", "kv.slots must be between 2 and 8192 .*; got 4000000000"),
        ("model: {lora: {alpha: .inf}}", "lora.alpha must be positive and finite; got inf"),
        ("model: {optim: null}", "model.optim must not be null: leave it out for its default"),
        (
            "model: {optim: {lora_lr: null}}",
            "model.optim.lora_lr must not be null: leave it out for its default, 0.001",
        ),
        ("model: {loss: 0}", "model.loss must be a mapping of its options; got 0"),
        ("anneal: null", "anneal must be a mapping of its options; got null"),
        (
            "trainer: {devices: '', accelerator: cpu, max_steps: 1}",
            "`devices` selected with `CPUAccelerator` should be an int > 0.",
        ),
    ],
)
def test_values_that_the_types_let_pass(tmp_path, capsys, text, line):
    (tmp_path / "c.yaml").write_text(f"{SMALL}{text}\n")
    assert main(["fit", "--config", str(tmp_path / "c.yaml")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert re.match(f"koff: {line}", said[-1])
    assert sum(part.startswith("koff: ") for part in said) == 1


def test_no_steps_are_logged(tmp_path):
    options = "trainer: {log_every_n_steps: 0, accelerator: cpu, max_steps: 2, enable_progress_bar: false}\n"
    data = "data: {domains: {de: bundled:de}, seq_len: 64, max_train_bytes: 20000, max_heldout_bytes: 1500}\n"
    saving = "checkpoint: {every_n_train_steps: 1}\nexport: {enabled: false}\n"
    (tmp_path / "c.yaml").write_text(options + data + saving)
    root = f"--trainer.default_root_dir={tmp_path / 'run'}"
    assert main(["fit", "--config", str(tmp_path / "c.yaml"), root]) == 0
    assert (tmp_path / "run/results.json").is_file()


def fuzz(tmp_path, kind, first, cases):
    command = [sys.executable, str(FUZZ), "--kind", kind, "--first", str(first), "--cases", str(cases)]
    done = subprocess.run(
        [*command, "--faults", str(tmp_path)], capture_output=True, text=True, errors="replace", check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "first", "cases"), [("configs", 0, 24), ("corpora", 1, 24)])
def test_two_dozen_cases(tmp_path, kind, first, cases):
    fuzz(tmp_path, kind, first, cases)
