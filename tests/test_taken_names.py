"""Words that mean something where a domain is asked for are no names of new domains; what has one is still read."""

import pytest
import torch
from tiny_artifact import tiny_artifact
from tiny_command import small_fits
from tiny_run import RandomText, tiny_module, tiny_trainer

from koff_lightning import KoffError, KOFFModule, load_decomposed
from koff_lightning.artifact.folder import read_manifest
from koff_lightning.artifact.memories import add_memory, check_free_name
from koff_lightning.data import DomainDataModule

WORDS = {"auto": "asks the router", "all": "stands for all", "none": "without a memory", "dense": "the dense model"}
WORDS |= {"null": "is read as no domain"}


@pytest.mark.parametrize("word", WORDS)
def test_a_run_refuses_such_a_domain_before_it_trains(tmp_path, monkeypatch, word):
    monkeypatch.setattr(KOFFModule, "training_step", lambda *_: pytest.fail("it trains"))
    with pytest.raises(KoffError, match=f"a domain cannot be called '{word}', which .*{WORDS[word]}"):
        tiny_trainer(tmp_path, []).fit(tiny_module(tmp_path, domains=["en", word]), RandomText())


def test_the_command_refuses_it_before_text_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(DomainDataModule, "setup", lambda *_: pytest.fail("it reads text"))
    with small_fits(tmp_path, monkeypatch, trainer={"max_steps": 2}) as run:
        assert run("x", "--data.domains.none=bundled:de") == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "koff: a domain cannot be called 'none', which stands for the backbone without a memory where a domain is "
        "asked for: give it another name"
    )
    assert not (tmp_path / "x").exists()


def test_an_artifact_takes_no_memory_of_such_a_name_and_one_that_has_it_is_read(tmp_path):
    folder = tiny_artifact(tmp_path, domains=("none", "de")).folder
    model = load_decomposed(folder)
    model(torch.tensor([[3, 4]]), domains="none")
    with pytest.raises(KoffError, match="a domain cannot be called 'all', which stands for all domains"):
        add_memory(folder, folder / "memories" / "de", "all")
    check_free_name(read_manifest(folder), folder, "fr")


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_a_run_that_has_one_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("koff_lightning.training.module.refuse_taken", lambda _: None)  # as releases before
        first = tiny_trainer(tmp_path, [], steps=8)
        first.fit(tiny_module(tmp_path, domains=["en", "none"]), RandomText(domains=["en", "none"]))
        first.save_checkpoint(tmp_path / "old.ckpt")
    more = tiny_trainer(tmp_path, [], steps=9)
    more.fit(
        tiny_module(tmp_path, domains=["en", "none"]),
        RandomText(domains=["en", "none"]),
        ckpt_path=tmp_path / "old.ckpt",
    )
    assert more.global_step == 9
