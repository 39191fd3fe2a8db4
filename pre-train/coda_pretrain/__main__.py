"""`python -m coda_pretrain VERB`: prepare data, plan a run, train, export what it made, and plot it.

Each verb has its own `--help`. Without a verb, as in `python -m coda_pretrain --config FILE`, it is `train`.
"""

import argparse
import importlib
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from CoDALanguageModel.errors import INTERRUPTED, UserError, run_program

EXIT_BAD_INPUT = 2
VERBS = {
    "download": ("data.__main__:download_main", "data sets of the Hub to text"),
    "data": ("data.__main__:main", "text to token shards"),
    "cluster": ("data.cluster:main", "the same on many machines, through datatrove"),
    "plan": ("plan.plan:main", "memory, speed and days of a run, before it is rented"),
    "train": ("__main__:train", "pre- or mid-train a model (what happens without a verb)"),
    "export": ("checkpoints.export:main", "a checkpoint to safetensors"),
    "plot": ("watch.plot:main", "what a run did, as pictures"),
}
"""Module and function below this package, and what it does."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m coda_pretrain [train]",
        description="Pre- or mid-train a CoDA model.",
        epilog="Other verbs, each with its own --help:\n"
        + "\n".join(f"  {verb:<10}{says}" for verb, (_, says) in VERBS.items() if verb != "train"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    parser.add_argument(
        "--export_dir", type=Path, help="also export the finished run there, as the verb export does; must not exist"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the files")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 when the run is finished or was stopped by SIGTERM, 130 when it was by Ctrl-C, 2 for bad input and 1 for a
        failed run; the message of either is the last line on stderr.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("USE_TORCH_XLA", "0")  # transformers would import it, which takes seconds, and not use it
    if importlib.util.find_spec("libtpu") is None or words[:1] == ["plan"]:
        os.environ.setdefault("PJRT_DEVICE", "CPU")  # torch_xla complains when it has to guess
    verb, words = (words[0], words[1:]) if words and words[0] in VERBS else ("train", words)
    module, _, function = VERBS[verb][0].partition(":")
    return getattr(importlib.import_module(f".{module}", __package__), function)(words)


def train(words: Sequence[str]) -> int:
    """`train`; see `main` for what is returned."""
    arguments = build_parser().parse_intermixed_args(words)
    from .config import load_config
    from .plain_data import to_yaml

    try:
        config = load_config(arguments.config, arguments.overrides)
    except UserError as error:
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
    from .checkpoints.checkpoint import CheckpointError
    from .checkpoints.export import export, find_checkpoint
    from .train.trainer import Trainer, TrainingDiverged

    folder = arguments.export_dir
    try:
        if folder is not None and folder.exists():
            raise UserError(f"--export_dir {folder} exists; remove it or choose another")
        trainer = Trainer(config, accept_changed_data=arguments.accept_changed_data)
    except UserError as error:
        return _fail(error, EXIT_BAD_INPUT)
    try:
        state = trainer.train()
        if folder is not None and is_main and state.step >= trainer.num_steps:
            export(find_checkpoint(trainer.checkpoints, state.step), folder)
    except (CheckpointError, TrainingDiverged, UserError) as error:
        return _fail(error, 1)
    finally:
        trainer.close()
    return INTERRUPTED if trainer.stopped_by == signal.SIGINT else 0


def _fail(error: Exception, status: int) -> int:
    sys.stderr.write(f"coda_pretrain: error: {error}\n")
    return status


if __name__ == "__main__":
    run_program(main)
