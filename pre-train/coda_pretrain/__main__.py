"""``python -m coda_pretrain --config FILE [--config FILE ...] [key=value ...]``: train, or show the configuration.

``python -m coda_pretrain plan`` and ``python -m coda_pretrain plot`` have their own ``--help``.
"""

import argparse
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Sequence

EXIT_BAD_INPUT = 2
SUBCOMMANDS = ("plan", "plot")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m coda_pretrain",
        description="Pre- or mid-train a CoDA model.",
        epilog="python -m coda_pretrain plan --help: what a run needs; plot --help: what it did.",
    )
    parser.add_argument(
        "--config", action="append", default=[], required=True, help="YAML file; several are merged in order"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the resolved configuration as YAML and exit")
    parser.add_argument(
        "--accept_changed_data",
        action="store_true",
        help="continue a run although its token shards are not those of before; the checkpoints record it",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the files")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when the run is finished or was stopped by SIGTERM, 2 for bad input and 1 for a failed run; the message of
        either is the last line on stderr.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("USE_TORCH_XLA", "0")  # transformers would import it, which takes seconds, and not use it
    if importlib.util.find_spec("libtpu") is None or words[:1] == ["plan"]:
        os.environ.setdefault("PJRT_DEVICE", "CPU")  # torch_xla complains when it has to guess
    if words and words[0] in SUBCOMMANDS:
        return importlib.import_module(f".{words[0]}", __package__).main(words[1:])
    arguments = build_parser().parse_intermixed_args(words)
    from .config import load_config
    from .plain_data import to_yaml

    try:
        config = load_config(arguments.config, arguments.overrides)
    except ValueError as error:
        return _fail(error, EXIT_BAD_INPUT)
    if arguments.dry_run:
        sys.stdout.write(to_yaml(config))
        return 0
    is_main = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(
        level=logging.INFO if is_main else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger(__name__).info("configuration:\n%s", to_yaml(config).rstrip())
    from .checkpoint import CheckpointError
    from .trainer import Trainer, TrainingDiverged

    try:
        trainer = Trainer(config, accept_changed_data=arguments.accept_changed_data)
    except ValueError as error:
        return _fail(error, EXIT_BAD_INPUT)
    try:
        trainer.train()
    except (CheckpointError, TrainingDiverged) as error:
        return _fail(error, 1)
    finally:
        trainer.close()
    return 0


def _fail(error: Exception, status: int) -> int:
    sys.stderr.write(f"coda_pretrain: error: {error}\n")
    return status


if __name__ == "__main__":
    sys.exit(main())
