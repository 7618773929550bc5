"""How the words after a verb become the arguments of its function."""

import pytest

from koff_lightning.commands.parsing.tool_options import parse
from koff_lightning.support.errors import KoffError


def verb(
    folder: str,
    times: int = 1,
    *,
    max_tokens: int = 3,
    as_: str,
    prompt: list[str] | None = None,
    over_write: bool = False,
) -> None:
    """Do something.

    Args:
        folder: Where.
        times: How often.
        max_tokens: At most.
        as_: Name.
        prompt: Text.
        over_write: Whether.
    """


ALL = {"folder": "d", "times": 1, "max_tokens": 3, "as_": "x", "prompt": None, "over_write": False}
TEXTS = ["null", "[a", "{a: 1}", "5", "--as", "x=y", "", " ", "😀\n"]


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        ([], {}),
        (["--times", "2", "--max_tokens=4"], {"times": 2, "max_tokens": 4}),
        (["--max-tokens", "4"], {"max_tokens": 4}),
        (["--over-write"], {"over_write": True}),
        (["--over_write", "--times", "2"], {"over_write": True, "times": 2}),
        (["--over_write", "false"], {"over_write": False}),
        (["--over-write=true"], {"over_write": True}),
        ([word for text in TEXTS for word in ("--prompt", text)], {"prompt": TEXTS}),
        ([f"--prompt={text}" for text in TEXTS], {"prompt": TEXTS}),
    ],
)
def test_words_become_arguments(argv, changes):
    for words in (["d", "--as", "x", *argv], [*argv, "d", "--as=x"]):
        assert parse("verb", verb, words) == ALL | changes


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--as", "x"], "verb: the following arguments are required: folder"),
        (["d"], "verb: the following arguments are required: as"),
        (["d", "--as", "x", "e"], "verb: 'e' stands alone, wanted is an option with a name"),
        (["d", "--as", "x", "--max-tokns", "4"], "verb: no option 'max-tokns'. Did you mean 'max_tokens'?"),
        (["d", "--as", "x", "--foldr", "4"], "verb: no option 'foldr'."),
        (["d", "--as", "x", "--max_tokens", "much"], "verb: max_tokens must be int; got 'much'."),
        (["d", "--as", "x", "--prompt"], "verb: argument --prompt"),
    ],
)
def test_wrong_words_are_one_line(argv, line):
    with pytest.raises(KoffError) as caught:
        parse("verb", verb, argv)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_help_shows_what_may_be_typed(capsys):
    with pytest.raises(SystemExit):
        parse("verb", verb, ["--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: koff verb ")
    assert "--as AS" in said
    assert "Do something." in said
    assert "--as_" not in said
