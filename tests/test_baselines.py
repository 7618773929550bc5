"""One-shot scores against formulas written out by hand, and the text that they are read from."""

import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tiny_run import RandomText, tiny_module, tiny_trainer

from koff_lightning import KoffError, SparsitySpec
from koff_lightning.backbone import parameter_counts, prunable_groups
from koff_lightning.data.calibration import CalibrationText
from koff_lightning.data.encoding import TokenStream
from koff_lightning.data.packing import pack
from koff_lightning.evaluation.baselines import Moments, compensation, input_moments, scores
from koff_lightning.sparsity import Budget

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3_text")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16  # of tiny_model


def text(batches=3):
    """Batches of unequal size; one has padding before its texts."""
    random = torch.Generator().manual_seed(0)
    made = [{"input_ids": torch.randint(3, 97, (2 + i, 9 + i), generator=random)} for i in range(batches)]
    mask = torch.ones_like(made[0]["input_ids"])
    mask[0, :4] = 0
    made[0] |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    for batch in made:
        batch["labels"] = batch["input_ids"].clone()
    made[0]["labels"][mask == 0] = -100
    return made


def inputs_by_hand(model, batches):
    """What reaches o_proj and down_proj of each layer, [N, C], padding left out."""
    seen = {}

    def keep(name, mask):
        def hook(_, inputs):
            rows = [token for row, real in zip(inputs[0], mask, strict=True) for token in row[real]]
            seen.setdefault(name, []).extend(rows)

        return hook

    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        hooks = []
        for i, layer in enumerate(model.model.layers):
            for name, linear in ((f"{i}.o", layer.self_attn.o_proj), (f"{i}.down", layer.mlp.down_proj)):
                hooks.append(linear.register_forward_pre_hook(keep(name, mask)))
        with torch.no_grad():
            model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False)
        for hook in hooks:
            hook.remove()
    return {name: torch.stack(rows).double() for name, rows in seen.items()}


def columns_of(group):
    """The columns of o_proj that the query heads of a kv head fill."""
    heads = [head for head in range(HEADS) if head // (HEADS // KV_HEADS) == group]
    return [head * HEAD_DIM + i for head in heads for i in range(HEAD_DIM)]


def places(values):
    return [sum(other <= value for other in values) / len(values) for value in values]


def wanda_by_hand(model, seen):
    found = []
    for i, layer in enumerate(model.model.layers):
        for name, linear in ((f"{i}.down", layer.mlp.down_proj), (f"{i}.o", layer.self_attn.o_proj)):
            each = (
                linear.weight.detach().abs().double() * seen[name].square().sum(0).sqrt()
            )  # the score of every weight
            columns = each.sum(0).tolist()
            if name.endswith("o"):
                columns = [sum(columns[j] for j in columns_of(group)) for group in range(KV_HEADS)]
            found += places(columns)
    return found


def flap_by_hand(model, seen):
    found = []
    for i, layer in enumerate(model.model.layers):
        for name, linear in ((f"{i}.down", layer.mlp.down_proj), (f"{i}.o", layer.self_attn.o_proj)):
            x, w = seen[name], linear.weight.detach().double()
            centred = x - x.sum(0) / len(x)
            variance = centred.square().sum(0) / (len(x) - 1)
            fluctuation = [float(variance[j] * w[:, j].norm() ** 2) for j in range(w.shape[1])]
            mean = sum(fluctuation) / len(fluctuation)
            deviation = math.sqrt(sum((f - mean) ** 2 for f in fluctuation) / len(fluctuation))
            columns = [(f - mean) / deviation for f in fluctuation]
            if name.endswith("o"):
                own = [columns_of(group) for group in range(KV_HEADS)]
                columns = [sum(columns[j] for j in part) / len(part) for part in own]
            found += columns
    return found


def magnitude_by_hand(model, _):
    found = []
    for layer in model.model.layers:
        mlp, attention = layer.mlp, layer.self_attn
        neurons = zip(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight.T, strict=True)
        found += places([float(torch.cat(parts).double().norm()) for parts in neurons])
        norms = []
        for group in range(KV_HEADS):
            queries, own = columns_of(group), slice(group * HEAD_DIM, (group + 1) * HEAD_DIM)
            parts = [attention.q_proj.weight[queries], attention.o_proj.weight[:, queries]]
            parts += [attention.k_proj.weight[own], attention.v_proj.weight[own]]
            if attention.q_proj.bias is not None:
                parts += [attention.q_proj.bias[queries], attention.k_proj.bias[own], attention.v_proj.bias[own]]
            norms.append(float(torch.cat([part.flatten() for part in parts]).double().norm()))
        found += places(norms)
    return found


def fisher_by_hand(model, _):
    """One row at a time; a gate at 1 - e instead of a hook: the consumer's own columns are scaled."""
    groups = prunable_groups(model)
    found = [torch.zeros(group.size, dtype=torch.float64) for group in groups]
    rows = [{k: v[i : i + 1] for k, v in batch.items()} for batch in text() for i in range(len(batch["input_ids"]))]
    for row in rows:
        model.zero_grad()
        labels = row.pop("labels")[0, 1:]
        logits = model(**row, use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100]).backward()
        for place, group in zip(found, groups, strict=True):
            weight = model.get_submodule(group.consumer).weight
            slope = (weight.grad * weight.detach()).sum(0).view(group.size, group.width).sum(1)  # d loss / d scale
            place += slope.double().square() / len(rows) / group.params_per_unit
    return torch.cat(found).tolist()


BY_HAND = {"wanda_sp": wanda_by_hand, "flap": flap_by_hand, "magnitude": magnitude_by_hand, "fisher": fisher_by_hand}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", BY_HAND)
def test_scores_are_the_formulas(family, method):
    model, batches = tiny_model(family).requires_grad_(method == "fisher"), text()
    expected = torch.tensor(BY_HAND[method](model, inputs_by_hand(model, batches)))
    found = scores(model.requires_grad_(False), batches, method)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-12 if method == "fisher" else 1e-5)


def test_fisher_is_what_the_warm_up_of_a_run_collects(tmp_path):
    """Two steps of a row per domain, each half of the loss; no memory has moved the model from the dense one."""
    module, data = tiny_module(tmp_path, lora=None, kv=None), RandomText()
    tiny_trainer(tmp_path, []).fit(module, data)
    collected = module.model.gates.importance / module.model.budget.costs
    assert collected.min() > 0
    with module.model.gates.off():
        found = scores(module.model.backbone, list(data.train_dataloader())[:2], "fisher", module.model.gates.groups)
    torch.testing.assert_close(found, collected * 2**2 / 4, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_compensation_is_what_the_removed_columns_contribute_on_average(family):
    model, batches = tiny_model(family), text()
    groups, seen = prunable_groups(model), inputs_by_hand(model, batches)
    kept = torch.rand(sum(g.size for g in groups), generator=torch.Generator().manual_seed(0)) > 0.5
    found = compensation(model, input_moments(model, batches, groups), groups, kept)
    parts = kept.split([group.size for group in groups])
    for row, (group, part) in zip(found, zip(groups, parts, strict=True), strict=True):
        name = f"{group.layer}.{'down' if group.kind == 'channel' else 'o'}"
        removed = [j for u in range(group.size) if not part[u] for j in range(u * group.width, (u + 1) * group.width)]
        output = model.get_submodule(group.consumer).weight.double()[:, removed] @ seen[name][:, removed].T  # [d, N]
        torch.testing.assert_close(row, output.mean(1).float(), rtol=1e-4, atol=1e-6)


def test_units_of_one_kind_are_scored_alone():
    model = tiny_model("llama")
    both, channels = prunable_groups(model), prunable_groups(model, ["channel"])
    of_channels = torch.cat([torch.full((g.size,), g.kind == "channel") for g in both])
    for method in BY_HAND:
        found = scores(model, text(), method, channels)
        torch.testing.assert_close(found, scores(model, text(), method, both)[of_channels])


def test_random_scores_follow_the_seed():
    model = tiny_model("llama")
    one, again, other = (scores(model, None, "random", seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert len(one.unique()) > 0.9 * len(one)


@pytest.mark.parametrize("method", ["wanda_sp", "magnitude"])
def test_places_take_the_same_share_of_every_layer(method):
    model = tiny_model("llama", num_hidden_layers=4)
    for layer, module in enumerate(model.model.layers):  # scales of their own, as real layers have
        for parameter in module.mlp.parameters():
            parameter.data *= 1 + layer
    groups = prunable_groups(model, ["channel"])
    budget = Budget(groups, parameter_counts(model), SparsitySpec(target=0.2, units=["channel"], min_channels=4))
    kept = budget.harden(scores(model, text(), method, groups))
    counts = [int(part.sum()) for part in kept.split([group.size for group in groups])]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) < 4 * 96


def test_scoring_leaves_the_model_alone():
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores(model, text(), "flap")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_moments_of_many_batches_are_those_of_all_rows():
    rows = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0)) + 1000.0  # squares alone would drown it
    moments = Moments()
    for part in rows.split([1, 400, 99, 500]):
        moments.add(part)
    moments.add(rows[:0])
    torch.testing.assert_close(moments.mean, rows.double().mean(0))
    torch.testing.assert_close(moments.variance, rows.double().var(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(moments.norm, rows.double().norm(dim=0))


@pytest.mark.parametrize(
    ("method", "batches", "message"),
    [
        ("wanda", [], "method must be one of magnitude, .*; got 'wanda'. Did you mean 'wanda_sp'"),
        ("flap", [], "there is no calibration text"),
        ("wanda_sp", None, "there is no calibration text"),
        ("flap", [{"input_ids": torch.full((1, 1), 5)}], "there is no calibration text"),
        ("fisher", [], "there is no calibration text: .* fisher score units"),
    ],
)
def test_bad_input_is_named(method, batches, message):
    with pytest.raises(KoffError, match=message):
        scores(tiny_model("llama"), batches, method)


def test_scores_that_are_no_numbers_name_the_layer():
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = torch.nan
    with pytest.raises(KoffError, match=r"magnitude: the scores of model.layers.1.mlp.down_proj are not finite"):
        scores(model, None, "magnitude")
    with pytest.raises(KoffError, match=r"flap: the scores of model.layers.1.mlp.down_proj are not finite"):
        scores(model, text(), "flap")


# ------------------------------------------------------------------------------------------------ calibration text


def rows_of(sizes):
    """Packed training rows whose tokens tell domain and row; the last row of each domain is padded."""
    packed = {}
    for place, (name, count) in enumerate(sizes.items()):
        tokens = (1000 * place + np.arange(8 * count - 3) // 8).astype(np.int32)
        stream = TokenStream(tokens, lengths=np.array([len(tokens)]), num_bytes=np.array([30 * count]))
        packed[name] = pack(stream, 8, overlap=False)
    return packed


def test_calibration_takes_equally_many_whole_rows_of_every_domain():
    found = CalibrationText(rows_of({"en": 40, "law": 11}), num_tokens=150, batch_size=4)
    batches = list(found)
    assert [len(batch["domains"]) for batch in batches] == [4, 4, 4, 4, 4]
    assert found.num_tokens == sum(batch["input_ids"].numel() for batch in batches) == 160
    names = [name for batch in batches for name in batch["domains"]]
    assert (names.count("en"), names.count("law")) == (10, 10)
    drawn = [int(row[0]) for batch in batches for row in batch["input_ids"]]
    assert len(set(drawn)) == 20, "no row twice"
    assert 1010 not in drawn, "the last row of law holds padding"
    assert [row[0] for batch in found for row in batch["input_ids"].tolist()] == drawn, "it can be read again"


def test_calibration_is_drawn_by_its_seed():
    packed = rows_of({"en": 40})
    drawn = [[b["input_ids"].tolist() for b in CalibrationText(packed, 80, 4, seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("sizes", "tokens", "message"),
    [
        (
            {"en": 40, "law": 5},
            160,
            "domain 'law' has 32 tokens .* wants 80 of each domain: give --calibration_tokens 64",
        ),
        ({"en": 1}, 8, "domain 'en' has 0 tokens .* give it longer text, or a smaller data.seq_len"),
        ({"en": 40}, 0, "calibration_tokens must be 1 or more; got 0"),
    ],
)
def test_too_little_text_is_named(sizes, tokens, message):
    with pytest.raises(KoffError, match=message):
        CalibrationText(rows_of(sizes), tokens, 4)
