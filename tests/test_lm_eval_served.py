"""lm-eval's own process with its `local-completions` against `koff serve` gives the scores of `koff lm-eval`."""

import json
import os
import subprocess
import sys

import pytest
from served import served
from tiny_artifact import tiny_artifact
from tiny_tasks import PROMPTS, toy_tasks

from koff_lightning.cli import main
from koff_lightning.serving.own import OwnEngine

pytest.importorskip("tenacity", reason="lm-eval's client of servers is NOT tested: tenacity is missing, `make install`")

TASKS = "toy_choose,toy_write"


def told(folder):
    """What the files of one run say: scores, and by task what the model said of every sample."""
    (results,) = folder.rglob("results_*.json")
    scores = json.loads(results.read_text(encoding="utf-8"))["results"]
    said = {}
    for task in TASKS.split(","):
        (file,) = folder.rglob(f"samples_{task}_*.jsonl")
        rows = sorted(map(json.loads, file.read_text(encoding="utf-8").splitlines()), key=lambda row: row["doc_id"])
        said[task] = [response for row in rows for response in row["filtered_resps"]]
    numbers = {(task, name): value for task, found in scores.items() for name, value in found.items()}
    return {key: value for key, value in numbers.items() if key[1] in ("acc,none", "exact_match,none")}, said


def test_the_same_scores(tmp_path):
    made, tasks = tiny_artifact(tmp_path), toy_tasks(tmp_path / "tasks")
    shared = ["--tasks", TASKS, "--include_path", tasks, "--log_samples"]
    words = ["lm-eval", "--model", str(made.folder), "--domains=de", *shared, "--output_path", str(tmp_path / "ours")]
    assert main([*words, "--device=cpu"]) == 0
    with served(OwnEngine(made.folder)) as address:
        about = {
            "model": "tiny:de",
            "base_url": f"{address}/v1/completions",
            "tokenizer": made.folder / "backbone",
            "max_length": 512,  # where nothing is said it cuts prompts to 2,047 tokens
            "add_bos_token": True,  # it sends ids, else without the start token that is before every text here
            "max_retries": 1,
        }
        args = ",".join(f"{name}={value}" for name, value in about.items())
        words = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", args, *shared]
        done = subprocess.run(
            [*words, "--output_path", str(tmp_path / "theirs"), "--batch_size=2"],
            capture_output=True,
            text=True,
            timeout=500,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    assert done.returncode == 0, done.stderr[-3000:]
    (scores, said), (due, exact) = told(tmp_path / "theirs"), told(tmp_path / "ours")
    assert scores == due and len(due) == 2
    assert said["toy_write"] == exact["toy_write"] and len(set(said["toy_write"])) > 1
    assert len(said["toy_choose"]) == 3 * len(PROMPTS)
    for (likelihood, greedy), (right, likeliest) in zip(said["toy_choose"], exact["toy_choose"], strict=True):
        assert float(likelihood) == pytest.approx(float(right), abs=1e-4)
        assert str(greedy) == str(likeliest)
