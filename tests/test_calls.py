"""What a call of a decomposed model gives is looked at before the model sees it, and nothing is passed over."""

import pytest
import torch
from tiny_artifact import tiny_artifact
from transformers import GenerationConfig

from koff_lightning import KoffError, load_decomposed
from koff_lightning.support.seeds import seed_of


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_decomposed(tiny_artifact(tmp_path_factory.mktemp("made")).folder)


IDS = torch.tensor([[5, 6, 7]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(IDS, domain="de"), r"a call has no argument 'domain'\. Did you mean 'domains'\?"),
        (lambda m: m(IDS, attention_masks=IDS), r"no argument 'attention_masks'\. Did you mean 'attention_mask'\?"),
        (lambda m: m(IDS, output_attentions=True), "the weights of attention are never formed"),
        (lambda m: m.generate(IDS, output_attentions=True), "the weights of attention are never formed"),
        (
            lambda m: m.generate(IDS, generation_config=GenerationConfig(output_attentions=True, max_new_tokens=1)),
            "never formed",
        ),
        (lambda m: m({"input_ids": IDS}), r"a tensor of whole numbers, \[rows, tokens\]; got dict"),
        (lambda m: m([[5, 6]]), "got list. model.encode"),
        (lambda m: m.generate("text"), "got str"),
        (lambda m: m(IDS.float()), r"got torch\.float32"),
        (lambda m: m(torch.tensor([[5, 300_000]])), r"between 0 and \d+, got 300000: the model has"),
        (lambda m: m.generate(torch.tensor([[-3, 5]])), r"got -3: the model has"),
        (lambda m: m(IDS, attention_mask=[[1, 1, 1]]), "attention_mask must be a tensor .* got one list"),
        (lambda m: m(IDS, attention_mask=torch.ones(1, 3, 3)), r"got one of shape \[1, 3, 3\]"),
        (lambda m: m(IDS, domains=5), "domains must be a name, or a list of names .* got 5"),
        (lambda m: m(IDS, domains={"de"}), "domains must be a name, or a list of names .* got {'de'}"),
        (lambda m: m(IDS, domains={"de": 1}), "domains must be a name, or a list of names"),
        (lambda m: m(IDS, past_key_values=(1, 2)), "past_key_values must be a cache .* got tuple"),
        (lambda m: m.generate(IDS, past_key_values="no"), "past_key_values must be a cache .* got str"),
        (lambda m: m(IDS, position_ids=torch.arange(3)), r"position_ids must be a tensor \[rows, tokens\]; got \[3\]"),
        (lambda m: m(IDS, torch.ones(1, 1, 3, 3), domains="auto"), r"the router reads rows by a mask \[rows, tokens\]"),
        (lambda m: m.generate(IDS, assistant_model=m), r"assistant_model must be a model .* give its \.backbone"),
        (lambda m: m.encode("Klicken"), "prompts must be a list of texts, one or more; got 'Klicken'"),
        (lambda m: m.encode([]), "prompts must be a list of texts"),
        (lambda m: m.encode([3]), "prompts must be a list of texts"),
        (lambda m: m.generate(IDS, num_beams="3"), "num_beams must be a whole number from 1 on; got '3'"),
        (lambda m: m.generate(IDS, num_beams=0), "num_beams must be a whole number"),
        (lambda m: m.generate(IDS, num_return_sequences=0), "num_return_sequences must be a whole number"),
        (lambda m: m.generate(IDS, logits_processor=5), "logits_processor must be a list of processors; got int"),
        (lambda m: m.generate(IDS, generation_config={"a": 1}), "must be a GenerationConfig; got dict"),
        (lambda m: load_decomposed(None), "the folder of an artifact is wanted, .* got None"),
        (lambda m: load_decomposed(m.folder, domains=5), "domains must be a name"),
    ],
)
def test_bad_calls_are_one_line(model, call, message):
    with pytest.raises(KoffError, match=message):
        call(model)


def test_what_transformers_takes_is_taken(model):
    named = model(IDS, domains="de", output_hidden_states=True, return_dict=True, logits_to_keep=1)
    assert named.hidden_states and named.logits.shape[1] == 1
    sampled = {"num_beams": 2, "num_return_sequences": 2, "generation_config": GenerationConfig(max_new_tokens=2)}
    assert model.generate(IDS, domains="de", **sampled).shape == (2, 5)


@pytest.mark.parametrize("other", ["eager", "sdpa"])
def test_an_attention_that_would_pass_over_the_slots_is_refused(model, other):
    before = model(IDS, domains="de").logits
    model.backbone.set_attn_implementation(other)
    try:
        for call in (model, model.generate):
            with pytest.raises(KoffError, match=f"attention is '{other}', which reads no KV memories: set it back"):
                call(IDS, domains="de")
        model(IDS)  # which reads none
    finally:
        model.backbone.set_attn_implementation("koff")
    torch.testing.assert_close(model(IDS, domains="de").logits, before)


def test_no_two_draws_share_a_seed():
    assert seed_of(5, 0) == 5
    drawn = {seed_of(seed, number) for seed in range(100) for number in range(128)}
    assert len(drawn) == 100 * 128 and all(0 <= seed < 2**63 for seed in drawn)
