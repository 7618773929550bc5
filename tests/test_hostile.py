"""What comes from others is data: nothing in it runs, nothing lands outside its folder, no secret gets out."""

import json
import os
import pickle
from functools import wraps

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CometLogger
from tiny_artifact import tiny_artifact
from tiny_memories import mixed, written

from koff_lightning import KoffError, load_decomposed
from koff_lightning.artifact.memory_files import ADAPTER, ADAPTER_CONFIG, load_memory
from koff_lightning.cli import main
from koff_lightning.data.cache import TokenCache
from koff_lightning.loading import load_backbone, load_tokenizer
from koff_lightning.support.secrets import REMOVED, without_secrets

TOKEN = "hf_ThisIsNoRealTokenButLooksLikeOne"


class Payload:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to work in, in which nothing may be executed."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / "executed").exists()


def pickled(path):
    """Pickles that run something when they are read: as a plain file, and as torch and numpy save."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, np.array([Payload()], dtype=object), allow_pickle=True)
    elif path.suffix in (".bin", ".pt"):
        torch.save({"base_model.model.x.lora_A.weight": Payload()}, path)
    else:
        path.write_bytes(pickle.dumps(Payload()))
    return path


# ------------------------------------------------------------------------------------------------- nothing runs


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_weights_of_a_backbone(here, name):
    dense = tiny_artifact(here).folder.parent / "dense"
    (dense / "model.safetensors").unlink()
    pickled(dense / name)
    with pytest.raises(KoffError, match="cannot load backbone"):
        load_backbone(str(dense))


@pytest.mark.parametrize("name", [ADAPTER, "adapter_model.bin", "kv_memory.safetensors"])
def test_tensors_of_a_memory(here, name):
    written(here / "m", mixed(), "both")
    (here / "m" / ADAPTER).unlink()
    pickled(here / "m" / name)
    with pytest.raises(KoffError):
        load_memory(mixed(), here / "m")


@pytest.mark.parametrize("name", ["backbone/model.safetensors", "backbone/pytorch_model.bin", "memories/de/x.pt"])
def test_files_of_an_artifact(here, name):
    folder = tiny_artifact(here).folder
    pickled(folder / name)
    with pytest.raises(KoffError):
        load_decomposed(folder)
    if name.startswith("backbone/p"):  # beside sound weights nobody reads it
        assert load_decomposed(folder, verify=False)
        return
    assert main(["inspect", str(folder)]) in (0, 2)


def test_code_beside_a_tokenizer_or_a_model(here):
    dense = tiny_artifact(here).folder.parent / "dense"
    (dense / "mine.py").write_text("import os\nos.mkdir('executed')\n")
    for file, parts in {
        "tokenizer_config.json": {"AutoTokenizer": ["mine.Mine", "mine.Mine"]},
        "config.json": {},
    }.items():
        about = json.loads((dense / file).read_text())
        about |= {"auto_map": parts or {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine"}}
        (dense / file).write_text(json.dumps(about))
    for load in (load_tokenizer, load_backbone):
        try:
            load(str(dense))  # as the known class that the file also names, or not at all
        except KoffError as error:
            assert "which is not run unless trust_remote_code is true" in str(error)


def test_modules_that_an_adapter_names_are_not_imported(here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    (here / "mine.py").write_text("import os\nos.mkdir('executed')\n")
    written(here / "m", mixed(), "both")
    config = json.loads((here / "m" / ADAPTER_CONFIG).read_text())
    config |= {"megatron_core": "mine", "auto_mapping": {"base_model_class": "Mine", "parent_library": "mine"}}
    (here / "m" / ADAPTER_CONFIG).write_text(json.dumps(config))
    with pytest.raises(KoffError):
        load_memory(mixed(), here / "m")


@pytest.mark.parametrize("name", ["lengths.npy", "train/tokens.npy", "train/padding.npy"])
def test_tokenised_text(here, name):
    pickled(here / "cache" / "entry" / name)
    for other in ("lengths", "num_bytes", *(f"{side}/{part}" for side in ("train", "heldout") for part in PARTS)):
        path = here / "cache" / "entry" / f"{other}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            np.save(path, np.zeros(1, dtype=np.int64))
    with pytest.raises(KoffError, match="is damaged"):
        TokenCache(here / "cache").load("entry")


PARTS = ("tokens", "starts", "first_segment", "documents", "shares", "padding")


# ------------------------------------------------------------------------------------------ nothing lands outside


@pytest.mark.parametrize("name", ["../../out", "/out", "a/b", "..", "C:\\out", "de\x00"])
def test_names_of_domains(here, capsys, name):
    (here / "c.yaml").write_text(yaml.safe_dump({"data": {"domains": {name: "bundled:de"}}}))
    assert main(["fit", "--config", "c.yaml", "--trainer.accelerator=cpu", "--trainer.max_steps=1"]) == 2
    assert "is not safe as a file name" in capsys.readouterr().err
    assert [path.name for path in here.iterdir()] == ["c.yaml"]


# ------------------------------------------------------------------------------------------------------- secrets


def test_secrets_stay_at_home():
    config = {
        "trainer": {"logger": {"api_key": "abc", "entity": "me"}, "max_tokens": 5, "hf_token": "x", "password": None},
        "data": {
            "tokenizer": "koff-tiny",
            "url": "https://me:hunter2@host/x?sig=abc&page=2",
            "n": [1, "hf_abcdefghijklmnopqrstuv"],
        },
    }
    assert without_secrets(config) == {
        "trainer": {
            "logger": {"api_key": "(removed)", "entity": "me"},
            "max_tokens": 5,
            "hf_token": "(removed)",
            "password": None,
        },
        "data": {"tokenizer": "koff-tiny", "url": "https://(removed)@host/x?(removed)&page=2", "n": [1, "(removed)"]},
    }
    assert without_secrets(None) is None
    assert without_secrets("corpora/hf_datasets_of_mine/de.jsonl") == "corpora/hf_datasets_of_mine/de.jsonl"
    domains = {"token": "corpora/token.jsonl", "auth": {"files": "auth.jsonl", "token": "abc"}, "api_key": None}
    cleaned = {"domains": domains | {"auth": {"files": "auth.jsonl", "token": REMOVED}}}
    assert without_secrets({"domains": domains}) == cleaned, "a domain may have any name"


@pytest.mark.parametrize(
    "text",
    [
        "Namespace(api_key='HIDDEN', mode=None)",
        "{'headers': {'Authorization': 'Bearer HIDDEN'}}",
        "Authorization: Basic HIDDEN=",
        'the file says "accessToken": "HIDDEN"',
        r"{\"pwd\": \"HIDDEN\"}",
        "passphrase: HIDDEN",
        "account_key=HIDDEN==;x",
        "wandb_key: HIDDEN",
        "private_key: -----BEGIN PRIVATE KEY-----\nHIDDEN\n-----END PRIVATE KEY-----",
        "tokens: ['HIDDEN', 'HIDDEN']",
        "--trainer.logger.api_key HIDDEN",
        "glpat-HIDDENHIDDENHIDDEN12",
        "xoxb-1234567890-HIDDEN",
        "https://me:HIDDEN/HIDDEN@HIDDEN@host/x",
    ],
)
def test_secrets_in_free_text(text):
    assert "HIDDEN" not in without_secrets(text)
    assert REMOVED in without_secrets(text)


def test_secrets_by_the_names_of_options():
    names = ["private_key", "accessToken", "pwd", "passphrase", "account_key", "wandb_key", "tokens", "x-api-key"]
    names += ["aws_access_key_id", "api_key_v2", "hf_auth_token"]
    for name in names:
        assert without_secrets({name: "abc"}) == {name: REMOVED}
        assert without_secrets({name: ["abc", "def"]}) == {name: [REMOVED, REMOVED]}
    assert without_secrets({"headers": {"Authorization": "Bearer abc"}}) == {"headers": {"Authorization": REMOVED}}
    assert without_secrets({"password": 1234}) == {"password": REMOVED}


@pytest.mark.parametrize(
    "innocent",
    [
        {"tokenizer": "koff-tiny", "num_tokens": 5, "max_tokens": "5", "tokens": 534498, "token_cache": "cache/a1"},
        {"eos_token": "</s>", "seq_len": 64, "token": None, "tokens": [1, 2]},
        "tokenizer: koff-tiny, num_tokens=5, tokens: 534498, token_cache: cache/a1, api_key=None",
        "the tokens: all of them; unexpected token: identifier; a token: give HF_TOKEN",
        "domain 'token': corpora/token1.jsonl: no such file",
        "http://localhost:8000/model@main",
        {"backbone": "org/sk-llama-3b-instruct-v2", "files": "data/cs-sk-parallel-corpus-v1.jsonl"},
        {"sep_token": "</s>", "cls_token": "<s>"},
        {
            "data": {
                "retention": {"secrets": "novels/*.jsonl"},
                "domains": {"x": {"where": {"token": "yes", "auth": "a"}}},
            }
        },
        "-" * 20_000,
    ],
    ids=range(10),
)
def test_what_only_sounds_like_a_secret_stays(innocent):
    assert without_secrets(innocent) == innocent


def test_secrets_are_in_nothing_that_a_run_leaves(here, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    options = {
        "data": {"domains": {"de": "bundled:de"}, "max_train_bytes": 20_000, "max_heldout_bytes": 1_500, "seq_len": 64},
        "model": {"lora": {"rank": 2}, "kv": {"slots": 4}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "log_every_n_steps": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
        },
        "export": {"prove": False},
    }
    (here / "c.yaml").write_text(yaml.safe_dump(options))
    secret = "https://me:hunter2@host/run?token=abcdef"
    words = ["fit", "--config", "c.yaml", "--trainer.default_root_dir=run", "--data.cache", secret]
    assert main([*words, "--model.revision", TOKEN]) == 0
    said = capsys.readouterr()
    left = [path for path in (here / "run").rglob("*") if path.is_file()]
    assert {"config.yaml", "hparams.yaml", "results.json", "koff.json", "last.ckpt"} <= {path.name for path in left}
    for text in [said.out, said.err, *(path.read_bytes().decode(errors="replace") for path in left)]:
        assert "hunter2" not in text
        assert "abcdef" not in text
        assert TOKEN not in text
    assert "(removed)" in next(path for path in left if path.name == "config.yaml").read_text()


def test_secrets_are_not_in_messages(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-form")
    for value in (TOKEN, "https://me:hunter2@host/x", "a-token-of-another-form"):
        assert main(["fit", "--config", value]) == 2
        said = capsys.readouterr().err
        assert "(removed)" in said
        assert value not in said


@pytest.mark.parametrize("several", [True, False])
def test_a_logger_that_cannot_be_used_is_one_line_without_its_key(here, capsys, monkeypatch, several):
    def refuse(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("Requirement 'comet-ml' not met")

    monkeypatch.setattr("lightning.pytorch.loggers.CometLogger.__init__", wraps(CometLogger.__init__)(refuse))
    comet = {"class_path": "lightning.pytorch.loggers.CometLogger", "init_args": {"api_key": "SUPERSECRETVALUE123"}}
    logger = [{"class_path": "CSVLogger", "init_args": {"save_dir": "x"}}, comet] if several else comet
    options = {
        "trainer": {"accelerator": "cpu", "logger": logger, "max_steps": 1},
        "data": {"domains": {"de": "bundled:de"}},
    }
    (here / "c.yaml").write_text(yaml.safe_dump(options))
    assert main(["fit", "--config", "c.yaml"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("koff: ")]
    assert said == ["koff: lightning.pytorch.loggers.CometLogger cannot be used: Requirement 'comet-ml' not met"]
