"""The recipe for another logger in docs/evaluation.md, as it stands there; only where its package is installed."""

import re
from pathlib import Path

import pytest
import yaml
from tiny_command import small_fits

PAGE = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
RECIPE = yaml.safe_load(re.search(r"```yaml\n(trainer:\n  logger:.*?)```", PAGE, re.S)[1])
CSV, WANDB = RECIPE["trainer"]["logger"]

pytestmark = pytest.mark.filterwarnings("ignore")  # of packages that are not ours


def logged(tmp_path, monkeypatch, logger):
    """The folder of a run that logs by the csv logger and another one."""
    (tmp_path / "runs/tracked").mkdir(parents=True)
    small = {"max_steps": 2, "log_every_n_steps": 1, "logger": [CSV, logger]}
    with small_fits(tmp_path, monkeypatch, trainer=small) as run:
        assert run("runs/tracked") == 0
    return tmp_path / "runs/tracked"


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: this recipe is NOT tested here")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = logged(tmp_path, monkeypatch, WANDB)
    assert list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
