"""One pass over the dense model: against sums by hand, resumed, padded, batched otherwise, and in every family."""

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, tiny_model

from koff_lightning.studies.analysis import Activations, collect
from koff_lightning.support.errors import KoffError

DOMAINS = ["en", "law"]


def batch(domains, seed: int, length: int = 10) -> dict:
    """Rows of random text; the first token of each is not counted, as a BOS."""
    ids = torch.randint(3, 97, (len(domains), length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, 0] = -100
    documents = torch.arange(len(domains))[:, None].expand(-1, length) + 10 * seed
    return {"input_ids": ids, "labels": labels, "domains": list(domains), "documents": documents}


def text(count: int = 6) -> list[dict]:
    return [batch(["en", "law", "en"], seed) for seed in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_counts_what_the_formula_says(family):
    """Counted beside the hooks, from each FFN's own weights and input."""
    model, batches = tiny_model(family), text(3)
    found = collect(model, batches, DOMAINS)
    inputs = {}
    blocks = [layer.mlp for layer in model.model.layers]
    hooks = [b.register_forward_pre_hook(lambda m, x, i=i: inputs.__setitem__(i, x[0])) for i, b in enumerate(blocks)]
    positive, values, tokens = np.zeros((2, 192)), [[], []], np.zeros(2)
    for part in batches:
        with torch.no_grad():
            model(part["input_ids"])
        gates = torch.cat([b.gate_proj(inputs[i]) for i, b in enumerate(blocks)], -1)[:, 1:]  # [B, T-1, N]
        ups = torch.cat([b.up_proj(inputs[i]) for i, b in enumerate(blocks)], -1)[:, 1:]
        for row, domain in enumerate(part["domains"]):
            place = DOMAINS.index(domain)
            positive[place] += (gates[row] > 0).sum(0).numpy()
            values[place].append((blocks[0].act_fn(gates[row]) * ups[row]).detach().double().numpy())
            tokens[place] += 9
    for hook in hooks:
        hook.remove()
    assert found.rates() == pytest.approx((positive / tokens[:, None]).T)
    values = [np.concatenate(part) for part in values]
    assert found.mean() == pytest.approx(np.stack([v.mean(0) for v in values], 1), rel=1e-4, abs=1e-6)
    assert found.variance() == pytest.approx(np.stack([v.var(0) for v in values], 1), rel=1e-3, abs=1e-6)
    norms = torch.cat([b.down_proj.weight.norm(dim=0) for b in blocks]).detach().numpy()
    rms = np.sqrt(np.mean([np.square(v).mean(0) for v in values], axis=0))
    assert found.importance() == pytest.approx(norms * rms, rel=1e-4)
    assert found.layer.tolist() == [0] * 96 + [1] * 96


def test_halves_are_documents_in_turn():
    found = collect(tiny_model("llama"), text(4), DOMAINS)
    assert found.tokens.tolist() == [[72, 0], [0, 36]], "documents 0 and 2 of each batch are en, 1 is law"
    with pytest.raises(KoffError, match="one half of the documents holds no text of domain 'law'"):
        found.rates(0)
    rows = [{key: value for key, value in part.items() if key != "documents"} for part in text(2)]
    assert collect(tiny_model("llama"), rows, DOMAINS).tokens.tolist() == [[36, 0], [0, 18]], "else rows in turn"


def test_a_resumed_pass_is_an_uninterrupted_one(tmp_path):
    model, whole = tiny_model("llama"), text(7)
    straight = collect(model, whole, DOMAINS)

    class Cut(Exception):
        pass

    def cut(done: int) -> None:
        if done == 5:
            raise Cut

    with pytest.raises(Cut):
        collect(model, whole, DOMAINS, folder=tmp_path, every=2, progress=cut)
    assert Activations.load(tmp_path).batches == 4
    seen = []
    resumed = collect(model, whole, DOMAINS, folder=tmp_path, every=2, progress=seen.append)
    assert seen == [5, 6, 7]
    again = collect(model, whole, DOMAINS, folder=tmp_path, progress=lambda done: pytest.fail("nothing left to do"))
    for name in ("tokens", "positive", "total", "square", "layer", "down_norm"):
        for other in (resumed, again, Activations.load(tmp_path)):
            assert torch.equal(getattr(straight, name), getattr(other, name)), name


def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    sums = collect(tiny_model("llama"), text(1), DOMAINS)
    sums.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert sorted(before) == ["activations.json", "activations.safetensors"]

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("koff_lightning.studies.analysis.activations.save_file", full)
    with pytest.raises(KoffError, match=r"cannot write .*activations.safetensors: .*No space left"):
        sums.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_batches_and_padding_make_no_difference():
    model, whole = tiny_model("qwen3"), text(4)
    rows = [
        {key: value[row : row + 1] for key, value in part.items()} for part in whole for row in range(3)
    ]  # one by one
    padded = []
    for part in whole:  # padding on either side, hidden by a mask and not counted
        wide = {"domains": part["domains"], "documents": torch.nn.functional.pad(part["documents"], (4, 3))}
        wide["input_ids"] = torch.nn.functional.pad(part["input_ids"], (4, 3), value=5)
        wide["labels"] = torch.nn.functional.pad(part["labels"], (4, 3), value=-100)
        wide["attention_mask"] = torch.nn.functional.pad(torch.ones(3, 10, dtype=torch.long), (4, 3))
        wide["position_ids"] = (wide["attention_mask"].cumsum(1) - 1).clamp(min=0)
        padded.append(wide)
    packed = [  # two rows in one, positions starting anew
        {
            "input_ids": part["input_ids"][[0, 2]].reshape(1, 20),
            "labels": part["labels"][[0, 2]].reshape(1, 20),
            "documents": part["documents"][[0, 2]].reshape(1, 20),
            "position_ids": torch.arange(10).repeat(2)[None],
            "domains": ["en"],
        }
        for part in whole
    ]
    straight = collect(model, whole, DOMAINS)
    for other in (collect(model, rows, DOMAINS), collect(model, padded, DOMAINS)):
        assert torch.equal(other.tokens, straight.tokens)
        assert (other.positive - straight.positive).abs().max() <= 1, "a pre-activation of 1e-7 may change its sign"
        torch.testing.assert_close(other.total, straight.total, rtol=1e-4, atol=1e-4)
    english = collect(model, packed, ["en"])
    assert (english.positive[:, 0] - straight.positive[:, 0]).abs().max() <= 1
    torch.testing.assert_close(english.square[:, 0], straight.square[:, 0], rtol=1e-4, atol=1e-4)


def test_the_table_has_a_line_per_neuron():
    table = collect(tiny_model("llama"), text(2), DOMAINS).table()
    assert list(table.columns[:4]) == ["layer", "neuron", "rate_en", "rate_law"]
    assert table.loc[96, ["layer", "neuron"]].tolist() == [1, 0]
    assert len(table) == 192


def test_bad_input_is_named(tmp_path):
    model = tiny_model("llama")
    with pytest.raises(KoffError, match="domain 'law' has no text to count"):
        collect(model, [batch(["en"], 0)], DOMAINS)
    with pytest.raises(KoffError, match="a row of domain 'law'; the domains are en"):
        collect(model, text(1), ["en"])
    collect(model, text(3), DOMAINS, folder=tmp_path)
    with pytest.raises(KoffError, match="holds the sums of other text"):
        collect(model, [batch(["en", "law"], 9), *text(3)[1:]], DOMAINS, folder=tmp_path)
    with pytest.raises(KoffError, match="holds the sums of more text"):
        collect(model, text(2), DOMAINS, folder=tmp_path)
    with pytest.raises(KoffError, match="holds the sums of model .* over en, law; this is model .*another folder"):
        collect(tiny_model("llama", seed=1), text(3), DOMAINS, folder=tmp_path)
    (tmp_path / "activations.safetensors").write_bytes(b"no")
    with pytest.raises(KoffError, match=r"activations\.safetensors cannot be used .*measure again"):
        Activations.load(tmp_path)
