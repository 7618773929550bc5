"""The stored teacher: `koff prepare --teacher`, and training from what it has written."""

import errno
import fcntl
import json
import os
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_models import tiny_model
from tiny_run import RandomText
from toy_text import toy_documents, toy_tokenizer, write_jsonl

from koff_lightning import DomainDataModule, KoffError, KOFFModule, KVSpec, LoraSpec, LossSpec, SparsitySpec
from koff_lightning.backbone import hidden_states
from koff_lightning.callbacks import AnnealSparsity
from koff_lightning.cli import main
from koff_lightning.commands import prepare as command
from koff_lightning.data import teacher
from koff_lightning.data.encoding import TokenStream
from koff_lightning.data.loader import TrainLoader
from koff_lightning.data.mixture import DomainBatches
from koff_lightning.data.packing import collate, pack
from koff_lightning.data.teacher import INDEX, LOG_Q, Belongs, TeacherStore, index_type, rows_hash, stored_bytes
from koff_lightning.decomposition import Decomposition
from koff_lightning.loading import fingerprint, load_backbone
from koff_lightning.losses import TopK

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")

DOMAINS = ("en", "law")
K, LENGTH, VOCABULARY = 12, 16, 310  # the tokenizer has 300
# A pad token has an embedding of zeros, behind which all tokens are alike: it must be none of the text's.
SIZES = {
    "pad_token_id": VOCABULARY - 1,
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "head_dim": 8,
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KOFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama with a tokenizer, and text of two domains whose documents share rows."""
    path = tmp_path_factory.mktemp("backbone")
    toy_tokenizer(path / "model")
    tiny_model("llama", **SIZES).save_pretrained(path / "model")
    for i, domain in enumerate(DOMAINS):
        write_jsonl(path / f"{domain}.jsonl", toy_documents(30, seed=i, longest=30))
    return path


def words(folder, **options):
    """Options of the command: the backbone, the text, a divergence over the likeliest tokens."""
    options = {"model.loss.top_k": K, "model.loss.ce": 0, "model.backbone": folder / "model"} | options
    options = {"data.seq_len": LENGTH, "data.heldout_fraction": 0.2, "data.batch_size": 4} | options
    domains = {f"data.domains.{domain}": folder / f"{domain}.jsonl" for domain in DOMAINS}
    return [f"--{name}={value}" for name, value in (domains | options).items()]


def prepared(folder, **options):
    assert main(["prepare", *words(folder, **options), "--teacher"]) == 0


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """A cache with the tokenised text and its stored teacher."""
    cache = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KOFF_CACHE", str(cache))
        prepared(folder)
    return cache


@pytest.fixture
def store(made, tmp_path):
    """A copy of it where this test's runs look."""
    shutil.copytree(made, tmp_path / "cache")


def text(folder, **options):
    defaults = {"seq_len": LENGTH, "batch_size": 4, "heldout_fraction": 0.2}
    return DomainDataModule({d: str(folder / f"{d}.jsonl") for d in DOMAINS}, **defaults | options)


def module(folder, loss, target=0.0, **options):
    torch.manual_seed(0)
    sparsity = SparsitySpec(target=target, min_channels=4)
    parts = {"lora": LoraSpec(rank=2), "kv": KVSpec(slots=4), "sparsity": sparsity}
    return KOFFModule(str(folder / "model"), domains=list(DOMAINS), loss=loss, **parts | options)


class Losses(Callback):
    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, *_):
        logged = trainer.callback_metrics.items()
        self.steps.append({name: float(value) for name, value in logged if name.startswith("train/")})


def fit(folder, loss, steps=10, callbacks=(), resume=None, data=None, **options):
    """A run; returns its module and what was logged."""
    seen, model = Losses(), module(folder, loss, **options)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        callbacks=[seen, AnnealSparsity(0.2, 0.3, 0.1), *callbacks],
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, data or text(folder), ckpt_path=resume, weights_only=True)
    return model, seen.steps


def stored(**options):
    return LossSpec(**{"ce": 0.0, "top_k": K, "teacher": "stored"} | options)


def live(**options):
    return LossSpec(**{"ce": 0.0, "top_k": K} | options)


# ------------------------------------------------------------------------------------------------ the same losses


@pytest.mark.parametrize(
    ("ce", "tail", "k"), [(0.0, "drop", K), (0.0, "drop", 5), (0.0, "bucket", K), (0.5, "drop", K), (0.5, "bucket", 5)]
)
def test_a_stored_teacher_gives_the_losses_of_a_live_one(folder, store, monkeypatch, ce, tail, k):
    """Shuffled rows of several documents and the padded last ones; three passes."""
    _, expected = fit(folder, live(ce=ce, tail=tail, top_k=k), steps=30)
    monkeypatch.setattr(Decomposition, "dense_hidden", lambda *_: pytest.fail("a teacher pass that nobody needs"))
    _, found = fit(folder, stored(ce=ce, tail=tail, top_k=k), steps=30)
    assert [step["train/kl"] > 0 for step in found] == [step["train/kl"] > 0 for step in expected]
    for name in ("train/loss", "train/kl"):
        assert [step[name] for step in found] == pytest.approx([step[name] for step in expected], rel=2e-3, abs=1e-6)


class Compare(Callback):
    """In the middle of the ramp: loss and gradients of mask and slots, with the stored teacher and with a live one."""

    def __init__(self):
        self.found = {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step != 4:
            return
        assert pl_module.learns_now
        before, log = pl_module.objective, pl_module.log_dict
        pl_module.log_dict = lambda *_, **__: None
        for spec in (stored(), live()):
            pl_module.objective = type(before)(pl_module.model, spec)
            for number in (0, 5):
                pl_module.zero_grad()
                loss = pl_module.training_step(trainer.datamodule.batch_number(number), 0)
                loss.backward()
                logits = pl_module.model.gates.logits.grad.clone()
                slots = [p.grad.flatten() for p in pl_module.model.memories.kv_parameters() if p.grad is not None]
                self.found[spec.teacher, number] = loss.detach(), logits, torch.cat(slots)
        pl_module.objective, pl_module.log_dict = before, log
        pl_module.zero_grad()


def test_loss_and_gradients_are_those_of_a_live_teacher_while_a_mask_is_learned(folder, store):
    compare = Compare()
    fit(folder, stored(), callbacks=[compare], target=0.2)
    for number in (0, 5):
        for one, other in zip(compare.found["stored", number], compare.found["live", number], strict=True):
            torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3 * float(other.abs().max()))
            assert other.any()


def test_a_run_that_goes_on_is_the_one_that_was_not_cut(folder, store, tmp_path):
    savers = [ModelCheckpoint(tmp_path / name, "{step}", save_top_k=-1, every_n_train_steps=4) for name in "ab"]
    model, whole = fit(folder, stored(), callbacks=savers[:1], target=0.2)
    again, rest = fit(folder, stored(), callbacks=savers[1:], resume=tmp_path / "a" / "step=4.ckpt", target=0.2)
    assert rest == whole[4:]
    for name in model.owned():
        assert torch.equal(model.state_dict()[name], again.state_dict()[name])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_batch_of_every_rank_brings_its_own_rows_teacher(folder, store, workers):
    backbone, data = load_backbone(str(folder / "model")), text(folder, tokenizer=str(folder / "model"))
    data.setup()
    data.take_stored_teacher(fingerprint(backbone), K)
    rows = {name: len(packed) for name, packed in data._train.items()}
    for rank in range(2):
        order = DomainBatches(rows, data.shares, 4, rank=rank, world_size=2)
        for batch in TrainLoader(data._train, order, 12, workers, data._teachers):  # more than a pass
            places = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
            with torch.no_grad():
                log_q = backbone.lm_head(hidden_states(backbone, **places)).log_softmax(-1)[:, :-1]
            expected, _ = log_q.topk(K)
            torch.testing.assert_close(batch[LOG_Q].float(), expected, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(log_q.gather(2, batch[INDEX].long()), expected, rtol=1e-3, atol=1e-3)


# ----------------------------------------------------------------------------------------------------- the store


def stores(tmp_path):
    return sorted((tmp_path / "cache" / "tokens" / "teacher").glob("*/entry.json"))


@pytest.mark.parametrize(("size", "bytes_each"), [(256, 1), (257, 2), (65536, 2), (65537, 4), (151936, 4)])
def test_tokens_are_the_smallest_integers_that_hold_the_vocabulary(size, bytes_each):
    assert index_type(size).itemsize == bytes_each
    stream = TokenStream(np.zeros(100, np.int32), np.array([100]), np.array([100]))
    assert stored_bytes(pack(stream, 10, overlap=False), 7, size) == 10 * 9 * 7 * (bytes_each + 2)


def test_the_size_is_said_before_and_is_what_is_written(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "_likeliest", _noting(capsys, said := []))
    prepared(folder)
    line = next(line for line in said[0].splitlines() if line.startswith("teacher: "))
    rows = sum(json.loads((file.parent / "about.json").read_text())["rows"] for file in stores(tmp_path))
    assert line.startswith(f"teacher: {rows} rows x {LENGTH - 1} tokens x {K} likeliest x 4 bytes -> ")
    written = sum(file.stat().st_size for store in stores(tmp_path) for file in store.parent.glob("*.bin"))
    assert written == rows * (LENGTH - 1) * K * 4
    assert f"-> {written / 1e9:.3g} GB in {tmp_path / 'cache' / 'tokens' / 'teacher'}" in line


def _noting(capsys, said):
    ask = command._likeliest

    def noted(*args):
        said.append(capsys.readouterr().out)
        return ask(*args)

    return noted


def in_fork(do):
    """Run something in a process of its own; returns its id."""
    if child := os.fork():
        return child
    try:
        os._exit(do() or 0)
    finally:
        os._exit(99)


def contents(tmp_path):
    return {
        file.parent.name: [(file.parent / name).read_bytes() for name in ("index.bin", "log_q.bin")]
        for file in stores(tmp_path)
    }


def test_a_killed_writer_is_gone_on_with(folder, tmp_path, monkeypatch):
    prepared(folder)
    whole = contents(tmp_path)
    for store in stores(tmp_path):
        for file in store.parent.iterdir():
            file.unlink()
        store.parent.rmdir()
    monkeypatch.setattr(teacher, "SAVED", 0.0)
    original, asked = command._likeliest, []

    def killed_at_the_third(*args):
        asked.append(1)
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(command, "_likeliest", killed_at_the_third)
        status = os.waitpid(in_fork(lambda: main(["prepare", *words(folder), "--teacher"])), 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert stores(tmp_path) == [], "half of it is there, and nobody sees it"
    (part,) = (tmp_path / "cache" / "tokens" / "teacher").glob(".*.part")
    with (part / "log_q.bin").open("ab") as file:
        file.write(b"a row that was half written")
    asked.clear()
    monkeypatch.setattr(command, "_likeliest", lambda *args: (asked.append(1), original(*args))[1])
    prepared(folder)
    assert contents(tmp_path) == whole
    batches = [-(-json.loads((store.parent / "about.json").read_text())["rows"] // 4) for store in stores(tmp_path)]
    assert len(asked) == sum(batches) - 2
    assert not list((tmp_path / "cache" / "tokens" / "teacher").glob(".*.part"))


def stored_by(writers, folder, tmp_path, monkeypatch, meanwhile):
    """The (domain, process) of what so many processes at one time have stored; `meanwhile` happens in each batch."""
    asked, original = tmp_path / "asked", command._likeliest
    asked.mkdir()

    def watched(backbone, batch, *rest):
        (asked / f"{batch['domains'][0]}-{os.getpid()}").touch()
        meanwhile(asked)
        return original(backbone, batch, *rest)

    monkeypatch.setattr(command, "_likeliest", watched)
    forks = [in_fork(lambda: main(["prepare", *words(folder), "--teacher"])) for _ in range(writers)]
    assert [os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1]) for fork in forks] == [0] * writers
    assert len(stores(tmp_path)) == 2
    return sorted(tuple(path.name.split("-")) for path in asked.iterdir())


def test_writers_of_the_same_store_wait_for_each_other(folder, tmp_path, monkeypatch):
    found = stored_by(3, folder, tmp_path, monkeypatch, lambda _: time.sleep(0.02))
    assert [domain for domain, _ in found] == ["en", "law"], "each by one of them"


def test_two_writers_store_different_domains_at_one_time(folder, tmp_path, monkeypatch):
    def until_both_are_at_it(asked):
        since = time.monotonic()
        while len(list(asked.iterdir())) < 2 and time.monotonic() < since + 60:
            time.sleep(0.01)

    (en, one), (law, other) = stored_by(2, folder, tmp_path, monkeypatch, until_both_are_at_it)
    assert (en, law) == ("en", "law") and one != other


def test_each_of_several_processes_begins_with_another_domain_and_the_first_speaks(folder, monkeypatch, capsys):
    order, original = [], command._likeliest

    def note(backbone, batch, *rest):
        order.append(batch["domains"][0])
        return original(backbone, batch, *rest)

    monkeypatch.setattr(command, "_likeliest", note)
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    prepared(folder)
    assert list(dict.fromkeys(order)) == ["law", "en"]
    assert "likeliest x" not in (said := capsys.readouterr().out) and said.count("stored") == 2
    prepared(folder)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("number", [0, 1])
def test_without_locks_processes_that_were_started_together_never_store_the_same(folder, tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", flock)
    started = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": str(number), "LOCAL_RANK": str(number)}
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    prepared(folder)
    about = [json.loads(store.with_name("about.json").read_text()) for store in stores(tmp_path)]
    assert [one["domain"] for one in about] == [DOMAINS[number]]
    assert not list(tmp_path.rglob(f".*{os.getpid()}.lock"))


def test_preparing_again_finds_one_wrong_byte_and_makes_it_anew(folder, tmp_path, capsys):
    prepared(folder)
    whole = contents(tmp_path)
    file = stores(tmp_path)[0].parent / "log_q.bin"
    file.write_bytes(b"\x01" + file.read_bytes()[1:])
    capsys.readouterr()
    prepared(folder)
    said = capsys.readouterr().out
    assert (said.count(": stored"), said.count(": is there already")) == (1, 3)  # two domains tokenised, one stored
    assert contents(tmp_path) == whole


def rows_of(predicted=None):
    """Ten rows of ten tokens, all different; with `predicted` False at rows 2 and 3, those are never in a batch."""
    flags = {} if predicted is None else {"predicted": predicted}
    stream = TokenStream(np.arange(100, dtype=np.int32), np.array([100]), np.array([100]), **flags)
    return pack(stream, 10, overlap=False)


def own_tokens(batch):
    """A teacher that finds each place's own token likeliest."""
    index = batch["input_ids"][:, :-1].flatten()[:, None]
    return TopK(index, torch.zeros(index.shape))


def belonging(rows):
    return Belongs("weights", "tokenizer", 10, rows_hash(rows))


def test_rows_of_talks_that_predict_nothing_are_not_stored_and_move_no_others(tmp_path):
    """Chat `all` and `answers` of the same talks: the same tokens, but other rows come into batches."""
    answers = np.ones(100, bool)
    answers[20:40] = False
    every, some, store = rows_of(), rows_of(answers), TeacherStore(tmp_path)
    assert (len(every), len(some)) == (10, 8)
    store.build("a", belonging(every), every, own_tokens, 1, 300, 4)
    with pytest.raises(KoffError, match="is of other text"):
        store.load("a", belonging(some), 1)
    store.build("a", belonging(some), some, own_tokens, 1, 300, 4)
    for rows in (every, some):
        found = store.load("a", belonging(rows), 1)
        for number in range(len(rows)):
            own = collate([("a", rows, number)])["input_ids"][0, :-1]
            assert found.index[number, :, 0].tolist() == own.tolist()
    assert stored_bytes(some, 7, 300) == 8 * 9 * 7 * 4


@pytest.mark.parametrize("where", ["hash_file", "flush"])
def test_a_writer_that_is_killed_at_the_very_end_has_lost_nothing(tmp_path, monkeypatch, where):
    rows, asked = rows_of(), []

    def killed(*_):
        raise SystemExit

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(teacher, where, killed)
        TeacherStore(tmp_path).build("a", belonging(rows), rows, own_tokens, 1, 300, 4)
    TeacherStore(tmp_path).build("a", belonging(rows), rows, lambda batch: asked.append(batch), 1, 300, 4)
    assert asked == []
    assert TeacherStore(tmp_path).load("a", belonging(rows), 1).index[3, :, 0].tolist() == list(range(30, 39))


def test_a_store_that_was_cut_is_one_line(folder, store, tmp_path):
    file = stores(tmp_path)[0].parent / "index.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(KoffError, match=r"the stored teacher in .* is damaged \(index.bin is not as it was written\)"):
        fit(folder, stored())


def test_too_little_memory_for_the_dense_pass_is_one_line(folder, monkeypatch, capsys):
    def full(*_, **__):
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr("koff_lightning.commands.prepare.hidden_states", full)
    assert main(["prepare", *words(folder), "--teacher"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("koff: not enough memory: CUDA error: out of memory. Take a smaller data.batch_size")


def test_a_full_disk_is_one_line_and_leaves_no_store(folder, tmp_path, capsys, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(teacher.os, "fsync", full)
    assert main(["prepare", *words(folder), "--teacher"]) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert stores(tmp_path) == []


# ----------------------------------------------------------------------------------------------------- bad input


def test_no_store_names_the_command_that_makes_one(folder):
    with pytest.raises(KoffError, match=r"no stored teacher of domain 'en' in .*: `koff prepare --teacher` with the"):
        fit(folder, stored())


def test_no_store_is_told_after_a_validation_too(folder):
    data, run = text(folder), Trainer(accelerator="cpu", limit_val_batches=1, max_steps=1, logger=False)
    run.validate(model := module(folder, stored()), data, verbose=False)
    with pytest.raises(KoffError, match="no stored teacher of domain 'en'"):
        run.fit(model, data)


def test_a_store_of_something_else_says_of_what(folder, store, tmp_path):
    for name, (where, options, k, message) in {
        "length": (folder, {"seq_len": 24}, K, "of rows of another length: data.seq_len is 16 there and 24 here"),
        "text": (folder, {"max_train_bytes": 900}, K, r"is of other text: .* \(\w{12} there, \w{12} here\)"),
        "k": (folder, {}, K + 1, f"holds the {K} likeliest tokens, and loss.top_k asks for {K + 1}"),
        "weights": (another(folder, tmp_path, "weights"), {}, K, r"is of another backbone: .* \(weights \w{12} there"),
        "tokenizer": (another(folder, tmp_path, "tokenizer"), {}, K, r"is of another tokenizer \(\w{12} there, "),
    }.items():
        with pytest.raises(KoffError, match=f"the stored teacher of domain 'en' .*{message}.*koff prepare --teacher"):
            fit(where, stored(top_k=k), data=text(folder, **options))
            pytest.fail(name)


def another(folder, tmp_path, what):
    """The folder with other weights, or with another tokenizer."""
    path = tmp_path / what
    toy_tokenizer(path / "model", bos=what != "tokenizer")
    model = load_backbone(str(folder / "model"))
    if what == "weights":
        with torch.no_grad():
            model.lm_head.weight[0, 0] += 1
    model.save_pretrained(path / "model")
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model.loss.top_k": VOCABULARY + 1}, f"loss.top_k is {VOCABULARY + 1}, but the vocabulary has {VOCABULARY}"),
        ({"model.loss.top_k": "null"}, r"--teacher stores the dense model's likeliest tokens: set --model.loss.top_k"),
        ({"data.streaming": "true", "data.max_heldout_bytes": 900}, "data.streaming tokenises while training"),
        ({"prefetch_only": "true"}, "--prefetch-only fetches, --teacher computes: give one after the other"),
        ({"model.artifact": "."}, "an artifact holds no dense model to learn from"),
    ],
)
def test_what_cannot_be_stored_is_one_line(folder, capsys, options, message):
    assert main(["prepare", *words(folder, **options), "--teacher"]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_top_k_beyond_the_vocabulary_is_told_before_the_first_step(folder):
    with pytest.raises(KoffError, match=f"loss.top_k is {VOCABULARY + 1}, but the vocabulary has {VOCABULARY} tokens"):
        module(folder, live(top_k=VOCABULARY + 1)).configure_model()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": None}, r"set loss.top_k \(100 in the paper\) and a loss.kl above 0; got None and 2.0"),
        ({"ce": 1.0, "kl": 0.0}, f"loss.kl above 0; got {K} and 0.0"),
        ({"teacher": "saved"}, "loss.teacher must be live or stored; got 'saved'"),
    ],
)
def test_options_that_contradict_each_other(options, message):
    with pytest.raises(KoffError, match=message):
        stored(**options)


def test_streamed_rows_have_no_stored_teacher(folder):
    with pytest.raises(KoffError, match="data.streaming makes its rows while training: set loss.teacher to live"):
        fit(folder, stored(), data=text(folder, streaming=True, max_heldout_bytes=600))


def test_other_datamodules_bring_none(folder):
    with pytest.raises(KoffError, match="loss.teacher: stored comes with the rows of DomainDataModule"):
        fit(folder, stored(), data=RandomText())
