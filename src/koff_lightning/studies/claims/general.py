"""What pruning costs on text that belongs to no domain: the backbone bare, and under a memory of whichever domain.

Domains adapt a mask that is learned on them alone, so what the bare backbone has kept is read better where none of
them had a say (the paper reads it off MMLU, section 4).
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from koff_lightning.studies.bootstrap import interval
from koff_lightning.studies.claims.paired import Done, PairedDraws

READ = {"bare": "memory_off", "any memory": "swapped"}  # how an arm is read, and as what a run scores it
ALONE = "no_memory"  # the arm against which bare backbones are held


def figures(done: Done) -> dict[str, Any] | None:
    """Bits per byte of general text, mean over texts, with 95 % intervals paired over documents and seeds.

    Args:
        done: Results of runs of one sparsity, with `general_documents`.

    Returns:
        `texts` (bytes by name), `dense`, and `arms`: for each arm by how it is read `bpb` by seed, `against_dense` and,
        bare, `against_alone`: its distance to the mask that was learned without memories. None without such text.
    """
    done = {run: result for run, result in done.items() if result.get("general_documents")}  # others named no such text
    if not done:
        return None
    scored = {run: {"documents": result["general_documents"]} for run, result in done.items()}
    arms = list(dict.fromkeys(run.arm for run in done))
    shown = {f"{arm} {figure}": ((arm,), figure) for arm in arms for figure in ("dense", *READ.values())}
    paired = PairedDraws(scored, shown)
    one = next(iter(scored.values()))["documents"]
    found = {arm: {how: _read(paired, done, arm, figure) for how, figure in READ.items()} for arm in arms}
    dense = next(iter(done.values()))["general"]["mean"]["dense_bpb"]
    return {"texts": {name: round(sum(row["bytes"])) for name, row in one.items()}, "dense": dense, "arms": found}


def _read(paired: PairedDraws, done: Done, arm: str, figure: str) -> dict[str, Any]:
    means = {run.seed: result["general"]["mean"] for run, result in done.items() if run.arm == arm}
    bpb = [row[f"{figure}_bpb"] for _, row in sorted(means.items()) if row[f"{figure}_bpb"] is not None]
    of_dense = _distance(paired, f"{arm} {figure}", f"{arm} dense", relative=True)
    of_alone = _distance(paired, f"{arm} {figure}", f"{ALONE} memory_off") if figure == "memory_off" else None
    return {"bpb": bpb, "against_dense": of_dense, "against_alone": of_alone if arm != ALONE else None}


def _distance(paired: PairedDraws, one: str, other: str, relative: bool = False) -> Mapping[str, float] | None:
    """How much more one costs than the other, in bits per byte or relative to it; None where they share no seed."""
    sample = paired.of((one, other))
    if not sample.seeds:
        return None
    pairs = [(values[one], values[other]) for values in (sample.measured, sample.draws)]
    value, draws = (x / y - 1 if relative else x - y for x, y in pairs)
    return asdict(interval(value, draws))
