"""What serves a decomposed model in vLLM, as far as it can be told without vLLM; tests/test_vllm_engine.py runs it."""

import asyncio
import logging
import re
import shutil
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import fake_vllm
import pytest
import torch
from tiny_artifact import tiny_artifact
from tiny_models import LLAMA3_ROPE, YARN_ROPE
from transformers import AutoConfig, DynamicCache

from koff_lightning import load_decomposed
from koff_lightning.artifact.memories import add_memory, remove_memory
from koff_lightning.cli import main
from koff_lightning.serving.engine import Failed, Options, Unknown
from koff_lightning.serving.vllm import plugin, slots
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.support.errors import KoffError

LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}


# ------------------------------------------------------------------------------------------- the slots' tensors


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", None),
        ("llama", LINEAR_ROPE),
        ("llama", LLAMA3_ROPE),
        ("llama", YARN_ROPE | {"attention_factor": 1.3}),
        ("mistral", None),
        ("qwen2", YARN_ROPE),
        ("qwen3", LLAMA3_ROPE),
    ],
)
def test_slots_before_a_text_that_begins_behind_them_are_the_memory(tmp_path, family, rope):
    """The plain model with the placed keys and values in its cache, text from position P on, is our runtime."""
    changes = {"rope_parameters": rope} if rope else {}
    folder = tiny_artifact(tmp_path, family, lora=None, kv=KVSpec(slots=37), changes=changes).folder
    model = load_decomposed(folder)
    ids = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(0))
    config = AutoConfig.from_pretrained(folder / "backbone")
    cache = DynamicCache()
    pairs = slots.placed(model.memories.slots("fr"), slots.inv_freq(config), torch.float32)
    for layer, (key, value) in enumerate(pairs):
        cache.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], layer)
    with torch.no_grad():
        exact = model(ids, domains="fr").logits
        model.memories.activate([None])
        found = model.backbone(ids, past_key_values=cache, position_ids=torch.arange(37, 77)[None]).logits
    assert (found - exact).abs().max() < 1e-4
    assert (model(ids, domains=None).logits - exact).abs().max() > 0.01, "the memory says something"


def test_a_rotary_embedding_that_moves_is_refused():
    config = AutoConfig.for_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(KoffError, match="as rope type 'dynamic' has them do"):
        slots.inv_freq(config)


def test_two_rotary_embeddings_are_refused():
    with pytest.raises(KoffError, match="layers that have one rotary embedding, those of 'gemma3_text' have two"):
        slots.inv_freq(AutoConfig.for_model("koff_gemma3_text"))


@pytest.mark.parametrize(("total", "size"), [(8, 2), (2, 2), (2, 1), (1, 2), (2, 4), (3, 3), (2, 8)])
def test_ranks_hold_the_heads_as_vllm_deals_them_out(tmp_path, total, size):
    """Its weight loaders give rank r the part number r // (ranks of one part)."""
    share, alike = max(1, total // size), max(1, size // total)
    for rank in range(size):
        part = rank // alike
        assert slots.heads_of(total, rank, size) == slice(part * share, (part + 1) * share)


def test_two_ranks_together_hold_the_memory(tmp_path):
    model = load_decomposed(tiny_artifact(tmp_path, target=0.0).folder)
    memory, freq = model.memories.slots("de"), slots.inv_freq(model.backbone.config)
    whole = slots.placed(memory, freq, torch.float32)
    ranks = [slots.placed(memory, freq, torch.float32, rank, 2) for rank in range(2)]
    for layer, pair in enumerate(whole):
        for part, tensor in enumerate(pair):
            assert torch.equal(torch.cat([rank[layer][part] for rank in ranks], dim=1), tensor)
    with pytest.raises(KoffError, match="3 key-value heads cannot be dealt out to 2 ranks"):
        slots.heads_of(3, 0, 2)


def test_a_memory_of_some_layers_and_one_of_other_heads_are_refused(tmp_path):
    model = load_decomposed(tiny_artifact(tmp_path, kv=KVSpec(4, layers=[1])).folder)
    with pytest.raises(KoffError, match="has slots in 1 of 2 only: serve it with --engine own"):
        slots.check_layers(model.memories.slots("de"), model.backbone.config)
    other = AutoConfig.for_model("llama", num_hidden_layers=2, num_key_value_heads=8)
    with pytest.raises(KoffError, match="make the memory from this model"):
        slots.check_layers(model.memories.slots("de"), other)


# -------------------------------------------------------------------------------------------- what requests say


def test_salts_tell_name_and_content_apart(tmp_path):
    folder = tiny_artifact(tmp_path).folder / "memories"
    salts = {name: slots.find(folder, name).salt for name in ("de", "fr")}
    assert salts["de"] != salts["fr"] and all(slots.is_salt(salt) for salt in salts.values())
    shutil.copytree(folder / "de", folder / "copy")
    assert slots.find(folder, "copy").salt != salts["de"], "another name"
    shutil.rmtree(folder / "de")
    shutil.copytree(folder / "fr", folder / "de")
    assert slots.find(folder, "de").salt not in salts.values(), "another content"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"koff_memry": "de"}, "kv_transfer_params knows 'koff_memory' alone; got 'koff_memry'"),
        ({"koff_memory": "de", "do_remote_prefill": True}, "alone; got 'do_remote_prefill'"),
        ({"koff_memory": 3}, "koff_memory is the name of a memory; got 3"),
        ({"koff_memory": None}, "koff_memory is the name of a memory; got None"),
        ({"koff_memory": "../de"}, "'../de' is not safe"),
    ],
)
def test_what_is_no_name_of_a_memory_is_refused(parameters, message):
    with pytest.raises(KoffError, match=message):
        slots.asked(parameters)
    assert slots.asked(None) is None and slots.asked({"koff_memory": "de"}) == "de"


def test_vllms_own_server_refuses_at_once(monkeypatch):
    fake_vllm.install(monkeypatch)
    from koff_lightning.serving.vllm.refusal import Refusal

    def look(prompt_logprobs=None, **parameters):
        extra = {"kv_transfer_params": parameters} if parameters else None
        Refusal.validate_params(SimpleNamespace(extra_args=extra, prompt_logprobs=prompt_logprobs))

    look(prompt_logprobs=1)
    look(koff_memory="de")
    with pytest.raises(ValueError, match="got 'memory'"):
        look(memory="de")
    with pytest.raises(ValueError, match="prompt_logprobs are not told with a memory"):
        look(prompt_logprobs=1, koff_memory="de")
    monkeypatch.setattr(sys.modules["vllm.platforms"].current_platform, "is_cpu", lambda: True)
    with pytest.raises(ValueError, match="on a CPU, where with LoRA they end the engine"):
        look(prompt_logprobs=1)


# ---------------------------------------------------------------------------------------------- the connector


class Layer:
    """Of a model: keeps what is written into its cache."""

    kv_cache_torch_dtype, head_size = torch.uint8, 16  # as with --kv-cache-dtype fp8: its own writing scales

    def __init__(self, heads, blocks, block):
        self.num_kv_heads, self.kv_cache = heads, torch.zeros(2, blocks * block, heads, 16)
        self.impl = self

    def do_kv_cache_update(self, layer, key, value, cache, places):
        cache[0, places], cache[1, places] = key, value


class Side:
    """A connector beside a scheduler and one in a worker, and a model of two layers."""

    def __init__(self, folder, block=4, **settings):
        from koff_lightning.serving.vllm.connector import KoffMemories

        config = AutoConfig.from_pretrained(folder / "backbone")
        given = {"block_size": block, "enable_prefix_caching": True} | settings
        made = SimpleNamespace(
            extra={"koff_memories": str(folder / "memories")},
            cache_config=SimpleNamespace(**given),
            model_config=SimpleNamespace(hf_config=config, dtype=torch.float32),
        )
        groups = SimpleNamespace(kv_cache_groups=[None])
        self.scheduler, self.worker = (KoffMemories(made, role, groups) for role in ("scheduler", "worker"))
        widths = [layer["num_key_value_heads"] for layer in config.koff_layers]
        self.layers = {f"model.layers.{i}.attn": Layer(heads, 16, block) for i, heads in enumerate(widths)}

    def step(self, new=(), resumed=()):
        """The blocks of requests that begin or come back -> those that failed."""
        output = SimpleNamespace(
            scheduled_new_reqs=[SimpleNamespace(req_id=name, block_ids=(ids,)) for name, ids in new],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[name for name, _ in resumed],
                new_block_ids=[(ids,) for _, ids in resumed],
                resumed_req_ids={name for name, _ in resumed},
            ),
        )
        self.worker.bind(self.scheduler.build_connector_meta(output))
        self.worker.start_load_kv(SimpleNamespace(no_compile_layers=self.layers))
        return self.worker.get_block_ids_with_load_errors()

    def cached(self, blocks, count, block=4):
        """What the cache holds for the first `count` tokens of a request, by layer."""
        places = [blocks[place // block] * block + place % block for place in range(count)]
        return [layer.kv_cache[:, places] for layer in self.layers.values()]


def request(name, memory, salt, *, tokens=20, prompt_logprobs=None, **changes):
    given = {
        "kv_transfer_params": {"koff_memory": memory} if memory else None,
        "sampling_params": SimpleNamespace(prompt_logprobs=prompt_logprobs),
        "skip_reading_prefix_cache": False,
    }
    return SimpleNamespace(
        request_id=name, cache_salt=salt, num_tokens=tokens, num_prompt_tokens=tokens, **given | changes
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("vllm")).folder


@pytest.fixture
def side(folder, monkeypatch):
    fake_vllm.install(monkeypatch)
    return Side(folder)


def due(folder, name, layer):
    """Keys and values of a memory, [2, P, K, dh]."""
    model = load_decomposed(folder)
    memory = model.memories.slots(name)
    return torch.stack(slots.placed(memory, slots.inv_freq(model.backbone.config), torch.float32)[layer])


def test_the_slots_that_are_missing_are_written(side, folder):
    """All of them, or those behind what the prefix cache holds; once more for a request that had lost its blocks."""
    salts = {name: slots.find(folder / "memories", name).salt for name in ("de", "fr")}
    first, second = request("a", "de", salts["de"]), request("b", "fr", salts["fr"])
    bare = request("c", None, None)
    assert side.scheduler.get_num_new_matched_tokens(first, 0) == (5, False)
    assert side.scheduler.get_num_new_matched_tokens(second, 4) == (1, False)
    assert side.scheduler.get_num_new_matched_tokens(bare, 0) == (0, False)
    for one, count in ((first, 5), (second, 1), (bare, 0)):
        side.scheduler.update_state_after_alloc(one, None, count)
    assert side.step(new=[("a", [3, 7]), ("b", [1, 9]), ("c", [2])]) == set()
    for layer in range(2):
        assert torch.equal(side.cached([3, 7], 5)[layer], due(folder, "de", layer))
        assert torch.equal(side.cached([1, 9], 5)[layer][:, 4:], due(folder, "fr", layer)[:, 4:])
        assert not side.cached([1, 9], 4)[layer].any(), "what the prefix cache holds is left alone"
    assert side.scheduler.get_num_new_matched_tokens(first, 0) == (5, False)
    side.scheduler.update_state_after_alloc(first, None, 5)
    assert side.step(resumed=[("a", [12, 4])]) == set()
    assert torch.equal(side.cached([12, 4], 5)[0], due(folder, "de", 0))


def test_all_slots_in_the_prefix_cache_are_not_written(side, folder):
    held = slots.find(folder / "memories", "de")
    assert side.scheduler.get_num_new_matched_tokens(request("a", "de", held.salt), 8) == (0, False)


WRONG = {
    "there is no memory 'nobody'": {"memory": "nobody"},
    "got 'koff_memry'": {"kv_transfer_params": {"koff_memry": "de"}},
    "wants cache_salt 'koff:de:[0-9a-f]{64}'; got None": {"salt": None},
    "wants cache_salt .*; got 'koff:fr:": {"salt": "of fr"},
    "prompt_logprobs are not told": {"prompt_logprobs": 1},
    "wants 5 tokens in the places of its slots, and then the text": {"tokens": 5},
    "has a memory's cache_salt, and names none": {"memory": None},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_request_fails_alone(side, folder, caplog, message):
    """Nothing is raised, which would end the engine; its block is told to vLLM as one that was not loaded."""
    salts = {name: slots.find(folder / "memories", name).salt for name in ("de", "fr")}
    given = {"memory": "de", "salt": salts["de"], "skip_reading_prefix_cache": True} | WRONG[message]
    memory, salt = given.pop("memory"), given.pop("salt")
    wrong = request("wrong", memory, salts["fr"] if salt == "of fr" else salt, **given)
    right = request("right", "fr", salts["fr"])
    for _ in range(2):  # the scheduler asks again while there is no room
        assert side.scheduler.get_num_new_matched_tokens(wrong, 0) == (1, False)
    assert not wrong.skip_reading_prefix_cache, "else vLLM loads nothing, and nothing fails"
    assert wrong.sampling_params.prompt_logprobs is None
    side.scheduler.update_state_after_alloc(wrong, None, 1)
    side.scheduler.get_num_new_matched_tokens(right, 0)
    side.scheduler.update_state_after_alloc(right, None, 5)
    assert side.step(new=[("wrong", [6, 2]), ("right", [8, 5])]) == {6}
    assert torch.equal(side.cached([8, 5], 5)[1], due(folder, "fr", 1))
    (said,) = [record.getMessage() for record in caplog.records if "request wrong fails" in record.getMessage()]
    assert re.search(message, said)


def test_a_request_of_one_token_cannot_fail_and_is_said(side, caplog):
    assert side.scheduler.get_num_new_matched_tokens(request("a", "nobody", None, tokens=1), 0) == (0, False)
    assert "request a is ANSWERED WITHOUT A MEMORY: there is no memory 'nobody'" in caplog.text


def test_a_memory_that_is_broken_or_was_replaced_fails_its_requests_alone(tmp_path, monkeypatch, caplog):
    fake_vllm.install(monkeypatch)
    folder = tiny_artifact(tmp_path).folder
    side = Side(folder)
    names = ("de", "fr", "law")
    for name in names:
        one = request(name, name, slots.find(folder / "memories", name).salt)
        side.scheduler.get_num_new_matched_tokens(one, 0)
        side.scheduler.update_state_after_alloc(one, None, 5)
    (folder / "memories" / "de" / "kv_memory.safetensors").write_bytes(b"broken")
    shutil.copy(folder / "memories" / "law" / "memory.json", folder / "memories" / "fr" / "memory.json")
    assert side.step(new=[("de", [1, 2]), ("fr", [3, 4]), ("law", [5, 6])]) == {1, 2, 3, 4}
    assert "memory de was not loaded" in caplog.text and "it was replaced since the request came" in caplog.text


def test_a_connector_that_cannot_work_does_not_start(folder, monkeypatch):
    fake_vllm.install(monkeypatch)
    from koff_lightning.serving.vllm.connector import KoffMemories

    def start(extra, groups):
        config = AutoConfig.from_pretrained(folder / "backbone")
        made = SimpleNamespace(
            extra=extra,
            cache_config=SimpleNamespace(block_size=4, enable_prefix_caching=True),
            model_config=SimpleNamespace(hf_config=config),
        )
        KoffMemories(made, "scheduler", SimpleNamespace(kv_cache_groups=[None] * groups))

    with pytest.raises(KoffError, match="wants 'koff_memories', a folder of memories; got None"):
        start({}, 1)
    with pytest.raises(KoffError, match="keep --max-model-len within the sliding window"):
        start({"koff_memories": str(folder / "memories")}, 2)


# ---------------------------------------------------------------------------------------------------- the plugin


def test_what_vllm_is_told_when_it_starts(monkeypatch, caplog):
    told = fake_vllm.install(monkeypatch)
    with caplog.at_level(logging.WARNING):
        plugin.register()
        plugin.register()  # each process may do it more than once
    assert caplog.text == ""
    names = [f"Koff{family}ForCausalLM" for family in ("Llama", "Mistral", "Qwen2", "Qwen3")]
    assert told.models == {name: f"koff_lightning.serving.vllm.models:{name}" for name in names}
    assert told.connectors == {"KoffMemories": ("koff_lightning.serving.vllm.connector", "KoffMemories")}
    for kind in ("koff_llama", "koff_mistral", "koff_qwen2", "koff_qwen3", "nemotron-nas"):
        assert AutoConfig.for_model(kind).model_type == kind
    (entry,) = [one for one in entry_points(group="vllm.general_plugins") if one.name == "koff"] or [None]
    assert entry is None or entry.load() is plugin.register  # None: installed before there was one


@pytest.mark.parametrize("release", ["0.33.0", "0.3.2", "0.320.0", "1.0"])
def test_another_release_is_said_in_one_line(monkeypatch, caplog, release):
    fake_vllm.install(monkeypatch, release)
    plugin.register()
    (record,) = caplog.records
    assert record.getMessage().startswith(f"koff-lightning was not tried with vLLM {release}, only with 0.32:")
    assert plugin.said_of("0.32.0") is plugin.said_of("0.32.5.post1") is None


def test_rows_without_lora_take_none(monkeypatch):
    """With as many adapters as places, -1 would be the last of them."""
    told = fake_vllm.install(monkeypatch)
    torch.manual_seed(0)
    adapters, x = torch.randn(2, 3, 8), torch.randn(4, 8)  # [places, rank, in], [tokens, in]
    rows = told.wrapper(torch.tensor([0, -1, 1, -1]))

    def shrunk():
        y = torch.zeros(4, 3)
        rows._apply_shrink(y, x, adapters, 2.0)
        return y

    assert shrunk()[1].any(), "the fault is there"
    plugin.register()
    plugin.register()
    y = shrunk()
    assert not y[[1, 3]].any()
    assert torch.allclose(y[[0, 2]], torch.stack([2 * adapters[0] @ x[0], 2 * adapters[1] @ x[2]]))


# ----------------------------------------------------------------------------------------------------- the engine


def out(ids, finish=None, logprobs=None):
    return SimpleNamespace(token_ids=ids, finish_reason=finish, logprobs=logprobs)


def engine(folder, monkeypatch, script=None, **options):
    told = fake_vllm.install(monkeypatch)
    from koff_lightning.serving.vllm.engine import VllmEngine

    told.llm.script = script or (lambda prompt, parameters: [out([7], "length")])
    return VllmEngine(folder, **options), told


async def pieces(made, ids, memory, options):
    return [piece async for piece in made.stream(ids, memory, options)]


def test_a_text_goes_with_places_salt_and_lora_and_comes_back_without(folder, monkeypatch):
    made, told = engine(folder, monkeypatch, lambda prompt, parameters: [out([7, 8]), out([9, 1], "stop")])
    found = asyncio.run(pieces(made, [4, 5], "fr", Options(9, seed=3, temperature=0.5)))
    assert [[token.id for token in piece.tokens] for piece in found] == [[7, 8], [9]]
    assert found[-1].finish == "stop"
    ((prompt, parameters, lora),) = told.llm.asked
    assert prompt["prompt_token_ids"] == [0] * 5 + [4, 5]
    name = parameters.extra_args["kv_transfer_params"]["koff_memory"]
    assert name == lora.lora_name and prompt["cache_salt"].startswith(f"koff:{name}:")
    assert prompt["cache_salt"].endswith(made.memories()["fr"])
    copies = told.llm.settings.kv_transfer_config["kv_connector_extra_config"]["koff_memories"]
    assert slots.find(Path(copies), name).salt == prompt["cache_salt"] and lora.lora_path == f"{copies}/{name}"
    assert (parameters.temperature, parameters.seed, parameters.stop_token_ids) == (0.5, 3, [1])
    assert made.room("fr") == 512 - 5 and made.room(None) == 512
    assert made.load == (0, 0) and told.llm.settings.max_loras == 3 and told.llm.settings.max_lora_rank == 8
    asyncio.run(made.close())
    assert told.llm.closed and not Path(copies).exists()


def test_a_bare_text_is_bare(folder, monkeypatch):
    made, told = engine(folder, monkeypatch)
    asyncio.run(pieces(made, [4, 5], None, Options(9, ignore_end=True)))
    ((prompt, parameters, lora),) = told.llm.asked
    assert prompt == {"prompt_token_ids": [4, 5]} and lora is None and parameters.extra_args is None
    assert parameters.stop_token_ids == []


def test_log_probabilities_and_an_echo(folder, monkeypatch):
    first = {7: SimpleNamespace(logprob=-2.0, rank=3), 5: SimpleNamespace(logprob=-0.5, rank=1)}
    made, told = engine(folder, monkeypatch, lambda prompt, parameters: [out([7], "length", [first])])
    (piece,) = asyncio.run(pieces(made, [4], "de", Options(1, logprobs=1, echo=True)))
    assert piece.tokens[0].logprob == -2.0 and piece.tokens[0].top == ((5, -0.5),)
    assert [token.id for token in piece.prompt] == [4]
    (piece,) = asyncio.run(pieces(made, [4], "de", Options(0, echo=True)))
    assert piece.finish == "length" and not piece.tokens and len(told.llm.asked) == 1


def test_what_cannot_be_answered_is_said(folder, monkeypatch):
    made, told = engine(folder, monkeypatch, lambda prompt, parameters: [out([], "error")])
    with pytest.raises(Unknown, match="there is no memory 'nobody'"):
        asyncio.run(pieces(made, [4], "nobody", Options(1)))
    with pytest.raises(Failed, match="could not answer; its log says why"):
        asyncio.run(pieces(made, [4], "de", Options(1)))

    def die(prompt, parameters):
        raise told.dead

    told.llm.script = die
    with pytest.raises(Failed, match="the engine failed .EngineDeadError."):
        asyncio.run(pieces(made, [4], "de", Options(1)))
    assert made.load == (0, 0)


def test_memories_come_and_go(tmp_path, monkeypatch):
    folder = tiny_artifact(tmp_path).folder
    made, told = engine(folder, monkeypatch)

    async def scene():
        assert await made.refresh() == []
        before = made.memories()["law"]
        stream = made.stream([4], "law", Options(1))
        remove_memory(folder, "fr")
        add_memory(folder, folder / "memories" / "de", "again")
        remove_memory(folder, "law")
        assert await anext(stream)
        assert await made.refresh() == ["removed fr", "removed law", "added again"]
        copies = sorted(path.name.rpartition("-")[0] for path in made._work.iterdir())
        assert copies == ["again", "de", "law"], "law is being read"
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        assert sorted(path.name.rpartition("-")[0] for path in made._work.iterdir()) == ["again", "de"]
        assert list(made.memories()) == ["de", "again"] and before not in made.memories().values()
        (folder / "memories" / "again" / "kv_memory.safetensors").write_bytes(b"broken")
        assert await made.refresh() == []
        await pieces(made, [4], "again", Options(1))

    told.llm.adapters += [1, 2, 3]  # what vLLM took up with their first requests
    asyncio.run(scene())
    assert told.llm.adapters == [1, 4]


def test_an_engine_that_dies_hides_no_answer_and_keeps_no_memory(tmp_path, monkeypatch):
    """What the engine says when it is to forget a memory is not the client's affair."""
    folder = tiny_artifact(tmp_path).folder
    made, told = engine(folder, monkeypatch, lambda prompt, parameters: [out([7]), out([], "error")])

    async def lost(number):
        raise told.dead("the engine is gone")

    async def scene():
        stream = made.stream([4], "law", Options(2))
        assert (await anext(stream)).tokens[0].id == 7
        remove_memory(folder, "law")
        remove_memory(folder, "fr")
        assert await made.refresh() == ["removed fr", "removed law"], "whatever vLLM says of fr's adapter"
        with pytest.raises(Failed, match="could not answer; its log says why"):
            await anext(stream)

    monkeypatch.setattr(told.llm, "remove_lora", lost)
    assert made.alive
    asyncio.run(scene())
    told.llm.errored = True
    assert not made.alive, "for /health"
    assert made.load == (0, 0) and list(made.memories()) == ["de"]
    assert [path.name.rpartition("-")[0] for path in made._work.iterdir()] == ["de"]


def test_a_memory_that_cannot_be_used_is_left_out(tmp_path, monkeypatch):
    folder = tiny_artifact(tmp_path).folder
    made, _ = engine(folder, monkeypatch)
    other = tiny_artifact(tmp_path / "other", lora=LoraSpec(rank=20)).folder
    add_memory(folder, other / "memories" / "de", "large")
    (said,) = asyncio.run(made.refresh())
    assert "left out large, which cannot be used: its LoRA has rank 20, this server made room for 8" in said
    assert asyncio.run(made.refresh()) == [] and "large" not in made.memories()


def test_an_artifact_that_vllm_cannot_serve_is_refused(tmp_path, monkeypatch):
    folder = tiny_artifact(tmp_path, kv=KVSpec(4, layers=[1])).folder
    with pytest.raises(KoffError, match="has slots in 1 of 2 only: serve it with --engine own"):
        engine(folder, monkeypatch)
    folder = tiny_artifact(tmp_path / "second").folder
    (folder / "memories" / "de" / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(KoffError, match="adapter_model.safetensors has 6 bytes instead of"):
        engine(folder, monkeypatch)


def test_a_rope_that_vllm_computes_otherwise_is_refused(tmp_path, monkeypatch):
    """vLLM takes one row of frequencies for texts of any length: without a memory with slots nobody would look."""
    moving = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    folder = tiny_artifact(tmp_path, kv=None, changes={"rope_parameters": moving}).folder
    with pytest.raises(KoffError, match="as rope type 'dynamic' has them do: serve it with --engine own"):
        engine(folder, monkeypatch)


def test_the_command_says_what_to_install(folder, capsys):
    assert main(["serve", str(folder), "--engine", "vllm", "--port", "0"]) == 2
    assert "vLLM is not installed, and wants an environment of its own" in capsys.readouterr().err
    assert main(["serve", str(folder), "--engine", "vllm", "--device", "cpu"]) == 2
    assert "--device is not for --engine vllm: leave it out" in capsys.readouterr().err
