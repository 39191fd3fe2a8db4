"""Data sets to rows of token ids: reading, conversations, and what happens to rows that are too long.

Plugged into LLaMA-Factory's data pipeline in place of its own conversion and tokenisation. Nothing is cut before the
length of the whole row is known. Rows that are left out stay in the dataset as placeholders with the reason
(`fate`), so that they are counted also when the tokenised data comes from a cache or from several processes.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from datasets import Dataset, Features, ReadInstruction, Value, load_dataset
from datasets.exceptions import DatasetGenerationError
from llamafactory.data import loader
from llamafactory.data.processor import SupervisedDatasetProcessor

from CoDALanguageModel.diffusion import IGNORE_INDEX
from CoDALanguageModel.errors import UserError

from .arguments import dataset_info, is_elsewhere
from .records import (
    EMPTY_ANSWER,
    MALFORMED,
    OLDEST_LEFT_OUT,
    PROMPT_TOO_LONG,
    READ_HERE,
    SHORTENED,
    TOO_LONG,
    WHOLE,
    DataError,
    Layout,
    data_files,
    fates,
    parse_record,
    read_records,
    refuse_malformed,
)
from .templates import Pairs, TurnEncoder

VERSION = 1
"""Part of every cache key: raise it when records or rows are made differently."""

RECORD = Features({"text": Value("string"), "problem": Value("string"), "place": Value("string")})
CONVERSATION = Features(
    {
        "messages": [{"role": Value("string"), "content": Value("string")}],
        **{key: Value("string") for key in ("system", "tools", "fate", "place")},
    }
)


_load_from_hub = loader._load_single_dataset
_get_dataset_list = loader.get_dataset_list


def describe(names: Sequence[str], folder: str) -> list[Any]:
    """Descriptions of data sets, of the file that was checked, whatever its bytes look like.

    Takes the place of LLaMA-Factory's `get_dataset_list`.
    """
    return _get_dataset_list(names, folder if is_elsewhere(folder) else dataset_info(Path(folder)))


def load_conversations(attr: Any, model_args: Any, data_args: Any, training_args: Any) -> Dataset:
    """A data set as conversations; takes the place of LLaMA-Factory's `_load_single_dataset`.

    Args:
        attr: LLaMA-Factory's description of the data set.
        model_args: its model arguments.
        data_args: its data arguments.
        training_args: its training arguments.

    Returns:
        A dataset with the columns of `CONVERSATION`.

    Raises:
        DataError: records are malformed, or there are none.
    """
    if attr.load_from != "file":
        return _load_from_hub(attr, model_args, data_args, training_args)  # calls `align` below
    kind, files = data_files(Path(data_args.dataset_dir) / attr.dataset_name, attr.dataset_name)
    if kind in READ_HERE:
        stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]  # the cache is keyed by all of this
        dataset = Dataset.from_generator(
            _records,
            features=RECORD,
            cache_dir=model_args.cache_dir,
            gen_kwargs={"files": [[str(file) for file in files]], "stamps": [stamps], "version": VERSION},
        )
        if attr.split != "train":
            try:
                parts = ReadInstruction.from_spec(attr.split).to_absolute({"train": len(dataset)})
            except (ValueError, AssertionError) as error:
                raise DataError(
                    f"dataset {attr.dataset_name!r}: split must be train or a part of it, such as train[:80%], got "
                    f"{attr.split!r}: {error}"
                ) from error
            dataset = dataset.select([index for part in parts for index in range(part.from_ or 0, part.to)])
    else:
        try:
            dataset = load_dataset(
                kind,
                data_files=[str(file) for file in files],
                split=attr.split,
                cache_dir=model_args.cache_dir,
                num_proc=data_args.preprocessing_num_workers,
            )
        except (DatasetGenerationError, pyarrow.ArrowInvalid) as error:
            raise DataError(
                f"dataset {attr.dataset_name!r}: {', '.join(map(str, files))} cannot be read as {kind}: "
                f"{error.__cause__ or error}"
            ) from error
    if not len(dataset):
        raise DataError(f"dataset {attr.dataset_name!r}: {', '.join(map(str, files))} is empty")
    if attr.num_samples is not None:  # as LLaMA-Factory samples
        indexes = np.random.permutation(len(dataset))[: attr.num_samples]
        missing = attr.num_samples - len(indexes)
        dataset = dataset.select(np.concatenate((indexes, np.random.choice(len(dataset), missing))).astype(int))
    if data_args.max_samples is not None:
        dataset = dataset.select(range(min(data_args.max_samples, len(dataset))))
    return align(dataset, attr, data_args, training_args)


def _records(files: list[list[str]], stamps: list[Any], version: int) -> Iterator[dict[str, str]]:
    for file in files[0]:
        for place, text, problem in read_records(Path(file)):
            yield {"text": text, "problem": problem, "place": place}


def align(dataset: Dataset, attr: Any, data_args: Any, training_args: Any) -> Dataset:
    """Conversations of loaded records; takes the place of LLaMA-Factory's `align_dataset`.

    Raises:
        DataError: records are malformed; the first ones are named.
    """
    layout = Layout(**{name: getattr(attr, name) for name in Layout.__dataclass_fields__})
    convert = _convert_text if dataset.features == RECORD else _convert
    dataset = dataset.map(
        functools.partial(convert, layout=layout, name=attr.dataset_name, version=VERSION),
        with_indices=True,
        remove_columns=dataset.column_names,
        features=CONVERSATION,
        num_proc=data_args.preprocessing_num_workers,
        load_from_cache_file=not data_args.overwrite_cache or training_args.local_process_index != 0,
        desc="Reading conversations",
    )
    problems = [(place, fate) for fate, place in fates(dataset) if fate.startswith(MALFORMED)]
    refuse_malformed(attr.dataset_name, len(dataset), problems)
    return dataset


def _convert_text(record: dict[str, str], index: int, *, layout: Layout, name: str, version: int) -> dict[str, Any]:
    return {**parse_record(layout, record["text"], record["problem"]), "place": record["place"]}


def _convert(record: dict[str, Any], index: int, *, layout: Layout, name: str, version: int) -> dict[str, Any]:
    return {**layout.conversation(record), "place": f"{name}[{index}]"}


class RowProcessor(SupervisedDatasetProcessor):
    """Encodes conversations into rows; takes the place of LLaMA-Factory's class of that name.

    Args:
        overlong: `cut` or `drop`, what happens to rows longer than `cutoff_len`.
        encoder: conversations to token ids.
        **kwargs: what LLaMA-Factory passes to its own class.
    """

    def __init__(self, *, overlong: str, encoder: TurnEncoder, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.overlong = overlong
        self.encoder = encoder
        self.version = VERSION

    def preprocess_dataset(self, examples: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Rows for a batch of aligned conversations (columns `messages, system, tools, fate, place`).

        Returns:
            Columns `input_ids`, `attention_mask`, `labels` (`IGNORE_INDEX` at prompts), `fate` and `place`.
        """
        columns: dict[str, list[Any]] = {key: [] for key in ("input_ids", "attention_mask", "labels", "fate", "place")}
        for messages, system, tools, fate, place in zip(
            *(examples[key] for key in ("messages", "system", "tools", "fate", "place")), strict=True
        ):
            pairs: Pairs = []
            if fate == WHOLE:
                try:
                    pairs, fate = self._fitted(messages, system, tools)
                except DataError as error:
                    raise DataError(f"{place}: {error}") from error
            input_ids = [token for source, target in pairs for token in source + target]
            labels = []
            for number, (source, target) in enumerate(pairs):
                learned = not self.data_args.mask_history or number == len(pairs) - 1
                labels += [IGNORE_INDEX] * len(source) + (target if learned else [IGNORE_INDEX] * len(target))
            # A row that is left out keeps one token, for a column of empty lists would have no type.
            columns["input_ids"].append(input_ids or [0])
            columns["labels"].append(labels or [IGNORE_INDEX])
            columns["attention_mask"].append([1] * (len(input_ids) or 1))
            columns["fate"].append(fate)
            columns["place"].append(place)
        return columns

    def _fitted(self, messages: Sequence[dict[str, str]], system: str, tools: str) -> tuple[Pairs, str]:
        """The turns that fit into `cutoff_len`, and what became of the row.

        Too long a row loses its oldest turns, whole, and if the last turn alone is still too long the end of its
        answer. Nothing else is ever taken away, so what is left reads as it would in a shorter conversation.
        """
        answers = messages[1::2]
        if any(not answer["content"].strip() for answer in (answers[-1:] if self.data_args.mask_history else answers)):
            return [], EMPTY_ANSWER
        room = self.data_args.cutoff_len
        pairs = whole = self.encoder.pairs(messages, system, tools)
        if _length(pairs) <= room:
            return pairs, WHOLE
        if self.overlong == "drop":
            return [], TOO_LONG
        starts = [number for number, message in enumerate(messages) if message["role"] == "user"]
        for start in starts[1:]:
            if start != starts[-1] and _length(whole[start // 2 :]) > room:
                continue  # without its system message, already too long
            pairs = self.encoder.pairs(messages[start:], system, tools)
            if _length(pairs) <= room:
                return pairs, OLDEST_LEFT_OUT
        source, target = pairs[-1]
        left = room - _length(pairs[:-1]) - len(source)
        if left < 1:
            return [], PROMPT_TOO_LONG
        return [*pairs[:-1], (source, target[:left])], SHORTENED


def processors(overlong: str, other_template: bool) -> Callable[..., RowProcessor]:
    """What makes a `RowProcessor` of LLaMA-Factory's arguments; all of a run share one encoder.

    Raises (the function that is returned):
        DataError: the template does not fit the checkpoint.
    """
    encoders: list[TurnEncoder] = []

    def make(**kwargs: Any) -> RowProcessor:
        if not encoders:
            try:
                encoders.append(TurnEncoder(kwargs["tokenizer"], kwargs["data_args"], other_template))
            except UserError as error:
                raise DataError(str(error)) from error
        return RowProcessor(overlong=overlong, encoder=encoders[0], **kwargs)

    return make


def _length(pairs: Pairs) -> int:
    return sum(len(source) + len(target) for source, target in pairs)
