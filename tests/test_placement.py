"""Memories in some layers only: which these are, and that everything downstream knows it."""

import json
import re
import weakref
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from test_analysis_runs import held_out
from tiny_artifact import DOMAINS, left_padded, tiny_artifact, tiny_decomposition
from tiny_cases import plain_batch
from tiny_command import small_fits
from tiny_memories import MANIFEST, empty_bank, fill_, read, written
from tiny_models import FAMILIES, tiny_model
from torch.nn import functional as F

from koff_lightning import KoffError, KVSpec, LoraSpec, load_decomposed
from koff_lightning import attention as attention_module
from koff_lightning.artifact.checkpoint import from_checkpoint
from koff_lightning.artifact.compose import compose
from koff_lightning.artifact.export import export
from koff_lightning.artifact.folder import read_manifest
from koff_lightning.artifact.memory_files import ADAPTER_CONFIG, load_memory
from koff_lightning.backbone import attention_modules, layer_of
from koff_lightning.callbacks import PlaceMemories
from koff_lightning.cli import main
from koff_lightning.listed_files import CARD
from koff_lightning.loading import load_backbone
from koff_lightning.memory import MemoryBank
from koff_lightning.placement import placed, shown
from koff_lightning.studies.analysis import adapter_norms, attention_mass, open_run
from koff_lightning.training.checkpoints import newest_checkpoint

# peft asks transformers for something by its former name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PAPER = ["k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
TOP = {"lora": LoraSpec(3, 6.0, PAPER, layers="top:1"), "kv": KVSpec(5, layers="top:50%")}
UNLIKE = {"lora": LoraSpec(3, 6.0, layers=[0]), "kv": KVSpec(5, layers=[1])}
WORDS = ["", "top", "top:", "top:0", "top:-1", "top:0%", "top:101%", "top:1.5", "top:x", "bottom:2"]
LAYOUTS = ("ragged", "uniform", "deci", "masked", "merged")


def filled(lora, kv, depth=4, family="llama"):
    """A bank with one memory full of noise; the same noise for the same layers, whatever the others have."""
    bank = empty_bank(tiny_model(family, num_hidden_layers=depth))
    bank.add("de", lora, kv)
    fill_(bank, "de")
    return bank


def said_by(argv, capsys):
    """The one line by which a command refuses."""
    assert main(list(map(str, argv))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("koff: ")]
    assert len(lines) == 1
    return lines[0]


# ------------------------------------------------------------------------------------------------------ the words


@pytest.mark.parametrize(
    ("words", "depth", "layers"),
    [
        ("all", 3, [0, 1, 2]),
        ("top:1", 3, [2]),
        ("top:18", 28, list(range(10, 28))),
        ("top:64%", 28, list(range(10, 28))),
        ("top:64.3%", 28, list(range(10, 28))),
        ("top:1%", 28, [27]),
        ("top:100%", 3, [0, 1, 2]),
        ([2, 0], 3, [0, 2]),
    ],
)
def test_words_stand_for_layers(words, depth, layers):
    assert placed(words, depth) == layers


@pytest.mark.parametrize("kind", [LoraSpec, KVSpec])
@pytest.mark.parametrize("words", [*WORDS, [], [-1], [1, 1], ["1"]])
def test_other_words_are_refused(words, kind):
    option = "lora.layers" if kind is LoraSpec else "kv.layers"
    with pytest.raises(KoffError, match=rf"{option} must be all, top:18 .*; got {re.escape(repr(words))}"):
        kind(layers=words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([0, 2], "names layer 2, but the backbone has 2 layers, 0 to 1"),
        ("top:3", "is top:3, but the backbone has only 2 layers: give top:2 or all"),
    ],
)
def test_layers_that_do_not_exist_are_refused_and_nothing_is_changed(words, message):
    bank = empty_bank()
    for part in ({"lora": LoraSpec(2, layers=words), "kv": None}, {"lora": None, "kv": KVSpec(3, layers=words)}):
        with pytest.raises(KoffError, match=message):
            bank.add("de", **part)
    assert not bank.domains and not bank.kv and not bank.lora_parameters()


def test_layers_are_shown_as_people_say_them():
    assert [shown(layers) for layers in ([4], [0, 1, 2], [0, 2, 3, 7])] == ["4", "0-2", "0, 2-3, 7"]


# ------------------------------------------------------------------------------------------------------- the bank


def test_a_list_of_all_layers_is_the_default_bit_for_bit(tmp_path):
    banks = []
    for name, layers in {"default": "all", "list": [3, 2, 1, 0], "top": "top:100%"}.items():
        banks.append(filled(LoraSpec(3, 6.0, layers=layers), KVSpec(5, layers=layers)))
        written(tmp_path / name, banks[-1], "de")
    assert len({tuple(bank.state_dict()) for bank in banks}) == 1
    assert len({str(read(bank, ["de", None]).tolist()) for bank in banks}) == 1
    for file in (tmp_path / "default").iterdir():
        for other in ("list", "top"):
            assert file.read_bytes() == (tmp_path / other / file.name).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grad", [True, False])
def test_memories_in_the_top_layers_are_full_ones_without_the_lower_parts(family, grad):
    whole = filled(LoraSpec(3, 6.0), KVSpec(5), family=family)
    top = MemoryBank(tiny_model(family, num_hidden_layers=4).requires_grad_(False))
    top.add("de", LoraSpec(3, 6.0, layers="top:2"), KVSpec(5, layers="top:3"))
    with torch.no_grad():
        for path, linear in whole._linears.items():
            if layer_of(path) < 2:
                linear.lora_B["koff_de"].weight.zero_()
            else:
                ours = top._linears[path]
                for half in ("lora_A", "lora_B"):
                    getattr(ours, half)["koff_de"].weight.copy_(getattr(linear, half)["koff_de"].weight)
        for layer in (1, 2, 3):
            top.slots("de")._write_(layer, *whole.slots("de").layer(layer))
    del attention_modules(whole.model)[0].koff_memory
    with torch.set_grad_enabled(grad):
        for rows in (["de"] * 3, ["de", None, "de"]):
            expected = read(whole, rows)
            assert torch.equal(read(top, rows), expected)
            assert (expected - read(top, [None] * 3)).abs().max() > 0.1


def test_what_is_trained_is_what_is_placed():
    bank = filled(LoraSpec(3, 6.0, PAPER, layers="top:2"), KVSpec(5, layers=[1]))
    trained = {name for name, p in (*bank.model.named_parameters(), *bank.named_parameters()) if p.requires_grad}
    paths = {f"model.layers.{layer}" for layer in (2, 3)}
    assert {name.split(".self_attn")[0].split(".mlp")[0] for name in trained if "lora_" in name} == paths
    assert len([name for name in trained if "lora_" in name]) == 2 * len(PAPER) * 2
    assert {name for name in trained if "lora_" not in name} == {"kv.koff_de.key.1", "kv.koff_de.value.1"}
    assert bank.size("de") == sum(p.numel() for p in bank.lora_parameters()) + 2 * 5 * 2 * 16
    read(bank, ["de", None]).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in (*bank.lora_parameters(), *bank.kv_parameters()))


def test_a_layer_without_slots_takes_the_plain_path(monkeypatch):
    bank = filled(None, KVSpec(5, layers=[1, 3]))
    plain, calls = attention_module.sdpa_attention_forward, []
    monkeypatch.setattr(
        attention_module, "sdpa_attention_forward", lambda m, *a, **k: calls.append(m.layer_idx) or plain(m, *a, **k)
    )
    read(bank, ["de", "de"])
    assert calls == [0, 2]
    assert [hasattr(a, "koff_memory") for a in attention_modules(bank.model)] == [False, True, False, True]


def test_a_layer_whose_slots_are_let_go_takes_the_plain_path_again():
    bank = filled(None, KVSpec(5))
    bank.keep_layers("kv", [1, 3])
    assert [hasattr(a, "koff_memory") for a in attention_modules(bank.model)] == [False, True, False, True]


def test_a_memory_of_one_layer_is_active_too_while_another_is_initialised():
    bank = filled(None, KVSpec(5, layers=[1]))
    text = plain_batch(1)["input_ids"][0]
    with pytest.raises(KoffError, match="turn the memories off first"), bank.scope(bank.routes_of(["de"])):
        bank.slots("de").initialise_(bank.model, text)


@torch.no_grad()
@pytest.mark.parametrize("part", ["lora", "kv"])
def test_layers_that_are_let_go_of_are_freed(part):
    bank = filled(LoraSpec(3, 6.0), KVSpec(5))
    bank.activate(["de", "de"])
    bank.model(**plain_batch(2), use_cache=False)  # what rows read is kept for the next token, and to be let go of
    parameters = bank.lora_parameters() if part == "lora" else bank.kv_parameters()
    before = [weakref.ref(parameter) for parameter in parameters]
    del parameters
    bank.keep_layers(part, [1, 3])
    left = [ref for ref in before if ref() is not None]
    assert len(left) == len(before) // 2


@torch.no_grad()
def test_memories_of_unlike_placement_share_a_batch():
    bank = filled(LoraSpec(3, 6.0, layers="top:1"), KVSpec(5, layers=[0, 2]))
    specs = {"fr": (LoraSpec(2, 4.0, layers=[0, 1]), KVSpec(3, layers=[2, 3])), "law": (None, KVSpec(2))}
    for domain, spec in specs.items():
        bank.add(domain, *spec)
        fill_(bank, domain)
    rows, ids = ["fr", None, "de", "law", "fr"], plain_batch(5)["input_ids"]
    together = read(bank, rows, {"input_ids": ids})
    for row, domain in enumerate(rows):
        alone = read(bank, [domain], {"input_ids": ids[row : row + 1]})
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5 * float(alone.abs().max()), rtol=0)


# ------------------------------------------------------------------------------------------ what slots start from


def test_slots_of_noise_need_no_text_and_may_all_be_trained():
    bank = empty_bank()
    bank.add("de", None, KVSpec(200, init="normal", std=0.5, frozen_first=False))
    memory = bank.slots("de")
    assert memory.initialised and memory.source_hash is None
    assert [tuple(p.shape) for p in bank.kv_parameters("de")] == [(2, 200, 16)] * 4
    for parameter in bank.kv_parameters("de"):
        assert float(parameter.detach().std()) == pytest.approx(0.5, rel=0.05)
        assert abs(float(parameter.detach().mean())) < 0.05
    read(bank, ["de"]).square().mean().backward()
    assert all(p.grad[:, 0].any() for p in bank.kv_parameters("de")), "slot 0 learns"
    assert KVSpec(1, frozen_first=False).slots == 1


@pytest.mark.parametrize("frozen_first", [True, False])
@torch.no_grad()
def test_slots_from_text_are_the_same_whether_the_first_is_frozen(frozen_first):
    bank = empty_bank()
    bank.add("de", None, KVSpec(5, layers=[1], frozen_first=frozen_first))
    assert not bank.slots("de").initialised
    bank.slots("de").initialise_(bank.model, torch.arange(3, 9))
    whole = empty_bank()
    whole.add("de", None, KVSpec(5))
    whole.slots("de").initialise_(whole.model, torch.arange(3, 9))
    for ours, theirs in zip(bank.slots("de").layer(1), whole.slots("de").layer(1), strict=True):
        assert torch.equal(ours, theirs)
    assert bank.kv_parameters()[0].shape[1] == 5 - frozen_first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "zeros"}, "kv.init must be text or normal; got 'zeros'"),
        ({"std": 0.0}, "kv.std must be positive and finite; got 0.0"),
        ({"std": float("nan")}, "kv.std must be positive"),
        ({"slots": 1}, r"kv.slots must be between 2 and 8192 \(slot 0 is frozen\); got 1"),
        ({"slots": 0, "frozen_first": False}, "kv.slots must be between 1 and 8192; got 0"),
    ],
)
def test_bad_starts_are_refused(options, message):
    with pytest.raises(KoffError, match=message):
        KVSpec(**options)


# -------------------------------------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_stock_peft_reads_the_adapter_of_some_layers(tmp_path, family):
    bank = filled(LoraSpec(3, 5.5, PAPER, layers=[1, 3]), KVSpec(4, layers=[0]), family=family)
    written(tmp_path / "de", bank, "de")
    assert json.loads((tmp_path / "de" / ADAPTER_CONFIG).read_text())["layers_to_transform"] == [1, 3]
    theirs = PeftModel.from_pretrained(tiny_model(family, num_hidden_layers=4), tmp_path / "de")
    assert {layer_of(n.split("model.", 1)[1]) for n, _ in theirs.named_parameters() if "lora_" in n} == {1, 3}
    alone = empty_bank(tiny_model(family, num_hidden_layers=4))
    alone.add("de", bank.lora("de"), None, bank.weights("de"))  # with KV off
    expected = read(alone, ["de"] * 2)
    tolerance = 1e-5 * float(expected.abs().max())
    torch.testing.assert_close(theirs(**plain_batch(2), use_cache=False).logits, expected, atol=tolerance, rtol=0)
    again = empty_bank(tiny_model(family, num_hidden_layers=4))
    load_memory(again, tmp_path / "de", expect=MANIFEST)
    assert torch.equal(read(again, ["de", None]), read(bank, ["de", None]))
    assert again.slots("de").layers == [0] and again.lora("de").layers == [1, 3]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv": {"layers": [1]}}, "speaks of slots in layers 1, kv_memory.safetensors holds those of 0"),
        ({"kv": {"layers": None}}, "layers must be a list, and is nothing"),
        ({"kv": {"layers": []}}, r"layers must be all, .*; got \[\]"),
        ({"kv": {"layers": [0, "1"]}}, "an entry of layers must be a count, and is str '1'"),
        ({"lora": {"layers": [1, 2]}}, "disagree about rank, alpha, targets or layers"),
        ({"lora": {"layers": "top:1"}}, "layers is a list of numbers where it is said, not 'top:1'"),
        ({"lora": {"layers": [10**9]}}, "disagree about"),
    ],
)
def test_a_card_that_says_other_layers_is_refused(tmp_path, changes, message):
    bank = filled(LoraSpec(3, 6.0, layers=[1]), KVSpec(4, layers=[0]))
    written(tmp_path / "de", bank, "de")
    card = json.loads((tmp_path / "de" / CARD).read_text())
    for part, entries in changes.items():
        card[part] |= entries
    (tmp_path / "de" / CARD).write_text(json.dumps(card))
    with pytest.raises(KoffError, match=message):
        load_memory(empty_bank(tiny_model("llama", num_hidden_layers=4)), tmp_path / "de")


def test_a_memory_of_a_shallower_or_deeper_model_is_refused(tmp_path):
    written(tmp_path / "all", filled(None, KVSpec(4), depth=2), "de")
    written(tmp_path / "deep", filled(None, KVSpec(4, layers=[3])), "de")
    with pytest.raises(KoffError, match=r"heads, head size\) \[\(2, 16\), \(2, 16\)\] but the model has"):
        load_memory(empty_bank(tiny_model("llama", num_hidden_layers=4)), tmp_path / "all")
    with pytest.raises(KoffError, match="of some layers I from 0 to 1: "):
        load_memory(empty_bank(), tmp_path / "deep")


@torch.no_grad()
def test_memories_of_unlike_placement_are_composed_where_that_has_a_meaning():
    bank = filled(LoraSpec(3, 6.0, ["q_proj"], layers=[0, 1]), KVSpec(4, layers=[2, 3]))
    bank.add("fr", LoraSpec(2, 1.0, ["up_proj"], layers=[1, 2]), KVSpec(3, layers=[2, 3]))
    bank.add("law", None, KVSpec(3))
    for domain in ("fr", "law"):
        fill_(bank, domain)
    compose(bank, "de", "fr", "both", (0.7, -1.2))
    assert bank.lora("both").layers == [0, 1, 2] and bank.slots("both").layers == [2, 3]
    weights = {domain: bank.weights(domain) for domain in ("de", "fr", "both")}
    for name in (name for name in weights["both"] if "lora_A" in name):
        up = name.replace("lora_A", "lora_B")
        due = sum(
            factor * bank.lora(d).alpha / bank.lora(d).rank * weights[d][up] @ weights[d][name]
            for d, factor in {"de": 0.7, "fr": -1.2}.items()
            if name in weights[d]
        )
        got = weights["both"][up] @ weights["both"][name]
        torch.testing.assert_close(got, due + torch.zeros_like(got), atol=1e-6, rtol=0)
    with pytest.raises(KoffError, match=r"unlike layers cannot be joined: 2-3 \(de\) and 0-3 \(law\)"):
        compose(bank, "de", "law", "no")


@pytest.mark.parametrize("memories", [TOP, UNLIKE], ids=["top", "unlike"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_proven(tmp_path, layout, memories):
    module = tiny_decomposition(tmp_path, uniform=layout == "uniform", **memories)
    report = export(module, tmp_path / "out", layout, "fr" if layout == "merged" else None)
    assert report["passed"] and report["greedy"] == "equal" and report["max_abs_diff"] < 1e-5
    about = read_manifest(tmp_path / "out").domains["fr"]
    assert about["kv_layers"] == [1]
    assert about.get("lora_layers") == (None if layout == "merged" else placed(memories["lora"].layers, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_proven(tmp_path, family):
    assert export(tiny_decomposition(tmp_path, family, **TOP), tmp_path / "out")["passed"]


def test_the_tools_know_the_placement(tmp_path, capsys):
    made = tiny_artifact(tmp_path, **UNLIKE)
    assert main(["inspect", str(made.folder)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "LoRA in layers 0, KV in layers 1" in line]
    assert len(lines) == len(DOMAINS)

    assert main(["memory", "remove", str(made.folder), "fr"]) == 0
    assert main(["memory", "add", str(made.folder), str(made.folder / "memories" / "de"), "--as", "copy"]) == 0
    ids, mask = left_padded()
    with torch.no_grad():
        expected = made.gated(ids, mask, ["de", None, "law", "de"])[mask.bool()]
        got = load_decomposed(made.folder)(ids, mask, domains=["copy", None, "law", "de"]).logits[mask.bool()]
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert main(["memory", "compose", str(made.folder), "de", "law", "--as", "joint"]) == 0
    assert read_manifest(made.folder).domains["joint"]["kv_layers"] == [1]
    load_decomposed(made.folder).save_pretrained(tmp_path / "again")
    assert read_manifest(tmp_path / "again").domains == read_manifest(made.folder).domains

    said = said_by(["memory", "cartridge", made.folder, "de", "--out", tmp_path / "c"], capsys)
    assert "a CARTRIDGE holds slots in all 2 layers, this memory has some in 1 alone" in said
    assert main(["inspect", str(made.folder), "--check", "hf,peft"]) == 0
    assert "tried, and failed: a CARTRIDGE holds slots in all 2 layers" in " ".join(capsys.readouterr().out.split())


def test_a_manifest_with_other_words_for_layers_is_refused(tmp_path):
    made = tiny_artifact(tmp_path, **UNLIKE)
    content = json.loads((made.folder / "koff.json").read_text())
    for value in ("top:1", [], [-1], [[0]]):
        content["domains"]["de"]["kv_layers"] = value
        (made.folder / "koff.json").write_text(json.dumps(content))
        with pytest.raises(KoffError, match="koff.json cannot be used"):
            read_manifest(made.folder)


@torch.no_grad()
def test_generation_with_a_cache_is_that_of_whole_forwards(tmp_path):
    made = tiny_artifact(tmp_path, **UNLIKE)
    model, rows = load_decomposed(made.folder), ["de", None, "law", "fr"]
    ids, mask = left_padded()
    for implementation in ("dynamic", "static"):
        new = model.generate(ids, mask, rows, max_new_tokens=4, cache_implementation=implementation)
        whole, seen = ids, mask
        for _ in range(4):
            best = model(whole, seen, domains=rows).logits[:, -1].argmax(-1, keepdim=True)
            whole, seen = torch.cat([whole, best], 1), F.pad(seen, (0, 1), value=1)
        assert torch.equal(new, whole)


def test_an_analysis_opens_it_and_finds_nothing_where_nothing_is(tmp_path):
    made = tiny_artifact(tmp_path, **UNLIKE)
    opened = open_run(made.folder)
    assert opened.memories.slots("de").layers == [1]
    norms = adapter_norms(opened)
    assert set(norms["layer"]) == {0}
    mass = attention_mass(opened, held_out(["de"], rows=1)).groupby("layer")["mass"].max()
    assert mass[0] == 0 and mass[1] > 0


# ----------------------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on koff-tiny with memories in few layers, in the paper's way, and what it was started with."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        model = {"sparsity": {"target": 0.1}, "lora": {"rank": 2, "targets": PAPER, "layers": "top:2"}}
        model |= {"kv": {"slots": 4, "layers": [1, 5], "init": "normal", "frozen_first": False}}
        options = {"trainer": {"max_steps": 6}, "model": model}
        with small_fits(folder, patch, **options) as fit:
            assert fit(folder / "run") == 0
            yield SimpleNamespace(folder=folder, fit=fit, checkpoint=newest_checkpoint([folder / "run"]))


def test_a_run_trains_and_exports_what_is_placed(run):
    state = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    adapted = {layer_of(name) for name in state if ".lora_A." in name}
    assert adapted == {4, 5}
    slots = {n.rpartition("koff_de.")[2]: v.shape[1] for n, v in state.items() if "kv.koff_de." in n and v.ndim == 3}
    kinds = [f"{kind}.{layer}" for kind in ("key", "value") for layer in (1, 5)]
    assert slots == dict.fromkeys(kinds, 4) | dict.fromkeys([f"sink_{kind}" for kind in kinds], 0)
    folder = next((run.folder / "run").rglob("koff.json"), None).parent
    assert json.loads((folder / "export_report.json").read_text())["passed"]
    about = read_manifest(folder).domains["de"]
    assert (about["lora_layers"], about["kv_layers"]) == ([4, 5], [1, 5])
    assert about["parameters"] <= from_checkpoint(run.checkpoint).memories.size("de")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.lora.layers=top:3"], r"lora.layers is \[4, 5\] there and \[3, 4, 5\] here"),
        (["--model.lora.layers=all"], r"lora.layers is \[4, 5\] there and all here"),
        (["--model.kv.layers=[1, 4]"], r"kv.layers is \[1, 5\] there and \[1, 4\] here"),
        (["--model.kv.frozen_first=true"], "kv.frozen_first is False there and True here"),
    ],
)
@pytest.mark.parametrize("way", ["--ckpt_path", "--model.warm_start"])
def test_another_placement_is_no_place_to_go_on(run, tmp_path, capsys, way, options, message):
    assert run.fit(tmp_path, f"{way}={run.checkpoint}", "--trainer.max_steps=8", *options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("koff: ")]
    assert len(lines) == 1 and re.search(message, lines[0])


def test_the_same_placement_in_other_words_is_the_same(run, tmp_path):
    options = ["--model.lora.layers=[5, 4]", "--model.kv.init=text", "--model.kv.std=0.1"]
    assert run.fit(tmp_path, f"--model.warm_start={run.checkpoint}", "--trainer.max_steps=1", *options) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.lora.layers=top:7"], "lora.layers is top:7, but the backbone has only 6 layers"),
        (["--model.kv.layers=[5, 6]"], "kv.layers names layer 6, but the backbone has 6 layers, 0 to 5"),
        (["--model.kv.layers=[]"], r"kv.layers must be all, top:18 .*; got \[\]"),
        (["--model.lora.layers=upper"], "lora.layers must be all, top:18 .*; got 'upper'"),
        (["--model.kv.init=zeros"], "kv.init must be"),
    ],
)
def test_a_run_refuses_bad_placement_in_one_line(run, tmp_path, capsys, options, message):
    assert run.fit(tmp_path, *options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("koff: ")]
    assert len(lines) == 1 and re.search(message, lines[0])


def test_checkpoints_from_before_there_was_a_choice_load(tmp_path, monkeypatch):
    model = {"sparsity": {"target": 0.1}, "lora": {"rank": 2}, "kv": {"slots": 4}}
    with small_fits(tmp_path, monkeypatch, trainer={"max_steps": 2}, export={"enabled": False}, model=model) as fit:
        assert fit(tmp_path / "run") == 0
        now = newest_checkpoint([tmp_path / "run"])
        checkpoint = torch.load(now, weights_only=True)
        for about in (checkpoint["koff"], checkpoint["hyper_parameters"]):
            for part in ("lora", "kv"):
                about[part] = {k: v for k, v in about[part].items() if k in ("rank", "alpha", "targets", "slots")}
        torch.save(checkpoint, tmp_path / "old.ckpt")
        old, new = from_checkpoint(tmp_path / "old.ckpt").state_dict(), from_checkpoint(now).state_dict()
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)
        assert fit(tmp_path / "on", f"--ckpt_path={tmp_path / 'old.ckpt'}", "--trainer.max_steps=3") == 0


# ------------------------------------------------------------------------------------- layers that a run chooses


def placing(folder, monkeypatch, **placement):
    """Small runs on koff-tiny that choose; 8 steps, rounds after steps 2 and 5."""
    model = {"sparsity": {"target": 0.1}, "lora": {"rank": 2}, "kv": {"slots": 4}}
    options = {"trainer": {"max_steps": 8}, "model": model}
    chosen = {"keep": 0.4, "first": 0.25, "last": 0.6, "rounds": 2, "window": 2} | placement
    return small_fits(folder, monkeypatch, **options, placement=chosen)


def test_a_run_drops_layers_until_the_budget_is_met_and_goes_on_as_if_they_had_never_been(tmp_path, monkeypatch):
    """The checkpoint, its optimizer and the artifact are those of an explicit list; the proof passes."""
    with placing(tmp_path, monkeypatch) as fit:
        assert fit(tmp_path / "run") == 0
        last = newest_checkpoint([tmp_path / "run"])
        checkpoint = torch.load(last, weights_only=True)
        placement = checkpoint["koff"]["placement"]
        about = read_manifest(tmp_path / "run" / "artifact").domains["de"]
        assert (about.get("lora_layers", [*range(6)]), about.get("kv_layers", [*range(6)])) == tuple(placement.values())
        assert json.loads((tmp_path / "run" / "artifact" / "export_report.json").read_text())["passed"]
        whole = MemoryBank(load_backbone("koff-tiny"), ["de"], LoraSpec(2), KVSpec(4))
        module = from_checkpoint(last)
        size = module.memories.size("de")
        assert size <= 0.4 * whole.size("de") < size + max(whole.sizes("de").values())
        sizes = module.memories.sizes("de")
        assert {part: sorted(layer for own, layer in sizes if own == part) for part in placement} == placement
        trained = [p for p in module.parameters() if p.requires_grad]
        state = checkpoint["optimizer_states"][0]
        tracked = sum(len(group["params"]) for group in state["param_groups"])
        assert tracked == len(trained) + 2  # the multipliers
        explicit = [f"--model.{part}.layers={layers}" for part, layers in placement.items()]
        assert fit(tmp_path / "on", f"--model.warm_start={last}", "--placement.keep=null", *explicit) == 0


def test_a_run_that_was_stopped_chooses_as_the_one_that_was_not(tmp_path, monkeypatch):
    with placing(tmp_path, monkeypatch, keep=0.5) as fit:
        quick = ["--checkpoint.save_top_k=-1", "--export.enabled=false"]
        assert fit(tmp_path / "whole", *quick) == 0
        straight = torch.load(newest_checkpoint([tmp_path / "whole"]), weights_only=True)
        early = next((tmp_path / "whole").rglob("*step=4.ckpt"))
        assert torch.load(early, weights_only=True)["koff"]["placement"].keys() == {"lora", "kv"}
        assert fit(tmp_path / "again", f"--ckpt_path={early}", *quick) == 0
        resumed = torch.load(newest_checkpoint([tmp_path / "again"]), weights_only=True)
    assert resumed["koff"]["placement"] == straight["koff"]["placement"]
    assert resumed["state_dict"].keys() == straight["state_dict"].keys()
    for name, value in straight["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


def test_a_gate_that_is_closed_is_a_layer_that_is_not_there():
    bank, small = (filled(LoraSpec(3, 6.0), KVSpec(5)) for _ in range(2))
    before = read(bank, ["de", None])
    for part, layer in (("lora", 1), ("kv", 3)):
        small.keep_layers(part, [each for each in range(4) if each != layer])
    with bank.closed("lora", 1), bank.closed("kv", 3):
        closed = read(bank, ["de", None])
    assert torch.equal(closed, read(small, ["de", None]))
    assert (closed - before).abs().max() > 0.01
    with bank.closed("lora"), bank.closed("kv"):
        assert torch.equal(read(bank, ["de", None]), read(bank, [None, None])), "all layers, both parts: no memory"
    for part in ("lora", "kv"):
        with ExitStack() as stack:
            for layer in range(4):
                stack.enter_context(bank.closed(part, layer))
            one_by_one = read(bank, ["de", None])
        with bank.closed(part):
            assert torch.equal(read(bank, ["de", None]), one_by_one)
    assert torch.equal(read(bank, ["de", None]), before), "it opens again"
    listed = filled(LoraSpec(3, 6.0, layers=[0, 2, 3]), KVSpec(5, layers=[0, 1, 2]))
    assert small.state_dict().keys() == listed.state_dict().keys() and small.sizes("de") == listed.sizes("de")
    assert sum(small.sizes("de").values()) == small.size("de") and small.lora("de") == listed.lora("de")


def test_the_least_worth_per_parameter_goes_first():
    sizes = {("lora", 0): 10, ("lora", 1): 10, ("kv", 0): 2, ("kv", 1): 2}
    worth = {("lora", 0): 5.0, ("lora", 1): 20.0, ("kv", 0): 0.1, ("kv", 1): 3.0}
    choose = PlaceMemories(keep=0.5)
    choose._whole = 24
    assert choose.chosen(sizes, worth, 1.0) == {"lora": [0, 1], "kv": [0, 1]}
    assert choose.chosen(sizes, worth, 0.95) == {"lora": [0, 1], "kv": [1]}
    assert choose.chosen(sizes, worth, 0.5) == {"lora": [1], "kv": [1]}
    assert choose.chosen(sizes, worth, 0.01) == {"lora": [1], "kv": [1]}, "a part keeps a layer"
    assert [choose.round_at(step, 100) for step in (29, 30, 40, 50, 60, 61)] == [0, 1, 2, 3, 4, 0]
    assert PlaceMemories(keep=0.5, rounds=9).round_at(1, 2) == 9, "several rounds on one step are the last of them"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--placement.keep=1"], "placement.keep must lie between 0 and 1 .*; got 1"),
        (["--placement.keep=0"], "placement.keep must lie between 0 and 1 .*; got 0"),
        (["--placement.first=0.7", "--placement.last=0.6"], "0 < first <= last < 1 is wanted; got first 0.7 and last"),
        (["--placement.rounds=0"], "must be at least 1; got 0"),
        (["--model.lora=null", "--model.kv=null"], "model.lora and model.kv are null: there is nothing to place"),
        (
            ["--model.joint=false", "--anneal.hold=0.4"],
            "holds the first round after step 2, but with model.joint false memories learn only from step 5 on",
        ),
    ],
)
def test_a_budget_that_means_nothing_is_refused(tmp_path, monkeypatch, capsys, options, message):
    with placing(tmp_path, monkeypatch) as fit:
        assert fit(tmp_path / "run", *options) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("koff: ")]
    assert len(lines) == 1 and re.search(message, lines[0])


@pytest.mark.parametrize("placement", [{"lora": []}, {"lora": [0, 9]}, {"kv": [-1]}, {"lora": ["1"]}, {"q": [0]}, 3])
def test_a_checkpoint_cannot_name_what_is_not_there(run, tmp_path, placement):
    checkpoint = torch.load(run.checkpoint, weights_only=True)
    checkpoint["koff"]["placement"] = placement
    torch.save(checkpoint, tmp_path / "odd.ckpt")
    with pytest.raises(KoffError, match=r"can be kept in layers|placement|is not as `koff fit` writes one"):
        from_checkpoint(tmp_path / "odd.ckpt")
