"""Files by their address: another place, the same text."""

import gzip
import http.server
import json
import socketserver
import threading
from functools import partial

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from test_streaming import module_of, plain
from toy_text import toy_documents, toy_tokenizer, write_jsonl

from koff_lightning.data import DomainDataModule, DomainSource, retries
from koff_lightning.data.remote import find_remote
from koff_lightning.data.split import read_domain
from koff_lightning.support.errors import KoffError

TEXTS = toy_documents(60)


@pytest.fixture
def memory():
    """A file system that is elsewhere and yet here."""
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/corpus", recursive=True)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(folder, address) of a web server of what the folder holds; it keeps no log and gives no parts of files."""
    folder = tmp_path_factory.mktemp("web")
    quiet = type("Quiet", (http.server.SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), partial(quiet, directory=str(folder))) as web:
        web.daemon_threads = True
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{web.server_address[1]}"
        web.shutdown()


@pytest.fixture
def waited(monkeypatch):
    times = []
    monkeypatch.setattr(retries.time, "sleep", times.append)
    return times


def read(files, **fields):
    texts = read_domain("a", DomainSource(files, **fields), heldout_fraction=0.3)
    return sorted(texts.train), sorted(texts.heldout)


def lines_of(texts):
    return "".join(json.dumps({"id": f"doc-{i}", "text": text}) + "\n" for i, text in enumerate(texts)).encode()


def test_all_kinds_of_file_are_read_as_if_they_were_here(tmp_path, memory):
    here = read(str(write_jsonl(tmp_path / "a.jsonl", TEXTS)))
    content = (tmp_path / "a.jsonl").read_bytes()
    table = pyarrow.table({"text": TEXTS, "id": [f"doc-{i}" for i in range(len(TEXTS))]})
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, sink)
    with pyarrow.CompressedOutputStream(zst := pyarrow.BufferOutputStream(), "zstd") as stream:
        stream.write(content)
    files = {"a.jsonl": content, "b.jsonl.gz": gzip.compress(content), "c.parquet": sink.getvalue().to_pybytes()}
    files["d.jsonl.zst"] = zst.getvalue().to_pybytes()
    for name, part in files.items():
        memory.pipe(f"/corpus/{name}", part)
        assert read(f"memory://corpus/{name}") == here, name


def test_patterns_and_both_sides(memory):
    for i in range(3):
        memory.pipe(f"/corpus/{i}.jsonl", lines_of(TEXTS[i::3]))
    files = find_remote("memory://corpus/*.jsonl")
    assert [file.name for file in files] == ["0.jsonl", "1.jsonl", "2.jsonl"]
    train, heldout = read(
        ["memory://corpus/0.jsonl", "memory://corpus/1.jsonl"], heldout_files="memory://corpus/2.jsonl"
    )
    assert (len(train), len(heldout)) == (40, 20)
    with pytest.raises(KoffError, match=r"memory://.*0.jsonl is among the files and the heldout_files"):
        read("memory://corpus/0.jsonl", heldout_files="memory://corpus/*.jsonl")


def test_streamed_and_prepared_from_elsewhere(tmp_path, memory):
    toy_tokenizer(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    memory.pipe("/corpus/a.jsonl", (tmp_path / "a.jsonl").read_bytes())

    def batches(files, **options):
        data = module_of(tmp_path, names="a", cache=str(tmp_path / "cache"), **options)
        data.sources["a"] = DomainSource(files)
        data.setup()
        data.trainer = type("Trainer", (), {"accumulate_grad_batches": 1, "max_steps": 9, "world_size": 1})
        return [plain(batch) for batch in data.train_dataloader()]

    for options in ({"streaming": True}, {"streaming": True, "num_workers": 1}, {"streaming": False}):
        assert batches("memory://corpus/a.jsonl", **options) == batches(str(tmp_path / "a.jsonl"), **options)
    data = module_of(tmp_path, names="a", streaming=False, cache=str(tmp_path / "cache"))
    data.sources["a"] = DomainSource("memory://corpus/a.jsonl")
    data.tokenizer = data._load_tokenizer()
    key = data._key(data.sources["a"])
    assert data._key(data.sources["a"]) == key
    memory.pipe("/corpus/a.jsonl", lines_of(TEXTS[1:]))
    assert data._key(data.sources["a"]) != key


def test_a_web_server(tmp_path, server, waited):
    folder, address = server
    here = read(str(write_jsonl(folder / "a.jsonl", TEXTS)))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress((folder / "a.jsonl").read_bytes()))
    assert read(f"{address}/a.jsonl") == read(f"{address}/b.jsonl.gz?x=1") == here
    long = np.random.default_rng(0).bytes(4 * 2**20).hex()  # what is smaller than a block comes whole
    pyarrow.parquet.write_table(pyarrow.table({"text": [long, *TEXTS]}), folder / "c.parquet", compression="none")
    with pytest.raises(KoffError, match="its server gives no parts of files, and parquet takes them"):
        read(f"{address}/c.parquet")
    with pytest.raises(KoffError, match="cannot read http://127.0.0.1.*/none.jsonl: 404"):
        read(f"{address}/none.jsonl")
    assert not waited, "what is not there does not come by waiting"


def test_a_server_that_is_not_there_is_waited_for(waited, monkeypatch):
    monkeypatch.setattr(retries.constants, "HF_HUB_OFFLINE", False)
    with pytest.warns(UserWarning, match="trying again in"), pytest.raises(KoffError, match="Tried 9 times in 255 s"):
        find_remote("http://127.0.0.1:9/a.jsonl")
    assert waited == list(retries.WAITS)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://bucket/a.jsonl", "takes a package that is not installed: pip install s3fs"),
        ("foo://bucket/a.jsonl", "nothing here knows addresses of the kind 'foo://'"),
        ("memory://corpus/none.jsonl", "there is no file memory://corpus/none.jsonl"),
        ("memory://corpus/*.jsonl", "no file matches memory://corpus/"),
        ("simplecache::memory://a.jsonl", "no file matches|'::'"),
        ("zip://a.jsonl::file:///x.zip", "an address in an address"),
    ],
)
def test_addresses_that_cannot_be(address, message, monkeypatch):
    if address.startswith("s3"):
        absent = lambda url: (_ for _ in ()).throw(ImportError("Install s3fs to access S3"))  # noqa: E731
        monkeypatch.setattr(fsspec.core, "url_to_fs", absent)
    data = DomainDataModule({"a": address, "b": "nowhere/*.jsonl"}, tokenizer="none")
    with pytest.raises(KoffError, match=message) as error:
        data.setup()
    assert "2 domains lack text" in str(error.value), "all that is missing is told at once"


def test_offline_and_secrets(monkeypatch):
    monkeypatch.setenv("KOFF_OFFLINE", "1")
    with pytest.raises(KoffError, match=r"--offline forbids to look") as error:
        find_remote("https://host/a.jsonl?X-Amz-Signature=abcdef0123456789")
    assert "abcdef" not in str(error.value)
