"""`koff memory`: what is added is used, what is removed is gone, and nothing else is touched."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_artifact import DOMAINS, left_padded, tiny_artifact

from koff_lightning import load_decomposed
from koff_lightning.artifact import memories as artifact_memories
from koff_lightning.artifact.cartridge import to_cartridge
from koff_lightning.artifact.export import export
from koff_lightning.artifact.folder import read_manifest, verify
from koff_lightning.artifact.memory_files import read_card
from koff_lightning.backbone import rotary_inv_freqs
from koff_lightning.cli import main
from koff_lightning.kv_memory import KVMemory
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.support import files as new_folder
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import hash_file

ROWS = ["de", None, "law", "de"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def uniform(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("uniform"), layout="uniform", uniform=True)


@pytest.fixture
def folder(made, tmp_path):
    """A copy to change."""
    return shutil.copytree(made.folder, tmp_path / "artifact")


def memory(*argv):
    return main(["memory", *map(str, argv)])


def hashes(folder, leave=()):
    """Hash of every file of an artifact but the manifest and those below `leave`."""
    leave = ("koff.json", *leave)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return {name: hash_file(folder / name) for name in names if not name.startswith(leave)}


def manifest(folder):
    return json.loads((folder / "koff.json").read_text())


@torch.no_grad()
def logits(folder, rows=ROWS):
    ids, mask = left_padded()
    return load_decomposed(folder)(ids, mask, domains=rows).logits[mask.bool()]


def refused(capsys, folder, *argv):
    """The one line of a refusal that leaves the artifact as it was."""
    before = hashes(folder) | {"koff.json": hash_file(folder / "koff.json")}
    assert memory(*argv) == 2
    assert hashes(folder) | {"koff.json": hash_file(folder / "koff.json")} == before
    assert sorted(path.name for path in folder.parent.iterdir() if ".part" in path.name) == []
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("koff: ")]
    assert len(said) == 1
    return said[0]


def test_list_shows_each_domain(made, capsys):
    assert memory("list", made.folder) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows[1:]] == list(DOMAINS)
    assert rows[1][1:3] == ["3", "5"]


def test_remove_then_add_gives_the_artifact_back(made, folder, tmp_path):
    before = manifest(folder)
    os.link(folder / "backbone/model.safetensors", tmp_path / "held")
    assert memory("remove", folder, "law") == 0
    without = manifest(folder)
    assert sorted(without["domains"]) == ["de", "fr"]
    assert without["parameters"]["stored"] == before["parameters"]["stored"] - before["domains"]["law"]["parameters"]
    assert sorted(without["parameters"]["active"]) == ["de", "fr"]
    assert hashes(folder) == hashes(made.folder, ["memories/law"])
    verify(folder)
    assert memory("add", folder, made.folder / "memories/law") == 0
    assert manifest(folder) == before
    assert hashes(folder) == hashes(made.folder)
    assert (folder / "backbone/model.safetensors").samefile(tmp_path / "held"), "the backbone is linked, not copied"
    assert torch.equal(logits(folder), logits(made.folder))


def test_a_memory_may_get_another_name(made, folder):
    assert memory("add", folder, made.folder / "memories/law", "--as", "jura") == 0
    verify(folder)
    assert read_card(folder / "memories/jura").domain == "jura"
    assert torch.equal(logits(folder, ["jura"] * 4), logits(made.folder, ["law"] * 4))
    assert hashes(folder, ["memories/jura"]) == hashes(made.folder)
    counts = manifest(folder)["parameters"]
    assert load_decomposed(folder).active_parameters("jura") == counts["active"]["jura"]


def test_where_files_cannot_be_linked_they_are_copied(made, folder, monkeypatch):
    def no_links(*_: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr(os, "link", no_links)
    assert memory("remove", folder, "law") == 0
    assert hashes(folder) == hashes(made.folder, ["memories/law"])


def test_an_artifact_behind_a_symbolic_link_is_changed_where_it_lies(folder, tmp_path):
    (tmp_path / "link").symlink_to(folder)
    assert memory("remove", tmp_path / "link", "law") == 0
    assert (tmp_path / "link").is_symlink()
    assert sorted(manifest(folder)["domains"]) == ["de", "fr"]


def test_a_crash_leaves_the_artifact_as_it_was(made, folder, monkeypatch, capsys):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(new_folder, "_swap", full)  # the last step: all is written by then
    line = refused(capsys, folder, "add", folder, made.folder / "memories/law", "--as", "jura")
    assert "No space left on device" in line


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


OTHER = {"id": "other", "revision": None, "hash": "0" * 64}
ODD = {
    "base": (lambda m: change(m / "memory.json", base=OTHER), "belongs to base 'other'"),
    "mask": (lambda m: change(m / "memory.json", mask_hash="0" * 64), "trained under another mask"),
    "tokenizer": (lambda m: change(m / "memory.json", tokenizer_hash="0" * 64), "trained with another tokenizer"),
    "shapes": (lambda m: change(m / "memory.json", shapes="full"), "has 'full' shapes"),
    "format": (lambda m: change(m / "memory.json", format_version=2), "format version 2"),
    "damaged": (lambda m: (m / "kv_memory.safetensors").write_bytes(b"\0" * 9), "has 9 bytes instead of"),
    "missing": (lambda m: (m / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "extra": (lambda m: (m / "evil.pkl").write_bytes(b"x"), "evil.pkl does not belong there"),
    "no memory": (lambda m: (m / "memory.json").unlink(), "holds no memory.json"),
    "unsafe": (lambda m: change(m / "memory.json", domain="../x"), "'../x' is not safe as a file name"),
}


@pytest.mark.parametrize("kind", ODD)
def test_memories_that_do_not_fit_are_refused_before_anything_changes(made, folder, tmp_path, capsys, kind):
    spoil, line = ODD[kind]
    source = shutil.copytree(made.folder / "memories/law", tmp_path / "law")
    change(source / "memory.json", domain="jura")
    spoil(source)
    assert line in refused(capsys, folder, "add", folder, source)


def test_a_memory_of_other_widths_is_refused_even_if_its_card_lies(folder, tmp_path, capsys):
    other = tiny_artifact(tmp_path / "other", "qwen2", seed=3, kv=None, lora=LoraSpec(rank=2))
    source, card = other.folder / "memories/law", read_card(folder / "memories/law")
    change(source / "memory.json", base=card.base, mask_hash=card.mask_hash, tokenizer_hash=card.tokenizer_hash)
    assert "does not fit the backbone" in refused(capsys, folder, "add", folder, source, "--as", "jura")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["add", "{}", "{}/memories/law"], "has a memory 'law' already"),
        (["add", "{}", "{}/memories/law", "--as", "../x"], "'../x' is not safe as a file name"),
        (["add", "{}", "{}"], "holds no memory.json, so it is not the folder of a memory"),
        (["remove", "{}", "it"], "has no memory for 'it'; it has de, fr, law"),
        (["remove", "{}", "../backbone"], "has no memory for '../backbone'"),
        (["compose", "{}", "de", "it", "--as", "both"], "has no memory for 'it'"),
        (["compose", "{}", "de", "de", "--as", "both"], "name different domains"),
        (["compose", "{}", "de", "fr", "--as", "law"], "has a memory 'law' already"),
        (["compose", "{}", "de", "fr"], "memory compose: the following arguments are required: --as"),
        (["compose", "{}", "de", "fr", "--weigths", "x"], "no option 'weigths'. Did you mean 'weights'?"),
        (["compose", "{}", "de", "fr", "--as", "x", "--weights", "[1]"], "weights"),
        (["cartridge", "{}", "de"], "give either --out FOLDER to write an adapter or --from FOLDER to read one"),
        (["cartridge", "{}", "it", "--out", "{}.x"], "has no memory for 'it'"),
        (["cartridge", "{}", "de", "--from", "{}"], "has a memory 'de' already"),
        (["cartridge", "{}", "new", "--from", "{}"], "is not a CARTRIDGE adapter"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(folder, capsys, argv, line):
    assert line in refused(capsys, folder, *(word.format(folder) for word in argv))


def test_what_is_no_artifact_is_one_line(made, tmp_path, capsys):
    for words in (["list"], ["add", made.folder / "memories/de"], ["remove", "de"]):
        assert memory(words[0], tmp_path, *words[1:]) == 2
        assert "without koff.json, so it is no artifact" in capsys.readouterr().err


def test_a_damaged_artifact_takes_no_memory(made, folder, capsys):
    (folder / "backbone/model.safetensors").write_bytes(b"short")
    line = refused(capsys, folder, "add", folder, made.folder / "memories/law", "--as", "jura")
    assert "has 5 bytes instead of" in line


def test_a_merged_artifact_keeps_its_one_domain(made, tmp_path, capsys):
    merged = tiny_artifact(tmp_path, layout="merged").folder
    assert "merged into the backbone" in refused(capsys, merged, "add", merged, made.folder / "memories/law")
    assert "is 'de' merged into its backbone" in refused(capsys, merged, "remove", merged, "de")


@torch.no_grad()
def test_a_composed_memory_reads_both(made, folder):
    assert memory("compose", folder, "de", "fr", "--as", "both", "--weights", "[0.5, 0.5]") == 0
    verify(folder)
    about = manifest(folder)["domains"]
    assert (about["both"]["rank"], about["both"]["slots"]) == (6, 10)
    assert hashes(folder, ["memories/both"]) == hashes(made.folder)
    model, (ids, mask) = load_decomposed(folder), left_padded()
    both = model(ids, mask, domains="both").logits[mask.bool()]
    assert min((both - model(ids, mask, domains=d).logits[mask.bool()]).abs().max() for d in ("de", "fr")) > 0.01


def test_a_kv_memory_goes_to_peft_and_back(uniform, tmp_path):
    folder = shutil.copytree(uniform.folder, tmp_path / "artifact")
    assert memory("cartridge", folder, "de", "--out", tmp_path / "cartridge") == 0
    assert json.loads((tmp_path / "cartridge/adapter_config.json").read_text())["peft_type"] == "CARTRIDGE"
    assert memory("cartridge", folder, "again", "--from", tmp_path / "cartridge") == 0
    verify(folder)
    model = load_decomposed(folder, domains=["de", "again"])
    assert model.memories.lora("again") is None
    for name, slots in model.memories.slots("de").tensors().items():
        torch.testing.assert_close(model.memories.slots("again").tensors()[name], slots, atol=1e-5, rtol=0)
    assert memory("cartridge", folder, "de", "--out", folder) == 2, "not into a folder that holds something"


def test_a_rotary_embedding_that_moves_takes_no_cartridge(tmp_path, capsys):
    moving = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}
    folder = tiny_artifact(tmp_path, "llama", changes=moving, kv=KVSpec(slots=5, init="normal")).folder
    assert memory("cartridge", folder, "de", "--out", tmp_path / "cartridge") == 2
    assert "rope type 'dynamic' depends on the text's length" in capsys.readouterr().err


def test_a_sliding_window_is_no_place_for_a_cartridge(tmp_path, capsys):
    made = tiny_artifact(tmp_path, "gemma3_text", "masked")
    assert memory("cartridge", made.folder, "de", "--out", tmp_path / "cartridge") == 2
    assert "sliding window of 8 leaves it behind in a text longer than that" in capsys.readouterr().err
    assert not (tmp_path / "cartridge").exists()


def test_a_cartridge_of_one_slot_is_a_memory(uniform, tmp_path):
    folder = shutil.copytree(uniform.folder, tmp_path / "artifact")
    model = load_decomposed(folder, domains=["de"])
    one = {name: slots[:, :1] for name, slots in model.memories.slots("de").tensors().items()}
    to_cartridge(KVMemory.from_tensors(one), rotary_inv_freqs(model.backbone), tmp_path / "cartridge")
    assert memory("cartridge", folder, "one", "--from", tmp_path / "cartridge") == 0
    assert manifest(folder)["domains"]["one"]["slots"] == 1
    assert (logits(folder, ["one"] * 4) - logits(folder, [None] * 4)).abs().max() > 0.01


@pytest.mark.parametrize("slots", [0, 8193, "5", True])
def test_a_card_of_impossible_slots_is_refused(made, folder, tmp_path, capsys, slots):
    source = shutil.copytree(made.folder / "memories/law", tmp_path / "law")
    change(
        source / "memory.json",
        domain="jura",
        kv=json.loads((source / "memory.json").read_text())["kv"] | {"slots": slots},
    )
    due = f"a KV memory has 1 to 8192 slots, not {slots!r}" if type(slots) is int else "slots must be a count"
    assert due in refused(capsys, folder, "add", folder, source)


def test_what_removed_units_leave_behind_tells_backbones_apart(made, tmp_path, capsys):
    gates = made.module.gates
    gates.bias = torch.randn(len(gates.groups), made.module.backbone.config.hidden_size)  # as `koff baseline` of FLAP
    try:
        export(made.module, tmp_path / "biased", prove=False)
    finally:
        gates.bias = None
    plain, biased = shutil.copytree(made.folder, tmp_path / "plain"), tmp_path / "biased"
    for home, other in ((plain, biased), (biased, plain)):
        line = refused(capsys, home, "add", home, other / "memories/law", "--as", "jura")
        assert "was trained under another mask" in line
    assert memory("add", biased, biased / "memories/law", "--as", "jura") == 0


def test_a_memory_without_slots_is_no_cartridge(tmp_path, capsys):
    folder = tiny_artifact(tmp_path, kv=None).folder
    assert "has no KV slots" in refused(capsys, folder, "cartridge", folder, "de", "--out", tmp_path / "cartridge")


def test_memory_alone_names_its_verbs(capsys):
    assert main(["memory", "--help"]) == 0
    assert capsys.readouterr().out.count("koff memory ") == 5
    for words in (["memory"], ["memory", "lst"], ["memory", "list", "--what"]):
        assert main(words) == 2
    assert "Did you mean 'memory list'?" in capsys.readouterr().err


def test_add_from_bank_checks_as_add_does(made):
    with pytest.raises(KoffError, match="has a memory 'de' already"):
        artifact_memories.add_from_bank(made.folder, load_decomposed(made.folder).memories, ["de"])
    assert Path(made.folder / "memories/de").is_dir()


def test_several_memories_are_added_together_or_not_at_all(made):
    bank, before = load_decomposed(made.folder).memories, sorted(made.folder.rglob("*"))
    bank.add("fresh", LoraSpec(2, 4), None)
    with pytest.raises(KoffError, match="has a memory 'de' already"):
        artifact_memories.add_from_bank(made.folder, bank, ["fresh", "de"])
    assert sorted(made.folder.rglob("*")) == before and "fresh" not in read_manifest(made.folder).domains
    artifact_memories.add_from_bank(made.folder, bank, ["fresh"])
    assert "fresh" in load_decomposed(made.folder).domains
    artifact_memories.remove_memory(made.folder, "fresh")
    assert sorted(made.folder.rglob("*")) == before
