"""The recipes for other loggers in docs/evaluation.md, as they stand there; only where their packages are installed."""

import re
import sqlite3
from pathlib import Path

import pytest
import yaml
from tiny_command import small_fits

PAGE = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
RECIPES = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(trainer:\n  logger:.*?)```", PAGE, re.S)]
(CSV, WANDB), (_, MLFLOW) = [recipe["trainer"]["logger"] for recipe in RECIPES]

pytestmark = pytest.mark.filterwarnings("ignore")  # of packages that are not ours


def logged(tmp_path, monkeypatch, logger):
    """The folder of a run that logs by the csv logger and another one."""
    (tmp_path / "runs/tracked").mkdir(parents=True)
    small = {"max_steps": 2, "log_every_n_steps": 1, "logger": [CSV, logger]}
    with small_fits(tmp_path, monkeypatch, trainer=small) as run:
        assert run("runs/tracked") == 0
    return tmp_path / "runs/tracked"


def test_mlflow_in_a_database(tmp_path, monkeypatch):
    pytest.importorskip("mlflow.store.db.utils", reason="mlflow is not installed: this recipe is NOT tested here")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    folder = logged(tmp_path, monkeypatch, MLFLOW)
    with sqlite3.connect(folder / "mlflow.db") as store:
        names = {name for (name,) in store.execute("select key from latest_metrics")}
        assert {"val/koff_bpb", "test/koff_bpb"} <= names
        assert store.execute("select status from runs").fetchall() == [("FINISHED",)]


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: this recipe is NOT tested here")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = logged(tmp_path, monkeypatch, WANDB)
    assert list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
