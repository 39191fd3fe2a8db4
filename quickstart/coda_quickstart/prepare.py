"""The data stage: corpus, tokenizer, instruction set and held-out benchmarks, written into a run folder."""

import dataclasses
import json
import logging
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from coda_quickstart.corpus import documented_functions, one_line_gaps, standard_library
from coda_quickstart.problems import (
    Program,
    held_out_programs,
    infill_row,
    instruction_row,
    problem_row,
    training_programs,
    validation_programs,
)
from coda_quickstart.stages import read_settings
from coda_quickstart.tokenizer import train_tokenizer
from CoDALanguageModel.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)

FUNCTIONS_PER_DOCUMENT = 4
PLAIN_INSTRUCTION = "Write a function."


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Sizes and seeds of everything the data stage makes."""

    seed: int = 0
    vocab_size: int
    """Entries of the tokenizer, special tokens included."""
    context_tokens: int
    """Longest input of the model, recorded in the tokenizer."""
    training_programs: int
    """Generated rows of the instruction set."""
    plain_functions: int
    """Further generated rows whose answer is a whole documented function: they keep the skill of infilling alive."""
    corpus_pairs: int
    """Docstring -> function rows cut from the corpus."""
    max_pair_characters: int
    """Longest such row."""
    validation_programs: int
    """Rows for the validation loss of fine-tuning, of held-out compositions that no problem has."""
    problems: int
    """Held-out problems with asserts."""
    reserved_problems: int = 120
    """Problems of the second held-out set, on which no setting was chosen."""
    composition_gaps: int
    """Infilling gaps in the generated functions of each held-out set."""
    stdlib_gaps: int
    """Infilling gaps in held-out corpus files."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise UserError(f"{field.name} must be a whole number >= 0, got {value!r}")


def load_settings(path: Path) -> DataSettings:
    """Read the YAML file of the data stage.

    Raises:
        UserError: the file is missing or no mapping, a key is unknown or missing, or a value is not allowed.
    """
    fields = {field.name: field for field in dataclasses.fields(DataSettings)}
    data = read_settings(path)
    for key in data:
        if key not in fields:
            raise UserError(f"unknown key {key} in {path}{did_you_mean(key, fields)} (known: {', '.join(fields)})")
    missing = [name for name, field in fields.items() if field.default is dataclasses.MISSING and name not in data]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    return DataSettings(**data)


def prepare(settings: DataSettings, output_dir: Path, corpus_dir: Path | None = None) -> dict[str, Any]:
    """Write data/, tokenizer/ and benchmarks/ below `output_dir`.

    Args:
        settings: what to make.
        output_dir: the run folder.
        corpus_dir: Python files to use; the running Python's standard library when None.

    Returns:
        Counts of what was written, also saved as data/summary.json.
    """
    files = standard_library(corpus_dir)
    training = [file for file in files if not file.is_validation]
    validation = [file for file in files if file.is_validation]
    programs = training_programs(settings.training_programs, settings.seed)
    functions = [program.prompt + program.body for program in programs]
    documents = [
        "\n\n".join(functions[start : start + FUNCTIONS_PER_DOCUMENT])
        for start in range(0, len(functions), FUNCTIONS_PER_DOCUMENT)
    ]
    data, benchmarks = output_dir / "data", output_dir / "benchmarks"
    write_rows(data / "corpus.jsonl", ({"text": file.text} for file in training))
    write_rows(data / "functions.jsonl", ({"text": text} for text in documents))
    write_rows(data / "validation.jsonl", ({"text": file.text} for file in validation))
    logger.info("training the tokenizer on %d files and %d functions", len(training), len(functions))
    tokenizer = train_tokenizer(
        [*(file.text for file in training), *functions],
        settings.vocab_size,
        output_dir / "tokenizer",
        settings.context_tokens,
    )
    pairs = list(documented_functions(training, settings.max_pair_characters))
    random.Random(f"pairs {settings.seed}").shuffle(pairs)
    pairs = pairs[: settings.corpus_pairs]
    counts = {"quickstart": settings.problems, "reserved": settings.reserved_problems}
    held_out = {name: held_out_programs(count, settings.seed, name) for name, count in counts.items()}
    _write_instructions(data / "instructions", settings, programs, pairs, held_out["quickstart"])
    problems = [
        problem_row(program, index, settings.seed, name)
        for name, chosen in held_out.items()
        for index, program in enumerate(chosen)
    ]
    write_rows(benchmarks / "quickstart_problems.jsonl", problems)
    gaps = [row for name, chosen in held_out.items() for row in _gaps(settings, chosen, tokenizer, name)]
    gaps += one_line_gaps(validation, settings.stdlib_gaps, settings.seed)
    write_rows(benchmarks / "quickstart_infill.jsonl", gaps)
    summary = {
        "corpus_files": len(training),
        "corpus_characters": sum(len(file.text) for file in training),
        "validation_files": len(validation),
        "training_programs": len(programs),
        "training_compositions": len({program.composition for program in programs}),
        "corpus_pairs": len(pairs),
        "problems": len(problems),
        "gaps": len(gaps),
        "vocabulary": len(tokenizer),
    }
    (data / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def _write_instructions(
    folder: Path,
    settings: DataSettings,
    programs: list[Program],
    pairs: list[tuple[str, str]],
    problems: list[Program],
) -> None:
    """The instruction set in Alpaca format, with the dataset_info.json that LLaMA-Factory looks it up in."""
    rows = [instruction_row(program) for program in programs]
    rows += [{"instruction": prompt + "\n", "input": "", "output": function} for prompt, function in pairs]
    plain = training_programs(settings.plain_functions, settings.seed + 1)
    rows += [
        {"instruction": PLAIN_INSTRUCTION, "input": "", "output": (program.prompt + program.body).rstrip("\n")}
        for program in plain
    ]
    random.Random(f"rows {settings.seed}").shuffle(rows)
    validation = validation_programs(settings.validation_programs, settings.seed, problems)
    write_rows(folder / "train.jsonl", rows)
    write_rows(folder / "validation.jsonl", map(instruction_row, validation))
    names = {"quickstart": "train.jsonl", "quickstart_validation": "validation.jsonl"}
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    info = {name: {"file_name": file, "columns": columns} for name, file in names.items()}
    (folder / "dataset_info.json").write_text(json.dumps(info, indent=2) + "\n")


def _gaps(
    settings: DataSettings, programs: list[Program], tokenizer: PreTrainedTokenizerFast, name: str
) -> list[dict[str, str]]:
    def splits_cleanly(*pieces: str) -> bool:
        apart = [token for piece in pieces for token in tokenizer(piece)["input_ids"]]
        return apart == tokenizer("".join(pieces))["input_ids"]

    rows = (infill_row(program, index, settings.seed, splits_cleanly, name) for index, program in enumerate(programs))
    return [row for row in rows if row][: settings.composition_gaps]
