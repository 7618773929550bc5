"""The recipes for other loggers in docs/evaluation.md, as they stand there; only where their packages are installed."""

import re
from pathlib import Path

import pytest
import yaml
from tiny_command import small_fits

PAGE = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
RECIPES = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(trainer:\n  logger:.*?)```", PAGE, re.S)]
(CSV, WANDB), (_, MLFLOW) = (recipe["trainer"]["logger"] for recipe in RECIPES)

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


def test_mlflow_in_a_folder(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="mlflow is not installed: this recipe is NOT tested here")
    folder = logged(tmp_path, monkeypatch, MLFLOW)
    (losses,) = (folder / "mlruns").glob("*/*/metrics/train/loss")
    assert [line.split()[2] for line in losses.read_text(encoding="utf-8").splitlines()] == ["0", "1"], "by step"
    (run,) = {path.parents[2] for path in (folder / "mlruns").glob("*/*/metrics/test/*")}
    assert (run / "params").is_dir(), "the final scores come with the run"
