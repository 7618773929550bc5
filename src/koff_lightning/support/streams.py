"""Standard input and output where they are closed, not in UTF-8, read by nobody, or on a full disk."""

import errno
import io
import os
import select
import signal
import sys
from typing import Any


class _Terminal(io.FileIO):
    """Writes to a terminal, and nowhere once that was closed: whoever closes it does not mean the work to be lost.

    The process is told by a signal too, which may come later, or not at all.
    """

    def write(self, data: Any) -> int:
        """Number of bytes of `data` that are dealt with."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def make_printable() -> None:
    """Let all that is printed be printed: escaped where a stream is not of UTF-8, and nowhere where it is closed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # closed: this takes its number, which the next file that is written must not get
            setattr(sys, name, stream := open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
            os.set_inheritable(stream.fileno(), True)
        elif mode == "w" and hasattr(stream, "reconfigure") and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
        is_own = stream is getattr(sys, f"__{name}__") and hasattr(signal, "SIGHUP")  # not a notebook's, nor Windows'
        if mode == "w" and is_own and stream.isatty():
            raw = io.BufferedWriter(_Terminal(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(raw, stream.encoding, stream.errors, line_buffering=True))


def nobody_reads() -> bool:
    """Whether whoever read what we print has gone, as `head` does; what is left to print then goes nowhere."""
    if not hasattr(select, "poll"):  # Windows
        return False
    look = select.poll()
    look.register(sys.stdout, 0)
    if gone := any(event & select.POLLERR for _, event in look.poll(0)):
        _print_nowhere()
    return gone


def is_full(error: OSError) -> bool:
    """Whether a disk takes no more; where that is what we print to, what is left to print goes nowhere."""
    try:
        sys.stdout.flush()
    except OSError:
        _print_nowhere()
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _print_nowhere() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
