"""Artifacts on the hub, against a hub on localhost: what is pushed comes back the same, whole or in part."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

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
from koff_lightning.commands import serve
from koff_lightning.studies.analysis.runs import find_runs

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


def add_router(folder):
    texts = ["--data", "de=bundled:de", "--data", "fr=bundled:fr", "--data", "law=bundled:python"]
    assert main(["router", "fit", "--model", str(folder), *texts, "--train_bytes", "20000"]) == 0


def test_a_router_goes_with_its_artifact_and_not_with_a_part_of_it(hub, artifact, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(artifact, bare)
    add_router(artifact)
    on_hub.push(artifact, REPO)
    back = on_hub.pull(REPO, tmp_path / "back")
    texts = ["Klicken Sie mit der rechten Maustaste auf die Tabelle.", "def main(argv):"]
    assert load_decomposed(back, domains="auto").route(texts) == load_decomposed(artifact, domains="auto").route(texts)
    part = on_hub.pull(REPO, tmp_path / "part", ["de", "fr"])
    assert read_manifest(part).router is None and not (part / "router").exists()
    assert load_decomposed(part).domains == ["de", "fr"]
    on_hub.push(bare, REPO)
    assert not [name for name in hub.commits[REPO][-1] if name.startswith("router/")]
    assert on_hub.pull(REPO, tmp_path / "again")


def test_a_pull_that_was_cut_short_goes_on(hub, artifact, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    on_hub.push(artifact, REPO)
    hub.broken = {"memories/law/adapter_model.safetensors"}
    assert main(["pull", f"{REPO}@main"]) == 2
    assert "the hub answered 403" in capsys.readouterr().err
    assert not (tmp_path / "tiny" / "koff.json").exists()
    with pytest.raises(KoffError, match="is there already"):
        on_hub.pull(REPO, "tiny", ["de"])  # something else
    hub.broken = set()
    assert main(["pull", f"{REPO}@main"]) == 0
    assert sorted(p.name for p in (tmp_path / "tiny").iterdir()) == sorted(
        {p.name for p in artifact.iterdir()} | {"README.md"}
    )
    assert load_decomposed("tiny").domains
    assert main(["pull", REPO]) == 2


def test_a_damaged_memory_goes_neither_up_nor_down(hub, artifact, tmp_path):
    on_hub.push(artifact, REPO)
    files, name = hub.commits[REPO][-1], "memories/de/adapter_model.safetensors"
    good, files[name] = files[name], files[name][:-1] + b"\1"
    for target in (None, tmp_path / "back"):
        with pytest.raises(KoffError, match="was changed after it was written"):
            on_hub.pull(REPO, target)
    files[name] = good
    for target in (None, tmp_path / "back"):
        assert load_decomposed(on_hub.pull(REPO, target)).domains
    (artifact / name).write_bytes(good[:-1] + b"\1")
    with pytest.raises(KoffError, match="was changed after it was written"):
        on_hub.push(artifact, REPO, ["de"])


def test_who_pushes_at_the_same_time_is_not_overwritten(hub, artifact):
    on_hub.push(artifact, REPO)
    hub.meanwhile = lambda: hub.commits[REPO].append(hub.commits[REPO][-1] | {"theirs": b""})
    with pytest.raises(KoffError, match="the hub answered 412 for org/tiny: somebody else has pushed to it meanwhile"):
        on_hub.push(artifact, REPO, ["de"])
    hub.meanwhile = None
    on_hub.push(artifact, REPO, ["de"])
    assert "theirs" in hub.commits[REPO][-1]


def test_a_memory_that_is_pushed_anew_leaves_nothing_of_the_old_one(hub, artifact, tmp_path):
    on_hub.push(artifact, REPO)
    hub.commits[REPO][-1]["memories/de/part_it_had.safetensors"] = b"old"
    hub.commits[REPO][-1]["memories/fr/of_another"] = b"old"
    on_hub.push(artifact, REPO, ["de"])
    assert [name for name in hub.commits[REPO][-1] if "part_it_had" in name or "of_another" in name] == [
        "memories/fr/of_another"
    ]


def test_memories_go_only_to_their_own_layout(hub, artifact, tmp_path):
    shutil.rmtree(artifact)
    masked = tiny_artifact(tmp_path, layout="masked").folder
    on_hub.push(masked, REPO)
    with pytest.raises(KoffError, match="org/tiny holds an artifact of layout 'masked', here it is 'ragged'"):
        on_hub.push(tiny_artifact(tmp_path).folder, REPO, ["de"])


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "is not valid JSON"),
        (b"[]", "must hold an object"),
        (b'{"format_version": 99}', "has format version 99"),
        (b"[" * 10**5, "nests values thousands deep|is not valid JSON"),
        (b'{"format_version": 1}', "lacks"),
    ],
)
def test_a_manifest_of_a_stranger_is_one_line(hub, artifact, tmp_path, content, message):
    on_hub.push(artifact, REPO)
    hub.commits[REPO][-1]["koff.json"] = content
    with pytest.raises(KoffError, match=message):
        on_hub.pull(REPO, tmp_path / "back")


@pytest.mark.parametrize("name", ["memories/de/../../../out", "memories/de/..\\out", "../out", "LICENSE.old", "x/y"])
def test_names_that_lead_elsewhere_are_not_fetched(hub, artifact, tmp_path, name):
    on_hub.push(artifact, REPO)
    hub.commits[REPO][-1][name] = b"x"
    back = on_hub.pull(REPO, tmp_path / "a" / "back")
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(("out", ".old", "y"))]
    assert load_decomposed(back).domains


def test_what_was_pulled_is_found_without_network(hub, artifact, monkeypatch):
    on_hub.push(artifact, REPO)
    first = on_hub.local_folder(REPO)
    on_hub.pull(REPO, memories=["de"])
    sha, _ = hub.at(REPO, "main")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert on_hub.local_folder(REPO) == on_hub.local_folder(f"{REPO}@{sha}") == first
    assert read_manifest(on_hub.pull(REPO, memories=["de"])).domains.keys() == {"de"}
    with pytest.raises(KoffError, match="no folder org/tiny@v1 here, and from the hub: the hub is not asked"):
        on_hub.local_folder(f"{REPO}@v1")


def test_several_pull_the_same_at_once(hub, artifact):
    on_hub.push(artifact, REPO)
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(on_hub.local_folder, [REPO] * 8))) == 1
    assert load_decomposed(REPO).domains


def test_many_memories_are_no_longer_name_than_a_disk_takes():
    assert len(on_hub._suffix([f"{'long' * 15}{n}" for n in range(50)])) < 20


def test_verbs_that_read_an_artifact_take_its_name_on_the_hub(hub, artifact, monkeypatch, capsys):
    add_router(artifact)
    on_hub.push(artifact, REPO)
    monkeypatch.setattr("builtins.input", lambda _: "/exit")
    texts = ["--data", "de=bundled:de", "--data", "fr=bundled:fr", "--data", "law=bundled:python"]
    commands = [
        ["inspect", REPO],
        ["memory", "list", REPO],
        ["generate", "--model", REPO, "--prompt", "Klicken Sie", "--domain", "auto", "--max_new_tokens", "2"],
        ["router", "test", "--model", REPO, *texts, "--heldout_bytes", "0"],
    ]
    for command in commands:
        assert main(command) == 0, command
    served = []
    monkeypatch.setattr(serve, "_own", lambda folder, *_, **__: served.append(folder))
    monkeypatch.setattr(serve, "_run", lambda *_: None)
    monkeypatch.setattr("koff_lightning.serving.app.create_app", lambda *_: None)
    assert main(["serve", REPO, "--port", "0"]) == 0
    home = on_hub.local_folder(REPO)
    assert served == [home.resolve()]
    assert list(find_runs([REPO]).values()) == [home]
    assert main(["analyze", "--model", REPO]) == 2
    assert (
        "analyze: org/tiny is on the hub and has no folder here to write beside: give --out" in capsys.readouterr().err
    )
    assert main(["lm-eval", "--model", REPO, "--tasks", "koff_cloze", "--domains", "nn", "--device", "cpu"]) == 2
    assert f"{home} has no memory for 'nn'" in capsys.readouterr().err
    assert on_hub.artifact_or_same("org/dense") == "org/dense", "a dense model"


@pytest.mark.parametrize("verb", [["memory", "remove"], ["router", "fit", "--model"]])
def test_verbs_that_change_an_artifact_want_a_folder(hub, artifact, capsys, verb):
    on_hub.push(artifact, REPO)
    assert main([*verb, REPO, *(["de"] if verb[0] == "memory" else [])]) == 2
    assert "no such folder" in capsys.readouterr().err


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
        (["pull", "org/a--b"], "a repository of the hub is named org/name; got 'org/a--b'"),
        (["pull", f"org/{'a' * 100}"], "a repository of the hub is named org/name; got"),
        (["pull", REPO, "--out", "file"], "file is there already: give another --out"),
        (["pull", REPO, "--out", "file/below"], "cannot write file/below"),
        (["push", "nowhere", REPO], "artifact 'nowhere': no such folder"),
    ],
)
def test_bad_input_is_one_line(hub, artifact, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    on_hub.push(artifact, REPO)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    hub.commits["org/plain"] = [{"config.json": b"{}"}]
    capsys.readouterr()
    assert main([str(artifact) if word == "ARTIFACT" else word for word in words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_without_network_it_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(KoffError, match="the hub is not asked for org/tiny"):
        on_hub.pull(REPO, "somewhere")
