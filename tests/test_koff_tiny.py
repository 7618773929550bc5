"""koff-tiny, the real trained model that ships with the package, through the real command."""

import csv
import json

import pytest
import torch

from koff_lightning.cli import main
from koff_lightning.loading import TINY, load_backbone, load_tokenizer

SMALL = ["--data.max_train_bytes=60000", "--data.max_heldout_bytes=2000", "--trainer.enable_progress_bar=false"]
SMALL += ["--export.enabled=false"]


def fit(folder, *more):
    assert main(["fit", "--config", "tiny_12pct.yaml", f"--trainer.default_root_dir={folder}", *SMALL, *more]) == 0
    rows = csv.DictReader(next(folder.rglob("metrics.csv")).read_text().splitlines())
    return [row for row in rows if row.get("sparsity/target")], json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize("gate", ["hc", pytest.param("ddp", marks=pytest.mark.slow)])
def test_both_counts_stay_within_two_points_of_the_ramp_at_every_one_of_200_steps(tmp_path, gate):
    """The worst case for the controller: a short run on short rows, so that gradients are few and noisy."""
    rows, results = fit(tmp_path, "--trainer.max_steps=200", "--data.seq_len=24", f"--model.sparsity.gate={gate}")
    assert len(rows) == 200
    for count in ("expected", "realised"):
        gaps = [abs(float(row[f"sparsity/{count}"]) - float(row["sparsity/target"])) for row in rows]
        assert max(gaps) < 0.02, f"{count}: {max(gaps):.4f} at step {gaps.index(max(gaps))}"
    assert 0 <= 0.12 - results["sparsity"]["body"] < 384 / 1_179_648  # one neuron of the body's parameters


def test_koff_tiny_writes_its_domains():
    """It continues held-out text far better than chance: a guard against a broken tokenizer or weights."""
    model, tokenizer = load_backbone(TINY), load_tokenizer(TINY)
    for text in ("def __init__(self, name):\n    self.name = name\n", "Klicken Sie auf die Schaltfläche"):
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert ids[0, 0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[0], skip_special_tokens=True) == text
        with torch.no_grad():
            bits = float(model(ids, labels=ids).loss) * (ids.shape[1] - 1) / 0.6931 / len(text.encode())
        assert bits < 2.5  # a uniform guess over the vocabulary costs more than 3.5
