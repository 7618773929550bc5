"""As a script: one of two ranks that stream, each with two workers; saves the rows that it was given, run by run."""

import json
import os
import sys
from pathlib import Path

from koff_lightning import KOFFModule
from koff_lightning.cli import main as koff
from koff_lightning.data import stream

STEPS, CUT = 4, 2
OPTIONS = ["--model.backbone=koff-tiny", "--config", "hardware/ddp.yaml", "--trainer.accelerator=cpu"]
OPTIONS += ["--trainer.devices=2", "--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]
OPTIONS += ["--trainer.precision=32-true", "--export.enabled=false"]
OPTIONS += ["--data.streaming=true", "--data.num_workers=2", "--data.seq_len=32", "--data.batch_size=2"]
OPTIONS += ["--data.max_heldout_bytes=1500", "--data.domains.a=a-*.txt", "--data.domains.b=b-*.txt"]


def main(rank: int) -> None:
    """A run, the first half of one, and its second half."""
    stream.BUFFER, stream.PACK = 500, 8
    seen: dict[str, list[list[int]]] = {}
    step = KOFFModule.training_step

    def recorded(module, batch, number):
        seen[name] += batch["input_ids"].tolist()
        return step(module, batch, number)

    KOFFModule.training_step = recorded
    for name, steps, more in (("whole", STEPS, ()), ("begun", CUT, ()), ("rest", STEPS, ("--ckpt_path", "last"))):
        seen[name] = []
        root = "whole" if name == "whole" else "cut"
        words = [f"--trainer.default_root_dir={root}", f"--trainer.max_steps={steps}", *more]
        assert koff(["fit", *OPTIONS, *words]) == 0
    Path(f"seen.{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(int(os.environ["LOCAL_RANK"]))
    sys.exit()
