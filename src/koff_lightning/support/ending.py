"""How a command ends that is asked to: Ctrl-C (SIGINT), a scheduler's SIGTERM, a terminal that closes (SIGHUP).

The first such signal raises `Ended` wherever work may be left, so that half-written files are cleared away, or is noted
where it may not, as in an optimizer step. A second one leaves at once.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
TIME_LIMIT = 124  # exit status where the time is up, as that of the command `timeout`
LAUNCHER = os.getppid()  # noted before what is slow: a launcher may be gone before the ranks have met
LOOK = 0.5  # seconds between looks at other processes
MET = Event()  # set where the ranks of a run have met, from where on they watch each other
SAME = 1.0  # seconds in which a further signal is the same request: some send it to a process and then to its group


class Ended(SystemExit):
    """The command was asked to end; its exit status is 128 plus the signal's number, or `TIME_LIMIT`.

    Args:
        code: The exit status.
        advice: How to go on.
    """

    def __init__(self, code: int, advice: str = "") -> None:
        super().__init__(code)
        self.advice = advice

    def __str__(self) -> str:
        cause = "the time limit" if self.code == TIME_LIMIT else signal.Signals(self.code - 128).name
        return f"ended by {cause}" + (f"; {self.advice}" if self.advice else "")


class SignalHandler:
    """Handles signals that ask this process to end.

    Args:
        may_leave: Whether the work at hand may be left when a signal comes; if not, it looks at `asked` in time.
    """

    def __init__(self, may_leave: Callable[[], bool] = lambda: True) -> None:
        self.asked = 0  # exit status that was asked for
        self._may_leave, self._process, self._when = may_leave, os.getpid(), 0.0

    def __call__(self, number: int, frame: object = None) -> None:
        """Note a signal, and raise `Ended` if the work at hand may be left; a second one leaves at once."""
        if os.getpid() != self._process:
            return  # a forked worker, which its parent ends
        if self.asked and time.monotonic() - self._when > SAME:
            os._exit(128 + number)
        if not self.asked:
            self.asked, self._when = 128 + number, time.monotonic()
            if self._may_leave():
                raise Ended(self.asked)

    def install(self, signals: tuple[int, ...] = SIGNALS) -> dict[int, object]:
        """Take over the signals that are not ignored, as `nohup` has it; returns the handlers before, by signal."""
        before = {}
        for number in signals:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                try:
                    before[number] = signal.signal(number, self)
                except ValueError:  # not the main thread
                    break
        return before


@contextmanager
def ended_by(signals: tuple[int, ...] = SIGNALS) -> Iterator[None]:
    """Inside the block a signal raises `Ended`."""
    before = SignalHandler().install(signals)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watch_the_launcher() -> None:
    """End a launched rank whose launcher is gone before the ranks have met, where it would wait for the others."""
    if os.environ.get("LOCAL_RANK", "0") == "0":  # what launches ranks, Lightning or torchrun, sets it
        return

    def watch() -> None:
        met = False
        while os.getppid() == LAUNCHER:
            if met:
                return
            met = MET.wait(LOOK)  # then one look more: from before the ranks watched each other
        print("koff: what has launched this rank is gone, so it ends; start the run again", file=sys.stderr, flush=True)
        os._exit(1)

    Thread(target=watch, daemon=True, name="watch the launcher").start()
