"""When things happen in a run: what the options of its callbacks may be."""

import math
import re

from koff_lightning.support.errors import KoffError


def check_anneal(warmup: float, ramp: float, hold: float | None, shape: str) -> None:
    """Refuse a course of the target that no run has room for."""
    shares = (warmup, ramp, hold or 0.0)
    total = math.fsum(shares)  # a plain sum of 0.33, 0.56 and 0.11 comes out above 1
    if min(shares) < 0 or not total <= 1 or total == 0 == hold:
        given = f"{warmup} + {ramp} + {'null' if hold is None else hold}"
        raise KoffError(
            f"anneal: warmup + ramp + hold must lie in (0, 1]; got {given} (hold: null is what remains of the run)"
        )
    if shape not in ("linear", "cosine", "cubic"):
        raise KoffError(f"anneal: shape must be linear, cosine or cubic; got {shape}")


def check_placement(keep: float | None, first: float, last: float, rounds: int, window: int) -> None:
    """Refuse rounds of placement that cannot be held, and a budget that is none."""
    if keep is not None and not 0 < keep < 1:
        raise KoffError(f"placement.keep must lie between 0 and 1 (null: all stay); got {keep}")
    if not 0 < first <= last < 1:
        raise KoffError(f"placement: 0 < first <= last < 1 is wanted; got first {first} and last {last}")
    if rounds < 1 or window < 1:
        raise KoffError(f"placement.rounds and placement.window must be at least 1; got {rounds} and {window}")


def check_lm_eval(every_n_steps: int | None, batch_size: int | str) -> None:
    """Refuse evaluations during a run that would never come, or have no rows."""
    if every_n_steps is not None and every_n_steps < 1:
        raise KoffError(f"lm_eval.every_n_steps must be at least 1, or null for the end alone; got {every_n_steps}")
    check_batch_size(batch_size, "lm_eval.batch_size")


def check_batch_size(value: int | str, option: str) -> None:
    """Raise KoffError unless rows at a time are a number, `auto`, or `auto:N`, which measures N times in a run.

    Args:
        value: What was given.
        option: Its name, for the message.
    """
    if not re.fullmatch(r"auto(:[1-9]\d*)?|0*[1-9]\d*", str(value)):
        raise KoffError(f"{option} must be a positive number or auto; got {value!r}")
