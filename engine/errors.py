"""The error that a user can cause and mend."""


class UserError(ValueError):
    """Says in one line what was given, what is allowed and what to do; the command line exits with code 2."""
