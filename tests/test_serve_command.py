"""`koff serve` as a command: what it refuses before it serves, how it begins and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import httpx2 as httpx
import pytest
from served import Client
from tiny_artifact import tiny_artifact

from koff_lightning.cli import main
from koff_lightning.commands import serve as command
from koff_lightning.commands.serve import is_local


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--host", "0.0.0.0"], "anybody who reaches 0.0.0.0 could use this server: give --keys FILE"),
        (["--host", "::"], "give --keys FILE"),
        (["--host", "example.org"], "give --keys FILE"),
        (["--keys", "nowhere.yaml"], "keys file nowhere.yaml: no such file"),
        (["--port", "70000"], "--port must be between 0 and 65535"),
        (["--port", "x"], "port"),
        (["--name", "a:b"], "the model's name cannot be 'a:b'"),
        (["--name", "a b"], "the model's name cannot be 'a b'"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--queue", "-1"], "--queue at least 0"),
        (["--time-limit", "0"], "--time-limit must be more than 0 seconds"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["--device", "nowhere"], "device 'nowhere' cannot be used here"),
        (["--prot", "1"], "no option 'prot'. Did you mean 'port'?"),
    ],
)
def test_bad_options_are_one_line(made, capsys, options, line):
    assert main(["serve", str(made.folder), *options]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("koff: ") and line in said[-1]


def test_what_is_no_artifact_is_one_line(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "none")]) == 2
    assert main(["serve", str(tmp_path)]) == 2
    assert "without koff.json, so it is no artifact" in capsys.readouterr().err


def test_a_port_in_use_is_one_line(made, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["serve", str(made.folder), "--port", str(port)]) == 2
    assert (
        f"cannot listen at 127.0.0.1 port {port}: Address already in use; give another --port"
        in capsys.readouterr().err
    )


def test_what_is_not_installed_is_said(made, capsys, monkeypatch):
    monkeypatch.setattr(command, "_NEEDED", ("fastapi", "no_such_package"))
    assert main(["serve", str(made.folder)]) == 2
    assert (
        "koff serve needs no_such_package: pip install '.[serve]' in a clone of koff-lightning"
        in capsys.readouterr().err
    )


def test_which_addresses_are_this_machines_own():
    assert all(map(is_local, ("127.0.0.1", "::1", "[::1]", "localhost")))
    assert not any(map(is_local, ("0.0.0.0", "::", "127.1.2.3", "10.0.0.1", "localhost.example.org", "")))


def test_of_many_models_the_first_few_are_told():
    about = SimpleNamespace(domains=["a", "b", "c", "d"], router=None)
    assert command.names_told("tiny", about) == "tiny, tiny:a, tiny:b, tiny:c, ... (GET /v1/models lists them)"
    about = SimpleNamespace(domains=["a"], router={"files": {}})
    assert command.names_told("tiny", about) == "tiny, tiny:a, tiny:auto (GET /v1/models lists them)"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_it_at_once_and_without_tracebacks(made, tmp_path, number):
    words = [sys.executable, "-m", "koff_lightning", "serve", str(made.folder), "--port", "0", "--name", "tiny"]
    log = tmp_path / "log"
    with log.open("w") as err, subprocess.Popen(words, stdout=subprocess.PIPE, stderr=err, text=True) as process:
        try:
            address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())[0]
            body = {"model": "tiny:de", "prompt": "x", "max_tokens": 400, "n": 64, "ignore_eos": True, "stream": True}
            client = Client(address)
            with client.http.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(number)
                time.sleep(0.5)
                next(lines)
                assert process.poll() is None, "what is under way goes on"
                process.send_signal(number)
                with pytest.raises(httpx.RemoteProtocolError):  # the answer is cut off
                    list(lines)
                assert process.wait(60) == 128 + number
        finally:
            process.kill()
    assert len(log.read_text().splitlines()) == 1, log.read_text()


def test_it_serves_until_it_is_told_to_end_and_ends_when_all_is_answered(made, tmp_path):
    words = [sys.executable, "-m", "koff_lightning", "serve", str(made.folder), "--port", "0", "--name", "tiny"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            line = process.stdout.readline()
            address = re.search(r"http://127\.0\.0\.1:\d+", line)[0]
            assert line.endswith(", model names: tiny, tiny:de, tiny:fr, tiny:law (GET /v1/models lists them)\n")
            client = Client(address)
            text = client.text("tiny:de", max_tokens=300, ignore_eos=True)
            found = []
            asking = threading.Thread(
                target=lambda: found.append(Client(address).text("tiny:de", max_tokens=300, ignore_eos=True))
            )
            asking.start()
            while "koff_texts_running 0.0" in client.http.get("/metrics").text:
                assert asking.is_alive()
            process.send_signal(signal.SIGTERM)
            asking.join(60)
            assert found == [text], "what was under way is answered"
            assert process.wait(30) == 128 + signal.SIGTERM
            began = time.monotonic()
            with pytest.raises(httpx.ConnectError):
                client.complete("tiny:de")
            assert time.monotonic() - began < 5
        finally:
            process.kill()
        assert process.stderr.read().splitlines()[-1] == "koff: ended by SIGTERM"
