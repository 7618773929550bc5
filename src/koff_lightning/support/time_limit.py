"""A time limit for calls that cannot be interrupted, such as those of a library in Rust."""

import threading
import time
from collections.abc import Callable
from typing import Any

LOOK = 0.5  # seconds between two looks at a running call


def within(seconds: float, call: Callable[[], Any], too_long: Callable[[], Exception]) -> Any:
    """What `call` returns or raises, if it ends in time.

    A call that does not is left behind: its thread runs on until the process ends, which does not wait for it. A call
    is too long only if both the clock and this process's processor time say so: then neither a busy machine nor other
    threads are mistaken for a slow call.

    Args:
        seconds: Limit.
        call: Runs in a thread of its own.
        too_long: Makes the error to raise if the call takes longer.
    """
    found: list[tuple[bool, Any]] = []

    def work() -> None:
        try:
            found.append((True, call()))
        except BaseException as error:  # a panic of a library in Rust is no Exception
            found.append((False, error))

    thread = threading.Thread(target=work, daemon=True)
    since = time.monotonic(), time.process_time()
    thread.start()
    thread.join(min(seconds, LOOK))
    while thread.is_alive():
        if time.monotonic() - since[0] > seconds and time.process_time() - since[1] > seconds:
            raise too_long()
        thread.join(LOOK)
    sound, result = found[0]
    if not sound:
        raise result
    return result
