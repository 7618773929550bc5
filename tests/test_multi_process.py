"""Two processes train what one process would train on the rows of both, whole models or sharded ones."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import two_ranks
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from two_ranks import ABSENT, SAVED, SMALL, STEPS

from koff_lightning import KoffError, ranks, strategies
from koff_lightning.artefact.checkpoint import from_checkpoint
from koff_lightning.artefact.export import export
from koff_lightning.cli import main

RUNS = ("replicated", "sharded", "resumed", "bf16")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left behind; see `two_ranks.main`."""
    path = tmp_path_factory.mktemp("two_ranks")
    two_ranks.tiny_module(path)
    two_ranks.launch(path)
    return path


@pytest.fixture(scope="module")
def steps(folder):
    """run -> rank -> step -> what was recorded."""
    return {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(2)] for name in RUNS}


@pytest.fixture(scope="module")
def joined(folder):
    return two_ranks.joined_fit(folder)[1]


def assert_same(one, other, **tolerance):
    """The same phase, loss and trained tensors in every step that both recorded; to the bit without a tolerance."""
    for step in one.keys() & other.keys():
        assert one[step]["phase"] == other[step]["phase"]
        for part in ("values", "logged"):
            assert one[step][part].keys() == other[step][part].keys()
            for name, value in one[step][part].items():
                torch.testing.assert_close(
                    torch.as_tensor(value),
                    torch.as_tensor(other[step][part][name]),
                    **tolerance or {"rtol": 0, "atol": 0},
                    msg=f"{name} in step {step}: ".__add__,
                )


@pytest.mark.parametrize("run", RUNS)
def test_ranks_are_bit_identical_after_every_step(steps, run):
    """Mask logits, multipliers, memories, their first slots, importance and the hardened mask, in all phases."""
    one, other = steps[run]
    assert [one[step]["phase"] for step in one][-8:] == [other[step]["phase"] for step in other][-8:]
    assert list(one) == list(range(SAVED if run == "resumed" else 0, STEPS))
    assert bool(one[STEPS - 1]["values"]["gates.hardened"])
    assert_same(one, other)


def test_two_processes_are_one_process_with_the_rows_of_both(steps, joined):
    """Also where they hold rows of different domains, of one only on one rank, or nothing to train at all."""
    assert [joined[step]["phase"] for step in range(STEPS)] == ["warmup"] * 2 + ["ramp"] * 3 + ["hold"] * 3 + [
        "consolidate"
    ] * 2
    assert_same(steps["replicated"][0], joined, rtol=1e-5, atol=1e-5)


def test_sharding_changes_nothing(steps):
    assert_same(steps["sharded"][0], steps["replicated"][0])


@pytest.mark.parametrize("run", ["replicated", "sharded"])
def test_what_is_absent_on_all_ranks_does_not_move(steps, run):
    for step, domain in ABSENT.items():
        before, after = (steps[run][0][s]["values"] for s in (step - 1, step))
        moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
        assert not [name for name in moved if f"koff_{domain}." in name]
        others = [other for other in two_ranks.DOMAINS if other != domain]
        assert all([name for name in moved if f"koff_{other}." in name] for other in others)


def test_a_checkpoint_goes_on_in_another_layout(steps, folder, joined):
    """Of whole models on sharded ones (with recomputed activations), of sharded ones on one process."""
    assert_same(steps["resumed"][0], steps["replicated"][0])
    sharded, again = folder / "sharded" / f"step={SAVED}.ckpt", {"save": folder / "alone"}
    _, alone = two_ranks.joined_fit(folder, resume=sharded, trainer=again)
    assert list(alone) == list(range(SAVED, STEPS))
    assert_same(alone, joined, rtol=1e-5, atol=1e-5)


def test_a_sharded_checkpoint_holds_what_was_trained_only(folder):
    one, other = (
        torch.load(folder / run / f"step={SAVED}.ckpt", weights_only=True) for run in ("sharded", "replicated")
    )
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert not [name for name in one["state_dict"] if name.startswith("backbone.") and "lora_" not in name]
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())


def test_frozen_weights_are_sharded_and_may_be_bf16_while_what_is_trained_is_whole_and_fp32(folder, steps):
    kinds = torch.load(folder / "last.0.pt")["kinds"]
    assert ("torch.bfloat16", False, "DTensor") in kinds
    assert {kind for kind in kinds if kind[1]} == {("torch.float32", True, "Parameter")}
    _, joined = two_ranks.joined_fit(folder, trainer={"precision": "bf16-mixed"}, dtype="bfloat16")
    assert_same(*({1: run[1]} for run in (steps["bf16"][0], joined)), rtol=2e-2, atol=2e-2)


def test_all_ranks_harden_to_the_mask_of_the_first(folder):
    one, other = (torch.load(folder / f"last.{rank}.pt")["kept"] for rank in range(2))
    assert torch.equal(one, other)


def test_the_command_runs_and_one_process_finds_the_same_figures(folder, capsys):
    """For a sharded run's checkpoint. Held-out text is counted once: the ranks' seven batches do not come out even."""
    figures = [json.loads((folder / overlay / "results.json").read_text()) for overlay in ("ddp", "fsdp")]
    for part in ("domains", "heldout_bytes", "sparsity", "kept_units", "parameters", "tokens"):
        assert figures[0][part] == figures[1][part]
    documents = json.loads((folder / "ddp" / "documents.json").read_text())
    assert {d: sum(scores["bytes"]) for d, scores in documents.items()} == figures[0]["heldout_bytes"]
    for domain, row in figures[0]["domains"].items():
        bits = sum(documents[domain]["nats"]["koff"]) / math.log(2) / figures[0]["heldout_bytes"][domain]
        assert bits == pytest.approx(row["koff_bpb"], rel=1e-9)
    checkpoint = next((folder / "fsdp").rglob("*.ckpt"))
    options = [*SMALL, "--trainer.logger=false", f"--trainer.default_root_dir={folder / 'test'}"]
    assert main(["test", "--config", "tiny_12pct.yaml", *options, "--ckpt_path", str(checkpoint)]) == 0
    table = capsys.readouterr().out.partition("bits per byte")[2].strip()
    assert all(domain in table for domain in figures[0]["domains"])
    assert table in (folder / "rank0.log").read_text()
    assert "bits per byte" not in (folder / "rank1.log").read_text()


def test_a_sharded_run_says_how_to_make_its_artefact_which_is_that_of_whole_models(folder):
    assert "spread over several processes; `koff export --ckpt` makes it" in (folder / "rank0.log").read_text()
    made, replicated = (folder / overlay / "artifact" for overlay in ("fsdp", "ddp"))
    assert not made.exists()
    export(from_checkpoint(next((folder / "fsdp").rglob("*.ckpt"))), made, prove=False)
    weights = list(made.rglob("*.safetensors"))
    assert len(weights) == 1 + 2 * 7  # the backbone, LoRA and KV memory of each domain
    for path in weights:
        assert path.read_bytes() == (replicated / path.relative_to(made)).read_bytes()


@pytest.mark.parametrize(
    ("strategy", "overlay"), [(DDPStrategy, "ddp"), (FSDPStrategy, "fsdp"), (ModelParallelStrategy, "fsdp")]
)
def test_other_strategies_are_refused(strategy, overlay):
    with pytest.raises(KoffError, match=rf"{strategy.__name__} .* use --config hardware/{overlay}.yaml"):
        strategies.check(SimpleNamespace(strategy=strategy()))


def test_a_sharded_run_is_restored_before_it_starts():
    """As any other: at its start the schedule of the mask is laid out over the steps that the checkpoint tells."""
    assert not strategies.ShardedStrategy().restore_checkpoint_after_setup


def test_one_process_needs_nobody():
    parameter = torch.nn.Parameter(torch.ones(2))
    ranks.average_gradients([parameter])
    assert parameter.grad is None
