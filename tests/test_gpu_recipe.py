"""What runs unattended on a GPU, tried whole on the CPU with small shapes: no typo costs the first minute there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_every_part_runs_on_small_shapes(tmp_path):
    rows = tmp_path / "rows.jsonl"
    environment = os.environ | {"DEVICE": "cpu", "TINY": "--tiny", "STEPS": "2", "OMP_NUM_THREADS": "1"}
    environment["LIMIT"] = "1200"  # seconds of a part: a minute of work, on a machine that may have more to do
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    words = ["bash", str(ROOT / "recipes/gpu/all.sh"), str(rows), "all run"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    assert {row["what"] for row in found if row["part"] == "correct"} == {
        "rows together and alone",
        "packed and apart",
        "device and CPU",
        "gradients recomputed and kept",
        "gradients on device and CPU",
    }
    assert {row["kind"] for row in found if row["part"] == "step"} == {"peft", "no KL", "live", "stored"}
    assert all(max(row["gaps"]) < 1e-5 for row in found if row["part"] == "attention")
    for precision in ("32-true", "bf16-mixed"):
        assert json.loads((Path(f"{rows}.run-{precision}") / "artifact" / "export_report.json").read_text())["passed"]
