"""The words of the claims report: `claims.md`, and the lines for the terminal."""

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from koff_lightning.studies.claims.arms import ABOUT

Report = Mapping[str, Any]
COMPARED = ("dense", "dense_memory", "koff", "memory_off", "swapped", "no_memory")  # columns of the table by domain


def markdown(report: Report) -> str:
    """The whole page."""
    main = report["sparsities"][0]
    parts = [
        f"# What the arms say of {report['backbone']}",
        f"Command: `{report['command']}`",
        f"Seeds {', '.join(map(str, report['seeds']))}. Bits per byte of held-out text, mean over domains; less is "
        "better. ± is the standard deviation over seeds. Arms, rules and formulas: docs/claims.md.",
        "## Verdicts",
        f"Intervals of {_share(report['level'])} (all claims together 95 %), paired over documents and seeds.",
        table(["claim", "verdict", "measured [interval], must be"], [_verdict(row) for row in report["verdicts"]]),
        "Whether language-specific neurons go first is not decided here: `koff analyze`.",
        f"## Arms at {_share(main)}",
        table(ARM_HEAD, [_arm(row) for row in report["arms"] if row["sparsity"] == main]),
        "Seconds are wall-clock time of runs that may have shared the machine; `tokens` are those of training.",
        _equal(report["equal_memories"]),
        "## Gap closure of KOFF",
        f"Against its own mask with memories off, GC = {_interval(report['gap_closure']['gc'])}; against the mask "
        f"learned without memories, GC* = {_interval(report['gap_closure']['gc_star'])} (95 % intervals).",
        _retention(report["retention"]),
        _general(report["general"]),
        "## By domain",
        _domains(report["domains"]),
        _curve(report),
        _failures(report["failures"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(report: Report) -> str:
    """Arms and verdicts, a line each, and below why some are not decided."""
    arms = [
        f"{row['arm']:<16}  {'' if 'dense' in row['arm'] else _share(row['sparsity']):>6}  {spread(row['bpb']):<15}  "
        f"{percent(row['against_dense'])}"
        for row in report["arms"]
    ]
    words = [f"({row['name']}) {row['claim']}: {row['verdict']}" for row in report["verdicts"]]
    return "\n".join(["bits per byte of held-out text, and against dense:", *arms, "", *words, *_reasons(report)])


def _reasons(report: Report) -> list[str]:
    """Why claims are not decided, each reason once; of a claim the first one, the table has them all."""
    found: dict[str, list[str]] = {}
    for row in report["verdicts"]:
        whys = [part["why"] for part in row["parts"] if part["why"]]
        if row["verdict"] == "not decided" and whys:
            found.setdefault(whys[0], []).append(f"({row['name']})")
    return [f"not decided {', '.join(names)}: {why}" for why, names in found.items()]


ARM_HEAD = ["arm", "", "bits per byte", "against dense", "GC", "GC*", "removed of body", "active", "net", "stored"]
ARM_HEAD += ["seconds", "tokens"]


def _arm(row: Mapping[str, Any]) -> list[str]:
    size = [_millions(row["active"]), percent(row["net"], 1), _millions(row["stored"])]
    cost = ["" if row[key] is None else f"{row[key]:,.0f}" for key in ("seconds", "tokens")]
    gaps = ["" if row[key] is None else f"{row[key]:.2f}" for key in ("gc", "gc_star")]
    removed = _share(row["removed"])
    about = ABOUT[row["arm"]]
    return [row["arm"], about, spread(row["bpb"]), percent(row["against_dense"]), *gaps, removed, *size, *cost]


def _verdict(row: Mapping[str, Any]) -> list[str]:
    measured = [_finding(part) for part in row["parts"]]
    return [f"({row['name']}) {row['claim']}", f"**{row['verdict']}**", "<br>".join(measured)]


def _finding(part: Mapping[str, Any]) -> str:
    scale, unit = (100, " %") if "/" in part["figure"] else (1, "")
    must = f"{part['must_be']} {scale * part['bound']:g}{unit}"
    why = f" ({part['why']})" if part["why"] else ""
    if part["found"] is None:
        return f"{part['figure']}: not measured, {must}{why}"
    value, low, high = (f"{scale * part['found'][key]:+.{2 if unit else 4}f}" for key in ("value", "low", "high"))
    return f"{part['figure']}: {value}{unit} [{low}, {high}], {must}{why}"


def _equal(equal: Mapping[str, Any]) -> str:
    if not equal:
        return ""
    lora, kv = equal["lora_equal"], equal["kv_equal"]
    return (
        f"One domain's memory of both kinds has {equal['both']:,} parameters before anything is removed. `lora_equal` "
        f"has {lora['parameters']:,} (rank {lora['rank']}, {lora['ratio']:.4f} times as many), `kv_equal` "
        f"{kv['parameters']:,} ({kv['slots']} slots, {kv['ratio']:.4f} times)."
    )


def _retention(rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy on tasks, and how much of the dense model's is kept; nothing where no tasks were asked for."""
    if not rows:
        return ""
    lines = []
    for row in rows:
        kept = row["retention"] or {}
        cells = [f"{row['chance']:.3f}", *(spread(row["accuracy"][arm]) for arm in ("dense", "koff", "memory_off"))]
        cells += [_interval(kept.get(arm)) for arm in ("koff", "memory_off")]
        lines.append([row["suite"], f"{row['questions']:,}", *cells])
    head = ["tasks", "questions", "chance", "dense", "koff", "memory_off", "retention", "memory_off"]
    return (
        "## On tasks\n\nShare of right answers, mean over domains, and retention, which is what is left of the dense "
        f"model's distance from chance (95 % intervals, paired over questions and seeds).\n\n{table(head, lines)}"
    )


def _general(found: Mapping[str, Any] | None) -> str:
    """What pruning costs on text of no domain; nothing where none was scored."""
    if found is None:
        return ""
    rows = []
    for arm, read in found["arms"].items():
        bare, any_memory = read["bare"], read["any memory"]
        alone = "" if bare["against_alone"] is None else _signed(bare["against_alone"])
        cells = [spread(bare["bpb"]), _signed(bare["against_dense"], relative=True), alone]
        rows.append([arm, *cells, spread(any_memory["bpb"]), _signed(any_memory["against_dense"], relative=True)])
    head = ["arm", "memories off", "against dense", "less no_memory", "any domain's memory", "against dense"]
    texts = ", ".join(f"{name} ({size:,} bytes)" for name, size in found["texts"].items())
    return (
        f"## General text\n\nBits per byte of held-out text that belongs to no domain, mean over {texts}; dense "
        f"{found['dense']:.4f}. 95 % intervals, paired over documents and seeds. The mask of `no_memory` is learned to "
        f"the end of its run, the others' for fewer steps.\n\n{table(head, rows)}"
    )


def _signed(found: Mapping[str, float] | None, relative: bool = False) -> str:
    """A difference and its interval, in bits per byte or in percent."""
    if found is None:
        return ""
    scale, unit, digits = (100, " %", 2) if relative else (1, "", 4)
    value, low, high = (f"{scale * found[key]:+.{digits}f}" for key in ("value", "low", "high"))
    return f"{value}{unit} [{low}, {high}]"


def _domains(domains: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    arms = [arm for arm in COMPARED if any(arm in row for row in domains.values())]
    return table(["domain", *arms], [[name, *(spread(row.get(arm)) for arm in arms)] for name, row in domains.items()])


def _curve(report: Report) -> str:
    """The table of the further sparsities, with the first one beside them; nothing where there is only one."""
    first, *others = report["sparsities"]
    if not others:
        return ""
    found = {(row["arm"], row["sparsity"]): row for row in report["arms"]}
    arms = dict.fromkeys(arm for arm, share in found if share != first and arm not in ("dense", "dense_memory"))
    shares = sorted(report["sparsities"])
    rows = []
    for arm in arms:
        cells = [found.get((arm, share)) for share in shares]
        rows.append([arm, *(f"{spread(c['bpb'])} ({percent(c['against_dense'], 1)})" if c else "" for c in cells)])
    head = "## The curve\n\nBy what is removed; in brackets: against dense."
    return f"{head}\n\n{table(['arm', *map(_share, shares)], rows)}"


def _failures(failures: Sequence[Mapping[str, str]]) -> str:
    if not failures:
        return ""
    said = [f"`{failure['run']}`:\n\n```\n{failure['tail']}\n```" for failure in failures]
    return "\n\n".join(["## Runs that failed", "The figures above lack them.", *said])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def spread(values: Sequence[float] | None) -> str:
    """Mean and, over several seeds, standard deviation."""
    if not values:
        return ""
    return f"{fmean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def percent(share: float | None, digits: int = 2) -> str:
    """A change, with its sign."""
    return "" if share is None else f"{100 * share:+.{digits}f} %"


def _share(part: float) -> str:
    """A share as a person writes it."""
    return f"{round(100 * part, 1):g} %"


def _millions(count: float | None) -> str:
    return "" if count is None else f"{count / 1e6:.3f} M"


def _interval(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "not defined (the gap is not clear of zero, or has not been measured)"
    return f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
