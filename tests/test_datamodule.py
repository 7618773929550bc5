"""DomainDataModule and its loaders, driven by a real Lightning Trainer."""

import json
import warnings
from collections import Counter
from itertools import islice

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from toy_text import toy_documents, toy_tokenizer, write_jsonl

from koff_lightning.data import DomainDataModule, DomainSource, bundled_domains, check_vocabulary, is_heldout
from koff_lightning.data.packing import IGNORED
from koff_lightning.loading import load_tokenizer
from koff_lightning.support.errors import KoffError

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        r".*LeafSpec.*",  # Lightning's use of torch.utils._pytree
        r"Checkpoint directory .* exists and is not empty",  # a resumed run
    )
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder with a tokenizer and three domains of different size."""
    folder = tmp_path_factory.mktemp("text")
    toy_tokenizer(folder / "tokenizer")
    toy_tokenizer(folder / "no_bos", bos=False)
    for seed, (name, count) in enumerate([("a", 60), ("b", 90), ("c", 40)]):
        write_jsonl(folder / f"{name}.jsonl", toy_documents(count, seed=seed))
    return folder


def module_of(text, names="abc", **options):
    options = {"tokenizer": str(text / "tokenizer"), "seq_len": 32, "batch_size": 4, "heldout_fraction": 0.2} | options
    return DomainDataModule({name: str(text / f"{name}.jsonl") for name in names}, **options)


def ready(text, names="abc", **options):
    data = module_of(text, names, **options)
    data.setup("fit")
    return data


class Recorder(LightningModule):
    """Keeps what it is given; fails after `stop_after` batches."""

    def __init__(self, stop_after=None, **hparams):
        super().__init__()
        self.save_hyperparameters(hparams)
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated, self.stop_after = [], [], stop_after

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.stop_after:
            raise ConnectionError("pulled the plug")
        self.seen.append((tuple(batch["domains"]), batch["input_ids"].tolist()))
        return self.weight**2

    def validation_step(self, batch, batch_idx):
        self.validated.append(batch)

    def predict_step(self, batch, batch_idx):
        return batch["num_bytes"].sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer_in(folder, checkpoint=None, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet |= {"limit_val_batches": 0, "enable_checkpointing": checkpoint is not None}
    callbacks = [checkpoint] if checkpoint else []
    return Trainer(default_root_dir=folder, callbacks=callbacks, **quiet | options)


def fit(text, folder, module, *, data_options=None, ckpt_path=None, every=3, **options):
    checkpoint = ModelCheckpoint(folder, save_last=True, every_n_train_steps=every, save_on_train_epoch_end=False)
    trainer = trainer_in(folder, checkpoint, **options)
    trainer.fit(module, datamodule=module_of(text, **(data_options or {})), ckpt_path=ckpt_path)
    return module.seen


# --------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_interrupted_run_sees_the_batches_of_an_uninterrupted_one(text, tmp_path, accumulate, num_workers):
    options = {"max_steps": 8, "accumulate_grad_batches": accumulate, "data_options": {"num_workers": num_workers}}
    whole = fit(text, tmp_path / "whole", Recorder(), **options)
    assert len(whole) == 8 * accumulate
    with pytest.raises(ConnectionError):
        fit(text, tmp_path / "cut", Recorder(stop_after=5 * accumulate), **options)
    rest = fit(text, tmp_path / "cut", Recorder(), ckpt_path=tmp_path / "cut" / "last.ckpt", **options)
    assert rest == whole[3 * accumulate :]


def test_a_finished_run_can_be_made_longer(text, tmp_path):
    whole = fit(text, tmp_path / "whole", Recorder(), max_steps=9)
    fit(text, tmp_path / "short", Recorder(), max_steps=6)
    rest = fit(text, tmp_path / "short", Recorder(), max_steps=9, ckpt_path=tmp_path / "short" / "last.ckpt")
    assert rest == whole[6:]


def test_epochs_go_on_where_the_last_one_stopped(text, tmp_path):
    long_rows = {"data_options": {"seq_len": 256}}
    by_steps = fit(text, tmp_path / "steps", Recorder(), max_steps=80, **long_rows)
    for limit in (None, 7):
        options = {"max_epochs": 2, "limit_train_batches": limit}
        by_epochs = fit(text, tmp_path / f"limit-{limit}", Recorder(), **options, **long_rows)
        one_pass = limit or len(ready(text, seq_len=256).train_dataloader())
        assert len(by_epochs) == 2 * one_pass
        assert by_epochs == by_steps[: 2 * one_pass]


def test_opening_a_loader_leaves_the_global_random_state_alone(text):
    data = ready(text)
    before = torch.get_rng_state()
    next(iter(data.train_dataloader()))
    next(iter(data.val_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_resumed_run_with_other_data_options_is_warned(text):
    state = ready(text, batch_size=4).train_dataloader().state_dict()
    with pytest.warns(UserWarning, match="differs from the checkpoint's in batch_size"):
        ready(text, batch_size=6).train_dataloader().load_state_dict(state)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ready(text, batch_size=4).train_dataloader().load_state_dict(state)
        for part in ("text", "seq_len"):  # which older checkpoints do not say
            del state["order"][part]
        ready(text, batch_size=4).train_dataloader().load_state_dict(state)


def test_batches_of_one_domain(text):
    options = {"batch_size": 4, "one_domain_batches": True}
    drawn = list(islice(ready(text, **options).train_dataloader(), 12))
    assert all(len(set(batch["domains"])) == 1 for batch in drawn)
    assert {batch["domains"][0] for batch in drawn} == set(ready(text).domain_names)
    assert ready(text, **options).batch_number(5)["input_ids"].equal(drawn[5]["input_ids"])
    state = ready(text, batch_size=4).train_dataloader().state_dict()
    with pytest.warns(UserWarning, match="differs from the checkpoint's in .*shares"):
        ready(text, **options).train_dataloader().load_state_dict(state)


def test_a_resumed_run_with_other_text_is_refused(text, tmp_path):
    """Though it has as many rows: the numbers of those that are read already would mean others."""
    lines = (text / "a.jsonl").read_text().splitlines()
    (tmp_path / "a.jsonl").write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    tokenizer = str(text / "tokenizer")
    state = ready(text, "a").train_dataloader().state_dict()
    for folder, options, odd in (
        (text, {"seq_len": 48}, "seq_len is 32 there and 48 here"),
        (text, {"max_train_bytes": 2000}, r"rows\.a is \d+ there and \d+ here"),
        (text, {"tokenizer": str(text / "no_bos")}, r"text\.a is \w+ there and \w+ here"),
        (tmp_path, {"tokenizer": tokenizer}, r"stopped: text\.a is \w+ there and \w+ here\."),
    ):
        other = ready(folder, "a", **options).train_dataloader()
        with pytest.raises(KoffError, match=f"is not the checkpoint's, so it cannot go on .*{odd}"):
            other.load_state_dict(state)


def test_the_loaders_state_survives_a_weights_only_checkpoint(text, tmp_path):
    state = ready(text).train_dataloader().state_dict()
    torch.save(state, tmp_path / "state.pt")
    assert torch.load(tmp_path / "state.pt", weights_only=True) == state


# --------------------------------------------------------------------------------------------------------- batches


def test_training_batches_hold_every_domain_and_follow_weights(text):
    sources = {name: DomainSource(str(text / f"{name}.jsonl"), weight=w) for name, w in (("a", 1), ("b", 1), ("c", 4))}
    data = DomainDataModule(sources, tokenizer=str(text / "tokenizer"), seq_len=32, batch_size=12, heldout_fraction=0.2)
    data.setup("fit")
    for batch in data.train_dataloader():
        assert Counter(batch["domains"]) == {"a": 2, "b": 2, "c": 8}
        assert batch["input_ids"].shape == (12, 32)


def test_small_batches_hold_every_domain_once_per_optimizer_step(text, tmp_path):
    seen = fit(text, tmp_path, Recorder(), max_steps=6, accumulate_grad_batches=4, data_options={"batch_size": 1})
    for step in range(6):
        assert {domain for domains, _ in seen[4 * step : 4 * step + 4] for domain in domains} == set("abc")


def test_the_run_is_as_long_as_max_steps_or_else_one_pass(text, tmp_path):
    data = ready(text)
    one_pass = len(data.train_dataloader())
    rows = sum(len(packed) for packed in data._train.values())
    assert (one_pass - 1) * 4 < rows <= one_pass * 4
    trainer = trainer_in(tmp_path, max_steps=5, accumulate_grad_batches=3)
    trainer.fit(Recorder(), datamodule=data)
    assert len(data.train_dataloader()) == 15


def test_heldout_batches_are_pure_and_hold_every_byte_once(text):
    data = ready(text)
    seen = {name: 0.0 for name in "abc"}
    for batch in data.val_dataloader():
        assert len(set(batch["domains"])) == 1
        seen[batch["domains"][0]] += batch["num_bytes"].sum().item()
    for name, total in seen.items():
        documents = map(json.loads, (text / f"{name}.jsonl").read_text().splitlines())
        assert total == sum(len(d["text"].encode()) for d in documents if is_heldout(d["id"], 0.2))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_heldout_text_without_repeating_any(text, world_size, monkeypatch):
    data = ready(text, batch_size=3)
    whole = [batch["input_ids"].tolist() for batch in data.val_dataloader()]
    loaders = []
    for rank in range(world_size):
        monkeypatch.setattr(DomainDataModule, "_place", lambda self, rank=rank: (rank, world_size))
        loaders.append(list(data.val_dataloader()))
    assert len({len(batches) for batches in loaders}) == 1
    real = [b["input_ids"].tolist() for batches in loaders for b in batches if (b["labels"] != IGNORED).any()]
    assert sorted(real) == sorted(whole)
    blank = [b for batches in loaders for b in batches if not (b["labels"] != IGNORED).any()]
    assert len(blank) == -len(whole) % world_size
    assert all(b["num_bytes"].sum() == 0 and b["document_bytes"].sum() == 0 for b in blank)


def test_validation_test_and_prediction_run_on_the_same_rows(text, tmp_path):
    module, data = Recorder(), module_of(text)
    trainer = trainer_in(tmp_path, limit_val_batches=1.0)
    trainer.validate(module, datamodule=data, verbose=False)
    sizes = trainer.predict(module, datamodule=data)
    assert torch.stack(sizes).sum() == sum(batch["num_bytes"].sum() for batch in module.validated)
    assert len(data.test_dataloader()) == len(sizes)


# --------------------------------------------------------------------------------------------------------- sample_ids


@pytest.mark.parametrize("folder", ["tokenizer", "no_bos"])
def test_sample_ids_are_chunks_from_the_beginnings_of_training_documents(text, folder):
    data = ready(text, tokenizer=str(text / folder))
    ids = data.sample_ids("b", 200)
    assert ids.shape == (200,)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, data.sample_ids("b", 200))
    assert torch.equal(ids, ready(text, tokenizer=str(text / folder)).sample_ids("b", 200))
    assert not torch.equal(ids, data.sample_ids("a", 200))
    bos = data.tokenizer.bos_token_id
    if bos is not None:
        assert ids[0] == bos
        assert (ids == bos).sum() == 1
    decoded = data.tokenizer.decode(ids[int(bos is not None) :])
    stream = data._documents["b"]
    beginnings = [
        data.tokenizer.decode(stream.tokens[s + int(bos is not None) : s + 8].tolist()) for s in stream.starts.tolist()
    ]
    assert sum(beginning in decoded for beginning in beginnings) >= 3


def test_a_short_sample_comes_from_one_document(text):
    data = ready(text)
    assert data.sample_ids("c", 4).tolist() in [
        data._documents["c"].tokens[s : s + 4].tolist() for s in data._documents["c"].starts
    ]


@pytest.mark.parametrize("folder", ["tokenizer", "no_bos"])
def test_a_domain_that_is_one_long_document_gives_places_from_all_over_it(text, tmp_path, folder):
    words = [f"{number:05d}" for number in range(12_000)]  # every place can be told
    write_jsonl(tmp_path / "train.jsonl", [" ".join(words)])
    write_jsonl(tmp_path / "heldout.jsonl", toy_documents(3))
    source = {"files": str(tmp_path / "train.jsonl"), "heldout_files": str(tmp_path / "heldout.jsonl")}
    data = DomainDataModule({"book": source}, tokenizer=str(text / folder), seq_len=32)
    data.setup()
    tokens, bos = data._documents["book"].tokens.tolist(), data.tokenizer.bos_token_id
    ids = data.sample_ids("book", 512).tolist()
    chunks = [ids[n : n + 64] for n in range(0, 512, 64)]
    if bos is not None:
        assert ids.count(bos) == ids[0:1].count(bos) == 1
        chunks[0] = chunks[0][1:]
    string = " " + " ".join(map(str, tokens)) + " "
    places = [string.index(" " + " ".join(map(str, chunk)) + " ") / len(string) for chunk in chunks]
    assert len(set(places)) == 8
    assert min(places) < 0.4 < 0.6 < max(places)
    assert data.sample_ids("book", 32).tolist()[2:] != tokens[2:32], "a single chunk is not the title page"
    assert len(data.sample_ids("book", len(tokens) // 2)) == len(tokens) // 2


def test_a_memory_larger_than_the_text_is_refused(text):
    with pytest.raises(KoffError, match="training text of domain 'c' is too short for a memory of 100000 slots"):
        ready(text).sample_ids("c", 100_000)


# --------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 7}, "data.seq_len must be 8 or more, got 7"),
        ({"batch_size": 0}, "data.batch_size must be 1 or more, got 0"),
        ({"heldout_fraction": 0.0}, "data.heldout_fraction must lie between 0 and 1, got 0.0"),
        ({"heldout_fraction": 1.0}, "data.heldout_fraction must lie between 0 and 1"),
        ({"max_heldout_bytes": 0}, "data.max_heldout_bytes must be 1 or more"),
        ({"max_train_bytes": -5}, "data.max_train_bytes must be 1 or more"),
        ({"on_bad_line": "ignore"}, "data.on_bad_line must be 'fail' or 'skip', got 'ignore'"),
        ({"num_workers": -1}, "data.num_workers must lie between 0 and 1024, got -1"),
        ({"seed": -1}, "data.seed must be 0 or more"),
        ({"names": "a b"}, "domain name ' ' is not safe as a file name"),
    ],
)
def test_bad_options(text, options, message):
    with pytest.raises(KoffError, match=message):
        module_of(text, **options)


def test_documents_too_short_to_predict_anything(text, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [chr(97 + i) for i in range(26)])
    data = DomainDataModule({"x": str(tmp_path / "a.jsonl")}, tokenizer=str(text / "no_bos"), heldout_fraction=0.3)
    with pytest.raises(KoffError, match="domain 'x': no training document is two tokens or longer"):
        data.setup()


def test_without_tokenizer_and_backbone(text):
    with pytest.raises(KoffError, match="data.tokenizer is not set and there is no backbone to take it from"):
        ready(text, tokenizer=None)


def test_the_tokenizer_is_the_backbones_by_default(text, tmp_path):
    data = module_of(text, tokenizer=None)
    trainer_in(tmp_path, max_steps=1).fit(Recorder(backbone=str(text / "no_bos")), datamodule=data)
    assert data.tokenizer.bos_token_id is None


def test_a_family_that_is_not_supported_is_refused_before_text_is_read(text, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.setattr("koff_lightning.data.datamodule.read_domain", pytest.fail)
    for tokenizer in (None, str(text / "tokenizer")):
        with pytest.raises(KoffError, match="is a 'gpt2' model; supported families are"):
            trainer_in(tmp_path, max_steps=1).fit(
                Recorder(backbone=str(tmp_path)), datamodule=module_of(text, tokenizer=tokenizer)
            )


def test_a_tokenizer_larger_than_the_embedding(text):
    tokenizer = load_tokenizer(str(text / "tokenizer"))
    check_vocabulary(tokenizer, 300)
    with pytest.raises(KoffError, match="does not match the backbone: it has ids up to 299, the backbone embeds 299"):
        check_vocabulary(tokenizer, 299)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})  # as a tokenizer_config.json may, so the advice is of it too
    with pytest.raises(KoffError, match=r"so '\[PAD\]' \(300\) has no row.*out of its files"):
        check_vocabulary(tokenizer, 300)


def test_all_bundled_text_with_the_bundled_tokenizer():
    limits = {"max_train_bytes": 60_000, "max_heldout_bytes": 40_000}
    data = DomainDataModule({name: f"bundled:{name}" for name in bundled_domains()}, tokenizer="koff-tiny", **limits)
    data.setup()
    bos = data.tokenizer.bos_token_id
    for name in bundled_domains():
        assert data.sample_ids(name, 16)[0] == bos
        assert (data._train[name].tokens[0, 0], data._heldout[name].tokens[0, 0]) == (bos, bos)
        assert 20_000 < data._heldout[name].num_bytes.sum() <= 40_000
    batch = next(iter(data.train_dataloader()))
    assert sorted(set(batch["domains"])) == bundled_domains()


def test_domains_in_yaml(tmp_path):
    (tmp_path / "run.yaml").write_text(
        "data:\n"
        "  domains:\n"
        "    de: bundled:de\n"
        "    law: [corpora/law/*.jsonl]\n"
        "    code: {files: [a.jsonl], text_field: content, id_field: path, weight: 2.0, heldout_files: b.jsonl}\n"
    )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(DomainDataModule, "data")
    config = parser.parse_args(["--config", str(tmp_path / "run.yaml"), "--data.domains.fr", "bundled:fr"])
    data = parser.instantiate(config).data
    assert data.domain_names == ["de", "law", "code", "fr"]
    assert data.sources["law"] == DomainSource(["corpora/law/*.jsonl"])
    assert data.sources["code"] == DomainSource(["a.jsonl"], "content", "path", 2.0, heldout_files="b.jsonl")
    assert "Tokens per row" in parser.format_help()
