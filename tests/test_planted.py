"""Planted ground truth: does the whole chain find what is known to be there?"""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from planted import plant

from koff_lightning import (
    DomainDataModule,
    KOFFModule,
    LoraSpec,
    OptimSpec,
    SparsitySpec,
    load_backbone,
    load_tokenizer,
)
from koff_lightning.callbacks import AnnealSparsity
from koff_lightning.studies.analysis import (
    collect,
    collect_dense,
    enrichment,
    identify,
    mask_of,
    odds_ratio_ratio,
    open_run,
    reinsertion,
    stability,
    transfer,
)
from koff_lightning.support.errors import KoffError


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return plant(tmp_path_factory.mktemp("planted") / "model")


def text_of(planted, **options) -> DomainDataModule:
    sizes = {"seq_len": 64, "batch_size": 12, "heldout_fraction": 0.1}
    data = DomainDataModule(planted.sources, tokenizer=planted.backbone, **sizes | options)
    data.setup()
    return data


def test_what_is_planted_is_what_is_said(planted):
    assert planted.specialists.sum() == (~planted.specialists).sum() == 96
    assert planted.serves[planted.specialists].sum(0).tolist() == [16] * 6
    model, tokenizer = load_backbone(planted.backbone), load_tokenizer(planted.backbone)
    for domain, path in planted.sources.items():
        texts = [json.loads(line)["text"] for line in Path(path).read_text(encoding="utf-8").splitlines()]
        ids = torch.tensor(tokenizer(texts)["input_ids"])  # [documents, words]
        assert tokenizer.decode(ids[0]).split()[0].startswith(domain)
        log_p = model(ids).logits[:, :-1].double().log_softmax(-1)
        spent = -log_p.gather(-1, ids[:, 1:, None]).mean()
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
        assert float(spent) == pytest.approx(float(entropy), abs=0.04), "the text is drawn from the model itself"
        assert float(entropy) < 0.8 * math.log(24)


def test_lape_finds_the_planted_specialists_exactly(planted):
    data = text_of(planted)
    seen = collect(load_backbone(planted.backbone), data.calibration_text(30_000), data.domain_names)
    found = identify(seen.rates(), planted.domains, rate=0.5, bar=0.4)  # half of the neurons are specific here
    assert (found.selected == planted.specialists).all()
    assert (found.assigned == planted.serves & planted.specialists[:, None]).all()
    assert (found.general["G1"] == ~planted.specialists).all()
    assert stability(seen, rate=0.5, bar=0.4).jaccard == 1.0


def test_a_folder_in_use_is_refused(planted):
    with pytest.raises(KoffError, match="is not empty"):
        plant(planted.folder)


def trained(planted, folder, lora: LoraSpec | None):
    """A checkpoint of a run that removes 30 % of the neurons."""
    torch.manual_seed(0)
    spec = SparsitySpec(target=0.3, denominator="units", units=["channel"], min_channels=4, spread=1.0)
    rates = OptimSpec(lora_lr=1e-2, mask_lr=0.3)
    module = KOFFModule(planted.backbone, planted.domains, sparsity=spec, lora=lora, kv=None, optim=rates)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "limit_val_batches": 0}
    schedule = AnnealSparsity(warmup=0.15, ramp=0.35, hold=0.1)
    options = quiet | {"accelerator": "cpu", "max_steps": 900, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    trainer = Trainer(callbacks=[schedule], default_root_dir=folder, **options)
    trainer.fit(module, text_of(planted))
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


@pytest.mark.slow
def test_the_whole_chain_finds_the_planted_specialists_among_the_removed(planted, tmp_path):
    """With memories specialists go, since one memory can stand in for them; without, they are as dear as the others."""
    lora = LoraSpec(rank=8, alpha=16, targets=["down_proj"])
    run, bare = (open_run(trained(planted, tmp_path / name, part)) for name, part in (("koff", lora), ("bare", None)))
    data = text_of(planted)
    seen = collect_dense(run, data.calibration_text(30_000), data.domain_names)
    found = identify(seen.rates(), seen.domains, rate=0.5, bar=0.4)
    layer = seen.layer.numpy()
    masks = [mask_of(module).removed for module in (run, bare)]
    assert [int(mask.sum()) for mask in masks] == [57, 57]
    with_memory, without = (enrichment(mask, found.selected, layer) for mask in masks)
    assert with_memory.mh_low > 2
    assert with_memory.p_more < 0.001
    assert enrichment(masks[0], found.general["G1"], layer).p_less < 0.001
    assert without.mh_low < 1.2
    assert without.p_more > 0.05
    assert odds_ratio_ratio([masks[0]], [masks[1]], found.selected, layer, draws=500).low > 1.5
    heldout = list(data.val_dataloader())
    assert transfer(run, heldout).advantage > 0.5
    back = reinsertion(run, found.assigned, found.domains, heldout, controls=1)
    helped = back["off_before"] - back["off_after"]
    assert (helped > 0.01).all(), "without its memory every domain misses its specialists"
    assert (back["on_before"] - back["on_after"] < 0.5 * helped).all(), "with it hardly: the knowledge has moved"
    assert np.abs(back["others_gain"]).max() < 0.1 * helped.min(), "nobody else does"
