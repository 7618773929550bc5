"""The tasks that ship tell a trained model from random weights, in every bundled domain."""

from pathlib import Path

import pytest
import torch
from scipy.stats import binomtest
from transformers import AutoModelForCausalLM

from koff_lightning.backbone import load_config, load_tokenizer
from koff_lightning.evaluation.harness import KoffLM, answers, quiet
from koff_lightning.evaluation.lm_tasks import load_tasks

CHANCE = 0.25  # four choices, all as long
DOMAINS = ("en", "de", "fr", "es", "ru", "zh", "python")


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
