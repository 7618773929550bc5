"""Artifacts on the hub, against a hub on localhost: what is pushed comes back the same, whole or in part."""

import json
import shutil

import huggingface_hub.constants
import pytest
import torch
from hub_stub import serving
from tiny_artifact import tiny_artifact

from koff_lightning import KoffError, load_decomposed
from koff_lightning.artifact import hub as on_hub
from koff_lightning.artifact.folder import read_manifest, verify
from koff_lightning.artifact.memories import remove_memory
from koff_lightning.cli import main

# huggingface_hub's own, on its way of uploading without Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=")
REPO = "org/tiny"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setenv("KOFF_CACHE", str(tmp_path / "cache"))
    for name, value in {"HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with serving() as running:
        template = huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE
        template = template.replace(huggingface_hub.constants.ENDPOINT, running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        yield running


@pytest.fixture
def artifact(tmp_path):
    return tiny_artifact(tmp_path).folder


def test_what_is_pushed_comes_back_the_same(hub, artifact, tmp_path, capsys):
    assert main(["push", str(artifact), REPO]) == 0
    assert f"pushed: {hub.url}/{REPO}/commit/" in capsys.readouterr().out
    assert hub.private[REPO] is True
    assert main(["pull", REPO, "--out", str(tmp_path / "back")]) == 0
    back = tmp_path / "back"
    assert verify(back) == read_manifest(artifact)
    ids = torch.arange(3, 9)[None]
    domain = next(iter(read_manifest(artifact).domains))
    here, there = (load_decomposed(folder)(ids, domains=domain).logits for folder in (artifact, back))
    assert torch.equal(here, there)
    card = hub.commits[REPO][-1]["README.md"].decode()
    assert card.startswith("---\n") and f'load_decomposed("{REPO}")' in card and "DIR" not in card


def test_a_name_of_the_hub_goes_where_a_folder_goes_and_is_kept(hub, artifact):
    on_hub.push(artifact, REPO)
    first = load_decomposed(REPO)
    assert first.domains == list(read_manifest(artifact).domains)
    assert on_hub.local_folder(REPO) == first.folder, "a second time nothing is fetched"
    assert on_hub.local_folder(artifact) == artifact, "a folder that is there is that folder"


def test_one_memory_of_several(hub, artifact, tmp_path):
    one, *others = read_manifest(artifact).domains
    on_hub.push(artifact, REPO)
    back = on_hub.pull(REPO, tmp_path / "one", [one])
    assert list(read_manifest(back).domains) == [one]
    assert sorted(path.name for path in (back / "memories").iterdir()) == [one]
    assert read_manifest(back).parameters["stored"] < read_manifest(artifact).parameters["stored"]

    fewer = tmp_path / "fewer"
    shutil.copytree(artifact, fewer)
    remove_memory(fewer, one)
    on_hub.push(fewer, "org/fewer")
    on_hub.push(artifact, "org/fewer", [one])
    again = on_hub.pull("org/fewer", tmp_path / "again")
    assert set(read_manifest(again).domains) == {one, *others}
    assert read_manifest(again).parameters["stored"] == read_manifest(artifact).parameters["stored"]


def test_a_push_that_was_cut_short_goes_on(hub, artifact):
    hub.fail_after = 1
    with pytest.raises(KoffError, match=r"the hub answered 403 for org/tiny: `hf auth login` with a token"):
        on_hub.push(artifact, REPO)
    assert len(hub.commits[REPO]) == 1, "nothing half is there"
    sent, hub.fail_after = len(hub.sent), None
    on_hub.push(artifact, REPO)
    assert len(hub.sent) == len(set(hub.sent)), "what had arrived is not sent again"
    assert len(hub.sent) > sent == 1


def test_a_later_push_takes_away_what_is_no_longer_there(hub, artifact):
    one = next(iter(read_manifest(artifact).domains))
    on_hub.push(artifact, REPO)
    remove_memory(artifact, one)
    on_hub.push(artifact, REPO)
    assert not [name for name in hub.commits[REPO][-1] if name.startswith(f"memories/{one}/")]


def test_memories_go_only_to_their_own_backbone(hub, artifact):
    on_hub.push(artifact, REPO)
    manifest = json.loads(hub.commits[REPO][-1]["koff.json"])
    manifest["base"]["hash"] = "0" * 64
    hub.commits[REPO][-1]["koff.json"] = json.dumps(manifest).encode()
    with pytest.raises(KoffError, match="org/tiny holds an artifact of another backbone"):
        on_hub.push(artifact, REPO, list(read_manifest(artifact).domains)[:1])


def test_what_was_changed_on_the_way_is_refused_and_fetched_again(hub, artifact, tmp_path):
    on_hub.push(artifact, REPO)
    files = hub.commits[REPO][-1]
    name = next(name for name in files if name.startswith("backbone/") and name.endswith(".safetensors"))
    good, files[name] = files[name], files[name][:-1] + b"\1"
    with pytest.raises(KoffError, match="was changed after it was written"):
        load_decomposed(REPO)
    hub.commits[REPO].append(files | {name: good})
    assert load_decomposed(REPO).domains


@pytest.mark.parametrize(
    "words, message",
    [
        (["pull", "org/none"], "no repository org/none on the hub, or it is private"),
        (["pull", "tiny"], "a repository of the hub is named org/name; got 'tiny'"),
        (["pull", f"{REPO}@nowhere"], f"{REPO} has no such revision"),
        (["pull", REPO, "--domain=nn"], f"{REPO} has no memory for 'nn'; it has "),
        (["pull", "org/plain"], "org/plain holds no koff.json, so it is no artifact"),
        (["push", "ARTIFACT", "a/b/c"], "a repository of the hub is named org/name; got 'a/b/c'"),
        (["push", "ARTIFACT", REPO, "--domain=nn"], "has no memory for 'nn'; it has "),
        (["push", "nowhere", REPO], "artifact 'nowhere': no such folder"),
    ],
)
def test_bad_input_is_one_line(hub, artifact, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    on_hub.push(artifact, REPO)
    hub.commits["org/plain"] = [{"config.json": b"{}"}]
    capsys.readouterr()
    assert main([str(artifact) if word == "ARTIFACT" else word for word in words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_without_network_it_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(KoffError, match="the hub is not asked for org/tiny"):
        on_hub.pull(REPO, "somewhere")
