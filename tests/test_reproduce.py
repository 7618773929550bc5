"""`koff reproduce`: the runs it makes of the paper's tables, what it writes, how it judges. A stub stands for fit."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from koff_lightning.cli import main
from koff_lightning.commands import training_cli
from koff_lightning.commands.parsing.config_files import shipped_configs
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.specs.training import LossSpec
from koff_lightning.studies.bootstrap import Sample
from koff_lightning.studies.claims import paper_tables, protocol, statements
from koff_lightning.studies.claims import runs as arm_runs

# Writes what a run leaves; bits per byte tell the arm, and fewer with every seed.
STUB = """
import json, math, os, pathlib, sys
words = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
folder = pathlib.Path(words["trainer.default_root_dir"])
with open(folder.parent / "calls.txt", "a") as calls:
    calls.write(json.dumps([folder.name, words.get("trainer.max_steps"), sys.argv[1:]]) + "\\n")
if os.environ.get("FAIL", "nothing") in folder.name:
    sys.exit("Traceback\\nkoff: the disk is full")
arm, sparsity, seed = folder.name.rsplit("-", 2)
own = {"koff": 1.0, "no_memory": 1.1, "lora_only": 1.05, "kv_only": 1.02, "annealed_60": 1.0}.get(arm, 1.04)
own -= 1e-4 * int(seed)
own += {"0": -0.05, "1": 0.05}.get(seed, 0) * (arm == "kv_gates") - 0.03 * (arm == "kv_gates")
bpb = {"dense": 0.98, "koff": own, "memory_off": 1.12, "swapped": 1.2}
documents = {"bytes": [10, 20, 30], "nats": {a: [b * math.log(2) * n for n in (10, 20, 30)] for a, b in bpb.items()}}
row = {f"{name}_bpb": value for name, value in bpb.items()} | {f"{name}_ppl": 8 * value for name, value in bpb.items()}
general = {"dense_bpb": 1.5, "koff_bpb": None, "memory_off_bpb": 1.7, "swapped_bpb": 1.6 if arm == "koff" else None}
figures = {"general": {"mean": general}} if arm in ("koff", "no_memory") else {}
figures |= {"mean": row, "domains": {"x": row}, "sparsity": {"body": 0.11, "units": 0.14, "physical": {"body": 0.2}}}
folder.mkdir()
(folder / "documents.json").write_text(json.dumps({"x": documents}))
(folder / "results.json").write_text(json.dumps(figures))
"""


@pytest.fixture
def go(tmp_path, monkeypatch):
    """Run the command on the stub; the status and the calls it made."""
    stub = tmp_path / "stub.py"
    stub.write_text(STUB, encoding="utf-8")
    monkeypatch.setattr(arm_runs, "PROGRAM", [sys.executable, "-S", str(stub)])

    def run(*options):
        status = main(["reproduce", "--config=tiny_12pct.yaml", f"--out={tmp_path / 'out'}", *options])
        calls = tmp_path / "out" / "calls.txt"
        made = [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        calls.unlink(missing_ok=True)
        return status, made

    return run


def test_a_table_has_a_run_for_each_arm_and_seed_and_none_twice(go, tmp_path, capsys):
    status, made = go("--tables=2,8", "--seeds=2")
    assert status == 0, capsys.readouterr()
    arms = {"no_memory", "lora_only", "kv_only", "koff", "prune_recover", "all_blocks", "no_retention"}
    assert sorted(name for name, *_ in made) == sorted(
        f"{arm}-0.12-{seed}" for arm in arms | {"quarter", "half"} for seed in (0, 1)
    )
    steps = {name.split("-")[0]: steps for name, steps, _ in made}
    assert (steps["quarter"], steps["half"], steps["koff"]) == ("75", "150", None)
    words = next(words for name, _, words in made if name.startswith("no_memory"))
    assert words[words.index("ablations/no_memory.yaml") - 1] == "--config"
    assert go("--tables=2,8", "--seeds=2") == (0, []), "what is done is not repeated"

    found = json.loads((tmp_path / "out" / "reproduce.json").read_text(encoding="utf-8"))
    rows = {row["label"]: row for row in found["tables"]["2"]["rows"]}
    assert rows["with both"]["ours"]["bpb"]["mean"] == pytest.approx(1.0 - 0.5e-4)
    assert rows["with both"]["paper"] == {"mmlu": 0.52, "bbl": 0.47, "ppl": 8.8}
    assert rows["with both, memories off"]["ours"]["bpb"]["mean"] == pytest.approx(1.12)
    verdicts = {one["says"]: one["verdict"] for one in found["statements"]}
    assert verdicts["both memories do better than LoRA alone"] == "supported"
    assert verdicts["LoRA alone does better than KV alone"] == "contradicted"
    assert "half and half diverges" not in verdicts, "nothing is said of runs that there are not"
    text = (tmp_path / "out" / "reproduce.md").read_text(encoding="utf-8")
    assert "| with LoRA | 0.49 | 0.45 | 9.0 | 8.40 ± 0.00 | 1.0" in text
    assert " ± 0.0001 | - | 11.00 % | 14.00 % | 20.00 % | 2 |" in text, "this arm scored no general text"
    read = {label: row["ours"]["general"] for label, row in rows.items()}
    labels = "with both", "with both, memories off", "mask alone", "with LoRA"
    assert [value and value["mean"] for value in map(read.get, labels)] == [1.6, 1.7, 1.7, None]
    assert "| with both, memories off | - | - | - | 8.96 ± 0.00 | 1.1200 ± 0.0000 | 1.7000 ± 0.0000 |" in text


def test_rows_of_some_arms_alone(go, tmp_path, capsys):
    status, made = go("--tables=contest,2", "--arms=koff,ours", "--seeds=1")
    assert status == 0, capsys.readouterr()
    assert sorted(name for name, *_ in made) == ["koff-0.12-0", "ours-0.12-0"]
    found = json.loads((tmp_path / "out" / "reproduce.json").read_text(encoding="utf-8"))
    labels = {name: [row["label"] for row in table["rows"]] for name, table in found["tables"].items()}
    assert labels["2"] == ["with both", "with both, memories off"]
    assert labels["contest"] == ["the paper's recipe", "ours: the same without retention", "ours, memories off"]
    assert "--arms=koff,ours" in found["command"]
    status, _ = go("--tables=2,8", "--arms=quarter", "--seeds=1")
    assert status == 0, capsys.readouterr()
    found = json.loads((tmp_path / "out" / "reproduce.json").read_text(encoding="utf-8"))
    assert list(found["tables"]) == ["8"], "a table without a row left is not written"


def test_one_seed_decides_nothing_and_two_may(go, tmp_path):
    for seeds, verdict in ((1, "not decided"), (2, "contradicted")):
        assert go("--tables=9", f"--seeds={seeds}")[0] == 0
        found = json.loads((tmp_path / "out" / "reproduce.json").read_text(encoding="utf-8"))
        (cost,) = [one for one in found["statements"] if "retention" in one["says"]]
        assert cost["parts"][0]["value"] == pytest.approx(0.04)
        assert (cost["verdict"], cost["seeds"]) == (verdict, seeds)
    found["failures"] = [{"run": "koff-0.15-9", "tail": ""}]  # killed without a word
    assert "- koff-0.15-9: it said nothing\n" in protocol.markdown(found)


def test_a_difference_that_the_seeds_do_not_agree_on_is_not_decided(go, tmp_path):
    """Better with one seed, worse with the other: the interval holds zero, though the mean lies on one side."""
    assert go("--tables=12", "--seeds=2")[0] == 0
    found = json.loads((tmp_path / "out" / "reproduce.json").read_text(encoding="utf-8"))
    (one,) = [one for one in found["statements"] if one.get("than", [""])[0] == "kv_gates"]
    assert one["parts"][0]["low"] < 0 < one["parts"][0]["high"] and one["parts"][0]["value"] == pytest.approx(-0.01)
    assert one["verdict"] == "not decided"


class Planted:
    """Bits per byte of figures by name, each with its own noise of a normal draw."""

    def __init__(self, figures, noise=1e-4, seeds=(0, 1, 2)):
        self.figures, self.seeds = figures, list(seeds)
        normal = np.random.default_rng(0).normal(size=(len(figures), 10_000))
        self.draws = {name: figures[name] + noise * row for name, row in zip(figures, normal, strict=True)}

    def of(self, arms):
        return Sample({a: self.figures[a] for a in arms}, {a: self.draws[a] for a in arms}, self.seeds)


def test_the_intervals_hold_for_all_statements_at_once():
    """A difference 2.5 standard errors from zero would decide a lone statement, and does not decide one of 22."""
    whole = protocol.paper()
    one = statements.Statement("x", "y", ("a", "koff"), ("b", "koff"))

    def word(errors, level):
        planted = Planted({"a koff": -0.01 * errors, "b koff": 0.0}, noise=0.01 / 2**0.5)
        return statements.verdict(one, planted, level, {}.get)["verdict"]

    assert len(whole.statements) == 22 and whole.level == pytest.approx(1 - 0.05 / 22)
    page = (Path(__file__).parents[1] / "docs" / "reproduce.md").read_text(encoding="utf-8")
    assert "22 statements, so the interval has level 1 - 0.05 / 22 = 99.8 %" in page
    figures, side = sum(len(list(one.parts({}.get))) for one in whole.statements), (1 - whole.level) / 2
    assert f"{figures} figures x {side:.2%} = {figures * side:.1%}".replace("%", " %") in page
    assert (word(2.5, 0.95), word(2.5, whole.level)) == ("supported", "not decided")
    assert (word(4.5, whole.level), word(-4.5, whole.level)) == ("supported", "contradicted")


# Of the dense model, then of KOFF at each target; the mask alone is worse by 0.05.
SHAPE = {"dense": 1.0, "05": 1.001, "10": 1.002, "": 1.004, "20": 1.01, "30": 1.05, "37": 1.1}


def figure_2(shape=None, removed=None, noise=1e-4, seeds=(0, 1, 2), alone=0.05):
    """Verdicts on the two statements of Figure 2, by how each begins."""
    shape = SHAPE | (shape or {})
    named = {f"koff_{name}".rstrip("_") + " koff": value for name, value in shape.items() if name != "dense"}
    figures = {"koff dense": shape["dense"]} | named
    figures |= {name.replace("koff", "no_memory", 1): value + alone for name, value in named.items()}
    shares = {("koff", "dense"): 0.0, ("koff_10", "koff"): 0.08, ("koff_20", "koff"): 0.16, ("koff_37", "koff"): 0.3}
    planted, whole = Planted(figures, noise, seeds), protocol.paper()
    found = [one for one in whole.statements if one.source == "figure 2"]
    told = [statements.verdict(one, planted, whole.level, (shares | (removed or {})).get) for one in found]
    assert [len(one["parts"]) for one in told] == [6, 2]
    return [one["verdict"] for one in told]


@pytest.mark.parametrize(
    "changed, verdicts",
    [
        ({}, ["supported", "supported"]),
        ({"shape": {"10": 1.04}}, ["supported", "contradicted"]),  # 0.5 a point there, 0.64 beyond: as good as straight
        ({"shape": {"37": 1.0}}, ["supported", "contradicted"]),  # nothing is lost at all
        ({"shape": {"10": 0.9, "37": 1.0}}, ["supported", "contradicted"]),  # nor here, though the rise is the steeper
        ({"shape": {"10": 1.0256}, "noise": 1e-3}, ["supported", "not decided"]),  # about half, within the noise
        ({"alone": -0.05}, ["contradicted", "supported"]),
        ({"alone": 0.0}, ["not decided", "supported"]),
        ({"seeds": (0,)}, ["not decided", "not decided"]),
        ({"seeds": ()}, ["not decided", "not decided"]),
        ({"removed": {("koff_37", "koff"): 0.16}}, ["supported", "not decided"]),  # a stretch of no width
        ({"removed": {("koff_10", "koff"): None}}, ["supported", "not decided"]),
        # The same losses over other widths: what counts is what was closed, not the target.
        ({"removed": {("koff_10", "koff"): 0.004}}, ["supported", "contradicted"]),
    ],
)
def test_figure_2_is_judged_by_what_a_point_of_sparsity_costs(changed, verdicts):
    assert figure_2(**changed) == verdicts


def test_one_target_at_which_the_mask_alone_does_better_decides():
    whole = protocol.paper()
    (below,) = [one for one in whole.statements if isinstance(one, statements.Below)]
    figures = {" ".join(figure): 1.0 + 0.1 * figure[0].startswith("no_memory") for figure in below.figures}
    assert statements.verdict(below, Planted(figures), whole.level, {}.get)["verdict"] == "supported"
    figures["no_memory_30 koff"] = 0.9
    assert statements.verdict(below, Planted(figures), whole.level, {}.get)["verdict"] == "contradicted"


def test_the_papers_figures_are_those_of_the_backbone(go, tmp_path):
    """Of three models in tables 1 and 10; of any other it is the model that the table names."""
    for backbone, mmlu, setting in (
        ("Qwen/Qwen2.5-3B", [0.644, 0.329, 0.610, None], "Qwen2.5-3B, six topics; 12 % global"),
        ("org/Llama-3.1-8B", [0.667, 0.408, 0.603, 0.538], "Llama-3.1-8B, six topics; 12 % global"),
        ("koff-tiny", [0.560, 0.249, 0.520, None], "Llama-3.2-3B, six topics; 12 % global"),
    ):
        out = tmp_path / backbone.rpartition("/")[2]
        assert go("--tables=1", "--seeds=1", f"--backbone={backbone}", f"--out={out}")[0] == 0
        found = json.loads((out / "reproduce.json").read_text(encoding="utf-8"))["tables"]["1"]
        assert ([row["paper"].get("mmlu") for row in found["rows"]], found["setting"]) == (mmlu, setting)
    named = [name for name, table in protocol.paper().tables.items() if table.of("Qwen2.5-3B") != table]
    assert named == ["1", "1 languages", "10"]
    for name in named:
        for backbone in ("Qwen2.5-3B", "Llama-3.1-8B"):
            rows = protocol.paper().tables[name].of(backbone).rows
            assert all(set(row.paper) in ({"mmlu", "bbl", "ppl"}, set(), {"mmlu"}) for row in rows)
            assert {row.label for row in rows if not row.paper} <= {"KOFF, memories off"}


def test_figure_2_is_drawn_over_what_was_really_closed(go, drawn_pictures, tmp_path):
    assert go("--tables=fig 2", "--seeds=1")[0] == 0
    found = json.loads((tmp_path / "out" / "reproduce.json").read_text(encoding="utf-8"))
    points = protocol.curve(found["tables"]["fig 2"]["rows"])
    assert {point["arm"] for point in points} == {"dense", "koff", "no_memory"}
    assert [point["removed"] for point in points if point["arm"] == "dense"] == [0.0]
    assert {point["removed"] for point in points if point["arm"] != "dense"} == {0.11}
    assert sum(point["arm"] == "koff" for point in points) == sum(point["arm"] == "no_memory" for point in points) == 6
    assert (tmp_path / "out" / "plots" / "sparsity.png").stat().st_size > 1000
    below, bend = [one for one in found["statements"] if one["source"] == "figure 2"]
    assert [part["value"] for part in below["parts"]] == pytest.approx([-0.0] * 2 + [-0.1] + [-0.0] * 3)
    assert bend["parts"][1]["value"] is None, "the stub closes as much at every target: a stretch of no width"
    text = (tmp_path / "out" / "reproduce.md").read_text(encoding="utf-8")
    assert "(koff_10 - dense) / sparsity - 0.5 (koff_37 - koff_20) / sparsity: -" in text


def test_a_failing_row_leaves_the_others_and_is_said(go, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FAIL", "blended")
    status, _ = go("--tables=10", "--seeds=1")
    assert status == 2 and "1 of 3 runs failed, first blended-0.12-0: the disk is full" in capsys.readouterr().err
    text = (tmp_path / "out" / "reproduce.md").read_text(encoding="utf-8")
    assert "- blended-0.12-0: koff: the disk is full" in text and "| blended, half and half | 0.304" in text


@pytest.mark.parametrize(
    "options, message",
    [
        (["--tables=3"], "no table '3'. "),
        (["--tables=2", "--arms=koff,quarter"], "no row of arm 'quarter' in the tables. There are no_memory, "),
        (["--tables=2", "--arms="], "no row of arm '' in the tables. There are no_memory, "),
        (["--seeds=0"], "seeds must be 1 or more, got 0"),
        (["--", "--trainer.max_steps=-1"], "koff reproduce needs trainer.max_steps"),
    ],
)
def test_bad_input_is_one_line_before_any_run(go, capsys, options, message):
    assert go(*options) == (2, [])
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_every_arm_is_used_and_every_row_has_one():
    paper = protocol.paper()
    used = set(paper_tables.needed(paper.tables.values()))
    assert used == set(paper.arms)
    assert {arm for one in paper.statements for arm, _ in one.figures} <= used


@pytest.mark.parametrize("name", ["cross_entropy", "blended", "our_layout", "our_layout_text"])
def test_arms_of_another_loss_start_beside_a_stored_teacher(name, tmp_path):
    (stored := tmp_path / "stored.yaml").write_text("model: {loss: {teacher: stored}}", encoding="utf-8")
    configs = ("paper/tiny_languages.yaml", str(stored), *protocol.paper().arms[name].overlays)
    words = ["fit", *(word for one in configs for word in ("--config", one))]
    LossSpec(**training_cli.resolved(words)["model"]["loss"])


@pytest.mark.parametrize("name", ["kv_gates", "qkv_gates"])
def test_arms_of_single_channels_start_over_whole_units_of_the_body(name, tmp_path):
    (whole := tmp_path / "whole.yaml").write_text("model: {sparsity: {multiple_of: 8, denominator: body}}")
    configs = ("paper/tiny_languages.yaml", str(whole), *protocol.paper().arms[name].overlays)
    words = ["fit", *(word for one in configs for word in ("--config", one))]
    spec = SparsitySpec(**training_cli.resolved(words)["model"]["sparsity"])
    assert all(kind.endswith("_channel") for kind in spec.units) and spec.denominator == "units"


@pytest.mark.parametrize("name", list(protocol.paper().arms))
def test_every_arm_is_a_config_that_parses(name):
    arm = protocol.paper().arms[name]
    assert set(arm.overlays) <= set(shipped_configs())
    overlays = [word for overlay in arm.overlays for word in ("--config", overlay)]
    resolved = training_cli.resolved(["fit", "--config", "paper/tiny_languages.yaml", *overlays, *arm.options])
    assert resolved["trainer"]["max_steps"] > 0
    sparsity = resolved["model"]["sparsity"]
    ends = name.startswith(("hinge_", "progressive_", "lagrangian_"))  # Table 5 tells where each of these ends
    assert (sparsity["harden"] == "threshold") == ends
    assert not ends or sparsity["target"] == 0.2
    assert (sparsity["beta_end"] == 0.5) == name.startswith("annealed_"), "the grid of Table 9"
    places = {"learned_placement": ("all", 0.5), "top_half": ("top:50%", None), "all_blocks": ("all", None)}
    places |= dict.fromkeys(("our_layout", "our_layout_text"), ("all", None))
    memory = next((resolved["model"][part] for part in ("lora", "kv") if resolved["model"][part]), None)
    if memory:
        assert (memory["layers"], resolved["placement"]["keep"]) == places.get(name, ("top:64%", None))
    assert resolved["data"]["retention"], "general text is scored in all arms"
    without = "paper/rows/no_retention.yaml" in arm.overlays or "--model.retention=null" in arm.options
    assert (resolved["model"]["retention"] is None) == without
