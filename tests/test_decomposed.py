"""A loaded artifact computes what the gated model computes, row by row, in every way that transformers generates."""

import json
import shutil
from copy import deepcopy

import pytest
import torch
from safetensors import safe_open
from tiny_artifact import DOMAINS, VOCABULARY, left_padded, tiny_artifact
from tiny_models import tiny_model
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.generation.streamers import BaseStreamer

from koff_lightning import KoffError, load_decomposed
from koff_lightning.support.files import hash_file

ROWS = ["de", None, "law", "de"]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(made):
    """Shared by tests that leave it as it is."""
    return load_decomposed(made.folder)


@pytest.fixture
def copy(made, tmp_path):
    """The artifact, to be damaged."""
    return shutil.copytree(made.folder, tmp_path / "copy")


# ------------------------------------------------------------------------------------------------------- forward


@pytest.mark.parametrize("family", ["llama3_rope", "qwen2", "qwen3", "mistral", "gemma3_text"])
@pytest.mark.parametrize("parts", [{}, {"kv": None}, {"lora": None}], ids=["lora_kv", "lora", "kv"])
def test_logits_are_those_of_the_gated_model(tmp_path, family, parts):
    made = tiny_artifact(tmp_path, family, **parts)
    ids, mask = left_padded()
    expected = made.gated(ids, mask, ROWS)
    got = load_decomposed(made.folder)(ids, mask, domains=ROWS).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["uniform", "deci", "masked", "merged"])
def test_every_layout_runs(tmp_path, layout):
    made = tiny_artifact(tmp_path, layout=layout, uniform=layout == "uniform")
    rows = ["de"] * 4 if layout == "merged" else ROWS
    ids, mask = left_padded()
    model = load_decomposed(made.folder)
    expected = made.gated(ids, mask, rows)
    torch.testing.assert_close(
        model(ids, mask, domains=rows).logits[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0
    )
    assert model.domains == (["de"] if layout == "merged" else list(DOMAINS))
    assert model.tokenizer("fox")["input_ids"]


def test_one_name_is_for_all_rows_and_none_is_the_bare_backbone(made, model):
    ids, mask = left_padded()
    assert torch.equal(model(ids, mask, domains="de").logits, model(ids, mask, domains=["de"] * 4).logits)
    assert torch.equal(model(ids, mask).logits, model(ids, mask, domains=[None] * 4).logits)
    chosen = mask.bool()
    torch.testing.assert_close(
        model(ids, mask).logits[chosen], made.gated(ids, mask, [None] * 4)[chosen], atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_shifts_nothing(model, side):
    ids, mask = left_padded()
    if side == "right":
        ids, mask = ids.flip(1), mask.flip(1)
    together = model(ids, mask, domains=ROWS).logits
    for row, domain in enumerate(ROWS):
        text = ids[row][mask[row].bool()][None]
        alone = model(text, domains=domain).logits[0]
        torch.testing.assert_close(together[row][mask[row].bool()], alone, atol=1e-5, rtol=0)


@torch.no_grad()
def test_decoding_by_hand_equals_the_whole_forward(model):
    ids, mask = left_padded()
    whole = model(ids, mask, domains=ROWS).logits
    cache = DynamicCache()
    parts = [model(ids[:, :5], mask[:, :5], domains=ROWS, past_key_values=cache).logits]
    parts += [
        model(ids[:, t : t + 1], mask[:, : t + 1], domains=ROWS, past_key_values=cache).logits for t in range(5, 12)
    ]
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], atol=1e-5, rtol=0)


@torch.no_grad()
def test_what_decoding_stacks_is_kept_for_the_same_rows_and_no_longer(made, monkeypatch):
    model = load_decomposed(made.folder)
    ids, mask = left_padded()
    calls, routes_of = [], model.memories.routes_of
    monkeypatch.setattr(model.memories, "routes_of", lambda rows: (calls.append(list(rows)), routes_of(rows))[1])
    first = model(ids, mask, domains=ROWS).logits
    assert torch.equal(model(ids, mask, domains=ROWS).logits, first)
    assert len(calls) == 1
    model(ids, mask, domains="fr")
    assert torch.equal(model(ids, mask, domains=ROWS).logits, first)
    assert len(calls) == 2, "a few calls' rows are kept: caches of other rows take turns"
    for others in ("de", "law", ["fr", "fr", "de", "de"], ["law"] * 3 + [None]):
        model(ids, mask, domains=others)
    assert torch.equal(model(ids, mask, domains=ROWS).logits, first)
    assert len(calls) == 7, "after as many others they are made anew"
    model.remove_memory("de")
    model.add_memory(made.folder / "memories" / "de")
    assert torch.equal(model(ids, mask, domains=ROWS).logits, first)
    double = model.double()(ids, mask, domains=ROWS).logits
    torch.testing.assert_close(double[mask.bool()].float(), first[mask.bool()], atol=1e-5, rtol=0)
    assert len(calls) == 9


@torch.no_grad()
@pytest.mark.parametrize("rows", [["de"] * 4, ROWS], ids=["one", "mixed"])
@torch.no_grad()
def test_nothing_stacked_outlives_its_tensors(made, rows):
    ids, mask = left_padded()

    def logits(model, fresh=False):
        if fresh:
            model(ids, mask)  # other rows
        return model(ids, mask, domains=rows).logits

    first = load_decomposed(made.folder)
    before = logits(first)
    second = deepcopy(first)
    for parameter in second.memories.parameters():
        parameter.mul_(0.5)
    halved = logits(second)
    torch.testing.assert_close(halved, logits(second, fresh=True))
    assert (halved - before).abs().max() > 0.01
    first.load_state_dict({name: value.clone() for name, value in second.state_dict().items()}, assign=True)
    torch.testing.assert_close(logits(first), halved)


def test_packed_documents_stay_apart(model):
    ids = torch.randint(3, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(3))
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]])
    packed = model(ids, domains="de", position_ids=positions).logits
    for part in (slice(0, 4), slice(4, 12)):
        torch.testing.assert_close(packed[:, part], model(ids[:, part], domains="de").logits, atol=1e-5, rtol=0)
    with pytest.raises(KoffError, match="packed rows .* padding mask cannot be combined"):
        model(ids, torch.ones_like(ids), position_ids=positions)
    with pytest.raises(KoffError, match="packed rows .* token cache"):
        model(ids, position_ids=positions, use_cache=True)


def test_rows_and_domains_must_agree(model):
    ids, mask = left_padded()
    with pytest.raises(KoffError, match="domain 'it' is not loaded; loaded: de, fr, law"):
        model(ids, mask, domains=["de", None, "it", "de"])
    with pytest.raises(KoffError, match="2 domains for 4 rows: give one per row"):
        model.generate(ids, mask, domains=["de", "fr"])
    with pytest.raises(KoffError, match=r"must be \[4, 12\], cached tokens included"):
        model(ids, mask[:, :11])
    with pytest.raises(KoffError, match=r"attention_mask is \[4, 11\] for input_ids \[4, 12\]"):
        model.generate(ids, mask[:, 1:], domains="de")
    for use in (model, model.generate):
        for wrong in (ids[0], ids[:, :0], ids[:0]):
            with pytest.raises(KoffError, match=r"input_ids must be \[rows, tokens\]"):
                use(wrong, domains="de")


# ------------------------------------------------------------------------------------------------------ generate


def alone(model, ids, mask, rows, **options):
    """What each row gives by itself, without padding, as new tokens [B, new]."""
    out = []
    for row, domain in enumerate(rows):
        text = ids[row][mask[row].bool()][None]
        made = model.generate(text, domains=domain, **GREEDY | options)
        assert torch.equal(made[:, : text.shape[1]], text.expand(len(made), -1)), "the prompt must not be touched"
        out.append(made[:, text.shape[1] :])
    return torch.cat(out)


def test_a_mixed_batch_generates_what_its_rows_generate_alone(model):
    ids, mask = left_padded()
    out = model.generate(ids, mask, domains=ROWS, **GREEDY)
    assert torch.equal(out[:, :12], ids)
    assert torch.equal(out[:, 12:], alone(model, ids, mask, ROWS))
    assert torch.equal(out, model.generate(ids, mask, domains=ROWS, use_cache=False, **GREEDY))
    others = [model.generate(ids, mask, domains=domain, **GREEDY)[2, 12:] for domain in ("fr", None)]
    assert all(not torch.equal(out[2, 12:], other) for other in others), "the memory must matter"


def test_greedy_tokens_are_those_of_whole_forwards_of_the_gated_model(made, model):
    ids, mask = left_padded()
    out = model.generate(ids, mask, domains=ROWS, **GREEDY)
    for _ in range(GREEDY["max_new_tokens"]):
        ids = torch.cat([ids, made.gated(ids, mask, ROWS)[:, -1:].argmax(-1)], 1)
        mask = torch.cat([mask, mask[:, -1:]], 1)
    assert torch.equal(out, ids)


def test_generation_uses_a_token_cache(model, monkeypatch):
    seen, forward = [], model.backbone.forward
    monkeypatch.setattr(
        model.backbone, "forward", lambda *a, **k: (seen.append(k["input_ids"].shape[1]), forward(*a, **k))[1]
    )
    ids, mask = left_padded()
    model.generate(ids, mask, domains=ROWS, **GREEDY)
    assert seen == [12] + [1] * 5


WAYS = {
    "beams": {"num_beams": 3},
    "beams_returned": {"num_beams": 3, "num_return_sequences": 2},
    "returned": {"num_return_sequences": 2, "do_sample": True, "top_k": 1},
    "config": {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=6, pad_token_id=0)},
    "static": {"cache_implementation": "static"},
    "dynamic": {"cache_implementation": "dynamic"},
    "chunked_prefill": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("way", WAYS)
def test_ways_of_generating_equal_the_rows_alone(model, way):
    ids, mask = left_padded()
    options = WAYS[way] if way == "config" else GREEDY | WAYS[way]
    out = model.generate(ids, mask, domains=ROWS, **options)[:, 12:]
    if way == "config":
        expected = alone(model, ids, mask, ROWS, num_beams=2)
    elif "beams" in way or way == "returned":
        expected = alone(model, ids, mask, ROWS, **WAYS[way])
    else:
        expected = alone(model, ids, mask, ROWS)
    assert torch.equal(out, expected)
    if way == "returned":  # the one likeliest token, so all samples are the greedy ones
        assert torch.equal(out[::2], alone(model, ids, mask, ROWS))


def test_sampling_follows_the_seed(model):
    ids, mask = left_padded()
    options = GREEDY | {"do_sample": True, "temperature": 1.0, "num_return_sequences": 3, "domains": ROWS}
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(model.generate(ids, mask, **options))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert runs[0].shape == (12, 18)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": 1}], ids=["lookup", "draft"])
def test_speculation_changes_no_token(model, options):
    ids = left_padded()[0][:1].repeat(1, 3)  # repeats itself, so that there is something to look up
    if "assistant_model" in options:
        options = {"assistant_model": tiny_model("llama", seed=7, vocab_size=VOCABULARY)}
    plain = model.generate(ids, domains="law", **GREEDY)
    assert torch.equal(model.generate(ids, domains="law", **GREEDY | options), plain)


def test_a_cache_of_earlier_turns_is_continued(model):
    ids = left_padded()[0][:1]
    whole = model.generate(ids, domains="law", **GREEDY)
    for cache in (DynamicCache(), StaticCache(model.backbone.config, max_cache_len=32)):
        with torch.no_grad():
            model(ids[:, :8], domains="law", past_key_values=cache)
        assert torch.equal(model.generate(ids, domains="law", past_key_values=cache, **GREEDY), whole)


def test_a_streamer_gets_every_token(model):
    class Heard(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    heard, ids = Heard(), left_padded()[0][:1]
    out = model.generate(ids, domains="law", streamer=heard, **GREEDY)
    assert heard.tokens == [*out[0].tolist(), "end"]


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "paged"},
        {"cache_implementation": "quantized"},
        {"custom_generate": "owner/name"},
        {"generation_config": GenerationConfig(cache_implementation="quantized")},
    ],
    ids=str,
)
def test_ways_that_were_not_checked_are_refused(model, options):
    with pytest.raises(KoffError, match="have not been checked with memories: leave them out"):
        model.generate(left_padded()[0], domains=ROWS, **options)


@pytest.mark.parametrize("options", [{}, {"do_sample": True}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_numbers_that_run_out_are_no_tokens(made, options):
    """Of finite weights: the file is sound, and what comes of it is not."""
    model, ids = load_decomposed(made.folder), left_padded()[0][:1]
    due = model.generate(ids, domains="fr", max_new_tokens=2, pad_token_id=0, **options)
    with torch.no_grad():
        model.memories.lora_parameters("law")[0].fill_(3e38)
    with pytest.raises(KoffError, match="computes numbers that are not finite, so nothing can be generated"):
        model.generate(ids, domains="law", max_new_tokens=2, pad_token_id=0, **options)
    if not options.get("do_sample"):
        assert torch.equal(model.generate(ids, domains="fr", max_new_tokens=2, pad_token_id=0, **options), due)


def test_padding_on_the_right_is_refused_by_generate(model):
    ids, mask = left_padded()
    with pytest.raises(KoffError, match="pad prompts on the left"):
        model.generate(ids, mask.flip(1), domains=ROWS)


# ------------------------------------------------------------------------------------------------------ memories


def test_only_the_memories_asked_for_are_read(copy):
    for file in (copy / "memories" / "fr").iterdir():
        if file.suffix == ".safetensors":
            file.write_bytes(b"\0" * file.stat().st_size)  # same size, no sound file
    model = load_decomposed(copy, domains=["law", "de"])
    assert model.domains == ["law", "de"]
    assert load_decomposed(copy, domains="de").domains == ["de"]
    assert load_decomposed(copy, domains=[]).domains == []
    with pytest.raises(KoffError, match="memories/fr.*changed after it was written"):
        load_decomposed(copy)
    with pytest.raises(KoffError, match="has no memory for 'it'; it has de, fr, law"):
        load_decomposed(copy, domains=["de", "it"])


@torch.no_grad()
def test_memories_come_and_go(made):
    ids, mask = left_padded()
    model = load_decomposed(made.folder, domains=["de"])
    de = model(ids, mask, domains="de").logits
    assert model.add_memory(str(made.folder / "memories" / "law"), name="jura") == "jura"
    law = model(ids, mask, domains="jura").logits
    torch.testing.assert_close(law[mask.bool()], made.gated(ids, mask, ["law"] * 4)[mask.bool()], atol=1e-5, rtol=0)
    assert torch.equal(model(ids, mask, domains="de").logits, de)
    with pytest.raises(KoffError, match="there is a memory 'jura' already"):
        model.add_memory(made.folder / "memories" / "de", name="jura")
    model.remove_memory("de")
    assert model.domains == ["jura"]
    assert torch.equal(model(ids, mask, domains="jura").logits, law)
    with pytest.raises(KoffError, match="domain 'de' is not loaded; loaded: jura"):
        model.remove_memory("de")


# ------------------------------------------------------------------------------------------------- move, cast, save


def test_where_a_model_is(model):
    assert model.device == torch.device("cpu") == model.backbone.device
    assert model.to("cpu") is model


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_a_model_that_is_cast_is_the_one_loaded_in_that_dtype(made, dtype):
    """To the bit: memories and the frequencies of the rotary embedding stay as exact as they are."""
    ids, mask = left_padded()
    cast, loaded = load_decomposed(made.folder).to(dtype), load_decomposed(made.folder, dtype=dtype)
    assert cast.backbone.dtype == dtype
    for (name, one), (_, other) in zip(cast.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other), name
    buffers = zip(cast.named_buffers(), loaded.named_buffers(), strict=True)
    assert all(one.dtype == other.dtype and torch.equal(one, other) for (_, one), (_, other) in buffers)
    assert torch.equal(cast(ids, mask, domains=ROWS).logits, loaded(ids, mask, domains=ROWS).logits)
    back = cast.to(torch.float32)
    assert torch.equal(
        back.memories.weights("de")[name := next(iter(back.memories.weights("de")))],
        load_decomposed(made.folder).memories.weights("de")[name],
    )


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("layout", ["ragged", "uniform", "deci", "masked", "merged"])
def test_what_is_loaded_and_saved_is_the_same_folder(tmp_path, layout):
    made = tiny_artifact(tmp_path, layout=layout, uniform=layout == "uniform")
    load_decomposed(made.folder).save_pretrained(str(tmp_path / "again"))
    assert contents(tmp_path / "again") == contents(made.folder)


@pytest.mark.parametrize("options", [{"kv": None}, {"lora": None}, {"tie": True}], ids=str)
def test_so_it_is_without_a_part(tmp_path, options):
    made = tiny_artifact(tmp_path, **options)
    load_decomposed(made.folder).save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again") == contents(made.folder)


@torch.no_grad()
def test_memories_that_came_and_went_are_saved_so(made, tmp_path):
    ids, mask = left_padded()
    model = load_decomposed(made.folder, domains=["de"])
    model.add_memory(made.folder / "memories" / "law", name="jura")
    model.remove_memory("de")
    model.add_memory(made.folder / "memories" / "fr")
    model.save_pretrained(tmp_path / "new")
    again = load_decomposed(tmp_path / "new")
    assert again.domains == ["jura", "fr"] == list(again.manifest.domains)
    rows = ["jura", None, "fr", "jura"]
    assert torch.equal(again(ids, mask, domains=rows).logits, model(ids, mask, domains=rows).logits)
    assert again.manifest.parameters["stored"] == sum(
        map(numbers, [tmp_path / "new/backbone", *(tmp_path / "new/memories").iterdir()])
    )
    assert contents(tmp_path / "new" / "memories/fr") == contents(made.folder / "memories/fr")


def test_what_cannot_be_saved_as_an_artifact(made, tmp_path):
    def refused(line, change=lambda model: None, out=tmp_path / "out", **options):
        model = load_decomposed(made.folder, **options)
        with torch.no_grad():
            change(model)
        with pytest.raises(KoffError, match=line) as caught:
            model.save_pretrained(out)
        assert "\n" not in str(caught.value)

    refused("exists already: give a new folder", out=tmp_path)
    refused("the backbone is torch.bfloat16 here and torch.float32 in its artifact", dtype="bfloat16")
    refused("the backbone is torch.float64 here", lambda model: model.double())
    weight = "model.layers.1.mlp.up_proj.weight"
    refused(
        rf"changed after it was loaded \(first: {weight}\)",
        lambda model: model.backbone.model.layers[1].mlp.up_proj.base_layer.weight[0].add_(1),
    )
    assert list(tmp_path.iterdir()) == []
    moved = shutil.copytree(made.folder, tmp_path / "moved")
    model = load_decomposed(moved)
    edit(moved / "koff.json", licence="other")
    with pytest.raises(KoffError, match="is no longer the artifact that was loaded"):
        model.save_pretrained(tmp_path / "out")
    shutil.rmtree(moved)
    with pytest.raises(KoffError, match="no such folder"):
        model.save_pretrained(tmp_path / "out")


def test_a_merged_artifact_is_saved_with_its_memory_alone(tmp_path):
    made = tiny_artifact(tmp_path, layout="merged")
    model = load_decomposed(made.folder, domains=[])
    with pytest.raises(KoffError, match="'de' is merged into this backbone, .* loaded is none"):
        model.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize("tie", [False, True])
def test_parameters_are_counted_from_what_is_there(tmp_path, tie):
    made = tiny_artifact(tmp_path, tie=tie)
    model, counts = load_decomposed(made.folder), json.loads((made.folder / "koff.json").read_text())["parameters"]
    assert model.active_parameters() == counts["backbone"] == numbers(made.folder / "backbone")
    for domain in DOMAINS:
        own = numbers(made.folder / "memories" / domain)
        assert model.active_parameters(domain) == counts["active"][domain] == counts["backbone"] + own
    with pytest.raises(KoffError, match="'it' is not loaded"):
        model.active_parameters("it")


def numbers(folder):
    """Numbers in the safetensors files of a folder."""
    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (no dict)
    return count


@torch.no_grad()
def test_memories_stay_fp32_beside_a_backbone_of_half_precision(made):
    ids, mask = left_padded()
    model = load_decomposed(made.folder, dtype=torch.bfloat16)
    assert model.backbone.dtype == torch.bfloat16
    assert {p.dtype for p in (*model.memories.lora_parameters(), *model.memories.kv_parameters())} == {torch.float32}
    logits = model(ids, mask, domains=ROWS).logits
    assert logits.dtype == torch.bfloat16
    expected = made.gated(ids, mask, ROWS)[mask.bool()]
    assert (logits.float()[mask.bool()] - expected).abs().max() < 0.1 * expected.abs().max()
    out = model.generate(ids, mask, domains=ROWS, **GREEDY)
    assert torch.equal(out, load_decomposed(made.folder, dtype="bfloat16").generate(ids, mask, ROWS, **GREEDY))


def test_the_tokenizer_pads_on_the_left(model):
    batch = model.tokenizer(["the quick", "fox"], padding=True, return_tensors="pt")
    assert batch["attention_mask"][:, -1].all()
    assert model.generate(batch["input_ids"], batch["attention_mask"], domains=["de", "fr"], **GREEDY) is not None


# ----------------------------------------------------------------------------------------------------- bad input


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_no_artifact_is_refused_in_a_line(made, copy, tmp_path):
    with pytest.raises(KoffError, match="no such folder"):
        load_decomposed(tmp_path / "nowhere")
    with pytest.raises(KoffError, match="is a model without koff.json, so it is no artifact"):
        load_decomposed(made.folder.parent / "dense")
    with pytest.raises(KoffError, match=f"is a model without koff.json.* give {made.folder}"):
        load_decomposed(made.folder / "backbone")
    edit(copy / "koff.json", format_version=2)
    with pytest.raises(KoffError, match="format version 2, this koff-lightning reads 1"):
        load_decomposed(copy)
    (copy / "koff.json").unlink()
    with pytest.raises(KoffError, match="without koff.json"):
        load_decomposed(copy)


def restate(folder):
    """Let koff.json know the cards as they are, as if they had been of another memory from the start."""
    domains = json.loads((folder / "koff.json").read_text())["domains"]
    for name, about in domains.items():
        about["card_sha256"] = hash_file(folder / "memories" / name / "memory.json")
    edit(folder / "koff.json", domains=domains)


def edit_card(folder, **changes):
    edit(folder / "memories/de/memory.json", **changes)
    restate(folder)


def swap(a, b):
    aside = a.rename(a.with_name("aside"))
    b.rename(a)
    aside.rename(b)


DAMAGE = {
    "truncated": (lambda f: (f / "backbone/model.safetensors").write_bytes(b"x" * 100), "has 100 bytes instead of"),
    "missing": (lambda f: (f / "backbone/model.safetensors").unlink(), "model.safetensors is missing"),
    "extra": (lambda f: (f / "backbone/evil.py").write_text("1"), "evil.py does not belong there"),
    "memory_missing": (lambda f: shutil.rmtree(f / "memories/de"), "memories/de is missing"),
    "memory_extra": (lambda f: (f / "memories/it").mkdir(), "memories/it does not belong there"),
    "memory_renamed": (
        lambda f: (swap(f / "memories/de", f / "memories/fr"), restate(f)),
        "memories/de holds the memory 'fr'",
    ),
    "kv_missing": (lambda f: (f / "memories/de/kv_memory.safetensors").unlink(), "kv_memory.safetensors is missing"),
    "card_version": (lambda f: edit_card(f, format_version=9), "format version 9"),
    "card_base": (
        lambda f: edit_card(f, base={"id": "other", "revision": None, "hash": "0" * 64}),
        "belongs to base 'other'",
    ),
    "card_mask": (lambda f: edit_card(f, mask_hash="0" * 64), "trained under another mask"),
    "card_tokenizer": (lambda f: edit_card(f, tokenizer_hash="0" * 64), "another tokenizer"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noticed(copy, kind):
    spoil, line = DAMAGE[kind]
    spoil(copy)
    with pytest.raises(KoffError, match=line) as caught:
        load_decomposed(copy)
    assert "\n" not in str(caught.value)


def test_a_changed_byte_is_noticed_unless_it_is_not_to_be(copy):
    file = copy / "backbone/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(KoffError, match="changed after it was written"):
        load_decomposed(copy)
    load_decomposed(copy, verify=False)


def test_corrupted_weights_are_one_line_even_unverified(copy):
    (copy / "backbone/model.safetensors").write_bytes(b"\0" * 64)
    with pytest.raises(KoffError, match="cannot load backbone") as caught:
        load_decomposed(copy, verify=False)
    assert "\n" not in str(caught.value)


def test_code_of_the_artifact_is_not_run(copy):
    edit(copy / "backbone/config.json", model_type="mine", auto_map={"AutoConfig": "mine.Mine"})
    (copy / "backbone/mine.py").write_text("raise SystemExit('run')")
    with pytest.raises(KoffError, match="brings its own code, which is not run") as caught:
        load_decomposed(copy, verify=False)
    assert "\n" not in str(caught.value)


def test_code_that_an_export_carries_is_left_alone(tmp_path):
    made = tiny_artifact(tmp_path, with_code=True)
    assert "auto_map" in json.loads((made.folder / "backbone/config.json").read_text())
    assert type(load_decomposed(made.folder).backbone).__module__ == "koff_lightning.artifact.modeling_koff"


def test_an_unknown_layout_is_refused(copy):
    edit(copy / "koff.json", layout="mine")
    with pytest.raises(KoffError, match="layout must be one of ragged, .*; got 'mine'"):
        load_decomposed(copy, domains=[])


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"dtype": "int8"}, "dtype must be a floating torch dtype"),
        ({"dtype": "bf16"}, "dtype must be a floating torch dtype"),
        ({"device": "gpu"}, "device 'gpu' cannot be used here"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used here"),
    ],
)
def test_impossible_devices_and_dtypes(made, options, line):
    with pytest.raises(KoffError, match=line) as caught:
        load_decomposed(made.folder, **options)
    assert "\n" not in str(caught.value)
