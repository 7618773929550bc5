"""How text becomes rows and batches: what the options of the data may be."""

import math

from koff_lightning.support.errors import require

MIN_SEQ_LEN = 8
MOST_TOKENS = 2**31  # in a batch: what an int32 can count


def check_data(
    seq_len: int,
    batch_size: int,
    heldout_fraction: float,
    max_heldout_bytes: int | None,
    max_train_bytes: int | None,
    on_bad_line: str,
    num_workers: int,
    seed: int,
    streaming: bool,
    temperature: float,
    max_retention_bytes: int | None,
) -> None:
    """Refuse options by which no text could be read, packed or mixed."""
    require(seq_len >= MIN_SEQ_LEN, f"data.seq_len must be {MIN_SEQ_LEN} or more, got {seq_len}")
    require(batch_size >= 1, f"data.batch_size must be 1 or more, got {batch_size}")
    require(batch_size * seq_len < MOST_TOKENS, f"{batch_size} rows of {seq_len} tokens are too many for a batch")
    require(0 < heldout_fraction < 1, f"data.heldout_fraction must lie between 0 and 1, got {heldout_fraction}")
    require(0 <= num_workers <= 1024, f"data.num_workers must lie between 0 and 1024, got {num_workers}")
    require(seed >= 0, f"data.seed must be 0 or more, got {seed}")
    require(on_bad_line in ("fail", "skip"), f"data.on_bad_line must be 'fail' or 'skip', got '{on_bad_line}'")
    limits = {"max_heldout_bytes": max_heldout_bytes, "max_train_bytes": max_train_bytes}
    for name, limit in (limits | {"max_retention_bytes": max_retention_bytes}).items():
        require(limit is None or limit >= 1, f"data.{name} must be 1 or more (or null for no limit), got {limit}")
    require(0 < temperature < math.inf, f"data.temperature must be a number above 0, got {temperature}")
    require(
        not (streaming and max_train_bytes),
        f"data.max_train_bytes={max_train_bytes} limits text in memory, data.streaming keeps none: set it to null",
    )
