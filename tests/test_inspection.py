"""`koff inspect` shows what the files hold."""

import io
import json
import sys

import pytest
from tiny_artifact import DOMAINS, tiny_artifact

from koff_lightning.cli import main


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("llama"))


def inspect(capsys, *argv):
    assert main(["inspect", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_sizes_sparsity_parameters_and_domains_are_those_of_the_manifest(made, capsys):
    out, manifest = inspect(capsys, made.folder), json.loads((made.folder / "koff.json").read_text())
    counts = manifest["parameters"]
    for count in (counts["dense_total"], counts["backbone"], counts["stored"], max(counts["active"].values())):
        assert f"{count:,}" in out
    for share in ("body", "total", "units", "ffn", "attention"):
        assert f"{100 * manifest['sparsity'][share]:.2f} %" in out
    net = 100 * (counts["stored"] / counts["dense_total"] - 1)
    assert f"{net:+.2f} % net of dense" in out
    assert "layout      ragged, float32" in out
    assert str(made.folder.parent / "dense") in out
    assert "licence     not known" in out
    rows = [line.split() for line in out.splitlines()]
    for domain in DOMAINS:
        size = sum(file.stat().st_size for file in (made.folder / "memories" / domain).iterdir())
        row = next(row for row in rows if row[:1] == [domain])
        assert row[1:4] == ["3", "5", f"{manifest['domains'][domain]['parameters']:,}"]
        assert row[4:] == [f"{size / 1000:.4g}", "kB"]


def test_the_picture_has_a_bar_for_each_layer_as_long_as_what_is_kept(made, capsys):
    manifest = json.loads((made.folder / "koff.json").read_text())
    lines = inspect(capsys, made.folder).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("kept "))
    for entry in manifest["kept"]:
        line = lines[start + 1 + entry["layer"]]
        assert line.split()[0] == str(entry["layer"])
        assert f"{entry['kept']} of {entry['of']}" in line
        bars = [word for word in line.split() if set(word) <= set("█░")]
        assert bars[("channel", "kv_group").index(entry["kind"])].count("█") == round(24 * entry["kept"] / entry["of"])


def test_a_terminal_without_blocks_gets_ascii(made, monkeypatch):
    plain = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", plain)
    assert main(["inspect", str(made.folder)]) == 0
    plain.seek(0)
    assert "####" in plain.read()


def test_the_picture_as_a_file(made, capsys, tmp_path):
    inspect(capsys, made.folder, "--png", tmp_path / "new" / "kept.png")
    assert (tmp_path / "new" / "kept.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "kept.png", tmp_path / "kept.what", tmp_path / "new"):
        assert main(["inspect", str(made.folder), "--png", str(target)]) == 2
        assert f"cannot write {target}" in capsys.readouterr().err
    assert not (tmp_path / "new.png").exists()


def test_verification_is_asked_for(tmp_path, capsys):
    made = tiny_artifact(tmp_path)
    assert "every file is as its hash says" in inspect(capsys, made.folder, "--verify")
    weights = made.folder / "memories" / "fr" / "kv_memory.safetensors"
    weights.write_bytes(b"\0" * weights.stat().st_size)
    inspect(capsys, made.folder)
    assert main(["inspect", str(made.folder), "--verify"]) == 2
    assert "kv_memory.safetensors was changed after it was written" in capsys.readouterr().err


def test_a_merged_artifact_names_its_domain(tmp_path, capsys):
    out = inspect(capsys, tiny_artifact(tmp_path, layout="merged").folder)
    assert "layout      merged of domain de" in out
    row = next(line.split() for line in out.splitlines() if line.split()[:1] == ["de"])
    assert row[1:3] == ["-", "5"], "its LoRA is in the backbone"


def test_without_memories_there_is_nothing_to_list(tmp_path, capsys):
    out = inspect(capsys, tiny_artifact(tmp_path, lora=None, kv=None).folder)
    assert "domains     none" in out


@pytest.mark.parametrize("name", ["dense", "nowhere"])
def test_what_is_no_artifact_is_one_line(made, capsys, name):
    assert main(["inspect", str(made.folder.parent / name)]) == 2
    said = capsys.readouterr()
    assert "koff export" in said.err
    assert len(said.err.splitlines()) == 1
    assert said.out == ""


def test_check_says_of_every_engine_what_it_takes(tmp_path, capsys):
    folder = str(tiny_artifact(tmp_path).folder)
    assert main(["inspect", folder, "--check", "hf,gguf"]) == 0
    said = capsys.readouterr().out
    assert "transformers" in said and "llama.cpp" in said and "vLLM" not in said
    assert main(["inspect", folder, "--check", "hf,ggfu"]) == 2
    assert "Did you mean 'gguf'?" in capsys.readouterr().err
