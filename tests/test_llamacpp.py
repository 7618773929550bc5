"""llama.cpp computes what our runtime does: bare, LoRA, KV memory and both, in every layout that it can hold."""

import asyncio
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_artifact import tiny_artifact, tiny_decomposition
from tiny_models import LLAMA3_ROPE, YARN_ROPE

from koff_lightning import KoffError, load_decomposed
from koff_lightning.artifact import engines
from koff_lightning.artifact.export import export
from koff_lightning.artifact.to_gguf import to_gguf
from koff_lightning.cli import main
from koff_lightning.loading import load_tokenizer
from koff_lightning.serving import llama_library
from koff_lightning.serving.llama_library import library
from koff_lightning.serving.llama_state import data_of, with_slots
from koff_lightning.specs.memories import KVSpec, LoraSpec

pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: `make install` does it, on Linux")

from koff_lightning.serving.llama_model import LlamaModel

BOUND = 1e-4  # of logits that reach 6
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}


def engine(folder, **options):
    return LlamaModel(folder, **{"kind": "f32", "cache": "f32", "threads": 1, **options})


def prompts(*lengths, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 300, (length,), generator=numbers).tolist() for length in lengths]


@torch.no_grad()
def ours(model, ids, memory, count):
    """Greedy tokens, and the logits [count, V] that they were chosen by."""
    ids, found = list(ids), []
    for _ in range(count):
        found.append(model(torch.tensor([ids]), domains=memory).logits[0, -1])
        ids.append(int(found[-1].argmax()))
    return ids[-count:], torch.stack(found)


def theirs(llama, cases, count):
    """The same of several texts, (ids, memory), under way together."""
    texts = [llama.begin(memory) for _, memory in cases]
    logits = [[row[-1]] for row in llama.read([(t, ids) for t, (ids, _) in zip(texts, cases, strict=True)])]
    for _ in range(count - 1):
        step = llama.read([(text, [int(rows[-1].argmax())]) for text, rows in zip(texts, logits, strict=True)])
        for rows, row in zip(logits, step, strict=True):
            rows.append(row[-1])
    for text in texts:
        llama.end(text)
    return [([int(row.argmax()) for row in rows], torch.stack(rows)) for rows in logits]


def alike(folder, llama, cases, count=12):
    model = load_decomposed(folder)
    for (ids, memory), (tokens, logits) in zip(cases, theirs(llama, cases, count), strict=True):
        due, exact = ours(model, ids, memory, count)
        assert tokens == due, memory
        assert (logits - exact).abs().max() < BOUND, memory


LAYOUTS = {
    "dense": {"target": 0.0},
    "uniform": {"layout": "uniform", "uniform": True},
    "ragged": {},
    "merged": {"layout": "merged"},
    "masked": {"layout": "masked"},
    "deci": {"layout": "deci"},
}


def all_arms(folder, layout="ragged", **options):
    """An artifact with a memory that has both parts, `de`, one of LoRA alone, `fr`, and one of slots alone, `law`."""
    module = tiny_decomposition(folder, **options)
    for name, lora, kv in [("fr", LoraSpec(rank=2, alpha=5.0), None), ("law", None, KVSpec(slots=9))]:
        module.memories.remove(name)
        module.memories.add(name, lora, kv)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        slots = [b for name, b in module.memories.named_buffers() if "sink" in name]
        for tensor in (*module.memories.lora_parameters(), *module.memories.kv_parameters(), *slots):
            torch.nn.init.normal_(tensor, std=0.3 if tensor.ndim == 3 else 0.1)
    export(module, folder / layout, layout=layout, domain="de" if layout == "merged" else None, prove=False)
    return folder / layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_greedy_tokens(tmp_path, layout):
    """Bare, LoRA, slots and both in one batch, prompts of unequal length."""
    folder = all_arms(tmp_path, **LAYOUTS[layout])
    llama = engine(folder, rows=8)
    memories = [None, *llama.domains]
    assert len(memories) == (2 if layout == "merged" else 4)
    alike(folder, llama, list(zip(prompts(1, 30, 7, 60, 2, 9, 5, 11), memories * 4, strict=False)))
    llama.close()


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mistral", {"changes": {"sliding_window": 400}}),
        ("qwen2", {}),
        ("qwen2", {"layout": "uniform", "uniform": True, "changes": {"head_dim": 32}}),
        ("qwen3", {"layout": "uniform", "uniform": True}),
        ("llama", {"tie": True, "changes": {"attention_bias": True, "rope_parameters": LINEAR_ROPE}}),
        ("llama", {"changes": {"mlp_bias": True, "rope_parameters": YARN_ROPE | {"attention_factor": 1.3}}}),
        ("llama", {"changes": {"rope_parameters": LLAMA3_ROPE}}),
        ("qwen2", {"changes": {"rope_parameters": LLAMA3_ROPE}, "layout": "uniform", "uniform": True}),
        ("qwen3", {"changes": {"rope_parameters": YARN_ROPE}, "layout": "uniform", "uniform": True}),
    ],
)
def test_families_biases_and_scaled_rotary_embeddings(tmp_path, family, options):
    """Over 300 tokens, so that every scaling shows."""
    folder = tiny_artifact(tmp_path, family, **options).folder
    llama = engine(folder, rows=2)
    alike(folder, llama, list(zip(prompts(300, 280), [None, "fr"], strict=True)), count=3)
    llama.close()


def test_biases_that_make_up_for_removed_units(tmp_path):
    module = tiny_decomposition(tmp_path)
    module.gates.bias = 0.3 * torch.randn(len(module.gates.groups), 64, generator=torch.Generator().manual_seed(0))
    export(module, tmp_path / "out", prove=False)
    llama = engine(tmp_path / "out")
    alike(tmp_path / "out", llama, list(zip(prompts(20, 30), [None, "fr"], strict=True)))
    llama.close()


def test_a_prompt_of_several_parts_and_logits_everywhere(tmp_path):
    folder = tiny_artifact(tmp_path, changes={"max_position_embeddings": 2048}).folder
    llama = engine(folder, rows=1)
    (ids,) = prompts(600)
    text = llama.begin("fr")
    logits = llama.read([(text, ids)], everywhere=True)[0]
    with torch.no_grad():
        exact = load_decomposed(folder)(torch.tensor([ids]), domains="fr").logits[0]
    assert (logits - exact).abs().max() < BOUND * exact.abs().max()
    llama.close()


def test_places_are_used_again_and_hold_nothing_of_before(tmp_path):
    folder = tiny_artifact(tmp_path).folder
    llama = engine(folder, rows=2)
    cases = list(zip(prompts(9, 12, 5, 8, 3, 4), ["fr", None, None, "law", "de", "fr"], strict=True))
    for pair in (cases[:2], cases[2:4], cases[4:]):
        alike(folder, llama, pair, count=4)
    llama.close()


def test_memories_come_and_go(tmp_path):
    folder = tiny_artifact(tmp_path).folder
    llama = engine(folder, rows=1)
    text = llama.begin(None)  # all places taken: a memory is taken up all the same
    assert llama.add_memory(folder / "memories" / "fr", "again") == "again"
    llama.end(text)
    (ids,) = prompts(9)
    (_, first), (_, second) = (theirs(llama, [(ids, name)], 4)[0] for name in ("fr", "again"))
    assert torch.equal(first, second)
    llama.remove_memory("fr")
    assert llama.domains == ["de", "law", "again"]
    with pytest.raises(KoffError, match="there is no memory 'fr'; loaded: de, law, again"):
        llama.begin("fr")
    alike(folder, llama, [(ids, "law")], count=2)
    llama.close()


def test_a_memory_of_some_layers_is_refused_and_said_before(tmp_path):
    folder = tiny_artifact(tmp_path, kv=KVSpec(4, layers=[1])).folder
    with pytest.raises(KoffError, match="has slots in 1 of 2 only: serve it with --engine own"):
        engine(folder)
    answer, why = engines.check(folder, ["gguf"])["gguf"]["kv"]
    assert answer == "no" and "a memory here has some in 1 alone" in why


def test_q8_0_and_f16_are_near(tmp_path):
    folder = tiny_artifact(tmp_path, layout="uniform", uniform=True).folder
    (ids,) = prompts(30)
    _, exact = ours(load_decomposed(folder), ids, "fr", 1)
    gaps = {}
    for kind in ("f16", "q8_0"):
        llama = engine(folder, kind=kind, cache="f16")
        gaps[kind] = float((theirs(llama, [(ids, "fr")], 1)[0][1] - exact).abs().max() / exact.abs().max())
        llama.close()
    assert gaps["f16"] < 5e-3 < gaps["q8_0"] < 0.1


# ------------------------------------------------------------------------------ that a memory was really read


class Deaf:
    """A library that says yes and does nothing to one of its functions."""

    def __init__(self, lib, name, answer):
        self.lib, self.name, self.answer = lib, name, answer

    def __getattr__(self, name):
        return self.answer if name == self.name else getattr(self.lib, name)


def test_an_engine_that_does_not_take_the_slots_is_found_out(tmp_path):
    llama = engine(tiny_artifact(tmp_path).folder)
    lib = llama._lib
    llama._lib = Deaf(lib, "llama_state_seq_set_data", lambda context, state, size, number: size)
    with pytest.raises(KoffError, match="did not take the slots of fr|no cells"):
        llama.begin("fr")
    assert len(llama._free) == 5, "the place is free again"
    other = llama._loaded["law"].state
    llama._lib = Deaf(
        lib, "llama_state_seq_set_data", lambda c, s, n, i: lib.llama_state_seq_set_data(c, other, len(other), i)
    )
    with pytest.raises(KoffError, match="did not take the slots of fr"):
        llama.begin("fr")
    llama._lib = lib
    llama.close()


def test_an_engine_that_drops_the_slots_is_found_out(tmp_path):
    llama = engine(tiny_artifact(tmp_path).folder)
    text = llama.begin("fr")
    llama.read([(text, [5, 6])])
    memory = llama._lib.llama_get_memory(llama._context)
    assert llama._lib.llama_memory_seq_rm(memory, text.number, 0, 5)
    with pytest.raises(KoffError, match="lost a part of a text with memory 'fr': it holds 5 to 7"):
        llama.read([(text, [7])])
    llama.close()


def test_a_state_of_another_form_is_refused():
    pairs = [(np.ones((2, 8)), np.full((2, 8), 2.0))]
    cells = [2, 0, 1, 0, 1, 1, 0]
    head = np.array([7, 0, 3, 0, *cells], "<u4").tobytes()
    rows = np.array([0], "<u4").tobytes() + np.array([32], "<u8").tobytes() + bytes(64)
    state = head + np.array([0, 1, 0, 0], "<u4").tobytes() + rows + rows + bytes(4)
    made = with_slots(state, pairs)
    assert data_of(made, 2)[28:92] == np.ones(16, "<f4").tobytes()
    assert len(made) == len(state) and made[: len(head)] == head
    for place, value, message in [
        (4, 1, "1 cells where 2 are due"),
        (5, 4, "cell 0 at position 4"),
        (11, 2, "transposed 2"),
        (12, 2, "2 layers"),
        (13, 16, "rotations .16, 0."),
        (15, 8, "a cache of type 8"),
        (16, 64, "rows of"),
    ]:
        odd = bytearray(state)
        odd[4 * place : 4 * place + 4] = np.array([value], "<u4").tobytes()
        with pytest.raises(KoffError, match=f"not of the form that is known .*({message})"):
            with_slots(bytes(odd), pairs)
    with pytest.raises(KoffError, match="more follows"):
        with_slots(state[:-4] + bytes([0, 0, 0, 1]), pairs)
    for end in (10, 50, 100):
        with pytest.raises(KoffError, match="it ends too early"):
            with_slots(state[:end], pairs)


# ---------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_done_is_said(tmp_path, monkeypatch):
    folder = tiny_artifact(tmp_path).folder
    with pytest.raises(KoffError, match="cache's type must be one of f32, f16; got 'q8_0'"):
        LlamaModel(folder, cache="q8_0")
    with pytest.raises(
        KoffError, match="the 5 slots of the memory de leave no place in a context of 5 tokens.*--engine own"
    ):
        engine(folder, context=5)
    with pytest.raises(KoffError, match="holds no koff-gguf.json: `koff convert gguf"):
        engine(folder, gguf=tmp_path)
    to_gguf(folder, tmp_path / "gguf", "f32")
    other = tiny_artifact(tmp_path / "other", seed=1).folder
    with pytest.raises(KoffError, match="was not made from .* as it is now: convert it again"):
        engine(other, gguf=tmp_path / "gguf")
    llama = engine(folder, gguf=tmp_path / "gguf", rows=1, context=40)
    with pytest.raises(KoffError, match="a text of 5 and 36 tokens does not fit in 40"):
        llama.read([(llama.begin("fr"), [3] * 36)])
    llama.begin(None)
    with pytest.raises(KoffError, match="no place is free"):
        llama.begin(None)
    llama.close()
    (tmp_path / "gguf" / "model.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(KoffError, match="llama.cpp cannot load .*model.gguf: ") as caught:
        engine(folder, gguf=tmp_path / "gguf")
    assert "\n" not in str(caught.value)


def test_other_releases_and_none_are_refused(monkeypatch):
    library.cache_clear()
    monkeypatch.setattr(llama_library, "TESTED", {"xllamacpp": "1.0"})
    with pytest.raises(KoffError, match=r"xllamacpp 2026\S+ has not been tried, 1.0 has: pip install"):
        library()
    monkeypatch.setattr(llama_library, "TESTED", {"no-such-package": "1.0"})
    with pytest.raises(KoffError, match="llama.cpp is not installed .no-such-package is missing."):
        library()
    monkeypatch.undo()
    library()
    text = (Path(__file__).parents[1] / "setup.cfg").read_text(encoding="utf-8")
    assert all(f"{name}=={release}" in text for name, release in llama_library.TESTED.items())


# ------------------------------------------------------------------------------------- koff-tiny and its tokenizer


@pytest.fixture(scope="module")
def koff_tiny(tmp_path_factory):
    """koff-tiny with units removed and two domains' memories, as files and as GGUF."""
    from koff_lightning.decomposition import Decomposition
    from koff_lightning.specs.sparsity import SparsitySpec

    folder = tmp_path_factory.mktemp("tiny")
    module = Decomposition(
        "koff-tiny", domains=["de", "python"], lora=LoraSpec(rank=4), kv=None, sparsity=SparsitySpec(target=0.12)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module.gates.harden(module.budget.harden(torch.rand(len(module.gates.logits))))
        for tensor in module.memories.lora_parameters():
            torch.nn.init.normal_(tensor, std=0.05)
    export(module.eval(), folder / "artifact", prove=False)
    to_gguf(folder / "artifact", folder / "gguf", "f32")
    return folder


TEXTS = [
    "The capital of France is",
    "Klicken Sie auf „Übernehmen“, um 1.234,56 € zu zahlen!\n\n\tEnde.",
    "def main(args):\n    return [x**2 for x in range(10)]  # done\r\n",
    "它很好。 日本語テキスト नमस्ते क्षि हिन्दी á̈b́ éa ̀ 한국어 🙂🙂 \u200d ",
    "it's WE'LL don't 'tis  ''s   \n \n   x\n",
    " ́a !́b 1́2 \ńc",
]


def test_texts_become_the_same_tokens(koff_tiny):
    llama = engine(koff_tiny / "artifact", gguf=koff_tiny / "gguf")
    vocabulary = llama._lib.llama_model_get_vocab(llama._model)
    tokenizer = load_tokenizer("koff-tiny")
    rng = np.random.default_rng(0)
    signs = [*"aZé1²½ \n\r\t'.!-_中あक्◌ं", "́", "🙂", "'s", "'LL", "  ", "\r\n", "ß", "Ǆ", "ª", "٣", "Ⅷ", " "]
    for text in [*TEXTS, *("".join(rng.choice(signs, 24)) for _ in range(300))]:
        raw, room = text.encode(), llama._ffi.new("llama_token[]", 512)
        count = llama._lib.llama_tokenize(vocabulary, raw, len(raw), room, 512, True, False)
        assert list(room[0:count]) == tokenizer(text).input_ids, repr(text)
    llama.close()


SERVER = """
import json, os, sys
import xllamacpp as x
p = x.CommonParams()
p.model.path, p.n_ctx, p.n_parallel = sys.argv[1] + "/model.gguf", 256, 2
p.warmup, p.fit_params, p.cache_ram_mib = False, False, 0
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = 1
p.cache_type_k = p.cache_type_v = x.ggml_type.GGML_TYPE_F32
p.flash_attn_type = x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
p.lora_adapters = [x.CommonAdapterLoraInfo(f"{sys.argv[1]}/{name}.lora.gguf", 0.0) for name in sys.argv[2:]]
p.lora_init_without_apply = True
server = x.Server(p)
print(server.listening_address, flush=True)
sys.stdin.read()
os._exit(0)
"""


def test_a_plain_llama_server_takes_a_domain_per_request(koff_tiny):
    """As the README beside the files says: text in, the LoRA by its number."""
    script = [sys.executable, "-c", SERVER, str(koff_tiny / "gguf"), "de", "python"]
    model = load_decomposed(koff_tiny / "artifact")
    with subprocess.Popen(
        script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            url = server.stdout.readline().strip()
            for memory, scales in [(None, (0.0, 0.0)), ("de", (1.0, 0.0)), ("python", (0.0, 1.0))]:
                body = {"prompt": TEXTS[0], "n_predict": 12, "temperature": 0, "return_tokens": True}
                body["lora"] = [{"id": i, "scale": scale} for i, scale in enumerate(scales)]
                request = urllib.request.Request(
                    f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
                )
                with urllib.request.urlopen(request, timeout=60) as answer:
                    tokens = json.load(answer)["tokens"]
                due, _ = ours(model, model.tokenizer(TEXTS[0]).input_ids, memory, 12)
                due = due[: due.index(1) + 1] if 1 in due else due
                assert [t for t in tokens if t != 1] == [t for t in due if t != 1] and len(tokens) > 3, memory
        finally:
            server.stdin.close()


# ------------------------------------------------------------------------------------------------ behind the front


async def answers(engine, cases, options):
    async def one(ids, memory):
        return [piece async for piece in engine.stream(ids, memory, options)]

    return await asyncio.gather(*(one(ids, memory) for ids, memory in cases))


def test_as_an_engine_it_answers_as_the_own_one(tmp_path):
    """More texts than places, tokens and log-probabilities; memories taken away and added while it runs."""
    from koff_lightning.artifact.memories import add_memory, remove_memory
    from koff_lightning.serving.engine import Options, Unknown
    from koff_lightning.serving.llamacpp import LlamaCppEngine
    from koff_lightning.serving.own import OwnEngine

    folder = tiny_artifact(tmp_path).folder
    cases = list(zip(prompts(*range(1, 13)), [None, "fr", "law"] * 4, strict=True))

    async def run():
        made = [OwnEngine(folder), LlamaCppEngine(folder, rows=4, kind="f32", cache="f32")]
        own, llama = made
        assert llama.memories() == own.memories() and llama.room("fr") == llama.room(None) - 5
        for options in (Options(8, ignore_end=True), Options(3, logprobs=2, echo=True)):
            due, found = [await answers(engine, cases, options) for engine in made]
            for ours_, theirs_ in zip(due, found, strict=True):
                assert [t.id for p in theirs_ for t in p.tokens] == [t.id for p in ours_ for t in p.tokens]
                assert theirs_[-1].finish == ours_[-1].finish
                first, second = ([t for t in pieces[0].prompt or ()] for pieces in (ours_, theirs_))
                assert [t.id for t in first] == [t.id for t in second]
                values = [(a.logprob, b.logprob) for a, b in zip(first[1:], second[1:], strict=True)]
                assert all(abs(a - b) < 1e-4 for a, b in values)
        remove_memory(folder, "fr")
        assert await llama.refresh() == ["removed fr"]
        with pytest.raises(Unknown):
            await answers(llama, [([3], "fr")], Options(1))
        add_memory(folder, folder / "memories" / "law", "fr")
        assert await llama.refresh() == ["added fr"]
        one, two = await answers(llama, [([3, 4], "fr"), ([3, 4], "law")], Options(4))
        assert one == two
        with pytest.raises(KoffError, match="has no router"):
            llama.route(["a text"])
        for engine in made:
            await engine.close()

    asyncio.run(run())


def test_as_an_engine_a_prompt_that_fails_fails_alone(tmp_path):
    """As often as it comes: its place is free again."""
    from koff_lightning.serving.engine import Failed, Options
    from koff_lightning.serving.llamacpp import LlamaCppEngine

    folder, options = tiny_artifact(tmp_path).folder, Options(40, ignore_end=True)

    async def run():
        llama = LlamaCppEngine(folder, rows=2, kind="f32", cache="f32")
        (due,) = await answers(llama, [([3, 4], "fr")], options)
        read = llama._llama.read

        def failing(parts, everywhere=False):
            if any(299 in ids for _, ids in parts):
                raise KoffError("llama.cpp failed at a step")
            return read(parts, everywhere)

        llama._llama.read = failing
        stream = llama.stream([3, 4], "fr", options)
        found = [await anext(stream)]
        for echo in (False, True, False, True):
            with pytest.raises(Failed, match="the engine failed .KoffError."):
                await answers(llama, [([5, 299], "law")], Options(4, echo=echo))
        found += [piece async for piece in stream]
        assert [t.id for p in found for t in p.tokens] == [t.id for p in due for t in p.tokens]
        await llama.close()

    asyncio.run(run())


def test_over_http_it_answers_as_the_own_one(tmp_path):
    from served import Client, served

    from koff_lightning.serving.llamacpp import LlamaCppEngine
    from koff_lightning.serving.own import OwnEngine

    folder, found = tiny_artifact(tmp_path).folder, []
    fit = ["router", "fit", "--model", str(folder), "--train_bytes", "20000", "--none_rate", "0"]
    assert main([*fit, "--data", "de=bundled:de", "--data", "fr=bundled:fr", "--data", "law=bundled:python"]) == 0
    ask = {"prompt": ["the quick", "Klicken Sie mit der rechten Maustaste"], "n": 2, "temperature": 1.0, "seed": 3}
    for engine in (OwnEngine(folder), LlamaCppEngine(folder, rows=4, kind="f32", cache="f32")):
        with served(engine) as address:
            client = Client(address)
            names = client.models()
            answers = [client.complete(name, **ask) for name in names]
            assert client.complete("tiny:de", [5] * 600)[1]["error"]["code"] == "context_length_exceeded"
        found.append((names, [(s, c["model"], [x["text"] for x in c["choices"]], c["usage"]) for s, c in answers]))
    assert found[0] == found[1]
    assert found[0][0][-1] == "tiny:auto" and [status for status, *_ in found[1][1]] == [200] * 5


def test_options_of_the_other_engine_are_refused(tmp_path, capsys):
    for words, name in [(["--engine", "llamacpp", "--device", "cpu"], "--device"), (["--gguf", "x"], "--gguf")]:
        assert main(["serve", str(tmp_path), *words]) == 2
        assert f"{name} is not for --engine" in capsys.readouterr().err
