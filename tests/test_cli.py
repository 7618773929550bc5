"""The command as a user meets it: speed of help, one-line errors, names looked up, what a run's options become."""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from koff_lightning.cli import TOOLS, TRAINING, _with_names, main
from koff_lightning.commands import training_cli
from koff_lightning.commands.parsing import config_files, first_look
from koff_lightning.support.errors import KoffError
from koff_lightning.support.names import refuse_no_model
from koff_lightning.support.wording import nearest, one_line
from koff_lightning.training.module import KOFFModule


@pytest.fixture
def config(monkeypatch):
    """Parse a command to the options that the run would have, without building anything."""

    def parse(*argv: str) -> object:
        taken = {}

        def stop(cli: training_cli.KoffCLI) -> None:
            taken["config"] = cli.config[cli.subcommand]
            raise SystemExit

        monkeypatch.setattr(training_cli.KoffCLI, "before_instantiate_classes", stop)
        status = main(list(argv))
        assert status == 0, "the command line was refused"
        return taken["config"]

    return parse


def refused(capsys, *argv: str) -> str:
    """The one line that a bad command leaves."""
    assert main(list(argv)) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1, said.err
    return said.err.strip()


def test_help_is_fast_and_imports_nothing_heavy():
    program = "sys.argv = ['/usr/bin/koff', '--help']"
    code = f"import sys; {program}; from koff_lightning.cli import main; main(); print(sorted(sys.modules))"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert not [name for name in ("torch", "lightning", "transformers", "jsonargparse") if f"'{name}'" in done.stdout]
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # of the processor: tests share it
    assert seconds < 0.5


@pytest.mark.parametrize("given, asked", [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_asleep_unless_told_otherwise(given, asked):
    """Said before torch is loaded: OpenMP reads it then. Spinning threads bring a busy machine to a halt."""
    program = "import os, sys; from koff_lightning.cli import main; main(['--version']); "
    program += "print('torch' in sys.modules, os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    # As the command, which leaves the models alone until a verb wants them.
    words = [sys.executable, "-c", "import sys; sys.argv[0] = 'koff'; " + program]
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == f"False {asked}"


# Imports the package up to the first thing that it takes from torch or transformers, which alone take seconds.
UP_TO_TORCH = """
import os, sys, types
class Stop:
    def find_spec(name, *_):
        if name.partition(".")[0] in ("torch", "transformers"):
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Stop)
if sys.argv[1:] == ["torch"]:
    sys.modules["torch"] = types.ModuleType("torch")
import koff_lightning
"""


@pytest.mark.parametrize(
    ("before", "given", "asked"), [("", None, "PASSIVE"), ("", "ACTIVE", "ACTIVE"), ("torch", None, None)]
)
def test_in_a_program_too_threads_wait_asleep_unless_told_otherwise(before, given, asked):
    """And unless torch is there already, which has read what the environment says."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": given} if given else {}
    words = [sys.executable, "-c", UP_TO_TORCH, *before.split()]
    ran = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout == f"{asked}\n"


def test_help_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {verb} " in said for verb in [*TRAINING, *TOOLS])
    assert main([]) == 2


@pytest.mark.parametrize("verb", TOOLS)
def test_each_tool_has_its_own_help(verb, capsys):
    assert main([*verb.split(), "--help"]) == 0
    assert f"usage: koff {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["fti"], "koff: no verb 'fti'. Did you mean 'fit'? `koff --help` lists them"),
        (["--config", "demo.yaml", "fit"], "koff: the verb comes first: koff fit --config demo.yaml"),
        (["fetch"], "koff: fetch: the following arguments are required: name"),
        (["fetch", "smollm2", "--otu", "x"], "koff: fetch: no option 'otu'. Did you mean 'out'?"),
        (["configs", "--out", "demo.yaml"], "koff: configs: no option 'out'. --help lists them"),
        (["export"], "koff: export: the following arguments are required: --ckpt, --out"),
        (
            ["export", "a.ckpt"],
            "koff: export: 'a.ckpt' stands alone, wanted is an option with a name. Perhaps --ckpt a.ckpt? "
            "`koff export --help` lists them",
        ),
        (
            ["fit", "--config", "demo.yaml", "ablations/lora_only.yaml"],
            "koff: 'ablations/lora_only.yaml' stands alone: configs come first (koff fit demo.yaml), each other value "
            "has a name",
        ),
        (
            ["fit", "demo.yaml", "ablations/kv_only"],
            "koff: 'ablations/kv_only' stands alone: configs come first (koff fit demo.yaml), each other value has a "
            "name. Did you mean 'ablations/kv_only.yaml'?",
        ),
        (["fit", "demo.yaml", "--model.backbone"], "koff: --model.backbone wants a value (str)"),
        (
            ["fit", "--config", "lama_12pct.yaml"],
            "koff: config 'lama_12pct.yaml' is neither a file here nor one that ships with the package. "
            "Did you mean 'llama_12pct.yaml'? `koff configs` lists them",
        ),
        (
            ["plan", "--config", "hardware/fsdp"],
            "koff: config 'hardware/fsdp' is neither a file here nor one that ships with the package. "
            "Did you mean 'hardware/fsdp.yaml'? `koff configs` lists them",
        ),
        (
            ["configs", "demo"],
            "koff: no config 'demo' ships with the package. Did you mean 'demo.yaml'? `koff configs` lists them",
        ),
        (
            ["memory", "compose", ".", "a", "b", "--as", "both", "--weights", "0.7, 0.3"],
            "koff: memory compose: weights must be list; got '0.7, 0.3'. A list stands in brackets: '[0.7, 0.3]'",
        ),
        (
            ["fit", "--config", "demo.yaml", "--model.sparcity.target", "0.2"],
            "koff: no option 'model.sparcity.target'. Did you mean 'model.sparsity.target'?",
        ),
        (
            ["fit", "--config", "demo.yaml", "--model.target", "0.2"],
            "koff: no option 'model.target'. Did you mean 'model.sparsity.target'?",
        ),
        (
            ["fit", "--config", "demo.yaml", "--model.lora.rnk", "4"],
            "koff: no option 'model.lora.rnk'. Did you mean 'model.lora.rank'?",
        ),
        (
            ["fit", "--config", "demo.yaml", "--model.sparsity.target", "much"],
            "koff: model.sparsity.target must be float; got 'much'.",
        ),
        (
            ["fit", "--config", "demo.yaml", "--model.lora.rank", "big"],
            "koff: model.lora.rank must be int; got 'big'.",
        ),
        (
            ["fit", "--config", "demo.yaml", "--anneal.shape", "kubic"],
            "koff: anneal.shape must be 'linear', 'cosine', 'cubic'; got 'kubic'. Did you mean 'cubic'?",
        ),
        (
            ["fit"],
            "koff: data.domains is empty: give a --config (`koff configs` lists them) or --data.domains.NAME SOURCE",
        ),
        (
            ["fit", "hardware/cpu.yaml", "--model.lora.rank=4"],
            "koff: data.domains is empty, no config given names it: add --config domains/law.yaml, say (`koff configs` "
            "lists more), or --data.domains.NAME SOURCE",
        ),
        (
            ["fit", "--config", "demo.yaml", "--model.domains", "[de]"],
            "koff: model.domains is taken from data.domains: give that instead",
        ),
        (
            ["fit", "--config", "demo.yaml", "--model.sparsity.target", "1.2"],
            "koff: sparsity.target must lie in [0, 1): the share to remove, 0.12 for 12 %; got 1.2",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(argv, line, capsys):
    assert refused(capsys, *argv) == line


@pytest.mark.parametrize(
    ("verb", "words", "message"),
    [
        ("analyze", ["--model", "nothing"], "nothing: no such run: give a checkpoint"),
        ("reproduce", ["--config", "lama_12pct.yaml"], "neither a file here .* mean 'llama_12pct.yaml'"),
        ("plan", ["--config", "lama_12pct.yaml"], "neither a file here .* mean 'llama_12pct.yaml'"),
        ("inspect", ["nothing"], "artifact 'nothing': no such folder"),
        ("export", ["--ckpt", "nothing.ckpt", "--out", "x"], "checkpoint nothing.ckpt: no such file"),
        ("push", ["nothing", "me/it"], "artifact 'nothing': no such folder"),
        ("router fit", ["--model", "nothing"], "artifact 'nothing': no such folder"),
        ("test", ["--config", "demo.yaml"], "koff test scores what a run has trained: give its --ckpt_path"),
        ("fit", ["--config", "demo.yaml", "--model.backbone", "./nothing"], "backbone './nothing': no such folder"),
        ("fit", ["--data.domains.de", "bundled:de", "--model.backbone=a.gguf"], "backbone 'a.gguf': no such file"),
        ("fit", ["--config", "demo.yaml", "--data.domains.de", "a.txt"], "domain 'de': no file matches 'a.txt'"),
        ("prepare", ["--data.domains", "{de: [a.txt, 'bundled:klingon']}"], "no file matches 'a.txt'.*unknown bundled"),
    ],
)
def test_what_is_not_there_is_seen_before_anything_heavy_is_imported(verb, words, message):
    with pytest.raises(KoffError, match=message):
        first_look.look(verb, words)


def test_a_name_without_owner_is_looked_for_where_the_hub_is_switched_off(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    refuse_no_model("word")  # the hub has some
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        KoffError, match="backbone 'word': no such folder here, and no copy of it from the hub, which is"
    ):
        first_look.look("fit", ["--config", "demo.yaml", "--model.backbone", "word"])
    (tmp_path / "hub" / "models--word").mkdir(parents=True)
    refuse_no_model("word")
    (tmp_path / "folder").mkdir()
    refuse_no_model("folder")


@pytest.mark.parametrize("words", [["--model", "{0}"], ["--model", "x/y", "--against", "flap={0}"]], ids=" ".join)
def test_a_folder_without_a_run_is_refused_before_text_is_read(words, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it may have a run x/y
    words = [word.format(tmp_path) for word in words]
    with pytest.raises(KoffError, match="holds neither a checkpoint nor koff.json of an exported model"):
        first_look.look("analyze", words)
    (tmp_path / "version_0" / "checkpoints").mkdir(parents=True)
    with pytest.raises(KoffError, match="is the folder of a run without a checkpoint or an exported model"):
        first_look.look("analyze", words)
    elsewhere = tmp_path.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    (tmp_path / "version_0" / "link").symlink_to(elsewhere)  # what lies there may be one
    first_look.look("analyze", words)
    (tmp_path / "version_0" / "link").unlink()
    (tmp_path / "version_0" / "checkpoints" / "last.ckpt").touch()
    first_look.look("analyze", words)


def test_looking_for_text_imports_nothing_heavy():
    words = ["fit", "demo.yaml", "--data.domains.de", "nothing.jsonl", "--data.domains.en", "bundled:klingon"]
    code = f"import sys; sys.argv[0] = 'koff'; from koff_lightning.cli import main; main({words}); print(*sys.modules)"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "nothing.jsonl" in done.stderr and "klingon" in done.stderr and len(done.stderr.splitlines()) == 3
    assert not {"torch", "lightning", "transformers", "jsonargparse"} & {*done.stdout.split()}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5  # 0.4 on a quiet machine


def test_what_a_later_word_says_counts(tmp_path):
    """No file of an earlier config is missed where a later word names another, as in `demo.yaml mine.yaml`."""
    (tmp_path / "a.yaml").write_text("data: {domains: {de: nothing.txt}}\nmodel: {backbone: ./nothing}\n")
    (tmp_path / "b.yaml").write_text("data: {domains: {de: bundled:de}}\nmodel: {backbone: koff-tiny}\n")
    first, second = ([f"--config={tmp_path / name}"] for name in ("a.yaml", "b.yaml"))
    first_look.look("fit", first + second)
    first_look.look("fit", [*first, "--data.domains.de", "bundled:de", "--model.backbone", "koff-tiny"])
    with pytest.raises(KoffError, match=r"\./nothing"):
        first_look.look("fit", second + first)


def test_a_typo_in_a_config_file_is_one_line(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("model: {sparsity: {traget: 0.1}}\ndata: {domains: {de: bundled:de}}\n")
    line = refused(capsys, "fit", "--config", str(tmp_path / "mine.yaml"))
    assert line == "koff: no option 'model.sparsity.traget'. Did you mean 'model.sparsity.target'?"


def test_broken_yaml_is_one_line(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("model: [1\n")
    assert "is not valid YAML" in refused(capsys, "fit", "--config", str(tmp_path / "mine.yaml"))


@pytest.mark.parametrize(
    ("content", "kind"),
    [("hello", "a single word, number or text"), ("[1, 2]", "a list"), ("7", "a single word, number")],
)
@pytest.mark.parametrize("verb", ["fit", "plan"])
def test_a_config_that_holds_no_options_is_one_line(tmp_path, capsys, content, kind, verb):
    (tmp_path / "str.yaml").write_text(content)
    assert main([verb, "--config", str(tmp_path / "str.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"koff: {tmp_path / 'str.yaml'} holds {kind}")
    assert "wanted are sections of options, as data: and below it domains:" in line


def test_a_domain_given_twice_is_one_line(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("data:\n  domains:\n    de: bundled:de\n    de: bundled:en\n")
    assert "mine.yaml:4: 'de' is given twice" in refused(capsys, "fit", "--config", str(tmp_path / "mine.yaml"))


def test_print_config_gives_a_config_that_parses_again(tmp_path, capsys, config):
    assert main(["fit", "--config", "demo.yaml", "--model.sparsity.target", "0.25", "--print_config"]) == 0
    printed = capsys.readouterr().out
    assert "target: 0.25" in printed
    (tmp_path / "again.yaml").write_text(printed)
    assert config("fit", "--config", str(tmp_path / "again.yaml")).model.sparsity.target == 0.25


def test_domains_of_the_model_are_those_of_the_data(config):
    options = config("fit", "--data.domains", "{de: bundled:de, py: bundled:python}")
    assert options.model.domains == ["de", "py"]


def test_later_configs_and_options_win(config):
    options = config("fit", "--config", "demo.yaml", "--config", "ablations/no_memory.yaml", "--seed_everything", "7")
    assert options.model.lora is None
    assert options.model.kv is None
    assert options.seed_everything == 7


def test_the_seed_is_fixed_and_the_folder_is_named_after_the_configs(config):
    options = config("fit", "--config", "demo.yaml", "--config=ablations/lora_only.yaml")
    assert options.seed_everything == 0
    assert options.trainer.default_root_dir == "runs/demo+lora_only"


def test_explicit_options_win_over_the_checkpoint(tmp_path, config):
    torch.save({"hyper_parameters": {"sparsity": {"target": 0.5}}, "state_dict": {}}, tmp_path / "old.ckpt")
    options = config("validate", "--config", "demo.yaml", "--ckpt_path", str(tmp_path / "old.ckpt"))
    assert options.model.sparsity.target == 0.12


@pytest.mark.parametrize("words", [["demo.yaml"], ["--config", "demo.yaml"], ["--config=demo.yaml"]])
def test_a_config_is_named_in_any_of_three_ways(words):
    """The last one was once taken for a file of that name."""
    assert training_cli.resolved(["fit", *_with_names("fit", words)])["trainer"]["max_steps"] == 200


def test_a_file_here_goes_before_a_shipped_config(tmp_path, monkeypatch, config):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text("data: {domains: {mine: bundled:en}}\n")
    assert config("fit", "--config", "demo.yaml").model.domains == ["mine"]


def test_configs_lists_each_with_its_first_line(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["configs"]) == 0
    whole = capsys.readouterr().out
    lines = whole.splitlines()
    assert [line.split()[0] for line in lines] == list(config_files.shipped_configs())
    assert any(line.startswith("demo.yaml ") for line in lines)
    assert any(line.startswith("ablations/no_memory.yaml ") for line in lines)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["configs"]) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) <= 80 < max(map(len, lines))
    assert narrow.split() == whole.split()


def test_unknown_name_without_a_near_one():
    assert nearest("zzzz", ["model.sparsity.target"]) == ""
    assert nearest("model.lora.class_path", ["model.lora.class_path"]) == ""
    with pytest.raises(KoffError, match=r"ships with the package\. `koff configs`"):
        config_files.find_config("zzzz")


def test_union_errors_name_the_types_once():
    message = """Parser key "trainer.precision":
  Does not validate against any of the Union subtypes
  Errors:
    - Expected a <class 'int'>
    - Expected a typing.Literal['bf16-mixed', '32-true']
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: bf16-mix"""
    said = one_line(message, [])
    assert said == (
        "trainer.precision must be int or 'bf16-mixed', '32-true' or null; got 'bf16-mix'. Did you mean 'bf16-mixed'?"
    )


def test_unforeseen_parser_errors_are_flattened():
    assert one_line("something\n  new", []) == "something new"


def test_python_m_is_the_same_command():
    done = subprocess.run(
        [sys.executable, "-m", "koff_lightning", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("koff-lightning ")


@pytest.mark.parametrize(
    ("raised", "status", "line"),
    [(KoffError("said"), 2, "said"), (KeyboardInterrupt(), 130, "interrupted"), (SystemExit(0), 0, None)],
)
def test_exit_status(monkeypatch, capsys, raised, status, line):
    def fail(argv: list[str]) -> None:
        raise raised

    monkeypatch.setattr(training_cli, "run", fail)
    assert main(["fit", "demo.yaml"]) == status
    assert capsys.readouterr().err == (f"koff: {line}\n" if line else "")


def test_whoever_waits_at_a_terminal_is_told_for_what(monkeypatch, capsys):
    monkeypatch.setattr(training_cli, "run", lambda argv: None)
    assert main(["fit", "demo.yaml"]) == 0 and capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["fit", "demo.yaml"]) == 0 and capsys.readouterr().err == "loading torch and Lightning\n"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_what_may_not_be_read_or_written_is_one_line(monkeypatch, capsys, code):
    def fail(argv: list[str]) -> None:
        raise OSError(code, os.strerror(code), "here/a.bin")

    monkeypatch.setattr(training_cli, "run", fail)
    line = f"koff: cannot read or write here/a.bin: {os.strerror(code)}; correct its rights, or run as who may"
    assert refused(capsys, "fit", "demo.yaml") == line
    monkeypatch.setattr(Path, "read_text", lambda path, **_: fail([]))
    assert refused(capsys, "fit", "demo.yaml") == line  # already where configs are looked through


def test_a_name_that_is_too_long_is_one_line(capsys):
    """As of a text that was given where its file was meant."""
    name = "word " * 60
    line = f"koff: cannot read or write {name}: {os.strerror(errno.ENAMETOOLONG)}; give a shorter name"
    assert refused(capsys, "inspect", name) == refused(capsys, "fit", "demo.yaml", "--model.backbone", name) == line


def test_a_home_folder_that_is_not_there_is_one_line(capsys):
    line = "koff: a path begins with ~, but there is no such home folder: write it in full"
    assert refused(capsys, "inspect", "~nobody of that name/artifact") == line


def test_other_errors_of_the_system_keep_their_traceback(monkeypatch):
    def fail(argv: list[str]) -> None:
        raise OSError(errno.EBADF, "bad")

    monkeypatch.setattr(training_cli, "run", fail)
    with pytest.raises(OSError, match="bad"):
        main(["fit", "demo.yaml"])


# ---------------------------------------------------------------------------------------------------- real, tiny runs


@pytest.fixture
def run_tiny(tmp_path, monkeypatch):
    """Run a verb for real, a few steps on little text."""
    monkeypatch.chdir(tmp_path)
    small = {"seq_len": 64, "batch_size": 4, "max_train_bytes": 20_000, "max_heldout_bytes": 1_500}
    options = {
        "data": {"domains": {"de": "bundled:de", "python": "bundled:python"}} | small,
        "trainer": {"accelerator": "cpu", "max_steps": 4, "log_every_n_steps": 1, "num_sanity_val_steps": 0},
        "checkpoint": {"every_n_train_steps": 2},
        "export": {"enabled": False},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(options))
    handler = signal.getsignal(signal.SIGINT)
    yield lambda verb, *argv: main([verb, "--config", "mine.yaml", *argv])
    signal.signal(signal.SIGINT, handler)  # Lightning turns it off when interrupted


def stop_at_step_3(monkeypatch, with_what: BaseException) -> None:
    step = KOFFModule.training_step

    def stop(module: KOFFModule, batch: dict, batch_idx: int) -> torch.Tensor:
        if module.global_step == 3:
            raise with_what
        return step(module, batch, batch_idx)

    monkeypatch.setattr(KOFFModule, "training_step", stop)


def test_a_run_is_interrupted_resumed_and_scored(run_tiny, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at_step_3(patch, KeyboardInterrupt())
        assert run_tiny("fit") == 130
    said = capsys.readouterr()
    checkpoint = "runs/mine/version_0/checkpoints/last.ckpt"
    assert f"--ckpt_path {checkpoint}" in said.out
    assert said.err.splitlines()[-1] == "koff: ended by SIGINT; go on with --ckpt_path last"
    assert torch.load(checkpoint, weights_only=True)["global_step"] == 2

    assert run_tiny("fit", "--ckpt_path", checkpoint) == 0
    root = Path("runs/mine")
    assert json.loads((root / "results.json").read_text())["steps"] == 4
    assert {f.name for f in (root / "version_1").iterdir()} >= {"config.yaml", "metrics.csv", "checkpoints"}
    assert list((root / "version_1").glob("events.out.tfevents.*"))
    assert yaml.safe_load((root / "version_1/config.yaml").read_text())["model"]["sparsity"]["target"] == 0.12

    assert run_tiny("validate", "--ckpt_path", str(root / "version_1/checkpoints/last.ckpt")) == 0


def test_a_full_disk_stops_the_run_in_one_line(run_tiny, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # a checkpoint has more
    try:
        assert run_tiny("fit") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints = Path("runs/mine/version_0/checkpoints")
    line = f"koff: cannot write {checkpoints}/epoch=0-step=2.ckpt: File too large. No checkpoint had been saved "
    said = capsys.readouterr()
    assert said.err.splitlines()[-1] == f"{line}before: make room, then start again"
    assert "checkpoint had been saved" not in said.out, "once is enough"
    assert not list(checkpoints.iterdir())


def test_loggers_checkpoints_and_progress_can_be_switched_off(run_tiny):
    off = [f"--trainer.{name}=false" for name in ("logger", "enable_checkpointing", "enable_progress_bar")]
    assert run_tiny("fit", *off) == 0
    assert not list(Path("runs/mine").glob("version_*"))


@pytest.mark.parametrize("before", [False, True], ids=["a new folder", "a folder with a run"])
@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("--model.lora.layers=[77]", "lora.layers names layer 77"),  # which the model tells
        ("--data.domains.en=one.txt", "domain 'en' is one document"),  # the data
        ("--trainer.devices=2", "devices"),  # the trainer
    ],
)
def test_a_run_that_is_refused_leaves_nothing_and_takes_nothing_away(run_tiny, capsys, before, option, line):
    Path("one.txt").write_text("Hello.")
    if before:
        Path("runs/mine/version_3").mkdir(parents=True)
    there = sorted(Path().rglob("*"))
    assert run_tiny("fit", option) == 2
    assert line in capsys.readouterr().err.splitlines()[-1]
    assert sorted(Path().rglob("*")) == there


def test_trainer_options_that_do_not_go_together_are_one_line(run_tiny, capsys):
    assert run_tiny("fit", "--trainer.accelerator", "gpu") == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("koff: ")


def test_options_that_do_not_go_with_the_data_are_one_line(run_tiny, capsys):
    assert run_tiny("fit", "--trainer.val_check_interval", "5") == 2
    line = "koff: `val_check_interval` (5) must be less than or equal to the number of the training batches (4). "
    assert capsys.readouterr().err.splitlines()[-1].startswith(line)


def test_an_error_of_our_own_code_keeps_its_traceback(run_tiny, monkeypatch):
    stop_at_step_3(monkeypatch, ValueError("a mistake of ours"))
    with pytest.raises(ValueError, match="a mistake of ours"):
        run_tiny("fit")


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_scoring_nothing_is_refused(run_tiny, capsys, verb):
    assert run_tiny(verb) == 2
    assert "give its --ckpt_path" in capsys.readouterr().err
