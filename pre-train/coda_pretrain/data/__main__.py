"""`python -m coda_pretrain data`: text to token shards; `download`: data sets of the Hub to text.

The work is in `download` (fetching text), `documents` (reading it), `prepare` (tokenizing it into shards),
`shards` (the format) and `mixture` (the order of a run).
"""

import argparse
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from CoDALanguageModel.errors import UserError, run_program

from .download import describe, download, load_corpus
from .inputs import printable
from .prepare import DEFAULTS, PrepareConfig, WorkerDied, add_options, prepare

logger = logging.getLogger(__name__)


def build_parser(*, tokenizes: bool = True) -> argparse.ArgumentParser:
    """The command line; its options are the fields of `PrepareConfig`, of which a download needs only the output."""
    parser = argparse.ArgumentParser(prog="python -m coda_pretrain data", description="Turn text into token shards.")
    parser.set_defaults(**DEFAULTS | {"num_workers": os.cpu_count() or 1})
    source = parser.add_argument_group("input")
    source.add_argument(
        "--input",
        dest="inputs",
        nargs="+",
        help="files, folders or glob patterns: "
        ".jsonl (also .gz, .bz2, .zst, .lz4), .parquet, or text files, one document each",
    )
    source.add_argument(
        "--each",
        action="store_true",
        help="shards of each input apart, in the folder of OUTPUT that has its name (of corpus/code.jsonl.gz: code)",
    )
    source.add_argument("--exclude", nargs="+", help="path patterns to leave out, e.g. '*/test/*'")
    source.add_argument("--text_suffixes", nargs="+", help="suffixes of text files")
    source.add_argument("--hf_dataset", help="name or local folder of a Hugging Face data set, instead of --input")
    source.add_argument("--hf_config", help="configuration (subset) of the data set")
    source.add_argument("--hf_split", help="split of the data set (default: %(default)s)")
    source.add_argument(
        "--download",
        nargs="+",
        help="fetch the data sets that these files of configs/data describe into folders of OUTPUT, and do no more",
    )
    parser.add_argument("--tokenizer", required=tokenizes, help="tokenizer folder")
    parser.add_argument("--output", required=True, help="folder for shards and manifest.json")
    add_options(parser)
    parser.add_argument("--num_workers", type=int, help="processes (default: all cores)")
    parser.add_argument("--overwrite", action="store_true", help="remove another preparation from OUTPUT first")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0 on success, also with skipped documents and files up to `--max_bad_share`; 2 for bad input, which more of
        them are; 1 when the work could not be done (a full disk, a worker that died). The message is the last on
        stderr, and what is finished is kept for the next call.
    """
    given = sys.argv[1:] if argv is None else argv
    arguments = vars(build_parser(tokenizes="--download" not in given).parse_args(given))
    descriptions = arguments.pop("download")
    for name in ("inputs", "exclude", "text_suffixes"):
        arguments[name] = tuple(arguments[name])
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # --num_workers says how many cores are used
    if descriptions is not None:
        return download_all(descriptions, Path(arguments["output"]), arguments["num_workers"])
    each = arguments.pop("each")
    try:
        for config in one_for_each(PrepareConfig(**arguments)) if each else [PrepareConfig(**arguments)]:
            prepare_and_tell(config)
    except UserError as error:
        logger.error("error: %s", error)
        return 2
    except (OSError, WorkerDied) as error:
        logger.error("error: %s; the same command continues from here", error)
        return 1
    return 0


def one_for_each(config: PrepareConfig) -> list[PrepareConfig]:
    """A preparation for each input of `config`, in a folder of its own.

    Raises:
        UserError: an input has no name for a folder, or two have the same.
    """
    if not config.inputs:
        raise UserError("--each needs --input; a data set of --hf_dataset is one input")
    named: dict[str, str] = {}
    for path in config.inputs:
        name = Path(path).resolve().name.partition(".")[0]
        is_pattern = any(character in path for character in "*?[") and not Path(path).exists()
        if not name or is_pattern:
            raise UserError(f"--each names folders after files and folders; {path!r} gives no name")
        if name in named:
            raise UserError(f"--each would put {named[name]!r} and {path!r} into one folder, {name!r}")
        named[name] = path
    return [
        dataclasses.replace(config, inputs=(path,), output=str(Path(config.output, name)))
        for name, path in named.items()
    ]


def prepare_and_tell(config: PrepareConfig) -> None:
    """Prepare, and print what was made."""
    started = time.perf_counter()
    summary = prepare(config)
    seconds = time.perf_counter() - started
    if listed := summary["tally"].listed():
        logger.warning("skipped, and named in the manifest:\n%s", listed)
    print(
        f"{summary['documents']} documents, {summary['tokens']} tokens "
        f"({summary['empty']} empty and {summary['undecodable']} undecodable skipped, "
        f"{len(summary['tally'].broken)} files not readable); "
        f"{summary['new_tokens']} tokens made in {seconds:.1f} s ({summary['new_tokens'] / seconds:.0f} tokens/s)"
    )
    for split, path in summary["manifests"].items():
        print(f"{split}: {printable(path)}", flush=True)


def download_main(argv: Sequence[str] | None = None) -> int:
    """Run `download`, which is `data --download` with a command line of its own; see `main`."""
    parser = argparse.ArgumentParser(prog="python -m coda_pretrain download", description="Hub data sets to text.")
    parser.add_argument("descriptions", nargs="+", help="files of configs/data")
    parser.add_argument("--output", required=True, help="a folder of each goes into this one")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return download_all(arguments.descriptions, Path(arguments.output), arguments.num_workers)


def download_all(descriptions: Sequence[str], output: Path, num_workers: int) -> int:
    """Fetch the described data sets; see `main` for what is returned."""
    try:
        for corpus in [load_corpus(path) for path in descriptions]:
            print(describe(corpus, download(corpus, output, num_workers=num_workers)), flush=True)
    except UserError as error:
        logger.error("error: %s", error)
        return 2
    except OSError as error:
        logger.error("error: %s; the same command continues from here", error)
        return 1
    return 0


if __name__ == "__main__":
    run_program(main)
