"""A setting of a model (its gates, its memories) that one call can change while other threads call the same model."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class _Here(threading.local):
    """The innermost scope of each thread. Not a ContextVar, as torch.compile can neither read nor guard one."""

    def __init__(self) -> None:  # runs once in each thread; torch.compile would not guard a default of the class
        self.held: tuple[object] | None = None  # a value in a tuple, as the value may be None; None: no scope


class InForce(Generic[T]):
    """A value that all threads share, which a thread can replace for itself inside a `scope`.

    Threads that never opened a scope see the shared value. Autograd's threads are among them, in which activation
    checkpointing computes layers again. Copies and pickles take the shared value along, and no scopes.
    """

    def __init__(self, value: T) -> None:
        self._shared, self._here = value, _Here()

    @property
    def value(self) -> T:
        """What is in force in this thread."""
        held = self._here.held
        return self._shared if held is None else held[0]

    def set(self, value: T) -> None:
        """Replace the value: that of this thread's innermost scope, or the shared one if it is in none."""
        if self._here.held is None:
            self._shared = value
        else:
            self._here.held = (value,)

    @contextmanager
    def scope(self, value: T) -> Iterator[None]:
        """Inside the block, for this thread alone, another value; afterwards the one from before."""
        before, self._here.held = self._here.held, (value,)
        try:
            yield
        finally:
            self._here.held = before

    def __getstate__(self) -> dict[str, T]:
        return {"shared": self._shared}

    def __setstate__(self, state: dict[str, T]) -> None:
        self.__init__(state["shared"])
