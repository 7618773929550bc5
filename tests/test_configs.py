"""Every config that ships is parsed and built, big models by a tiny stand-in of the same family."""

import pytest
import yaml
from lightning.pytorch.strategies import SingleDeviceStrategy
from tiny_artifact import tiny_artifact
from transformers import AutoConfig, AutoModelForCausalLM

from koff_lightning.callbacks import AnnealSparsity
from koff_lightning.cli import main
from koff_lightning.commands import training_cli
from koff_lightning.commands.parsing import missing
from koff_lightning.commands.parsing.config_files import SHIPPED, shipped_configs
from koff_lightning.sparsity import SparsitySchedule
from koff_lightning.specs.idle import idle_options
from koff_lightning.specs.memories import KVSpec
from koff_lightning.specs.sparsity import SparsitySpec
from koff_lightning.specs.training import LossSpec, RetentionSpec
from koff_lightning.training.strategies import ReplicatedStrategy, ShardedStrategy

FAMILY = {
    "demo.yaml": "llama",
    "tiny_12pct.yaml": "llama",
    "tiny_12pct_long.yaml": "llama",
    "smollm2_12pct.yaml": "llama",
    "llama_12pct.yaml": "llama",
    "llama31_8b_12pct.yaml": "llama",
    "qwen25_7b_12pct.yaml": "qwen2",
    "qwen25_coder_1_5b_12pct.yaml": "qwen2",
    "gemma3_270m_12pct.yaml": "gemma3_text",
    "qwen3_8b_12pct.yaml": "qwen3",
}
ABLATIONS = sorted(name for name in shipped_configs() if name.startswith("ablations/"))
ON_CPU = ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory):
    """Folder of a tiny random model of a family."""
    folders: dict[str, str] = {}

    def save(family: str) -> str:
        if family not in folders:
            sizes = {"hidden_size": 32, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 128}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
            config = AutoConfig.for_model(family, **sizes, **heads, tie_word_embeddings=True)
            folders[family] = str(tmp_path_factory.mktemp(family))
            AutoModelForCausalLM.from_config(config).save_pretrained(folders[family])
        return folders[family]

    return save


@pytest.fixture
def built(monkeypatch, tmp_path):
    """Build what a command would run, without running it."""
    monkeypatch.chdir(tmp_path)

    def build(*argv: str) -> training_cli.KoffCLI:
        made = {}
        monkeypatch.setattr(training_cli.KoffCLI, "_run_subcommand", lambda cli, verb: made.update(cli=cli))
        monkeypatch.setattr(missing, "_refuse_missing_text", lambda domains: None)  # users bring theirs
        assert main(["fit", *argv]) == 0
        made["cli"].model.configure_model()
        return made["cli"]

    return build


def test_each_experiment_names_its_family():
    assert {*FAMILY, "add_domain.yaml"} == {name for name in shipped_configs() if "/" not in name}


@pytest.mark.parametrize("name", FAMILY)
def test_each_experiment_builds(name, built, stand_in):
    cli = built("--config", name, "--model.backbone", stand_in(FAMILY[name]), *ON_CPU)
    options = yaml.safe_load((SHIPPED / name).read_text())
    assert cli.model.sparsity.target == options["model"]["sparsity"]["target"] == 0.12
    assert cli.model.domains == list(options["data"]["domains"])
    assert cli.trainer.max_steps == options["trainer"]["max_steps"]
    assert cli.model.model.memories is not None


@pytest.mark.parametrize("name", sorted(name for name in shipped_configs() if name.count("/") == 1 and "paper" in name))
def test_each_recipe_of_the_paper_builds(name, built, stand_in, tmp_path):
    """Every choice of the paper that an option can say, in each of its configs."""
    if name.startswith("retention/"):
        pytest.skip("an overlay of hub datasets")
    family = "qwen2" if "qwen" in name else "llama"
    options = yaml.safe_load((SHIPPED / name).read_text(encoding="utf-8"))
    layers = [
        "--model.lora.layers=top:50%",
        "--model.kv.layers=top:50%",
        "--model.loss.top_k=50",
        "--model.sparsity.min_channels=4",
    ]
    model = built("--config", name, "--model.backbone", stand_in(family), *layers, *ON_CPU).model
    spec = model.sparsity
    assert sorted(spec.units) == sorted(f"{kind}_channel" for kind in ("k", "v", "gate", "up", "down"))
    assert (spec.scope, spec.target, spec.penalty, spec.autoscale, spec.beta) == ("local", 0.15, "hinge", True, 2.0)
    assert (model.loss.ce, options["model"]["loss"]["top_k"], model.loss.tail) == (0, 100, "drop")
    assert (model.retention.updates, model.kv.init, model.kv.frozen_first) == ("mask", "normal", False)
    assert model.lora.alpha / model.lora.rank == 0.5
    assert model.lora.targets == [f"{kind}_proj" for kind in ("k", "v", "gate", "up", "down")]
    place = options["model"]["lora"]["layers"], options["model"]["kv"]["layers"]
    many = (
        "top:16" if "8b" in name else "top:18" if "llama32_3b" in name else "top:64%"
    )  # 16: see its size in test_plan
    assert place == (many, many)


def test_add_domain_builds_on_an_artifact(built, tmp_path):
    folder = tiny_artifact(tmp_path).folder
    cli = built("--config", "add_domain.yaml", f"--model.artifact={folder}", "--data.domains.en=bundled:en", *ON_CPU)
    assert (cli.model.domains, cli.model.learns_mask, cli.model.modes[0]) == (["en"], False, "koff")


@pytest.mark.parametrize("name", ABLATIONS)
def test_each_ablation_changes_what_it_says(name, built, stand_in):
    model = built("--config", "demo.yaml", "--config", name, "--model.backbone", stand_in("llama"), *ON_CPU).model
    arm = {
        "no_memory": (model.lora, model.kv) == (None, None),
        "lora_only": bool(model.lora) and model.kv is None,
        "kv_only": model.lora is None and bool(model.kv),
        "dense_memory": not model.learns_mask and bool(model.lora) and bool(model.kv),
        "shared_memory": model.shared_memory,
        "two_stage": not model.joint,
    }
    text_alone = (model.loss.ce, model.loss.kl, model.loss.top_k) == (1.0, 0.0, None)
    arm |= {"ce_alone": text_alone and "ce" in yaml.safe_load((SHIPPED / name).read_text())["model"].get("loss", {})}
    arm |= {"blended_loss": model.loss.ce == model.loss.kl == 0.5}
    arm |= {"kl_alone": (model.loss.ce, model.loss.kl, model.loss.top_k, model.loss.tail) == (0.0, 1.0, 100, "drop")}
    differs = [what for what, is_so in arm.items() if is_so]
    assert differs == [name.removeprefix("ablations/").removesuffix(".yaml")]


@pytest.mark.parametrize(("warmup", "ramp"), [(0.05, 0.15), (0.05, 0.4), (0.02, 0.08), (0.6, 0.4)])
def test_a_mask_without_memories_learns_to_the_end_whatever_its_ramp(warmup, ramp, built, stand_in):
    shares = f"--anneal.warmup={warmup}", f"--anneal.ramp={ramp}"
    overlay = ("--config", "ablations/no_memory.yaml", "--model.backbone", stand_in("llama"))
    cli = built("--config", "demo.yaml", *overlay, *ON_CPU, *shares)
    (anneal,) = (part for part in cli.trainer.callbacks if isinstance(part, AnnealSparsity))
    for steps in (7, 250, 300):
        schedule = SparsitySchedule(0.12, steps, **anneal.fractions)
        explicit = SparsitySchedule(0.12, steps, warmup, ramp, 1 - warmup - ramp)
        assert schedule.harden_step == explicit.harden_step == steps
        for step in range(steps):
            for figure in ("phase", "target_at", "progress"):
                assert getattr(schedule, figure)(step) == getattr(explicit, figure)(step)


def test_hardware_cpu(built, stand_in):
    overlay = ("--config", "hardware/cpu.yaml", "--trainer.logger", "false")
    cli = built("--config", "llama_12pct.yaml", *overlay, "--model.backbone", stand_in("llama"))
    assert cli.trainer.precision == "32-true"
    assert {p.dtype.is_floating_point and p.dtype.itemsize for p in cli.model.parameters()} == {4}


@pytest.mark.parametrize("name", ["one_gpu", "ddp", "fsdp"])
def test_hardware_overlays_with_cpus_for_gpus(name, built, stand_in):
    devices = {"one_gpu": "1", "ddp": "2", "fsdp": "8"}[name]
    strategy = {"one_gpu": SingleDeviceStrategy, "ddp": ReplicatedStrategy, "fsdp": ShardedStrategy}[name]
    overlay = ("--config", f"hardware/{name}.yaml", *ON_CPU, "--trainer.devices", devices)
    trainer = built("--config", "llama_12pct.yaml", *overlay, "--model.backbone", stand_in("llama")).trainer
    assert trainer.num_devices == int(devices)
    assert type(trainer.strategy) is strategy


def test_a_run_without_overlay_takes_one_device(built, stand_in):
    assert built("--config", "demo.yaml", "--model.backbone", stand_in("llama"), *ON_CPU).trainer.num_devices == 1


@pytest.mark.parametrize("name", shipped_configs())
def test_first_line_describes_the_config(name):
    description = shipped_configs()[name]
    assert 10 < len(description) < 110
    assert (SHIPPED / name).read_text().startswith("# ")
    whole = "/" not in name or (name.startswith("paper/") and not name.startswith("paper/rows/"))
    assert description.startswith("Overlay") != whole


def resolved_sparsity(*configs):
    """The options of the mask that a run with these configs would have."""
    return SparsitySpec(
        **training_cli.resolved(["fit", *(w for c in configs for w in ("--config", c))])["model"]["sparsity"]
    )


@pytest.mark.parametrize("overlay", ABLATIONS)
def test_every_ablation_can_be_laid_on_the_papers_recipe(overlay):
    spec = resolved_sparsity("paper/tiny_languages.yaml", overlay)
    assert spec.target == (0 if overlay == "ablations/dense_memory.yaml" else 0.15)


@pytest.mark.parametrize(("row", "penalty"), [("hinge", "hinge"), ("progressive", "hinge"), ("tracked", "lagrangian")])
def test_the_rows_of_table_5_have_its_target_on_any_recipe(row, penalty):
    spec = resolved_sparsity("paper/llama32_1b_languages.yaml", f"paper/rows/{row}.yaml")
    assert (spec.target, spec.penalty) == (0.2, penalty)


def test_memories_that_would_never_train_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--trainer.max_steps=4", "--data.max_train_bytes=20000", "--data.max_heldout_bytes=3000"]
    assert main(["fit", "paper/tiny_languages.yaml", "ablations/two_stage.yaml", *small, *ON_CPU]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith(
        "koff: model.joint false trains the memories once the mask is fixed, and anneal fixes it after"
    )
    assert line.endswith("give a hold that ends before, as paper/rows/prune_recover.yaml does")


# ------------------------------------------------------------------------------------- options that have nothing to do


@pytest.mark.parametrize(
    ("sparsity", "kv", "loss", "told"),
    [
        ({}, {}, {}, []),
        ({"penalty": "hinge", "weight": 60.0}, {}, {}, []),
        (
            {"weight": 60.0},
            {},
            {},
            ["sparsity.weight 60.0 (of penalty fixed, hinge or absolute; this one is lagrangian)"],
        ),
        ({"weight": 60.0, "target": 0.0}, {}, {}, []),  # no mask: all of it is idle, as whoever sets 0 knows
        ({"penalty": "hinge", "band": 0.1}, {}, {}, ["sparsity.band 0.1 (of penalty lagrangian; this one is hinge)"]),
        ({"prior": "none", "spread": 9.0}, {}, {}, ["sparsity.spread 9.0 (of prior fisher; this one is none)"]),
        (None, {}, {}, []),
        ({}, {}, {"kl": 0.0, "top_k": 100}, ["loss.top_k 100 (loss.kl is 0)"]),
        ({}, {}, {"kl": 0.0, "tail": "bucket"}, ["loss.tail bucket (loss.kl is 0)"]),
        ({}, {}, {"tail": "bucket"}, ["loss.tail bucket (loss.top_k is null)"]),
        ({}, {}, {"tail": "bucket", "top_k": 100}, []),
        ({}, {"std": 0.1}, {}, ["kv.std 0.1 (of kv.init normal; this one is text)"]),
        ({}, {"std": 0.1, "init": "normal"}, {}, []),
        ({}, None, {}, []),
    ],
)
def test_what_is_set_and_does_nothing_is_told(sparsity, kv, loss, told):
    kv = None if kv is None else KVSpec(**kv)
    sparsity = None if sparsity is None else SparsitySpec(**sparsity)
    assert idle_options(sparsity, kv, LossSpec(**loss)) == told


@pytest.mark.parametrize(("updates", "fixed", "told"), [("mask", True, 1), ("mask", False, 0), ("both", True, 0)])
def test_retention_without_a_mask_to_learn_is_told(updates, fixed, told):
    found = idle_options(None, None, LossSpec(), RetentionSpec(updates=updates), fixed)
    assert found == ["retention.updates mask (no mask is learned, so general text moves nothing)"] * told


@pytest.mark.parametrize(
    "name", [*FAMILY, *(n for n in shipped_configs() if n.startswith("paper/") and "/rows" not in n)]
)
def test_no_shipped_config_sets_what_does_nothing(name):
    model = training_cli.resolved(["fit", "--config", name])["model"]
    kv, sparsity, loss = (
        kind(**model[part]) for kind, part in ((KVSpec, "kv"), (SparsitySpec, "sparsity"), (LossSpec, "loss"))
    )
    assert idle_options(sparsity, kv, loss) == []
