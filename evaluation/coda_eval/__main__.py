"""The command line: `run`, `ls` and `validate` are lm-eval's with our model and our tasks, the others are ours."""

import argparse
import importlib
import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from CoDALanguageModel.errors import UserError, did_you_mean

TASKS = Path(__file__).with_name("tasks")
"""Folder of our task files; always searched, besides lm-eval's own."""


COMMANDS = {
    "compare": "comparison",
    "judge": "judge",
    "leaderboard": "leaderboard",
    "selfcheck": "selfcheck",
    "fetch": "fetch",
    "export": "exchange:export_samples",
    "import": "exchange:import_samples",
    "report": "report",
    "sweep": "sweep",
}
"""Commands of our own, and the module of this package whose `main(argv)`, or other function, runs each."""

THEIRS = ("run", "ls", "validate")
"""Commands of lm-eval."""

GOES_ON = {
    "run": "; --resume goes on with what is in --output_path",
    "sweep": "; the same command goes on where it stopped",
    "import": "; judge goes on with the answers that are in --output_path",
    "fetch": "; the same command goes on with what has come",
}
"""What is said of a command that was stopped."""


class Stopped(KeyboardInterrupt):
    """A signal asked for the end: what a command made for its time alone is removed."""


def _stop(number: int, frame: object) -> None:
    raise Stopped(number)


def add_our_tasks(args: argparse.Namespace) -> argparse.Namespace:
    """Put our tasks folder before the user's `--include_path`, which may redefine our names."""
    if not hasattr(args, "include_path"):
        return args
    given = args.include_path
    config = getattr(args, "config", None)
    if given is None and config is not None and Path(config).is_file():
        try:
            settings = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
        except (ValueError, yaml.YAMLError) as error:
            raise UserError(f"--config {config!r} cannot be read: {error}") from error
        given = settings.get("include_path") if isinstance(settings, dict) else None
    extra = [] if given is None else [given] if isinstance(given, (str, Path)) else list(given)
    args.include_path = [str(TASKS), *map(str, extra)]
    return args


def main() -> None:
    """Run the command that the arguments name.

    Raises:
        SystemExit: it could not be done; the message says why.
    """
    name, *rest = sys.argv[1:] or [""]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of folders may be no text, or none of this terminal's
            stream.reconfigure(errors="backslashreplace")
    # Ranks that wait for each other do not come to hear of it.
    stops = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and os.environ.get("WORLD_SIZE", "1") == "1"
    if stops:
        signal.signal(signal.SIGTERM, _stop)
    try:
        if name in COMMANDS:
            module, _, function = COMMANDS[name].partition(":")
            getattr(importlib.import_module(f"coda_eval.{module}"), function or "main")(rest)
        elif name and not name.startswith("-") and name not in THEIRS:
            known = [*THEIRS, *COMMANDS]
            raise UserError(f"unknown command {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})")
        else:
            evaluate(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # programs that still run are waited for, but not by force
        number = error.args[0] if isinstance(error, Stopped) else signal.SIGINT
        said = GOES_ON.get(name if name in (*COMMANDS, *THEIRS) else "run", "")
        print(f"coda_eval: stopped by {signal.Signals(number).name}{said}", file=sys.stderr)
        raise SystemExit(128 + number) from None
    except BrokenPipeError:  # of who reads what is printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
    except UserError as error:
        if os.environ.get("LOGLEVEL", "").upper() != "DEBUG":
            raise SystemExit(f"coda_eval: error: {error}") from error
        raise
    finally:
        if stops:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def lm_eval_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """What lm-eval reads from arguments that begin with a command of its own."""
    # Read by accelerate when it is first imported. With torch_xla installed, it would otherwise run several processes
    # as if each were alone; evaluation runs on CPU and GPU.
    os.environ.setdefault("USE_TORCH_XLA", "false")
    from lm_eval.__main__ import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging()
    ours, theirs = logging.getLogger("coda_eval"), logging.getLogger("lm_eval")
    ours.setLevel(theirs.level)
    for handler in theirs.handlers:
        ours.addHandler(handler)
    sys.argv[1:] = argv  # which lm-eval reads
    cli = HarnessCLI()
    cli._parser.prog = "python -m coda_eval"
    cli._parser.epilog = f"further commands, each with a --help of its own: {', '.join(COMMANDS)}"
    cli._subparsers.choices["run"].add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --output_path: answers that its journal has are not made again",
    )
    try:
        return add_our_tasks(cli.parse_args())
    except ValueError as error:  # lm-eval's own of a --model_args or --gen_kwargs that begins like JSON
        raise UserError(str(error)) from error


def evaluate(argv: Sequence[str]) -> None:
    """Run a command of lm-eval's, `run` in our way."""
    args = lm_eval_arguments(argv)
    from coda_eval.run import run

    if args.command == "run":
        run(args)
    else:
        args.func(args)


if __name__ == "__main__":
    main()
