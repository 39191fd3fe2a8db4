"""What a user can mend. Free of torch, so that a command line can say it in a moment."""

import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(ValueError):
    """A setting, an argument, a file or a folder is not as it must be; the message names it, what is allowed and got.

    Programs for the shell end with this message and a status that is not 0. Every other exception is a fault of this
    code or of the machine and keeps its traceback.
    """


INTERRUPTED = 130
"""Exit status of a program that Ctrl-C has ended, as shells have it."""


def run_program(main: Callable[[], int | None]) -> NoReturn:
    """End the process with the status that `main` gives; where Ctrl-C comes first, with a word and no traceback."""
    try:
        status = main()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        status = INTERRUPTED
    sys.exit(status)


def end_on_interrupt() -> None:
    """From now on Ctrl-C ends the process at once, with a word and no traceback; where it is ignored it stays so.

    For the start of a program, which has nothing to remove yet.
    """

    def end(number: int, frame: object) -> None:
        os.write(2, b"interrupted\n")
        os._exit(INTERRUPTED)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)


def did_you_mean(name: str, known: Iterable[str], show: Callable[[str], str] = repr) -> str:
    """`; did you mean 'x'?` with the nearest known name as `show` writes it, or nothing when none is near."""
    near = difflib.get_close_matches(str(name)[:100], known, n=1)  # the search costs much for a long name
    return f"; did you mean {show(near[0])}?" if near else ""


def half_surrogate(text: str) -> int | None:
    """Where a text first holds half of a surrogate pair, which is no character (JSON may spell one); None: nowhere."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None
