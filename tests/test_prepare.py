"""`koff prepare`, the cache of tokenised text, and --offline: real commands, concurrent builders, what is missing."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from toy_text import toy_documents, toy_tokenizer, write_jsonl

from koff_lightning.artifact.checkpoint import read_checkpoint
from koff_lightning.cli import main
from koff_lightning.commands import needs
from koff_lightning.data import DomainDataModule, DomainSource, cache, encoding, hub_copy, shards
from koff_lightning.data import datamodule as module
from koff_lightning.data.cache import DomainRows
from koff_lightning.data.encoding import TokenStream
from koff_lightning.data.packing import pack
from koff_lightning.data.readers import Fields
from koff_lightning.support import offline
from koff_lightning.support.errors import KoffError
from koff_lightning.training.checkpoints import newest_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("KOFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # its threads would not outlive a fork


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    toy_tokenizer(folder / "tokenizer")
    for seed, name in enumerate("ab"):
        write_jsonl(folder / f"{name}.jsonl", toy_documents(60, seed=seed))
    return folder


def data_of(text, **options):
    defaults = {"tokenizer": str(text / "tokenizer"), "seq_len": 32, "batch_size": 4, "heldout_fraction": 0.2}
    return DomainDataModule({name: str(text / f"{name}.jsonl") for name in "ab"}, **defaults | options)


def prepared(text, **options):
    data = data_of(text, **options)
    return data.prepare(data._load_tokenizer())


def batches(data):
    data.setup()
    return [
        {key: value.tolist() if key != "domains" else value for key, value in batch.items()}
        for loader in (data.train_dataloader(), data.val_dataloader())
        for batch in loader
    ]


def test_prepared_text_gives_the_same_batches_and_no_file_is_read(text, monkeypatch):
    plain = data_of(text)
    expected, ids = batches(plain), plain.sample_ids("a", 50).tolist()
    assert prepared(text) == {"a": True, "b": True}
    assert prepared(text) == {"a": False, "b": False}
    monkeypatch.setattr(module, "read_domain", lambda *_, **__: pytest.fail("read again"))
    data = data_of(text)
    assert batches(data) == expected
    assert data.sample_ids("a", 50).tolist() == ids


def test_rows_stay_on_the_disk(tmp_path):
    """64 MB of tokens and 16 MB of boundaries: a run that reads a few batches of them hardly grows."""

    def much():
        length = 16 * 2**20
        sizes = np.full(length // 2**10, 2**10)
        stream = TokenStream(np.zeros(length, np.int32), sizes, 3 * sizes)
        return DomainRows(*(pack(stream, 256, overlap=False) for _ in "12"), documents=stream)

    data = DomainDataModule({"x": "bundled:de"}, "koff-tiny", batch_size=4)
    data.tokenizer = data._load_tokenizer()
    assert data.cache.build(data._key(data.sources["x"]), much)
    before = own_memory()
    data.setup()
    batches = iter(data.train_dataloader())
    for _ in range(5):
        assert next(batches)["input_ids"].shape == (4, 256)
    assert own_memory() - before < 12 * 2**20


def own_memory():
    """Bytes that belong to this process alone and to no file."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("only Linux tells")
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("RssAnon"))


def test_a_run_from_the_cache_is_the_run_without(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["--data.domains.de=bundled:de", "--data.domains.python=bundled:python", "--data.seq_len=64"]
    words += ["--data.batch_size=4", "--data.max_train_bytes=20000", "--data.max_heldout_bytes=1500"]
    often = ["--trainer.accelerator=cpu", "--trainer.max_steps=3", "--trainer.log_every_n_steps=1"]
    often += ["--trainer.enable_progress_bar=false", "--export.enabled=false", "--model.backbone=koff-tiny"]
    assert main(["fit", *words, *often, "--trainer.default_root_dir=plain"]) == 0
    assert main(["prepare", *words, "--model.backbone=koff-tiny"]) == 0
    assert "de: tokenised" in capsys.readouterr().out
    monkeypatch.setattr(module, "read_domain", lambda *_, **__: pytest.fail("read again"))
    assert main(["fit", *words, *often, "--trainer.default_root_dir=cached"]) == 0
    plain, cached = (read_checkpoint(newest_checkpoint([root]))["state_dict"] for root in ("plain", "cached"))
    assert plain.keys() == cached.keys()
    assert all(torch.equal(value, cached[name]) for name, value in plain.items())
    results = [Path(root, "documents.json").read_text() for root in ("plain", "cached")]
    assert results[0] == results[1]


def test_whatever_the_rows_depend_on_is_part_of_the_key(text, tmp_path):
    data = data_of(text)
    data.tokenizer = data._load_tokenizer()
    keys = {data._key(data.sources["a"]), data._key(data.sources["b"])}
    others = [{"seq_len": 48}, {"heldout_fraction": 0.3}, {"max_train_bytes": 2000}, {"max_heldout_bytes": 900}]
    others += [{"on_bad_line": "skip"}, {"tokenizer": toy_tokenizer(tmp_path / "no_bos", bos=False)}]
    for options in others:
        other = data_of(text, **options)
        other.tokenizer = other._load_tokenizer()
        keys.add(other._key(other.sources["a"]))
    path = str(text / "a.jsonl")
    sources = [DomainSource(path, text_field="id"), DomainSource(path, id_field="x"), DomainSource([path, "hub:c"])]
    sources += [DomainSource(path, heldout_files=str(text / "b.jsonl")), DomainSource([path, "bundled:de"])]
    keys |= {data._key(source) for source in sources}
    assert len(keys) == 2 + len(others) + len(sources)
    assert data._key(DomainSource(path, weight=3.0)) in keys
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes((text / "a.jsonl").read_bytes())
    assert data._key(DomainSource(str(moved))) in keys
    for name in ("moved.txt", "moved.csv", "moved.jsonl.zst"):  # the same bytes, read in another way
        keys.add(data._key(DomainSource(str(moved.rename(tmp_path / name)))))
        moved = tmp_path / name
    assert len(keys) == 2 + len(others) + len(sources) + 3


def test_a_changed_file_is_noticed(text, tmp_path):
    file = write_jsonl(tmp_path / "a.jsonl", toy_documents(40))
    data = DomainDataModule({"a": str(file)}, str(text / "tokenizer"), 32, 4, 0.2)
    data.prepare(data._load_tokenizer())
    assert data._key(data.sources["a"]) == data._key(data.sources["a"])
    assert data.stored(data.sources["a"])
    write_jsonl(file, toy_documents(40, seed=9))
    os.utime(file, ns=(1, 1))
    assert data.stored(data.sources["a"]) is None


@pytest.mark.parametrize("fault", ["cut", "gone", "unlisted", "mislisted", "list gone"])
def test_a_damaged_entry_says_so_and_is_made_anew(text, fault):
    prepared(text)
    data = data_of(text)
    for file in data.cache.folder.glob("*/entry.json" if "list" in fault else "*/train/tokens.npy"):
        content = b'{"lengths.npy": 5}' if fault == "mislisted" else file.read_bytes()[:200]
        file.unlink() if "gone" in fault else file.write_bytes(content)
    with pytest.raises(KoffError, match=r"tokenised text in .* is damaged \(.*: `koff prepare` .* makes it anew"):
        data.setup()
    assert prepared(text) == {"a": True, "b": True}
    data_of(text).setup()


def test_preparing_again_finds_one_wrong_byte(text):
    prepared(text)
    file = next(data_of(text).cache.folder.glob("*/train/tokens.npy"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert sorted(prepared(text).values()) == [False, True]


def test_damaged_notes_of_digests_are_made_anew(text):
    prepared(text)
    notes = data_of(text).cache.folder / "digests.json"
    notes.write_text(json.dumps({name: seen[:2] for name, seen in json.loads(notes.read_text()).items()}))
    assert prepared(text) == {"a": False, "b": False}


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_will_do(text, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert prepared(text) == {"a": True, "b": True}


def test_streamed_text_is_not_prepared(text):
    with pytest.raises(KoffError, match=r"data\.streaming tokenises while training: there is nothing to prepare"):
        prepared(text, streaming=True, max_heldout_bytes=900)


def in_fork(do):
    """Run something in a process of its own; returns its id."""
    if child := os.fork():
        return child
    try:
        os._exit(do())
    finally:
        os._exit(99)


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_builders_of_the_same_entry_wait_for_each_other(text, tmp_path, monkeypatch):
    """Four processes at once; each entry is made by exactly one of them."""
    made, original = tmp_path / "made", module.domain_rows
    made.mkdir()

    def slowly(name, *args, **options):
        (made / f"{name}-{os.getpid()}").touch()
        time.sleep(0.2)
        return original(name, *args, **options)

    monkeypatch.setattr(module, "domain_rows", slowly)
    builders = [in_fork(lambda: list(prepared(text).values()).count(True)) for _ in range(4)]
    assert sum(ended(builder) for builder in builders) == 2, "entries made by all of them together"
    assert sorted(path.name[0] for path in made.iterdir()) == ["a", "b"]
    assert not list((tmp_path / "cache" / "tokens").glob(".*.part"))
    assert prepared(text) == {"a": False, "b": False}


def test_what_a_killed_builder_leaves_is_no_entry_and_no_lock(text, tmp_path, monkeypatch):
    begun, original = tmp_path / "begun", np.save

    def stop_at_the_third(path, value):
        if Path(path).name == "first_segment.npy":
            begun.touch()
            time.sleep(60)
        original(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", stop_at_the_third)
        builder = in_fork(lambda: len(prepared(text)))
        while not begun.exists():
            time.sleep(0.01)
        data = data_of(text)
        data.tokenizer = data._load_tokenizer()
        assert data.stored(data.sources["a"]) is None, "half of it is there, and nobody sees it"
        os.kill(builder, signal.SIGKILL)
        assert ended(builder) == -signal.SIGKILL
    folder = tmp_path / "cache" / "tokens"
    assert list(folder.glob(".*.part/train/tokens.npy"))
    assert prepared(text) == {"a": True, "b": True}
    assert not list(folder.glob(".*.part"))


def test_a_full_disk_leaves_no_entry(text, monkeypatch):
    monkeypatch.setattr(np, "save", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(KoffError, match=r"cannot write .*: No space left on device"):
        prepared(text)
    data = data_of(text)
    data.tokenizer = data._load_tokenizer()
    assert data.stored(data.sources["a"]) is None


def test_a_limit_of_the_disk_is_one_line(text, tmp_path, capsys):
    """As near to a full disk as a test comes: files may not grow beyond 4 kB."""

    def small():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        return main(["prepare", "--data.domains.a=bundled:de", "--model.backbone=koff-tiny"])

    assert ended(in_fork(small)) == 2
    (tmp_path / "file").touch()
    words = [f"--data.domains.a={text}/a.jsonl", "--data.heldout_fraction=0.2", "--model.backbone=koff-tiny"]
    assert main(["prepare", *words, "--out", str(tmp_path / "file" / "in")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"koff: cannot write {tmp_path}/file/in: Not a directory"


def test_a_cache_that_cannot_be_written_serves_what_it_holds(text, tmp_path, monkeypatch):
    assert prepared(text) == {"a": True, "b": True}
    monkeypatch.setattr(cache, "alone_with", lambda *_: pytest.fail("a lock needs a writable folder"))
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "no")))
    assert prepared(text) == {"a": False, "b": False}
    (tmp_path / "cache" / "tokens" / "digests.json").unlink()
    data_of(text).setup()


def test_an_entry_is_of_the_code_and_the_libraries_that_made_it(text, tmp_path, monkeypatch):
    """Clones of one release share the cache, and so do environments."""
    data = data_of(text)
    found = [data.cache.key(data.sources["a"]) for _ in range(2)]
    with monkeypatch.context() as patch:
        patch.setattr(encoding.tokenizers, "__version__", "0")
        found.append(data.cache.key(data.sources["a"]))
    monkeypatch.setattr(encoding, "CODE", shutil.copytree(encoding.CODE, tmp_path / "clone"))
    found.append(data.cache.key(data.sources["a"]))
    (tmp_path / "clone" / "packing.py").write_text("# packs otherwise", encoding="utf-8")
    found.append(data.cache.key(data.sources["a"]))
    same, again, of_other_libraries, of_the_same_code, of_other_code = found
    assert same == again == of_the_same_code and len({same, of_other_libraries, of_other_code}) == 3


def test_a_file_that_cannot_be_read_is_one_line(text, tmp_path):
    data = DomainDataModule({"a": str(write_jsonl(tmp_path / "a.jsonl", toy_documents(40)))}, str(text / "tokenizer"))
    data.cache.folder.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KoffError, match=r"cannot read .*a\.jsonl: no right"):
        patch.setattr(cache, "hash_file", lambda _: (_ for _ in ()).throw(PermissionError(13, "no right")))
        data.cache.key(data.sources["a"])


# ------------------------------------------------------------------------------------------------- offline, prefetch


def test_offline_lists_all_that_is_missing_within_seconds(tmp_path):
    """As a process of its own: the switches must be set before anything is imported."""
    env = {k: v for k, v in os.environ.items() if "OFFLINE" not in k} | {
        "HF_HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    argv = [sys.executable, "-m", "koff_lightning", "fit", "--config", "llama_12pct.yaml", "--offline"]
    argv += ["--data.domains.hub=hub:HuggingFaceFW/fineweb-2"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 30  # of the processor: tests share it
    assert "trying again" not in done.stderr
    assert "9 thing(s) that are needed are missing" in done.stderr
    for what in (
        "model meta-llama/Llama-3.2-3B: ",
        "domain law: no file matches",
        "domain hub: cannot read hub:",
    ):
        assert f"\n  {what}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_offline_sets_every_switch(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    assert not offline.is_asked()
    offline.switch_off()
    assert offline.is_asked()
    assert {os.environ[name] for name in offline.SWITCHES} == {"1"}


def test_offline_finds_what_is_there(text, monkeypatch, capsys):
    monkeypatch.setenv(offline.ASKED, "1")
    words = ["--data.seq_len=32", "--data.heldout_fraction=0.2", "--model.backbone=koff-tiny"]
    assert main(["prepare", *words, f"--data.domains.a={text}/a.jsonl"]) == 0
    assert "a: tokenised" in capsys.readouterr().out
    assert main(["prepare", *words, f"--data.domains.a={text}/gone.jsonl"]) == 2
    assert "1 thing(s) that are needed are missing" in capsys.readouterr().err
    asked = '[{"task": "koff_clozze", "domain": "a"}]'
    assert main(["prepare", *words, f"--data.domains.a={text}/a.jsonl", f"--lm_eval.tasks={asked}"]) == 2
    assert "has no task 'koff_clozze'. Did you mean 'koff_cloze'" in (said := capsys.readouterr().err)
    assert "missing" not in said, "no fetch would help"
    assert main(["prepare", *words, f"--data.domains.a={text}/a.jsonl", "--prefetch-only"]) == 2
    assert "--prefetch-only fetches, --offline forbids it" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["configs"], ["--help"], ["generate", "--help"]])
def test_every_verb_takes_offline(argv, monkeypatch, capsys):
    switched = []
    monkeypatch.setattr("koff_lightning.cli.switch_off", lambda: switched.append(1))
    assert main([*argv, "--offline"]) == 0
    assert switched


def test_tools_without_network_say_what_is_missing(monkeypatch, capsys):
    monkeypatch.setenv(offline.ASKED, "1")
    monkeypatch.setattr(needs, "load_config", lambda *_, **__: (_ for _ in ()).throw(KoffError("no copy is cached")))
    monkeypatch.setattr(needs, "load_tasks", lambda names, _: (_ for _ in ()).throw(KoffError("no data here")))
    assert main(["lm-eval", "--model", "some/model", "--tasks", "koff_cloze,koff_bpb"]) == 2
    missing = ["model some/model: no copy is cached", "task koff_cloze: no data here", "task koff_bpb: no data here"]
    assert capsys.readouterr().err.splitlines()[1:4] == [f"  {line}" for line in missing]
    assert main(["fetch", "smollm2"]) == 2
    assert "koff fetch downloads, --offline forbids it" in capsys.readouterr().err


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A dataset as on the hub, in a folder."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": toy_documents(60)}), folder / "train.parquet")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "arrow")
    return folder


VERSIONS = {"a" * 40: "old", "b" * 40: "new"}  # the second is the newest


@pytest.fixture
def two_versions(tmp_path, monkeypatch):
    """The cache of `datasets` with two versions of org/name, as two fetches leave them, and no network."""
    for commit, word in VERSIONS.items():
        source = write_jsonl(tmp_path / f"{word}.jsonl", [f"{word} {text}" for text in toy_documents(20)])
        datasets.load_dataset("json", data_files=str(source), cache_dir=str(tmp_path / word))
        made = next((tmp_path / word).glob("json/*/*/*/dataset_info.json")).parent
        place = tmp_path / "arrow" / "org___name" / "default" / "0.0.0" / commit
        shutil.copytree(made, place)
        info = json.loads((place / "dataset_info.json").read_text())
        version = {"version_str": "0.0.0", "major": 0, "minor": 0, "patch": 0}
        info |= {"config_name": "default", "dataset_name": "name", "version": version}
        (place / "dataset_info.json").write_text(json.dumps(info))
        (place / "json-train.arrow").rename(place / "name-train.arrow")
        os.utime(place, (0, list(VERSIONS).index(commit)))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv(offline.ASKED, "1")
    shards._open_hub.cache_clear()
    yield tmp_path / "hub" / "datasets--org--name"
    shards._open_hub.cache_clear()


@pytest.mark.parametrize("revision", ["a" * 40, "c" * 40, "v1"])
def test_offline_another_version_of_a_dataset_is_missing(two_versions, capsys, revision):
    argv = ["prepare", "--model.backbone=koff-tiny", f"--data.domains.x=hub:org/name@{revision}"]
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "1 thing(s) that are needed are missing" in said
    assert f"domain x: cannot read hub:org/name@{revision}: {revision} is asked for" in said
    assert f"the newest version in its cache is {'b' * 40}. Where there is a network" in said


@pytest.mark.parametrize("revision", ["b" * 40, "v2", ""])
def test_offline_the_version_in_the_cache_is_read(two_versions, revision):
    (two_versions / "refs").mkdir(parents=True)
    (two_versions / "refs" / "v2").write_text("b" * 40)
    (two_versions / "snapshots" / ("b" * 40)).mkdir(parents=True)
    shard = shards.hub_shards("org/name" + f"@{revision}" * bool(revision), None, "train", Fields())[0]
    assert next(shard.read(pytest.fail))[1].text.startswith("new ")


def no_tokenizer(source, **_):
    raise KoffError(f"no network to look for {source} in")


def test_prefetch_fetches_models_datasets_and_tasks(text, corpus, monkeypatch, capsys):
    fetched = []
    monkeypatch.setattr(needs, "snapshot_download", lambda name, **options: fetched.append((name, options)))
    monkeypatch.setattr(needs, "load_tasks", lambda *task: fetched.append(task))
    monkeypatch.setattr(needs, "load_tokenizer", no_tokenizer)
    argv = ["prepare", "--model.backbone=some/model", "--model.revision=abc", "--prefetch-only"]
    argv += [f"--data.domains.x=hub:{corpus}", f"--data.domains.a={text}/a.jsonl", "--data.tokenizer=some/tokenizer"]
    assert main([*argv, "--lm_eval.tasks=[{task: koff_cloze, domain: x}]"]) == 0
    left_out = {"ignore_patterns": needs.SECOND_COPIES}
    here = ["model some/model", "tokenizer some/tokenizer", "domain x", "task koff_cloze"]
    assert capsys.readouterr().out.splitlines() == [f"{what}: is here" for what in here]
    assert fetched[:2] == [
        ("some/model", {"revision": "abc", "allow_patterns": needs.FILES, **left_out}),
        ("some/tokenizer", {"revision": None, "allow_patterns": needs.OF_TOKENIZERS, **left_out}),
    ]
    assert fetched[2] == (["koff_cloze"], None)


def test_prefetch_reads_no_more_of_general_text_than_a_run_would(corpus, monkeypatch, capsys):
    monkeypatch.setattr(needs, "fetch_hub", lambda *_: pytest.fail("all of it may be terabytes"))
    argv = ["prepare", "--model.backbone=koff-tiny", "--data.domains.x=bundled:de", "--data.max_retention_bytes=2000"]
    argv += [f"--data.retention.web=hub:{corpus}", "--data.heldout_fraction=0.3"]
    assert main([*argv, "--prefetch-only"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "retention web: is here"
    assert main([*argv, "--data.max_train_bytes=20000"]) == 0
    assert "retention web: is there already" in capsys.readouterr().out


def test_a_tokenizer_comes_without_weights_and_a_model_with_one_copy_of_them():
    small = ["config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja"]
    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    others = ["consolidated.safetensors", "original/params.json", "original/tokenizer.model", "pytorch_model.bin"]
    for wanted, files in ((small, needs.OF_TOKENIZERS), (small + weights, needs.FILES)):
        patterns = {"allow_patterns": files, "ignore_patterns": needs.SECOND_COPIES}
        assert list(filter_repo_objects(small + weights + others, **patterns)) == wanted


def test_prefetch_lists_what_cannot_be_had_and_fetches_the_rest(text, corpus, monkeypatch, capsys):
    def refuse(name, **_):
        raise KoffError(f"{name} is gated")

    monkeypatch.setattr(needs, "snapshot_download", refuse)
    monkeypatch.setattr(needs, "load_tokenizer", no_tokenizer)
    argv = ["prepare", "--model.backbone=some/model", "--prefetch-only", f"--data.domains.x=hub:{corpus}"]
    assert main([*argv, f"--data.domains.y={{files: hub:{corpus}, split: other}}"]) == 2
    said = capsys.readouterr()
    assert said.out == "domain x: is here\n"
    assert "2 thing(s) cannot be fetched:\n  model some/model: some/model is gated\n  domain y: cannot read" in said.err


STREAMED = ["--data.streaming=true", "--data.max_heldout_bytes=900", "--data.heldout_fraction=0.2", "--prefetch-only"]
NO_SIZE = "may be terabytes: say how many bytes of text to copy of each dataset, --prefetch_bytes=1000000000 say; got"


@pytest.mark.parametrize(("words", "got"), [([], "None"), (["--prefetch_bytes=0"], "0")])
def test_of_a_streamed_corpus_it_must_be_said_how_much_to_fetch(corpus, monkeypatch, capsys, words, got):
    fetched = []
    monkeypatch.setattr(needs, "snapshot_download", lambda name, **_: fetched.append(name))
    monkeypatch.setattr(needs, "fetch_hub", lambda *_: fetched.append("a corpus"))
    monkeypatch.setattr(needs, "load_tokenizer", no_tokenizer)
    argv = ["prepare", "--model.backbone=some/model", f"--data.domains.x=hub:{corpus}", *words]
    assert main([*argv, *STREAMED]) == 2
    said = capsys.readouterr()
    assert (fetched, said.out) == (["some/model"], "model some/model: is here\n")
    line = said.err.splitlines()[-1]
    assert line == f"  domain x: data.streaming reads hub:{corpus} bit by bit, and all of it {NO_SIZE} {got}"
    assert main([*argv, *STREAMED, "--data.streaming=false"]) == 0
    assert fetched[1:] == ["some/model", "a corpus"]


def test_a_size_without_prefetch_is_refused(capsys):
    argv = ["prepare", "--model.backbone=koff-tiny", "--data.domains.x=bundled:de", "--prefetch_bytes=9"]
    assert main(argv) == 2
    assert "--prefetch_bytes is the size of what --prefetch-only copies: give both" in capsys.readouterr().err


def test_a_streamed_corpus_is_copied_and_trained_on_without_network(corpus, tmp_path, monkeypatch, capsys):
    """The copy is the corpus' head: held-out text is that of a run with a network, and no other text is trained on."""
    monkeypatch.chdir(tmp_path)
    texts, size = toy_documents(60), 6000
    sizes = np.cumsum([len(text.encode()) for text in texts])
    head = texts[: int(np.searchsorted(sizes, size)) + 1]
    domain = [f"--data.domains.x=hub:{corpus}", "--model.backbone=koff-tiny"]
    assert main(["prepare", *domain, *STREAMED, f"--prefetch_bytes={size}"]) == 0
    assert capsys.readouterr().out == "domain x: is here\n"
    options = {"seq_len": 32, "heldout_fraction": 0.2, "max_heldout_bytes": 900, "streaming": True}
    online = DomainDataModule({"x": f"hub:{corpus}"}, "koff-tiny", **options)
    online.setup()
    shutil.rmtree(corpus)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv(offline.ASKED, "1")
    data = DomainDataModule({"x": f"hub:{corpus}"}, "koff-tiny", **options)
    with pytest.warns(UserWarning, match=rf"no network: of hub:.* only the {sizes[len(head) - 1]:,} bytes of text"):
        data.setup()
    assert data._heldout["x"].tokens.tolist() == online._heldout["x"].tokens.tolist()
    assert [d.text for shard in data._texts["x"].shards for _, d in shard.read(pytest.fail)] == head
    words = ["--trainer.max_steps=2", "--trainer.log_every_n_steps=1", "--data.seq_len=32", "--data.batch_size=2"]
    words += ["--trainer.accelerator=cpu", *(word for word in STREAMED if word != "--prefetch-only")]
    with pytest.warns(UserWarning, match="no network: of hub:"):
        assert main(["fit", *domain, *words, "--export.enabled=false"]) == 0
    file = next((tmp_path / "cache" / "hub").glob("*/*.parquet"))
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["fit", *domain, *words, "--export.enabled=false"]) == 2
    assert f"the copy of hub:{corpus} in {file.parent} is damaged (00000.parquet): delete" in capsys.readouterr().err


def test_a_copy_is_made_anew_only_where_more_is_asked(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_copy, "PIECE", 1000)
    what = (str(corpus), None, "train", Fields())
    pieces = shards.hub_shards(*what)

    def copied(num_bytes):
        hub_copy.make_copy(str(corpus), pieces, num_bytes, pytest.fail)
        files = hub_copy.find_copy(*what)
        texts = [d.text for file in files for _, d in file.read(pytest.fail)]
        return len(files), sum(len(text.encode()) for text in texts), texts

    with pytest.warns(UserWarning, match="only the"):
        files, size, texts = copied(3000)
        assert (files, texts) == (3, toy_documents(60)[: len(texts)])
        assert 3000 <= size < 3000 + max(map(len, toy_documents(60)))
        assert copied(2000) == copied(3000) == (files, size, texts)
        assert copied(5000)[1] >= 5000
        assert copied(10**9)[2] == toy_documents(60)
        monkeypatch.setattr(hub_copy, "_pieces", lambda *_: pytest.fail("it is whole already"))
        assert copied(10**10)[2] == toy_documents(60)
    assert len(list((tmp_path / "cache" / "hub").iterdir())) == 1


def test_weights_in_parts_must_all_be_there(tmp_path, monkeypatch):
    (tmp_path / "index.json").write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    there = {"model.safetensors.index.json": str(tmp_path / "index.json"), "1.safetensors": "x"}
    monkeypatch.setattr(needs, "try_to_load_from_cache", lambda _, file, revision: there.get(file))
    with pytest.raises(KoffError, match="1 of 2 files of weights of some/model are not in the cache"):
        needs._find_weights("some/model", None)
    there["2.safetensors"] = "y"
    needs._find_weights("some/model", None)


def test_a_hub_domain_that_is_tokenised_needs_no_hub(text, corpus, monkeypatch):
    config = SimpleNamespace(data=SimpleNamespace(tokenizer=str(text / "tokenizer")), model=None)
    data = DomainDataModule({"x": f"hub:{corpus}"}, str(text / "tokenizer"), 32, 4, 0.2)
    data.prepare(data._load_tokenizer())
    gone = lambda *_: (_ for _ in ()).throw(KoffError("no hub"))  # noqa: E731
    monkeypatch.setattr(needs, "fetch_hub", gone)
    monkeypatch.setattr("koff_lightning.data.sources.hub_shards", gone)
    needs._find_text(data, data.sources["x"], config)
    needs._fetch_text(data, "x", config)
    data.setup()
    with pytest.raises(KoffError, match="no hub"):
        needs._find_text(data, DomainSource(f"hub:{corpus}", split="other"), config)
