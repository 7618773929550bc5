"""Who may read which memory: a key opens its own domains, and what it does not open is not there."""

import json
import logging
import shutil

import pytest
from served import Client, served
from tiny_artifact import tiny_artifact

from koff_lightning.artifact import memories
from koff_lightning.serving.keys import read_keys
from koff_lightning.serving.own import OwnEngine
from koff_lightning.support.errors import KoffError

ALICE, BOB, OPERATOR = "alice-key-0123456789", "bob-key-012345678901", "operator-key-01234567"
FILE = f"""
alice: {{key: {ALICE}, domains: [de, law]}}
bob: {{key: {BOB}, domains: []}}
operator: {{key: {OPERATOR}, domains: all, admin: true}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def keys(tmp_path):
    (tmp_path / "keys.yaml").write_text(FILE)
    return read_keys(tmp_path / "keys.yaml")


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made.folder, tmp_path / "artifact")


@pytest.fixture
def engine(folder):
    return OwnEngine(folder)


@pytest.fixture
def address(engine, keys, folder):
    with served(engine, keys=keys, folder=folder) as address:
        yield address


def test_a_key_opens_its_domains_and_no_others(address):
    alice, bob = Client(address, ALICE), Client(address, BOB)
    assert alice.models() == ["tiny", "tiny:de", "tiny:law"]
    assert bob.models() == ["tiny"]
    assert Client(address, OPERATOR).models() == ["tiny", "tiny:de", "tiny:fr", "tiny:law"]
    assert alice.text("tiny:law") and bob.text("tiny")
    for client, name in ((alice, "fr"), (bob, "de")):
        hidden, absent = client.complete(f"tiny:{name}"), client.complete("tiny:xx")
        assert hidden[0] == absent[0] == 404
        assert json.dumps(hidden[1]).replace(f":{name}'", ":xx'") == json.dumps(absent[1]), "as if it did not exist"
        assert client.http.get(f"/v1/models/tiny:{name}").status_code == 404


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer wrong-key-0123456789", ALICE, f"Basic {ALICE}", f"Bearer {ALICE}x", "Bearer ö"],
)
def test_an_unknown_key_opens_nothing(address, header):
    client = Client(address)
    headers = {} if header is None else {"Authorization": header.encode()}
    for method, path in (
        ("GET", "/v1/models"),
        ("POST", "/v1/completions"),
        ("GET", "/metrics"),
        ("POST", "/koff/memories"),
    ):
        answer = client.http.request(method, path, headers=headers, json={"model": "tiny", "prompt": "x"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert client.http.get("/health").status_code == 200


def test_auto_does_not_lead_to_others_domains(address, engine, monkeypatch):
    monkeypatch.setattr(OwnEngine, "route", lambda self, texts: ["fr"] * len(texts))
    alice, operator = Client(address, ALICE), Client(address, OPERATOR)
    assert operator.complete("tiny:auto")[1]["model"] == "tiny:fr"
    status, content = alice.complete("tiny:auto")
    assert (status, content["model"]) == (200, "tiny"), "as where the router knows none"
    assert content["choices"][0]["text"] == alice.text("tiny")
    assert "fr" not in json.dumps(content)


def test_a_memory_called_auto_is_hidden_as_any_other(address, folder, monkeypatch):
    """New ones are refused; earlier releases made such."""
    alice, operator = Client(address, ALICE), Client(address, OPERATOR)
    before = alice.complete("tiny:auto"), alice.models()
    new = {"path": str(folder / "memories/law"), "name": "auto"}
    status, content = operator.post("/koff/memories", new)
    assert status == 400 and "cannot be called 'auto'" in content["error"]["message"]
    monkeypatch.setattr(memories, "refuse_taken", lambda names: None)
    assert operator.post("/koff/memories", new)[0] == 200
    assert operator.text("tiny:auto") == operator.text("tiny:law")
    assert (alice.complete("tiny:auto"), alice.models()) == before


def test_memories_are_changed_by_admins_alone(address, folder):
    alice, operator = Client(address, ALICE), Client(address, OPERATOR)
    new = {"path": str(folder / "memories/law"), "name": "jura"}
    assert alice.post("/koff/memories", new)[0] == 403
    assert alice.http.delete("/koff/memories/de").status_code == 403
    assert alice.http.get("/metrics").status_code == 403
    assert operator.http.get("/metrics").status_code == 200
    status, content = operator.post("/koff/memories", new)
    assert status == 200 and "tiny:jura" not in alice.models()
    assert operator.models() == [f"tiny{name}" for name in ("", ":de", ":fr", ":law", ":jura")]
    assert operator.text("tiny:jura") == operator.text("tiny:law")
    assert operator.http.delete("/koff/memories/jura").status_code == 200
    assert operator.complete("tiny:jura")[0] == 404
    status, content = operator.post("/koff/memories", new | {"path": "/nowhere"})
    assert status == 400 and "holds no memory.json" in content["error"]["message"]
    assert operator.post("/koff/memories", new | {"more": 1})[0] == 400
    assert operator.http.delete("/koff/memories/it").status_code == 400


def test_without_keys_nobody_administers(engine, folder):
    with served(engine, folder=folder) as address:
        assert Client(address).post("/koff/memories", {"path": "x"})[0] == 403
        assert Client(address).http.delete("/koff/memories/de").status_code == 403


def test_keys_are_nowhere_in_the_log(address, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    for key in (ALICE, "wrong-key-0123456789"):
        Client(address, key).complete("tiny:fr")
        Client(address, key).post("/v1/completions", {"prompt": key})
    told = caplog.text + "".join(capfd.readouterr())
    assert ALICE not in told and "wrong-key" not in told
    assert ALICE not in Client(address, OPERATOR).http.get("/metrics").text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "names nobody"),
        ("[1]", "names nobody"),
        ("a: {key: secret-word-0123456789", "cannot be read as YAML"),
        ("a: secret-word-0123456789", "a must have the entries key and domains"),
        ("a: {key: secret-word-0123456789}", "a must have the entries key and domains"),
        ("a: {key: secret-word-0123456789, domains: all, admn: true}", "nothing else"),
        ("a: {key: secret, domains: all}", "at least 16 ASCII characters"),
        ("a: {key: 1234567890123456789, domains: all}", "at least 16 ASCII characters"),
        ("a: {key: secret-word-0123456789, domains: de}", "domains must be a list of names, or all"),
        ("a: {key: secret-word-0123456789, domains: [1]}", "domains must be a list of names, or all"),
        ("a: {key: secret-word-0123456789, domains: [], admin: 1}", "admin must be true or false"),
        ("a: &k {key: secret-word-0123456789, domains: []}\nb: *k", "b has the key of a"),
    ],
)
def test_a_bad_keys_file_is_refused_and_not_shown(tmp_path, text, line):
    (tmp_path / "keys.yaml").write_text(text)
    with pytest.raises(KoffError, match=line) as error:
        read_keys(tmp_path / "keys.yaml")
    assert "secret" not in str(error.value) and "123456" not in str(error.value)


def test_a_missing_keys_file(tmp_path):
    with pytest.raises(KoffError, match="no such file"):
        read_keys(tmp_path / "keys.yaml")
