"""The tasks that ship: all names exist, averages count suites alike, and a trained model stands out in each domain."""

from pathlib import Path
from types import SimpleNamespace

import lm_eval.tasks
import lm_eval.tasks._factory
import pytest
import torch
from lm_eval.tasks import TaskManager
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM

from koff_lightning.evaluation.harness import KoffLM, answers
from koff_lightning.evaluation.lm_tasks import FOLDER, load_tasks, quiet
from koff_lightning.loading import load_config, load_tokenizer

CHANCE = 0.25  # four choices, all as long
DOMAINS = ("en", "de", "fr", "es", "ru", "zh", "python")
BENCHMARKS = ("hellaswag", "piqa", "winogrande", "arc", "super_glue", "openbookqa")  # lm-eval's folders
BENCHMARKS += ("belebele", "xnli", "xcopa", "xstorycloze", "global_mmlu", "bigbench/multiple_choice", "mmlu/default")


@pytest.fixture(scope="module")
def index():
    """Name -> what lm-eval finds under it, of our tasks and those of its own that ours name."""
    theirs = Path(lm_eval.tasks.__file__).parent
    paths = [FOLDER, *(theirs / name for name in BENCHMARKS)]
    return TaskManager(include_path=[str(path) for path in paths], include_defaults=False).task_index


def children(entry):
    """What a group or a tag names; nothing for a task."""
    named = (entry.cfg or {}).get("task", []) if entry.kind.name == "GROUP" else sorted(entry.tags or ())
    return [child if isinstance(child, str) else child.get("group", child.get("task")) for child in named]


def leaves(index, name):
    """The tasks that a group comes to."""
    entry = index[name]
    if entry.kind.name == "TASK":
        return [name]
    return [leaf for child in children(entry) for leaf in leaves(index, child)]


@pytest.mark.parametrize(
    ("suite", "number"),  # belebele + xnli + xcopa + xstorycloze + subsets of global_mmlu
    [
        ("koff_general", 7),
        ("koff_paper_bbl", 18),
        ("koff_paper", 57 + 18),
        ("koff_multilingual_en", 1 + 1 + 0 + 1 + 6),
        ("koff_multilingual_de", 1 + 1 + 0 + 0 + 6),
        ("koff_multilingual_fr", 1 + 1 + 0 + 0 + 6),
        ("koff_multilingual_es", 1 + 1 + 0 + 1 + 6),
        ("koff_multilingual_ru", 1 + 1 + 0 + 1 + 57),  # only the full one has Russian
        ("koff_multilingual_zh", 1 + 1 + 1 + 1 + 6),
        ("koff_multilingual", 9 + 8 + 8 + 9 + 60 + 10),
    ],
)
def test_every_benchmark_that_a_suite_names_is_in_lm_eval(index, suite, number):
    found = leaves(index, suite)
    assert len(set(found)) == len(found) == number
    assert "global_mmlu_ru" not in index, "lm-eval has a small Russian one now: take it, as for the other languages"


def test_the_papers_mmlu_has_five_examples_and_its_bigbench_what_the_tasks_say(index, monkeypatch):
    """Overrides of a group within a group are lm-eval's, and a release may lose them."""
    shots = {}

    class Noted(lm_eval.tasks._factory.ConfigurableTask):
        def __init__(self, config):
            shots[config["task"]] = config.get("num_fewshot")
            self._config = SimpleNamespace(task=config["task"])

        task_name = property(lambda self: self._config.task)

    monkeypatch.setattr(lm_eval.tasks._factory, "ConfigurableTask", Noted)
    lm_eval.tasks._factory.TaskFactory().build(index["koff_paper"], registry=index)
    mmlu = {name: number for name, number in shots.items() if name.startswith("mmlu_")}
    assert len(mmlu) == 57 and set(mmlu.values()) == {5}
    assert len(shots) == 57 + 18 and 5 not in {shots[name] for name in shots.keys() - mmlu.keys()}


def test_an_average_is_only_given_over_suites_that_count_alike(index):
    """lm-eval averages over the single tasks below a group, so that a suite of 57 would outweigh one of 1."""
    ours = {entry.name: entry for entry in index.values() if entry.yaml_path and entry.yaml_path.is_relative_to(FOLDER)}
    averaged = [entry for entry in ours.values() if (entry.cfg or {}).get("aggregate_metric_list")]
    assert {"koff_general", "koff_cloze"} <= {entry.name for entry in averaged}
    for entry in averaged:
        assert all(index[child].kind.name == "TASK" for child in children(entry)), entry.name


@pytest.fixture(scope="module")
def models():
    """koff-tiny, and the same architecture with weights as they are before training (seed 0)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blank = AutoModelForCausalLM.from_config(load_config("koff-tiny")).eval()
    tokenizer = load_tokenizer("koff-tiny")
    readers = {"trained": "koff-tiny", "blank": blank}
    return {name: KoffLM(model, tokenizer=tokenizer, batch_size=16, device="cpu") for name, model in readers.items()}


def right(models, suite, domain, limit=None):
    """Model -> 0 or 1 for each question."""
    task = f"koff_{suite}_{domain}"
    with quiet():
        tasks = load_tasks([task])
    made = tasks["tasks"][task]
    if limit:
        made.dataset = {"test": made.dataset["test"].select(range(limit))}
    return {name: answers(model, tasks) for name, model in models.items()}


def interval(found):
    """Wilson's, of 95 %."""
    return binomtest(int(sum(found)), len(found)).proportion_ci(method="wilson")


@pytest.mark.parametrize(("suite", "domain"), [("cloze", "de"), ("continuation", "python")])
def test_a_trained_model_is_above_chance_and_random_weights_are_not(models, suite, domain):
    found = right(models, suite, domain, limit=40)
    assert interval(found["trained"]).low > CHANCE
    assert interval(found["blank"]).low < CHANCE < interval(found["blank"]).high


def test_the_docs_tell_how_far_the_cloze_gets_without_a_model(monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(root / "recipes" / "koff_tiny")
    from copying import accuracy

    rows = [line.strip("| ").split(" | ") for line in (root / "docs/results/tasks.md").read_text("utf-8").splitlines()]
    told = {row[0]: row for row in rows if row[0] in DOMAINS}
    assert told.keys() == {*DOMAINS}
    for domain, row in told.items():
        assert row[5] == f"{accuracy(domain):.3f}"
        assert CHANCE < float(row[5]) < float(row[7].split(" to ")[0]), "the interval of koff-tiny lies above it"


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["cloze", "continuation"])
def test_every_domain_separates_trained_from_random_weights(models, suite):
    by_domain = {domain: right(models, suite, domain) for domain in DOMAINS}
    for domain, found in by_domain.items():
        assert interval(found["trained"]).low > CHANCE, domain
        assert sum(found["trained"]) / len(found["trained"]) > interval(found["blank"]).high, domain
    blank = [answer for found in by_domain.values() for answer in found["blank"]]
    assert interval(blank).low < CHANCE < interval(blank).high, "nothing but the text gives the answer away"
