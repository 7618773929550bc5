"""`koff fit --dry-run`: shows the budget and the text, takes two steps, writes nothing."""

import re
import signal

import numpy as np
import pytest
import torch
from tiny_command import small_fits
from toy_text import toy_tokenizer

from koff_lightning import LoraSpec, SparsitySpec
from koff_lightning.callbacks.preview import budget, rows
from koff_lightning.cli import main
from koff_lightning.data.encoding import TokenStream
from koff_lightning.data.packing import pack
from koff_lightning.loading import load_tokenizer
from koff_lightning.training.module import KOFFModule


@pytest.mark.parametrize("flag", ["--dry-run", "--dry_run"])
def test_a_dry_run_shows_what_is_to_come_and_writes_nothing(tmp_path, monkeypatch, capsys, flag):
    monkeypatch.chdir(tmp_path)
    steps = []
    step = KOFFModule.training_step
    monkeypatch.setattr(KOFFModule, "training_step", lambda self, *args: steps.append(self.phase) or step(self, *args))
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
    assert steps == ["ramp", "consolidate"], "one that learns the mask and one under it"
    assert "bits per byte" not in said  # of two rows, which are no domain's text
    assert list(tmp_path.iterdir()) == []
    assert "to remove 106,168: 12 % of body (884,736 are in the 1,560 units that can go)" in said
    assert "98,304  LoRA of python" in said
    assert "first 8 training rows of 64 tokens" in said
    cut = re.search(r"\ndocuments cut at the end of a row, to go on in another: de (\d+) of (\d+), python ", said)
    assert 0 < int(cut[1]) <= int(cut[2])
    assert "domains   de 50 %, python 50 %" in said
    assert "\na row of de:\n" in said


@pytest.mark.parametrize(
    "options",
    [{}, {"kv": None}, {"lora": LoraSpec(rank=3), "shared_memory": True}, {"sparsity": SparsitySpec(target=0.0)}],
)
def test_the_budget_is_known_before_a_weight_is_loaded(monkeypatch, options):
    module = KOFFModule(domains=["de", "python"], **options)
    with monkeypatch.context() as patch:
        patch.setattr("koff_lightning.decomposition.load_backbone", lambda *_, **__: pytest.fail("it loads weights"))
        said = budget(module)
    module.configure_model()
    trained = [module.model.memories.lora_parameters, module.model.memories.kv_parameters]
    sizes = [sum(p.numel() for p in of(domain)) for of in trained for domain in module.domains]
    sizes += [module.model.gates.logits.numel()] * module.learns_mask
    assert [int(line.split()[1].replace(",", "")) for line in said[2:]] == [size for size in sizes if size]
    assert f"{module.model.budget.denominators['total']:,} parameters, frozen" in said[0]
    assert (
        f"{module.model.budget.denominators['units']:,} are in the {len(module.model.budget.costs):,} units" in said[1]
    )


def test_a_dry_run_takes_two_steps_of_the_optimizer(tmp_path, monkeypatch):
    """Also before a config that a run has saved, in which all options stand."""
    taken = []
    trainer = {"accumulate_grad_batches": 3, "max_steps": 5, "fast_dev_run": False}
    with small_fits(tmp_path, monkeypatch, trainer=trainer):
        step = KOFFModule.training_step
        monkeypatch.setattr(
            KOFFModule, "training_step", lambda self, *args: taken.append(self.global_step) or step(self, *args)
        )
        assert main(["fit", "--dry-run", "--config", "mine.yaml"]) == 0
    assert taken == [0, 0, 0, 1, 1, 1]


def test_a_document_that_lies_in_several_rows_is_one_that_is_cut():
    lengths = np.array([5, 11, 8, 20, 4])
    stream = TokenStream(np.arange(48, dtype=np.int32), lengths, lengths)
    assert pack(stream, 8, overlap=False).cut == 2  # the second from token 5 to 15, the fourth from 24 to 43


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
