"""The one exception that reaches a user as a single line."""


class UserError(Exception):
    """A mistake in what the user gave: a flag, a file, a field.

    The message is one line that names the thing, what was found and what was expected.
    Commands print it and exit with code 2; library callers catch it like a ValueError.
    """
