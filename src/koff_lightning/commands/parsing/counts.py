"""Counts and seeds that commands are given."""

from koff_lightning.support.errors import KoffError


def check_counts(**given: int) -> None:
    """Raise KoffError unless each is 1 or more."""
    for name, value in given.items():
        if value < 1:
            raise KoffError(f"{name} must be 1 or more, got {value}")


def check_seed(seed: int) -> None:
    """Raise KoffError unless torch takes it."""
    if not 0 <= seed < 2**63:
        raise KoffError(f"seed must be from 0 to 2^63 - 1; got {seed}")
