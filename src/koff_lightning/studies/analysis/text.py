"""The text of a study: that of the run's own config unless the user gives other text."""

import hashlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from koff_lightning.data import DomainDataModule
from koff_lightning.data.calibration import CalibrationText
from koff_lightning.support.errors import KoffError

ROWS = 16  # of a batch


def open_text(
    options: Mapping[str, Any], tokenizer: str, tokens: int, heldout_bytes: int
) -> tuple[DomainDataModule, CalibrationText]:
    """Held-out text to score, and text in which the dense model's neurons are watched.

    Args:
        options: Section `data` of a run's options.
        tokenizer: Where the dense model's tokenizer is.
        tokens: To watch, of each domain; fewer where the domain with the least text has fewer.
        heldout_bytes: Bytes of held-out text per domain, at most.

    Returns:
        The data module, set up, and batches of training text, equally much of every domain.

    Raises:
        KoffError: Options that the data module does not know, no such text, or a domain without one whole row of it.
    """
    known = inspect.signature(DomainDataModule).parameters
    if odd := sorted(options.keys() - known):
        raise KoffError(
            f"the run's options have data.{odd[0]}, which this release does not know: give --data or --config"
        )
    limit = min(options.get("max_heldout_bytes") or heldout_bytes, heldout_bytes)
    own = {"tokenizer": options.get("tokenizer") or tokenizer, "max_heldout_bytes": limit, "batch_size": ROWS}
    own["retention"] = None  # general text is no domain
    data = DomainDataModule(**{**options, **own, "num_workers": 0})
    data.setup()
    each = max(min(tokens, data.most_calibration_text()), 1)  # one where there is no row: it says what is wrong
    return data, data.calibration_text(each * len(data.domain_names))


def identity(batches: Iterable[Mapping[str, Any]]) -> str:
    """A name for the text of these batches, to keep what was measured on it apart from what was on other text."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch["input_ids"].numpy().tobytes() + repr(list(batch["domains"])).encode())
    return digest.hexdigest()[:12]
