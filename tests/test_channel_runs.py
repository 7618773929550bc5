"""The paper's mask in real runs: fitted, exported, inspected, taken up again."""

import json
from dataclasses import asdict

import pytest
import torch
from tiny_command import small_fits

from koff_lightning import KoffError, SparsitySpec
from koff_lightning.artifact.checkpoint import from_checkpoint
from koff_lightning.artifact.decomposed import load_decomposed
from koff_lightning.cli import main
from koff_lightning.sparsity import Budget
from koff_lightning.training.resume import refuse_other_course, refuse_other_mask

PAPER = ["k_channel", "v_channel", "gate_channel", "up_channel", "down_channel"]
MASK = {
    "target": 0.15,
    "denominator": "units",
    "units": PAPER,
    "scope": "local",
    "beta": 2.0,
    "penalty": "hinge",
    "weight": 60.0,
    "autoscale": True,
    "initial": -2.0,
}
ANNEAL = {"warmup": 0.2, "ramp": 0.2, "hold": 0.2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a short run of the paper's mask on koff-tiny and its ragged and masked exports."""
    root = tmp_path_factory.mktemp("channels")
    with pytest.MonkeyPatch.context() as patch:
        options = {"trainer": {"max_steps": 10}, "model": {"sparsity": MASK}, "anneal": ANNEAL}
        with small_fits(root, patch, **options) as fit:
            assert not fit("run")
        assert not main(["export", "--ckpt", str(checkpoint(root)), "--out", "masked", "--layout", "masked"])
    (root / "run/artifact").rename(root / "ragged")
    return root


def checkpoint(root):
    """The last one of a run."""
    return max((root / "run").rglob("*.ckpt"), key=lambda file: (file.stat().st_mtime_ns, file.name))


def ids() -> torch.Tensor:
    return torch.randint(3, 500, (2, 24), generator=torch.Generator().manual_seed(0))


def test_results_name_the_nominal_and_the_physical_count(run):
    found = json.loads((run / "run/results.json").read_text(encoding="utf-8"))
    rates, size = found["sparsity"], found["parameters"]
    assert set(rates["by_kind"]) == set(PAPER)
    for kind, share in rates["by_kind"].items():
        assert 0.15 - 0.01 < share <= 0.15, kind
    assert rates["units"] == pytest.approx(0.15, abs=0.005)
    gone = rates["physical"]
    assert gone["parameters"] == size["dense_total"] - size["backbone_kept"]
    assert gone["body"] != pytest.approx(rates["body"], abs=1e-3)


def test_exports_say_what_they_themselves_lack(run, capsys):
    counts = {}
    for layout in ("ragged", "masked"):
        found = json.loads((run / layout / "koff.json").read_text(encoding="utf-8"))
        counts[layout] = found["sparsity"]["physical"]["parameters"]
        assert counts[layout] == found["parameters"]["dense_total"] - found["parameters"]["backbone"]
        assert not main(["inspect", str(run / layout)])
        shown = " ".join(capsys.readouterr().out.split())
        assert f"({counts[layout]:,} parameters)" in shown
        assert "by kind: 1" in shown and "of down channels" in shown
        assert f"{counts[layout]:,} parameters" in (run / layout / "backbone/README.md").read_text(encoding="utf-8")
    assert counts["masked"] == 0 < counts["ragged"]


@torch.no_grad()
def test_both_exports_say_what_the_checkpoint_says(run):
    model = from_checkpoint(checkpoint(run))
    for domain in ("de", "python"):
        with model.under([domain] * 2, model.hard_gates()):
            expected = model.backbone(input_ids=ids(), use_cache=False).logits
        for layout in ("ragged", "masked"):
            found = load_decomposed(run / layout)(ids(), domains=domain).logits
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("changed", [{"scope": "global"}, {"beta": 1.0}, {"autoscale": False}, {"initial": 0.0}])
def test_a_run_that_goes_on_keeps_the_options_of_its_mask(changed):
    there = {"sparsity": asdict(SparsitySpec(**MASK))}
    with pytest.raises(KoffError, match=f"sparsity.{next(iter(changed))}"):
        refuse_other_course(there, {"sparsity": there["sparsity"] | changed})


def test_checkpoints_older_than_these_options_are_taken_with_what_was_then():
    new = asdict(SparsitySpec())
    old = {k: v for k, v in new.items() if k not in ("scope", "harden", "beta", "beta_end", "initial", "autoscale")}
    refuse_other_course({"sparsity": old}, {"sparsity": new})
    refuse_other_mask(old, new)
    with pytest.raises(KoffError, match="harden"):
        refuse_other_mask(old, new | {"harden": "threshold"})
    with pytest.raises(KoffError, match="beta"):
        refuse_other_course({"sparsity": old}, {"sparsity": new | {"beta": 2.0}})


def test_a_threshold_takes_what_it_comes_to(tmp_path, monkeypatch):
    options = MASK | {"harden": "threshold", "initial": -5.5, "autoscale": False, "prior": "none"}
    sections = {"trainer": {"max_steps": 6}, "model": {"sparsity": options}, "anneal": ANNEAL}
    sections["export"] = {"enabled": False}
    with small_fits(tmp_path, monkeypatch, **sections) as fit:
        assert not fit("run")
    model = from_checkpoint(checkpoint(tmp_path))
    shares = model.budget.by_kind(model.gates.kept)
    assert shares["k_channel"] > 0.5, "logits below the threshold close far more than the target"
    assert isinstance(model.budget, Budget)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--model.sparsity.units=[channel,up_channel]"], "channel owns the weights of up_channel"),
        (["--model.sparsity.penalty=hinge", "--model.sparsity.target=0"], "hinge with sparsity.target 0"),
        (["--model.sparsity.scope=local"], "set sparsity.denominator to units"),
    ],
)
def test_the_command_line_refuses_in_one_line(options, wanted, tmp_path, monkeypatch, capsys):
    with small_fits(tmp_path, monkeypatch, trainer={"max_steps": 2}) as fit:
        assert fit("run", *options)
    said = capsys.readouterr().err.strip()
    assert wanted in said
    assert len(said.splitlines()) == 1
