"""What a user can mend. Free of torch, so that a command line can say it in a moment."""


class UserError(ValueError):
    """A setting, an argument, a file or a folder is not as it must be; the message names it, what is allowed and got.

    Programs for the shell end with this message and the exit code 2. Every other exception is a fault of this code or
    of the machine and keeps its traceback.
    """
