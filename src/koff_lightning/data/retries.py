"""Try again when reading fails: transient faults are waited out, with longer and longer waits; others stop at once."""

import errno
import time
from collections.abc import Callable, Iterator
from typing import Any

from huggingface_hub import constants

from koff_lightning.data.readers import ALL, Document, OnBad, Part
from koff_lightning.support.errors import KoffError
from koff_lightning.support.secrets import without_secrets

WAITS = (1, 2, 4, 8, 16, 32, 64, 128)  # seconds before each new attempt; 4 minutes, less than ranks wait for each other
TRANSIENT_ERRNO = {
    getattr(errno, name)
    for name in (
        "EAGAIN",
        "EBUSY",
        "EIO",
        "ESTALE",
        "ETIMEDOUT",
        "ENETDOWN",
        "ENETUNREACH",
        "EHOSTUNREACH",
        "EREMOTEIO",
    )
    if hasattr(errno, name)
}
TRANSIENT_STATUS = (408, 425, 429)  # of a web server; and all from 500
NETWORK_PACKAGES = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp")


def read_with_retries(shard: Any, on_bad: OnBad, part: Part = ALL) -> Iterator[tuple[int, Document]]:
    """Read a `Shard`; after a transient fault, wait and go on where it stopped.

    Raises:
        KoffError: A lasting fault, or one that is still there after the last wait.
    """
    faults = _Faults(shard.name)
    while True:
        try:
            for number, document in shard.read(on_bad, part):
                part = part._replace(first=number + 1)
                faults.count = 0
                yield number, document
            return
        except Exception as error:
            faults.wait_after(error)


def with_retries(attempt: Callable[[], Any], what: str) -> Any:
    """Return what `attempt` returns; after a transient fault, wait and try again.

    Raises:
        KoffError: A lasting fault, or one that is still there after the last wait.
    """
    faults = _Faults(what)
    while True:
        try:
            return attempt()
        except Exception as error:
            faults.wait_after(error)


class _Faults:
    """Counts faults in a row and waits longer after each."""

    def __init__(self, what: str) -> None:
        self.what, self.count = what, 0

    def wait_after(self, error: Exception) -> None:
        if not _is_transient(error):
            raise (
                error if isinstance(error, KoffError) else KoffError(f"cannot read {self.what}: {_line(error)}")
            ) from error
        if self.count == len(WAITS):
            raise KoffError(
                f"cannot read {self.what}: {_line(error)}. Tried {self.count + 1} times in {sum(WAITS)} s. Nothing "
                "saved is lost: go on from the last checkpoint when it can be read again"
            ) from error
        warn(f"cannot read {self.what} now, trying again in {WAITS[self.count]} s: {_line(error)}")
        time.sleep(WAITS[self.count])
        self.count += 1


def warn(message: str) -> None:
    """Warn once for all ranks."""
    from lightning.pytorch.utilities import rank_zero_warn  # takes seconds, and whether files are there is asked before

    rank_zero_warn(message)


def _is_transient(error: BaseException | None) -> bool:
    """Whether it is worth trying again: a fault of the network or of a network disk, not a wrong name or a bad file."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", None))
        if isinstance(status, int) and status:
            return status in TRANSIENT_STATUS or status >= 500
        if getattr(error, "errno", None) in TRANSIENT_ERRNO:
            return True
        if isinstance(error, (ConnectionError, TimeoutError)) or _package(error) in NETWORK_PACKAGES:
            return not constants.HF_HUB_OFFLINE  # then it is the switch that speaks, and it stays
        error = error.__cause__ or error.__context__
    return False


def _package(error: BaseException) -> str:
    return type(error).__module__.split(".")[0]


def _line(error: BaseException) -> str:
    return without_secrets(" ".join(str(error).split())) or type(error).__name__  # addresses may be signed
