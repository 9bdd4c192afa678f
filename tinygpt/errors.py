"""The one exception that means: the input is at fault, not the program."""


class UserError(ValueError):
    """A mistake in what the user gave: a file, an option, a shape.

    Its message is one line that names the thing and the remedy. The command line prints it and exits with
    status 2; library callers may catch it as a ValueError.
    """
