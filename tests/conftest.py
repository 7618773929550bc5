"""What all tests share: runs end without what takes a second or ten and is the business of few tests."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from io import StringIO
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session", autouse=True)
def drawing() -> Iterator[Callable[..., None]]:
    """The files of pictures are written, but empty; gives what draws them."""
    from matplotlib.figure import Figure

    from koff_lightning.reports import plots  # not before pytest's workers have begun, whose parent needs no torch

    save = plots.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "save", lambda figure, folder, name: save(figure and Figure((1, 1)), folder, name))
        yield save


@pytest.fixture(scope="module")
def drawn_pictures(drawing: Callable[..., None]) -> Iterator[None]:
    """For the rest of the module they are drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("koff_lightning.reports.plots.save", drawing)
        yield


@pytest.fixture(scope="session", autouse=True)
def beginning() -> Iterator[Callable[[], subprocess.Popen]]:
    """Exports are proven in this process, which has imported all that it takes; gives what begins another."""
    from koff_lightning.artifact import proof

    def run(command: list[str], **_: object) -> SimpleNamespace:
        with redirect_stderr(StringIO()) as said:
            status = proof.main(*command[3:])
        return SimpleNamespace(returncode=status, stderr=said.getvalue())

    begin = proof.begin
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "subprocess", SimpleNamespace(run=run))
        patch.setattr(proof, "begin", lambda: None)
        yield begin


@pytest.fixture
def fresh_process(beginning: Callable[[], subprocess.Popen], monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process, as users have it."""
    monkeypatch.setattr("koff_lightning.artifact.proof.subprocess", subprocess)
    monkeypatch.setattr("koff_lightning.artifact.proof.begin", beginning)
