"""Write a study to a folder: `analysis.json`, `tables/*.parquet`, `plots/*`, `report.html`."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from koff_lightning.artifact.folder import FORMAT
from koff_lightning.reports import plots
from koff_lightning.studies.analysis.report.figures import draw_all
from koff_lightning.studies.analysis.report.findings import findings
from koff_lightning.studies.analysis.report.page import render
from koff_lightning.studies.analysis.report.words import words
from koff_lightning.studies.analysis.study import Study
from koff_lightning.support.errors import KoffError
from koff_lightning.support.files import write_atomically
from koff_lightning.support.versions import versions

# Tables so long that analysis.json only says where they are.
RAW = ("neurons", "masks", "attention", "adapters", "similarity_draws")
PAGE = "report.html"


def write(found: Study, folder: Path) -> Path:
    """Write everything; returns the path of the page.

    Pictures of an earlier study that this one does not draw are removed, since they do not say whose they are. Its
    tables stay: they name their runs, may have taken hours, and analysis.json lists those of this study.

    Raises:
        KoffError: The disk did not take it.
    """
    figures = draw_all(found)
    said = findings(found)
    content = {
        "format_version": FORMAT,
        "findings": [{"verdict": line.verdict, "text": line.text} for line in said],
    } | found.about
    content |= {"missing": found.missing, "versions": versions()}
    content["tables"] = {name: table.to_dict("records") for name, table in found.tables.items() if name not in RAW}
    content["files"] = {name: f"tables/{name}.parquet" for name in found.tables}
    try:
        (folder / "tables").mkdir(parents=True, exist_ok=True)
        for name, table in found.tables.items():
            table.to_parquet(folder / "tables" / f"{name}.parquet", index=False)
    except OSError as error:
        raise KoffError(f"cannot write to {folder}: {error.strerror or error}") from error
    for name in words()["figures"]:
        plots.save(figures.get(name), folder / "plots", name)
    write_atomically(folder / "analysis.json", json.dumps(_plain(content), indent=1, ensure_ascii=False) + "\n")
    write_atomically(folder / PAGE, render(found, said, figures))
    return folder / PAGE


def _plain(value: Any) -> Any:
    """The same in JSON's types: numbers that are none become null, infinite ones the word."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value
