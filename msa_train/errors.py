"""The one exception for mistakes that the user can mend."""


class UserError(ValueError):
    """A mistake in a config, a file or an argument: names the place, the value and the mend.

    The command line prints the message as one line and exits with code 2; everything else is a fault of ours and
    keeps its traceback.
    """
