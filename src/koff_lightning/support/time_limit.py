"""Calls of code that no exception reaches, as of a library in Rust, and that may take for ever."""

import threading
import time
from collections.abc import Callable
from typing import Any

LOOK = 0.5  # seconds between two looks at a call that is still going on


def within(seconds: float, call: Callable[[], Any], too_long: Callable[[], Exception]) -> Any:
    """What `call` returns or raises, if it comes in time.

    What cannot be ended is left behind: its thread goes on until the process ends, and does not hold that up. Time is
    the clock's and the processors' at once, so that neither a machine that others use nor other threads of this process
    make a call too long.

    Args:
        seconds: It may take.
        call: Made in a thread of its own.
        too_long: The error to raise where it takes longer.
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
