"""Text to token shards: parallel over pieces of the input, restartable, and the same whatever the number of workers.

Each piece of the input becomes at most one shard per split. A worker writes a shard under temporary names and renames
it; the parent then appends one line to `progress.jsonl`, which is the commit. A run that was killed keeps what its
progress file lists and what still has the recorded hash, and does the rest again; `manifest.json` appears last.
Not here: the format of a shard (`shards`), files and records (`documents`), the command line (`__main__`).
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from CoDALanguageModel.errors import UserError

from .documents import Document, Part, group_parts, load_dataset, parts_of_dataset, parts_of_file, read_documents
from .inputs import Listing, UnreadableFileError, find_files
from .journal import Progress, exclusive, remove_preparation
from .shards import MANIFEST_NAME, ShardRecord, ShardWriter, build_manifest, replace_with_json, token_dtype
from .skipped import EARLY_FACTOR, Tally, described
from .tokenization import MAX_WINDOW, TokenizerFacts, encode_texts, encoder_of, load_tokenizer

logger = logging.getLogger(__name__)

BATCH_CHARACTERS = 1 << 20  # of documents that are tokenized together
BATCH_DOCUMENTS = 1 << 12
BYTES_PER_TOKEN = 4  # of English and source code, to turn a wanted number of tokens into bytes of input


class WorkerDied(RuntimeError):
    """A process of the preparation was killed; what the others finished is kept."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """What to prepare, from what, and how."""

    inputs: tuple[str, ...] = ()
    """Files, folders and glob patterns; or give `hf_dataset`."""

    exclude: tuple[str, ...] = ()
    """Patterns of paths below `inputs` to leave out."""

    text_suffixes: tuple[str, ...] = (".txt", ".py", ".md")
    """Suffixes of files that are one document each."""

    hf_dataset: str | None = None
    """Name or local folder of a Hugging Face data set."""

    hf_config: str | None = None
    hf_split: str = "train"
    text_key: str = "text"
    """Field or column that holds the text."""

    tokenizer: str
    """Tokenizer folder (or a name that is already in the local cache)."""

    document_end: str = "<|endoftext|>"
    """Token that is put after each document."""

    output: str
    """Folder for the shards; held-out ones go to its subfolder `validation`."""

    num_workers: int = 1
    shard_tokens: int = 50_000_000
    """About how many tokens a shard holds; the input is cut at four bytes per token."""

    validation_fraction: float = 0.0
    """Share of the documents held out, chosen by a hash of the text, so equal documents fall on the same side."""

    max_bad_share: float = 0.01
    """Largest share of the documents, and of the files, that may be unreadable. They are skipped, named and counted."""

    overwrite: bool = False
    """Remove what another preparation left in `output` first."""

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            UserError: a number is out of range, or not exactly one of `inputs` and `hf_dataset` is given.
        """
        if bool(self.inputs) == (self.hf_dataset is not None):
            raise UserError(f"give exactly one of --input and --hf_dataset, got {self.inputs} and {self.hf_dataset}")
        if self.num_workers < 1:
            raise UserError(f"--num_workers must be at least 1, got {self.num_workers}")
        check_numbers(self)
        if any(not suffix.startswith(".") for suffix in self.text_suffixes):
            raise UserError(f"--text_suffixes must start with a dot, got {self.text_suffixes}")


DEFAULTS = {f.name: f.default for f in dataclasses.fields(PrepareConfig) if f.default is not dataclasses.MISSING}
"""What holds where a command line says nothing."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a user may say on both roads from text to shards, on one machine and on many."""
    names = ("text_key", "document_end", "validation_fraction", "shard_tokens", "max_bad_share")
    parser.set_defaults(**{name: DEFAULTS[name] for name in names})
    parser.add_argument("--text_key", help="field or column that holds the text (default: %(default)s)")
    parser.add_argument("--document_end", help="token after each document (default: %(default)s)")
    parser.add_argument(
        "--validation_fraction",
        type=float,
        help="share of the documents held out into OUTPUT/validation (default: %(default)s)",
    )
    parser.add_argument("--shard_tokens", type=int, help="about how many tokens a shard holds (default: %(default)s)")
    parser.add_argument(
        "--max_bad_share",
        type=float,
        help="largest share of documents, and of files, that may be unreadable and are skipped (default: %(default)s)",
    )


def check_numbers(given: PrepareConfig | argparse.Namespace) -> None:
    """Check the numbers among the values of `add_options`.

    Raises:
        UserError: one is out of range.
    """
    if given.shard_tokens < 1:
        raise UserError(f"--shard_tokens must be at least 1, got {given.shard_tokens}")
    if not 0 <= given.validation_fraction < 1:
        raise UserError(f"--validation_fraction must be in [0, 1), got {given.validation_fraction}")
    if not 0 <= given.max_bad_share <= 1:
        raise UserError(f"--max_bad_share must be in [0, 1], got {given.max_bad_share}")


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document belongs to the validation split: a function of its text alone."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2.0**64


def tokenized(
    documents: Iterable[Document], encoder: Tokenizer, document_end_id: int
) -> Iterator[tuple[Document, np.ndarray | None]]:
    """Each document with its ids, the document end included, in order; None for what cannot be used."""
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document.text or "")
        if held >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield from _tokenized_batch(batch, encoder, document_end_id)
            batch, held = [], 0
    yield from _tokenized_batch(batch, encoder, document_end_id)


def _tokenized_batch(
    batch: list[Document], encoder: Tokenizer, document_end_id: int
) -> Iterator[tuple[Document, np.ndarray | None]]:
    encoded = encode_texts(encoder, [document.text for document in batch if document.text is not None])
    for document in batch:
        ids = None if document.text is None else next(encoded)
        if ids is not None:
            yield document, np.append(ids, np.uint32(document_end_id))
        elif document.text is None:
            yield document, None
        else:
            reason = f"more than {MAX_WINDOW} characters without a place where they can be divided"
            yield Document(document.path, None, "undecodable", reason, document.where), None


class PieceWorker:
    """Turns pieces into shards; one per process."""

    def __init__(self, config: PrepareConfig, facts: TokenizerFacts, dataset: Any) -> None:
        self.config, self.facts, self.dataset = config, facts, dataset
        self.encoder = encoder_of(facts)
        self.dtype = token_dtype(facts.vocab_size - 1)

    def run(self, index: int, piece: tuple[Part, ...]) -> dict[str, Any]:
        """Write the shards of one piece and give its line for the progress file: shards per split, counts per file."""
        output = Path(self.config.output)
        tally = Tally()
        for part in piece:
            tally.count(part.path)
        with (
            ShardWriter(output, f"train-{index:06d}", self.dtype) as train,
            ShardWriter(output / "validation", f"validation-{index:06d}", self.dtype) as validation,
        ):
            for document, ids in tokenized(self._documents(piece), self.encoder, self.facts.document_end_id):
                if ids is None:
                    tally.skip(document)
                    continue
                held_out = is_held_out(document.text, self.config.validation_fraction)
                (validation if held_out else train).add(ids)
                tally.count(document.path, documents=1, tokens=len(ids))
            shards = {"train": train.commit(), "validation": validation.commit()}
        return {
            "piece": index,
            "shards": {split: dataclasses.asdict(shard) for split, shard in shards.items() if shard},
            **tally.to_plain(),
        }

    def _documents(self, piece: tuple[Part, ...]) -> Iterator[Document]:
        for part in piece:
            yield from read_documents(part, self.config.text_key, self.dataset)


_worker: PieceWorker | None = None  # of this process; set by start_worker


def start_worker(config: PrepareConfig, facts: TokenizerFacts, dataset: Any) -> None:
    """Set up a worker process, which ends by itself when its parent dies, however that dies."""
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    _worker = PieceWorker(config, facts, dataset)


def run_piece(index: int, piece: tuple[Part, ...]) -> dict[str, Any]:
    """`PieceWorker.run` of this process."""
    assert _worker is not None, "start_worker has not run in this process"
    return _worker.run(index, piece)


@dataclass(frozen=True)
class Plan:
    """The input, cut into pieces."""

    pieces: list[tuple[Part, ...]]
    identity: dict[str, Any]
    """What identifies the input when a run is taken up again."""

    listing: Listing


def plan_pieces(config: PrepareConfig, dataset: Any) -> Plan:
    """Find the input, look at each file, and cut what can be read into pieces.

    Raises:
        UserError: an input cannot be found, more than `max_bad_share` of the files cannot be read, or the output
            lies inside an input and would be read as text the next time.
    """
    piece_bytes = config.shard_tokens * BYTES_PER_TOKEN
    if dataset is not None:
        parts = parts_of_dataset(config.hf_dataset, len(dataset), dataset.data.nbytes, piece_bytes)
        identity = {"dataset": [config.hf_dataset, config.hf_config, config.hf_split, dataset._fingerprint]}
        return Plan(group_parts(parts, piece_bytes), identity, Listing())
    listing = find_files(list(config.inputs), list(config.exclude), config.text_suffixes, config.output)
    parts_of: dict[str, list[Part]] = {}
    for file in listing.files:
        try:
            parts_of[file] = list(parts_of_file(file, config.text_suffixes, piece_bytes, config.text_key))
        except UnreadableFileError as error:
            listing.unusable[file] = str(error)
    listing.files = list(parts_of)
    known = Tally()
    known.add_listing(listing)
    known.check_share(config.max_bad_share)
    if not parts_of:
        raise UserError(f"none of the {len(listing.unusable)} files of --input can be read:\n{known.listed()}")
    stats = [[file, os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in listing.files]
    digest = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
    parts = (part for file in listing.files for part in parts_of[file])
    return Plan(group_parts(parts, piece_bytes), {"files": digest}, listing)


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Make the token shards of `config` and give the counts of all splits together.

    Returns:
        `documents`, `tokens`, `empty`, `undecodable` (totals over both splits), `new_tokens` (made by this
        call, the rest was there), `tally` (what was read and skipped), `manifests` (path of each split's
        manifest).

    Raises:
        UserError: bad input, or more of it than `max_bad_share` that cannot be read; no document left; or
            `output` holds another preparation.
    """
    facts = load_tokenizer(config.tokenizer, config.document_end)
    dataset = None
    if config.hf_dataset is not None:
        dataset = load_dataset(config.hf_dataset, config.hf_config, config.hf_split, config.text_key)
    plan = plan_pieces(config, dataset)
    if note := described(plan.listing):
        logger.warning("%s", note)
    header = {
        "tokenizer": facts.fingerprint,
        "document_end": config.document_end,
        "text_key": config.text_key,
        "shard_tokens": config.shard_tokens,
        "validation_fraction": config.validation_fraction,
        "input": plan.identity,
    }
    output = Path(config.output)
    (output / "validation" if config.validation_fraction else output).mkdir(parents=True, exist_ok=True)
    with exclusive(output):
        if config.overwrite:
            remove_preparation(output)
        progress = Progress(output, header)
        progress.load()
        (output / MANIFEST_NAME).unlink(missing_ok=True)
        progress.rewrite()
        for leftover in [*output.glob(".train-*.tmp"), *output.glob("validation/.validation-*.tmp")]:
            leftover.unlink()
        kept = sum(counts.get("tokens", 0) for line in progress.finished.values() for counts in line["files"].values())
        tokenize_pieces(config, facts, dataset, plan, progress)
        summary = write_manifests(config, facts, plan.listing, progress)
    return {**summary, "new_tokens": summary["tokens"] - kept}


def tokenize_pieces(config: PrepareConfig, facts: TokenizerFacts, dataset: Any, plan: Plan, progress: Progress) -> None:
    """Run the unfinished pieces, in this process for one worker, else in `num_workers` processes.

    Raises:
        TooMuchUnreadableError: so much cannot be read that the whole will be over `max_bad_share`.
        WorkerDied: a worker process died.
    """
    pieces = plan.pieces
    todo = [index for index in range(len(pieces)) if index not in progress.finished]
    logger.info("%d pieces, %d finished before, %d to do", len(pieces), len(progress.finished), len(todo))
    sizes = [sum(part.size for part in piece) for piece in pieces]
    watch = ShareWatch(config.max_bad_share, plan.listing, sizes, progress)
    watch.check()
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="tokenize", mininterval=1.0) as bar:
        bar.update(sum(sizes[index] for index in progress.finished))
        if config.num_workers == 1:
            worker = PieceWorker(config, facts, dataset)
            for index in todo:
                progress.add(worker.run(index, pieces[index]))
                watch.check()
                bar.update(sizes[index])
            return
        executor = ProcessPoolExecutor(
            min(config.num_workers, max(len(todo), 1)),
            mp_context=multiprocessing.get_context("spawn"),  # forking a process with tokenizer threads can hang
            initializer=start_worker,
            initargs=(config, facts, dataset),
        )
        try:
            running = {executor.submit(run_piece, index, pieces[index]): index for index in todo}
            while running:
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    index = running.pop(future)
                    progress.add(future.result())
                    watch.check()
                    bar.update(sizes[index])
        except BrokenProcessPool as error:
            raise WorkerDied(
                "a worker process died (out of memory?); run the same command again to continue, "
                f"perhaps with fewer than {config.num_workers} --num_workers or smaller --shard_tokens"
            ) from error
        finally:
            executor.shutdown(cancel_futures=True)


class ShareWatch:
    """Stops a run long before its end when far too much of it cannot be read, as under a wrong `--text_key`.

    It looks at the finished pieces from the first one on without a gap, so what it finds depends on the input alone.
    """

    def __init__(self, allowed: float, listing: Listing, sizes: list[int], progress: Progress) -> None:
        self._allowed, self._sizes, self._progress = allowed, sizes, progress
        self._next = self._seen = 0
        self._tally = Tally()
        self._tally.add_listing(listing)

    def check(self) -> None:
        """Take up the pieces that have been finished.

        Raises:
            TooMuchUnreadableError: the whole would have to hold `EARLY_FACTOR` times the documents that its size
                lets expect for the share to be allowed.
        """
        while self._next in self._progress.finished and self._next < len(self._sizes) - 1:
            self._tally.add(Tally.of([self._progress.finished[self._next]]))
            self._seen += self._sizes[self._next]
            self._next += 1
            self._tally.check_share(self._allowed, expected=EARLY_FACTOR * sum(self._sizes) / max(self._seen, 1))


def write_manifests(
    config: PrepareConfig, facts: TokenizerFacts, listing: Listing, progress: Progress
) -> dict[str, Any]:
    """Write the manifest of each split, the training one last, and give the totals.

    Raises:
        UserError: a split that was asked for has no document, or too much cannot be read.
    """
    lines = [progress.finished[index] for index in sorted(progress.finished)]
    tally = Tally.of(lines)
    tally.add_listing(listing)
    totals = tally.totals()
    if not totals["documents"]:
        raise UserError(
            f"no document was found in {len(tally.files)} inputs: {totals['empty']} are empty, "
            f"{totals['undecodable']} cannot be decoded\n{tally.listed()}".rstrip()
        )
    tally.check_share(config.max_bad_share)
    output = Path(config.output)
    splits = {"validation": output / "validation", "train": output}
    if not config.validation_fraction:
        splits.pop("validation")
    manifests = {}
    for split, folder in splits.items():
        shards = [ShardRecord(**line["shards"][split]) for line in lines if split in line["shards"]]
        if not shards:
            raise UserError(
                f"the {split} split got none of {totals['documents']} documents with --validation_fraction "
                f"{config.validation_fraction}; choose another fraction"
            )
        manifest = build_manifest(
            split=split,
            dtype=token_dtype(facts.vocab_size - 1),
            shards=shards,
            validation_fraction=config.validation_fraction,
            tokenizer=facts.manifest_entry(),
            **tally.manifest_entry(listing),
        )
        replace_with_json(folder / MANIFEST_NAME, manifest)
        manifests[split] = str(folder / MANIFEST_NAME)
    return {**totals, "tally": tally, "manifests": manifests}
