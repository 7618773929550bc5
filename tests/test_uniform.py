"""Widths that engines can take: the same in every layer, or multiples of something."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model

from koff_lightning import KoffError, KOFFModule, SparsitySpec
from koff_lightning.backbone import PrunableGroup, uniform_kv_groups
from koff_lightning.sparsity import Budget


def group(layer: int, kind: str, size: int, cost: int) -> PrunableGroup:
    return PrunableGroup(layer, kind, size, (), f"{layer}.{kind}", 1, cost)


def widths(budget: Budget, kept: torch.Tensor) -> dict[str, list[int]]:
    """Units kept, by kind and layer."""
    parts = kept.split([g.size for g in budget.groups])
    return {
        kind: [int(part.sum()) for part, g in zip(parts, budget.groups, strict=True) if g.kind == kind]
        for kind in ("channel", "kv_group")
    }


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    target=st.floats(0.15, 0.5),  # at least the smallest step of kv groups
    multiple=st.sampled_from([1, 4, 7]),
    allowed=st.sampled_from([None, [4, 2, 1]]),
)
def test_uniform_hardening_leaves_the_same_widths_and_spends_the_budget(seed, target, multiple, allowed):
    groups = [g for i in range(3) for g in (group(i, "channel", 40, 30), group(i, "kv_group", 4, 110))]
    units = sum(g.size * g.params_per_unit for g in groups)
    spec = SparsitySpec(target, "units", layout="uniform", multiple_of=multiple, min_channels=4)
    budget = Budget(groups, {"total": units, "body": units}, spec, allowed)
    scores = torch.randn(len(budget.costs), generator=torch.Generator().manual_seed(seed))
    kept = budget.harden(scores)

    kinds = widths(budget, kept)
    assert all(len(set(layers)) == 1 for layers in kinds.values())
    channels, kv = kinds["channel"][0], kinds["kv_group"][0]
    assert channels >= 4 and (channels == 40 or channels % multiple == 0)
    assert kv >= 1 and (allowed is None or kv in allowed)
    for part, g in zip(kept.split([g.size for g in groups]), groups, strict=True):  # the lowest scores have left
        own = scores.split([g.size for g in groups])[groups.index(g)]
        assert not len(own[~part]) or own[~part].max() <= own[part].min()

    removed = budget.report(kept)["units"]
    first = 40 % multiple or multiple
    steps = [(first if channels == 40 else multiple) * 30 * 3] if channels - multiple >= 4 else []
    assert removed <= target + 1e-9
    assert all(removed + step / units > target - 1e-9 for step in steps)  # one more step of neurons would overshoot


@pytest.mark.parametrize("multiple", [2, 8])
@pytest.mark.parametrize("seed", range(4))
def test_ragged_widths_can_be_multiples_too(seed, multiple):
    groups = [group(i, "channel", 64, 30) for i in range(4)]
    units = sum(g.size * g.params_per_unit for g in groups)
    spec = SparsitySpec(0.3, "units", multiple_of=multiple, min_channels=8)
    budget = Budget(groups, {"total": units, "body": units}, spec)
    layers = widths(budget, budget.harden(torch.randn(256, generator=torch.Generator().manual_seed(seed))))["channel"]
    assert len(set(layers)) > 1 and all(width % multiple == 0 for width in layers)
    assert 0 <= 0.3 - (256 - sum(layers)) / 256 < multiple / 256


def test_a_uniform_llama_that_cannot_lose_kv_groups_says_so_before_weights_load(tmp_path):
    config = tiny_model("llama").config
    config.save_pretrained(tmp_path)  # a config alone: whoever looked for weights would find none
    spec = SparsitySpec(0.05, layout="uniform", min_channels=4)
    with pytest.raises(KoffError, match=r"takes at least 20.0% of body.*set sparsity.units to \[channel\]"):
        KOFFModule(str(tmp_path), ["a"], spec)
    KOFFModule(str(tmp_path), ["a"], SparsitySpec(0.05, layout="uniform", min_channels=4, units=["channel"]))


@pytest.mark.parametrize(
    ("family", "allowed"),
    [
        ("llama", [4, 2, 1]),
        ("gemma3_text", [4, 2, 1]),
        ("qwen2", [4, 3, 2, 1]),
        ("mistral", [4, 3, 2, 1]),
    ],
)
def test_kv_groups_that_a_plain_config_can_have(family, allowed):
    config = tiny_model(family, num_attention_heads=8, num_key_value_heads=4, head_dim=8).config
    assert uniform_kv_groups(config) == allowed


def test_multiple_of_out_of_range():
    with pytest.raises(KoffError, match="sparsity.multiple_of must be at least 1; got 0"):
        SparsitySpec(multiple_of=0)
