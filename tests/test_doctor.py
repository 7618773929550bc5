"""`koff doctor`: what it finds, and that it imports no release known to be bad."""

import subprocess
import sys

import pytest

from koff_lightning import KoffError
from koff_lightning.cli import main
from koff_lightning.commands import doctor


def test_a_sound_machine(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "hub" / "models--some--model").mkdir(parents=True)
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "lightning 2." in said
    assert "\ngloo       two processes add up a number\n" in said
    assert "\nnetwork    is not used: HF_HUB_OFFLINE is set\n" in said
    assert "\n           holds model some/model\n" in said


def test_caches_are_looked_for_where_they_are(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("KOFF_CACHE", str(tmp_path / "koff"))
    monkeypatch.setenv("HF_EVALUATE_OFFLINE", "1")
    for folder in ("home/hub/models--of--nobody", "home/datasets/raw___text", "koff/tokens/0123", "koff/tokens/4567"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("raw-text-0123", "org--art@0123"):  # a dataset and an artifact
        (tmp_path / "koff" / "hub" / name).mkdir(parents=True)
    for name in ("models--some--model", "datasets--some--text", "spaces--some--demo"):
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
    (tmp_path / "koff" / "tokens" / ".0123.lock").touch()
    doctor._switches()
    said = capsys.readouterr().out
    assert "HF_EVALUATE_OFFLINE is set" in said
    held = [line.strip() for line in said.splitlines() if line.startswith("           holds")]
    assert held == [
        "holds model some/model",
        "holds dataset some/text",
        "holds dataset raw/text, ready to read",
        "holds tokenised text, 2 entries",
        "holds copies of streamed datasets, 1 entry",
        "holds artifacts that were pulled, 1 entry",
    ]


def test_a_user_without_a_home_folder(capsys, monkeypatch):
    """As one that is a mere number in a container."""
    for name in ("HOME", *doctor.CACHES):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    assert main(["doctor", "--skip-processes"]) == 0
    assert "\nKOFF_CACHE ~/.cache/koff: NO HOME FOLDER, set KOFF_CACHE\n" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["lightning", "pytorch-lightning"])
def test_a_bad_release_is_named_and_not_imported(tmp_path, name):
    """In a process that finds the metadata of one, and a package that says when it is imported."""
    info = tmp_path / f"{name.replace('-', '_')}-2.6.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.6.3\n")
    for package in ("lightning", "pytorch_lightning", "torch", "transformers"):
        (tmp_path / f"{package}.py").write_text(f"print('IMPORTED {package}')")
    code = f"import sys; sys.argv = ['/bin/koff', 'doctor']; sys.path.insert(0, {str(tmp_path)!r}); "
    code += "from koff_lightning.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"koff: {name} 2.6.3 steals credentials when imported (GHSA-w37p-236h-pfx3). Remove it" in done.stderr
    assert "IMPORTED" not in done.stdout


def test_a_release_with_a_weakness_is_told_with_its_upgrade_and_all_else_too(monkeypatch, capsys):
    """As Python 3.11's own venv brings one: no keys are lost by it, and what the machine is like is told."""
    sound = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: "65.5.0" if name == "setuptools" else sound(name))
    assert main(["doctor", "--skip-processes"]) == 2
    told = capsys.readouterr()
    assert "\nprocessor  " in told.out
    assert told.err == (
        "koff: setuptools 65.5.0 writes files outside the folder it was given (CVE-2025-47273): pip install --upgrade "
        "setuptools\n"
    )


def test_processes_that_cannot_talk(monkeypatch, capsys):
    assert "no answer in 0 s" in doctor.talk("gloo", timeout=0.01)
    assert doctor.talk("carrier-pigeon").startswith(("ValueError", "AssertionError", "RuntimeError"))
    monkeypatch.setattr(doctor, "talk", lambda backend: "a wall")
    with pytest.raises(KoffError, match="two processes cannot work together by gloo: a wall"):
        doctor.doctor()


def test_no_process_is_started_where_none_is_wanted(monkeypatch, capsys):
    doctor.platform.platform()  # for which Python runs `uname`, once
    monkeypatch.setattr(doctor.subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    assert main(["doctor", "--skip-processes"]) == 0
    said = capsys.readouterr().out
    assert "\nprocessor  " in said
    assert "gloo" not in said
