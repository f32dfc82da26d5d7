"""The one exception that is shown to a user without a traceback."""


class UserError(ValueError):
    """Bad input: a setting, a file, a folder.

    The message is one or two lines that name the file, the key, the value and what would be right.
    `nanochat` prints it and exits with 2.
    """
