"""What other engines can take: promises about transformers and PEFT are tried, and docs/engines.md says the same."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_artifact import left_padded, tiny_artifact, tiny_decomposition
from transformers import AutoModelForCausalLM

from koff_lightning import KoffError
from koff_lightning.artifact import engines
from koff_lightning.artifact.folder import read_manifest
from koff_lightning.artifact.layouts import LAYOUTS
from koff_lightning.artifact.to_gguf import to_gguf
from koff_lightning.serving.vllm.engine import RANKS
from koff_lightning.specs.memories import KVSpec, LoraSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "engines"))
import record
import table

# peft asks a model under the name of an older transformers
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "docs" / "engines.md", ROOT / "docs" / "results" / "engines.md"]


def made(folder, layout, **options):
    return tiny_artifact(folder, layout=layout, uniform=layout == "uniform", **options)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_promised_of_transformers_and_peft_is_tried_and_holds(tmp_path, monkeypatch, layout):
    tried = []
    for case, trial in engines._TRIALS.items():
        monkeypatch.setitem(engines._TRIALS, case, lambda *a, case=case, trial=trial: (tried.append(case), trial(*a)))
    found = engines.check(made(tmp_path, layout, kv=None).folder, ["hf", "peft"])
    form = {"ragged": "ragged", "merged": "ragged", "deci": "deci"}.get(layout, "plain")
    for engine, answers in found.items():
        for part, answer in answers.items():
            assert answer == engines.RULES[engine][part][form]
            assert ((engine, part) in tried) == (answer[0] == "yes")
    assert set(found["hf"]) == ({"backbone"} if layout == "merged" else {"backbone", "lora"})


@pytest.mark.parametrize("layout", ["ragged", "uniform", "masked"])
def test_peft_gives_our_logits_without_slots(tmp_path, layout):
    case = made(tmp_path, layout, kv=None)
    ids, mask = left_padded()
    backbone = AutoModelForCausalLM.from_pretrained(case.folder / "backbone")
    theirs = PeftModel.from_pretrained(backbone, case.folder / "memories" / "fr")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = theirs(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    case.module.gates.set(case.module.gates.kept.float()[None])
    gap = (logits - case.gated(ids, mask, ["fr"] * len(ids))) * mask[..., None]
    assert gap.abs().max() < 1e-5


def test_a_trial_that_fails_says_so(tmp_path):
    folder = made(tmp_path, "ragged", kv=None).folder
    file = folder / "memories" / "de" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    answer, why = engines.check(folder, ["peft"])["peft"]["lora"]
    assert answer == "no" and why.startswith("tried, and failed: ") and "\n" not in why


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_an_adapter_that_does_not_fit_fails(tmp_path):
    """To peft alone it would be a warning, and the adapter would do nothing."""
    folder = made(tmp_path, "ragged", kv=None).folder
    config = folder / "memories" / "de" / "adapter_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"target_modules": [*content["target_modules"], "lm_head"]}))
    answer, why = engines.check(folder, ["peft"])["peft"]["lora"]
    assert answer == "no" and "missing adapter keys" in why


def test_weights_that_do_not_fit_fail(tmp_path, monkeypatch):
    folder = made(tmp_path, "uniform").folder
    monkeypatch.setattr(engines, "verify", read_manifest)
    config = folder / "backbone" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 3}))
    answer, why = engines.check(folder, ["hf"])["hf"]["backbone"]
    assert answer == "no" and "do not fit" in why


def test_answers_follow_the_artifact(tmp_path):
    def kv(layout):
        return engines.check(made(tmp_path / layout, layout).folder, ["peft"])["peft"]["kv"]

    assert kv("uniform")[0] == "yes"
    answer, why = kv("ragged")
    assert answer == "no" and "equally many key-value heads" in why
    found = engines.check(tmp_path / "ragged" / "ragged", ["vllm", "gguf"])
    assert {engine: answers["backbone"][0] for engine, answers in found.items()} == {"vllm": "yes", "gguf": "yes"}
    folder = made(tmp_path / "deci", "deci").folder
    found = engines.check(folder)
    assert {engine: answers["backbone"][0] for engine, answers in found.items()} == {
        "hf": "no",
        "peft": "no",
        "vllm": "yes",
        "sglang": "not run",
        "gguf": "yes",
    }
    assert {engine for engine, answers in found.items() if answers["kv"][0] == "yes"} == {"vllm", "gguf"}
    assert len(engines.text(found).splitlines()) == 15


def test_what_llama_cpp_has_no_architecture_for(tmp_path):
    answers = engines.check(made(tmp_path, "ragged", family="qwen3").folder, ["gguf"])["gguf"]
    assert all(answer == "no" and "has no q/k norms" in why for answer, why in answers.values())


def test_a_tokenizer_that_llama_cpp_does_not_have(tmp_path):
    """What `koff convert gguf` refuses is not promised."""
    tiny_decomposition(tmp_path)  # writes dense/
    file = tmp_path / "dense" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Punctuation"}, content["pre_tokenizer"]],
    }
    file.write_text(json.dumps(content))
    folder = tiny_artifact(tmp_path).folder
    with pytest.raises(KoffError, match="llama.cpp has no name for this tokenizer's pre-tokenizer"):
        to_gguf(folder, tmp_path / "out")
    answers = engines.check(folder, ["gguf"])["gguf"]
    assert {answer for answer, _ in answers.values()} == {"no"}
    assert "no name for this tokenizer's pre-tokenizer" in answers["backbone"][1]


def test_what_of_gemma_other_engines_take(tmp_path):
    found = engines.check(made(tmp_path, "masked", family="gemma3_text").folder, ["hf", "peft", "gguf"])
    answers = {engine: {part: answer for part, (answer, _) in parts.items()} for engine, parts in found.items()}
    assert answers == {
        "hf": {"backbone": "yes", "lora": "yes", "kv": "no"},
        "peft": {"backbone": "yes", "lora": "yes", "kv": "no"},
        "gguf": {"backbone": "no", "lora": "no", "kv": "no"},
    }
    assert "sliding window of 8 leaves it behind" in found["peft"]["kv"][1]


def test_every_engine_has_an_answer_for_every_part_and_form():
    for engine, parts in engines.RULES.items():
        assert set(parts) == set(engines.PARTS)
        for part, forms in parts.items():
            assert set(forms) == set(engines.FORMS)
            allowed = {"not run"} if engine == "sglang" else {"yes", "no"}
            assert {answer for answer, _ in forms.values()} <= allowed, (engine, part)


def test_what_the_plugin_of_vllm_refuses_is_said(tmp_path):
    """As its engine and its connector refuse it when they are started: tests/test_vllm.py."""

    def found(name, **options):
        answers = engines.check(tiny_artifact(tmp_path / name, **options).folder, ["vllm"])["vllm"]
        return {part: why for part, (answer, why) in answers.items() if answer == "no"}

    assert found("plain", kv=KVSpec(slots=4)) == {}
    assert set(found("some", kv=KVSpec(slots=4, layers=[1]))) == {"kv"}
    moving = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    kept = found("moving", kv=None, changes={"rope_parameters": moving})
    assert set(kept) == {"backbone", "lora"} and "as rope type 'dynamic' has them do" in kept["lora"]
    two = found("two", family="gemma3_text")
    assert set(two) == {"backbone", "lora", "kv"} and all(
        "those of 'gemma3_text' have two" in why for why in two.values()
    )
    assert found("rank", lora=LoraSpec(rank=513), kv=None) == {
        "lora": "it takes LoRA up to rank 512, a memory here has 513"
    }
    assert RANKS[-1] == engines.VLLM_RANK


def test_biases_by_compensation_are_refused_for_vllm(tmp_path):
    folder = tiny_artifact(tmp_path).folder
    config = folder / "backbone" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"koff_biases": ["mlp.down_proj"]}))
    manifest = read_manifest(folder)
    for part in engines.PARTS:
        assert engines._answer("vllm", part, folder, manifest)[0] == "no", part


def test_names_of_engines():
    assert engines.names("hf, vllm") == ["hf", "vllm"]
    assert engines.names("") == list(engines.ENGINES)
    with pytest.raises(KoffError, match="no engine 'vlm' to check. Did you mean 'vllm'. Known: hf, peft"):
        engines.names("vlm")


def test_the_pages_say_what_the_record_of_runs_gives():
    pages = {page: page.read_text(encoding="utf-8") for page in PAGES}
    assert table.pages(record.read()) == pages, "python recipes/engines/table.py writes them"


def test_every_layout_was_run_and_no_cell_is_empty():
    runs = record.read()
    assert set(record.LAYOUTS) == set(LAYOUTS)
    for row in table.overview(runs).splitlines()[2:]:
        cells = [cell.strip() for cell in row.strip("|").split("|")[1:]]
        assert len(cells) == len(record.ENGINES)
        assert all("](results/engines.md#" in cell or cell == table.NOT_RUN for cell in cells), row
    for engine in ("koff-lightning", "transformers", "PEFT", "llama.cpp"):
        assert {run["layout"] for run in runs if run["engine"] == engine} >= set(LAYOUTS), engine
    gaps = [
        came["gap"] for run in runs for came in run.get("arms", {}).values() if came.get("equal") == came.get("of", -1)
    ]
    assert gaps and max(gaps) < 1e-4


def test_what_inspect_promises_was_run():
    """A promise of a form is kept by a run of one of its layouts, or its condition is in the promise."""
    arms = {"backbone": "bare", "lora": "lora", "kv": "kv"}
    for engine, parts in engines.RULES.items():
        for part, forms in parts.items():
            for form, (answer, why) in forms.items():
                layouts = re.findall(r"`(\w+)`", engines.FORMS[form])
                runs = [
                    run
                    for run in record.read()
                    if run["engine"] == engines.ENGINES[engine] and run["layout"] in layouts
                ]
                computed = any(arms[part] in table.computed(run) for run in runs)
                if answer == "yes":
                    assert computed or ", if all layers" in why, (engine, part, form)
                else:
                    assert not computed, f"{engine}, {part}, {form}: a run of the record says yes, RULES says {answer}"


def a_run(**changes):
    run = {"run": "x", "engine": "vLLM", "layout": "deci", "compared": "a with b", "command": "c", "processor": "p"}
    return run | {"date": "2026-11-28", "versions": {}, "arms": {"bare": {"equal": 2, "of": 3, "gap": 0.1}}} | changes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"engine": "llama"}, "no engine 'llama'"),
        ({"layout": "round"}, "no layout 'round'"),
        ({"arms": {"kv": {"equal": 4, "of": 3}}}, "arm 'kv' cannot be"),
        ({"arms": {"slots": {"refused": "x"}}}, "arm 'slots' cannot be"),
        ({"arms": {"kv": {"equal": 0, "of": 0}}}, "arm 'kv' cannot be"),
        ({"not_run": "no time"}, "`arms`, or `not_run`"),
        ({"date": "yesterday"}, "isoformat"),
        ({"note": "x"}, "unknown 'note'"),
    ],
)
def test_a_record_that_says_nothing_is_refused(changes, says):
    record.check(a_run())
    with pytest.raises(ValueError, match=says):
        record.check(a_run(**changes))


def test_a_run_takes_the_place_of_the_last_of_its_name(tmp_path):
    path = tmp_path / "runs.json"
    about = {"engine": "vLLM", "compared": "a", "command": "b", "layout": "deci"}
    record.write(path, "z", **about, not_run="no time")
    record.write(path, "a", **about, not_run="no time")
    record.write(path, "z", **about, arms={"bare": {"equal": 3, "of": 3, "gap": 1e-6}, "kv": {"refused": "what | is"}})
    runs = record.read(path)
    assert [run["run"] for run in runs] == ["a", "z"]
    assert "bare: equal; KV: no ([z](results/engines.md#z))" in table.overview(runs)
    assert '| <a id="z"></a>z | 3 of 3, 1.0e-06 |  | refused: what / is |  | `b` |' in table.details(runs)
    assert "vLLM (bare everywhere)" in table.short(runs) and "SGLang" in table.short(runs).splitlines()[2]


def test_the_short_form_says_where():
    def came(layout, **arms):
        return a_run(layout=layout, arms={a: {"equal": n, "of": 3} for a, n in arms.items()})

    runs = [
        came("ragged", bare=3, lora=3, kv=0),
        came("masked", bare=3, lora=3, kv=3),
        came("deci", bare=3, lora=2, kv=0),
    ]
    said = "bare everywhere, LoRA except in `deci`, KV in `masked`"
    assert f"vLLM ({said})" in table.short(runs).splitlines()[1]
    whole = [came(layout, bare=3, kv=3) for layout in LAYOUTS]
    assert "vLLM" in table.short(whole).splitlines()[0]
    assert "vLLM" in table.short(whole[1:]).splitlines()[1], "one layout was not run"
    assert "vLLM" in table.short([came("deci", bare=2)]).splitlines()[2]
