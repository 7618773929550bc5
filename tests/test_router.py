"""A router picks each row's memory from its text alone: what it picks is read, and what it cannot do it says."""

import json
import math
import shutil
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_artifact import tiny_artifact
from toy_text import toy_tokenizer
from transformers import AutoTokenizer, DynamicCache, RobertaConfig, RobertaForSequenceClassification

from koff_lightning import DomainDataModule, KoffError, load_decomposed
from koff_lightning.artifact.folder import describe_file, read_manifest, verify
from koff_lightning.artifact.router_files import read_router
from koff_lightning.cli import main
from koff_lightning.commands import router_cli
from koff_lightning.data.packing import IGNORED
from koff_lightning.evaluation.routing import first_ids, routed_bits
from koff_lightning.router import ngrams
from koff_lightning.router.encoder import RATE, fine_tune, load_encoder
from koff_lightning.router.routing import Router, calibrated, size_of, training_pieces
from koff_lightning.specs.memories import LoraSpec
from koff_lightning.support.files import hash_file

# The domains of the tiny artifact, with text that has nothing to do with their names.
TEXT = ["--data", "de=bundled:de", "--data", "fr=bundled:fr", "--data", "law=bundled:python"]
SMALL = [*TEXT, "--train_bytes", "40000"]
GERMAN = "Klicken Sie mit der rechten Maustaste auf die Tabelle und wählen Sie den Eintrag Einfügen aus."
FRENCH = "Cliquez avec le bouton droit sur le tableau, puis choisissez la commande que vous souhaitez utiliser."
PYTHON = "def main(argv):\n    if not argv:\n        return None\n    for word in argv:\n        self.parse(word)\n"
CHINESE = "在此对话框中选择要插入的单元格区域，然后单击确定按钮以关闭该窗口并返回文档。"
TEXTS = [GERMAN, CHINESE, PYTHON, FRENCH]
ROWS = ["de", None, "law", "fr"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny artifact with a router."""
    made = tiny_artifact(tmp_path_factory.mktemp("router"), chat=True)
    assert main(["router", "fit", "--model", str(made.folder), *SMALL]) == 0
    return made


@pytest.fixture(scope="module")
def model(made):
    return load_decomposed(made.folder, domains="auto")


@pytest.fixture
def folder(made, tmp_path):
    """A copy to change."""
    return shutil.copytree(made.folder, tmp_path / "artifact")


def refused(capsys, message, *argv):
    """A command ends with one line that says so."""
    assert main([str(word) for word in argv]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("koff: ")]
    assert len(said) == 1
    assert message in said[0]


@cache
def bundled(name):
    """Held-out text that ships with the package."""
    return DomainDataModule({name: f"bundled:{name}"}).texts()[name].heldout


def padded(tokenizer, texts):
    batch = tokenizer(texts, padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


# ------------------------------------------------------------------------------------------------ what a text becomes


def fnv(raw):
    found = 2166136261
    for byte in raw:
        found = (found ^ byte) * 16777619 % 2**32
    return found


def test_the_hash_is_fnv_1a():
    assert (fnv(b"a"), fnv(b"foobar")) == (0xE40C292C, 0xBF9CF968)  # of the test vectors of its authors


@pytest.mark.parametrize("text", ["", "a", "ab", "größere Füchse", "跳过", "abcabcabc", "\x00\ud800", "z" * 5000])
def test_features_are_as_their_page_says(text):
    raw = text.encode("utf-8", "replace")[: ngrams.BYTES]
    counts = {}
    for n in range(1, ngrams.LONGEST + 1):
        for start in range(len(raw) - n + 1):
            hashed = fnv(raw[start : start + n])
            bucket = ((hashed >> ngrams.BITS) ^ (hashed & (2**ngrams.BITS - 1))) % 2**ngrams.BITS
            counts[bucket] = counts.get(bucket, 0) + 1
    values = {bucket: np.log(1 + count) for bucket, count in counts.items()}
    norm = np.sqrt(sum(value**2 for value in values.values()))
    buckets, found = ngrams.features(text)
    assert buckets.tolist() == sorted(values)
    np.testing.assert_allclose(found, [values[bucket] / norm for bucket in sorted(values)], rtol=1e-12)


# ------------------------------------------------------------------------------------------------ what it picks


def test_each_text_goes_to_its_domain_and_unknown_text_to_none(model):
    assert model.route(TEXTS) == ROWS
    assert model.route(["", "  \n"]) == [None, None]
    assert model.route([]) == []


def test_a_text_is_routed_alike_alone_and_among_others(model):
    texts = [*TEXTS, *bundled("de")[:5], *bundled("fr")[:5], "x"]
    assert [model.route([text])[0] for text in texts] == model.route(texts)


def test_held_out_text_is_picked_as_a_router_should(model):
    """Of the first 256 characters; the bounds are far below what was found."""
    for name, source in (("de", "de"), ("fr", "fr")):
        answers = model.route([text[:256] for text in bundled(source)])
        assert answers.count(name) / len(answers) > 0.85
        assert set(answers) <= {name, None}
    for source in ("zh", "ru"):
        answers = model.route([text[:256] for text in bundled(source)])
        assert answers.count(None) / len(answers) > 0.9


def test_the_thresholds_let_the_asked_share_fall_to_none():
    """On the text that they were set by, in each size."""

    class Noise:
        def probabilities(self, texts):
            return np.random.default_rng(0).random((len(texts), 2))

    texts = {"a": ["x" * n for n in [20, 200, 2000] * 400]}
    for rate in (0.0, 0.1, 0.5):
        answers = calibrated(["a", "b"], Noise(), texts, rate).route(texts["a"])
        for size in range(3):
            of_size = [a for a, text in zip(answers, texts["a"], strict=True) if size_of(text) == size]
            assert abs(of_size.count(None) / len(of_size) - rate) < 0.005


def test_pieces_for_the_thresholds_are_of_other_documents():
    documents = [chr(0x4E00 + n) * 2000 for n in range(60)]
    train, kept = training_pieces(documents, 50_000)
    assert train and kept
    assert not set("".join(train)) & set("".join(kept))
    assert training_pieces(documents, 50_000) == (train, kept)
    one, rest = training_pieces(["a" * 9000 + "b" * 1000], 20_000)
    assert set("".join(one)) == {"a"} and set("".join(rest)) == {"b"}
    with pytest.raises(KoffError, match="some kilobytes of training text"):
        training_pieces([" "], 1000)


def test_fitting_twice_gives_the_same_files(made, folder):
    assert main(["router", "fit", "--model", str(folder), *SMALL]) == 0
    for name in ("router.json", "router.safetensors"):
        assert hash_file(folder / "router" / name) == hash_file(made.folder / "router" / name)
    assert not [path for path in folder.parent.iterdir() if ".part" in path.name]


def test_of_talks_it_learns_the_questions(made, folder, tmp_path):
    """As it meets them in a chat: the same text as talks gives the same router."""
    folders = folder, shutil.copytree(folder, tmp_path / "other")
    for home, chat in zip(folders, (False, True), strict=True):
        domains = {}
        for name, source in (("de", "de"), ("fr", "fr"), ("law", "python")):
            texts = [text[:1500] for text in bundled(source)[:40]]
            talks = [
                [{"role": "user", "content": a}, {"role": "assistant", "content": "OK"}, {"role": "user", "content": b}]
                for a, b in ((text[:700], text[700:]) for text in texts)
            ]
            rows = [
                {"id": str(n)} | ({"messages": talk} if chat else {"text": f"{text[:700]}\n{text[700:]}"})
                for n, (text, talk) in enumerate(zip(texts, talks, strict=True))
            ]
            path = tmp_path / f"{name}{chat}.jsonl"
            path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
            domains[name] = {"files": str(path), "heldout_files": None} | ({"chat": "answers"} if chat else {})
        config = tmp_path / f"{chat}.yaml"
        config.write_text(json.dumps({"data": {"domains": domains}}), encoding="utf-8")
        assert main(["router", "fit", "--model", str(home), "--config", str(config)]) == 0
    assert len({hash_file(home / "router" / "router.safetensors") for home in folders}) == 1


# ------------------------------------------------------------------------------------------------ what is read


@torch.no_grad()
def test_auto_reads_what_telling_the_router_s_choice_reads(model):
    ids, mask = padded(model.tokenizer, TEXTS)
    told = model(ids, mask, domains=ROWS).logits
    assert torch.equal(model(ids, mask, domains="auto").logits, told)
    assert torch.equal(model(ids, mask, domains=["auto", None, "law", "auto"]).logits, told)
    assert not torch.equal(model(ids, mask, domains=None).logits, told)
    new = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1}
    assert torch.equal(model.generate(ids, mask, domains="auto", **new), model.generate(ids, mask, domains=ROWS, **new))
    beams = new | {"num_beams": 2}
    assert torch.equal(
        model.generate(ids, mask, domains="auto", **beams), model.generate(ids, mask, domains=ROWS, **beams)
    )


@torch.no_grad()
def test_auto_in_the_middle_of_a_text_is_refused(model):
    ids, _ = padded(model.tokenizer, [GERMAN])
    cache = DynamicCache()
    model(ids, domains="auto", past_key_values=cache)
    with pytest.raises(KoffError, match="token cache has no whole text to route"):
        model(ids[:, :1], domains="auto", past_key_values=cache)


def test_generate_names_what_the_router_picked(made, capsys):
    prompts = [word for text in TEXTS for word in ("--prompt", text)]
    command = ["generate", "--model", str(made.folder), "--max_new_tokens", "4", "--device", "cpu", *prompts]
    assert main([*command, "--domain", "auto"]) == 0
    routed = capsys.readouterr().out
    told = [word for name in ("de", "de", "law", "fr") for word in ("--domain", name)]
    assert main([*command, *told]) == 0
    by_name = capsys.readouterr().out
    assert "[no memory] 在" in routed
    assert [part for part in routed.split("\n\n") if "[de]" in part or "[fr]" in part] == [
        part for part in by_name.split("\n\n") if ("[de]" in part and "在" not in part) or "[fr]" in part
    ]
    assert (
        main(["generate", "--model", str(made.folder), "--prompt", FRENCH, "--domain", "auto", "--device", "cpu"]) == 0
    )
    assert capsys.readouterr().out.startswith("[fr] Cliquez")


def test_chat_says_what_the_router_picked(made, capsys, monkeypatch):
    lines = iter([GERMAN, "/clear", CHINESE, "/domain de", "/domain auto", FRENCH, "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: print(prompt) or next(lines))
    assert main(["chat", "--model", str(made.folder), "--domain", "auto", "--max_new_tokens", "2"]) == 0
    out = capsys.readouterr().out
    assert "auto> \n[de]\n" in out
    assert "auto> \n[no memory]\n" in out
    assert "de> \n" in out


def test_chat_goes_on_without_a_router(tmp_path, capsys, monkeypatch):
    folder = tiny_artifact(tmp_path, chat=True).folder
    lines = iter(["/domain auto", "/domain de", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: print(prompt) or next(lines))
    assert main(["chat", "--model", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "has no router to pick a memory" in out
    assert out.count("no memory> ") == 2 and "de> " in out


def test_the_router_stays_with_its_artifact(model, folder, tmp_path):
    before = {path.name: hash_file(path) for path in (folder / "router").iterdir()}
    loaded = load_decomposed(folder)
    loaded.save_pretrained(tmp_path / "mine")
    assert load_decomposed(tmp_path / "mine", domains="auto").route(TEXTS) == ROWS
    assert main(["memory", "remove", str(folder), "law"]) == 0
    assert {path.name: hash_file(path) for path in (folder / "router").iterdir()} == before
    verify(folder)


def test_an_artifact_without_a_router_is_written_as_before_there_were_any(made, tmp_path):
    other = tiny_artifact(tmp_path)
    assert "router" not in json.loads((other.folder / "koff.json").read_text(encoding="utf-8"))
    assert read_manifest(other.folder).router is None
    (other.folder / "router").mkdir()
    with pytest.raises(KoffError, match="router does not belong there"):
        verify(other.folder)


# ------------------------------------------------------------------------------------------------ an encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny random RoBERTa."""
    folder = tmp_path_factory.mktemp("encoder")
    tokenizer = AutoTokenizer.from_pretrained(toy_tokenizer(folder))
    tokenizer.pad_token = "<eos>"
    config = RobertaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=66,
        initializer_range=0.2,
        type_vocab_size=1,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    RobertaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_encoder_learns_to_tell_texts_apart_and_all_its_weights_are_trained(encoder, monkeypatch):
    class Noted(torch.optim.AdamW):
        def step(self, *args):
            rates.append(self.param_groups[0]["lr"] / RATE)
            return super().step(*args)

    rates = []
    monkeypatch.setattr(torch.optim, "AdamW", Noted)
    torch.manual_seed(0)
    made = load_encoder(encoder, 2, new=True)
    before = {name: tensor.clone() for name, tensor in made.model.state_dict().items()}
    texts = [word + " " + word for word in ("the quick fox", "кошки") for _ in range(64)]
    fine_tune(made, texts, [0] * 64 + [1] * 64, epochs=20, say=lambda line: None)
    assert rates[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1]), "a tenth of the 40 steps warms up"
    assert rates[4:] == pytest.approx(np.linspace(1, 1 / 36, 36)), "then the rate falls to nothing, evenly"
    assert made.probabilities(["the quick fox the", "кошки и кошки"]).argmax(1).tolist() == [0, 1]
    places = {"position", "word"}  # of these only rows that were read
    moved = {name for name, tensor in made.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {n for n in before if not any(place in n for place in places)} - moved <= {
        "roberta.embeddings.position_ids",
        "roberta.embeddings.token_type_ids",
    }


def test_an_encoder_is_fitted_and_read_again(folder, encoder):
    before = hash_file(encoder / "model.safetensors")
    more = ["--encoder", str(encoder), "--device", "cpu", "--none_rate", "0"]
    assert main(["router", "fit", "--model", str(folder), *SMALL, *more]) == 0
    assert hash_file(encoder / "model.safetensors") == before
    assert {path.suffix for path in (folder / "router" / "encoder").iterdir()} == {".json", ".safetensors"}
    verify(folder)
    model = load_decomposed(folder, domains="auto")
    texts = [*TEXTS, GERMAN * 100]  # the last is longer than the encoder can hold
    one = torch.tensor(model.router.classifier.probabilities(texts))
    assert torch.allclose(one.sum(1), torch.ones(len(texts), dtype=one.dtype))
    assert [model.route([text])[0] for text in texts] == model.route(texts)
    assert set(model.route(texts)) <= {"de", "fr", "law", None}
    again = load_encoder(folder / "router" / "encoder", 3)
    assert (again.probabilities(texts) == one.numpy()).all()


def test_an_encoder_of_other_files_is_refused(folder, encoder, capsys, tmp_path):
    command = ["router", "fit", "--model", folder, *SMALL, "--device", "cpu", "--encoder"]
    refused(capsys, "no such folder", *command, tmp_path / "nothing")
    odd = shutil.copytree(encoder, tmp_path / "odd")
    (odd / "model.safetensors").rename(odd / "pytorch_model.bin")  # a pickle, for all that we know
    refused(capsys, "cannot be loaded", *command, odd)
    weights = load_file(encoder / "model.safetensors")
    shutil.copytree(encoder, odd, dirs_exist_ok=True)
    save_file({n: w * float("nan") for n, w in weights.items()}, odd / "model.safetensors", {"format": "pt"})
    (odd / "pytorch_model.bin").unlink()
    refused(capsys, "not finite", *command, odd)


# ------------------------------------------------------------------------------------------------ how well it picks


def test_general_text_of_a_run_is_no_text_of_its_router(made, tmp_path):
    config = tmp_path / "config.yaml"
    domains = {"de": "bundled:de", "fr": "bundled:fr", "law": "bundled:python"}
    config.write_text(json.dumps({"data": {"domains": domains, "retention": {"web": "bundled:en"}}}), encoding="utf-8")
    _, data = router_cli._text(made.folder, str(config), None)
    assert data.general is None and data.domain_names == list(domains)


def test_the_report_counts_every_text_once_and_told_is_what_telling_costs(made, capsys, tmp_path):
    out, results = tmp_path / "router.json", tmp_path / "results.json"
    kept = [{key: group[key] for key in ("layer", "kind", "kept", "of")} for group in read_manifest(made.folder).kept]
    content = {"mean": {"koff_bpb": 1.5}, "kept_units": kept}
    results.write_text(json.dumps(content), encoding="utf-8")
    (tmp_path / "artifact").symlink_to(made.folder, target_is_directory=True)
    artifact = tmp_path / "artifact"
    command = ["router", "test", "--model", artifact, *TEXT, "--unseen", "zh=bundled:zh", "--out", out]
    assert main([*map(str, command), "--heldout_bytes", "4000", "--device", "cpu"]) == 0
    assert "bits per byte" in capsys.readouterr().out
    found = json.loads(out.read_text(encoding="utf-8"))
    assert list(found["confusion"]) == ["16", "64", "256"]
    counts = {"de": bundled("de"), "fr": bundled("fr"), "law": bundled("python"), "zh": bundled("zh")}
    for size, table in found["confusion"].items():
        assert {name: sum(row.values()) for name, row in table.items()} == {n: len(t) for n, t in counts.items()}
        assert found["accuracy"][size]["zh"] == table["zh"]["(none)"] / len(counts["zh"])
        assert found["accuracy"][size]["de"] == table["de"]["de"] / len(counts["de"])
    assert found["accuracy"]["256"]["de"] > 0.8 and found["accuracy"]["256"]["zh"] > 0.9
    noted = {"heldout_bytes": 4000, "accuracy": found["accuracy"], "bits_per_byte": found["bits_per_byte"]}
    assert json.loads(results.read_text(encoding="utf-8")) == content | {"router": noted}
    for row in found["bits_per_byte"].values():
        assert list(row) == ["told", "none", "16", "64", "256"]
        assert row["told"] != row["none"]
        low, high = min(row["told"], row["none"]), max(row["told"], row["none"])
        if row["64"] not in (row["told"], row["none"]):
            assert low - 0.5 < row["64"] < high + 0.5


@pytest.mark.parametrize("name", ["artifact", "other"])
def test_the_results_of_another_run_are_left_alone(made, tmp_path, capsys, name):
    (tmp_path / name).symlink_to(made.folder, target_is_directory=True)
    (tmp_path / "results.json").write_text('{"mean": {}, "kept_units": []}', encoding="utf-8")
    long = tmp_path / "long.jsonl"
    long.write_text("".join(json.dumps({"text": f"{n} " + "Der Fuchs springt. " * 300}) + "\n" for n in range(40)))
    command = ["router", "test", "--model", str(tmp_path / name), *TEXT, "--data", f"de={long}"]
    assert main([*command, "--heldout_bytes", "3000", "--device", "cpu"]) == 0  # less than a document has
    assert "added to" not in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == {"mean": {}, "kept_units": []}


def test_each_way_costs_what_its_memory_costs(model):
    """Two rows of German, one of which the router takes for Python, and a Chinese one of a domain's text."""
    rows = [model.tokenizer(text)["input_ids"] for text in (GERMAN, PYTHON, CHINESE)]
    ids, labels = torch.zeros(3, 400, dtype=torch.long), torch.full((3, 400), IGNORED)
    for place, row in enumerate(rows):
        ids[place, : len(row)], labels[place, 1 : len(row)] = torch.tensor(row), torch.tensor(row[1:])
    sizes, told = torch.tensor([90.0, 80.0, 70.0]), ["de", "de", "fr"]
    batch = {"input_ids": ids, "labels": labels, "domains": told, "num_bytes": sizes}
    found = routed_bits(model, SimpleNamespace(val_dataloader=lambda: [batch]))
    ways = {"told": told, "none": [None] * 3, "256": model.route([GERMAN, PYTHON, CHINESE])}
    assert ways["256"] == ["de", "law", None]
    for way, picked in ways.items():
        nats = []
        for row, domain in zip(rows, picked, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([row]), domains=domain).logits[0, :-1]
            nats.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="sum")))
        assert found["de"][way] == pytest.approx((nats[0] + nats[1]) / math.log(2) / 170, rel=1e-4)
        assert found["fr"][way] == pytest.approx(nats[2] / math.log(2) / 70, rel=1e-4)
        if way == "told":  # the same two texts in one row, where positions restart
            first, second = rows[:2]
            packed = {
                "input_ids": torch.tensor([first + second]),
                "domains": ["de"],
                "num_bytes": sizes[:2].sum()[None],
            }
            packed["labels"] = torch.tensor([[IGNORED, *first[1:], IGNORED, *second[1:]]])
            packed["position_ids"] = torch.cat([torch.arange(len(row)) for row in (first, second)])[None]
            one = routed_bits(model, SimpleNamespace(val_dataloader=lambda: [packed]))["de"]["told"]  # noqa: B023
            assert one == pytest.approx(found["de"]["told"], rel=1e-4)


def test_padding_is_no_text_to_route():
    data = DomainDataModule({"python": "bundled:python"}, tokenizer="koff-tiny", seq_len=128, max_heldout_bytes=20_000)
    data.setup()
    for batch in data.val_dataloader():
        for ids, row, count in zip(first_ids(batch, 10**6), batch["input_ids"], batch["labels"], strict=True):
            assert ids == row[: len(ids)].tolist()
            assert (count[len(ids) :] == -100).all() and count[len(ids) - 1] != -100
        assert [ids[:16] for ids in first_ids(batch, 10**6)] == first_ids(batch, 16)


def test_lm_eval_reads_each_request_with_what_the_router_picks(model):
    from lm_eval.api.instance import Instance

    from koff_lightning.evaluation.harness import KoffLM

    def ask(kind, arguments):
        return [Instance(kind, {}, words, number) for number, words in enumerate(arguments)]

    routed = KoffLM(model, "auto", batch_size=2)
    told = {name: KoffLM(model, name, batch_size=2) for name in ("de", "fr", "law", None)}
    pairs = [(text, ending) for text in TEXTS for ending in (" und", " xyz")]
    rows = [name for name in ROWS for _ in range(2)]
    for kind, arguments, names in (
        ("loglikelihood", pairs, rows),
        ("loglikelihood_rolling", [(text,) for text in TEXTS], ROWS),
        ("generate_until", [(text, {"max_gen_toks": 3, "until": ["."]}) for text in TEXTS], ROWS),
    ):
        found = getattr(routed, kind)(ask(kind, arguments))
        for words, name, answer in zip(arguments, names, found, strict=True):
            due = getattr(told[name], kind)(ask(kind, [words]))[0]
            assert answer == (due if isinstance(due, str) else pytest.approx(due, rel=1e-4))
    assert routed.model.domain == "auto"


def test_lm_eval_by_the_router_is_refused_in_several_processes(model, monkeypatch):
    from koff_lightning.evaluation.harness import KoffLM

    monkeypatch.setattr("koff_lightning.support.ranks.count", lambda: 2)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 1)
    with pytest.raises(KoffError, match="domain 'auto' is scored in one process, and here are 2: name a domain"):
        KoffLM(model, "auto", batch_size=2)
    assert KoffLM(model, "de", batch_size=2).world_size == 2


# ------------------------------------------------------------------------------------------------ bad input


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """An artifact without a router."""
    return tiny_artifact(tmp_path_factory.mktemp("plain")).folder


def test_auto_without_a_router(plain, capsys):
    say = "has no router to pick a memory: `koff router fit --model"
    with pytest.raises(KoffError, match=say):
        load_decomposed(plain, domains="auto")
    model = load_decomposed(plain)
    with pytest.raises(KoffError, match=say):
        model.route(["a"])
    with pytest.raises(KoffError, match=say):
        model(torch.tensor([[3, 4]]), domains="auto")
    refused(capsys, say, "generate", "--model", plain, "--domain", "auto", "--prompt", "a")
    refused(capsys, say, "router", "test", "--model", plain, *TEXT)
    refused(capsys, say, "lm-eval", "--model", plain, "--domain", "auto", "--tasks", "koff_bpb_de", "--device", "cpu")


def test_a_dense_model_has_no_router(capsys):
    command = ["lm-eval", "--model", "koff-tiny", "--domain", "auto", "--tasks", "koff_bpb_de", "--device", "cpu"]
    refused(capsys, "only an artifact has a router, and koff-tiny is none", *command)


def test_a_router_of_other_memories(folder, capsys):
    assert main(["memory", "remove", str(folder), "law"]) == 0
    capsys.readouterr()
    say = "the router of .* was fitted for de, fr, law, its memories are de, fr .*fit it anew with `koff router fit"
    with pytest.raises(KoffError, match=say):
        load_decomposed(folder, domains="auto")
    with pytest.raises(KoffError, match=say):
        load_decomposed(folder).route(["a"])
    refused(capsys, "fit it anew", "generate", "--model", folder, "--domain", "auto", "--prompt", "a")
    assert main(["router", "fit", "--model", str(folder), *SMALL[:4], *SMALL[-2:]]) == 0
    assert load_decomposed(folder, domains="auto").route([GERMAN, FRENCH]) == ["de", "fr"]


def test_a_router_whose_memories_are_not_all_loaded(folder):
    part = load_decomposed(folder, domains=["de", "fr"])
    with pytest.raises(KoffError, match="picks among de, fr, law, and 'law' is not loaded: load all"):
        part.route([GERMAN])
    more = load_decomposed(folder)
    more.memories.add("new", LoraSpec(2, 2.0), None)
    with pytest.raises(KoffError, match="was fitted for de, fr, law, its memories are de, fr, law, new"):
        more.route([GERMAN])


def test_an_artifact_that_may_not_be_changed_is_told_before_the_work(folder, capsys, monkeypatch):
    monkeypatch.setattr("koff_lightning.commands.router_cli._trained", lambda *_: pytest.fail("it works"))
    monkeypatch.setattr("os.access", lambda *_: False)
    say = f"router fit: --model: cannot write into {folder.parent} (no right to write there): give another place"
    refused(capsys, say, "router", "fit", "--model", folder, *SMALL)


def test_a_router_of_one_domain(folder, tmp_path, capsys):
    for name in ("law", "fr"):
        assert main(["memory", "remove", str(folder), name]) == 0
    refused(
        capsys, "has one memory, 'de', so there is nothing to choose", "router", "fit", "--model", folder, *TEXT[:2]
    )
    merged = tiny_artifact(tmp_path / "merged", layout="merged").folder
    refused(capsys, "has one memory, 'de'", "router", "fit", "--model", merged, *TEXT[:2])


def test_a_memory_called_auto_is_itself(made, tmp_path, capsys):
    folder = tiny_artifact(tmp_path, domains=("auto", "de")).folder
    refused(
        capsys, "has a memory called 'auto'", "router", "fit", "--model", folder, "--data", "auto=bundled:en", *TEXT[:2]
    )
    model = load_decomposed(folder, domains="auto")
    assert model.domains == ["auto"]
    model(torch.tensor([[3, 4]]), domains="auto")


def test_text_that_is_not_there_or_not_asked_for(plain, capsys):
    fit = ["router", "fit", "--model", plain]
    refused(capsys, "names no text of 'de': give --data de=TEXT", *fit)
    refused(capsys, "names no text of 'law': give --data law=TEXT", *fit, *TEXT[:4])
    refused(capsys, "no memory for 'xx'; it has de, fr, law", *fit, *TEXT, "--data", "xx=bundled:en")
    refused(capsys, "--data takes NAME=TEXT", *fit, "--data", "de")
    refused(capsys, "unknown bundled domain 'none'", *fit, *TEXT[:4], "--data", "law=bundled:none")
    refused(capsys, "none_rate must lie in [0, 1); got 1.0", *fit, *TEXT, "--none_rate", "1")
    refused(capsys, "train_bytes must be 1 or more", *fit, *TEXT, "--train_bytes", "0")
    refused(capsys, "epochs must be 1 or more", *fit, *TEXT, "--epochs", "0")
    refused(capsys, "koff.json, so it is no artifact", "router", "fit", "--model", plain.parent, *TEXT)
    assert not (plain / "router").exists()


def test_unseen_text_of_a_domain_that_is_known(made, capsys):
    command = ["router", "test", "--model", made.folder, *TEXT, "--unseen", "de=bundled:de"]
    refused(capsys, "--unseen: the router knows 'de'", *command)


@pytest.mark.parametrize(("given", "say"), [("a text", "one text"), ([3], "int"), ([None], "NoneType")])
def test_what_is_no_list_of_texts(model, given, say):
    with pytest.raises(KoffError, match=f"route takes a list of texts, one for each row; got {say}"):
        model.route(given)


# ------------------------------------------------------------------------------------------------ files of strangers


def listed_anew(folder):
    """Bring the manifest's hashes of the router in line with its files, as who means harm would."""
    manifest = json.loads((folder / "koff.json").read_text(encoding="utf-8"))
    files = {f"router/{path.name}": describe_file(path) for path in (folder / "router").iterdir()}
    manifest["router"]["files"] = files
    (folder / "koff.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "say"),
    [
        ({"kind": "pickle"}, "its kind is 'pickle', known are ngrams and encoder"),
        ({"domains": ["de"]}, "two names or more"),
        ({"domains": ["de", "fr", "../law"]}, "not safe as a file name"),
        ({"domains": ["de", "fr", "fr"]}, "given more than once"),
        ({"domains": "de"}, "two names or more"),
        ({"domains": ["de", "fr", "xx"]}, "was fitted for de, fr, xx"),
        ({"thresholds": [0.5, 0.5]}, "3 thresholds"),
        ({"thresholds": [0.5, 0.5, 2]}, "must lie in \\[0, 1\\], got 2"),
        ({"thresholds": [0.5, 0.5, "1"]}, "must lie in \\[0, 1\\]"),
        ({"thresholds": [0.5, 0.5, float("nan")]}, "holds NaN or Infinity for a number"),
        ({"sizes": [1, 2]}, "3 thresholds"),
        ({"ngrams": {"longest": 9}}, "not those of this release"),
        ({"ngrams": None}, "not those of this release"),
        ({"more": 1}, "'more'"),
        ({"format_version": 7}, "format version 7"),
        ({"kind": "encoder"}, "cannot be loaded"),
    ],
)
def test_a_card_that_is_not_as_it_should_be(folder, change, say):
    path = folder / "router" / "router.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    listed_anew(folder)
    with pytest.raises(KoffError, match=say) as caught:
        read_router(folder, read_manifest(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("fault", ["nan", "shape", "dtype", "name", "bytes"])
def test_weights_that_are_not_as_they_should_be(folder, fault):
    path = folder / "router" / "router.safetensors"
    tensors = load_file(path)
    tensors = {
        "nan": lambda: tensors | {"bias": tensors["bias"] * float("nan")},
        "shape": lambda: tensors | {"weight": tensors["weight"][:, :-1].contiguous()},
        "dtype": lambda: tensors | {"weight": tensors["weight"].double()},
        "name": lambda: {"w": tensors["weight"], "bias": tensors["bias"]},
        "bytes": lambda: None,
    }[fault]()
    path.unlink()
    if tensors is None:
        path.write_bytes(b"nothing of the kind")
    else:
        save_file(tensors, path)
    listed_anew(folder)
    with pytest.raises(KoffError, match="not a sound safetensors" if tensors is None else "fp32 and finite"):
        load_decomposed(folder, domains="auto")


def test_files_that_were_changed_or_added(folder):
    (folder / "router" / "more.bin").write_bytes(b"")
    with pytest.raises(KoffError, match=r"more.bin does not belong there"):
        load_decomposed(folder, domains="auto")
    (folder / "router" / "more.bin").unlink()
    path = folder / "router" / "router.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(KoffError, match="was changed after it was written"):
        load_decomposed(folder)
    path.unlink()
    with pytest.raises(KoffError, match="is missing"):
        load_decomposed(folder)


@pytest.mark.parametrize(
    "entry", [1, {}, {"files": 1}, {"files": {"../x": {"sha256": "", "size": 1}}}, {"files": {"router/a": {}}}]
)
def test_a_manifest_with_an_odd_router(folder, entry):
    path = folder / "koff.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"router": entry}), encoding="utf-8")
    with pytest.raises(KoffError, match="cannot be used"):
        read_manifest(folder)


def test_a_router_alone_takes_any_classifier():
    class Sure:
        def probabilities(self, texts):
            return np.array([[0.9, 0.1] if "a" in text else [0.2, 0.3] for text in texts])

    router = Router(("x", "y"), Sure(), (0.5, 0.25, 0.0))
    assert router.route(["a", "b", "b" * 200, "b" * 600]) == ["x", None, "y", "y"]
