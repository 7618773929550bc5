"""One bar for all that a model is asked, where lm-eval would draw one for each kind of request of each column."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self

from lm_eval.api import model
from lm_eval.models import huggingface
from tqdm import tqdm

from koff_lightning.evaluation import rolling

DRAWING = (model, huggingface, rolling)  # draw bars while a model answers


class _Part:
    """What stands for a bar of theirs: it tells the one bar how far it is. Around an iterable it only hands that on."""

    def __init__(self, bar: "_Bar", iterable: Iterable[Any] = (), total: int = 0) -> None:
        self._bar, self._iterable = bar, iterable
        bar.expect(total)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._iterable)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """The one bar goes on."""

    close = __exit__

    def update(self, number: int = 1) -> None:
        """So many requests more have been answered."""
        self._bar.drawn.update(number)


class _Bar:
    """The one bar, over columns that are all asked the same: the first one tells how much there is."""

    def __init__(self, drawn: "tqdm[Any]", columns: int) -> None:
        self.drawn, self.columns, self.left = drawn, columns, columns

    def begin(self, name: str) -> None:
        """Go on to the column of this name."""
        self.left -= 1
        self.drawn.set_description(f"{name} ({self.columns - self.left} of {self.columns})", refresh=False)

    def expect(self, number: int) -> None:
        """So many requests are asked in this column; in those that follow as many."""
        if number and self.left == self.columns - 1:
            self.drawn.total += number * self.columns
            self.drawn.delay = 0  # it is drawn now, and a bar that ends within its delay would be left on the terminal
            self.drawn.refresh()


@contextmanager
def one_bar(columns: int, shown: bool = True) -> Iterator[Callable[[str], None]]:
    """Draw one bar while a model is asked, column after column; call what comes with a column's name at its beginning.

    Args:
        columns: Their number.
        shown: Whether to draw it.
    """
    before = [module.tqdm for module in DRAWING]
    with tqdm(total=0, leave=False, delay=0.01, disable=not shown) as drawn:  # not before it is known how much there is
        bar = _Bar(drawn, columns)

        def part(iterable: Iterable[Any] = (), total: int = 0, **_: object) -> _Part:
            return _Part(bar, iterable, total)

        for module in DRAWING:
            module.tqdm = part
        try:
            yield bar.begin
        finally:
            for module, own in zip(DRAWING, before, strict=True):
                module.tqdm = own
