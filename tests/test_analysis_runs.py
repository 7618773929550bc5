"""What is done to a decomposition: opened from checkpoint and artifacts, memories swapped, cut in parts, undone."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_artifact import DOMAINS, VOCABULARY, tiny_decomposition
from tiny_models import tiny_model
from tiny_run import RandomText, tiny_module, tiny_trainer

from koff_lightning.artifact.export import export
from koff_lightning.loading import load_config, load_tokenizer
from koff_lightning.specs.memories import KVSpec, LoraSpec
from koff_lightning.studies.analysis import (
    adapter_norms,
    attention_mass,
    collect_dense,
    enrichment,
    knockout,
    mask_of,
    open_run,
    promoted_tokens,
    read_mask,
    reinserted,
    reinsertion,
    transfer,
)
from koff_lightning.studies.analysis.causal import _alike
from koff_lightning.studies.analysis.scoring import own_memory, score, under
from koff_lightning.studies.analysis.transfer import Transfer
from koff_lightning.support.errors import KoffError
from koff_lightning.surgery import masks


def held_out(domains=DOMAINS, rows: int = 2) -> list[dict]:
    batches = []
    for seed, domain in enumerate(domains):
        ids = torch.randint(3, VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(seed))
        labels = ids.clone()
        labels[:, 0] = -100
        batches.append({"input_ids": ids, "labels": labels, "domains": [domain] * rows})
        batches[-1]["num_bytes"] = torch.full((rows,), 30.0)
    return batches


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A decomposition exported in several layouts."""
    folder = tmp_path_factory.mktemp("runs")
    module = tiny_decomposition(folder)
    for layout in ("ragged", "masked", "deci"):
        export(module, folder / layout, layout=layout, prove=False)
    export(module, folder / "merged", layout="merged", domain="de", prove=False)
    return folder


@pytest.fixture(scope="module")
def opened(home):
    return open_run(home / "ragged")


def test_all_layouts_open_as_the_same_thing(home, opened):
    expected = transfer(opened, held_out()).bpb
    assert (list(expected.columns), expected.index.name) == (["dense", "none", *DOMAINS], "domain")
    original = tiny_decomposition(home)
    assert torch.equal(opened.gates.kept, original.gates.kept)
    own = score(held_out(), {"koff": lambda batch: original.row_nats(batch, "koff")})
    assert np.diag(expected[list(DOMAINS)]) == pytest.approx(own["koff"].to_numpy(), rel=1e-5)
    for layout in ("masked", "deci"):
        other = open_run(home / layout)
        assert (transfer(other, held_out()).bpb - expected).abs().to_numpy().max() < 1e-5
        assert (read_mask(home / layout).removed == read_mask(home / "ragged").removed).all()
        back = np.ones_like(read_mask(home / layout).removed)
        with reinserted(other, back), reinserted(opened, back):
            tables = [score(held_out(), {"own": own_memory(module)}) for module in (other, opened)]
        assert (tables[0] - tables[1]).abs().to_numpy().max() < 1e-5, "also with the removed units put back"


def test_perplexity_is_that_of_the_predicted_tokens(opened):
    found, rows = transfer(opened, iter(held_out())), list(held_out())
    for domain in DOMAINS:
        nats = tokens = 0.0
        for batch in rows:
            own = torch.tensor([name == domain for name in batch["domains"]])
            nats += float(opened.row_nats(batch, "koff")[own].sum())
            tokens += int((batch["labels"][own, 1:] != -100).sum())
        assert found.perplexity.loc[domain, domain] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert list(found.perplexity.columns) == list(found.bpb.columns)


def test_a_checkpoint_opens_as_its_own_export(tmp_path, monkeypatch):
    module = tiny_module(tmp_path)
    trainer = tiny_trainer(tmp_path, [], steps=8)
    trainer.fit(module, RandomText())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    opened = open_run(tmp_path / "last.ckpt")
    mask = read_mask(tmp_path / "last.ckpt")
    assert mask.removed.tolist() == mask_of(module.model).removed.tolist() == mask_of(opened).removed.tolist()
    assert mask.removed.any()
    assert mask.importance is not None
    table = mask.table()
    assert len(table) == len(module.model.gates.kept)
    assert table["removed"].sum() == (~module.model.gates.kept).sum()
    removed = ~opened.gates.kept
    for name, weight in opened.memories.weights("en").items():  # what belongs to removed neurons is cleared
        group = next((g for g in opened.gates.groups if name.startswith(f"{g.consumer}.") and "lora_A" in name), None)
        if group is not None and group.kind == "channel":
            part = removed.split(opened.gates.sizes)[opened.gates.groups.index(group)]
            assert not weight[:, part].any()
    batches = [RandomText.batch([d] * 2, 5) for d in ("en", "law")]
    was = score(batches, {"koff": lambda batch: module.model.eval().row_nats(batch, "koff")})
    now = score(batches, {"koff": own_memory(opened)})
    assert now.to_numpy() == pytest.approx(was.to_numpy(), rel=1e-5)
    checkpoint, asked = torch.load(tmp_path / "last.ckpt", weights_only=True), []
    checkpoint["hyper_parameters"]["revision"] = "v2"
    torch.save(checkpoint, tmp_path / "v2.ckpt")
    monkeypatch.setattr(
        "koff_lightning.studies.analysis.masks.load_config",
        lambda where, revision: asked.append(revision) or load_config(where),
    )
    read_mask(tmp_path / "v2.ckpt"), read_mask(tmp_path / "v2.ckpt", module.model.source)
    assert asked == ["v2", None], "units are those of the run's own revision; a place that is named has none"


def test_parts_switched_off_add_up(opened):
    table = knockout(opened, held_out())
    plain = score(held_out(), {"none": under(opened, None), "own": own_memory(opened)})
    assert table["none"].tolist() == plain["none"].tolist(), "both parts off is memory off, bit for bit"
    assert table["both"].tolist() == plain["own"].tolist()
    assert table["lora"].ne(table["both"]).all()
    assert table["kv"].ne(table["none"]).all()
    synergy = (table["none"] - table["both"]) - (table["none"] - table["lora"]) - (table["none"] - table["kv"])
    assert table["synergy"].tolist() == pytest.approx(synergy.tolist())
    assert score(held_out(), {"own": own_memory(opened)})["own"].tolist() == plain["own"].tolist(), "all is undone"


def test_a_part_that_a_memory_lacks_is_worth_nothing(tmp_path):
    module = tiny_decomposition(tmp_path, kv=None)
    table = knockout(module, held_out())
    assert table["kv"].tolist() == table["none"].tolist()
    assert table["lora"].tolist() == table["both"].tolist()
    assert table["synergy"].tolist() == [0.0] * 3
    with pytest.raises(KoffError, match="no domain of this text has a KV memory"):
        attention_mass(module, held_out())


def test_transfer_is_read_off_the_matrix():
    import pandas as pd

    values = {"dense": [1.0, 1.0, 1.0], "none": [3.0, 3.0, 3.0], "de": [1.0, 2.0, 2.9], "nl": [2.0, 1.2, 2.8]}
    table = Transfer(pd.DataFrame(values | {"zh": [2.5, 2.6, 1.1]}, index=pd.Index(["de", "nl", "zh"], name="domain")))
    assert table.memories == ["de", "nl", "zh"]
    assert table.by_domain.tolist() == pytest.approx([1.25, 1.1, 1.75])
    assert table.advantage == pytest.approx(np.mean([1.25, 1.1, 1.75]))
    assert table.zscores().mean(axis=1).tolist() == pytest.approx([0, 0, 0])
    assert sorted(table.linkage()[0, :2]) == [0, 1], "German and Dutch join first"
    assert table.order().index("zh") != 1
    alone = Transfer(table.bpb[["dense", "none", "de"]])
    assert math.isnan(alone.advantage)
    assert alone.order() == ["de"]
    with pytest.raises(KoffError, match="grouped from two on; there is de"):
        alone.linkage()


def test_one_shared_memory_has_no_diagonal(tmp_path):
    module = tiny_decomposition(tmp_path, shared_memory=True)
    assert transfer(module, held_out()).advantage == 0.0


def test_all_removed_units_put_back_are_the_dense_model(opened):
    mask = mask_of(opened)
    kept = opened.gates.kept.clone()
    dense = score(held_out(), {"dense": lambda batch: opened.row_nats(batch, "dense")})
    with reinserted(opened, mask.removed):
        neurons = torch.cat([part for g, part in masks(opened.gates.groups, opened.gates.kept) if g.kind == "channel"])
        assert neurons.all()
        opened.gates.kept.fill_(True)  # the kv groups too
        assert score(held_out(), {"all": under(opened, None)})["all"].tolist() == pytest.approx(
            dense["dense"].tolist(), rel=1e-6
        )
    assert torch.equal(opened.gates.kept, kept)


def test_reinsertion_puts_the_specialists_back_and_only_them(opened):
    mask = mask_of(opened)
    assigned = np.zeros((len(mask.removed), 3), bool)
    assigned[np.flatnonzero(mask.removed)[:7], 0] = True
    assigned[np.flatnonzero(~mask.removed)[:5], 1] = True  # kept ones: there is nothing to put back
    before = opened.gates.kept.clone()
    table = reinsertion(opened, assigned, list(DOMAINS), held_out(), controls=2).set_index("domain")
    assert table["neurons"].tolist() == [7, 0, 0]
    assert not table.loc["de"].isna().any()
    assert table.loc["de", "off_after"] != table.loc["de", "off_before"]
    assert table.loc["fr", ["off_after", "on_after", "off_control", "others_gain"]].isna().all()
    with reinserted(opened, assigned[:, 0] & mask.removed):
        after = score(held_out(), {"off": under(opened, None), "on": own_memory(opened)})
    assert table.loc["de", ["off_after", "on_after"]].tolist() == after.loc["de", ["off", "on"]].tolist()
    others = table["off_before"][1:].to_numpy() - after["off"][1:].to_numpy()
    random, controls = np.random.default_rng(0), []
    for _ in range(2):
        with reinserted(opened, _alike(assigned[:, 0], mask.removed & ~assigned[:, 0], mask.layer, random)):
            controls.append(score(held_out(["de"]), {"off": under(opened, None), "on": own_memory(opened)}))
    control = np.mean([one.loc["de"] for one in controls], axis=0)  # [off, on]
    assert table.loc["de", ["off_control", "on_control"]].tolist() == pytest.approx(control.tolist(), rel=1e-9)
    assert table.loc["de", "others_gain"] == pytest.approx(others.mean(), rel=1e-9), "of the other domains alone"
    assert torch.equal(opened.gates.kept, before)
    with pytest.raises(KoffError, match=r"specialists of \[3, 3\] neurons and domains"):
        reinsertion(opened, assigned[:3], list(DOMAINS), held_out())
    with pytest.raises(KoffError, match="domain 'law' has no held-out text"):
        reinsertion(opened, assigned, list(DOMAINS), held_out(["de", "fr"]))


def test_the_control_has_as_many_neurons_of_each_layer_and_none_of_the_set_itself():
    layer, random = np.repeat([0, 1, 2], 10), np.random.default_rng(0)
    wanted, pool = np.zeros(30, bool), np.zeros(30, bool)
    wanted[[0, 1, 2, 20]] = pool[[4, 5, 6, 7, 15, 25]] = True
    drawn = [_alike(wanted, pool, layer, random) for _ in range(50)]
    assert all(not (one & ~pool).any() and np.bincount(layer[one], minlength=3).tolist() == [3, 0, 1] for one in drawn)
    assert np.any(drawn, axis=0).tolist() == (pool & (layer != 1)).tolist(), "each of them may be drawn"
    assert _alike(wanted, pool & (np.arange(30) != 25), layer, random) is None, "too few in the last layer"


def test_attention_on_the_slots_is_the_softmax_over_both(opened):
    """Against the weights of an eager attention over slots and tokens, first layer, one row."""
    table = attention_mass(opened, held_out(["de"], rows=1))
    assert table["mass"].dropna().between(0, 1).all()
    batch = held_out(["de"], rows=1)[0]
    attention, states = opened.backbone.model.layers[0].self_attn, []
    hook = attention.register_forward_pre_hook(lambda m, a, k: states.append(k), with_kwargs=True)
    opened.row_nats(batch, "koff")
    hook.remove()
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    hidden, (cos, sin) = states[0]["hidden_states"], states[0]["position_embeddings"]
    opened.memories.activate(["de"])
    query, key = (p(hidden).view(1, 9, -1, 16).transpose(1, 2) for p in (attention.q_proj, attention.k_proj))
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    slots = opened.memories.slots("de").layer(0)[0]  # [K, P, dh]
    keys = torch.cat([slots[None], key], 2).repeat_interleave(2, 1)
    scores = query @ keys.mT / 4
    scores[..., 5:] = scores[..., 5:].masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), -torch.inf)
    expected = scores.softmax(-1)[..., :5].sum(-1)[0, :, 1:].mean(-1)  # [H]
    kept = ~np.isnan(table[table["layer"] == 0]["mass"].to_numpy())
    assert kept.any()
    found = table[table["layer"] == 0]["mass"].to_numpy()[kept]
    assert found == pytest.approx(expected.detach().numpy()[kept], rel=1e-4)
    assert opened.backbone.config._attn_implementation == "koff", "all is undone"


def test_norms_are_those_of_the_product(opened):
    table = adapter_norms(opened).set_index(["domain", "layer", "linear"])
    weights = opened.memories.weights("fr")
    path = next(name for name in weights if name.endswith("lora_A.weight") and "down" in name).rpartition(".lora_")[0]
    added = weights[f"{path}.lora_B.weight"] @ weights[f"{path}.lora_A.weight"] * 2.0  # alpha 6 over rank 3
    row = table.loc[("fr", 0, path.rpartition(".")[2])]
    assert row["norm"] == pytest.approx(float(added.norm()), rel=1e-5)
    frozen = opened.backbone.get_submodule(path).base_layer.weight
    assert row["relative"] == pytest.approx(float(added.norm() / frozen.norm()), rel=1e-5)
    assert len(table) == 3 * 2 * 7


def test_promoted_tokens_are_those_the_change_points_to(opened, home):
    tokenizer = load_tokenizer(str(home / "dense"))
    table = promoted_tokens(opened, held_out(["de"]), tokenizer, count=4)
    assert table["rank"].tolist() == [1, 2, 3, 4]
    assert (table["promoted_by"].diff().dropna() <= 0).all()
    assert table["promoted_by"].min() > 0 > -table["suppressed_by"].min()
    (batch,) = held_out(["de"])
    states = []
    for memories in (["de"] * 2, [None] * 2):
        with opened.under(memories, opened.hard_gates()):
            states.append(opened.hidden(batch)[:, 1:].flatten(0, 1).double())  # the first token is not predicted
    risen = ((states[0] - states[1]) @ opened.head.double().T).mean(0)  # [V], of logits
    order = risen.argsort(descending=True).tolist()
    assert table["promoted"].tolist() == [tokenizer.decode([token]) for token in order[:4]]
    assert table["suppressed"].tolist() == [tokenizer.decode([token]) for token in order[:-5:-1]]
    assert table["promoted_by"].tolist() == pytest.approx(risen[order[:4]].tolist(), rel=1e-4)
    assert table["suppressed_by"].tolist() == pytest.approx((-risen[order[:-5:-1]]).tolist(), rel=1e-4)


def test_the_dense_model_is_read_whatever_is_in_force(opened, home):
    batches = [batch | {"documents": torch.tensor([[0], [1]]).expand(-1, 9)} for batch in held_out()]
    opened.row_nats(batches[0], "koff")  # gates and memories are on now
    inside = collect_dense(opened, batches, list(DOMAINS))
    from koff_lightning.loading import load_backbone
    from koff_lightning.studies.analysis import collect

    plain = collect(load_backbone(str(home / "dense")), batches, list(DOMAINS))
    assert plain.base_hash == inside.base_hash
    assert torch.equal(plain.positive, inside.positive)
    read_mask(home / "ragged").check(inside)
    found = enrichment(read_mask(home / "masked").removed, inside.rates()[:, 0] > 0.5, inside.layer.numpy())
    assert found == enrichment(read_mask(home / "ragged").removed, inside.rates()[:, 0] > 0.5, inside.layer.numpy())


@pytest.mark.parametrize("units", [["gate_channel", "up_channel", "v_channel"], ["up_channel", "down_channel"]])
def test_neurons_are_read_from_channels_of_gate_and_up(tmp_path, units):
    """A neuron is removed if either half is; each half is told too, and what is put back is the whole neuron."""
    from koff_lightning.specs.sparsity import SparsitySpec

    module = tiny_decomposition(tmp_path, sparsity=SparsitySpec(target=0.2, units=units, min_channels=4))
    export(module, tmp_path / "out", prove=False)
    closed = {kind: [] for kind in units}
    for group, kept in masks(module.gates.groups, module.gates.kept):
        closed[group.kind] += (~kept).tolist()
    halves = {kind: np.array(closed[kind]) for kind in units if kind in ("gate_channel", "up_channel")}
    either = np.any(list(halves.values()), axis=0)
    assert either.any() and not either.all()
    for mask in (read_mask(tmp_path / "out"), mask_of(module)):
        assert (mask.removed == either).all() and len(mask.removed) == 2 * 96 and mask.logits is None
        assert {kind: half["removed"].tolist() for kind, half in mask.halves.items()} == {
            kind: half.tolist() for kind, half in halves.items()
        }
        table = mask.table()
        for kind, half in {"channel": either, **halves}.items():
            assert table[table["kind"] == kind]["removed"].tolist() == half.tolist()
            assert table[table["kind"] == kind]["unit"].tolist() == [*range(96)] * 2
    opened = open_run(tmp_path / "out")
    before = opened.gates.kept.clone()
    with reinserted(opened, either):
        for group, kept in masks(opened.gates.groups, opened.gates.kept):
            assert group.kind not in halves or kept.all()
    assert torch.equal(opened.gates.kept, before)
    assert transfer(opened, held_out()).bpb.notna().all(axis=None)


def test_the_wrong_dense_model_is_refused(home, opened, tmp_path):
    tiny_model("llama", seed=7, vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=1).save_pretrained(tmp_path / "x")
    with pytest.raises(KoffError, match=r"was cut from .* \(hash .*\), but .* has hash .*give its own dense model"):
        open_run(home / "ragged", dense=str(tmp_path / "x"))
    from koff_lightning.studies.analysis import collect

    other = collect(tiny_model("llama", seed=7, vocab_size=VOCABULARY), held_out(), list(DOMAINS))
    with pytest.raises(KoffError, match="was cut from the dense model with hash .* measure them on its own dense"):
        mask_of(opened).check(other)
    with pytest.raises(KoffError, match="merged into the backbone: analyse the run's ragged export"):
        open_run(home / "merged")
    with pytest.raises(KoffError, match="no such file"):
        open_run(tmp_path / "none.ckpt")


def test_a_mask_that_is_not_fixed_is_refused(tmp_path):
    module = tiny_module(tmp_path)
    early = ModelCheckpoint(tmp_path / "early", filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = tiny_trainer(tmp_path, [early], steps=8, enable_checkpointing=True)
    trainer.fit(module, RandomText())
    for read in (read_mask, open_run):
        with pytest.raises(KoffError, match="its mask is not fixed yet"):
            read(tmp_path / "early" / "step=3.ckpt")
    module.model.gates.hardened.fill_(False)
    with pytest.raises(KoffError, match="its mask is not fixed yet"):
        mask_of(module.model)


def test_importance_is_told_where_any_unit_has_some(tmp_path):
    module = tiny_decomposition(tmp_path)
    module.gates.importance.zero_()
    assert mask_of(module).importance is None, "nothing was observed"
    module.gates.importance[3] = 2.0
    assert mask_of(module).importance.nonzero()[0].tolist() == [3] and mask_of(module).importance[3] == 2


def test_masks_without_neurons_and_no_text(tmp_path, opened):
    from koff_lightning.specs.sparsity import SparsitySpec

    spec = SparsitySpec(target=0.02, units=["kv_group"])
    module = tiny_module(tmp_path, sparsity=spec, lora=LoraSpec(rank=1))
    module.configure_model()
    module.model.harden()
    with pytest.raises(KoffError, match="removes no FFN neurons .*there is nothing to compare"):
        mask_of(module.model)
    with pytest.raises(KoffError, match="no held-out text to score"):
        transfer(opened, [])
    taken = SimpleNamespace(memories=SimpleNamespace(domains=["de", "none"]))
    with pytest.raises(KoffError, match="a domain is called 'none', which is what the table calls the model without a"):
        transfer(taken, [])


def test_slots_of_some_layers_open_in_their_layers(tmp_path):
    module = tiny_decomposition(tmp_path, kv=KVSpec(slots=5, layers=[1]))
    export(module, tmp_path / "ragged", prove=False)
    found = open_run(tmp_path / "ragged")
    assert found.memories.slots("de").layers == module.memories.slots("de").layers
    own = [score(held_out(), {"own": own_memory(each)})["own"].to_numpy() for each in (found, module)]
    assert own[0] == pytest.approx(own[1], rel=1e-5)
