"""The one exception a user is meant to read: a single line saying what was wanted, what came, and what to do."""


class KoffError(ValueError):
    """Bad input from the user. The command line prints its message alone, without a traceback."""
