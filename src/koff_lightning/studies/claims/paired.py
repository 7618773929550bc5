"""Bits per byte of several runs on the same drawn documents, so that what is compared is paired."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from koff_lightning.studies import bootstrap
from koff_lightning.studies.bootstrap import Sample
from koff_lightning.studies.claims.arms import Run
from koff_lightning.support.errors import KoffError

Done = dict[Run, dict[str, Any]]
SAME_DENSE = 0.002  # by which rounding moves a sum of nats, at most


class PairedDraws:
    """Resampled bits per byte of runs, on the same drawn documents.

    Args:
        done: Their results.
        arms: Shown arm -> the arms whose runs hold it, and as what.
        inside: Of tokens with as many before them as the last class of `metrics.CONTEXT` has, in bits per token (which
            for paired figures of one tokenizer is as good), and of documents and domains that have such tokens.

    Raises:
        KoffError: Two runs were scored on different documents.
    """

    def __init__(
        self,
        done: Done,
        arms: Mapping[str, tuple[tuple[str, ...], str]],
        inside: bool = False,
    ) -> None:
        scored = {run: result["documents"] for run, result in done.items() if result["documents"]}
        self._place: dict[tuple[str, int], int] = {}
        tables: list[dict[str, Any]] = []
        sizes: dict[str, Any] | None = None
        _refuse_other_dense(scored)
        read = {run: _inside(documents) if inside else documents for run, documents in scored.items()}
        for run, documents in ((run, documents) for run, documents in read.items() if documents):
            size = {domain: row["bytes"] for domain, row in documents.items()}
            if sizes not in (None, size):
                raise KoffError(f"{run.name} was scored on other documents than the other runs: give another --out")
            sizes = size
            for arm, (holders, figure) in arms.items():
                known = run.arm not in holders or (arm, run.seed) in self._place
                if not known and all(figure in row["nats"] for row in documents.values()):
                    self._place[arm, run.seed] = len(tables)
                    tables.append({domain: row["nats"][figure] for domain, row in documents.items()})
        if sizes and tables:
            domains = list(sizes)
            nats = [np.array([table[domain] for table in tables]) for domain in domains]
            num_bytes = [np.array(sizes[domain], dtype=float) for domain in domains]
            self._measured, self._draws = bootstrap.bits_per_byte(nats, num_bytes)

    def of(self, arms: tuple[str, ...]) -> Sample:
        """The arms over the seeds that they share."""
        seeds = sorted(set.intersection(*({s for a, s in self._place if a == arm} for arm in arms)))
        if not seeds:
            return Sample({}, {}, [])
        places = np.array([[self._place[arm, seed] for seed in seeds] for arm in arms])  # [A, S]
        drawn = bootstrap.over_seeds(self._draws[:, places], self._measured[places])  # [R, A]
        measured = self._measured[places].mean(1)
        return Sample(dict(zip(arms, measured, strict=True)), dict(zip(arms, drawn.T, strict=True)), seeds)


def _refuse_other_dense(scored: Mapping[Run, Mapping[str, Any]]) -> None:
    """The dense model is the same in all runs, so it has the same figures, whatever the rounding of a machine.

    Raises:
        KoffError: It has not: a run was scored in other rows.
    """
    first: tuple[Run, float] | None = None
    for run, documents in scored.items():
        if all("dense" in row["nats"] for row in documents.values()):
            total = sum(sum(row["nats"]["dense"]) for row in documents.values())
            first = first or (run, total)
            if abs(total - first[1]) > SAME_DENSE * abs(first[1]):
                raise KoffError(
                    f"the dense model scores {total:,.0f} nats in {run.name} and {first[1]:,.0f} in {first[0].name}: "
                    "they read the text otherwise (rows of earlier releases began otherwise), or in another precision; "
                    "give another --out, or remove the folders of one kind and run again"
                )


def _inside(documents: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The same in the form of whole documents: for bytes the tokens of the last class of context, and their nats."""
    found = {}
    for domain, row in documents.items():
        tokens = row["tokens"][-1] if "tokens" in row else []  # runs of older releases did not count them
        kept = [number for number, count in enumerate(tokens) if count]
        nats = {arm: [classes[-1][i] for i in kept] for arm, classes in row.get("nats_by_context", {}).items()}
        if kept:
            found[domain] = {"bytes": [tokens[i] for i in kept], "nats": nats}
    return found
