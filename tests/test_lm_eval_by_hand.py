"""What KoffLM answers lm-eval, against a model of transformers alone, one text at a time.

Of this package there is nothing but KoffLM: the adapter is added to the weights, and slots are a cache's first entries.
"""

import json

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file
from tiny_artifact import tiny_artifact
from toy_text import toy_documents
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from koff_lightning.evaluation.harness import KoffLM
from koff_lightning.evaluation.lm_tasks import quiet

LONGEST = 24  # tokens that are read at once
WAYS = {"de": {"domain": "de"}, "law": {"domain": "law"}, "none": {}, "dense": {"dense": True}}
TEXTS = toy_documents(6, seed=3, longest=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An artifact that stock transformers loads: one width for all layers."""
    return tiny_artifact(tmp_path_factory.mktemp("hand"), "llama", "uniform", uniform=True).folder


class Plain:
    """One way of reading, in transformers."""

    def __init__(self, folder, way):
        dense = json.loads((folder / "koff.json").read_text())["base"]["id"]
        self.model = AutoModelForCausalLM.from_pretrained(dense if way == "dense" else folder / "backbone").eval()
        self.tokenizer, self.slots = AutoTokenizer.from_pretrained(dense), None
        if way in ("de", "law"):
            memory = folder / "memories" / way
            self._add(load_file(memory / "adapter_model.safetensors"), json.loads((memory / "memory.json").read_text()))
            self.slots = load_file(memory / "kv_memory.safetensors")

    def _add(self, adapter, about):
        for name, down in adapter.items():
            if name.endswith("lora_A.weight"):
                layer = self.model.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                up = adapter[name.replace("lora_A", "lora_B")]
                layer.weight.data += about["lora"]["alpha"] / about["lora"]["rank"] * up @ down

    @torch.no_grad()
    def read(self, ids):
        """Log-probabilities [T, V] of what follows each of these."""
        assert 0 < len(ids) <= LONGEST
        cache = None
        if self.slots is not None:
            cache = DynamicCache()
            for layer in range(self.model.config.num_hidden_layers):
                cache.update(*(self.slots[f"layers.{layer}.{kind}"][None] for kind in ("key", "value")), layer)
        places = torch.arange(len(ids))[None]
        return torch.log_softmax(
            self.model(torch.tensor([ids]), position_ids=places, past_key_values=cache).logits[0], -1
        )

    def answer(self, context, answer):
        """Log-likelihood of an answer's ids, and whether each is the likeliest; a context too long loses its head."""
        found = self.read((context + answer)[:-1][-LONGEST:])[-len(answer) :]
        value = found.gather(1, torch.tensor(answer)[:, None]).sum().item()
        return value, found.argmax(-1).tolist() == answer

    def written(self, ids, ends, most):
        """Greedy text, cut where the first of some strings begins."""
        ids = ids[-(LONGEST - most) :]
        new = []
        for _ in range(most):
            new.append(int(self.read([*ids, *new])[-1].argmax()))
            if new[-1] == self.tokenizer.eos_token_id:
                break
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        return text[: min([len(text), *(text.index(end) for end in ends if end in text)])], text


def asked(kind, *args):
    return Instance(kind, {}, args, 0)


def koff(folder, way, **options):
    with quiet():
        return KoffLM(str(folder), **WAYS[way], device="cpu", max_length=LONGEST, **options)


@pytest.mark.parametrize("way", WAYS)
def test_answers_have_the_likelihood_of_their_tokens(folder, way):
    """Contexts shorter and longer than what is read at once, none at all, answers the model would give and others."""
    plain = Plain(folder, way)
    contexts = ["the quick", TEXTS[0], TEXTS[1] * 3, TEXTS[2] * 2, "größere Füchse", ""]
    pairs = [(context, answer) for context in contexts for answer in (" fox", " кошки jumps the brown")]
    own = plain.tokenizer
    for context in contexts[:-1]:  # what the model would say, where that text has these tokens
        likely = own.decode([int(plain.read(own(context).input_ids[-LONGEST:])[-1].argmax())])
        if own(context + likely).input_ids[:-1] == own(context).input_ids and likely.strip() == likely != "":
            pairs.append((context, likely))
    wanted = []
    for context, answer in pairs:
        before = own(context).input_ids if context else [own.bos_token_id]
        ids = own(context + answer).input_ids
        wanted.append(plain.answer(before, ids[len(before) :]))
    assert {likely for _, likely in wanted} == {True, False}
    assert any(len(own(context).input_ids) > LONGEST for context, _ in pairs)
    found = koff(folder, way, batch_size=3).loglikelihood([asked("loglikelihood", *pair) for pair in pairs])
    assert [likely for _, likely in found] == [likely for _, likely in wanted]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in wanted], abs=2e-4)


@pytest.mark.parametrize("opened", [False, True])
@pytest.mark.parametrize("way", ["law", "dense"])
def test_a_text_has_the_likelihood_of_each_of_its_tokens_in_its_window(folder, way, opened):
    """Windows predict as many tokens as they may, of text not predicted yet; the last one looks back as far as it can.

    All begin with the token before what they predict, and where rows are opened, with the start token before that.
    """
    plain = Plain(folder, way)
    start, step, wanted = plain.tokenizer.bos_token_id, LONGEST - opened, []
    for text in TEXTS:
        ids, total = plain.tokenizer(text, add_special_tokens=False).input_ids, 0.0
        for place in range(0, len(ids), step):
            end = min(place + step, len(ids))
            head = [] if place and not opened else [start]
            seen = [*head, *(ids[end - step - 1 : end - 1] if place else ids[: end - 1])]
            total += plain.read(seen)[place - end :].gather(1, torch.tensor(ids[place:end])[:, None]).sum().item()
        wanted.append(total)
    assert max(len(plain.tokenizer(text).input_ids) for text in TEXTS) > 3 * LONGEST
    requests = [asked("loglikelihood_rolling", text) for text in TEXTS]
    for size in (3, "auto:1"):  # the two ways in which windows are scored
        lm = koff(folder, way, batch_size=size, max_batch_size=4, open_with_start=opened)
        assert lm.loglikelihood_rolling(requests, disable_tqdm=True) == pytest.approx(wanted, rel=1e-5), size


@pytest.mark.parametrize("way", WAYS)
def test_what_is_written_is_the_likeliest_text_up_to_the_first_stop(folder, way):
    """Of strings that end a text the one that comes first, wherever in the list it stands.

    Where two overlap, lm-eval cuts at one after the other; none do here.
    """
    plain, most = Plain(folder, way), 10
    prompts = ["the quick", "größere Füchse schlafen", "fox", TEXTS[1] * 3]
    whole = [plain.written(plain.tokenizer(prompt).input_ids, [], most)[1] for prompt in prompts]
    pairs = [whole[0][n : n + 2] for n in range(2, len(whole[0]) - 1)]
    ends = [[pair for pair in pairs if "\ufffd" not in pair][-1]]
    ends += [next(letter for letter in text[1:] if letter not in ends[0] + "\ufffd") for text in whole[1:]]
    wanted = [plain.written(plain.tokenizer(prompt).input_ids, ends, most)[0] for prompt in prompts]
    assert len({len(text) for text in wanted}) > 1 and any(a != b for a, b in zip(wanted, whole, strict=True))
    options = {"until": ends, "max_gen_toks": most, "do_sample": False}
    requests = [asked("generate_until", prompt, options) for prompt in prompts]
    assert koff(folder, way, batch_size=4).generate_until(requests, disable_tqdm=True) == wanted
