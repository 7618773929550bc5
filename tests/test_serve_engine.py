"""The own engine: texts of any memories, come and gone at any time, are continued as each is alone."""

import asyncio
import random
import shutil
import time

import numpy as np
import pytest
import torch
from tiny_artifact import VOCABULARY, tiny_artifact
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from koff_lightning import load_decomposed
from koff_lightning.artifact.memories import add_memory, remove_memory
from koff_lightning.artifact.router_files import write_router
from koff_lightning.cli import main
from koff_lightning.router.ngrams import NgramClassifier
from koff_lightning.router.routing import Router
from koff_lightning.serving import batch, own
from koff_lightning.serving.batch import Row
from koff_lightning.serving.engine import Failed, Options, Unknown
from koff_lightning.serving.own import OwnEngine
from koff_lightning.serving.sampling import Sampler, nucleus
from koff_lightning.serving.text import Text
from koff_lightning.serving.turns import turns
from koff_lightning.support.errors import KoffError

ARMS = ["de", "fr", "law", None]
ROUTED = {"de": "bundled:de", "fr": "bundled:fr", "law": "bundled:python"}  # text to tell the domains apart by
LENGTHS = [3, 17, 9, 1, 30, 12, 5, 24]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(made):
    return load_decomposed(made.folder)


def prompts(count=8, seed=0):
    """Token ids of texts of unequal length."""
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCABULARY) for _ in range(LENGTHS[i % len(LENGTHS)])] for i in range(count)]


def alone(model, ids, arm, new=8, ends=None):
    """What transformers' own `generate` adds."""
    ids = torch.tensor([ids])
    options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": ends}
    return model.generate(ids, domains=arm, **options)[0, ids.shape[1] :].tolist()


async def answer(engine, ids, arm, options=None, *who):
    """Everything of one answer: token ids, and the last piece's reason."""
    found, finish = [], None
    async for piece in engine.stream(ids, arm, options or Options(8, ignore_end=True), *who):
        found += [token.id for token in piece.tokens]
        finish = piece.finish
    return found, finish


def run(folder, work, **options):
    """Run a coroutine over an engine, and close it."""

    async def whole():
        engine = OwnEngine(folder, **options)
        try:
            return await asyncio.wait_for(work(engine), 120)
        finally:
            await engine.close()

    return asyncio.run(whole())


@pytest.mark.parametrize("rows", [1, 3, 32])
def test_mixed_texts_give_what_each_gives_alone(made, model, rows):
    jobs = [(ids, ARMS[i % 4], Options(3 + 2 * (i % 5), ignore_end=True)) for i, ids in enumerate(prompts(20))]
    found = run(made.folder, lambda engine: asyncio.gather(*(answer(engine, *job) for job in jobs)), rows=rows)
    assert [(out, why) for out, why in found] == [
        (alone(model, ids, arm, options.max_tokens), "length") for ids, arm, options in jobs
    ]


def test_rows_whose_rotary_embedding_goes_by_the_longest_are_read_apart(tmp_path):
    factors = {"short_factor": [1.0] * 8, "long_factor": [8.0] * 8, "original_max_position_embeddings": 32}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0} | factors
    made = tiny_artifact(tmp_path, changes={"rope_parameters": rope}, kv=None)
    jobs = [([7, 8, 9], "de"), ([5] * 60, "de"), ([4, 4], None)]
    found = run(made.folder, lambda engine: asyncio.gather(*(answer(engine, *job) for job in jobs)))
    assert [out for out, _ in found] == [run(made.folder, lambda e, job=job: answer(e, *job))[0] for job in jobs]

    async def beside(engine):  # an answer that steps back would be read anew by the embedding of its new length
        asked = [asyncio.create_task(answer(engine, *job, long, ("a", 1))) for job in jobs]
        while len(rows := engine._batch.rows) < 3 or min(row.count for row in rows) < 40:
            await asyncio.sleep(0.001)
        await answer(engine, [8, 9], "fr")
        return [out for out, _ in await asyncio.gather(*asked)]

    long = Options(200, ignore_end=True)
    found = run(made.folder, beside, rows=3)
    assert found == [run(made.folder, lambda e, job=job: answer(e, *job, long))[0] for job in jobs]


@pytest.mark.parametrize("family", ["qwen3", "mistral", "gemma3_text"])
def test_other_families(tmp_path, family):
    made = tiny_artifact(tmp_path, family)
    model = load_decomposed(made.folder)
    jobs = list(zip(prompts(), ARMS * 2, strict=True))
    found = run(made.folder, lambda engine: asyncio.gather(*(answer(engine, *job) for job in jobs)))
    assert [out for out, _ in found] == [alone(model, *job) for job in jobs]


def test_texts_that_come_later_join_those_under_way(made, model):
    async def late(engine, number, ids, arm):
        await asyncio.sleep(0.01 * number)
        return await answer(engine, ids, arm, Options(40 - 2 * number, ignore_end=True))

    jobs = [(number, ids, ARMS[number % 4]) for number, ids in enumerate(prompts(12))]
    found = run(made.folder, lambda engine: asyncio.gather(*(late(engine, *job) for job in jobs)))
    assert [out for out, _ in found] == [alone(model, ids, arm, 40 - 2 * number) for number, ids, arm in jobs]


def test_prompts_are_read_in_parts(made, model, monkeypatch):
    monkeypatch.setattr(batch, "CHUNK", 4)
    monkeypatch.setattr(batch, "AT_ONCE", 12)
    jobs = [
        (ids, ARMS[i % 4], Options(6, logprobs=2, echo=i % 3 == 0, ignore_end=True)) for i, ids in enumerate(prompts())
    ]
    found = run(made.folder, lambda engine: asyncio.gather(*(answer(engine, *job) for job in jobs)))
    assert [out for out, _ in found] == [alone(model, ids, arm, 6) for ids, arm, _ in jobs]


def test_the_end_token_ends_an_answer_and_is_not_told(made, model, monkeypatch):
    ids = prompts()[0]
    due = alone(model, ids, "de")
    monkeypatch.setattr(own, "ends_of", lambda model: frozenset([due[3]]))
    found = run(made.folder, lambda engine: answer(engine, ids, "de", Options(8)))
    assert found == (due[: due.index(due[3])], "stop")
    assert alone(model, ids, "de", ends=due[3]) == [*found[0], due[3]]
    assert run(made.folder, lambda engine: answer(engine, ids, "de")) == (due, "length"), "unless it is to be ignored"


@pytest.mark.parametrize("part", [512, 5])
def test_log_probabilities_are_the_models(made, model, monkeypatch, part):
    monkeypatch.setattr(batch, "CHUNK", part)

    async def scored(engine, ids, arm):
        pieces = [piece async for piece in engine.stream(ids, arm, Options(4, logprobs=3, echo=True, ignore_end=True))]
        return pieces[0].prompt, [token for piece in pieces for token in piece.tokens]

    jobs = list(zip(prompts(4), ARMS, strict=True))
    found = run(made.folder, lambda engine: asyncio.gather(*(scored(engine, *job) for job in jobs)))
    for (ids, arm), (prompt, new) in zip(jobs, found, strict=True):
        whole = ids + [token.id for token in new]
        assert [token.id for token in prompt] == ids
        with torch.no_grad():
            due = model(torch.tensor([whole]), domains=arm).logits[0].log_softmax(-1)
        told = [*prompt, *new]
        assert told[0].logprob is None
        for place, token in enumerate(told[1:]):
            assert token.logprob == pytest.approx(float(due[place, token.id]), abs=1e-4)
            values = [value for _, value in token.top]
            assert values == pytest.approx(due[place].topk(3).values.tolist(), abs=1e-4)


def test_a_prompt_can_be_scored_without_an_answer(made):
    async def scored(engine):
        return [piece async for piece in engine.stream([5, 6, 7], "fr", Options(0, logprobs=0, echo=True))]

    (piece,) = run(made.folder, scored)
    assert (piece.tokens, piece.finish, len(piece.prompt)) == ((), "length", 3)


def test_sampling_follows_its_seed_whoever_is_beside(made):
    options = Options(12, temperature=1.3, top_p=0.9, seed=5, ignore_end=True)
    others = [(ids, ARMS[i % 4], Options(10, temperature=2.0, ignore_end=True)) for i, ids in enumerate(prompts())]

    async def both(engine):
        one = await answer(engine, [5, 6, 7], "law", options)
        beside = await asyncio.gather(
            answer(engine, [5, 6, 7], "law", options), *(answer(engine, *job) for job in others)
        )
        other = await answer(engine, [5, 6, 7], "law", Options(12, temperature=1.3, top_p=0.9, seed=6, ignore_end=True))
        return one, beside[0], other

    one, beside, other = run(made.folder, both)
    assert one == beside != other


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-9])
def test_sampling_has_the_probabilities_that_transformers_gives(top_p):
    torch.manual_seed(0)
    logits, options = 3 * torch.randn(1, 2000), Options(1, temperature=0.7, top_p=top_p, seed=1)
    due = TemperatureLogitsWarper(0.7)(None, logits.double())
    due = (TopPLogitsWarper(top_p)(None, due) if top_p < 1 else due).softmax(-1)[0]
    shares, places = nucleus((logits[0].double() / 0.7).softmax(-1), top_p)
    found = torch.zeros(2000, dtype=torch.double)
    found[slice(None) if places is None else places] = shares / shares.sum()
    assert torch.allclose(found, due, atol=1e-12)
    sampler = Sampler(options)
    drawn = torch.tensor([sampler.pick(logits[0]) for _ in range(3000)]).bincount(minlength=2000)
    assert not drawn[due == 0].any()
    assert (drawn / 3000 - due).abs().max() < 5 * (0.25 / 3000) ** 0.5


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 5e-324])
def test_sampling_at_hardly_any_temperature_is_greedy_and_harms_nobody_beside(made, model, temperature):
    cold = Options(8, temperature=temperature, top_p=0.9, seed=1, ignore_end=True)
    found = run(
        made.folder,
        lambda engine: asyncio.gather(answer(engine, [5, 6, 7], "de", cold), answer(engine, [8, 9], "fr")),
    )
    assert [out for out, _ in found] == [alone(model, [5, 6, 7], "de"), alone(model, [8, 9], "fr")]


def test_who_goes_away_frees_the_place(made, model):
    async def leave(engine):
        stream = engine.stream([5, 6, 7], "de", Options(400, ignore_end=True))
        await anext(stream)
        waiting = asyncio.create_task(answer(engine, [8, 9], "fr"))
        await asyncio.sleep(0.05)
        assert engine.load == (1, 1)
        await stream.aclose()
        return await waiting

    assert run(made.folder, leave, rows=1)[0] == alone(model, [8, 9], "fr")


def test_who_goes_away_while_it_waits_is_no_longer_held(made):
    async def leave(engine):
        first = engine.stream([5, 6, 7], "de", Options(400, ignore_end=True))
        await anext(first)
        waiting = [asyncio.create_task(answer(engine, [8, 9], "fr")) for _ in range(9)]
        await asyncio.sleep(0.05)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert engine.load == (1, 0)
        await first.aclose()

    run(made.folder, leave, rows=1)


def test_memories_come_and_go_while_texts_are_under_way(made, model, tmp_path):
    """Who began with a memory ends with it; who comes later gets what there is then."""
    folder = shutil.copytree(made.folder, tmp_path / "artifact")
    long = Options(60, ignore_end=True)

    async def change(engine):
        stream = engine.stream([5, 6, 7], "de", long)
        first = await anext(stream)
        remove_memory(folder, "de")
        assert await engine.refresh() == ["removed de"]
        with pytest.raises(Unknown):
            await answer(engine, [5, 6, 7], "de")
        add_memory(folder, made.folder / "memories/law", "de")
        assert await engine.refresh() == ["added de"]
        assert await engine.refresh() == []
        new = await answer(engine, [5, 6, 7], "de", long)
        rest = [token.id async for piece in stream for token in piece.tokens]
        await asyncio.sleep(0.1)
        return [first.tokens[0].id, *rest], new[0], set(engine.model.domains), set(engine.memories())

    old, new, held, named = run(folder, change)
    assert old == alone(model, [5, 6, 7], "de", 60)
    assert new == alone(model, [5, 6, 7], "law", 60) != old
    assert (len(held), named) == (3, {"de", "fr", "law"}), "the old one is freed when nobody reads it"


def test_the_router_is_the_artifacts_whatever_came_and_went(made, tmp_path):
    folder = shutil.copytree(made.folder, tmp_path / "artifact")
    fit = ["router", "fit", "--model", str(folder), "--train_bytes", "20000", "--none_rate", "0"]
    fit += [word for name, text in ROUTED.items() for word in ("--data", f"{name}={text}")]
    text = "Klicken Sie mit der rechten Maustaste auf die Tabelle und wählen Sie den Eintrag Einfügen aus."

    async def change(engine):
        assert not engine.routes
        assert main(fit) == 0
        await engine.refresh()
        assert engine.routes and engine.route([text]) == ["de"]
        remove_memory(folder, "de")
        add_memory(folder, made.folder / "memories/law", "de")
        assert await engine.refresh() == ["replaced de"]
        assert engine.route([text]) == ["de"]
        add_memory(folder, made.folder / "memories/law", "jura")
        await engine.refresh()
        assert not engine.routes, "it was fitted for other memories"
        with pytest.raises(KoffError, match="fit it anew"):
            engine.route([text])
        assert main([*fit, "--data", "jura=bundled:zh"]) == 0
        await engine.refresh()
        assert engine.route([text, "在此对话框中选择要插入的单元格区域，然后单击确定按钮。"]) == ["de", "jura"]

    run(folder, change)


def test_a_replaced_memory_does_not_stumble_over_the_names_of_others(made, model, tmp_path):
    folder = shutil.copytree(made.folder, tmp_path / "artifact")
    for number in range(1, 6):
        add_memory(folder, made.folder / "memories/fr", f"de-{number}")

    async def change(engine):
        remove_memory(folder, "de")
        add_memory(folder, made.folder / "memories/law", "de")
        assert await engine.refresh() == ["replaced de"]
        return [(await answer(engine, [5, 6, 7], name))[0] for name in ("de", "de-1")]

    assert run(folder, change) == [alone(model, [5, 6, 7], name) for name in ("law", "fr")]


def test_a_router_goes_on_when_a_memory_is_replaced(made, tmp_path):
    folder = shutil.copytree(made.folder, tmp_path / "artifact")
    always_de = NgramClassifier(np.zeros((3, 2**16), np.float32), np.array([1, 0, 0], np.float32))
    write_router(folder, Router(("de", "fr", "law"), always_de, (0.0, 0.0, 0.0)), {})

    async def change(engine):
        assert engine.routes and engine.route(["a text"]) == ["de"]
        remove_memory(folder, "de")
        add_memory(folder, made.folder / "memories/law", "de")
        assert await engine.refresh() == ["replaced de"]
        assert engine.routes and engine.route(["a text"]) == ["de"]
        remove_memory(folder, "fr")
        assert await engine.refresh() == ["removed fr"]
        assert not engine.routes

    run(folder, change)


def test_a_broken_memory_is_left_out_and_the_others_go_on(made, model, tmp_path):
    folder = shutil.copytree(made.folder, tmp_path / "artifact")

    async def change(engine):
        add_memory(folder, made.folder / "memories/law", "jura")
        (folder / "memories/jura/kv_memory.safetensors").write_bytes(b"broken")
        said = await engine.refresh()
        assert len(said) == 1 and "left out jura, which cannot be used" in said[0]
        assert await engine.refresh() == [], "a fault is told once"
        with pytest.raises(Unknown):
            await answer(engine, [5], "jura")
        return await answer(engine, [5, 6, 7], "law")

    assert run(folder, change)[0] == alone(model, [5, 6, 7], "law")


def test_a_memory_that_fails_in_a_way_of_its_own_is_left_out_too(made, model, tmp_path, monkeypatch):
    folder = shutil.copytree(made.folder, tmp_path / "artifact")

    async def change(engine):
        def failing(path, name):
            raise TypeError("odd")

        add_memory(folder, made.folder / "memories/law", "jura")
        monkeypatch.setattr(engine.model, "add_memory", failing)
        assert await engine.refresh() == ["left out jura, which cannot be used: odd"]
        return await answer(engine, [5, 6, 7], "law")

    assert run(folder, change)[0] == alone(model, [5, 6, 7], "law")


def watched(engine, fails=lambda ids: False):
    """Let an engine's model fail at some token ids; notes of each call its tokens a row, mask and texts under way."""
    forward, notes = engine.model.forward, []

    def noting(ids, mask, **options):
        if fails(ids):
            raise RuntimeError("out of memory")
        notes.append((ids.shape[1], mask, len(engine._batch.rows)))
        return forward(ids, mask, **options)

    engine.model.forward = noting
    return notes


def test_a_prompt_that_fails_fails_alone(made, model):
    """Who comes with it is answered, and nothing at all changes for who is under way."""
    bad, options = [9, 299, 9], Options(30, logprobs=2, ignore_end=True)

    async def told(engine, *newcomers):
        watched(engine, lambda ids: 299 in ids.flatten().tolist())
        stream = engine.stream([5, 6, 7], "de", options)
        first = await anext(stream)
        came = await asyncio.gather(*(answer(engine, *job) for job in newcomers), return_exceptions=True)
        return [*first.tokens, *[token async for piece in stream for token in piece.tokens]], came

    undisturbed, _ = run(made.folder, told)
    tokens, (failed,) = run(made.folder, lambda engine: told(engine, (bad, "fr")))
    assert isinstance(failed, Failed) and "the engine failed (RuntimeError)" in str(failed)
    assert tokens == undisturbed, "to the last bit of each log-probability"
    others = [([8, 9, 10], "law"), ([4] * 30, None)]
    tokens, (good, failed, long) = run(made.folder, lambda engine: told(engine, others[0], (bad, "fr"), others[1]))
    assert isinstance(failed, Failed)
    assert [good[0], long[0]] == [alone(model, *job) for job in others]
    assert [token.id for token in tokens] == alone(model, [5, 6, 7], "de", 30)


def test_a_long_prompt_holds_up_nobody(made, model, monkeypatch):
    """It is read a part at a time, a token of the others between two, and does not widen their cache."""
    monkeypatch.setattr(batch, "CHUNK", 16)
    shorts = [([*ids, 5, 5], ARMS[i % 4], Options(60 - i, ignore_end=True)) for i, ids in enumerate(prompts())]
    long = [3 + (7 * place) % 290 for place in range(304)], "fr", Options(90, ignore_end=True)

    async def scene(engine):
        notes = watched(engine)
        streams = [engine.stream(*job) for job in shorts]
        first = [await anext(stream) for stream in streams]
        waiting = asyncio.create_task(answer(engine, *long))
        rest = await asyncio.gather(*(rest_of(stream) for stream in streams))
        found = [[piece.tokens[0].id, *ids] for piece, ids in zip(first, rest, strict=True)]
        return notes, found, (await waiting)[0]

    async def rest_of(stream):
        return [token.id async for piece in stream for token in piece.tokens]

    notes, found, late = run(made.folder, scene)
    assert found == [alone(model, ids, arm, options.max_tokens) for ids, arm, options in shorts]
    assert late == alone(model, *long[:2], 90)
    reading = [count > 1 for count, _, _ in notes]
    read = [place for place, is_part in enumerate(reading) if is_part][-19:]
    assert all(notes[place][0] == 16 for place in read), "19 parts of the long prompt"
    assert not any(reading[place + 1] for place in read), "a token of the others after each"
    config = model.backbone.config
    cell = sum(2 * layer["num_key_value_heads"] * config.head_dim for layer in config.koff_layers)
    padding = [int((mask == 0).sum()) for (_, mask, _), is_part in zip(notes, reading, strict=True) if not is_part]
    assert 0 < max(padding) <= model.active_parameters() / cell < 8 * 270, "less than one more pass over the weights"


def test_a_heavy_request_makes_room_for_others_and_loses_nothing(made, model):
    """All places are its own, with answers far from their end; a short request waits for a step or two all the same."""
    heavy = [
        (ids, ARMS[i % 4], Options(90, 1.0, seed=i, logprobs=1, echo=True, ignore_end=True))
        for i, ids in enumerate(prompts())
    ]

    async def whole(engine, job, who):
        pieces = [piece async for piece in engine.stream(*job, who)]
        assert [piece.prompt is not None for piece in pieces] == [True] + [False] * 89, "the prompt is told once"
        return [token.id for piece in pieces for token in piece.tokens]

    async def scene(engine):
        alone_ = await asyncio.gather(*(whole(engine, job, ("a", 1)) for job in heavy))
        notes = watched(engine)
        asked = [asyncio.create_task(whole(engine, job, ("a", 2))) for job in heavy]
        while len(notes) < 20:
            await asyncio.sleep(0.001)
        before = len(notes)
        short = await answer(engine, [8, 9], "fr", Options(3, ignore_end=True))
        waited = len(notes) - before
        assert not any(task.done() for task in asked)
        return alone_, await asyncio.gather(*asked), short[0], waited

    due, found, short, waited = run(made.folder, scene, rows=4)
    assert found == due, "who steps back goes on where it was"
    assert short == alone(model, [8, 9], "fr", 3)
    assert waited < 30, "not the 90 steps of the heavy one"


def test_prompts_of_a_heavy_request_are_read_a_few_at_a_time(made, monkeypatch):
    monkeypatch.setattr(batch, "CHUNK", 16)
    monkeypatch.setattr(batch, "AT_ONCE", 32)
    long = [[3 + (7 * place + row) % 290 for place in range(160)] for row in range(16)]
    scored = Options(0, logprobs=1, echo=True)

    async def scene(engine):
        notes = watched(engine)
        asked = [asyncio.create_task(answer(engine, ids, "de", scored, ("a", 1))) for ids in long]
        while len(notes) < 3:
            await asyncio.sleep(0.001)
        before = len(notes)
        await answer(engine, [8, 9], "fr", Options(1))
        waited = len(notes) - before
        await asyncio.gather(*asked)
        return waited, len(notes), max(mask.shape[0] for _, mask, _ in notes)

    waited, calls, rows = run(made.folder, scene)
    assert (calls, rows) == (16 // 2 * 10 + 1, 2), "two of them fill a pass, and none is wasted"
    assert waited < 20, "not the 80 passes of the heavy one"


def test_between_two_parts_of_a_heavy_request_others_have_as_long_as_a_part(made, monkeypatch):
    monkeypatch.setattr(batch, "CHUNK", 16)
    long, read = [3 + place % 290 for place in range(400)], batch.Prompts.read
    monkeypatch.setattr(batch.Prompts, "read", lambda self: (time.sleep(0.3), read(self))[1])

    async def scene(engine):
        notes = watched(engine)
        asked = asyncio.create_task(answer(engine, long, "de", Options(1)))
        while len(notes) < 3:
            await asyncio.sleep(0.001)
        before = len(notes)
        await answer(engine, [8, 9], "fr", Options(12, ignore_end=True))
        parts = sum(count > 2 for count, _, _ in notes[before:])
        await asked
        return parts

    assert run(made.folder, scene) < 8, "not one for each of the 12 tokens"


def test_who_has_least_comes_next():
    """Of requests the one with the fewest texts under way, of equals the caller who has the fewest, then who waits."""

    def rows(*whose):
        return [Row([1], None, Options(1), lambda _: None, who) for who in whose]

    class Busy:
        def __init__(self, *whose):
            self.rows, self.reading = rows(*whose), []

        def rereads(self, row):
            return True

    def due(under_way, waiting, places):
        come, back = turns(Busy(*under_way), rows(*waiting), places)
        return [row.who for row in come], [row.who for row in back]

    a, other, b, c = ("a", 1), ("a", 2), ("b", 1), ("c", 1)
    assert due([], [a, a, a, b], 2) == ([a, b], [])
    assert due([a, a, a, a], [a, a, b, b, b], 4) == ([b, b], [a, a]), "until they have the same"
    assert due([a, a, b], [a, b], 3) == ([], []), "a difference of one stays: else they would go to and fro"
    assert due([a, b, c], [other], 3) == ([], [])
    assert due([a], [other, b], 2) == ([b], []), "a caller's requests share"
    assert due([a, a, b], [c, other], 3) == ([c], [a])


def test_a_step_that_fails_ends_its_answers_and_no_others(made, model, monkeypatch):
    step = batch.Batch.step
    failures = iter([True])

    def failing(self):
        if self.rows and next(failures, False):
            raise RuntimeError("out of memory")
        step(self)

    async def both(engine):
        with pytest.raises(Failed, match="the engine failed"):
            await answer(engine, [5, 6, 7], "de")
        return await answer(engine, [5, 6, 7], "de")

    monkeypatch.setattr(batch.Batch, "step", failing)
    assert run(made.folder, both)[0] == alone(model, [5, 6, 7], "de")


def test_numbers_that_are_not_finite_fail_their_answer_alone(made, model):
    async def spoilt(engine):
        engine.model.memories.kv_parameters("de")[0].data.fill_(float("nan"))
        bad, good = await asyncio.gather(
            answer(engine, [5, 6, 7], "de"), answer(engine, [5, 6, 7], "fr"), return_exceptions=True
        )
        return bad, good

    bad, good = run(made.folder, spoilt)
    assert isinstance(bad, Failed) and "not finite" in str(bad)
    assert good[0] == alone(model, [5, 6, 7], "fr")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_prompt_whose_scores_are_not_finite_fails_alone(made, value):
    """Also where the numbers are sound again at the prompt's end, which alone was looked at."""

    async def spoilt(engine):
        forward = engine.model.forward

        def spoiling(ids, mask, **options):
            out = forward(ids, mask, **options)
            out.logits[ids == 250] = value
            return out

        engine.model.forward = spoiling
        score = Options(0, logprobs=1, echo=True)
        jobs = ([5, 250, 6, 7], "de", score), ([5, 6, 7], "fr", score)
        return await asyncio.gather(*(answer(engine, *job) for job in jobs), return_exceptions=True)

    bad, good = run(made.folder, spoilt)
    assert isinstance(bad, Failed) and str(bad) == "the model's numbers are not finite"
    assert good == ([], "length")


def test_a_change_that_nobody_waits_for_any_more_is_left_out(made, model):
    async def give_up(engine):
        done = []
        with engine._wake:  # so that the thread comes to it afterwards
            engine._call(lambda: done.append("given up")).cancel()
        last = await asyncio.wrap_future(engine._call(lambda: "still there"))
        return done, last, await answer(engine, [8, 9], "fr")

    done, last, told = run(made.folder, give_up)
    assert (done, last, told[0]) == ([], "still there", alone(model, [8, 9], "fr"))


def test_an_engine_that_ends_says_so(made):
    async def close(engine):
        stream = engine.stream([5, 6, 7], "de", Options(400, ignore_end=True))
        await anext(stream)
        await engine.close()
        with pytest.raises(Failed, match="is ending"):
            async for _ in stream:
                pass
        with pytest.raises(Failed, match="is ending"):
            await answer(engine, [5], None)

    run(made.folder, close)


def test_a_character_that_the_prompt_begins_is_told_whole(model):
    first, *rest = model.tokenizer("ß", add_special_tokens=False)["input_ids"]
    assert rest, "of several tokens"
    assert Text(model.tokenizer, [7, first]).add(rest, last=True) == "ß"


@pytest.mark.parametrize("prompt", ["�", "fox ���"])
def test_a_sign_for_what_cannot_be_read_is_the_prompts_own(model, prompt):
    """It is what the rest of a split character reads as, too; repeated, it broke the characters after it."""
    ids, said = (model.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, "ßx�y"))
    text = Text(model.tokenizer, ids)
    assert "".join(text.add([token]) for token in said) + text.add([], last=True) == "ßx�y"


def test_long_stop_words_cost_no_more_than_what_is_held(model):
    class Counted(str):
        looks = 0

        def __getitem__(self, part):
            Counted.looks += 1
            return str.__getitem__(self, part)

    text = Text(model.tokenizer, [7], [Counted("never" * 1000)])
    for token in (8, 9, 10):
        text.add([token])
    assert Counted.looks < 50
