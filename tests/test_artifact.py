"""The format on disk: what a manifest says, which folders are refused, and writing in full or not at all."""

import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import tiny_model
from toy_text import toy_tokenizer

from koff_lightning import KoffError, load_tokenizer
from koff_lightning.artifact.folder import (
    MEMORIES,
    Manifest,
    describe_files,
    describe_mask,
    hash_description,
    read_manifest,
    verify,
)
from koff_lightning.backbone import prunable_groups
from koff_lightning.listed_files import BACKBONE, CARD, MANIFEST
from koff_lightning.loading import tokenizer_hash
from koff_lightning.support import files as new_folder
from koff_lightning.support.files import hash_file
from koff_lightning.training.run_folder import alone_in

SUM = {"sha256": "", "size": 0}


def mask_hash(*mask):
    return hash_description(describe_mask(*mask))


@pytest.fixture(scope="module")
def groups():
    return prunable_groups(tiny_model("llama", intermediate_size=27))  # no multiple of 8


def some_mask(groups, seed=0):
    return torch.rand(sum(g.size for g in groups), generator=torch.Generator().manual_seed(seed)) < 0.7


@pytest.fixture
def folder(tmp_path, groups):
    """A sound artifact as far as this file is concerned: nothing in it is a model."""
    path = tmp_path / "artifact"
    (path / BACKBONE).mkdir(parents=True)
    (path / MEMORIES / "de").mkdir(parents=True)
    (path / MEMORIES / "de" / CARD).write_text("{}")
    card = hash_file(path / MEMORIES / "de" / CARD)
    (path / BACKBONE / "config.json").write_text("{}")
    save_file({"weight": torch.zeros(9)}, path / BACKBONE / "model.safetensors")
    mask = some_mask(groups)
    manifest = Manifest(
        layout="ragged",
        domain=None,
        base=BASE,
        dtype="float32",
        mask_hash=mask_hash(groups, mask),
        kept=describe_mask(groups, mask),
        sparsity={
            "denominator": "body",
            **dict.fromkeys(("target", "body", "total", "units", "ffn", "attention"), 0.1),
        },
        parameters={"dense_total": 1, "backbone": 1, "active": {"de": 2}, "stored": 2},
        domains={"de": {"rank": 1, "alpha": 2.0, "slots": None, "parameters": 1, "card_sha256": card}},
        config={"path": None},
        versions={},
        files=describe_files(path, BACKBONE),
        licence=None,
        created_by="koff-lightning 0",
    )
    (path / MANIFEST).write_text(manifest.to_json())
    return path


def change(folder, **entries):
    """Rewrite entries of koff.json."""
    content = json.loads((folder / MANIFEST).read_text()) | entries
    (folder / MANIFEST).write_text(json.dumps(content))


# ---------------------------------------------------------------------------------------------------- manifest


def test_a_manifest_comes_back_as_it_was(folder, groups):
    manifest = verify(folder)
    assert manifest == read_manifest(str(folder))
    assert torch.equal(manifest.mask(), some_mask(groups))
    assert manifest.mask_hash == mask_hash(groups, manifest.mask())
    assert Manifest.from_json(json.loads(manifest.to_json()), folder) == manifest
    assert manifest.tokenizer_hash == "cd"


def test_the_packed_mask_is_that_of_other_tools(groups):
    numpy = pytest.importorskip("numpy")
    mask = some_mask(groups)
    for entry, part in zip(describe_mask(groups, mask), mask.split([g.size for g in groups]), strict=True):
        assert entry["bits"] == numpy.packbits(part.numpy()).tobytes().hex()
        assert entry["kept"] == int(part.sum())


def test_every_unit_matters_to_the_mask_hash(groups):
    mask = some_mask(groups)
    hashes = {mask_hash(groups, mask)} | {
        mask_hash(groups, torch.where(torch.arange(len(mask)) == i, ~mask, mask)) for i in range(len(mask))
    }
    assert len(hashes) == 1 + len(mask)
    assert mask_hash([replace(g, layer=g.layer + 1) for g in groups], mask) not in hashes


def test_what_removed_units_leave_behind_is_part_of_the_mask_hash(groups):
    mask, bias = some_mask(groups), torch.zeros(len(groups), 4)
    other = bias.clone()
    other[-1, -1] = 1e-6
    hashes = {mask_hash(groups, mask, each) for each in (None, bias, other, bias.bfloat16())}
    assert len(hashes) == 3, "zeros are the same in every dtype"
    assert hash_description(describe_mask(groups, mask, other)) == mask_hash(groups, mask, other)
    lines = [f"{g['layer']} {g['kind']} {g['of']} {g['bits']}\n" for g in describe_mask(groups, mask)]
    first = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert mask_hash(groups, mask) == first, "artifacts without compensation keep the hash they were written with"


@pytest.mark.parametrize("dtype", ["bfloat16", "float31"])
def test_the_dtype_is_compared_with_the_weights(folder, dtype):
    change(folder, dtype=dtype)
    with pytest.raises(KoffError, match=rf"says {dtype}, but .*model\.safetensors holds weight as F32"):
        verify(folder, backbone=False)


BASE = {"id": "x/y", "revision": None, "hash": "ab", "family": "llama", "tokenizer_hash": "cd"}
MEMORY = {"rank": None, "slots": None, "parameters": 1, "card_sha256": ""}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format_version": 2}, "format version 2, this koff-lightning reads 1"),
        ({"format_version": None}, "format version None"),
        ({"colour": "red"}, "has an unknown entry 'colour'"),
        ({"mask_hash": "00"}, "its mask does not fit its mask_hash"),
        ({"kept": [{"layer": 0}]}, r"koff\.json cannot be used \(an entry of kept lacks kind\)"),
        ({"kept": 3}, r"koff\.json cannot be used"),
        ({"layout": "round"}, "layout must be one of ragged, .* got 'round'"),
        ({"layout": ["ragged"]}, "layout must be str, and is list"),
        ({"layout": "merged", "domain": None}, "layout 'merged' does not go with the merged domain None"),
        ({"layout": "ragged", "domain": "de"}, "layout 'ragged' does not go with the merged domain 'de'"),
        ({"domains": {"../x": MEMORY}}, "domain name '../x' is not safe"),
        ({"domains": {"de": {}}}, "de lacks rank"),
        ({"domains": {"jura": MEMORY}}, "its active parameters lack 'jura'"),
        ({"domains": ["de"]}, "cannot be used"),
        ({"domains": {"de": MEMORY | {"parameters": "1"}}}, "parameters must be a count, and is str '1'"),
        ({"domains": {}, "base": {"id": "x"}}, "base lacks revision"),
        (
            {"base": dict.fromkeys(("id", "revision", "hash", "family", "tokenizer_hash"))},
            "id must be str, and is nothing",
        ),
        ({"base": BASE | {"family": ""}}, r"base\.family must be one of llama, .*; got ''"),
        ({"sparsity": {}}, "sparsity lacks denominator"),
        ({"dtype": 3}, "dtype must be str, and is int 3"),
        ({"parameters": {}}, "parameters lacks dense_total"),
        ({"files": {"backbone/x": {"size": 1}}}, "backbone/x lacks sha256"),
        ({"files": {"../../secret": SUM}}, "lists '../../secret', which is not below backbone/"),
        ({"files": {"backbone/../koff.json": SUM}}, "not below backbone/"),
        ({"files": {"": SUM}}, "not below backbone/"),
        ({"files": {"/etc/passwd": SUM}}, "not below backbone/"),
    ],
)
def test_manifests_that_are_refused(folder, entries, message):
    change(folder, **entries)
    with pytest.raises(KoffError, match=message) as error:
        read_manifest(folder)
    assert "\n" not in str(error.value)


def test_a_mask_that_was_edited_is_noticed(folder):
    kept = json.loads((folder / MANIFEST).read_text())["kept"]
    kept[0]["bits"] = f"{int(kept[0]['bits'], 16) ^ 0x80000000:08x}"
    change(folder, kept=kept)
    with pytest.raises(KoffError, match="does not fit its mask_hash"):
        read_manifest(folder)
    change(folder, kept=kept, mask_hash=hash_description(kept))
    with pytest.raises(KoffError, match="the bits of layer 0 are not"):
        read_manifest(folder)


def test_a_manifest_that_lacks_something(folder):
    content = json.loads((folder / MANIFEST).read_text())
    del content["domains"]
    (folder / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(KoffError, match="lacks 'domains'"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not valid JSON"), ("[]", "must hold an object of names and values"), ("\udcff", "not valid JSON")],
)
def test_a_manifest_that_is_no_manifest(folder, text, message):
    (folder / MANIFEST).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(KoffError, match=message):
        read_manifest(folder)


def test_what_is_no_artifact(folder, tmp_path):
    with pytest.raises(KoffError, match="no such folder.*koff export"):
        read_manifest(tmp_path / "nowhere")
    with pytest.raises(KoffError, match=f"is a model without koff.json, so it is no artifact: give {folder}$"):
        read_manifest(folder / BACKBONE)
    with pytest.raises(KoffError, match="is a folder without koff.json"):
        read_manifest(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(KoffError, match="is a model without koff.json"):
        read_manifest(tmp_path)


# ------------------------------------------------------------------------------------------------------- files


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_damage_is_noticed(folder):
    model = folder / BACKBONE / "model.safetensors"
    flip(model)
    with pytest.raises(KoffError, match=r"model\.safetensors was changed"):
        verify(folder)
    verify(folder, backbone=False)
    model.write_bytes(bytes(99))
    for backbone in (True, False):
        with pytest.raises(KoffError, match="has 99 bytes instead of 108"):
            verify(folder, backbone)
    model.unlink()
    with pytest.raises(KoffError, match=r"model\.safetensors is missing"):
        verify(folder)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "backbone/adapter_config.json", "backbone/sub/model.safetensors", "memories/fr"]
)
def test_what_is_not_listed_is_refused(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(KoffError, match=f"{re.escape(name)} does not belong there"):
        verify(folder)


def test_what_hubs_and_desktops_leave_is_no_damage(folder):
    for name in (".gitattributes", "README.md", "backbone/.DS_Store", ".cache/huggingface/x"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    verify(folder)


def test_a_memory_that_is_listed_must_be_there(folder):
    shutil.rmtree(folder / MEMORIES / "de")
    with pytest.raises(KoffError, match="memories/de is missing"):
        verify(folder)


def test_hashes_are_sha256(tmp_path):
    (tmp_path / "empty").touch()
    assert hash_file(tmp_path / "empty").startswith("e3b0c44298fc1c14")


def test_tokenizer_hash_is_of_what_makes_ids(tmp_path):
    tokenizer = load_tokenizer(toy_tokenizer(tmp_path))
    tokenizer.pad_token = tokenizer.eos_token
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "a longer text"], padding="max_length", truncation=True, max_length=4)
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_hash(tokenizer) == before
    tokenizer.save_pretrained(tmp_path / "again")
    assert tokenizer_hash(load_tokenizer(str(tmp_path / "again"))) == before
    tokenizer.add_tokens(["ß"])
    assert tokenizer_hash(tokenizer) != before


# ----------------------------------------------------------------------------------------------------- writing


def write(target, text, **options):
    with new_folder.new_folder(target, **options) as folder:
        (folder / "koff.json").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "part").write_text(text)


def only(target):
    """The one thing in the parent folder, and nothing half-written beside it."""
    assert list(target.parent.iterdir()) == [target]
    return target / "koff.json"


@pytest.fixture
def target(tmp_path):
    return tmp_path / "deep" / "out"


def test_a_folder_is_there_in_full_or_not_at_all(target):
    with pytest.raises(ZeroDivisionError), new_folder.new_folder(target) as folder:
        (folder / "koff.json").write_text("half")
        assert not target.exists()
        raise ZeroDivisionError
    assert list(target.parent.iterdir()) == []
    write(target, "whole")
    assert only(target).read_text() == "whole"


@pytest.mark.parametrize("one_call", [True, False])
def test_overwriting_swaps(target, monkeypatch, one_call):
    if not one_call:
        monkeypatch.setattr(new_folder, "_exchange", lambda *_: False)
    write(target, "old")
    (target / "old only").touch()
    write(target, "new", overwrite=True)
    assert only(target).read_text() == "new"
    assert not (target / "old only").exists()


def test_this_system_swaps_in_one_call(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not new_folder._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("no renameat2 here")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()


@pytest.mark.parametrize("one_call", [True, False])
@pytest.mark.parametrize("stop", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_folder(target, monkeypatch, stop, one_call):
    write(target, "old")

    def fail(path, to):
        if path.name.endswith(".part"):
            raise stop
        rename(path, to)

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(new_folder, "_exchange", lambda *_: fail(*_) if one_call else False)
    message = f"^cannot write {re.escape(str(target))}: No space left on device$" if isinstance(stop, OSError) else None
    with pytest.raises(KoffError if message else KeyboardInterrupt, match=message):
        write(target, "new", overwrite=True)
    assert only(target).read_text() == "old"


@pytest.mark.parametrize("one_call", [True, False])
def test_a_linked_folder_is_written_where_it_lies(tmp_path, monkeypatch, one_call):
    if not one_call:
        monkeypatch.setattr(new_folder, "_exchange", lambda *_: False)
    (tmp_path / "disk").mkdir()
    link, place = tmp_path / "out", tmp_path / "disk" / "artifact"
    link.symlink_to(place)
    for text in ("first", "second"):  # the link leads nowhere yet, then to a folder
        write(link, text, overwrite=True)
        assert link.is_symlink()
        assert only(place).read_text() == text
        assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]


def test_what_is_there_is_kept(target):
    write(target, "old")
    with pytest.raises(KoffError, match="exists already: --overwrite replaces it"):
        write(target, "new")
    assert only(target).read_text() == "old"


def test_only_its_own_kind_is_overwritten(target):
    target.mkdir(parents=True)
    (target / "thesis.tex").write_text("years")
    with pytest.raises(KoffError, match=r"holds no koff\.json, so it is not overwritten"):
        write(target, "new", overwrite=True)
    assert (target / "thesis.tex").read_text() == "years"
    (target / "thesis.tex").unlink()
    write(target, "new", overwrite=True)
    assert only(target).read_text() == "new"


def test_a_file_in_the_way(target):
    target.parent.mkdir()
    target.touch()
    with pytest.raises(KoffError, match="is a file: give another folder"):
        write(target, "new", overwrite=True)
    with pytest.raises(KoffError, match=r"cannot write .*Not a directory"):
        write(target / "below", "new")


def test_a_memory_card_that_was_edited_is_noticed(folder):
    verify(folder)
    (folder / MEMORIES / "de" / CARD).write_text("{ }")
    with pytest.raises(KoffError, match="memory.json was changed after it was written"):
        verify(folder, backbone=False)


def test_a_file_in_place_of_the_folder_is_named(folder):
    with pytest.raises(KoffError, match="that is a file, wanted is the folder"):
        read_manifest(folder / MANIFEST)


def test_a_second_writer_waits_for_its_turn(tmp_path):
    """The lock is held by another open file, as another process would hold it."""
    with new_folder.new_folder(tmp_path / "made") as first:
        (tmp_path / ".made.1.part").mkdir()  # left by a process that was killed: cleared by whoever comes next
        own = first.rename(tmp_path / ".made.2.part")  # what we write, seen as somebody else's
        with (
            pytest.raises(KoffError, match="another process is writing .*made"),
            new_folder.new_folder(tmp_path / "made"),
        ):
            pytest.fail("it began to write")
        own.rename(first)
        (first / "koff.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir() if path.name != ".made.1.part"] == ["made"]


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    (tmp_path / ".made.1.part").mkdir()
    with new_folder.new_folder(tmp_path / "made") as work:
        (work / "koff.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("by_run", [False, True])
def test_what_a_killed_export_left_of_its_proof_is_cleared(tmp_path, by_run):
    """By the next export into that folder, or the next run in the folder above it; a living writer's stays."""
    for name in (".made[1].1.part", ".made[1].1.part.proof.x7", ".made[1].11.part.proof.x7"):
        (tmp_path / name).mkdir()
    with new_folder.new_folder(tmp_path / "made"):
        live = next(tmp_path.glob(".made.*.part"))
        beside = tmp_path / f"{live.name}.proof.x7"
        beside.mkdir()
        if by_run:
            with alone_in(tmp_path):
                pass
        else:
            with new_folder.new_folder(tmp_path / "made[1]"):
                pass
        found = {path.name for path in tmp_path.iterdir()} - {"made[1]"}
        assert found == {live.name, beside.name, ".made[1].11.part.proof.x7"}
        beside.rmdir()


def test_what_a_killed_writer_left_is_cleared_whatever_the_folder_is_called(tmp_path):
    (tmp_path / ".made[1].1.part").mkdir()
    with new_folder.new_folder(tmp_path / "made[1]") as work:
        (work / "koff.json").write_text("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["made[1]"]


def test_writers_of_folders_whose_names_begin_alike_do_not_meet(tmp_path):
    (tmp_path / ".made.2.7.part").mkdir()  # of `made.2`: for who writes that to clear
    with new_folder.new_folder(tmp_path / "made.2"):
        (tmp_path / ".made.2.8.part").mkdir()
        with new_folder.new_folder(tmp_path / "made") as work:
            (work / "koff.json").write_text("{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".made.2.8.part", "made", "made.2"]
