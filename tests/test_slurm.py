"""The script for SLURM, with stand-ins for `srun` and `scontrol`: what is run, and when it goes back into the queue."""

import os
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "recipes" / "scale" / "slurm.sh"


@pytest.mark.parametrize(
    ("status", "left", "requeued"),
    [(143, 300, True), (143, 9000, False), (143, None, True), (137, 300, False), (2, 300, False), (0, 300, False)],
)
def test_only_a_run_that_was_asked_to_end_goes_back_into_the_queue(tmp_path, status, left, requeued):
    for name, code in (("srun", status), ("scontrol", 0)):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "$@" > "{tmp_path}/{name}.said"\nexit {code}\n')
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_CPUS_PER_TASK": "8", "SLURM_NNODES": "2", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_ID": "7"}
    if left is not None:
        job["SLURM_JOB_END_TIME"] = str(int(time.time()) + left)
    done = subprocess.run(["bash", SCRIPT], env=job | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}, check=False)
    assert done.returncode == status
    said = (tmp_path / "srun.said").read_text()
    assert said.startswith(
        "--kill-on-bad-exit=1 koff fit --offline --config llama31_8b_12pct.yaml --config hardware/fsdp"
    )
    assert said.endswith(" --ckpt_path last\n")
    assert (tmp_path / "scontrol.said").exists() == requeued
