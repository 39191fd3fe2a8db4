"""The command line: `run`, `ls` and `validate` are lm-eval's with our model and our tasks, the others are ours."""

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from CoDALanguageModel.errors import UserError, run_program

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


def add_our_tasks(args: argparse.Namespace) -> argparse.Namespace:
    """Put our tasks folder before the user's `--include_path`, which may redefine our names."""
    if not hasattr(args, "include_path"):
        return args
    given = args.include_path
    config = getattr(args, "config", None)
    if given is None and config is not None and Path(config).is_file():
        settings = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
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
    try:
        if name in COMMANDS:
            module, _, function = COMMANDS[name].partition(":")
            getattr(importlib.import_module(f"coda_eval.{module}"), function or "main")(rest)
        else:
            evaluate(sys.argv[1:])
    except UserError as error:
        if os.environ.get("LOGLEVEL", "").upper() != "DEBUG":
            raise SystemExit(f"coda_eval: error: {error}") from error
        raise


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
    run_program(main)
