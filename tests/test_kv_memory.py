"""A memory made from a text stands for that text; rows read only their own; bad input is named."""

import hashlib
import math

import pytest
import torch
from tiny_models import FAMILIES, YARN_ROPE, tiny_model
from transformers import AttentionInterface, DynamicCache
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from koff_lightning import KVSpec
from koff_lightning.backbone import cache_argument
from koff_lightning.kv_memory import KVMemory, read_memories, rotate_keys
from koff_lightning.memory import MemoryBank
from koff_lightning.support.errors import KoffError

SHAPES = [(2, 16), (2, 16)]  # of tiny_model
P = 13


def ids(rows, length, seed=1):
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def rows_of(memories, rows):
    """The memory of each row, from its number; -1 for none."""
    return [None if row < 0 else memories[row] for row in rows]


def attach(model, memories, rows):
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.koff_memory = lambda i=index: read_memories(rows_of(memories, rows), i)


def filled(slots=4, seed=0, shapes=SHAPES):
    """A memory of random numbers."""
    memory = KVMemory(shapes, slots)
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in (*memory.parameters(), *memory.sink_key.buffers(), *memory.sink_value.buffers()):
            tensor.normal_()
    return memory


# --- a memory from a text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [*FAMILIES, "yarn", "bias"])
@torch.no_grad()
def test_reading_after_a_memory_is_reading_after_its_text(variant):
    overrides = {"yarn": {"rope_parameters": YARN_ROPE}, "bias": {"attention_bias": True}}.get(variant, {})
    overrides |= {"sliding_window": 64} if variant == "gemma3_text" else {}  # none ends inside the text
    model = tiny_model(variant if variant in FAMILIES else "llama", **overrides)
    text = ids(1, 40)
    memory = KVMemory(SHAPES, P)
    memory.initialise_(model, text[0])
    assert memory.initialised
    in_context = model(text, use_cache=False).logits[:, P:]
    without = model(text[:, P:], use_cache=False).logits
    attach(model, [memory], [0])
    remembered = model(text[:, P:], use_cache=False).logits
    torch.testing.assert_close(remembered, in_context, rtol=0, atol=1e-5)
    assert (without - in_context).abs().max() > 1


def by_hand(module, query, key, value, attention_mask, scaling, sliding_window=None, **_):
    """Attention from its definition: all slots, and of the tokens those of the layer's window."""
    slots, length = module.koff_memory(), query.shape[2]
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    seen = seen if sliding_window is None else seen.triu(1 - sliding_window)
    seen = torch.cat([torch.ones(length, slots.key.shape[2], dtype=torch.bool), seen], dim=1)  # [T, P + T]
    groups = query.shape[1] // key.shape[1]
    key, value = (torch.cat(pair, dim=2) for pair in ((slots.key, key), (slots.value, value)))  # [B, K, P + T, dh]
    key, value = (part.double().repeat_interleave(groups, dim=1) for part in (key, value))
    scores = (query.double() @ key.transpose(2, 3) * scaling).masked_fill(~seen, -math.inf)
    return (scores.softmax(-1) @ value).to(query.dtype).transpose(1, 2), None


AttentionInterface.register("by_hand", by_hand)


@pytest.mark.parametrize("parts", [[40], [5, 20, *[1] * 15]], ids=["at once", "with a cache"])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
@torch.no_grad()
def test_slots_stay_in_sight_beyond_the_sliding_window(family, parts):
    text, models = ids(1, 40), []
    for attention in ("koff", "by_hand"):
        models.append(tiny_model(family, sliding_window=8, attn_implementation=attention))
        attach(models[-1], [filled()], [0])
    expected, cache, found = models[1](text, use_cache=False).logits, DynamicCache(config=models[0].config), []
    for part in text.split(parts, dim=1):
        options = {"use_cache": True, cache_argument(models[0]): cache} if len(parts) > 1 else {"use_cache": False}
        found.append(models[0](part, **options).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-4)
    attach(models[0], [filled()], [-1])
    without = models[0](text, use_cache=False).logits
    assert (without - expected)[:, 30:].abs().max() > 0.1, "far behind the window too"


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
@torch.no_grad()
def test_a_text_longer_than_the_sliding_window_is_kept_whole(family):
    model = tiny_model(family, sliding_window=6)
    memory = KVMemory(SHAPES, P)
    memory.initialise_(model, ids(1, P)[0])
    assert all(part.abs().sum(-1).min() > 0 for layer in range(2) for part in memory.layer(layer))


def test_a_half_precision_model_gives_a_full_precision_memory():
    memories = [KVMemory(SHAPES, P) for _ in range(2)]
    for memory, dtype in zip(memories, (torch.float32, torch.bfloat16), strict=True):
        memory.initialise_(tiny_model("qwen3").to(dtype), ids(1, P)[0])
    for exact, rounded in zip(memories[0].parameters(), memories[1].parameters(), strict=True):
        assert rounded.dtype == torch.float32
        assert (exact - rounded).norm() < 0.05 * exact.norm()
    assert not torch.equal(memories[1].key[0], memories[1].key[0].bfloat16().float())  # rotated in full precision


def test_slot_0_is_frozen_and_all_is_saved():
    memory = filled(slots=4)
    stored = 2 * 2 * 2 * 4 * 16  # keys and values, layers, heads, slots, size
    assert sum(p.numel() for p in memory.parameters()) == stored * 3 // 4
    assert sum(b.numel() for part in (memory.sink_key, memory.sink_value) for b in part.buffers()) == stored // 4
    sum(part.sum() for layer in range(2) for part in memory.layer(layer)).backward()
    assert all((p.grad == 1).all() for p in memory.parameters())
    memory.initialised.fill_(True)
    other = KVMemory(SHAPES, 4)
    other.load_state_dict(memory.state_dict())
    assert other.initialised
    for layer in range(2):
        for got, wanted in zip(other.layer(layer), memory.layer(layer), strict=True):
            assert torch.equal(got, wanted)


def test_a_memory_knows_the_text_it_was_filled_from():
    memory, again, other = (KVMemory(SHAPES, P) for _ in range(3))
    assert memory.source_hash is None
    memory.initialise_(tiny_model("llama"), ids(1, 40)[0])
    again.initialise_(tiny_model("qwen3"), ids(1, 40)[0, :P].int())  # only the tokens used count, whatever their dtype
    other.initialise_(tiny_model("llama"), ids(1, 40)[0, 1:])
    assert memory.source_hash == again.source_hash != other.source_hash
    assert memory.source_hash == hashlib.sha256(ids(1, 40)[0, :P].numpy().tobytes()).hexdigest()
    restored = KVMemory(SHAPES, P)
    restored.load_state_dict(memory.state_dict())
    assert restored.source_hash == memory.source_hash
    assert memory.source.dtype == torch.uint8 and memory.source.shape == (32,)


def test_tensors_hold_all_slots_and_make_the_same_memory_again():
    memory = filled(slots=4, shapes=[(2, 16), (1, 8)])
    memory.source.copy_(torch.arange(32))
    tensors = memory.tensors()
    assert {name: list(t.shape) for name, t in tensors.items()} == {
        "layers.0.key": [2, 4, 16],
        "layers.0.value": [2, 4, 16],
        "layers.1.key": [1, 4, 8],
        "layers.1.value": [1, 4, 8],
    }
    again = KVMemory.from_tensors(tensors, memory.source_hash)
    for name, tensor in memory.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor) or name == "initialised"
    assert again.initialised and not [p for p in again.parameters() if p.requires_grad]
    tensors["layers.0.key"].zero_()
    assert again.layer(0)[0].abs().min() > 0 < memory.layer(0)[0].abs().min(), "copies, both ways"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers.1.value": None}, "without gaps: layers.1.value is missing"),
        ({"layers.0.key": None, "layers.0.value": None}, "without gaps: layers.0.key is missing"),
        ({"layers.2.value": torch.zeros(2, 4, 16)}, "without gaps: layers.2.key is missing"),
        ({"more": torch.zeros(1)}, "without gaps: layers.2.key is missing"),
        ({"layers.0.key": torch.zeros(2, 4, 16).half()}, r"layers.0.key is torch.float16 \[2, 4, 16\]"),
        ({"layers.1.value": torch.zeros(2, 4, 15)}, r"layers.1.value is torch.float32 \[2, 4, 15\]"),
        ({"layers.1.key": torch.zeros(2, 3, 16)}, r"layers.1.key is torch.float32 \[2, 3, 16\]"),
        ({"layers.1.key": torch.zeros(2, 16)}, r"layers.1.key is torch.float32 \[2, 16\]"),
        ({"layers.0.key": torch.zeros(())}, r"layers.0.key is torch.float32 \[\]"),
        (dict.fromkeys(KVMemory(SHAPES, 4).tensors()), "layers.0.key is missing"),
    ],
)
def test_tensors_that_are_no_memory_are_refused(change, message):
    tensors = filled(slots=4).tensors() | change
    with pytest.raises(KoffError, match=message):
        KVMemory.from_tensors({name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_a_memory_of_one_layer_is_read_back():
    memory = filled(shapes=SHAPES[:1])
    again = KVMemory.from_tensors(memory.tensors())
    assert len(again.tensors()) == 2
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in memory.tensors().items())


def test_a_memory_of_some_layers_is_read_back():
    given = {f"layers.{i}.{kind}": torch.randn(2, 3, 4) for i in (0, 2) for kind in ("key", "value")}
    memory = KVMemory.from_tensors(given, depth=4)
    assert (memory.layers, memory.depth) == ([0, 2], 4)
    assert all(torch.equal(part, given[name]) for name, part in memory.tensors().items())
    with pytest.raises(KoffError, match=r"of some layers I from 0 to 3: layers.3.key is missing"):
        KVMemory.from_tensors({}, depth=4)
    with pytest.raises(KoffError, match=r"layers.4.key is left over"):
        KVMemory.from_tensors(given | {"layers.4.key": torch.randn(2, 3, 4)}, depth=4)


def test_initialising_leaves_no_gradient_behind():
    memory = KVMemory(SHAPES, P)
    memory.initialise_(tiny_model("llama"), ids(1, P)[0])
    assert all(p.requires_grad and p.is_leaf and p.grad is None for p in memory.parameters())


# --- rotation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-8192, -13, 1, 500])
def test_rotating_is_the_models_own_embedding_at_another_position(shift):
    rotary = LlamaRotaryEmbedding(tiny_model("llama3_rope").config)
    key = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))

    def embedded(start):
        cos, sin = rotary(key, torch.arange(start, start + 5)[None])
        return apply_rotary_pos_emb(key[None], key[None], cos, sin)[1][0]

    start = max(0, -shift)
    moved = rotate_keys(embedded(start), rotary.inv_freq, shift)
    tolerance = 1e-6 * max(10, abs(shift))  # the model itself computes its angles in fp32
    torch.testing.assert_close(moved, embedded(start + shift), rtol=0, atol=tolerance)


@pytest.mark.parametrize("shift", [-8191, 1_000_003])
def test_angles_are_as_exact_as_the_numbers_that_they_turn(shift):
    """An angle of 8191 radians in fp32 is off by 5e-4; by formula in double precision it is not."""
    inv_freq = torch.tensor([1.0, 0.3, 0.01, 1e-4])
    found = rotate_keys(torch.cat([torch.ones(1, 4), torch.zeros(1, 4)], dim=1), inv_freq, shift)[0]
    angles = [shift * value for value in inv_freq.double().tolist()]
    wanted = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=2e-7)


def test_rotations_add_up_keep_the_norm_and_are_undone():
    inv_freq = 1e4 ** (-torch.arange(8) / 8)
    key = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(rotate_keys(key, inv_freq, 0), key)
    twice = rotate_keys(rotate_keys(key, inv_freq, 700), inv_freq, 33)
    torch.testing.assert_close(twice, rotate_keys(key, inv_freq, 733))
    torch.testing.assert_close(twice.norm(dim=-1), key.norm(dim=-1))
    torch.testing.assert_close(rotate_keys(twice, inv_freq, -733), key)
    assert rotate_keys(key.bfloat16(), inv_freq, 5).dtype == torch.bfloat16


# --- reading -------------------------------------------------------------------------------------------------------


def test_rows_without_memory_read_nothing():
    assert read_memories([None, None], 0) is None


def test_one_memory_for_all_rows_is_not_repeated():
    memories = [filled(seed=0), filled(seed=1)]
    read = read_memories(rows_of(memories, [1, 1, 1]), 1)
    assert read.visible is None
    assert torch.equal(read.key, memories[1].layer(1)[0][None])
    assert torch.equal(read.value, memories[1].layer(1)[1][None])


def test_each_row_reads_its_own_memory():
    memories = [filled(seed=seed) for seed in range(3)]
    read = read_memories(rows_of(memories, [2, 0, 2]), 0)
    assert read.visible is None
    for row, name in enumerate([2, 0, 2]):
        assert torch.equal(read.key[row], memories[name].layer(0)[0])
        assert torch.equal(read.value[row], memories[name].layer(0)[1])


def test_what_a_row_does_not_have_is_hidden():
    memories = [filled(slots=2, seed=0), filled(slots=4, seed=1)]
    read = read_memories(rows_of(memories, [1, -1, 0]), 0)
    assert read.visible.tolist() == [[True] * 4, [False] * 4, [True, True, False, False]]
    assert torch.equal(read.key[2, :, :2], memories[0].layer(0)[0])
    assert torch.equal(read.value[0], memories[1].layer(0)[1])


@pytest.mark.parametrize("slots", [8, 16, 17])
def test_a_smaller_memory_is_filled_up_whatever_the_head_size(slots):
    memories = [filled(4), filled(slots, seed=1)]  # head size 16
    read = read_memories(rows_of(memories, [0, 1]), 0)
    assert read.key.shape == (2, 2, slots, 16) and read.visible.sum(1).tolist() == [4, slots]
    assert torch.equal(read.key[0, :, :4], memories[0].layer(0)[0]) and not read.key[0, :, 4:].any()


def test_only_memories_that_rows_read_get_a_gradient():
    memories = [filled(seed=seed) for seed in range(3)]
    read = read_memories(rows_of(memories, [2, -1, 0, 2]), 0)
    weight = read.visible[:, None, :, None].float()
    ((read.key + read.value) * weight).sum().backward()
    assert [m.key[0].grad is None for m in memories] == [False, True, False]
    assert (memories[2].key[0].grad == 2).all() and (memories[0].value[0].grad == 1).all()
    assert all(m.key[1].grad is None for m in memories)  # the other layer was not read


@torch.no_grad()
def test_a_mixed_batch_is_its_rows_read_alone():
    model = tiny_model("qwen3")
    memories = [KVMemory(SHAPES, slots) for slots in (3, 8)]
    for seed, memory in enumerate(memories):
        memory.initialise_(model, ids(1, 8, seed)[0])
    text, rows = ids(3, 9, seed=7), [1, -1, 0]
    attach(model, memories, rows)
    together = model(text, use_cache=False).logits
    for row, name in enumerate(rows):
        attach(model, memories, [name])
        alone = model(text[row : row + 1], use_cache=False).logits
        torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-5)


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [-1, 0, 8193])
def test_slots_out_of_range(slots):
    with pytest.raises(KoffError, match=rf"needs 1 to 8192 slots, got {slots}: set kv.slots"):
        KVMemory(SHAPES, slots)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (torch.arange(5), "of 13 slots starts from at least 13 tokens of text, got 5: give more text or set kv.slots"),
        (ids(1, 20), r"one row of token ids \[n\], got torch.int64 \[1, 20\]"),
        (torch.rand(20), r"one row of token ids \[n\], got torch.float32 \[20\]"),
    ],
)
def test_a_text_that_cannot_fill_the_memory(text, message):
    memory = KVMemory(SHAPES, P)
    with pytest.raises(KoffError, match=message):
        memory.initialise_(tiny_model("llama"), text)
    assert not memory.initialised


@pytest.mark.parametrize("shapes", [[(2, 16)], [(2, 16), (1, 16)], [(2, 16), (2, 8)]])
def test_a_memory_of_another_models_shapes(shapes):
    with pytest.raises(KoffError, match=r"but the model has \[\(2, 16\), \(2, 16\)\]: make the memory from this model"):
        KVMemory(shapes, P).initialise_(tiny_model("llama"), ids(1, P)[0])


def test_a_rotary_embedding_that_moves_with_the_length():
    model = tiny_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(KoffError, match="rope type 'dynamic' depends on the text's length"):
        KVMemory(SHAPES, P).initialise_(model, ids(1, P)[0])


def test_initialising_while_a_memory_is_active():
    model = tiny_model("llama")
    attach(model, [filled()], [0])
    with pytest.raises(KoffError, match="turn the memories off first"):
        KVMemory(SHAPES, P).initialise_(model, ids(1, P)[0])
    attach(model, [filled()], [-1])
    KVMemory(SHAPES, P).initialise_(model, ids(1, P)[0])


def test_a_rotary_embedding_of_part_of_the_head():
    with pytest.raises(KoffError, match="rotary embeddings of 8 of 16 head dimensions are not supported"):
        rotate_keys(torch.zeros(2, 5, 16), torch.ones(4), 1)


@pytest.mark.parametrize("domains", [["de"], ["de", "fr"]])
def test_the_first_slots_of_a_model_make_its_attention_read_them(domains):
    """Whatever attention it was loaded with: slots that nobody reads would be trained for nothing."""
    read = []
    for given in ("koff", "sdpa"):
        torch.manual_seed(0)
        model = tiny_model("llama", attn_implementation=given).requires_grad_(False)
        torch.manual_seed(1)
        bank = MemoryBank(model, domains, None, KVSpec(4, init="normal", std=1.0))
        bank.activate(["de", None])
        read.append(model(ids(1, 9).expand(2, -1), use_cache=False).logits)
    assert torch.equal(*read)
    assert (read[0][0] - read[0][1]).abs().max() > 1e-3
