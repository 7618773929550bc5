"""Spoil configs and corpora at random, run `koff fit` on each, and judge what came of it.

    python recipes/reliability/fuzz.py --kind configs --cases 1000
    python recipes/reliability/fuzz.py --kind corpora --cases 1000

Every case is one of
    refused   exit status 2 and one line `koff: ...` that ends what was said
    correct   exit status 0, and what the run left is what this config and this text must give (see the two modules)
and anything else is a fault: a traceback, no end within the limit, a refusal of sound input, a run that silently did
something else. Faulty cases are kept in a folder. The command runs in forks of one process that has imported
everything, with a limit of memory; the pictures of a run, half of the time that it takes, are not drawn.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.figure  # noqa: F401  imported before the first fork, like all below
import multiprocess.process
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import koff_lightning.commands.training_cli
from koff_lightning.cli import main as koff
from koff_lightning.data import DomainDataModule
from koff_lightning.loading import load_tokenizer
from koff_lightning.reports import plots

MEMORY = 6 * 2**30  # bytes of address space above what a fork begins with
PATIENCE = 20  # seconds between being asked to end and having ended


@dataclass
class Case:
    """A spoilt input.

    Args:
        number: Of the case; with the seed it decides everything.
        what: What was done to it.
        files: Content by name; `run.yaml` is the config.
        truth: What the judge knows about it.
    """

    number: int
    what: str
    files: dict[str, bytes]
    truth: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """What came of it: exit status (None: no end within the limit), what was said, what the run left."""

    status: int | None
    said: str
    results: dict[str, Any] | None
    texts: dict[str, list[int]] | None  # domain -> training documents, their bytes, held-out documents, their bytes
    ended: bool  # without being killed


def small_backbone(folder: Path) -> str:
    """A random Llama of two thin layers with the tokenizer of koff-tiny."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    config = LlamaConfig(vocab_size=4096, tie_word_embeddings=True, **sizes, **heads)
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer("koff-tiny").save_pretrained(folder)
    return str(folder)


class Running:
    """A case in a fork of this process.

    It is asked to end after `limit` seconds of the processor, or fifteen times as many of the clock, and then killed.
    """

    def __init__(self, case: Case, folder: Path, limit: float) -> None:
        self.case, self.folder, self.since = case, folder, time.monotonic()
        self.limit, self.until, self.asked = limit, self.since + 15 * limit, False
        folder.mkdir(parents=True)
        for name, content in case.files.items():
            (folder / name).write_bytes(content)
        self.child = os.fork()
        if not self.child:
            _be(folder)

    def _processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.child}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def outcome(self) -> Outcome | None:
        """What came of it, once it has ended."""
        done, status = os.waitpid(self.child, os.WNOHANG)
        if not done and time.monotonic() < self.until and (self.asked or self._processor_seconds() < self.limit):
            return None
        if not done and not self.asked:
            os.kill(self.child, signal.SIGTERM)
            self.asked, self.until = True, time.monotonic() + PATIENCE
            return None
        if not done:
            os.killpg(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
        return Outcome(
            None if self.asked else os.waitstatus_to_exitcode(status),
            (self.folder / "said.txt").read_text(errors="replace"),
            _json(self.folder, "results"),
            _json(self.folder, "texts"),
            bool(done),
        )


def _json(folder: Path, name: str) -> Any:
    path = next(iter(sorted(folder.rglob(f"{name}.json"))), None)
    return json.loads(path.read_text()) if path else None


def _be(folder: Path) -> None:
    """The child: the command, in its folder, in bounds; never returns."""
    status = 70
    try:
        os.setsid()
        os.chdir(folder)
        with open("said.txt", "wb", buffering=0) as said:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        _stay_alone()
        status = koff(["fit", "--config", "run.yaml", "--trainer.default_root_dir", "run"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _stay_alone() -> None:
    """No pictures, no more processes than a few, and a note of the texts that the run took."""

    def no_processes(*_: object, **__: object) -> None:
        raise koff_lightning.KoffError("(fuzz) this case would start other processes")

    subprocess.Popen.__init__ = no_processes
    torch.multiprocessing.Process.start = no_processes
    multiprocess.process.BaseProcess.start = no_processes
    plots.save = lambda *_: None
    setup = DomainDataModule.setup

    def noted(data: DomainDataModule, stage: str | None = None) -> None:
        setup(data, stage)
        counts = {
            name: [
                len(data._documents[name].lengths),
                int(data._documents[name].num_bytes.sum()),
                len(set(data._heldout[name].documents.tolist())),
                int(data._heldout[name].shares.sum()),
            ]
            for name in data.domain_names
        }
        Path("texts.json").write_text(json.dumps(counts))

    DomainDataModule.setup = noted


def verdict(kind: Any, case: Case, outcome: Outcome) -> tuple[str, str]:
    """`refused`, `correct` or a fault, with a reason.

    Args:
        kind: The module of the cases; its `wrong(case, outcome)` says what is wrong with a run that ended well, and its
            `unjust(case, outcome)` what is wrong with a refusal.
        case: Spoilt input.
        outcome: What came of it.
    """
    lines = [line for line in outcome.said.splitlines() if line.strip()]
    if "Traceback (most recent call last)" in outcome.said:
        return "traceback", lines[-1]
    if outcome.status is None:
        unending = kind.unending(case) and outcome.ended
        return ("correct", "goes on until it is told to end, as asked") if unending else ("no end", "")
    if outcome.status == 2:
        said = [number for number, line in enumerate(lines) if line.startswith("koff: ")]
        if len(said) != 1 or (len(lines) - said[0] != 1 and "--offline" not in outcome.said):
            return "unclear", " | ".join(lines[-3:])
        fault = kind.unjust(case, outcome)
        return ("unjust", fault) if fault else ("refused", lines[-1])
    if outcome.status == 0:
        fault = kind.wrong(case, outcome)
        return ("wrong", fault) if fault else ("correct", "")
    return "status", f"exit status {outcome.status}: {lines[-1] if lines else ''}"


def outcomes(cases: Iterator[Case], work: Path, limit: float, jobs: int) -> Iterator[tuple[Case, Outcome]]:
    """Run cases, some at a time. One thread: a fork of several could inherit a lock that nobody opens."""
    running: list[Running] = []
    while True:
        while len(running) < jobs and (case := next(cases, None)):
            running.append(Running(case, work / f"{case.number}", limit))
        if not running:
            return
        for one in list(running):
            if outcome := one.outcome():
                running.remove(one)
                yield one.case, outcome
        time.sleep(0.02)


def main() -> int:
    """Run it all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kind", choices=("configs", "corpora"), required=True)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=60, help="seconds of the processor for a case")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--faults", type=Path, default=Path("faults"), help="folder for what went wrong")
    options = parser.parse_args()
    kind = __import__(f"spoilt_{options.kind}")
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as work:
        make = kind.maker(small_backbone(Path(work) / "backbone"))

        cases = (make(options.seed, n) for n in range(options.first, options.first + options.cases))
        for case, outcome in outcomes(cases, Path(work), options.limit, options.jobs):
            name, why = verdict(kind, case, outcome)
            counts[name] += 1
            print(f"{case.number} {name}: {case.what}{' -> ' + why if why else ''}", flush=True)
            folder = Path(work) / f"{case.number}"
            if name not in ("refused", "correct"):
                shutil.copytree(folder, options.faults / folder.name, dirs_exist_ok=True, symlinks=True)
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{options.kind}, seed {options.seed}: {dict(counts.most_common())}")
    return int(bool(counts.keys() - {"refused", "correct"}))


if __name__ == "__main__":
    sys.exit(main())
