"""The command line: `run`, `ls` and `validate` are lm-eval's with our model and our tasks, the others are ours."""

import argparse
import importlib
import logging
import os
import sys
from pathlib import Path

import yaml

from CoDALanguageModel.errors import UserError

TASKS = Path(__file__).with_name("tasks")
"""Folder of our task files; always searched, besides lm-eval's own."""


COMMANDS = {
    "judge": "judge",
    "report": "report",
}
"""Commands of our own, and the module of this package whose `main(argv)` runs each."""


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
            importlib.import_module(f"coda_eval.{COMMANDS[name]}").main(rest)
        else:
            _evaluate()
    except UserError as error:
        if os.environ.get("LOGLEVEL", "").upper() != "DEBUG":
            raise SystemExit(f"coda_eval: error: {error}") from error
        raise


def _evaluate() -> None:
    """Parse lm-eval's arguments and run its command."""
    # Read by accelerate when it is first imported. With torch_xla installed, it would otherwise run several processes
    # as if each were alone; evaluation runs on CPU and GPU.
    os.environ.setdefault("USE_TORCH_XLA", "false")
    from lm_eval.__main__ import HarnessCLI
    from lm_eval.utils import setup_logging

    import coda_eval.autoregressive
    import coda_eval.harness  # noqa: F401  both register models
    from coda_eval.run import run

    setup_logging()
    ours, theirs = logging.getLogger("coda_eval"), logging.getLogger("lm_eval")
    ours.setLevel(theirs.level)
    for handler in theirs.handlers:
        ours.addHandler(handler)
    cli = HarnessCLI()
    cli._subparsers.choices["run"].add_argument(
        "--resume",
        action="store_true",
        help="go on with the run in --output_path: answers that its journal has are not made again",
    )
    args = add_our_tasks(cli.parse_args())
    if args.command == "run":
        run(args)
    else:
        cli.execute(args)


if __name__ == "__main__":
    main()
