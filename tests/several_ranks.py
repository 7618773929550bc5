"""Runs on two or four processes, and the same run on one process that holds the rows of all.

As a script it is one of the ranks: it makes the runs that it is asked for and saves what each left behind.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_run import Batches, RandomText, tiny_module, tiny_trainer
from toy_text import toy_documents, write_jsonl

from koff_lightning import KOFFModule
from koff_lightning.artifact.checkpoint import read_checkpoint
from koff_lightning.callbacks import LMEval
from koff_lightning.cli import main as koff
from koff_lightning.data import stream
from koff_lightning.evaluation.lm_scores import Scores
from koff_lightning.gates import BackboneGates
from koff_lightning.specs.training import RetentionSpec
from koff_lightning.support import ranks
from koff_lightning.training.checkpoints import newest_checkpoint
from koff_lightning.training.strategies import ReplicatedStrategy, ShardedStrategy

WORLD = int(os.environ.get("WORLD_SIZE", "1"))  # kept, since Lightning takes it away after a run
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
SCORED = "lm_eval/en/koff_cloze_en/acc_bytes"
WATCHED = ['--lm_eval.tasks=[{"task": "koff_cloze_en", "domain": "en", "limit": 5}]', "--lm_eval.every_n_steps=1"]
WATCHED += [f"--checkpoint.monitor={SCORED}", "--checkpoint.mode=max", "--checkpoint.every_n_train_steps=1"]
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
    """The rows of one rank, or of all as one batch; rows differ in how many tokens they predict."""

    domain_names = DOMAINS

    def __init__(self, rank: int | None = None, world: int = 2) -> None:
        super().__init__()
        self.rank, self.mine = rank or 0, slice(None)
        if rank is not None:
            self.mine = slice(4 * rank // world, 4 * (rank + 1) // world)

    def train_dataloader(self) -> Resumable:
        batches = []
        for number, halves in enumerate(ROWS):
            parts = [self.batch(domains, seed=2 * number + half) for half, domains in enumerate(halves)]
            for half, part in enumerate(parts):
                part["labels"][0, : 2 + (number + 3 * half) % 7] = -100
            rows = {name: torch.cat([part[name] for part in parts]) for name in ("input_ids", "labels", "num_bytes")}
            rows["domains"] = [domain for part in parts for domain in part["domains"]]
            batches.append({name: values[self.mine] for name, values in rows.items()})
        return Resumable(batches)


class GeneralRows:
    """General text: the rows of one rank, or of all as one batch."""

    def __init__(self, mine: slice) -> None:
        self.mine = mine

    def batch_number(self, number: int) -> dict[str, Any]:
        batch = RandomText.batch([None] * 4, seed=500 + number)
        batch["labels"][:, : 2 + number % 7] = -100
        batch["labels"][3, 5:] = -100
        return {name: values[self.mine] for name, values in batch.items()}


class RowsAndGeneral(Rows):
    """With general text beside the rows."""

    def __init__(self, rank: int | None = None, world: int = 2) -> None:
        super().__init__(rank, world)
        self.general = GeneralRows(self.mine)


class Recorder(Callback):
    """Notes after every optimizer step the phase, what was logged, and all that a checkpoint would hold."""

    def __init__(self) -> None:
        self.steps: dict[int, dict[str, Any]] = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._phase = pl_module.phase  # of the step under way; afterwards it is that of the next

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % 2:
            state = pl_module.state_dict()
            values = {name: state[name].clone() for name in sorted(pl_module.owned())}
            logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
            self.steps[trainer.global_step - 1] = {"phase": self._phase, "values": values, "logged": logged}


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
        torch.manual_seed(100 * data.rank)  # by themselves the ranks would not start alike
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


def joined_fit(
    folder: Path, world: int = 2, data: Rows | None = None, **options: Any
) -> tuple[KOFFModule, dict[int, dict[str, Any]]]:
    """The same run on one process: each batch holds the rows of all ranks, each row with the noise it had there."""
    draw = BackboneGates.draw

    def draw_as_all(gates: BackboneGates, rows: int, place: tuple[int, ...]) -> torch.Tensor:
        if gates.hardened:
            return draw(gates, rows, place)
        return torch.cat([draw(gates, rows // world, (*place[:2], rank)) for rank in range(world)])

    with patch.object(BackboneGates, "draw", draw_as_all):
        return fit(folder, data or Rows(), **options)


def launch(folder: Path, what: str, world: int = 2, script: str = __file__) -> None:
    """Run this file, or another, as several ranks; raises with what they said if one of them fails.

    Args:
        folder: Where the backbone is and all is left.
        what: Name of the function below that each rank runs.
        world: Number of ranks.
        script: The file.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world), "NODE_RANK": "0"}
    logs = [folder / f"{what}{rank}.log" for rank in range(world)]
    running = [_start(script, folder, what, log, place | {"LOCAL_RANK": str(rank)}) for rank, log in enumerate(logs)]
    try:
        failed = [process.wait(timeout=900) for process in running]
    finally:
        for process in running:
            process.kill()
    if any(failed):
        raise RuntimeError("\n\n".join(f"{log.name}: {log.read_text()[-4000:]}" for log in logs))


def _start(script: str, folder: Path, what: str, log: Path, place: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, script, str(folder), what]
    with log.open("w") as out:
        return subprocess.Popen(
            command, env=os.environ | place | {"OMP_NUM_THREADS": "1"}, stdout=out, stderr=subprocess.STDOUT
        )


# ------------------------------------------------------------------------------------------- what a rank does


def run(
    name: str, strategy: type, folder: Path, rank: int, resume: Path | None = None, precision="32-true", **options: Any
) -> KOFFModule:
    """A run of `fit` whose record, and checkpoint of step `SAVED`, go by `name`."""
    trainer = {"strategy": strategy(), "devices": WORLD, "save": folder / name, "precision": precision}
    module, steps = fit(folder, Rows(rank, WORLD), resume, trainer, **options)
    torch.save(steps, folder / f"{name}.{rank}.pt")
    return module


def plain(folder: Path, rank: int) -> None:
    """The run on whole models, and on sharded ones."""
    run("replicated", ReplicatedStrategy, folder, rank)
    run("sharded", ShardedStrategy, folder, rank)


def four(folder: Path, rank: int) -> None:
    """The same on four ranks."""
    run("replicated4", ReplicatedStrategy, folder, rank)
    run("sharded4", ShardedStrategy, folder, rank)


def retained(folder: Path, rank: int) -> None:
    """Runs with general text in every second step: it moves the mask alone, or the drawn memory too."""
    for name, strategy in (("retained", ReplicatedStrategy), ("retained_sharded", ShardedStrategy)):
        for updates in ("mask", "both"):
            trainer = {"strategy": strategy(), "devices": WORLD}
            spec = RetentionSpec(2, updates=updates)
            _, steps = fit(folder, RowsAndGeneral(rank, WORLD), trainer=trainer, retention=spec)
            torch.save(steps, folder / f"{name}_{updates}.{rank}.pt")


def variants(folder: Path, rank: int) -> None:
    """Runs that go on from checkpoints of `plain`; one in bf16, whose ranks then harden masks of their own."""
    saved = {name: folder / name / f"step={SAVED}.ckpt" for name in ("replicated", "sharded")}
    run("resumed", ShardedStrategy, folder, rank, saved["replicated"], activation_checkpointing=True)
    run("resumed_sharded", ShardedStrategy, folder, rank, saved["sharded"])
    run("resumed_replicated", ReplicatedStrategy, folder, rank, saved["replicated"])
    module = run("bf16", ShardedStrategy, folder, rank, precision="bf16-mixed", dtype="bfloat16")
    kinds = {(str(p.dtype), p.requires_grad, type(p).__name__) for p in module.model.backbone.parameters()}
    module.model.gates.logits.data += rank * torch.randn(len(module.model.gates.logits))
    module.model.harden()
    torch.save({"kinds": kinds, "kept": module.model.gates.kept}, folder / f"last.{rank}.pt")


def commands(folder: Path, rank: int) -> None:
    """`koff fit` with lm-eval and a monitor; and again, asked to end by a signal that one rank gets in mid-step."""
    for overlay in ("ddp", "fsdp"):
        words = ["fit", "--config", "tiny_12pct.yaml", "--config", f"hardware/{overlay}.yaml", *SMALL, *ON_CPUS]
        scores: list[dict[str, float]] = []
        with patch.object(LMEval, "_log", _noting(LMEval._log, scores)):
            assert koff([*words, *WATCHED, f"--trainer.default_root_dir={folder / overlay}"]) == 0
        (folder / f"{overlay}.{rank}.json").write_text(json.dumps(scores))
        cut = [*words, *WATCHED, f"--trainer.default_root_dir={folder / overlay}_cut"]
        with patch.object(KOFFModule, "training_step", _asked_to_end(KOFFModule.training_step, rank)):
            assert koff(cut) == 128 + signal.SIGTERM
        assert read_checkpoint(newest_checkpoint([f"{folder / overlay}_cut"]))["global_step"] == 2
        assert koff([*cut, "--ckpt_path", "last"]) == 0


def streamed(folder: Path, rank: int) -> None:
    """`koff fit` on streamed text with a worker for each rank; and again, asked to end and gone on with."""
    for name in ("en", "law"):
        for part in range(3):
            write_jsonl(folder / "text" / f"{name}-{part}.jsonl", toy_documents(60, seed=ord(name[0]) + part))
    domains = {name: str(folder / "text" / f"{name}-*.jsonl") for name in ("en", "law")}
    words = ["fit", "--config", "tiny_12pct.yaml", "--config", "hardware/ddp.yaml", *ON_CPUS, "--export.enabled=false"]
    words += ["--data.streaming=true", "--data.num_workers=1", "--data.seq_len=32", "--data.batch_size=3"]
    words += ["--trainer.max_steps=6", "--data.max_heldout_bytes=600", f"--data.domains={json.dumps(domains)}"]
    rows: list[Any] = []
    stream.BUFFER, stream.PACK = 2000, 2  # so that the ranks' places differ
    with patch.object(KOFFModule, "training_step", _keeping(KOFFModule.training_step, rows)):
        assert koff([*words, f"--trainer.default_root_dir={folder / 'whole'}"]) == 0
        torch.save(rows, folder / f"whole.{rank}.pt")
        rows.clear()
        cut = [*words, f"--trainer.default_root_dir={folder / 'cut'}"]
        with patch.object(KOFFModule, "training_step", _asked_to_end(KOFFModule.training_step, rank)):
            assert koff(cut) == 128 + signal.SIGTERM
        assert koff([*cut, "--ckpt_path", "last"]) == 0
    torch.save(rows, folder / f"cut.{rank}.pt")


def _keeping(step: Callable[..., Any], rows: list[Any]) -> Callable[..., Any]:
    """The training step that also keeps the rows it gets."""

    def kept(module: KOFFModule, batch: dict[str, Any], batch_idx: int) -> Any:
        rows.append(batch["input_ids"])
        return step(module, batch, batch_idx)

    return kept


def _noting(log: Callable[..., None], scores: list[dict[str, float]]) -> Callable[..., None]:
    """LMEval's logging that also keeps what a monitor sees on this rank."""

    def noted(callback: LMEval, trainer: Trainer, scored: dict[str, Scores]) -> None:
        log(callback, trainer, scored)
        scores.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("lm_eval/")})

    return noted


def _asked_to_end(step: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """The training step in whose second call rank 1 gets SIGTERM."""

    def asked(module: KOFFModule, batch: dict[str, Any], batch_idx: int) -> Any:
        if module.global_step == 1 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(module, batch, batch_idx)

    return asked


if __name__ == "__main__":
    ranks.BUCKET = 1000  # several for these few parameters
    {
        "plain": plain,
        "four": four,
        "retained": retained,
        "variants": variants,
        "commands": commands,
        "streamed": streamed,
    }[sys.argv[2]](Path(sys.argv[1]), int(os.environ["LOCAL_RANK"]))
