"""``python -m coda_pretrain.pipeline``: text to token shards on many machines, through datatrove.

datatrove reads and filters the text and spreads tasks over processes, a Slurm cluster or Ray; the step below turns the
documents of a task into shards of this package's own format, in a folder or behind an fsspec URL that all machines
see. A task that was stopped is done again, one that is finished is skipped; the manifest is written when all are. On
one machine ``python -m coda_pretrain.data`` needs less. Needs the extra ``datatrove``.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .documents import checked_text
from .prepare import is_held_out
from .shards import MANIFEST_NAME, ShardRecord, ShardWriter, build_manifest, token_dtype
from .storage import Place, place_of, write_durably
from .tokenization import TokenizerFacts, encoder_of, load_tokenizer

try:
    from datatrove.data import DocumentsPipeline
    from datatrove.executor.base import PipelineExecutor
    from datatrove.pipeline.base import PipelineStep
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"coda_pretrain.pipeline needs {error.name}: install the extra 'datatrove', or use python -m coda_pretrain.data"
    ) from error

logger = logging.getLogger(__name__)

BATCH_DOCUMENTS = 256  # given to the tokenizer at once
SPLITS = ("train", "validation")


class WriteTokenShards(PipelineStep):
    """The last step of a pipeline: the documents of one task become shards, and one record when they are all there."""

    name = "token shards"
    type = "CoDA"

    def __init__(
        self, facts: TokenizerFacts, output: str, *, shard_tokens: int = 50_000_000, validation_fraction: float = 0.0
    ) -> None:
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
        """Write the shards of task ``rank`` and record them."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the tasks are the parallelism
        encoder, end = encoder_of(self.facts), self.facts.document_end_id
        counts: Counter[str] = Counter()
        shards: dict[str, list[ShardRecord]] = {split: [] for split in SPLITS}
        with tempfile.TemporaryDirectory() as scratch:
            writers: dict[str, ShardWriter] = {}

            def finish(split: str) -> None:
                record = writers.pop(split).commit()
                if record is not None:
                    self._deliver(Path(scratch), split, record)
                    shards[split].append(record)

            for texts in self._batches(data, counts):
                encodings = encoder.encode_batch_fast(texts, add_special_tokens=False)
                for text, encoding in zip(texts, encodings, strict=True):
                    split = SPLITS[is_held_out(text, self.validation_fraction)]
                    if split not in writers:
                        name = f"{split}-{rank:06d}-{len(shards[split]):04d}"
                        writers[split] = ShardWriter(Path(scratch), name, token_dtype(self.facts.vocab_size - 1))
                    writers[split].add([*encoding.ids, end])
                    counts.update(documents=1, tokens=len(encoding.ids) + 1)
                    if writers[split].num_tokens >= self.shard_tokens:
                        finish(split)
            for split in list(writers):
                finish(split)
        for name, value in counts.items():
            self.stat_update(name, value=value)
        content = {split: [dataclasses.asdict(shard) for shard in shards[split]] for split in SPLITS}
        record = {"rank": rank, "tasks": world_size, "tokenizer": self.facts.fingerprint, "counts": counts, **content}
        folder = place_of(self.output) / "tasks"
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / f"{rank:06d}.json", json.dumps(record))

    def _batches(self, data: DocumentsPipeline, counts: Counter[str]) -> Iterable[list[str]]:
        texts: list[str] = []
        for document in data:
            text = checked_text(document.text)
            if text is None or not text.strip():
                counts["undecodable" if text is None else "empty"] += 1
                continue
            texts.append(text)
            if len(texts) == BATCH_DOCUMENTS:
                yield texts
                texts = []
        if texts:
            yield texts

    def _deliver(self, scratch: Path, split: str, record: ShardRecord) -> None:
        folder = split_folder(place_of(self.output), split)
        folder.mkdir(parents=True, exist_ok=True)
        for suffix in (".bin", ".ends"):
            source = scratch / f"{record.name}{suffix}"
            target = folder / source.name
            partial = folder / f".{source.name}.tmp"
            with source.open("rb") as stream, (partial if isinstance(partial, Path) else target).open("wb") as copy:
                while block := stream.read(1 << 24):
                    copy.write(block)
            if isinstance(partial, Path):  # a store shows a file only when it is whole
                partial.replace(target)
            source.unlink()


class WriteManifests(PipelineStep):
    """Runs as one task after all others: checks that every task has its record and writes the manifests."""

    name = "manifests"
    type = "CoDA"

    def __init__(self, facts: TokenizerFacts, output: str, *, tasks: int, validation_fraction: float = 0.0) -> None:
        """``tasks`` is how many tasks wrote shards; the other arguments are those of ``WriteTokenShards``."""
        super().__init__()
        self.facts, self.output, self.tasks = facts, output, tasks
        self.validation_fraction = validation_fraction

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> None:
        """Write the manifest of each split, the training one last.

        Raises:
            ValueError: a task has no record, or one of another preparation, or a split has no document.
        """
        output = place_of(self.output)
        records = [self._record(output / "tasks" / f"{task:06d}.json") for task in range(self.tasks)]
        totals: Counter[str] = Counter()
        for record in records:
            totals.update(record["counts"])
        for split in ("validation", "train"):
            if split == "validation" and not self.validation_fraction:
                continue
            shards = [ShardRecord(**shard) for record in records for shard in record[split]]
            if not shards:
                raise ValueError(f"the {split} split got none of {totals['documents']} documents in {self.tasks} tasks")
            manifest = build_manifest(
                split=split,
                dtype=token_dtype(self.facts.vocab_size - 1),
                shards=shards,
                validation_fraction=self.validation_fraction,
                tokenizer=self.facts.manifest_entry(),
                input_totals=totals,
            )
            write_durably(split_folder(output, split) / MANIFEST_NAME, json.dumps(manifest, indent=1))

    def _record(self, path: Place) -> dict[str, Any]:
        if not path.is_file():
            raise ValueError(f"{path} is missing: that task has not finished; start the same command again")
        record = json.loads(path.read_text(encoding="utf-8"))
        expected = {"tasks": self.tasks, "tokenizer": self.facts.fingerprint}
        for name, value in expected.items():
            if record[name] != value:
                raise ValueError(f"{path} is of a preparation with {name} {record[name]!r}, not {value!r}")
        return record


def split_folder(output: Place, split: str) -> Place:
    """Where the shards of a split lie."""
    return output / "validation" if split == "validation" else output


def executors(
    kind: str, shards: list[PipelineStep], manifest: PipelineStep, arguments: argparse.Namespace
) -> PipelineExecutor:
    """The executor of the last task, which starts the others first.

    Args:
        kind: ``local``, ``slurm`` or ``ray``.
        shards: the steps of the tasks that write shards: a reader, filters, ``WriteTokenShards``.
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


def reader_of(arguments: argparse.Namespace) -> PipelineStep:
    """Datatrove's reader of JSONL or parquet."""
    from datatrove.pipeline.readers import JsonlReader, ParquetReader

    readers = {"jsonl": JsonlReader, "parquet": ParquetReader}
    return readers[arguments.reader](arguments.input, text_key=arguments.text_key, glob_pattern=arguments.pattern)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0 on success, 2 when the input is at fault."""
    parser = argparse.ArgumentParser(prog="python -m coda_pretrain.pipeline", description=__doc__.split("\n\n")[0])
    parser.add_argument("--input", required=True, help="folder or fsspec URL that the reader reads")
    parser.add_argument("--reader", choices=("jsonl", "parquet"), default="jsonl")
    parser.add_argument("--pattern", help="pattern of the files, below --input")
    parser.add_argument("--text_key", default="text", help="field or column that holds the text (default: text)")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--document_end", default="<|endoftext|>", help="token after each document")
    parser.add_argument("--output", required=True, help="folder or fsspec URL that all machines see")
    parser.add_argument("--logs", help="folder or URL of datatrove's logs and finished tasks (default: OUTPUT/logs)")
    parser.add_argument("--validation_fraction", type=float, default=0.0)
    parser.add_argument("--shard_tokens", type=int, default=50_000_000)
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
    try:
        facts = load_tokenizer(arguments.tokenizer, arguments.document_end)
        place_of(arguments.output)
    except ValueError as error:
        sys.stderr.write(f"coda_pretrain.pipeline: error: {error}\n")
        return 2
    held_out = arguments.validation_fraction
    shards = WriteTokenShards(
        facts, arguments.output, shard_tokens=arguments.shard_tokens, validation_fraction=held_out
    )
    manifest = WriteManifests(facts, arguments.output, tasks=arguments.tasks, validation_fraction=held_out)
    executors(arguments.executor, [reader_of(arguments), shards], manifest, arguments).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
