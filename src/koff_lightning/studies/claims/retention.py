"""What KOFF keeps of the dense model's accuracy on tasks, above chance.

    R = (accuracy - chance) / (accuracy of the dense model - chance),   each the mean over domains

A suite is a task for every domain: `koff_cloze_{domain}`. Each is read under its domain's memory, with memories off and
by the dense model. Answers are kept one by one, so that intervals pair the arms over the same questions.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from koff_lightning.evaluation.lm_tasks import Loaded, load_tasks
from koff_lightning.studies import bootstrap
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import write_atomically
from koff_lightning.training.checkpoints import newest_checkpoint

# In the folder of a run: suite -> "chance", "questions" (a digest of them) and arms -> domain -> what is right, 0 or 1
ANSWERS = "answers.json"
SCORED = ("dense", "koff", "memory_off")
ROWS = 16  # at a time
Suites = Mapping[str, Mapping[str, Loaded]]  # suite -> domain -> its task
Answers = dict[str, dict[str, dict[str, Any]]]


def load_suites(names: str, domains: Sequence[str]) -> Suites:
    """Tasks by suite and domain.

    Args:
        names: Suites with commas, `{domain}` standing for the name of a domain.
        domains: Domains of the runs.

    Raises:
        KoffError: No such task or no data, or one that has no chance to compare with.
    """
    suites: dict[str, dict[str, Loaded]] = {name.strip(): {} for name in names.split(",") if name.strip()}
    for suite, tasks in suites.items() or {names: {}}.items():
        if "{domain}" not in suite:
            raise KoffError(f"tasks must name a task for every domain, as koff_cloze_{{domain}}; got {suite!r}")
        for domain in domains:
            tasks[domain] = load_tasks([suite.replace("{domain}", domain)])
            if odd := [name for name, t in tasks[domain]["tasks"].items() if t.OUTPUT_TYPE != "multiple_choice"]:
                raise KoffError(f"task {odd[0]!r} is no choice between answers, so that retention has no chance level")
    return suites


def answer(run: Path, suites: Suites) -> Answers:
    """Score a run's last checkpoint on the suites that it has not been scored on, and keep the answers beside it.

    Answers to other questions, as an earlier release of a task had them, are not those of this suite.

    Raises:
        KoffError: It has no checkpoint, or log-likelihoods that are no numbers.
    """
    from koff_lightning.evaluation import harness

    path = run / ANSWERS
    known: Answers = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if due := {name: tasks for name, tasks in suites.items() if not _answered(known.get(name, {}), tasks)}:
        if (checkpoint := newest_checkpoint([run])) is None:
            raise KoffError(f"{run} has no checkpoint to ask: remove this folder and run again with checkpoints")
        model = harness.load_model(str(checkpoint))
        for suite, tasks in due.items():
            known[suite] = {"chance": {domain: _chance(loaded) for domain, loaded in tasks.items()}}
            known[suite]["questions"] = {domain: _digest(loaded) for domain, loaded in tasks.items()}
            for arm in SCORED:
                known[suite][arm] = {}
                for domain, loaded in tasks.items():
                    lm = harness.KoffLM(model, domain if arm == "koff" else None, arm == "dense", batch_size=ROWS)
                    known[suite][arm][domain] = harness.answers(lm, loaded)
        write_atomically(path, json.dumps(known))
    return {suite: known[suite] for suite in suites}


def _answered(known: Mapping[str, Any], tasks: Mapping[str, Loaded]) -> bool:
    """Whether these are answers to the questions of the tasks; those of earlier releases tell only how many."""
    told, right = known.get("questions", {}), known.get("dense", {})
    return all(
        len(right.get(domain, ())) == sum(len(task.eval_docs) for task in loaded["tasks"].values())
        and (domain not in told or told[domain] == _digest(loaded))
        for domain, loaded in tasks.items()
    )


def _digest(loaded: Loaded) -> str:
    """SHA-256 of the questions of a domain."""
    docs = {name: list(task.eval_docs) for name, task in sorted(loaded["tasks"].items())}
    return hashlib.sha256(json.dumps(docs, default=str, sort_keys=True).encode()).hexdigest()


def _chance(loaded: Loaded) -> float:
    """Accuracy of a blind choice."""
    shares = [1 / len(task.doc_to_choice(doc)) for task in loaded["tasks"].values() for doc in task.eval_docs]
    return sum(shares) / len(shares)


def figures(runs: Sequence[Answers]) -> list[dict[str, Any]]:
    """Accuracy and retention by suite, with 95 % intervals paired over questions and seeds.

    Args:
        runs: The answers of each seed.
    """
    return [{"suite": suite} | _figures([run[suite] for run in runs]) for suite in runs[0]] if runs else []


def _figures(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    domains = list(runs[0]["chance"])
    chance = sum(runs[0]["chance"].values()) / len(domains)
    right = [np.array([run[arm][d] for arm in SCORED for run in runs], dtype=float) for d in domains]  # [A S, D]
    ones = [np.ones(part.shape[1]) for part in right]
    measured, drawn = bootstrap.bits_per_byte([part * math.log(2) for part in right], ones)  # shares of right answers
    accuracy = measured.reshape(len(SCORED), len(runs))
    draws = bootstrap.over_seeds(drawn.reshape(len(drawn), *accuracy.shape), accuracy)  # [R, A]
    able = np.quantile(draws[:, 0], 0.025) > chance  # else there is nothing to keep, and a quotient says nothing
    return {
        "chance": chance,
        "questions": int(sum(map(len, ones))),
        "accuracy": dict(zip(SCORED, accuracy.tolist(), strict=True)),
        "retention": _kept(accuracy.mean(1) - chance, draws - chance) if able else None,
    }


def _kept(above: bootstrap.Array, draws: bootstrap.Array) -> dict[str, dict[str, float]]:
    """Retention of every arm but the first, which is the dense model, from what arms [A] have above chance."""
    quotients = bootstrap.quotient(draws, draws[:, :1])  # a dense model at chance or below has nothing to keep
    kept = {arm: bootstrap.interval(above[i] / above[0], quotients[:, i]) for i, arm in enumerate(SCORED) if i}
    return {arm: asdict(found) for arm, found in kept.items()}
