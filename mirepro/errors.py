"""The one exception a user is meant to see."""


class UserError(Exception):
    """Bad input or surroundings: one line that names the file, key or value, and the remedy.

    The command line prints it and exits with status 2; no traceback.
    """
