"""What the arms of `koff claims` say: figures, gap closure, verdicts; as claims.json, claims.md and plots."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from koff_lightning.reports import plots, results
from koff_lightning.studies import bootstrap
from koff_lightning.studies.claims import general, verdicts
from koff_lightning.studies.claims import text as claims_text
from koff_lightning.studies.claims.arms import AFTER, ARMS, FREE, LEARNED, METHODS, Run
from koff_lightning.studies.claims.paired import Done, PairedDraws
from koff_lightning.studies.claims.runs import Failure, failed
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import write_atomically
from koff_lightning.support.versions import versions

SHOWN = (
    "dense",
    "dense_memory",
    "koff",
    "memory_off",
    "swapped",
    *(arm for arm in ARMS if arm not in ("koff", "dense_memory")),
)


def read(folder: Path, runs: Sequence[Run], failures: Sequence[Failure]) -> Done:
    """results.json of every run that has one, with `documents` and `general_documents` from the files of those names.

    Raises:
        KoffError: A file that cannot be read.
    """
    without = {failure.run for failure in failures}
    done: Done = {}
    for run in runs:
        if run not in without:
            path = folder / run.name / "results.json"
            try:
                done[run] = json.loads(path.read_text(encoding="utf-8"))
                for name in ("documents", "general_documents"):
                    path = path.with_name(f"{name}.json")
                    done[run][name] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
            except (OSError, ValueError) as error:
                raise KoffError(f"cannot read {path}: {error}; remove its folder and run again") from error
    return done


def without_scores(folder: Path, done: Done) -> list[Failure]:
    """Runs whose model has no finite score on some domain's text; they are taken out of `done` and told like failed."""
    broken = [run for run, result in done.items() if result["mean"]["koff_bpb"] is None]
    said = (
        "its held-out scores are not all numbers (nan or infinite), so it has no mean: results.json tells in which "
        "domains. To run it again, with lower rates or in another precision, remove its folder"
    )
    for run in broken:
        del done[run]
    return [failed(run, folder, "scores", said) for run in broken]


def source(arm: str) -> tuple[tuple[str, ...], str]:
    """The arms whose runs hold a shown arm, of each seed the first that is there, and as what."""
    if arm == "dense":
        return (*LEARNED, *AFTER), arm  # all of them score it, and koff runs before the others
    return (("koff",), arm) if arm in FREE else ((arm,), "koff")


def by_seed(done: Done, arm: str, share: float, domain: str | None = None) -> dict[int, float]:
    """Bits per byte of a shown arm by seed; the mean over domains, or one domain's."""
    holders, figure = source(arm)
    found: dict[int, float] = {}
    for run, result in done.items():
        if run.arm in holders and run.sparsity == share:
            row = result["mean"] if domain is None else result["domains"][domain]
            if (value := row[f"{figure}_bpb"]) is not None:
                found.setdefault(run.seed, value)
    return dict(sorted(found.items()))


def best_one_shot(done: Done) -> str | None:
    """The one-shot mask with the fewest bits per byte after its memories; without such runs, as it is."""
    for arms in (AFTER, {method: method for method in METHODS}):
        means: dict[str, list[float]] = {}
        for run, result in done.items():
            if run.arm in arms:
                means.setdefault(arms[run.arm], []).append(result["mean"]["koff_bpb"])
        if means:
            return min(means, key=lambda method: statistics.fmean(means[method]))
    return None


def figures(done: Done, arm: str, share: float) -> dict[str, Any] | None:
    """What the report says of a shown arm at one sparsity; None where there is no run of it."""
    values = by_seed(done, arm, share)
    if not values:
        return None
    dense, alone = by_seed(done, "dense", share), by_seed(done, "no_memory", share)
    one = [result for run, result in done.items() if run.arm in source(arm)[0] and run.sparsity == share]
    sizes = [_size(arm, result["parameters"]) for result in one]
    own_off = {
        run.seed: r["mean"]["memory_off_bpb"] for run, r in done.items() if (run.arm, run.sparsity) == (arm, share)
    }
    with_memory = arm not in (*FREE, *METHODS, "dense_memory", "no_memory")
    return {
        "arm": arm,
        "sparsity": share,
        "seeds": list(values),
        "bpb": list(values.values()),
        "mean": statistics.fmean(values.values()),
        "sd": statistics.stdev(values.values()) if len(values) > 1 else None,
        "against_dense": _mean([values[s] / dense[s] - 1 for s in values if s in dense]),
        "gc": _mean([_gc(own_off[s], values[s], dense[s]) for s in values if s in dense]) if with_memory else None,
        "gc_star": _mean([_gc(alone[s], values[s], dense[s]) for s in values if s in dense and s in alone])
        if with_memory
        else None,
        "removed": 0.0 if "dense" in arm else _mean([result["sparsity"]["body"] for result in one]),
        **{key: _mean([size[key] for size in sizes]) for key in ("active", "stored", "net")},
        "seconds": _mean([result.get("seconds") for result in one]) if arm not in FREE else None,
        "tokens": _mean([result.get("tokens") for result in one]) if arm not in FREE else None,
    }


def _size(arm: str, parameters: Mapping[str, Any]) -> dict[str, float]:
    """Parameters in use with one memory, stored with all, and what is in use against the dense model."""
    total = parameters["dense_total"]
    active, stored = {
        "dense": (total, total),
        "memory_off": (parameters["backbone_kept"],) * 2,
    }.get(arm, (parameters["active"], parameters["stored"]))
    return {"active": active, "stored": stored, "net": active / total - 1}


def _gc(off: float | None, on: float, dense: float) -> float | None:
    """Gap closure; none where there is no gap to close, or the mask alone has no score."""
    return (off - on) / (off - dense) if off is not None and off > dense else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def gap_closure(paired: PairedDraws) -> dict[str, dict[str, float] | None]:
    """GC and GC* of KOFF with 95 % intervals; None where the gap itself is not clear of zero."""
    found: dict[str, dict[str, float] | None] = {}
    for name, off in (("gc", "memory_off"), ("gc_star", "no_memory")):
        sample = paired.of((off, "koff", "dense"))
        found[name] = None
        if sample.seeds:
            x, y = sample.measured, sample.draws
            gap = bootstrap.interval(x[off] - x["dense"], y[off] - y["dense"])
            if gap.low > 0:
                value = (x[off] - x["koff"]) / (x[off] - x["dense"])
                draws = bootstrap.quotient(y[off] - y["koff"], y[off] - y["dense"])
                found[name] = asdict(bootstrap.interval(value, draws))
    return found


def write(folder: Path, done: Done, failures: Sequence[Failure], about: Mapping[str, Any]) -> dict[str, Any]:
    """Write claims.json, claims.md and plots/ from what is there; returns the report.

    Args:
        folder: Where to.
        done: What was measured, at least one run of the first sparsity.
        failures: Runs that came to nothing.
        about: `command`, `best_one_shot`, `equal_memories` and `retention`, which go into the report as they are.

    Raises:
        KoffError: The disk did not take it.
    """
    shares = list(dict.fromkeys(run.sparsity for run in done))
    first = {run: result for run, result in done.items() if run.sparsity == shares[0]}
    shown = {arm: source(arm) for arm in SHOWN}
    paired, within = (PairedDraws(first, shown, inside=inside) for inside in (False, True))
    judged = verdicts.judge(lambda part: (within if part.inside else paired).of(part.arms))
    rows = [row for share in shares for arm in SHOWN if (row := figures(done, arm, share))]
    one = next(iter(done.values()))
    domains = {
        name: {
            arm: list(by_seed(done, arm, shares[0], name).values()) for arm in SHOWN if by_seed(done, arm, shares[0])
        }
        for name in one["domains"]
    }
    report = {
        **about,
        "sparsities": shares,
        "seeds": sorted({run.seed for run in done}),
        "backbone": one["config"]["model"]["backbone"],
        "arms": rows,
        "domains": domains,
        "gap_closure": gap_closure(paired),
        "general": general.figures(first),
        "verdicts": [_verdict(verdict) for verdict in judged],
        "level": verdicts.LEVEL,
        "failures": [{"run": failure.run.name, "tail": failure.tail} for failure in failures],
        "versions": versions(),
    }
    write_atomically(folder / "claims.json", results.as_json(report))
    write_atomically(folder / "claims.md", claims_text.markdown(report))
    plots.save(plots.arms_compared(rows, shares[0]), folder / "plots", "arms")
    plots.save(plots.quality_by_sparsity(rows), folder / "plots", "sparsity")
    return report


def show(folder: Path, report: Mapping[str, Any]) -> None:
    """Print what a written report says, and where it is."""
    print(claims_text.summary(report))
    print(f"wrote {folder / 'claims.md'}, {folder / 'claims.json'} and {folder / 'plots'}")


def _verdict(verdict: verdicts.Verdict) -> dict[str, Any]:
    findings = [
        {
            "figure": finding.part.words,
            "must_be": "above" if finding.part.above else "below",
            "bound": finding.part.bound,
            "found": finding.found and asdict(finding.found),
            "verdict": finding.word,
            "why": finding.why,
        }
        for finding in verdict.findings
    ]
    return {"name": verdict.name, "claim": verdict.claim, "verdict": verdict.word, "parts": findings}
