"""`koff fit --dry-run`: shows the budget and the text, takes two steps, writes nothing."""

import signal

import pytest
import torch
from toy_text import toy_tokenizer

from koff_lightning.backbone import load_tokenizer
from koff_lightning.callbacks.preview import rows
from koff_lightning.cli import main
from koff_lightning.module import KOFFModule


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
def test_a_dry_run_shows_what_is_to_come_and_writes_nothing(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.chdir(tmp_path)
    steps = []
    step = KOFFModule.training_step
    monkeypatch.setattr(KOFFModule, "training_step", lambda self, *args: steps.append(1) or step(self, *args))
    handler = signal.getsignal(signal.SIGINT)
    domains = '{"de": "bundled:de", "python": "bundled:python"}'
    small = [
        "--data.seq_len=64",
        "--data.batch_size=4",
        "--data.max_train_bytes=20000",
        "--data.max_heldout_bytes=1500",
    ]
    argv = ["--data.domains", domains, *small, "--trainer.accelerator=cpu", "--trainer.max_steps=500", flag]
    assert main(["fit", *argv]) == 0
    signal.signal(signal.SIGINT, handler)
    said = capsys.readouterr().out
    assert len(steps) == 2
    assert list(tmp_path.iterdir()) == []
    assert "to remove 106,168: 12 % of body (884,736 are in the 1,560 units that can go)" in said
    assert "98,304  LoRA of python" in said
    assert "first 8 training rows of 64 tokens" in said
    assert "domains   de 50 %, python 50 %" in said
    assert "\na row of de:\n" in said


def test_rows_show_documents_their_ends_and_what_is_filled(tmp_path):
    tokenizer = load_tokenizer(toy_tokenizer(tmp_path))
    one, two = tokenizer("the quick brown fox")["input_ids"], tokenizer("jumps während\ngrößere Füchse")["input_ids"]
    size = len(one) + len(two) + 5
    ids = torch.zeros(1, size, dtype=torch.long)
    ids[0, : len(one) + len(two)] = torch.tensor(one + two)
    positions = torch.cat([torch.arange(len(one)), torch.arange(len(two)), torch.arange(5)])[None]
    labels = ids.clone()
    labels[0, [0, len(one)]] = labels[0, -5:] = -100
    lines = rows([{"input_ids": ids, "labels": labels, "position_ids": positions, "domains": ["en"]}], tokenizer)
    full = 100 * (size - 5) / size
    assert lines == [
        f"first 1 training rows of {size} tokens: {full:.1f} % full, 2.0 documents or pieces of documents in each",
        "domains   en 100 %",
        "a row of en:",
        f"  {len(one):>5} | {tokenizer.decode(one)}",
        f"  {len(two):>5} | {tokenizer.decode(two)}",
    ]
