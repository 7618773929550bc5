"""What to look at first where there is a GPU: correctness, speed and memory, attention, decoding, whole runs.

    python recipes/gpu/parts.py correct --out gpu.jsonl
    python recipes/gpu/parts.py all --tiny --device cpu --out /tmp/rows.jsonl      # on small shapes, for a test

Each finding is one line of JSON, written as soon as it is known, so that a run that is cut off is worth what it got to.
`recipes/gpu/all.sh` runs the parts in order with a time limit each. Nobody has run it on a GPU yet. Models have random
weights in the exact shapes of the named ones: speed and memory do not depend on the numbers. `run` trains; see
whole_runs.py for the weights that it takes.
"""

import argparse
from pathlib import Path

import torch
from attending import attend
from correctness import correct
from decoding import decode
from findings import Findings
from speed import compiled, step
from whole_runs import demo, train

from koff_lightning.support import ranks

PARTS = {"correct": correct, "speed": step, "attention": attend, "decode": decode, "compile": compiled}
RUNS = {"demo": demo, "train": train}  # take their time; not among `all`


def main() -> None:
    """Run a part, or all but the runs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=[*PARTS, *RUNS, "all"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try it")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"))
    parser.add_argument("--seconds", type=float, default=400.0, help="that a run has, scoring and proof included")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here (torch.cuda.is_available() is false); --device cpu --tiny tries it")
    torch.backends.cuda.matmul.allow_tf32 = False
    assert ranks.count() == 1
    say = Findings(options.out, options.device)
    for part in PARTS if options.part == "all" else [options.part]:
        say.part = part
        torch.manual_seed(0)
        with say.trying(what=part):
            if part in RUNS:
                RUNS[part](say, options.device, options.tiny, options.seconds)
            else:
                PARTS[part](say, options.device, options.tiny)
    if say.wrong:
        raise SystemExit(f"{len(say.wrong)} findings are wrong, first {say.wrong[0]}")


if __name__ == "__main__":
    main()
