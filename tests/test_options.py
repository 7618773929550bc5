"""The table of options that help and the first look at a command are made of, against the parsers themselves."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from koff_lightning.cli import TOOLS, TRAINING, main
from koff_lightning.commands.parsing import first_look, option_table
from koff_lightning.commands.parsing.config_files import SHIPPED, shipped_configs
from koff_lightning.support.errors import KoffError

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))
import options as option_reference

PAGE = Path(__file__).parents[1] / "docs" / "options.md"


@pytest.fixture(scope="module")
def collected():
    return option_reference.collect()


def test_the_table_and_its_page_are_up_to_date(collected):
    """`make options` writes both anew."""
    assert option_reference.ours(collected) == option_reference.ours(option_table.table())
    if collected["versions"] == option_table.table()["versions"]:
        assert collected == option_table.table()
    assert PAGE.read_text(encoding="utf-8") == option_reference.page(option_table.table())


def test_every_verb_but_that_of_lm_eval_is_in_the_table():
    assert {verb for verb in [*TRAINING, *TOOLS] if not option_table.knows(verb)} == {"lm-eval"}


def test_every_option_of_ours_says_what_it_means():
    rows = [row for verb in [*TRAINING, *TOOLS] if option_table.knows(verb) for row in option_table.options_of(verb)]
    assert not {row["name"] for row in rows if not row["meaning"]}
    assert "`--model.sparsity.target` | float | 0.12 | " in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data.domains.de.colour=red"], "domain 'de' has no field 'colour'. It may have files, text_field,"),
        (["--data.domains.de.file", "x"], "domain 'de' has no field 'file'. Did you mean 'files'? It may have"),
        (['--data.domains={"de": {"files": "bundled:de", "colour": 3}}'], "domain 'de' has no field 'colour'."),
        (["--config", "c.yaml"], "domain 'fr' has no field 'filez'. Did you mean 'files'?"),
    ],
)
def test_a_field_that_no_domain_has_is_no_path(words, message, tmp_path, monkeypatch, capsys):
    """The parser, which takes a path as well, called the whole mapping one."""
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("data: {domains: {fr: {filez: 'bundled:fr'}}}")
    assert main(["fit", "--config", "demo.yaml", *words]) == 2
    assert message in capsys.readouterr().err


def test_a_domain_may_be_given_as_a_class():
    value = {"class_path": "koff_lightning.data.DomainSource", "init_args": {"files": "bundled:de"}}
    first_look.look("fit", ["--config", "demo.yaml", f"--data.domains.de={json.dumps(value)}"])
    first_look.look("fit", ["--config", "demo.yaml", "--data.domains.de.init_args.files=bundled:de"])


@pytest.mark.parametrize("verb", TRAINING)
def test_the_help_of_training_tells_our_own_options_first(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: koff {verb} ")
    places = [said.index(f"\n{section}:\n") for section in option_reference.SECTIONS]
    assert places == sorted(places)
    assert not [line for line in said.splitlines() if len(line) > 80 and " " in line.strip()]


@pytest.mark.parametrize(
    "argv",
    [
        ["fit", "--help"],
        ["claims", "--help"],
        ["bench", "serve", "--help"],
        ["fit", "nope.yaml"],
        ["fit", "demo.yaml", "--model.sparcity.target", "1"],
        ["fit", "demo.yaml", "--ckpt_path", "nope.ckpt"],
        ["fit", "--config", "typo.yaml"],
        ["inspect", "nope"],
        ["generate", "--model", "nope", "--prompt", "x"],
        ["export", "--ckpt", "nope.ckpt", "--out", "x"],
        ["memory", "list", "nope"],
        ["memory", "add", ".", "nope"],
        ["memory", "cartridge", ".", "de", "--from", "nope"],
        ["convert", "gguf", "nope", "--out", "x"],
        ["fit", "demo.yaml", "--model.artifact", "nope"],
        ["fit", "demo.yaml", "--data.domains.de.files", "nope.txt"],
        ["fit", "demo.yaml", "--data.domains.de.colour", "red"],
        ["fit", "demo.yaml", "--data.seq_len", "null"],
        ["fit", "demo.yaml", "--model.backbone", "no-such/model"],
        ["fit", "demo.yaml", "--model.lora.rank", "0"],
        ["fit", "demo.yaml", "--data.seq_len=4"],
        ["fit", "demo.yaml", "--anneal", "{ramp: 2}"],
        ["serve", "no-such/model"],
        ["analyze", "--model", "."],
        ["analyze", "--model", "no-such/run"],
        ["reproduce", "--tables", "99"],
        ["claims", "--arms", "kof"],
        ["serve", "--model", "."],
    ],
    ids=" ".join,
)
def test_help_and_what_is_certainly_wrong_take_no_imports(argv, tmp_path):
    (tmp_path / "typo.yaml").write_text("data: {domains: {de: bundled:de}}\nmodel: {sparsity: {traget: 0.1}}\n")
    program = f"""if True:
        import sys
        sys.argv = ['koff', *{argv}]
        from koff_lightning.cli import main
        status = main()
        sys.exit(99 if {{'torch', 'lightning', 'transformers', 'jsonargparse'}} & set(sys.modules) else status)"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    away = os.environ | {"HF_HUB_OFFLINE": "1"}  # whether the hub has a model of that name is not to be asked here
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=away, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == (0 if "--help" in argv else 2), done.stderr
    assert len(done.stderr.splitlines()) == (0 if "--help" in argv else 1)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5  # s of the processor


@pytest.mark.parametrize(
    "argv",
    [
        ["--model.lora", "null"],
        ["--model.lora.rank=4", "--model.kv.slots", "8"],
        ["--model.sparsity.target", "1e-1", "--trainer.max_steps", "-1"],
        ["--model.sparsity.units+", "channel"],
        ["--trainer.callbacks+=koff_lightning.callbacks.Preview"],
        ["--trainer.logger", "lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir", "x"],
        ["--trainer.callbacks.init_args.anything", "x"],
        ["--data.domains.law", "bundled:en", "--data.domains.law.weight", "2", "--data.domains.law.text_field", "x"],
        ["--print_config=skip_null", "--allow-custom-classes", "--dry-run", "--dry_run"],
        ["--seed_everything", "true", "--ckpt_path", "last", "--ckpt_path", "s3://bucket/last.ckpt"],
        ["--model.lora.help", "--trainer.logger.help", "CSVLogger"],
        ["--model", __file__, "--anneal.hold", "null"],
        ["--model.lora", '{"rank": 4}', "--checkpoint", "null"],
        ["--model.activation_checkpointing", "True", "--model.activation_checkpointing=auto"],
        ["-c", "demo.yaml"],
    ],
    ids=" ".join,
)
def test_what_may_be_right_is_left_to_the_parser(argv):
    first_look.look("fit", ["--config", "demo.yaml", *argv])


@pytest.mark.parametrize(
    ("verb", "argv", "line"),
    [
        ("fit", ["demo.yaml", "--model.lora.rank", "4x"], "model.lora.rank must be int; got '4x'"),
        ("fit", ["demo.yaml", "--model.spars.target", "1"], "no option 'model.spars.target'. Did you mean"),
        (
            "fit",
            ["demo.yaml", "--trainer.max_stepz=1"],
            "no option 'trainer.max_stepz'. Did you mean 'trainer.max_steps'",
        ),
        ("fit", ["demo.yaml", "--model.lora.rnk=1"], "no option 'model.lora.rnk'. Did you mean 'model.lora.rank'"),
        ("fit", ["demo.yaml", "--model.mask", "nope.ckpt"], "model.mask nope.ckpt: no such file"),
        ("fit", ["demo.yaml", "--seed", "1"], "no option 'seed'"),
        ("fit", ["demo.yaml", "--checkpoint", "x.ckpt"], "checkpoint has options of its own"),
        ("fit", ["demo.yaml", "--model", "gpt2"], "model has options of its own"),
        ("fit", ["demo.yaml", "--model.lora", "8"], "model.lora has options of its own"),
        ("fit", ["demo.yaml", "--data.domains", "de"], "data.domains has options of its own"),
        ("fit", ["demo.yaml", "--data.append_eos", "maybe"], "data.append_eos must be bool; got 'maybe'"),
        (
            "claims",
            ["--config", "demo.yaml", "--", "--data.seqlen", "8"],
            "claims: no option 'data.seqlen'",
        ),
        (
            "plan",
            ["--config", "demo.yaml", "--data.seq_len", "300"],
            "plan: data.seq_len is an option of the runs: it goes after a lone --, koff plan ... -- --data.seq_len",
        ),
        ("reproduce", ["--trainer.max_steps=3"], "reproduce: trainer.max_steps is an option of the runs"),
        ("inspect", ["folder", "--data.seq_len", "3"], "inspect: no option 'data.seq_len'. --help lists them"),
        (
            "fit",
            ["demo.yaml", "--ckpt_path", "auto"],
            "ckpt_path auto: no such file. `koff fit` leaves one in runs/.../checkpoints/last.ckpt, and `last` stands",
        ),
        (
            "fit",
            ["demo.yaml", "--model.backbone=koff-tiney"],
            "backbone 'koff-tiney': no such folder. Did you mean 'koff-tiny'?",
        ),
        ("plan", ["--config", "demo.yaml", "--", "--model", "x"], "plan: model has options of its own, a file of them"),
        ("generate", ["--model", "x", "-p", "Es war"], "generate: no option '-p': names are written out, after --"),
        ("inspect", ["folder", "--ver"], "inspect: no option 'ver'. Did you mean 'verify'"),
        ("serve", ["--model", "x"], "serve: no option 'model'. Here the artifact goes without --, by"),
        ("memory list", ["--model", "x"], "memory list: no option 'model'. Here the folder goes without"),
        ("memory remove", [".", "--domain", "de"], "memory remove: no option 'domain'. Here the domain goes without"),
        ("generate", ["--artifact", "x"], "generate: no option 'artifact'. Did you mean 'model'"),
        ("export", ["--model", "x"], "export: no option 'model'. Did you mean 'ckpt'"),
        ("reproduce", ["--tables", "2,99"], "no table '99'. There are 1, "),
        ("reproduce", ["--tables", "7"], "no table '7'. There are 1, 1 languages, 2, "),
        ("reproduce", ["--tables", "fig2"], "no table 'fig2'. Did you mean 'fig 2'? There are 1, "),
        (
            "reproduce",
            ["--tables", "2", "--arms", "quarter"],
            "no row of arm 'quarter' in the tables. There are ",
        ),
        ("claims", ["--arms", "kof"], "no arm 'kof'. Did you mean 'koff'"),
        ("generate", ["--mod", "x"], "generate: no option 'mod'. Did you mean 'model'"),
        ("memory add", [".", "nope"], "memory 'nope': no such folder. DIR/memories/NAME of an exported model is one"),
        (
            "memory cartridge",
            [".", "de", "--from", "nope"],
            "adapter 'nope': no such folder. `koff memory cartridge DIR NAME --out FOLDER` writes one, as peft does",
        ),
        ("fit", ["demo.yaml", "--model.artifact", "nope"], "artifact 'nope': no such folder. `koff export"),
        ("fit", ["demo.yaml", "--data.domains.de.files", "nope.txt"], "domain 'de': no file matches 'nope.txt'"),
    ],
)
def test_what_is_wrong_is_one_line(verb, argv, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert main([*verb.split(), *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"koff: {line}")
    assert len(said.splitlines()) == 1


def test_a_missing_backbone_and_all_missing_text_are_told_at_once():
    words = ["--model.backbone", "./nope", "--data.domains.a", "nope.txt", "--data.domains.b", "bundled:xx"]
    with pytest.raises(KoffError) as caught:
        first_look.look("fit", words)
    lines = str(caught.value).splitlines()
    begins = ["backbone './nope': no such folder", "2 domains lack text:", "  domain 'a': no file matches 'nope.txt'"]
    begins.append("  domain 'b': unknown bundled domain 'xx'")
    assert all(line.startswith(begin) for line, begin in zip(lines, begins, strict=True)), lines


def test_missing_general_text_is_told_with_that_of_the_domains():
    words = ["--data.domains.a", "nope.txt", "--data.retention.web", "gone.txt"]
    with pytest.raises(KoffError) as caught:
        first_look.look("fit", words)
    assert "domain 'a': no file matches 'nope.txt'" in str(caught.value)
    assert "domain 'web': no file matches 'gone.txt'" in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        "generate --model DIR --prompt x --domain de --domain it",
        "chat --model DIR --domain it",
        "lm-eval --model DIR --tasks koff_bpb --domain auto,it",
        "push DIR org/m --domain it",
        "memory remove DIR it",
        "memory compose DIR de it --as both",
    ],
)
def test_a_domain_that_an_artifact_lacks_is_told_by_koff_json_alone(words, tmp_path, capsys):
    """Which is all that lies here: nothing is loaded, so nothing heavy has to be imported."""
    (tmp_path / "koff.json").write_text('{"domains": {"de": {}, "fr": {}}}')
    assert main([str(tmp_path) if word == "DIR" else word for word in words.split()]) == 2
    assert capsys.readouterr().err == f"koff: {tmp_path} has no memory for 'it'; it has de, fr\n"


@pytest.mark.parametrize("off", [True, False])
def test_a_model_of_the_hub_is_missing_where_the_hub_is_switched_off(off, tmp_path, monkeypatch):
    """And no copy is kept: as a backbone in the hub's cache, or as an artifact in ours."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", off)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("KOFF_CACHE", str(tmp_path / "koff"))
    words = {"fit": ["--config", "demo.yaml", "--model.backbone"], "generate": ["--prompt", "x", "--model"]}
    if off:
        for verb, before in words.items():
            with pytest.raises(KoffError, match=r"'org/m': no such folder.*, and no copy of it from the hub, which is"):
                first_look.look(verb, [*before, "org/m"])
        (tmp_path / "koff/hub" / f"org--m@{'0' * 40}").mkdir(parents=True)
    for verb, before in words.items():
        first_look.look(verb, [*before, "org/m"])


def test_a_prompt_is_text_even_where_it_looks_like_an_option(tmp_path):
    first_look.look("generate", ["--model", str(tmp_path), "--prompt", "--no-such-thing"])
    with pytest.raises(KoffError, match="no option 'no_such_thing'"):
        first_look.look("generate", ["--model", str(tmp_path), "--no-such-thing"])


def test_what_follows_a_lone_dash_pair_is_for_fit():
    first_look.look("plan", ["--config", "demo.yaml", "--", "--data.seq_len", "64"])
    with pytest.raises(KoffError, match="plan: no option 'no-such-thing'"):
        first_look.look("plan", ["--config", "demo.yaml", "--", "--data.seq_len", "64", "--no-such-thing"])
    assert not option_table.wants_help(["--config", "demo.yaml", "--", "--help"])


@pytest.mark.parametrize("name", shipped_configs())
def test_every_config_that_ships_passes_the_first_look(name, monkeypatch):
    monkeypatch.setattr(first_look, "refuse_missing_of_run", lambda *_: None)  # users bring their text and models
    first_look.look("fit", ["--config", "demo.yaml", "--config", name])


def test_a_config_of_another_release_of_lightning_is_left_to_the_parser(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")
    first_look.look("fit", ["--config", "demo.yaml", "--trainer.new_in_2_9", "1"])
    assert "those of Lightning" in option_table.help_text("fit")


def test_a_config_that_no_parser_should_read_is_left_to_the_one_that_refuses_it(tmp_path):
    for text in ("a: &a [1]\nb: [*a, *a]\n", "{" * 5000, "\x00", ""):
        (tmp_path / "bad.yaml").write_text(text)
        first_look.look("fit", ["--config", "demo.yaml", "--config", str(tmp_path / "bad.yaml")])


# ------------------------------------------------------------------------------------------------- configs by name


def test_a_config_is_shown_and_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    demo = (SHIPPED / "demo.yaml").read_text(encoding="utf-8")
    assert main(["configs", "demo.yaml"]) == 0
    assert capsys.readouterr().out == demo
    assert main(["configs", "demo.yaml", "--copy"]) == 0
    assert capsys.readouterr().out == "wrote demo.yaml: koff fit demo.yaml\n"
    assert main(["configs", "demo.yaml", "--copy", "mine.yaml"]) == 0
    assert (tmp_path / "demo.yaml").read_text(encoding="utf-8") == demo == (tmp_path / "mine.yaml").read_text("utf-8")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["demo.yml"],
            "no config 'demo.yml' ships with the package. Did you mean 'demo.yaml'? `koff configs` lists them",
        ),
        (["nothing.yaml"], "no config 'nothing.yaml' ships with the package. `koff configs` lists them"),
        (["--copy"], "configs: which config? koff configs demo.yaml --copy"),
        (["demo.yaml", "--copy"], "cannot write demo.yaml: File exists"),
        (["demo.yaml", "--copy", "no/such/folder.yaml"], "cannot write no/such/folder.yaml: No such file or directory"),
    ],
)
def test_a_config_that_cannot_be_copied(tmp_path, monkeypatch, capsys, argv, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text("mine")
    assert main(["configs", *argv]) == 2
    assert capsys.readouterr().err == f"koff: {line}\n"
    assert (tmp_path / "demo.yaml").read_text() == "mine"


def test_a_config_needs_no_option(capsys):
    assert main(["fit", "demo.yaml", "ablations/no_memory.yaml", "--model.lora.rank=4", "--print_config"]) == 0
    with_option = capsys.readouterr().out
    argv = ["--config", "demo.yaml", "--config", "ablations/no_memory.yaml", "--model.lora.rank=4"]
    assert main(["fit", *argv, "--print_config"]) == 0
    assert capsys.readouterr().out == with_option


def test_a_verb_of_two_words_lists_its_kin(capsys):
    assert main(["memory"]) == 2
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == [
        *("list", "add", "remove", "compose", "cartridge")
    ]


# ------------------------------------------------------------------------------------------ terminals and homes


@pytest.mark.parametrize("where", ["no home", "a terminal of ASCII"])
@pytest.mark.parametrize("argv", [["--help"], ["configs"], ["fit", "--help"], ["doctor"]], ids=" ".join)
def test_verbs_run_anywhere(where, argv, tmp_path):
    plain = {name: value for name, value in os.environ.items() if name not in ("HOME", "PYTHONUTF8", "LC_ALL", "LANG")}
    elsewhere = {"HOME": str(tmp_path), "PYTHONIOENCODING": "ascii", "LC_ALL": "C"} if where != "no home" else {}
    command = [sys.executable, "-m", "koff_lightning", *argv]
    done = subprocess.run(command, env=plain | elsewhere, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert b"Traceback" not in done.stderr
