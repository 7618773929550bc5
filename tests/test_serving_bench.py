"""`koff bench serve`: bad input is a line, before anything is loaded."""

import pytest

from koff_lightning.cli import main


@pytest.mark.parametrize(
    ("option", "value", "line"),
    [
        ("--rounds", "0", "rounds must be 1 or more, got 0"),
        ("--prompt", "0", "prompt must be 1 or more, got 0"),
        ("--threads", "-1", "threads must be 1 or more, got -1"),
        ("--sparsities", "[]", "sparsities names no share to remove: give one or more, as [0.12]"),
        ("--memories", "3", "at least 16 memories are wanted, for a batch of 16 domains; got 3"),
        ("--device", "nowhere", "device 'nowhere' cannot be used here"),
    ],
)
def test_what_cannot_be_timed_is_one_line(capsys, option, value, line):
    assert main(["bench", "serve", "--threads", "1", option, value]) == 2
    said = capsys.readouterr()
    assert line in said.err.splitlines()[-1]
    assert not said.out
