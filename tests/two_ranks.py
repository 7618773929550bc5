"""Runs on two processes, and the same run on one process that holds the rows of both.

As a script it is one of two ranks, makes all the runs of `main` and saves what each left behind.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_run import Batches, RandomText, tiny_module, tiny_trainer

from koff_lightning import KOFFModule, ranks
from koff_lightning.cli import main as koff
from koff_lightning.gates import BackboneGates
from koff_lightning.strategies import ReplicatedStrategy, ShardedStrategy

DOMAINS = ["en", "law", "code"]
STEPS = 10  # of two micro-batches each; tiny_trainer's phases: warm-up 0-1, ramp 2-4, hold 5-7, consolidation 8-9
SAVED = 4  # step at which runs are saved, and from which others go on
ROWS = [  # domains of the rows of (rank 0, rank 1), micro-batch by micro-batch
    *[(["en", "law"], ["law", "code"]), (["en", "en"], ["code", None])],
    *[(["en", "en"], [None, None]), (["en", "law"], [None, None])],  # nothing to train on rank 1, code on neither
    *[(["en", "law"], ["code", "code"]), (["law", "law"], ["en", "code"])],
    *[(["code", "law"], ["law", "code"]), (["law", None], ["code", "code"])],  # en on neither
    *[(["en", "law"], ["code", "en"]), (["code", "code"], ["en", "en"])],
    *[(["en", "en"], ["law", "code"])] * 2,
    *[(["law", "en"], ["code", "code"])] * 2,
    *[(["en", "law"], ["code", "en"])] * 2,
    *[([None, None], ["law", "law"]), ([None, None], ["en", "law"])],  # nothing to train on rank 0, code on neither
    *[(["code", "law"], ["law", "en"])] * 2,
]
ABSENT = {1: "code", 3: "en", 8: "code"}  # step: domain that has no row in it
SMALL = ["--data.max_train_bytes=9000", "--data.max_heldout_bytes=600", "--data.seq_len=32", "--trainer.max_steps=3"]
SMALL += ["--export.prove=false"]
ON_CPUS = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.logger=false"]


class Resumable(Batches):
    """Goes on after the batches that it has handed out, as the real loader does."""

    handed_out = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.data[self.handed_out :]:
            self.handed_out += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"handed_out": self.handed_out}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.handed_out = state["handed_out"]


class Rows(RandomText):
    """The rows of some of the two ranks as one batch; rows differ in how many tokens they predict."""

    domain_names = DOMAINS

    def __init__(self, *ranks: int) -> None:
        super().__init__()
        self.ranks = ranks

    def train_dataloader(self) -> Resumable:
        batches = []
        for number, domains in enumerate(ROWS):
            parts = [self.batch(domains[rank], seed=2 * number + rank) for rank in self.ranks]
            for rank, part in zip(self.ranks, parts, strict=True):
                part["labels"][0, : 2 + (number + 3 * rank) % 7] = -100
            tensors = {name: torch.cat([part[name] for part in parts]) for name in ("input_ids", "labels", "num_bytes")}
            batches.append(tensors | {"domains": [domain for part in parts for domain in part["domains"]]})
        return Resumable(batches)


class Recorder(Callback):
    """Notes after every optimizer step the phase, what was logged, and all that a checkpoint would hold."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, Any]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 2:
            state = pl_module.state_dict()
            values = {name: state[name].clone() for name in sorted(pl_module._owned())}
            logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.steps[trainer.global_step - 1] = {"phase": pl_module.phase, "values": values, "logged": logged}


def fit(
    folder: Path, data: Rows, resume: Path | None = None, trainer: dict[str, Any] | None = None, **options: Any
) -> tuple[KOFFModule, dict[int, dict[str, Any]]]:
    """A run with every kind of step; returns the module and what was recorded.

    Args:
        folder: Of the backbone.
        data: Rows of this process.
        resume: Checkpoint to go on from.
        trainer: Options of the trainer; `save` is a folder for checkpoints.
        options: Of the module.
    """
    build = KOFFModule.configure_model

    def seeded(module: KOFFModule) -> None:
        torch.manual_seed(100 * data.ranks[0])  # by themselves the ranks would not start alike
        build(module)

    recorder = Recorder()
    running = {"accumulate_grad_batches": 2, "devices": 1} | (trainer or {})
    callbacks = [recorder]
    if save := running.pop("save", None):
        callbacks.append(ModelCheckpoint(save, filename="{step}", save_top_k=-1, every_n_train_steps=SAVED))
    module = tiny_module(folder, domains=DOMAINS, **options)
    made = tiny_trainer(folder, callbacks, STEPS, **running | {"enable_checkpointing": save is not None})
    with patch.object(KOFFModule, "configure_model", seeded):
        made.fit(module, data, ckpt_path=resume, weights_only=True)
    return module, recorder.steps


def joined_fit(folder: Path, **options: Any) -> tuple[KOFFModule, dict[int, dict[str, Any]]]:
    """The same run on one process: each batch holds the rows of both ranks, each row with the noise it had there."""
    draw = BackboneGates.draw

    def draw_as_two(gates: BackboneGates, rows: int, place: tuple[int, ...]) -> torch.Tensor:
        if gates.hardened:
            return draw(gates, rows, place)
        return torch.cat([draw(gates, rows // 2, (*place[:2], rank)) for rank in range(2)])

    with patch.object(BackboneGates, "draw", draw_as_two):
        return fit(folder, Rows(0, 1), **options)


def launch(folder: Path) -> None:
    """Run this file as two ranks; raises with what they said if one of them fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    logs = [folder / f"rank{rank}.log" for rank in range(2)]
    running = [_start(folder, log, place | {"LOCAL_RANK": str(rank)}) for rank, log in enumerate(logs)]
    try:
        failed = [process.wait(timeout=600) for process in running]
    finally:
        for process in running:
            process.kill()
    if any(failed):
        raise RuntimeError("\n\n".join(f"{log.name}: {log.read_text()[-4000:]}" for log in logs))


def _start(folder: Path, log: Path, place: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, __file__, str(folder)]
    with log.open("w") as out:
        return subprocess.Popen(
            command, env=os.environ | place | {"OMP_NUM_THREADS": "1"}, stdout=out, stderr=subprocess.STDOUT
        )


def main(folder: Path, rank: int) -> None:
    """What each of the two processes does."""
    ranks.BUCKET = 1000  # several for these few parameters

    def run(name: str, strategy: type, resume: Path | None = None, precision: str = "32-true", **options: Any):
        trainer = {"strategy": strategy(), "devices": 2, "save": folder / name, "precision": precision}
        module, steps = fit(folder, Rows(rank), resume, trainer, **options)
        torch.save(steps, folder / f"{name}.{rank}.pt")
        return module

    run("replicated", ReplicatedStrategy)
    run("sharded", ShardedStrategy)
    replicated = folder / "replicated" / f"step={SAVED}.ckpt"
    run("resumed", ShardedStrategy, resume=replicated, activation_checkpointing=True)
    module = run("bf16", ShardedStrategy, precision="bf16-mixed", dtype="bfloat16")
    kinds = {(str(p.dtype), p.requires_grad, type(p).__name__) for p in module.backbone.parameters()}
    module.gates.logits.data += rank * torch.randn(len(module.gates.logits))
    module.harden()
    torch.save({"kinds": kinds, "kept": module.gates.kept}, folder / f"last.{rank}.pt")
    for overlay in ("ddp", "fsdp"):
        configs = ["--config", "tiny_12pct.yaml", "--config", f"hardware/{overlay}.yaml"]
        assert koff(["fit", *configs, *SMALL, *ON_CPUS, f"--trainer.default_root_dir={folder / overlay}"]) == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["LOCAL_RANK"]))
