"""A setting of a model that a call may have to itself, while other threads call the same model."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

T = TypeVar("T")


class _Here(threading.local):
    """Of the thread that looks: torch.compile can read it and guards it, which it cannot with a ContextVar."""

    def __init__(self) -> None:  # runs anew in each thread; of a default at the class torch.compile takes no guard
        self.held: tuple[object] | None = None


class InForce(Generic[T]):
    """What is in force: in a scope that this thread has opened that scope's value, elsewhere the model's own.

    The model's own value is what threads see that never opened a scope, such as those of autograd, where a checkpointed
    layer is computed again. A copy has the model's own value and no scopes.
    """

    def __init__(self, value: T) -> None:
        self._own, self._here = value, _Here()

    @property
    def value(self) -> T:
        """What is in force for the thread that asks."""
        held = self._here.held
        return self._own if held is None else held[0]

    def set(self, value: T) -> None:
        """Put another value in force: in the innermost scope of this thread, or for the model where there is none."""
        if self._here.held is None:
            self._own = value
        else:
            self._here.held = (value,)

    @contextmanager
    def scope(self, value: T) -> Iterator[None]:
        """Put a value in force for this thread alone; at the end of the block what was before is in force again."""
        before, self._here.held = self._here.held, (value,)
        try:
            yield
        finally:
            self._here.held = before

    def __getstate__(self) -> dict[str, T]:
        return {"_own": self._own}

    def __setstate__(self, state: dict[str, T]) -> None:
        self.__init__(state["_own"])
