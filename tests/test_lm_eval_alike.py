"""`koff lm-eval` on an artifact, its checkpoint and dense models: the same texts, the same scores, the same files."""

import argparse
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lm_eval._cli.run import Run
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_artifact import tiny_artifact, tiny_decomposition
from tiny_run import RandomText, tiny_trainer
from tiny_tasks import NEW, PROMPTS, UNTIL, toy_tasks
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from koff_lightning import KoffError, KOFFModule, KVSpec, LoraSpec, SparsitySpec
from koff_lightning.artifact.export import export
from koff_lightning.artifact.to_gguf import to_gguf
from koff_lightning.callbacks import LMEval
from koff_lightning.cli import main
from koff_lightning.commands.lm_eval_cli import _parser
from koff_lightning.evaluation import lm_tasks
from koff_lightning.evaluation.harness import KoffLM, answers, score
from koff_lightning.evaluation.lm_scores import CLASH
from koff_lightning.evaluation.lm_tasks import quiet

DOMAINS = ["en", "law"]


@pytest.fixture(autouse=True)
def no_questions(monkeypatch):
    """lm-eval asks pip and the compiler about the machine: seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A dense folder, a checkpoint over it whose memories say something else each, its artifact, and toy tasks."""
    folder = tmp_path_factory.mktemp("alike")
    tiny_decomposition(folder)  # writes dense/
    sizes = {"lora": LoraSpec(rank=2), "kv": KVSpec(slots=4), "sparsity": SparsitySpec(target=0.2, min_channels=4)}
    module = KOFFModule(str(folder / "dense"), domains=DOMAINS, **sizes)
    run = tiny_trainer(folder, [], steps=4)
    run.fit(module, RandomText())
    torch.manual_seed(0)
    for tensor in (*module.model.memories.lora_parameters(), *module.model.memories.kv_parameters()):
        nn.init.normal_(tensor, std=0.3)
    run.save_checkpoint(folder / "run.ckpt")
    export(module.model.eval(), folder / "artifact", prove=False)
    toy_tasks(folder / "tasks")
    tokenizer = AutoTokenizer.from_pretrained(folder / "dense")
    return SimpleNamespace(folder=folder, module=module, tokenizer=tokenizer)


def lm_eval(place, model, task, out, *options):
    """Run the command; by column what stands in its files: results, and the samples of the task."""
    words = ["--model", str(place.folder / model), "--tasks", task, "--include_path", str(place.folder / "tasks")]
    assert main(["lm-eval", *words, "--output_path", str(out), "--log_samples", "--device=cpu", *options]) == 0
    found = {}
    for column in out.iterdir():
        (results,), (samples,) = column.rglob("results_*.json"), column.rglob(f"samples_{task}_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        found[column.name] = json.loads(results.read_text()), sorted(rows, key=lambda row: row["doc_id"])
    return found


@torch.no_grad()
def written(place, column, prompt, ends=UNTIL):
    """Greedy text of one row, by a whole forward for each token; `column` is a domain, `none` or `dense`."""
    module, ids = place.module, place.tokenizer(prompt, return_tensors="pt").input_ids
    module.model.gates.set(None if column == "dense" else module.model.hard_mask().float()[None])
    module.model.memories.activate([column if column in DOMAINS else None])
    start = ids.shape[1]
    for _ in range(NEW):
        token = module.model.backbone(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
        if int(token) == place.tokenizer.eos_token_id:
            break
    text = place.tokenizer.decode(ids[0, start:], skip_special_tokens=True)
    return min([text, *(text.split(end)[0] for end in ends)], key=len)


@pytest.mark.parametrize("model", ["artifact", "run.ckpt"])
def test_what_is_written_in_batches_is_what_each_row_writes_alone(place, tmp_path, model):
    """Prompts of unequal length go in one left-padded batch, stop at strings, and read the column's memory."""
    found = lm_eval(place, model, "toy_write", tmp_path, "--domains=all", "--memory-off", "--dense", "--batch_size=4")
    assert set(found) == {*DOMAINS, "none", "dense"}
    assert {results["config"]["model_dtype"] for results, _ in found.values()} == {"torch.float32"}
    sizes = {column: results["config"]["model_num_parameters"] for column, (results, _) in found.items()}
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(place.folder / "dense").parameters())
    kept = AutoModelForCausalLM.from_pretrained(place.folder / "artifact" / "backbone").num_parameters()
    read = whole if model == "run.ckpt" else kept  # a checkpoint's mask lies over the whole backbone
    assert kept < whole
    assert sizes == {"dense": whole} | dict.fromkeys([*DOMAINS, "none"], read)
    texts = {}
    for column, (_, rows) in found.items():
        texts[column] = [row["filtered_resps"][0] for row in rows]
        assert texts[column] == [written(place, column, prompt) for prompt in PROMPTS], column
    assert len({tuple(column) for column in texts.values()}) == 4, "every way of reading says something else"
    assert len({len(place.tokenizer(prompt).input_ids) for prompt in PROMPTS}) > 1
    assert any(end in written(place, column, prompt, ()) for column in found for end in UNTIL for prompt in PROMPTS)


def test_the_command_shows_the_parts_of_a_group_that_has_no_average(place, tmp_path, capsys):
    words = ["--model", str(place.folder / "dense"), "--include_path", str(place.folder / "tasks"), "--device=cpu"]
    assert main(["lm-eval", *words, "--tasks", "toy_parts", "--output_path", str(tmp_path)]) == 0
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if "toy_" in line]
    assert rows == [["toy_choose", "acc"]]
    (results,) = tmp_path.rglob("results_*.json")
    assert "groups" not in json.loads(results.read_text())


def test_artifact_and_checkpoint_and_dense_model_score_alike(place, tmp_path, capsys):
    scores, heads = {}, {}
    for model, ways in (
        ("artifact", ["--domains=all", "--memory-off"]),
        ("run.ckpt", ["--domains=all", "--dense"]),
        ("dense", []),
    ):
        found = lm_eval(place, model, "toy_choose", tmp_path / model, *ways, "--num_fewshot=2", "--batch_size=3")
        heads[model] = next(line for line in capsys.readouterr().out.splitlines() if "metric" in line).split()[2:]
        scores |= {(model, column): likelihoods(rows) for column, (_, rows) in found.items()}
        assert {results["n-shot"]["toy_choose"] for results, _ in found.values()} == {2}
    for domain in DOMAINS:
        assert scores["artifact", domain] == pytest.approx(scores["run.ckpt", domain], abs=1e-4)
    assert scores["run.ckpt", "dense"] == scores["dense", "dense"]
    assert scores["artifact", "en"] != pytest.approx(scores["artifact", "law"], abs=1e-2)
    assert heads == {"artifact": [*DOMAINS, "none"], "run.ckpt": [*DOMAINS, "dense"], "dense": ["dense"]}


def likelihoods(rows):
    """Of every choice of every sample."""
    return [float(choice[0]) for row in rows for (choice,) in row["resps"]]


@pytest.mark.parametrize("shots", [0, 3])
def test_examples_are_those_of_stock_hflm(place, shots):
    model = AutoModelForCausalLM.from_pretrained(place.folder / "dense")
    with quiet():
        stock = HFLM(model, tokenizer=place.tokenizer, batch_size=2)
        stock.check_finite = lambda: None
        tasks = lm_tasks.load_tasks(["toy_choose"], str(place.folder / "tasks"))
        ours = score(KoffLM(str(place.folder / "dense"), batch_size=2, device="cpu"), tasks, num_fewshot=shots)
        assert ours == score(stock, tasks, num_fewshot=shots)
        asked = {instance.args[0] for instance in tasks["tasks"]["toy_choose"].instances}
        manager = TaskManager(include_path=str(place.folder / "tasks"), include_defaults=False)
        theirs = simple_evaluate(stock, tasks=["toy_choose"], num_fewshot=shots, task_manager=manager)
    assert asked == {words[0] for row in theirs["samples"]["toy_choose"] for words in row["arguments"]}
    assert {question.count("\n\n") for question in asked} == {shots}
    with quiet():  # also where single answers are asked for, of a task that says itself how many examples it has
        tasks = lm_tasks.load_tasks(["toy_choose"], str(place.folder / "tasks"))
        tasks["tasks"]["toy_choose"].set_config("num_fewshot", shots)
        right = answers(KoffLM(str(place.folder / "dense"), batch_size=2, device="cpu"), tasks)
    assert asked == {instance.args[0] for instance in tasks["tasks"]["toy_choose"].instances}
    assert right == [row["acc"] for row in sorted(theirs["samples"]["toy_choose"], key=lambda row: row["doc_id"])]


def test_every_beam_of_a_row_reads_its_memory(place, tmp_path):
    found = {}
    for model in ("artifact", "run.ckpt"):
        words = ["--domains=all", "--batch_size=3", "--gen_kwargs", "num_beams=2,do_sample=False"]
        columns = lm_eval(place, model, "toy_write", tmp_path / model, *words)
        found[model] = {domain: [row["filtered_resps"] for row in rows] for domain, (_, rows) in columns.items()}
    assert found["artifact"] == found["run.ckpt"]
    assert found["artifact"]["en"] != found["artifact"]["law"]


@pytest.mark.parametrize("size", ["none", "0", "-1", "auto:", "2.5"])
def test_a_batch_size_that_is_none_is_one_line(place, capsys, size):
    assert main(["lm-eval", f"--model={place.folder / 'dense'}", "--tasks=koff_cloze_en", f"--batch_size={size}"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == f"koff: lm-eval: batch_size must be a positive number or auto; got '{size}'"


def refused(place, capsys, *options, model="dense", task="toy_choose"):
    """The last line of a command that scores nothing."""
    words = [
        "lm-eval",
        f"--model={place.folder / model if '/' not in model else model}",
        f"--tasks={task}",
        "--device=cpu",
    ]
    assert main([*words, f"--include_path={place.folder / 'tasks'}", *options]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_what_lm_eval_would_refuse_with_a_traceback_is_one_line(place, capsys, monkeypatch):
    said = refused(place, capsys, "--apply_chat_template")
    assert said.startswith("koff: lm-eval: the tokenizer of ")
    assert "has no chat template: leave --apply_chat_template out" in said
    assert "num_fewshot must be 0 or more; got -1" in refused(place, capsys, "--num_fewshot=-1")
    assert "max_batch_size must be a positive number" in refused(place, capsys, "--max_batch_size=0")
    said = refused(place, capsys, "--output_path=out.json")
    assert said == "koff: lm-eval: --output_path out.json: give a folder, since each column has files of its own"
    assert "show_config" in refused(place, capsys, "--show_config")
    for model in ("dense", "artifact"):
        said = refused(place, capsys, "--backbone=elsewhere", model=model)
        assert "only a checkpoint is read over a backbone" in said and "leave backbone out" in said
    unsafe = (place.folder / "tasks" / "toy_choose.yaml").read_text().replace("toy_choose", "toy_unsafe")
    (place.folder / "unsafe").mkdir()
    (place.folder / "unsafe" / "toy.py").write_bytes((place.folder / "tasks" / "toy.py").read_bytes())
    (place.folder / "unsafe" / "unsafe.yaml").write_text(unsafe + "unsafe_code: true\n")
    path = str(place.folder / "unsafe" / "unsafe.yaml")
    assert "task 'toy_unsafe' runs code that the model writes: only `koff" in refused(place, capsys, task=path)
    advice = "smaller --batch_size, or another --device"
    monkeypatch.setattr(KoffLM, "_loglikelihood_tokens", lambda *_, **__: torch.empty(1 << 60))
    said = refused(place, capsys)
    assert said.startswith("koff: not enough memory: ") and said.endswith(advice)

    def cublas(*_, **__):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(KoffLM, "_loglikelihood_tokens", cublas)
    said = refused(place, capsys)
    assert said.startswith("koff: not enough memory: CUDA error: CUBLAS_STATUS_ALLOC_FAILED") and said.endswith(advice)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--metadata", "{a"], "Invalid JSON: {a."),
        (["--gen_kwargs", "{a"], "Invalid JSON: {a."),
        (["--seed", "x"], "argument --seed: invalid value: 'x'"),
        (["--domain", "en", "law"], "'law' stands alone, wanted is an option with a name"),
        (["run"], "'run' stands alone, wanted is an option with a name"),
    ],
)
def test_words_that_lm_evals_parser_cannot_read(words, message, capsys):
    assert main(["lm-eval", "--model=koff-tiny", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"koff: lm-eval: {message}") and len(said.splitlines()) == 1


def test_the_folder_of_a_run_is_told_where_its_artifact_is(place, capsys):
    said = refused(place, capsys, model=f"{place.folder}/")
    assert said == f"koff: {place.folder} is a folder without koff.json, so it is no artifact: give " + str(
        place.folder / "artifact"
    )


def test_a_model_in_a_gguf_file_is_scored_with_the_tokenizer_in_it(place, tmp_path):
    with quiet():
        tasks = lm_tasks.load_tasks(["toy_choose"], str(place.folder / "tasks"))
        tiny_artifact(place.folder, "llama", "uniform", uniform=True)
        to_gguf(place.folder / "uniform", tmp_path / "gguf", "f32")
        folder, file = (
            score(KoffLM(str(path), batch_size=4, device="cpu"), tasks)
            for path in (place.folder / "uniform" / "backbone", tmp_path / "gguf" / "model.gguf")
        )
    assert file == folder


@pytest.mark.parametrize("option", ["output_path", "use_cache"])
def test_a_place_that_nothing_can_be_written_into_is_told_before_the_model_is_loaded(place, capsys, tmp_path, option):
    (tmp_path / "file").write_text("")
    said = refused(place, capsys, f"--{option}={tmp_path}/file/results/of", model=str(tmp_path))
    where = tmp_path / "file" / "results" / ("of" if option == "output_path" else "")
    assert said.startswith(
        f"koff: lm-eval: --{option}: cannot write into {where} (Not a directory)".replace("/ (", " (")
    )


def test_results_that_could_not_be_written_are_told_after_the_scores(place, capsys, tmp_path, monkeypatch):
    whole = Path.write_text

    def full(path, *args, **options):
        if path.name.startswith("results_"):
            raise OSError(28, "No space left on device")
        return whole(path, *args, **options)

    monkeypatch.setattr(Path, "write_text", full)
    words = ["--tasks=toy_choose", f"--include_path={place.folder / 'tasks'}", "--device=cpu", "--limit=1"]
    assert main(["lm-eval", f"--model={place.folder / 'dense'}", *words, f"--output_path={tmp_path}"]) == 2
    said = capsys.readouterr()
    assert "toy_choose" in said.out
    assert said.err.strip().splitlines()[-1] == (
        f"koff: lm-eval: not all files below {tmp_path} could be written (OSError(28, 'No space left on device')): the "
        "scores stand above and nowhere else"
    )


@pytest.mark.parametrize("tasks", ["toy_choose,koff_cloze_en", ["toy_choose", "koff_cloze_en"]])
def test_tasks_of_a_config_and_the_first_question_as_it_is_asked(place, capsys, tmp_path, tasks):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"tasks": tasks, "limit": 1, "num_fewshot": 1}))
    words = ["--config", str(tmp_path / "c.yaml"), f"--include_path={place.folder / 'tasks'}", "--device=cpu"]
    assert main(["lm-eval", f"--model={place.folder / 'artifact'}", *words, "--domain=all", "--write_out"]) == 0
    said = capsys.readouterr().out
    assert said.count("toy_choose, as the model is asked:\n") == 1, "once, for all columns"
    assert f"\n\n{PROMPTS[0]}\ntoy_choose, right answer (or its number): 0\n" in said
    assert main(["lm-eval", f"--model={place.folder / 'dense'}"]) == 2
    assert "give --model (artifact, checkpoint or dense model) and --tasks" in capsys.readouterr().err


def test_a_pattern_of_our_names_needs_no_index_of_lm_evals(monkeypatch):
    index = lm_tasks._index
    monkeypatch.setattr(lm_tasks, "_index", lambda *a: pytest.fail("it reads all of lm-eval's") if a[2] else index(*a))
    assert len(lm_tasks.load_tasks(["koff_cloze_*"])["tasks"]) == 7


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ('{"toy_choose": [0, 9999]}', "'toy_choose' has the samples 0 to 3; got 9999"),
        ('{"toy_choose": [-1]}', "'toy_choose' has the samples 0 to 3; got -1"),
        ('{"toy_choose": ["2"]}', "'toy_choose' has the samples 0 to 3; got '2'"),
        ('{"toy_choose": []}', "'toy_choose' must have a list of one sample at least; got []"),
        ('{"toy_chose": [1]}', "no task 'toy_chose' is asked for. Did you mean 'toy_choose'?"),
        ("{}", 'samples must name tasks and their samples, as {"koff_cloze_de": [0, 7]}, or a file that does; got {}'),
        ("nowhere.json", "or a file that does; got 'nowhere.json'"),
    ],
)
def test_samples_that_are_not_there_are_one_line_before_the_model_is_loaded(place, capsys, tmp_path, samples, message):
    said = refused(place, capsys, f"--samples={samples}", model=str(tmp_path))
    assert said.startswith("koff: samples") and said.endswith(message)


def test_samples_of_a_group(place, capsys, tmp_path):
    said = refused(place, capsys, '--samples={"koff_cloze": [1]}', task="koff_cloze", model=str(tmp_path))
    assert said == "koff: samples: 'koff_cloze' is a group: name its tasks"


def test_samples_are_those_asked_for(place, tmp_path):
    found = lm_eval(place, "dense", "toy_choose", tmp_path, '--samples={"toy_choose": [3, 1]}')
    assert len(found["dense"][1]) == 2


@pytest.mark.parametrize(("option", "column"), [("--memory-off", "none"), ("--dense", "dense")])
def test_a_domain_named_as_another_column_is_refused_as_in_a_run(place, capsys, monkeypatch, option, column):
    monkeypatch.setattr("koff_lightning.evaluation.scored_models.domains_of", lambda _: [*DOMAINS, column])
    said = refused(place, capsys, "--domain=en", option, model="artifact")
    assert said == f"koff: lm-eval: {column}: {CLASH}"
    with pytest.raises(KoffError, match=rf"lm_eval\.dense: {CLASH}"):
        LMEval(dense=True).setup(None, SimpleNamespace(domains=["dense"], arms=["dense"]), "fit")


def test_more_measurements_of_the_batch_size_than_requests(place, tmp_path):
    found = lm_eval(place, "dense", "toy_choose", tmp_path, "--batch_size=auto:8", "--limit=1")
    assert len(likelihoods(found["dense"][1])) == 3


def test_the_docs_name_every_option_of_lm_eval_that_is_left_out():
    stock = Run.create(argparse.ArgumentParser().add_subparsers())._parser
    words = {option for option in stock._option_string_actions if option.startswith("--")}
    missing = words - set(_parser()._option_string_actions)
    assert {"--verbosity", "--check_integrity", "--trust_remote_code"} <= missing
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert not [option for option in missing if f"`{option}`" not in page]


def test_help_says_our_batch_size(capsys):
    assert main(["lm-eval", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "or integer (default: 8; of --config 1)" in said


def test_a_cache_gives_no_nan_and_is_of_one_model(place, tmp_path, capsys, monkeypatch):
    cache = f"--use_cache={tmp_path / 'cache'}"
    first = lm_eval(place, "dense", "toy_choose", tmp_path / "a", cache)
    other = AutoModelForCausalLM.from_pretrained(place.folder / "dense")
    other.lm_head.weight.data.mul_(3)
    for name in ("other", "broken"):
        other.save_pretrained(place.folder / name)
        place.tokenizer.save_pretrained(place.folder / name)
        for weight in (other.lm_head.weight, other.model.norm.weight):  # finite as they are stored; no logit is
            weight.data.fill_(3e19)
    second = lm_eval(place, "other", "toy_choose", tmp_path / "b", cache)
    assert likelihoods(second["dense"][1]) != pytest.approx(likelihoods(first["dense"][1]), abs=1e-2)
    assert "12 log-likelihoods are not finite" in refused(place, capsys, cache, model="broken")
    said = refused(place, capsys, cache, model="broken")
    assert (
        "12 log-likelihoods in the cache " in said and "are not finite, so the scores mean nothing: remove it" in said
    )
    monkeypatch.setattr(KoffLM, "_loglikelihood_tokens", lambda *_, **__: 1 / 0)
    again = lm_eval(place, "dense", "toy_choose", tmp_path / "c", cache)
    assert likelihoods(again["dense"][1]) == likelihoods(first["dense"][1]), "from the cache"
    assert len(list(tmp_path.glob("cache_dense_*_rank0.db"))) == 3


def test_a_cache_of_a_name_of_the_hub_is_of_its_commit(place, tmp_path, monkeypatch):
    """A hub in the cache of this machine, whose main moves from one commit to another with other weights."""
    hub = tmp_path / "models--some--model"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (hub / "refs").mkdir(parents=True)
    model = AutoModelForCausalLM.from_pretrained(place.folder / "dense")
    found = []
    for turn, commit in enumerate(("a" * 40, "b" * 40, "a" * 40)):
        if turn < 2:
            model.save_pretrained(hub / "snapshots" / commit)
            place.tokenizer.save_pretrained(hub / "snapshots" / commit)
            model.lm_head.weight.data.mul_(3)
        (hub / "refs" / "main").write_text(commit)
        words = ["--model=some/model", "--tasks=toy_choose", f"--include_path={place.folder / 'tasks'}", "--device=cpu"]
        out = tmp_path / str(turn)
        words += [f"--output_path={out}", "--log_samples", f"--use_cache={tmp_path / 'cache'}"]
        assert main(["lm-eval", *words]) == 0
        (samples,) = out.rglob("samples_toy_choose_*.jsonl")
        rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").splitlines()]
        found.append(likelihoods(sorted(rows, key=lambda row: row["doc_id"])))
    assert found[1] != pytest.approx(found[0], abs=1e-2)
    assert found[2] == found[0], "from the cache"
    assert len(list(tmp_path.glob("cache_dense_*_rank0.db"))) == 2


def test_batch_size_auto_gives_the_same_scores(place, tmp_path):
    by_size = {}
    for size in ("1", "auto:2"):
        found = lm_eval(place, "artifact", "toy_choose", tmp_path / size[:4], "--domain=en", f"--batch_size={size}")
        by_size[size] = likelihoods(found["en"][1])
    assert by_size["1"] == pytest.approx(by_size["auto:2"], abs=1e-4)


@pytest.mark.parametrize("model", ["artifact", "run.ckpt"])
def test_whole_texts_are_read_in_the_rows_of_the_run(place, tmp_path, capsys, model):
    """And nothing else is: questions have as much context as the model allows."""
    ran = {"model": {}, "data": {"seq_len": 24, "open_with_start": True}}
    if model == "artifact":
        export(place.module.model.eval(), tmp_path / model, config=ran, prove=False)
    else:
        shutil.copy(place.folder / model, tmp_path / model)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(ran))
    own = ["--limit=2", "--device=cpu", "--log_samples", "--memory_off", "--dense"]

    def asked(out, tasks, *words):
        words = [*own, f"--tasks={tasks}", f"--output_path={tmp_path / out}", *words]
        command = ["lm-eval", "--model", str(tmp_path / model), *words]
        assert main(command) == 0
        said = {}
        for path in sorted((tmp_path / out).rglob("samples_*.jsonl")):
            rows = map(json.loads, path.read_text().splitlines())
            said[path.relative_to(tmp_path / out).parts[0], path.name.split("_")[2]] = [r["resps"] for r in rows]
        return said

    both = "koff_bpb_en,koff_cloze_en"
    as_run, said = asked("rows", both), capsys.readouterr().out
    assert "whole texts are read 24 tokens at a time, as its run read them; --max_length N reads otherwise" in said
    questions = [("dense", "cloze"), ("none", "cloze")]
    texts = [("dense", "bpb"), ("none", "bpb")]
    assert asked("24", "koff_bpb_en", "--max_length=24") == {key: as_run[key] for key in texts}
    by_model = asked("most", both, f"--max_length={place.module.model.backbone.config.max_position_embeddings}")
    assert "at a time" not in capsys.readouterr().out
    assert [key for key in as_run if as_run[key] == by_model[key]] == questions


@pytest.mark.parametrize("said", [{"open_with_start": True}, {"open_with_start": False}, {}])
def test_windows_begin_as_the_rows_of_the_run_did(place, tmp_path, said):
    """Those of a run that does not say it are of an earlier release; one window reads the same in either case."""
    config = {"model": {}, "data": {"seq_len": 24} | said}
    export(place.module.model.eval(), tmp_path / "artifact", config=config, prove=False)
    texts = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in (" a" * 100, "a b")]
    found = {}
    for batch_size in (4, "auto"):  # the two ways in which windows are scored
        for wanted in (None, True, False):
            options = {"batch_size": batch_size, "max_batch_size": 4, "device": "cpu", "open_with_start": wanted}
            lm = KoffLM(str(tmp_path / "artifact"), "en", **options)
            found[batch_size, wanted] = lm.loglikelihood_rolling(texts, disable_tqdm=True)
    own = bool(said.get("open_with_start"))
    for batch_size in (4, "auto"):
        assert found[batch_size, None] == found[batch_size, own]
        assert found[batch_size, True][0] != pytest.approx(found[batch_size, False][0], rel=1e-4)
        assert found[batch_size, True][1] == pytest.approx(found[batch_size, False][1], rel=1e-5)
    assert found[4, True] == pytest.approx(found["auto", True], rel=1e-5), "also of text that repeats itself"


def test_an_answer_that_is_longer_than_what_is_read_is_refused(place, capsys):
    wanted = r"an answer of \d+ tokens is longer than the 4 that are read at once: raise max_length"
    assert main(["lm-eval", "--model=koff-tiny", "--tasks=koff_cloze_en", "--device=cpu", "--max_length=4"]) == 2
    assert re.search(wanted, capsys.readouterr().err)


def test_answers_that_leave_no_room_for_a_question_are_refused(tmp_path, capsys):
    rows = [{"q": f"What is {n}?", "a": "b", "c": ["b", ""]} for n in range(4)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "d.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    long = task | {"task": "toy_long", "output_type": "generate_until", "doc_to_target": "{{a}}"}
    long |= {"generation_kwargs": {"until": ["."], "max_gen_toks": 2048}, "metric_list": [{"metric": "exact_match"}]}
    none = task | {"task": "toy_none", "output_type": "multiple_choice", "doc_to_target": 0, "doc_to_choice": "{{c}}"}
    none |= {"target_delimiter": "", "metric_list": [{"metric": "acc"}]}
    for one in (long, none):
        (tmp_path / f"{one['task']}.yaml").write_text(json.dumps(one))
    command = ["lm-eval", "--model=koff-tiny", "--device=cpu", f"--include_path={tmp_path}"]
    assert main([*command, "--tasks=toy_long"]) == 2
    wanted = (
        r"answers have 2048 tokens, and question and answer together have 1024 here: give --gen_kwargs max_gen_toks="
    )
    assert re.search(wanted, capsys.readouterr().err)
    assert main([*command, "--tasks=toy_none"]) == 2
    assert re.search(r"task 'toy_none' cannot be made of its data \(IndexError: ", capsys.readouterr().err)


def test_text_is_read_in_windows_of_the_length_that_was_asked_for(place, tmp_path, capsys):
    ways = {16: ["--max_length=16"], 64: ["--max_length=64"], None: []}
    cache = f"--use_cache={tmp_path / 'cache'}"
    found = {
        length: lm_eval(place, "artifact", "koff_bpb_en", tmp_path / str(length), "--limit=2", cache, *words)["none"]
        for length, words in ways.items()
    }
    said = {
        length: [float(sample["filtered_resps"][0]) for sample in samples] for length, (_, samples) in found.items()
    }
    texts = [SimpleNamespace(args=(sample["doc"]["text"],), task_name=None) for sample in found[16][1]]
    for length in ways:
        lm = KoffLM(str(place.folder / "artifact"), device="cpu", max_length=length)
        assert said[length] == pytest.approx(lm.loglikelihood_rolling(texts, disable_tqdm=True), rel=1e-6)
    assert len({round(score, 3) for scores in said.values() for score in scores}) == 6, "and no cache is of another"
    assert found[16][0]["config"]["model_args"]["max_length"] == 16
    most = place.module.model.backbone.config.max_position_embeddings
    for length in ("1", "-4", str(most + 1)):
        wanted = f"--max_length must be at least 2 and at most {most}, what the model allows; got {length}"
        assert wanted in refused(place, capsys, f"--max_length={length}")
