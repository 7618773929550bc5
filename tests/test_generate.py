"""`koff generate` and `koff chat` say what the model says, and answer bad input in a line."""

import io
import json
import shutil

import pytest
import torch
from tiny_artifact import tiny_artifact, tiny_decomposition
from tiny_models import tiny_model

from koff_lightning import load_backbone, load_decomposed
from koff_lightning.artifact.export import export
from koff_lightning.artifact.folder import describe_files
from koff_lightning.cli import main
from koff_lightning.commands.generate import _prompts
from koff_lightning.evaluation.harness import Reader
from koff_lightning.evaluation.scored_models import load_model

PROMPTS = ["the quick brown", "größere Füchse", "null"]
NEW = ["--max_new_tokens", "6", "--device", "cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_artifact(tmp_path_factory.mktemp("chat"), chat=True)


@pytest.fixture(scope="module")
def model(made):
    return load_decomposed(made.folder)


def greedy(model, prompt, *, tokenizer=None, special=True, **options):
    """What a model adds to one prompt."""
    tokenizer = tokenizer or model.tokenizer
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=special)["input_ids"]
    out = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=1, **options)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def koff(capsys, *argv):
    """Run a command that must succeed; its output."""
    assert main([str(word) for word in argv]) == 0
    said = capsys.readouterr()
    assert "generation flags" not in said.err, "transformers warns of settings that have no effect"
    return said.out


def test_one_prompt_is_streamed(made, model, capsys):
    out = koff(capsys, "generate", "--model", made.folder, "--domain", "law", "--prompt", PROMPTS[0], *NEW)
    assert out.strip() == (PROMPTS[0] + greedy(model, PROMPTS[0], domains="law")).strip()
    bare = koff(capsys, "generate", "--model", made.folder, "--prompt", PROMPTS[0], *NEW)
    assert bare.strip() == (PROMPTS[0] + greedy(model, PROMPTS[0])).strip() != out.strip()


@pytest.mark.parametrize("size", [1, 2, 8])
def test_prompts_in_batches_are_the_prompts_alone(made, model, capsys, tmp_path, size):
    expected = "".join(f"[fr] {prompt}{greedy(model, prompt, domains='fr')}\n\n" for prompt in PROMPTS)
    command = ["generate", "--model", made.folder, "--domain", "fr", "--batch-size", size, *NEW]
    given = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert koff(capsys, *command, *given) == expected
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS) + "\n", encoding="utf-8")
    assert koff(capsys, *command, "--file", tmp_path / "prompts.txt") == expected


def test_each_prompt_may_have_its_domain(made, model, capsys):
    pairs = list(zip(PROMPTS, ["law", "de", "law"], strict=True))
    given = [word for prompt, domain in pairs for word in (f"--prompt={prompt}", "--domain", domain)]
    expected = "".join(f"[{domain}] {prompt}{greedy(model, prompt, domains=domain)}\n\n" for prompt, domain in pairs)
    assert koff(capsys, "generate", "--model", made.folder, *given, *NEW) == expected


def test_sampling_follows_the_seed(made, capsys):
    command = ["generate", "--model", made.folder, "--prompt", "fox", "--temperature", "1.5", "--top-p", "0.9", *NEW]
    first, again, other = (koff(capsys, *command, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other


# What a generation_config.json may ask for, each of which changes what is generated here.
SETTINGS = {
    "sampling": {"do_sample": True, "temperature": 5.0, "top_p": 0.9, "top_k": 200},
    "repetition": {"repetition_penalty": 0.01},
    "forced": {"forced_eos_token_id": 7},
    "suppressed": {"suppress_tokens": list(range(2, 200))},
    "bad_words": {"bad_words_ids": [[token] for token in range(2, 200)]},
    "lengths": {"max_new_tokens": 1, "min_length": 30},
    "beams": {"num_beams": 3, "length_penalty": 5.0},
}


def with_settings(made, folder, settings):
    """A copy of an artifact whose backbone has these settings of its own."""
    folder = shutil.copytree(made.folder, folder)
    file = folder / "backbone/generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    manifest = json.loads((folder / "koff.json").read_text())
    manifest["files"] = describe_files(folder, "backbone")
    (folder / "koff.json").write_text(json.dumps(manifest))
    return folder


@pytest.mark.parametrize("kind", SETTINGS)
def test_greedy_is_greedy_whatever_the_models_own_settings_say(made, model, capsys, tmp_path, kind):
    folder = with_settings(made, tmp_path / "copy", SETTINGS[kind])
    due = greedy(model, PROMPTS[0], domains="law")
    assert greedy(load_decomposed(folder), PROMPTS[0], domains="law") == due
    out = koff(capsys, "generate", "--model", folder, "--domain", "law", "--prompt", PROMPTS[0], *NEW)
    assert out.strip() == (PROMPTS[0] + due).strip()


@pytest.mark.parametrize("kind", [kind for kind in SETTINGS if kind not in ("sampling", "lengths", "beams")])
def test_the_models_own_settings_can_be_asked_for(made, model, capsys, tmp_path, kind):
    folder = with_settings(made, tmp_path / "copy", SETTINGS[kind])
    command = ["generate", "--model", folder, "--domain", "law", "--prompt", PROMPTS[0], *NEW]
    out = koff(capsys, *command, "--generation-config", "model")
    assert out.strip() == (PROMPTS[0] + greedy(model, PROMPTS[0], domains="law", **SETTINGS[kind])).strip()
    assert out != koff(capsys, *command)


def test_the_models_own_sampling_can_be_asked_for(made, model, capsys, tmp_path):
    folder = with_settings(made, tmp_path / "copy", SETTINGS["sampling"])
    command = ["generate", "--model", folder, "--prompt", PROMPTS[0], *NEW, "--generation-config", "model"]
    first, again, other = (koff(capsys, *command, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other
    due = koff(capsys, "generate", "--model", made.folder, "--prompt", PROMPTS[0], *NEW)
    assert koff(capsys, *command, "--temperature", "0") == due, "what is given goes before it"


def test_the_models_own_beams_can_be_asked_for(made, capsys, tmp_path):
    """They have nothing to stream before their end; and what they give is text, whatever the settings say."""
    folder = with_settings(made, tmp_path / "copy", SETTINGS["beams"] | {"return_dict_in_generate": True})
    own = load_decomposed(folder)
    new = greedy(own, PROMPTS[0], domains="law", num_beams=3, length_penalty=5.0)
    command = ["generate", "--model", folder, "--domain", "law", "--prompt", PROMPTS[0], *NEW]
    assert koff(capsys, *command, "--generation-config", "model").strip() == f"[law] {PROMPTS[0]}{new}".strip()


@pytest.mark.parametrize(
    "settings",
    [{"stop_strings": 3}, {"dola_layers": "low"}, {"begin_suppress_tokens": "x"}, {"is_assistant": True}],
    ids=str,
)
def test_own_settings_that_cannot_be_used_are_one_line(made, capsys, tmp_path, settings):
    folder = with_settings(made, tmp_path / "copy", settings)
    command = ["generate", "--model", str(folder), "--prompt", PROMPTS[0], "--generation-config"]
    assert main([*command, "model"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("koff: the settings in the model's generation_config.json cannot be used (")
    assert main([*command, "none"]) == 0


def test_the_tokens_that_end_a_text_are_the_models_own(made, model, tmp_path):
    ids = model.tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    options = {"domains": "law", "max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    new = model.generate(ids, **options)[0, ids.shape[1] :].tolist()
    ends = load_decomposed(with_settings(made, tmp_path / "copy", {"eos_token_id": [1, new[2]]}))
    assert ends.generate(ids, **options)[0, ids.shape[1] :].tolist() == new[: new.index(new[2]) + 1]


def test_dense_models_and_checkpoints_are_read_greedily_too(made, tmp_path):
    """By the tasks of lm-eval and beside the decomposed model."""
    dense, settings = made.folder.parent / "dense", SETTINGS["repetition"]
    ids = load_decomposed(made.folder).tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    before, backup = (dense / "generation_config.json").read_text(), load_backbone(str(dense))
    due = {
        None: backup.generate(ids, **options),
        "law": load_decomposed(made.folder).generate(ids, domains="law", **options),
    }
    (dense / "generation_config.json").write_text(json.dumps(json.loads(before) | settings))
    try:
        module = tiny_decomposition(dense.parent, chat=True)
        assert torch.equal(Reader(module, "law").generate(ids, **options), due["law"])
        assert torch.equal(Reader(module, None, dense=True).generate(ids, **options), due[None])
        assert torch.equal(load_model(str(dense)).generate(ids, **options), due[None])
        export(module, tmp_path / "out", prove=False)
        assert settings.items() <= json.loads((tmp_path / "out/backbone/generation_config.json").read_text()).items()
    finally:
        (dense / "generation_config.json").write_text(before)


def test_equal_prompts_are_drawn_apart_in_all_batches(made, capsys, tmp_path):
    (tmp_path / "prompts").write_text("Der Fuchs\n" * 6)
    told = []
    for size in ("2", "1"):
        words = ["--temperature", "2", "--max_new_tokens", "12", "--batch_size", size, "--domain", "de"]
        assert main(["generate", "--model", str(made.folder), "--file", str(tmp_path / "prompts"), *words]) == 0
        told.append({text for text in capsys.readouterr().out.split("[de] ") if text.strip()})
    assert [len(texts) for texts in told] == [6, 6]


def test_comparison_shows_dense_pruned_and_koff_side_by_side(made, model, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    dense = load_backbone(str(made.folder.parent / "dense"))
    command = ["generate", "--model", made.folder, "--domain", "law", "--compare", "dense", *NEW]
    out = koff(capsys, *command, "--prompt", PROMPTS[0])
    assert f"[law] {PROMPTS[0]}" in out
    heads = [cell.strip() for cell in out.splitlines()[2].strip("┃").split("┃")]
    assert heads == ["dense", "pruned, no memory", "KOFF"]
    shown = [" ".join(text.split()) for text in out.splitlines()[4].strip("│").split("│")]
    expected = [
        greedy(dense, PROMPTS[0], tokenizer=model.tokenizer),
        greedy(model, PROMPTS[0]),
        greedy(model, PROMPTS[0], domains="law"),
    ]
    first = [text.strip().splitlines()[0].split() if text.strip() else [] for text in expected]
    assert [" ".join(words) for words in first] == shown
    assert len(set(expected)) == 3


def test_a_merged_artifact_has_no_column_without_memory(tmp_path, capsys):
    made = tiny_artifact(tmp_path, layout="merged")
    command = ["generate", "--model", made.folder, "--domain", "de", "--compare", "dense", "--prompt", "fox", *NEW]
    out = koff(capsys, *command)
    assert "KOFF" in out
    assert "no memory" not in out


def test_comparison_with_another_dense_model_is_refused(tmp_path, capsys):
    made = tiny_artifact(tmp_path)
    tiny_model("llama", seed=9, vocab_size=320).save_pretrained(tmp_path / "dense")
    command = ["generate", "--model", made.folder, "--domain", "de", "--compare", "dense", "--prompt", "fox", *NEW]
    assert main([str(word) for word in command]) == 2
    assert "is no longer the model that" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ([], "give either --prompt, as often as you like, or --file with one prompt per line"),
        (["--prompt", "a", "--file", "b"], "give either --prompt"),
        (["--file", "nowhere.txt"], "cannot read prompts from nowhere.txt: No such file or directory"),
        (["--prompt", "a", "--prompt", "b", "--domain", "de", "--domain", "fr", "--domain", "de"], "3 domains for 2"),
        (["--prompt", "a", "--domain", "it"], "has no memory for 'it'; it has de, fr, law"),
        (["--prompt", "a", "--compare", "dense"], "--compare shows what a memory changes: give its --domain"),
        (["--prompt", "a", "--generation-config", "file"], "generation_config must be 'none', 'model'; got 'file'."),
        (["--prompt", "a", "--compare", "dens"], "generate: compare must be 'dense' or null; got 'dens'."),
        (["--prompt", "a", "--max_new_tokens", "0"], "max_new_tokens must be at least 1; got 0"),
        (
            ["--prompt", "a", "--temperature", "-1"],
            "temperature must be 0 (most likely token) or a number from 1e-6 on",
        ),
        (["--prompt", "a", "--temperature", "1e-300"], "temperature must be 0 (most likely token) or a number from 1e"),
        (["--prompt", "a", "--seed", str(2**70)], f"seed must be from 0 to 2^63 - 1; got {2**70}"),
        (["--prompt", "a", "--device", "meta"], "device 'meta' cannot be used here: it holds no numbers"),
        (
            ["--prompt", "a", "--top_p", "0.5"],
            "top_p 0.5 is of sampling: give --temperature too (1.0, say), or leave it",
        ),
        (["--prompt", "a", "--max_new_tokens", "100000"], "100000 more are asked for, the model reads "),
        (["--prompt", "a", "--top_p", "0"], "top_p must lie in (0, 1]; got 0.0"),
        (["--prompt", "a", "--batch_size", "0"], "batch_size must be at least 1; got 0"),
        (["--prompt", "a", "--device", "gpu"], "device 'gpu' cannot be used here"),
        (["--prompt", "a", "--dtype", "int8"], "dtype must be a floating torch dtype"),
        (["--prompt", "a", "--temprature", "1"], "generate: no option 'temprature'. Did you mean 'temperature'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(made, capsys, argv, line):
    assert main(["generate", "--model", str(made.folder), *argv]) == 2
    said = capsys.readouterr()
    assert line in said.err.splitlines()[-1]
    assert said.out == ""


def test_an_empty_prompt_needs_a_token_before_it(tmp_path, capsys):
    made = tiny_artifact(tmp_path, bos=False)
    assert main(["generate", "--model", str(made.folder), "--prompt", "fox", "--prompt", "", *NEW]) == 2
    assert "prompt 2 is empty" in capsys.readouterr().err.splitlines()[-1]


def test_a_file_of_prompts_may_begin_with_the_mark_that_windows_writes(made, capsys, tmp_path):
    said = []
    for mark in ("", "\ufeff"):
        (tmp_path / "prompts.txt").write_text(f"{mark}the quick\n", encoding="utf-8")
        said.append(koff(capsys, "generate", "--model", made.folder, "--file", tmp_path / "prompts.txt", *NEW))
    assert said[0] == said[1]


def test_a_file_of_prompts_must_hold_some(made, capsys, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name, line in (("empty.txt", "holds no prompt"), ("bytes.txt", "cannot read prompts from")):
        assert main(["generate", "--model", str(made.folder), "--file", str(tmp_path / name)]) == 2
        assert line in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------------- chat


def talk(monkeypatch, capsys, made, lines, *argv):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    return koff(capsys, "chat", "--model", made.folder, *argv, *NEW, "--temperature", "0")


def test_a_talk_goes_on_and_domains_change(made, model, monkeypatch, capsys):
    lines = ["the fox", "/domain law", "die Füchse", "/domain", "/clear", "the fox"]
    lines += ["", "/help", "/domain it", "/exit", "never said"]
    out = talk(monkeypatch, capsys, made, lines, "--domain", "de", "--system", "Sei kurz.")
    opening = "system: Sei kurz.\nuser: the fox\nassistant:"
    first = greedy(model, opening, domains="de", special=False)  # a chat template brings its own first token
    later = f"{opening} {first}\nuser: die Füchse\nassistant:"
    second = greedy(model, later, domains="law", special=False)
    fresh = greedy(model, opening, special=False)
    assert "domains: de, fr, law. /domain NAME" in out
    answers = out.split("> ")
    assert answers[1].startswith(first)
    assert answers[3].startswith(second)
    assert answers[6].startswith(fresh)
    assert out.count("not understood") == 1
    assert out.count("/help says this") == 3, "at the start, by /help, and after what is not understood"
    assert answers[8].startswith("domains: de, fr, law. /domain NAME changes the memory")
    assert out.count("> ") == 10, "nothing is asked after /exit"


def test_a_talk_ends_with_its_input(made, monkeypatch, capsys):
    assert talk(monkeypatch, capsys, made, []).endswith("no memory> ")


@pytest.mark.parametrize("argv", [(), ("--generation-config", "model")])
def test_a_talk_longer_than_the_models_context_is_told_and_goes_on(made, model, monkeypatch, capsys, argv):
    """Beyond its positions a model computes nonsense."""
    room = model.backbone.config.max_position_embeddings
    short = len(model.tokenizer("user: \nassistant:")["input_ids"])
    word = len(model.tokenizer(" fox", add_special_tokens=False)["input_ids"])
    fits = "fox" + " fox" * ((room - short) // word - 2)
    lines = ["fox" + " fox" * room, fits, fits, "/clear", "the fox"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    command = ["chat", "--model", made.folder, *argv, "--temperature", "0", "--device", "cpu"]
    assert main([str(word) for word in [*command, "--max_new_tokens", str(room)]]) == 0
    said = capsys.readouterr()
    assert "exceeded" not in said.err, "transformers says so of positions that are not there"
    answers = said.out.split("> ")[1:]
    assert [f"the model reads {room} with its answer: /clear" in answer for answer in answers[:3]] == [
        True,
        False,
        True,
    ]
    assert answers[4].startswith(greedy(model, "user: the fox\nassistant:", special=False))


def test_without_a_chat_template_there_is_no_chat(tmp_path, capsys):
    made = tiny_artifact(tmp_path)
    assert main(["chat", "--model", str(made.folder)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"has no chat template, so this is no chat model: koff generate --model {made.folder} --prompt" in line


def test_chat_with_an_unknown_domain(made, capsys):
    assert main(["chat", "--model", str(made.folder), "--domain", "it"]) == 2
    assert "has no memory for 'it'; it has de, fr, law" in capsys.readouterr().err.splitlines()[-1]


def test_the_seed_of_a_talk(made, monkeypatch, capsys):
    def sampled(seed):
        monkeypatch.setattr("sys.stdin", io.StringIO("the fox\n"))
        return koff(capsys, "chat", "--model", made.folder, "--temperature", "2", "--seed", seed, *NEW)

    assert sampled(1) == sampled(1) != sampled(2)
    assert torch.initial_seed() == 2


def test_a_talk_is_greedy_unless_something_is_asked_for(made, monkeypatch, capsys, tmp_path):
    def said(folder, *argv):
        monkeypatch.setattr("sys.stdin", io.StringIO("the fox\n"))
        return koff(capsys, "chat", "--model", folder, *NEW, *argv)

    folder = with_settings(made, tmp_path / "copy", SETTINGS["sampling"] | SETTINGS["repetition"])
    assert said(folder) == said(made.folder) == said(folder, "--temperature", "0")
    assert said(folder, "--generation-config", "model") != said(folder)


def test_a_prompt_is_utf_8_whatever_the_locale():
    """Where the locale has ASCII alone Python hands the bytes of a word on as surrogates."""
    typed = "Где 狐狸".encode().decode("ascii", "surrogateescape")
    assert _prompts([typed, "Где 狐狸"], None) == ["Где 狐狸"] * 2
    latin = b"caf\xe9".decode("utf-8", "surrogateescape")
    assert _prompts([latin], None) == [latin], "bytes that are no UTF-8 are told by whoever reads them"
