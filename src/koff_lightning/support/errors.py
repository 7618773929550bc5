"""The one exception a user is meant to read: a single line saying what was wanted, what came, and what to do."""

from collections.abc import Callable, Iterable


class KoffError(ValueError):
    """Bad input from the user. The command line prints its message alone, without a traceback."""


def require(condition: bool, message: str) -> None:
    """Raise KoffError with that message unless the condition holds."""
    if not condition:
        raise KoffError(message)


class NoSuchNameError(KoffError):
    """A name that nobody has, so that it is misspelt and not missing."""


def refused_by(looks: Iterable[Callable[[], object]]) -> list[str]:
    """What those of several looks say that raise KoffError, so that all that is missing is told at once.

    Raises:
        NoSuchNameError: As soon as a look does: nothing is missing then.
    """
    said = []
    for look in looks:
        try:
            look()
        except NoSuchNameError:
            raise
        except KoffError as error:
            said.append(str(error))
    return said
