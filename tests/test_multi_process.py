"""Several processes train what one would train on the rows of all, with whole models or sharded ones."""

import json
import math
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import failing_ranks
import pytest
import several_ranks
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from several_ranks import ABSENT, DOMAINS, ON_CPUS, SAVED, SCORED, SMALL, STEPS

from koff_lightning import KoffError
from koff_lightning.artifact.checkpoint import from_checkpoint, read_checkpoint
from koff_lightning.artifact.export import export
from koff_lightning.cli import main
from koff_lightning.evaluation import lm_tasks
from koff_lightning.evaluation.harness import KoffLM, score
from koff_lightning.evaluation.lm_tasks import quiet
from koff_lightning.specs.training import RetentionSpec
from koff_lightning.support import ranks
from koff_lightning.training import strategies
from koff_lightning.training.checkpoints import newest_checkpoint

PLAIN = ("replicated", "sharded")
RESUMED = ("resumed", "resumed_sharded", "resumed_replicated")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left behind: `several_ranks.plain`."""
    path = tmp_path_factory.mktemp("several_ranks")
    several_ranks.tiny_module(path)
    several_ranks.launch(path, "plain")
    return path


@pytest.fixture(scope="module")
def variants(folder):
    several_ranks.launch(folder, "variants")
    return read(folder, *RESUMED, "bf16")


@pytest.fixture(scope="module")
def commands(folder):
    several_ranks.launch(folder, "commands")
    return folder


def read(folder, *runs, world=2):
    """run -> rank -> step -> what was recorded."""
    return {name: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(world)] for name in runs}


@pytest.fixture(scope="module")
def steps(folder):
    return read(folder, *PLAIN)


@pytest.fixture(scope="module")
def joined(folder):
    return several_ranks.joined_fit(folder)[1]


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


def not_alike(one, other):
    return one["logged"]["train/loss"] != other["logged"]["train/loss"]


def assert_alike(recorded, first=0):
    """All ranks to the bit, in all phases: logits, multipliers, memories, importance and the hardened mask."""
    for other in recorded[1:]:
        assert list(recorded[0]) == list(other) == list(range(first, STEPS))
        assert_same(recorded[0], other)
    assert bool(recorded[0][STEPS - 1]["values"]["model.gates.hardened"])


@pytest.mark.parametrize("run", PLAIN)
def test_ranks_are_bit_identical_after_every_step(steps, run):
    assert_alike(steps[run])


def test_two_processes_are_one_process_with_the_rows_of_both(steps, joined):
    """Also where they hold rows of different domains, of one only on one rank, or nothing to train at all."""
    assert [joined[step]["phase"] for step in range(STEPS)] == ["warmup"] * 2 + ["ramp"] * 3 + ["hold"] * 3 + [
        "consolidate"
    ] * 2
    assert_same(steps["replicated"][0], joined, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_four_processes_are_one_process_with_the_rows_of_all(folder):
    """A row each: on most steps no two ranks have the same domain."""
    several_ranks.launch(folder, "four", world=4)
    four = read(folder, "replicated4", "sharded4", world=4)
    for recorded in four.values():
        assert_alike(recorded)
    assert_same(four["sharded4"][0], four["replicated4"][0])
    assert_same(four["replicated4"][0], several_ranks.joined_fit(folder, world=4)[1], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_all_ranks_take_general_text_together_as_one_process_with_the_rows_of_both(folder, steps):
    """Also in steps in which one of them has nothing to train on of the domains."""
    several_ranks.launch(folder, "retained")
    for updates in ("mask", "both"):
        replicated, sharded = read(folder, f"retained_{updates}", f"retained_sharded_{updates}").values()
        assert_alike(replicated)
        assert_alike(sharded)
        assert_same(sharded[0], replicated[0])
        data, spec = several_ranks.RowsAndGeneral(), RetentionSpec(2, updates=updates)
        _, joined = several_ranks.joined_fit(folder, data=data, retention=spec)
        assert_same(replicated[0], joined, rtol=1e-5, atol=1e-5)
        taken = [step for step in range(4) if not_alike(replicated[0][step], steps["replicated"][0][step])]
        assert taken[0] == (1 if updates == "both" else 3), (
            "the first due step, and the first in which a mask is learned"
        )


def test_sharding_changes_nothing(steps):
    assert_same(steps["sharded"][0], steps["replicated"][0])


@pytest.mark.parametrize("run", ["replicated", "sharded"])
def test_what_is_absent_on_all_ranks_does_not_move(steps, run):
    for step, domain in ABSENT.items():
        before, after = (steps[run][0][s]["values"] for s in (step - 1, step))
        moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
        assert not [name for name in moved if f"koff_{domain}." in name]
        others = [other for other in DOMAINS if other != domain]
        assert all([name for name in moved if f"koff_{other}." in name] for other in others)


@pytest.mark.slow
def test_a_run_goes_on_as_if_it_had_not_stopped(steps, variants):
    """Whole models on sharded ones (with recomputed activations) and each on its own kind."""
    for run in RESUMED:
        assert_alike(variants[run], first=SAVED)
        assert_same(variants[run][0], steps["replicated"][0])


@pytest.mark.slow
def test_a_checkpoint_of_sharded_models_goes_on_on_one_process(folder, joined):
    sharded, again = folder / "sharded" / f"step={SAVED}.ckpt", {"save": folder / "alone"}
    _, alone = several_ranks.joined_fit(folder, resume=sharded, trainer=again)
    assert list(alone) == list(range(SAVED, STEPS))
    assert_same(alone, joined, rtol=1e-5, atol=1e-5)


def test_a_sharded_checkpoint_holds_what_was_trained_only(folder):
    one, other = (
        torch.load(folder / run / f"step={SAVED}.ckpt", weights_only=True) for run in ("sharded", "replicated")
    )
    assert one["state_dict"].keys() == other["state_dict"].keys()
    assert not [name for name in one["state_dict"] if name.startswith("model.backbone.") and "lora_" not in name]
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())


@pytest.mark.slow
def test_frozen_weights_are_sharded_and_may_be_bf16_while_what_is_trained_is_whole_and_fp32(folder, variants):
    kinds = torch.load(folder / "last.0.pt")["kinds"]
    assert ("torch.bfloat16", False, "DTensor") in kinds
    assert {kind for kind in kinds if kind[1]} == {("torch.float32", True, "Parameter")}
    _, joined = several_ranks.joined_fit(folder, trainer={"precision": "bf16-mixed"}, dtype="bfloat16")
    assert_alike(variants["bf16"])
    assert_same(*({1: run[1]} for run in (variants["bf16"][0], joined)), rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.usefixtures("variants")
def test_all_ranks_harden_to_the_mask_of_the_first(folder):
    one, other = (torch.load(folder / f"last.{rank}.pt")["kept"] for rank in range(2))
    assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # koff test has no use for them
def test_the_command_runs_and_one_process_finds_the_same_figures(commands, capsys):
    """For a sharded run's checkpoint. Held-out text is counted once: the ranks' seven batches do not come out even."""
    figures = [json.loads((commands / overlay / "results.json").read_text()) for overlay in ("ddp", "fsdp")]
    for part in ("domains", "heldout_bytes", "sparsity", "kept_units", "parameters", "tokens"):
        assert figures[0][part] == figures[1][part]
    documents = json.loads((commands / "ddp" / "documents.json").read_text())
    assert {d: sum(scores["bytes"]) for d, scores in documents.items()} == figures[0]["heldout_bytes"]
    for domain, row in figures[0]["domains"].items():
        bits = sum(documents[domain]["nats"]["koff"]) / math.log(2) / figures[0]["heldout_bytes"][domain]
        assert bits == pytest.approx(row["koff_bpb"], rel=1e-9)
    checkpoint = newest_checkpoint([commands / "fsdp"])
    options = [*SMALL, "--trainer.logger=false", f"--trainer.default_root_dir={commands / 'test'}"]
    assert main(["test", "--config", "tiny_12pct.yaml", *options, "--ckpt_path", str(checkpoint)]) == 0
    table = capsys.readouterr().out.partition("bits per byte")[2].strip()
    assert all(domain in table for domain in figures[0]["domains"])
    assert table in (commands / "commands0.log").read_text()
    assert "bits per byte" not in (commands / "commands1.log").read_text()


@pytest.mark.slow
def test_a_sharded_run_says_how_to_make_its_artifact_which_is_that_of_whole_models(commands):
    assert "spread over several processes; `koff export --ckpt` makes it" in (commands / "commands0.log").read_text()
    made, replicated = (commands / overlay / "artifact" for overlay in ("fsdp", "ddp"))
    assert not made.exists()
    export(from_checkpoint(newest_checkpoint([commands / "fsdp"])), made, prove=False)
    weights = list(made.rglob("*.safetensors"))
    assert len(weights) == 1 + 2 * 7  # the backbone, LoRA and KV memory of each domain
    for path in weights:
        assert path.read_bytes() == (replicated / path.relative_to(made)).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["ddp", "fsdp"])
def test_lm_eval_is_shared_out_and_seen_alike_by_all_ranks_as_by_one_process(commands, overlay):
    one, other = (json.loads((commands / f"{overlay}.{rank}.json").read_text()) for rank in range(2))
    assert one == other
    assert len(one) >= 3 and SCORED in one[-1]
    saved = read_checkpoint(newest_checkpoint([commands / overlay]))
    monitors = [state for name, state in saved["callbacks"].items() if SCORED in name]
    assert monitors[0]["monitor"] == SCORED
    assert float(monitors[0]["best_model_score"]) == max(scores[SCORED] for scores in one)
    with quiet():
        tasks = lm_tasks.load_tasks(["koff_cloze_en"])
        alone = score(KoffLM(from_checkpoint(newest_checkpoint([commands / overlay])), "en"), tasks, limit=5)
    for name, value in one[-1].items():
        if "_stderr" not in name:
            assert value == pytest.approx(alone["koff_cloze_en"][name.rpartition("/")[2]], rel=1e-5), name


@pytest.mark.slow
def test_an_evaluation_that_fails_on_all_ranks_is_a_warning_and_on_one_of_them_the_end(folder):
    """The other rank waits in lm-eval's collectives until the one that failed is gone."""
    several_ranks.launch(folder, "failing", script=failing_ranks.__file__)
    logs = [(folder / f"failing{rank}.log").read_text() for rank in range(2)]
    assert [log.count("failed at step 1, training goes on: ZeroDivisionError") for log in logs] == [1, 0]
    assert "failed at step 2" not in logs[0]
    assert read_checkpoint(newest_checkpoint([folder / "failing"]))["global_step"] == 1
    assert (folder / "failing.1.txt").read_text() == "ZeroDivisionError"
    assert (folder / "failing.0.txt").read_text() == "status 2"
    assert "koff: rank 0 has lost another rank:" in logs[0]


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_ends_all_between_two_steps_and_they_go_on(commands, overlay):
    assert "ended by SIGTERM; go on with --ckpt_path last" in (commands / "commands0.log").read_text()
    straight, cut = (read_checkpoint(newest_checkpoint([commands / name])) for name in (overlay, f"{overlay}_cut"))
    assert straight["global_step"] == cut["global_step"] == 3
    assert all(torch.equal(value, cut["state_dict"][name]) for name, value in straight["state_dict"].items())


@pytest.mark.slow
def test_ranks_stream_rows_of_their_own_and_go_on_where_they_were(folder):
    several_ranks.launch(folder, "streamed")
    whole, cut = ([torch.load(folder / f"{run}.{rank}.pt") for rank in range(2)] for run in ("whole", "cut"))
    for rank in range(2):
        assert len(whole[rank]) == 6
        assert all(torch.equal(one, other) for one, other in zip(whole[rank], cut[rank], strict=True))
    first, second = ({tuple(row) for batch in rows for row in batch.tolist()} for rows in whole)
    assert not first & second
    straight, resumed = (read_checkpoint(newest_checkpoint([folder / run])) for run in ("whole", "cut"))
    assert straight["global_step"] == resumed["global_step"] == 6
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in straight["state_dict"].items())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks for the second process in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_is_named_in_one_line_by_the_others_which_end(tmp_path, victim):
    words = ["fit", "--config", "tiny_12pct.yaml", "--config", "hardware/ddp.yaml", *SMALL, *ON_CPUS]
    words += ["--trainer.max_steps=9999", f"--trainer.default_root_dir={tmp_path / 'run'}"]
    command, said = [sys.executable, "-m", "koff_lightning", *words], tmp_path / "said"
    with said.open("w") as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors, "text": True, "start_new_session": True}
        run = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)
    try:
        assert any(line.startswith("step ") for line in run.stdout), said.read_text()
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        before = len(said.read_text())
        os.kill([run.pid, int(children[0])][victim], signal.SIGKILL)
        run.communicate(timeout=20)  # until both have closed it
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    named = "rank 1 was killed by SIGKILL" if victim else "rank 0 is gone"
    assert said.read_text()[before:] == f"koff: {named}, so the run ends; go on with --ckpt_path last\n"
    assert run.returncode == (1 if victim else -signal.SIGKILL)


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
