"""The folder of a run given where its checkpoint or its artifact is wanted: the message names that."""

import os
from pathlib import Path

import pytest

from koff_lightning import load_decomposed
from koff_lightning.cli import main
from koff_lightning.support.errors import KoffError

LAST = Path("runs/x/version_1/checkpoints/last.ckpt")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def left(place, time=2):
    place = Path(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    place.touch()
    os.utime(place, (time, time))


def said(capsys, *words):
    assert main(list(words)) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line.replace(f"{Path.cwd()}/", "").removeprefix("koff: ")  # some verbs write places in full


@pytest.mark.parametrize("given", ["runs", "runs/x", "runs/x/version_1", "runs/x/version_1/checkpoints"])
def test_export_of_a_runs_folder_names_its_newest_last_checkpoint(capsys, given):
    left(LAST)
    left("runs/x/version_0/checkpoints/last.ckpt", time=1)
    left("runs/x/version_1/checkpoints/step=9.ckpt", time=3)
    line = said(capsys, "export", "--ckpt", given, "--out", "o")
    assert line == f"{given} is a folder, wanted is a checkpoint: give {LAST}"


def test_export_of_a_folder_without_a_checkpoint(capsys):
    Path("runs").mkdir()
    line = said(capsys, "export", "--ckpt", "runs", "--out", "o")
    assert line == (
        "runs is a folder, wanted is a checkpoint: it holds none. `koff fit` leaves one in "
        "runs/.../checkpoints/last.ckpt"
    )


@pytest.mark.parametrize("mark", [".metadata", "meta.pt"])
def test_a_sharded_checkpoint_is_told_how_to_become_one_file(capsys, mark):
    left(LAST / mark)
    line = said(capsys, "export", "--ckpt", str(LAST), "--out", "o")
    assert f"python -m lightning.pytorch.utilities.consolidate_checkpoint {LAST}" in line


@pytest.mark.parametrize(
    ("verb", "given"),
    [(["generate", "--prompt", "x", "--model"], "runs/x"), (["inspect"], "runs/x/version_1"), (["serve"], "runs/x")],
)
def test_a_model_by_its_runs_folder(capsys, verb, given):
    left(LAST)
    left("runs/x/artifact/koff.json")
    assert said(capsys, *verb, given).endswith(
        f"{given} is a folder without koff.json, so it is no artifact: give runs/x/artifact"
    )


@pytest.mark.parametrize("verb", [["generate", "--prompt", "x", "--model"], ["inspect"]])
def test_a_run_that_has_not_ended_is_no_model_yet(capsys, verb):
    left(LAST)
    line = said(capsys, *verb, "runs/x")
    assert line.endswith(
        "runs/x is a folder without koff.json, so it is no artifact: it is of a run that has not ended, or exports "
        f"none. `koff export --ckpt {LAST} --out DIR` makes one, and `koff fit` goes on with the run with "
        "--ckpt_path last"
    )


def test_the_same_in_python():
    left("runs/x/artifact/koff.json")
    with pytest.raises(KoffError, match=r"give runs/x/artifact$"):
        load_decomposed("runs/x")
