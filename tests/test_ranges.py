"""Values out of range are told before torch is imported, in the words of the classes that a run is made of."""

import json
import subprocess
import sys

import pytest

from koff_lightning.commands import training_cli
from koff_lightning.commands.parsing import first_look, option_table
from koff_lightning.commands.parsing.config_files import shipped_configs
from koff_lightning.commands.parsing.option_types import InDoubtError, typed
from koff_lightning.commands.parsing.ranges import RULES
from koff_lightning.support.errors import KoffError

CONFIGS = {
    "wrong.yaml": "model: {lora: {rank: 0}, sparsity: {target: 3}}\ndata: {seq_len: 4}\nanneal: {ramp: 2}\n",
    "alpha.yaml": "model: {lora: {alpha: 3}}\n",
    "no_lora.yaml": "model: {lora: null}\n",
    "powers.yaml": 'model: {optim: {lora_lr: 1e-3, kv_lr: "1E-2"}, lora: {alpha: 2.5e1}, kv: {frozen_first: off}}\n',
    "dotted.yaml": "model.lora.rank: 4\nmodel.sparsity.target: 0.1\ndata: {seq_len: 64}\nanneal.ramp: 0.1\n",
    "replaced.yaml": "model.lora.rank: 0\nmodel: {lora: {alpha: 3}}\n",
    "class.yaml": "model: {lora: {class_path: koff_lightning.memory.LoraSpec, init_args: {rank: 4}}}\n",
    "aliases.yaml": "model: {lora: {rank: &rank 4}, kv: {slots: *rank}}\n",
    "zero.yaml": "rank: 0\n",
    "four.yaml": "rank: 4\n",
    "kinds.yaml": "model: {sparsity: {units: [kv_group]}}\n",
}
WRONG = {
    "fit --model.lora.rank=0": "lora.rank must be between 1 and 1024; got 0 (set model.lora to null",
    "fit --model.lora.rank 2_000": "lora.rank must be between 1 and 1024; got 2000",
    "fit --model.lora.targets=[q_proj,nope]": "lora.targets must be some of q_proj, ",
    "fit --model.lora.layers=top:0": "lora.layers must be all, top:18",
    "fit --model.lora.layers=5": "lora.layers must be all, top:18",
    "fit --model.kv.layers=true": "kv.layers must be all, top:18",
    "fit --model.lora.layers=[3,3]": "lora.layers must be all, top:18",
    "fit --model.lora=null --model.lora.alpha=-1e-3": "lora.alpha must be positive and finite; got -0.001",
    "fit --config no_lora.yaml --config alpha.yaml --model.lora.rank=0": "lora.rank must be between 1 and 1024; got 0",
    "fit --model.lora {rank:\u00a00,\u00a0alpha:\u00a04}": "lora.rank must be between 1 and 1024; got 0",
    "fit --model.lora.rank=0 --model.lora {alpha:\u00a04}": "lora.rank must be between 1 and 1024; got 0",
    "fit --model {lora:\u00a0{rank:\u00a00}}": "lora.rank must be between 1 and 1024; got 0",
    "fit --model.lora.rank=4 --config wrong.yaml": "lora.rank must be between 1 and 1024; got 0",
    "fit --config wrong.yaml --model.lora.rank=4": "sparsity.target must lie in [0, 1): the share to remove, 0.12 for",
    "fit --model.kv.slots=1": "kv.slots must be between 2 and 8192 (slot 0 is frozen); got 1",
    "fit --model.retention.every=0": "retention.every must be at least 1 step; got 0",
    "fit --model.sparsity.target=12": "sparsity.target must lie in [0, 1): the share to remove, 0.12 for 12 %; got",
    "fit --model.sparsity.target=0 --model.sparsity.penalty=hinge": "sparsity.penalty hinge with sparsity.target 0",
    "fit --model.sparsity.units=channel": "model.sparsity.units must be list; got 'channel'. A list stands in "
    "brackets: '[channel]'",
    "fit --model.lora.targets q_proj,v_proj": "model.lora.targets must be list; got 'q_proj,v_proj'. A list "
    "stands in brackets: '[q_proj,v_proj]'",
    "fit --model.lora.rank=4.0": "model.lora.rank must be int; got '4.0'.",
    "fit --model.optim.lora_lr=inf": "model.optim.lora_lr must be float; got 'inf'.",
    "fit --model.sparsity.units=[channel,up_channel]": "sparsity.units: channel owns the weights of up_channel",
    "fit --model.sparsity.beta_end=0": "sparsity.beta_end must be > 0 and finite; got 0.0",
    "fit --model.loss.top_k=1": "loss.top_k must be at least 2 (100 in the paper), or null for all; got 1",
    "validate --ckpt_path=last --model.optim.clip=0": "optim: rates and clip must be positive and finite; got clip=0.0",
    "fit --data.seq_len=4": "data.seq_len must be 8 or more, got 4",
    "fit --data.streaming=true --data.max_train_bytes=9": "data.max_train_bytes=9 limits text in memory",
    "fit --anneal.ramp=2": "anneal: warmup + ramp + hold must lie in (0, 1]; got 0.05 + 2.0 + 0.05",
    "fit --placement.keep=1": "placement.keep must lie between 0 and 1 (null: all stay); got 1.0",
    "fit --lm_eval.batch_size=0": "lm_eval.batch_size must be a positive number or auto; got 0",
    "baseline --method=random --sparsity=3": "sparsity.target must lie in [0, 1)",
    "prepare --data.batch_size=0": "data.batch_size must be 1 or more, got 0",
}
RIGHT = [
    "fit --model.lora=null",
    "fit --model.lora.rank=0 --model.lora=null",
    "fit --model.lora.rank=0 --model.lora=~ --model.lora.alpha=7",
    "fit --config wrong.yaml --config no_lora.yaml --model.sparsity.target=0.1 --data.seq_len=64 --anneal.ramp=0.1",
    "fit --config wrong.yaml --config dotted.yaml",
    "fit --config replaced.yaml",
    "fit --config wrong.yaml --model {lora:\u00a0null} --model.lora {rank:\u00a04} --config dotted.yaml",
    "fit --model.sparsity.penalty=hinge --model.sparsity.target=0 --model.sparsity.target=0.1",
    "fit --model.sparsity.target=0 --model.sparsity.penalty=lagrangian",
    "fit --config kinds.yaml --model.sparsity.units+=channel",
    "fit --model.sparsity.units=[gate_channel] --model.sparsity.units+=kv_group",
    "fit --config powers.yaml --model.sparsity.target=1e-1 --model.loss.chunk=1_024 --data.batch_size=0b11",
    "fit --model.kv.slots=1 --model.kv.frozen_first=false --model.retention.every=5 --model.retention=null",
    "fit --model.lora.rank=0 --model.lora four.yaml",
    "fit --model.lora.rank=0 --config class.yaml",
    "fit --model.lora.rank=0 --model.lora.init_args.rank=4",
    "fit --model.lora.rank=0 --config aliases.yaml",
    "fit --model.lora.layers=[0x1,2] --model.kv.layers=top:64% --lm_eval.batch_size=auto:3",
    "fit --anneal.warmup=0 --anneal.ramp=0 --anneal.hold=null --placement.keep=null",
    "fit --model.sparsity.target=3 --print_config",
    "fit --model.sparsity.target=3 --model.lora.help",
    "baseline --method=random --model.lora.rank=0 --model.kv.slots=0",
    "baseline --method=random --model.sparsity.target=3 --sparsity=0.1",
    "prepare --model.sparsity.target=3 --anneal.ramp=3",
    "prepare --data.seq_len=4 --prefetch-only",
]


def words_of(case: str) -> list[str]:
    verb, *words = case.split(" ")
    return [verb, "--config", "demo.yaml", *(word.replace("\u00a0", " ") for word in words)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("configs")
    for name, text in CONFIGS.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def parser(folder, monkeypatch):
    """What the parser and the classes themselves say of words, None where they say nothing."""
    monkeypatch.chdir(folder)
    prepares = training_cli.VerbTrainer.prepare

    def stop(cli, verb):
        if verb == "prepare" and not cli.config.prepare.prefetch_only:
            prepares(cli.config.prepare, out="cache")

    monkeypatch.setattr(training_cli.KoffCLI, "_run_subcommand", stop)
    monkeypatch.setattr(training_cli.DomainDataModule, "prepare", lambda data, tokenizer: {})

    def ask(words):
        try:
            training_cli.run(words)
        except KoffError as error:
            return str(error)
        except SystemExit as stopped:
            assert not stopped.code
        return None

    return ask


@pytest.fixture(scope="module")
def told(folder):
    """What the first look says of the wrong ones, in a process that is then free of what is heavy."""
    program = f"""if True:
        import json, sys
        from koff_lightning.commands.parsing.first_look import look
        said = []
        for verb, *words in {[words_of(case) for case in WRONG]}:
            try:
                look(verb, words)
                said.append(None)
            except ValueError as error:
                said.append(str(error))
        assert not {{'torch', 'lightning', 'transformers', 'jsonargparse'}} & set(sys.modules)
        print(json.dumps(said))"""
    program = f"import sys; sys.argv = ['koff']\n{program}"  # the command, which does without the model types
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip(WRONG, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("case", WRONG)
def test_values_out_of_range_are_told_without_imports_as_the_classes_tell_them(case, told, parser):
    assert str(told[case]).startswith(WRONG[case])
    assert told[case] == parser(words_of(case))


@pytest.mark.parametrize("case", RIGHT)
def test_what_the_parser_takes_passes(case, parser):
    words = words_of(case)
    first_look.look(words[0], words[1:])
    assert parser(words) is None


@pytest.mark.parametrize("name", shipped_configs())
def test_every_config_that_ships_is_looked_at_and_passes(name, monkeypatch):
    monkeypatch.setattr(first_look, "refuse_missing_of_run", lambda verb, options: None)  # of text that is not here
    for words in (["--config", "demo.yaml", "--config", name], ["--config", name, "--data.domains.de", "bundled:de"]):
        first_look.look("fit", words)
        with pytest.raises(KoffError, match=r"^kv.slots must be between . and 8192"):
            first_look.look("fit", [*words, "--model.kv.slots=0"])


def test_each_section_has_its_rule_and_all_that_the_rule_asks():
    """Where the table lacked an option or a default, the section would be in doubt for good."""
    rows = {row["name"]: row for row in option_table.options_of("fit")}
    asked = {case.split("--")[-1].partition("=")[0].rpartition(".")[0] for case in WRONG}
    assert set(RULES) <= asked
    specs = {name for name, row in rows.items() if name.startswith("model.") and name.count(".") == 2}
    assert {name.rpartition(".")[0] for name in specs} == {section for section in RULES if section.count(".")}


@pytest.mark.parametrize(
    ("value", "kind", "taken"),
    [
        ("010", "int", 10),
        ("08", "int", 8),
        ("0x10", "int", 16),
        ("-.5", "float", -0.5),
        ("1_0.5", "float", 10.5),
        (" 4", "int", 4),
        ("1_0", "int or null", 10),
        ("4", "float", 4.0),
        ("1e-3", "float", 0.001),
        (3, "float", 3.0),
        ("null", "float or null", None),
        ("off", "bool", False),
        ("none", "'fisher', 'none'", "none"),
        ("[]", "list of str", []),
        ("[a, b]", "list of str", ["a", "b"]),
        ("[0, 2]", "list of int or str", [0, 2]),
        ("top:64%", "list of int or str", "top:64%"),
        ("5", "list of int or str", "5"),
        ('"all"', "list of int or str", '"all"'),
        ("8", "int or str", 8),
        ("8.5", "int or str", "8.5"),
    ],
)
def test_values_are_read_as_the_parser_reads_them(value, kind, taken):
    assert repr(typed(value, kind)) == repr(taken)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        *(
            (value, "int")
            for value in ("", "4.0", "true", "x", "null", '"4"', "2001-99-99", "[" * 5000, "1:30.5", None)
        ),
        *((value, "float or null") for value in ("", "inf", "true", "9" * 400, "{a: 1}", "# null")),
        *((value, "list of int or str") for value in ("null", "", "[1.0]", "[true]", "[a]", "{a: 1}", 5, True)),
        ("'hinge'", "'hinge', 'fixed'"),
        ("a", "list of str"),
        ("x", "LoraSpec or null"),
    ],
)
def test_what_is_not_plain_is_left_to_the_parser(value, kind):
    with pytest.raises(InDoubtError):
        typed(value, kind)
