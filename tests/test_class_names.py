"""A config may name our classes, Lightning's and torch's; of other code nothing is imported and nothing runs."""

import sys

import pytest
import yaml

from koff_lightning.cli import main
from koff_lightning.commands.parsing.class_names import SWITCH, only_known_classes
from koff_lightning.commands.training_cli import KoffCLI

MINE = """
from pathlib import Path
Path("imported").touch()
from lightning.pytorch import Callback
class Mine(Callback):
    pass
"""


def spec(name, **arguments):
    return {"class_path": name, "init_args": arguments}


SLOW = pytest.mark.slow
TOUCH = spec("subprocess.Popen", args="touch imported", shell=True)
AVERAGE = "lightning.pytorch.callbacks.WeightAveraging"


@pytest.fixture
def parsed(tmp_path, monkeypatch):
    """Parse a config with these options of the trainer, in a folder with somebody's module; builds nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    taken = {}

    def stop(cli):
        taken["trainer"] = cli.config[cli.subcommand].trainer
        raise SystemExit

    def parse(trainer, *argv):
        options = {"data": {"domains": {"de": "bundled:de"}}, "trainer": trainer}
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(options))
        monkeypatch.setattr(KoffCLI, "before_instantiate_classes", stop)
        return main(["fit", "--config", "c.yaml", *argv]), taken.get("trainer")

    yield parse
    sys.modules.pop("mine", None)


@pytest.mark.parametrize(
    ("trainer", "argv", "key", "name"),
    [
        ({"callbacks": [spec("os.system", command="touch imported")]}, [], "callbacks", "os.system"),
        pytest.param(
            {"callbacks": spec("subprocess.Popen", args=["touch", "imported"])},
            [],
            "callbacks",
            "subprocess.Popen",
            marks=SLOW,
        ),
        pytest.param({"callbacks": [spec("builtins.exec", source="1")]}, [], "callbacks", "builtins.exec", marks=SLOW),
        ({"callbacks": [spec("mine.Mine")]}, [], "callbacks", "mine.Mine"),
        pytest.param({"logger": "mine.Mine"}, [], "logger", "mine.Mine", marks=SLOW),
        pytest.param({"logger": [spec("mine.Mine")]}, [], "logger", "mine.Mine", marks=SLOW),
        ({"strategy": spec("mine.Mine")}, [], "strategy", "mine.Mine"),
        pytest.param({"plugins": [spec("mine.Mine")]}, [], "plugins", "mine.Mine", marks=SLOW),
        pytest.param({"profiler": spec("mine.Mine")}, [], "profiler", "mine.Mine", marks=SLOW),
        pytest.param({"accelerator": spec("mine.Mine")}, [], "accelerator", "mine.Mine", marks=SLOW),
        ({}, ["--trainer.callbacks+=mine.Mine"], "callbacks", "mine.Mine"),
        ({}, ["--trainer.logger=mine.Mine"], "logger", "mine.Mine"),
        pytest.param({}, ["--trainer.logger", "logger.yaml"], "logger", "mine.Mine", marks=SLOW),
        ({}, ["--config", "overlay.yaml"], "callbacks", "mine.Mine"),
        # through names that are allowed
        ({"callbacks": [spec("torch.os.system", command="touch imported")]}, [], "callbacks", "torch.os.system"),
        pytest.param(
            {"callbacks": [spec("koff_lightning.cli.sys.exit")]},
            [],
            "callbacks",
            "koff_lightning.cli.sys.exit",
            marks=SLOW,
        ),
        pytest.param({"callbacks": [spec("torch.hub.load")]}, [], "callbacks", "torch.hub.load", marks=SLOW),
        pytest.param(
            {"callbacks": [spec(AVERAGE, avg_fn="os.system")]}, [], "callbacks.avg_fn", "os.system", marks=SLOW
        ),
        ({"callbacks": [spec(AVERAGE, avg_fn=TOUCH)]}, [], "callbacks.avg_fn", "subprocess.Popen"),
        (
            {"callbacks": [spec("lightning.pytorch.callbacks.LambdaCallback", on_fit_start="os.getpid")]},
            [],
            "callbacks",
            "lightning.pytorch.callbacks.lambda_function.LambdaCallback",
        ),
    ],
)
def test_other_code_is_neither_imported_nor_run(parsed, tmp_path, capsys, trainer, argv, key, name):
    (tmp_path / "logger.yaml").write_text(yaml.safe_dump(spec("mine.Mine")))
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [spec("mine.Mine")]}}))
    assert parsed(trainer, *argv)[0] == 2
    said = capsys.readouterr().err
    assert said.startswith(f"koff: trainer.{key} names {name}: a config may name classes of koff_lightning, of ")
    assert said.endswith(f"If you trust all that it names, add {SWITCH}\n")
    assert said.count("\n") == 1
    assert not (tmp_path / "imported").exists()
    assert "mine" not in sys.modules


def test_tags_of_yaml_that_build_objects_are_refused(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(f"model: !!python/object/apply:os.system ['touch {tmp_path}/imported']\n")
    assert main(["fit", "--config", str(config)]) == 2
    assert "koff: " in capsys.readouterr().err
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("--lm_eval.include_path=mine", "include_path mine"),
        ('--lm_eval.tasks=[{"task": "mine.yaml", "domain": "en"}]', "tasks: mine.yaml"),
    ],
)
def test_files_of_tasks_are_code(tmp_path, capsys, option, named):
    assert main(["fit", "--config", "tiny_12pct.yaml", f"--trainer.default_root_dir={tmp_path}", option]) == 2
    said = capsys.readouterr().err
    assert said == f"koff: lm_eval.{named}: task files may run Python of their own. If you trust them, add {SWITCH}\n"


def test_the_switch_allows_them(parsed, tmp_path):
    status, trainer = parsed({"callbacks": [spec("mine.Mine")]}, SWITCH)
    assert status == 0
    assert [callback.class_path for callback in trainer.callbacks] == ["mine.Mine"]
    assert (tmp_path / "imported").exists()
    assert parsed({"callbacks": [spec("mine.Mine")]})[0] == 2, "it holds for one command"


def test_what_a_trainer_is_made_of_needs_no_switch(parsed):
    callbacks = [spec("lightning.pytorch.callbacks.EarlyStopping", monitor="val/koff_bpb"), "LearningRateMonitor"]
    trainer = {"callbacks": callbacks, "logger": spec("CSVLogger", save_dir="x")}
    trainer |= {
        "strategy": spec("koff_lightning.training.strategies.ReplicatedStrategy"),
        "profiler": spec("SimpleProfiler"),
    }
    status, got = parsed(trainer, "--trainer.plugins+=lightning.pytorch.plugins.environments.SLURMEnvironment")
    assert status == 0
    assert got.strategy.class_path.endswith("ReplicatedStrategy")


def test_other_parsers_of_the_process_are_left_as_they_were():
    from jsonargparse._common import parsing_settings

    before = dict(parsing_settings)
    with pytest.raises(KeyError), only_known_classes(allow_custom=False):
        assert parsing_settings != before
        raise KeyError
    assert parsing_settings == before


@pytest.fixture
def model_with_code(tmp_path, monkeypatch):
    """A config that lets the code of a model run, which leaves a file; returns the config."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(
        '{"model_type": "theirs", "auto_map": {"AutoConfig": "code.Theirs"}}'
    )
    (tmp_path / "theirs" / "code.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import PreTrainedConfig\nclass Theirs(PreTrainedConfig):\n    model_type = 'theirs'\n"
    )
    options = {"model": {"backbone": "theirs", "trust_remote_code": True}, "data": {"domains": {"de": "bundled:de"}}}
    options["trainer"] = {"max_steps": 1, "accelerator": "cpu"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(options))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    return "c.yaml"


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "--config", "c.yaml"],
        ["fit", "--model.trust_remote_code=false", "--config", "c.yaml"],
        ["baseline", "--config", "c.yaml", "--method", "magnitude"],
        ["plan", "--config", "c.yaml"],
    ],
)
def test_a_config_alone_runs_no_code_of_a_models_repository(model_with_code, tmp_path, capsys, words):
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said == (
        "koff: model.trust_remote_code: true lets code of the model's repository run, which is not for a config to "
        "say. If you trust that repository, add --model.trust_remote_code=true to the command\n"
    )
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "said", [["--model.trust_remote_code=true"], ["--model.trust_remote_code", "true"], [SWITCH]], ids=" ".join
)
def test_who_says_so_trusts_a_models_repository(model_with_code, tmp_path, capsys, said):
    assert main(["fit", "--config", "c.yaml", f"--trainer.default_root_dir={tmp_path}/run", *said]) == 2
    assert "backbone 'theirs' is a 'theirs' model; supported families" in capsys.readouterr().err
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("trainer", "line"),
    [
        (
            {"logger": "wandb"},
            "trainer.logger: no class 'wandb'. Name one in full, as class_path: lightning.pytorch.loggers.WandbLogger",
        ),
        (
            {"callbacks": [{"class_path": "LearningRateMonitr"}]},
            "trainer.callbacks: no class 'LearningRateMonitr'. Did you mean 'LearningRateMonitor'? Name one in full",
        ),
        (
            {"callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"save_topk": 2}}]},
            "trainer.callbacks: lightning.pytorch.callbacks.ModelCheckpoint has no option 'save_topk'. Did you mean "
            "'save_top_k'?",
        ),
    ],
)
def test_a_misspelt_class_or_option_of_one_is_named_with_the_right_one(tmp_path, capsys, trainer, line):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    assert main(["fit", "demo.yaml", "--config", str(tmp_path / "mine.yaml"), "--dry-run"]) == 2
    assert capsys.readouterr().err.startswith(f"koff: {line}")
