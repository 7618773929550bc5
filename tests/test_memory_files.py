"""A memory on disk: what is written is read back, peft reads it too, what does not belong is refused in one line."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_cases import cut_model, plain_batch, random_mask
from tiny_memories import HOME, KINDS, MANIFEST, empty_bank, fill_, mixed, read, written
from tiny_models import FAMILIES, tiny_model

from koff_lightning import KoffError, KVSpec, LoraSpec
from koff_lightning.artifact.memory_files import (
    ADAPTER,
    ADAPTER_CONFIG,
    KV_FILE,
    MemoryCard,
    load_memory,
    lora_state,
    read_card,
    write_memory,
)
from koff_lightning.backbone import prunable_groups
from koff_lightning.kv_memory import KVMemory
from koff_lightning.listed_files import CARD
from koff_lightning.support.files import hash_file

# peft asks transformers for something by its former name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def folder(tmp_path):
    written(tmp_path / "both", mixed(), "both")
    return tmp_path / "both"


@torch.no_grad()
def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    memories = mixed()
    rows = [*KINDS, None]
    expected = read(memories, rows)
    loaded = empty_bank()
    for domain in reversed(KINDS):
        card = written(tmp_path / domain, memories, domain)
        assert read_card(tmp_path / domain) == card
        assert card.parameters == memories.size(domain)
        assert load_memory(loaded, tmp_path / domain, expect=MANIFEST) == domain
        assert loaded.size(domain) == memories.size(domain)
    assert torch.equal(read(loaded, rows), expected)
    assert not [p for p in (*loaded.model.parameters(), *loaded.parameters()) if p.requires_grad]


def test_the_card_says_what_there_is(tmp_path):
    memories = mixed()
    memories.slots("other").initialise_(memories.model, torch.arange(7))
    card = json.loads((written(tmp_path / "x", memories, "other") and tmp_path / "x" / CARD).read_text())
    digest = card["kv"].pop("source_text_hash")
    assert card["kv"] == {"slots": 3, "positions": [-3, -1]} and len(bytes.fromhex(digest)) == 32
    assert card["lora"] == {"rank": 5, "alpha": 6.0, "targets": ["q_proj", "v_proj"]}
    assert card["base"] == {"id": "tiny/model", "revision": None, "hash": "b" * 64}
    assert set(card["files"]) == {ADAPTER, ADAPTER_CONFIG, KV_FILE}
    assert written(tmp_path / "kv", memories, "kv").lora is None and not (tmp_path / "kv" / ADAPTER_CONFIG).exists()
    assert written(tmp_path / "lora", memories, "lora").kv is None and not (tmp_path / "lora" / KV_FILE).exists()
    loaded = empty_bank()
    load_memory(loaded, tmp_path / "x", "again")
    assert loaded.slots("again").source_hash == digest


def test_the_same_memory_is_the_same_files(tmp_path):
    one, other = (written(tmp_path / name, mixed(), "both") for name in "ab")
    assert one == other


def test_a_memory_can_be_loaded_under_another_name(folder):
    loaded = empty_bank()
    assert load_memory(loaded, folder, "renamed") == "renamed"
    assert load_memory(loaded, folder) == "both"
    rows = read(loaded, ["renamed", "both"], {"input_ids": plain_batch(1)["input_ids"].expand(2, -1)})
    torch.testing.assert_close(rows[0], rows[1])


# --- peft ------------------------------------------------------------------------------------------------------------


def backbone(family, cut):
    """The same model at every call, dense or ragged."""
    model = tiny_model(family)
    groups = prunable_groups(model)
    return cut_model(model, groups, random_mask(groups)) if cut else model


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_peft_reads_the_adapter_of_a_dense_and_of_a_cut_backbone(tmp_path, family, cut):
    memories = empty_bank(backbone(family, cut))
    for domain, spec in {"de": LoraSpec(3, 5.5), "fr": LoraSpec(2, 4.0, ["o_proj", "up_proj"])}.items():
        memories.add(domain, spec, KVSpec(4))
        fill_(memories, domain)
        written(tmp_path / domain, memories, domain)
    theirs = PeftModel.from_pretrained(backbone(family, cut), tmp_path / "de", adapter_name="de")
    theirs.load_adapter(tmp_path / "fr", adapter_name="fr")
    ours = empty_bank(backbone(family, cut))
    for domain in ("de", "fr"):
        ours.add(domain, memories.lora(domain), None, memories.weights(domain))  # with KV off
        theirs.set_adapter(domain)
        expected = read(ours, [domain] * 2)
        tolerance = 1e-5 * float(expected.abs().max())
        torch.testing.assert_close(theirs(**plain_batch(2), use_cache=False).logits, expected, atol=tolerance, rtol=0)
        assert (expected - read(ours, [None] * 2)).abs().max() > 0.1
    about = json.loads((tmp_path / "de" / ADAPTER_CONFIG).read_text())
    assert about["task_type"] == "CAUSAL_LM" and about["inference_mode"] is True and about["peft_type"] == "LORA"
    assert about["base_model_name_or_path"] == "tiny/model"
    assert about["target_modules"] == sorted(about["target_modules"]), "peft's sets have no order of their own"


def test_the_adapter_file_is_the_one_peft_writes(tmp_path):
    """Same keys, without the adapter's name."""
    memories = mixed()
    written(tmp_path / "ours", memories, "other")
    theirs = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    ours, back = load_file(tmp_path / "ours" / ADAPTER), load_file(tmp_path / "theirs" / ADAPTER)
    assert ours.keys() == back.keys()
    assert all(torch.equal(ours[name], back[name]) for name in ours)
    mine, other = (json.loads((tmp_path / name / ADAPTER_CONFIG).read_text()) for name in ("ours", "theirs"))
    assert mine | {"target_modules": None} == other | {"target_modules": None}
    assert set(mine["target_modules"]) == set(other["target_modules"])


# --- what does not belong --------------------------------------------------------------------------------------------


def refuse(folder, message, name=None, expect=MANIFEST, loaded=None):
    """Loading stops with one line and leaves the bank as it was."""
    loaded = loaded or empty_bank()
    before = list(loaded.domains), sum(1 for _ in loaded.model.modules()), list(loaded.kv)
    with pytest.raises(KoffError, match=message) as caught:
        load_memory(loaded, folder, name, expect)
    assert "\n" not in str(caught.value)
    assert before == (list(loaded.domains), sum(1 for _ in loaded.model.modules()), list(loaded.kv))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"base": HOME["base"] | {"hash": "c" * 64, "id": "x/y"}}, r"to base 'tiny/model' \(hash bbb.*made from 'x/y'"),
        (
            {"mask_hash": "n" * 64},
            r"another mask \(hash mmm.*nnn.*: load it on the backbone of its own run, or train",
        ),
        ({"base": HOME["base"] | {"tokenizer_hash": "u" * 64}}, r"another tokenizer \(hash ttt.*uuu.*: use the token"),
        ({"layout": "masked"}, r"has 'cut' shapes, a backbone of layout 'masked' takes 'full' ones: export its run"),
    ],
)
def test_a_memory_of_another_home_is_refused(folder, other, message):
    refuse(folder, message, expect=replace(MANIFEST, **other))


def test_a_memory_that_is_there_already_is_refused(folder):
    loaded = empty_bank()
    load_memory(loaded, folder)
    refuse(folder, "there is a memory 'both' already: remove it first, or give this one another name", loaded=loaded)


@pytest.mark.parametrize("name", ["../x", "a/b", ""])
def test_an_unsafe_name_is_refused(folder, name):
    refuse(folder, "is not safe as a file name", name)
    rewrite(folder, domain=name)
    refuse(folder, "is not safe as a file name.*get it again")
    with pytest.raises(KoffError, match="is not safe as a file name"):
        write_memory(folder.parent / "new", MemoryCard(name, {}, "", "", "cut", None, None), None, None)


def rewrite(folder, **changes):
    """Change entries of memory.json."""
    path = folder / CARD
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rehash(folder, sound=True):
    """Make memory.json agree with the files that are there, as far as they can be read."""
    files = {p.name: {"sha256": hash_file(p), "size": p.stat().st_size} for p in folder.iterdir() if p.name != CARD}
    tensors = [tensor for p in folder.glob("*.safetensors") if sound for tensor in load_file(p).values()]
    rewrite(folder, files=files, parameters=sum(tensor.numel() for tensor in tensors))


def test_a_file_that_is_missing_extra_changed_or_cut_short_is_refused(tmp_path):
    memories = mixed()
    for file in (ADAPTER, ADAPTER_CONFIG, KV_FILE):
        for fault, message in {
            "missing": f"{file} is missing",
            "cut": f"{file} has [0-9]+ bytes instead of [0-9]+: it is damaged",
            "changed": f"{file} was changed after it was written",
        }.items():
            folder = tmp_path / f"{file}-{fault}"
            written(folder, memories, "both")
            content = (folder / file).read_bytes()
            if fault == "missing":
                (folder / file).unlink()
            else:
                changed = content[:-1] + bytes([content[-1] ^ 1])
                (folder / file).write_bytes(content[:-5] if fault == "cut" else changed)
            refuse(folder, message)
    (folder / "more.bin").touch()
    refuse(folder, "more.bin does not belong there")


def test_an_empty_folder_and_that_of_an_artifact_are_refused(tmp_path):
    refuse(tmp_path, "holds no memory.json, so it is not the folder of a memory")
    (tmp_path / "memories").mkdir()
    refuse(tmp_path, "memories holds some")
    refuse(tmp_path / "none", "holds no memory.json")


@pytest.mark.parametrize("file", [ADAPTER, KV_FILE])
def test_a_corrupted_safetensors_file_is_refused(folder, file):
    (folder / file).write_bytes(b"\xff" * 64)
    rehash(folder, sound=False)
    refuse(folder, f"{file} is not a sound safetensors file")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (ADAPTER, lambda t: t.bfloat16(), r"lora_A.weight is torch.bfloat16 \[3, .*due is torch.float32"),
        (ADAPTER, lambda t: t[:, :-1], r"lora_A.weight is torch.float32 \[3, .*due is torch.float32 \[3,"),
        (KV_FILE, lambda t: t.half(), r"are torch.float32 \[heads, slots, head size\].*layers.0.key is torch.float16"),
        (KV_FILE, lambda t: t[:, :-1], r"memory.json speaks of 5 slots, kv_memory.safetensors holds 4"),
        (KV_FILE, lambda t: t[:1], r"\[\(1, 16\), \(1, 16\)\] but the model has \[\(2, 16\), \(2, 16\)\]"),
    ],
)
def test_a_wrong_dtype_or_shape_is_refused(folder, file, change, message):
    tensors = {name: change(tensor).contiguous() for name, tensor in load_file(folder / file).items()}
    save_file(tensors, folder / file)
    rehash(folder)
    refuse(folder, message)


@pytest.mark.parametrize(
    ("file", "message"), [(ADAPTER, r"q_proj.lora_A.weight is missing"), (KV_FILE, r"layers.0.key is missing")]
)
def test_a_tensor_that_is_missing_is_refused(folder, file, message):
    tensors = load_file(folder / file)
    del tensors[next(name for name in sorted(tensors) if message.split(".lora")[0].split(" is")[0] in name)]
    save_file(tensors, folder / file)
    rehash(folder)
    refuse(folder, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "has format version 2, this koff-lightning reads 1"),
        ({"format_version": None}, "has format version None"),
        ({"more": 1}, "has an unknown entry 'more'"),
        ({"lora": {"rank": 0, "alpha": 6.0, "targets": ["q_proj"]}}, r"lora.rank must be between.*get it again"),
        ({"lora": {"rank": 3}}, "get it again"),
        ({"lora": {"rank": 3, "colour": "red"}}, r"cannot be used \(lora has no option 'colour'\): get it again"),
        ({"lora": {}}, "disagree about rank, alpha, targets or layers"),
        ({"lora": []}, r"\(lora must be a dictionary, and is list\): get it again"),
        ({"lora": {"rank": "3"}}, r"lora.rank must be a count, and is str '3'"),
        ({"lora": {"targets": [{}]}}, "an entry of lora.targets must be str, and is dict"),
        ({"files": {name: {"sha256": ""} for name in (ADAPTER, "adapter_config.json", KV_FILE)}}, "lacks size"),
        ({"lora": {"rank": 3, "alpha": 6.0, "targets": ["q_proj"]}}, "disagree about rank, alpha, targets or layers"),
        ({"kv": {"slots": "many"}}, "kv lacks positions"),
        ({"kv": {"slots": None, "positions": [-5, -1], "source_text_hash": None}}, "slots must be a count, and is no"),
        ({"kv": {"slots": 5, "positions": "x", "source_text_hash": None}}, "positions must be a list, and is str 'x'"),
        ({"parameters": "x"}, "parameters must be a count, and is str 'x'"),
        ({"parameters": 7}, r"memory.json speaks of 7 parameters, its files hold \d+"),
        ({"kv": {"slots": 5, "positions": [-5, -1], "source_text_hash": "no hex"}}, "memory .*both: "),
        ({"kv": None}, "must name the files adapter_config.json, .* and no other"),
        ({"base": {"id": "x"}}, "base lacks hash"),
        ({"mask_hash": None}, "mask_hash must be str, and is nothing"),
        ({"files": {"../../x": {"sha256": "", "size": 0}}}, "must name the files"),
        ({"domain": 3}, "domain must be str, and is int 3"),
    ],
)
def test_a_card_that_cannot_be_used_is_refused(folder, changes, message):
    rewrite(folder, **changes)
    refuse(folder, message)


def test_a_card_that_is_not_json_or_lacks_something_is_refused(folder):
    content = json.loads((folder / CARD).read_text())
    del content["shapes"]
    (folder / CARD).write_text(json.dumps(content))
    refuse(folder, "memory.json lacks 'shapes'")
    (folder / CARD).write_text("{")
    refuse(folder, "memory.json is not valid JSON")


def test_writing_over_something_or_half_a_memory_is_refused(folder):
    memories = mixed()
    with pytest.raises(KoffError, match="is not empty"):
        written(folder, memories, "both")
    card = MemoryCard(**asdict(read_card(folder)))
    with pytest.raises(KoffError, match="'both' and its tensors disagree about which parts it has"):
        write_memory(folder.parent / "half", card, lora_state(memories, "both"), None)


def test_a_memory_of_a_cut_backbone_does_not_fit_the_dense_one(tmp_path):
    memories = empty_bank(backbone("llama", cut=True))
    memories.add("de", LoraSpec(2), None)
    memories.add("fr", None, KVSpec(4))
    for domain in ("de", "fr"):
        written(tmp_path / domain, memories, domain)
        refuse(tmp_path / domain, "does not fit the backbone" if domain == "de" else "but the model has")


def test_slots_alone_are_named_by_layer(tmp_path):
    memories = mixed()
    written(tmp_path / "kv", memories, "kv")
    tensors = load_file(tmp_path / "kv" / KV_FILE)
    assert sorted(tensors) == ["layers.0.key", "layers.0.value", "layers.1.key", "layers.1.value"]
    again = KVMemory.from_tensors(tensors)
    assert all(torch.equal(a, b) for a, b in zip(again.layer(1), memories.slots("kv").layer(1), strict=True))
