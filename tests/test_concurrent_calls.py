"""Which memory a row reads belongs to the call: calls in other threads, and calls inside a call, do not change it."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from threading import Barrier, Event, Thread

import pytest
import torch
from tiny_artifact import left_padded, tiny_artifact, tiny_decomposition
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from koff_lightning import KoffError, load_decomposed
from koff_lightning.backbone import allow_recomputation
from koff_lightning.support.in_force import InForce

ARMS = ["de", "fr", "law", None]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(made):
    """Shared by tests that leave it as it is."""
    return load_decomposed(made.folder)


@pytest.fixture
def alone(model):
    """What each arm generates when nothing else runs, [1, T + new]."""
    ids = left_padded()[0][:1]
    found = {arm: model.generate(ids, domains=arm, **GREEDY) for arm in ARMS}
    assert len({tuple(out[0].tolist()) for out in found.values()}) == len(ARMS), "the memories must tell"
    return ids, found


def at_once(jobs):
    """Run functions each in its thread, started together; their results."""
    start = Barrier(len(jobs))
    with ThreadPoolExecutor(len(jobs)) as threads:
        return list(threads.map(lambda job: (start.wait(), job())[1], jobs))


def test_four_threads_of_four_memories_generate_what_each_generates_alone(model, alone):
    ids, expected = alone
    runs = at_once([lambda arm=arm: [model.generate(ids, domains=arm, **GREEDY) for _ in range(25)] for arm in ARMS])
    wrong = [arm for arm, outs in zip(ARMS, runs, strict=True) for out in outs if not torch.equal(out, expected[arm])]
    assert not wrong, f"{len(wrong)} of 100 answers are another memory's"


@pytest.mark.parametrize("grad", [False, True])
def test_four_threads_read_rows_of_many_memories(model, grad):
    ids, mask = left_padded()
    orders = [ARMS, ARMS[::-1], ["law"] * 4, [None] * 4]

    def logits(rows):
        with torch.set_grad_enabled(grad):  # a new thread has gradients on
            return model(ids, mask, domains=rows).logits.detach()

    expected = [logits(rows) for rows in orders]
    runs = at_once([lambda rows=rows: [logits(rows) for _ in range(25)] for rows in orders])
    assert all(torch.equal(out, due) for outs, due in zip(runs, expected, strict=True) for out in outs)


class After(BaseStreamer):
    """Calls a function after the third new token."""

    def __init__(self, then):
        self.heard, self.then = 0, then

    def put(self, value):
        self.heard += 1
        if self.heard == 4:  # the prompt comes first
            self.then()

    def end(self):
        """Nothing is due."""


def test_a_paused_generation_goes_on_with_its_own_memory(model, alone):
    ids, expected = alone
    paused, go_on, out = Event(), Event(), []
    streamer = After(lambda: (paused.set(), go_on.wait(60)))
    first = Thread(target=lambda: out.append(model.generate(ids, domains="de", streamer=streamer, **GREEDY)))
    first.start()
    assert paused.wait(60)
    for arm in ("law", None, "fr"):
        assert torch.equal(model.generate(ids, domains=arm, **GREEDY), expected[arm])
    go_on.set()
    first.join()
    assert torch.equal(out[0], expected["de"])


def test_a_generation_inside_a_generation(model, alone):
    ids, expected = alone
    inner = []
    streamer = After(lambda: inner.append(model.generate(ids, domains="fr", **GREEDY)))
    assert torch.equal(model.generate(ids, domains="de", streamer=streamer, **GREEDY), expected["de"])
    assert torch.equal(inner[0], expected["fr"])


def test_decoding_by_hand_in_turns(model):
    """Two texts of other memories, a token each in turn: each keeps what it has stacked."""
    ids, mask = left_padded()
    whole = {arm: model(ids, mask, domains=arm).logits for arm in ("de", "law")}
    caches, parts = {arm: DynamicCache() for arm in whole}, {arm: [] for arm in whole}
    for step in range(12):
        for arm, cache in caches.items():
            token, seen = ids[:, step : step + 1], mask[:, : step + 1]
            with torch.no_grad():
                parts[arm].append(model(token, seen, domains=arm, past_key_values=cache).logits)
    for arm, logits in whole.items():
        torch.testing.assert_close(torch.cat(parts[arm], 1)[mask.bool()], logits[mask.bool()], atol=1e-5, rtol=0)


def test_a_call_that_fails_leaves_nothing_in_force(model):
    ids = left_padded()[0]
    bare = model(ids).logits
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(ids, domains="de", inputs_embeds=torch.zeros(1))
    assert torch.equal(model.backbone(ids).logits, bare)
    model(ids, domains="law")
    assert torch.equal(model.backbone(ids).logits, bare), "nor does one that ends well"


def test_a_memory_removed_under_a_generation_is_said(made):
    model, ids = load_decomposed(made.folder), left_padded()[0][:1]
    streamer = After(lambda: model.remove_memory("law"))
    with pytest.raises(KoffError, match="a memory that is active was removed"):
        model.generate(ids, domains="law", streamer=streamer, **GREEDY)
    again = After(lambda: (model.add_memory(made.folder / "memories" / "law"), model.remove_memory("de")))
    expected = load_decomposed(made.folder).generate(ids, domains="fr", **GREEDY)
    assert torch.equal(model.generate(ids, domains="fr", streamer=again, **GREEDY), expected)


def test_memories_of_the_model_and_of_a_call_are_two_things(model):
    """`activate` is what the bare backbone reads, in every thread; a call has its own."""
    ids = left_padded()[0]
    due = {arm: model(ids, domains=arm).logits for arm in ("de", "fr")}
    model.memories.activate(["de"] * 4)
    try:
        assert torch.equal(model(ids, domains="fr").logits, due["fr"])
        assert all(torch.equal(out, due["de"]) for out in at_once([lambda: model.backbone(ids).logits] * 2))
    finally:
        model.memories.activate([])


def test_layers_that_are_computed_again_are_refused(made):
    model, ids = load_decomposed(made.folder), left_padded()[0]
    for parameter in model.memories.lora_parameters("de"):
        parameter.requires_grad_(True)

    def gradients(logits):
        return torch.autograd.grad(logits.square().sum(), model.memories.lora_parameters("de"))

    expected = gradients(model(ids, domains="de").logits)
    allow_recomputation(model.backbone)
    model.train()
    with pytest.raises(KoffError, match="compute layers again after this call, .* and call model.backbone"):
        model(ids, domains="de")
    with torch.no_grad():
        model(ids, domains="de")
    model.memories.activate(["de"] * 4)
    again = gradients(model.backbone(ids, use_cache=False).logits)
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(expected, again, strict=True))


def test_masks_and_memories_of_a_decomposition_in_threads(tmp_path):
    module = tiny_decomposition(tmp_path)
    ids = left_padded()[0]
    units = len(module.gates.logits)
    masks = [None, module.hard_mask().float()[None], torch.rand(1, units), torch.rand(4, units)]
    orders = [(), ["de"] * 4, ["fr", None, "law", "de"], ["law"] * 4]

    def states(rows, mask):
        with module.under(rows or [None] * 4, mask), torch.no_grad():
            return module.hidden({"input_ids": ids})

    pairs = list(zip(orders, masks, strict=True))
    expected = [states(*pair) for pair in pairs]
    assert all(not torch.allclose(expected[0], other) for other in expected[1:])
    module.gates.set(masks[2])
    module.memories.activate(["de"] * 4)
    kept = module.hidden({"input_ids": ids}).detach()
    runs = at_once([lambda pair=pair: [states(*pair) for _ in range(25)] for pair in pairs])
    assert all(torch.equal(out, due) for outs, due in zip(runs, expected, strict=True) for out in outs)
    assert torch.equal(module.hidden({"input_ids": ids}).detach(), kept), "what was in force outside is in force still"


@pytest.mark.parametrize("copied", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"])
def test_a_copy_reads_its_own_memories_even_one_made_inside_a_call(model, copied):
    ids, mask = left_padded()
    due = model(ids, mask, domains=ARMS).logits
    found = []
    model.generate(ids[:1], domains="de", streamer=After(lambda: found.append(copied(model))), **GREEDY)
    assert torch.equal(found[0](ids, mask, domains=ARMS).logits, due)
    assert torch.equal(found[0].backbone(ids).logits, model.backbone(ids).logits)
    with torch.no_grad():
        for parameter in found[0].memories.parameters():
            parameter.zero_()
    assert torch.equal(model(ids, mask, domains=ARMS).logits, due)


def test_what_is_in_force_by_scope_and_thread():
    setting = InForce("own")
    seen = []
    with setting.scope("outer"):
        with pytest.raises(ZeroDivisionError), setting.scope(None):
            assert setting.value is None
            setting.set("changed")
            assert setting.value == "changed"
            raise ZeroDivisionError
        assert setting.value == "outer"
        other = Thread(target=lambda: (seen.append(setting.value), setting.set("by another thread")))
        other.start()
        other.join()
        assert (setting.value, seen) == ("outer", ["own"])
        for copy in (deepcopy(setting), pickle.loads(pickle.dumps(setting))):
            assert copy.value == "by another thread"
    assert setting.value == "by another thread"


def test_compiled_code_looks_up_what_is_in_force_here():
    torch._dynamo.reset()
    setting = InForce(1.0)
    compiled = torch.compile(lambda x: x * setting.value, backend="eager", fullgraph=True)
    x, seen = torch.ones(2), []
    assert compiled(x)[0] == 1
    with setting.scope(2.0):
        other = Thread(target=lambda: seen.append(compiled(x)[0]))
        other.start()
        other.join()
        assert (compiled(x)[0], seen[0]) == (2, 1)
    assert compiled(x)[0] == 1
    setting.set(3.0)
    assert compiled(x)[0] == 3
