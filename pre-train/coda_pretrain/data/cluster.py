"""`python -m coda_pretrain cluster`: text to token shards on many machines, through datatrove.

datatrove spreads tasks over processes, a Slurm cluster or Ray, and can filter the text; the steps below read documents
as `python -m coda_pretrain data` does and turn those of a task into shards of this package's own format, in a folder
or behind an fsspec URL that all machines see. A task that was stopped is done again, one that is finished is skipped;
the manifest is written when all are. On one machine `python -m coda_pretrain data` needs less. Needs the extra
`datatrove`.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from glob import has_magic
from pathlib import Path
from typing import Any

from CoDALanguageModel.errors import UserError, run_program

from ..places import CHUNK_BYTES, Place, copy_to_local, is_url, place_of, write_durably
from .documents import Document, document_of, jsonl_documents, parquet_documents, parquet_metadata
from .inputs import Listing, UnreadableFileError, check_openable, files_of_folder, matches_of, printable
from .prepare import add_options, check_numbers, is_held_out, tokenized
from .shards import MANIFEST_NAME, ShardRecord, ShardWriter, build_manifest, token_dtype
from .skipped import Tally
from .tokenization import TokenizerFacts, encoder_of, load_tokenizer

try:
    from datatrove.data import Document as DatatroveDocument
    from datatrove.data import DocumentsPipeline
    from datatrove.executor.base import PipelineExecutor
    from datatrove.io import DataFolder
    from datatrove.pipeline.base import PipelineStep
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"coda_pretrain cluster needs {error.name}: install the extra 'datatrove', or use python -m coda_pretrain data"
    ) from error

logger = logging.getLogger(__name__)

IDENTITY_NAME = "identity.json"
PROBLEM_KEYS = ("problem", "reason", "where")  # metadata of a document without text, which is counted
SPLITS = ("train", "validation")


class ReadDocuments(PipelineStep):
    """The first step of a pipeline: the documents of a task's files; one without text stands for what is skipped."""

    name = "documents"
    type = "CoDA"

    def __init__(self, files: Sequence[str], reader: str, text_key: str) -> None:
        """Settings of the step.

        Args:
            files: paths or fsspec URLs; task r of n reads files r, r + n, ...
            reader: `jsonl` or `parquet`.
            text_key: field or column that holds the text.
        """
        super().__init__()
        self.files, self.reader, self.text_key = list(files), reader, text_key

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        """Read the files of task `rank`."""
        if data:
            yield from data
        read = parquet_documents if self.reader == "parquet" else jsonl_documents
        for path in self.files[rank::world_size]:
            self.stat_update("input_files")
            with place_of(path).open("rb") as stream:
                for document in read(path, stream, self.text_key):
                    metadata = {"file_path": path}
                    if document.text is None:
                        metadata |= {name: getattr(document, name) for name in PROBLEM_KEYS}
                    yield DatatroveDocument(
                        text=document.text or "", id=f"{printable(path)}/{document.where}", metadata=metadata
                    )


class WriteTokenShards(PipelineStep):
    """The last step of a pipeline: the documents of one task become shards, and one record when they are all there."""

    name = "token shards"
    type = "CoDA"

    def __init__(self, facts: TokenizerFacts, output: str, *, shard_tokens: int, validation_fraction: float) -> None:
        """Settings of the step.

        Args:
            facts: the tokenizer; travels to the machines with the step.
            output: folder or fsspec URL of the shards.
            shard_tokens: a task starts another shard after about this many tokens.
            validation_fraction: share of the documents held out, chosen by a hash of their text.
        """
        super().__init__()
        self.facts, self.output = facts, output
        self.shard_tokens, self.validation_fraction = shard_tokens, validation_fraction

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> None:
        """Write the shards of task `rank` and record them."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks are the parallelism
        encoder, end = encoder_of(self.facts), self.facts.document_end_id
        tally = Tally()
        shards: dict[str, list[ShardRecord]] = {split: [] for split in SPLITS}
        with tempfile.TemporaryDirectory() as scratch:
            writers: dict[str, ShardWriter] = {}

            def finish(split: str) -> None:
                record = writers.pop(split).commit()
                if record is not None:
                    self._deliver(Path(scratch), split, record)
                    shards[split].append(record)

            for document, ids in tokenized(self._documents(data), encoder, end):
                if ids is None:
                    tally.skip(document)
                    continue
                split = SPLITS[is_held_out(document.text, self.validation_fraction)]
                if split not in writers:
                    name = f"{split}-{rank:06d}-{len(shards[split]):04d}"
                    writers[split] = ShardWriter(Path(scratch), name, token_dtype(self.facts.vocab_size - 1))
                writers[split].add(ids)
                tally.count(document.path, documents=1, tokens=len(ids))
                if writers[split].num_tokens >= self.shard_tokens:
                    finish(split)
            for split in list(writers):
                finish(split)
        for name, value in tally.totals().items():
            self.stat_update(name, value=value)
        content = {split: [dataclasses.asdict(shard) for shard in shards[split]] for split in SPLITS}
        record = {"rank": rank, "tasks": world_size, "tokenizer": self.facts.fingerprint, **tally.to_plain(), **content}
        folder = place_of(self.output) / "tasks"
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / f"{rank:06d}.json", json.dumps(record))

    def _documents(self, data: DocumentsPipeline) -> Iterator[Document]:
        for document in data:
            path = str(document.metadata.get("file_path", ""))
            if document.metadata.get("problem"):
                yield Document(path, None, **{name: document.metadata[name] for name in PROBLEM_KEYS})
            else:
                yield document_of(document.text, path, "text", str(document.id))

    def _deliver(self, scratch: Path, split: str, record: ShardRecord) -> None:
        folder = split_folder(place_of(self.output), split)
        folder.mkdir(parents=True, exist_ok=True)
        for suffix in (".bin", ".ends"):
            source = scratch / f"{record.name}{suffix}"
            target = folder / source.name
            if isinstance(target, Path):
                copy_to_local(source, target)
            else:  # a store shows a file only when it is whole
                with source.open("rb") as stream, target.open("wb") as copy:
                    shutil.copyfileobj(stream, copy, CHUNK_BYTES)
            source.unlink()


class WriteManifests(PipelineStep):
    """Runs as one task after all others: checks that every task has its record and writes the manifests."""

    name = "manifests"
    type = "CoDA"

    def __init__(
        self,
        facts: TokenizerFacts,
        output: str,
        *,
        tasks: int,
        validation_fraction: float = 0.0,
        max_bad_share: float = 0.01,
        listing: Listing | None = None,
    ) -> None:
        """Settings of the step.

        Args:
            facts: that of `WriteTokenShards`, as `output` and `validation_fraction` are.
            output: see above.
            tasks: how many tasks wrote shards.
            validation_fraction: see above.
            max_bad_share: largest share of the documents, and of the files, that may have been unreadable.
            listing: what was found at the start, for the manifest.
        """
        super().__init__()
        self.facts, self.output, self.tasks = facts, output, tasks
        self.validation_fraction, self.max_bad_share = validation_fraction, max_bad_share
        self.listing = listing or Listing()

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the manifest of each split, the training one last.

        Raises:
            UserError: a task has no record, or one of another preparation, or a split has no document.
            TooMuchUnreadableError: more could not be read than may be.
        """
        output = place_of(self.output)
        records = [self._record(output / "tasks" / f"{task:06d}.json") for task in range(self.tasks)]
        tally = Tally.of(records)
        tally.add_listing(self.listing)
        tally.check_share(self.max_bad_share)
        for split in ("validation", "train"):
            if split == "validation" and not self.validation_fraction:
                continue
            shards = [ShardRecord(**shard) for record in records for shard in record[split]]
            if not shards:
                found = tally.totals()["documents"]
                raise UserError(f"the {split} split got none of {found} documents in {self.tasks} tasks")
            manifest = build_manifest(
                split=split,
                dtype=token_dtype(self.facts.vocab_size - 1),
                shards=shards,
                validation_fraction=self.validation_fraction,
                tokenizer=self.facts.manifest_entry(),
                **tally.manifest_entry(self.listing),
            )
            write_durably(split_folder(output, split) / MANIFEST_NAME, json.dumps(manifest, indent=1))

    def _record(self, path: Place) -> dict[str, Any]:
        if not path.is_file():
            raise UserError(f"{path} is missing: that task has not finished; start the same command again")
        record = json.loads(path.read_text(encoding="utf-8"))
        expected = {"tasks": self.tasks, "tokenizer": self.facts.fingerprint}
        for name, value in expected.items():
            if record[name] != value:
                raise UserError(f"{path} is of a preparation with {name} {record[name]!r}, not {value!r}")
        return record


def split_folder(output: Place, split: str) -> Place:
    """Where the shards of a split lie."""
    return output / "validation" if split == "validation" else output


def executors(
    kind: str, shards: list[PipelineStep], manifest: PipelineStep, arguments: argparse.Namespace
) -> PipelineExecutor:
    """The executor of the last task, which starts the others first.

    Args:
        kind: `local`, `slurm` or `ray`.
        shards: the steps of the tasks that write shards: a reader, filters, `WriteTokenShards`.
        manifest: the step that follows them.
        arguments: the command line.
    """
    logs = arguments.logs
    common: dict[str, Any] = {"tasks": arguments.tasks, "workers": arguments.workers}
    if kind == "local":
        from datatrove.executor.local import LocalPipelineExecutor

        first = LocalPipelineExecutor(shards, logging_dir=f"{logs}/shards", **common)
        return LocalPipelineExecutor([manifest], tasks=1, logging_dir=f"{logs}/manifest", depends=first)
    if kind == "ray":
        from datatrove.executor.ray import RayPipelineExecutor

        first = RayPipelineExecutor(shards, logging_dir=f"{logs}/shards", **common)
        return RayPipelineExecutor([manifest], tasks=1, logging_dir=f"{logs}/manifest", depends=first)
    from datatrove.executor.slurm import SlurmPipelineExecutor

    slurm = {"time": arguments.slurm_time, "partition": arguments.slurm_partition, "venv_path": arguments.slurm_venv}
    first = SlurmPipelineExecutor(shards, logging_dir=f"{logs}/shards", job_name="shards", **common, **slurm)
    return SlurmPipelineExecutor(
        [manifest], tasks=1, logging_dir=f"{logs}/manifest", job_name="manifest", depends=first, **slurm
    )


def list_input(folder: str, pattern: str | None, *, reader: str, text_key: str, output: str) -> tuple[Listing, str]:
    """The files of the input, and a hash of their names, sizes and times. Local ones are looked at.

    Raises:
        UserError: there is none.
    """
    listing, stats = Listing(), []
    if pattern and not has_magic(pattern):
        pattern = f"*{pattern}"  # a suffix
    if is_url(folder):
        store = DataFolder(folder)
        infos = store.glob(pattern, detail=True) if pattern else store.find("", detail=True)
        for name, info in sorted(infos.items()):
            if info["type"] != "directory":
                listing.files.append(f"{folder.rstrip('/')}/{name}")
                stats.append([listing.files[-1], info.get("size")])
    else:
        found = matches_of(os.path.join(folder, pattern), listing, output) if pattern else []
        for path in sorted(found if pattern else files_of_folder(folder, listing, output)):
            if os.path.isdir(path):
                continue
            try:
                status = check_openable(path, reader)
                if reader == "parquet":
                    with open(path, "rb") as stream:
                        parquet_metadata(stream, text_key)
            except UnreadableFileError as error:
                listing.unusable[path] = str(error)
            else:
                listing.files.append(path)
                stats.append([path, status.st_size, status.st_mtime_ns])
    if not listing.files and not listing.unusable:
        raise UserError(f"--input {folder} holds no file{f' that --pattern {pattern} matches' if pattern else ''}")
    return listing, hashlib.sha256(json.dumps(stats).encode()).hexdigest()


def check_same_preparation(output: Place, identity: dict[str, Any]) -> None:
    """Compare with the preparation that `output` holds, and record this one if it holds none.

    Raises:
        UserError: it is another one, so finished tasks would be mixed with tasks of other text.
    """
    path = output / "tasks" / IDENTITY_NAME
    if path.is_file():
        other = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(name for name in identity if other.get(name) != identity[name])
        if differing:
            raise UserError(
                f"--output {output} holds tasks of another preparation (different: {', '.join(differing)}); "
                "choose another folder, or remove it and its --logs"
            )
        return
    if path.parent.is_dir():
        logger.warning("%s holds tasks that do not say which input they are of; they are taken as of this one", output)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(identity, indent=1))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 when the input is at fault, which includes too much that is unreadable."""
    parser = argparse.ArgumentParser(prog="python -m coda_pretrain cluster", description=__doc__.split("\n\n")[0])
    parser.add_argument("--input", required=True, help="folder or fsspec URL that the reader reads")
    parser.add_argument("--reader", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--pattern", help="pattern of the files, below --input")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--output", required=True, help="folder or fsspec URL that all machines see")
    parser.add_argument("--logs", help="folder or URL of datatrove's logs and finished tasks (default: OUTPUT/logs)")
    add_options(parser)
    parser.add_argument("--executor", choices=("local", "slurm", "ray"), default="local")
    parser.add_argument("--tasks", type=int, default=1, help="parts that the input's files are dealt to")
    parser.add_argument("--workers", type=int, default=-1, help="tasks at once (default: all)")
    parser.add_argument("--slurm_partition", help="required with --executor slurm")
    parser.add_argument("--slurm_time", default="20:00:00", help="limit of a task")
    parser.add_argument("--slurm_venv", help="virtual environment of the nodes")
    arguments = parser.parse_args(argv)
    arguments.logs = arguments.logs or f"{arguments.output.rstrip('/')}/logs"
    if arguments.executor == "slurm" and arguments.slurm_partition is None:
        parser.error("--executor slurm needs --slurm_partition")
    held_out = arguments.validation_fraction
    try:
        check_numbers(arguments)
        facts = load_tokenizer(arguments.tokenizer, arguments.document_end)
        output = place_of(arguments.output)
        listing, digest = list_input(
            arguments.input,
            arguments.pattern,
            reader=arguments.reader,
            text_key=arguments.text_key,
            output=arguments.output,
        )
        known = Tally()
        known.add_listing(listing)
        known.check_share(arguments.max_bad_share)
        names = ("reader", "text_key", "document_end", "validation_fraction", "shard_tokens", "tasks")
        settings = {name: getattr(arguments, name) for name in names}
        check_same_preparation(output, {"input": digest, "tokenizer": facts.fingerprint, **settings})
        reader = ReadDocuments(listing.files, arguments.reader, arguments.text_key)
        shards = WriteTokenShards(
            facts, arguments.output, shard_tokens=arguments.shard_tokens, validation_fraction=held_out
        )
        manifest = WriteManifests(
            facts,
            arguments.output,
            tasks=arguments.tasks,
            validation_fraction=held_out,
            max_bad_share=arguments.max_bad_share,
            listing=listing,
        )
        executors(arguments.executor, [reader, shards], manifest, arguments).run()
    except UserError as error:
        sys.stderr.write(f"coda_pretrain cluster: error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    run_program(main)
