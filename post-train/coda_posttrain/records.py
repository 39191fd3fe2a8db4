"""Records of data files and the conversations in them: what is read, what is refused, what is left out.

A record that is not what `dataset_info.json` says (broken JSON, a missing key, a number where text belongs) is
malformed and stops the run, named by file and line. One that is well-formed but teaches nothing (an empty answer,
turns that do not alternate) is left out and counted. Imports neither torch nor LLaMA-Factory.
"""

import csv
import gzip
import json
import logging
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from CoDALanguageModel.errors import UserError, did_you_mean, half_surrogate
from CoDALanguageModel.run_files import LFS_POINTER

logger = logging.getLogger(__name__)

FILE_TYPES = {
    "json": "json", "jsonl": "json", "csv": "csv", "parquet": "parquet", "arrow": "arrow", "txt": "text",
}  # fmt: skip
"""Suffix of a data file and the loader of `datasets` that reads it; each may be followed by `.gz`."""

READ_HERE = ("json", "csv")
"""Loaders in whose place `read_records` reads: bytes of every shape, each record with its line."""

WHOLE = "whole"
MALFORMED = "malformed: "
NO_REQUEST = "empty request"
EMPTY_ANSWER = "empty answer"
WRONG_TURNS = "turns do not alternate between user and assistant"
NO_ANSWER = "the last turn is not the assistant's"
SHORTENED = "answer shortened"
OLDEST_LEFT_OUT = "oldest turns left out"
TOO_LONG = "too long"
PROMPT_TOO_LONG = "prompt too long"
KEPT = (WHOLE, SHORTENED, OLDEST_LEFT_OUT)
"""Fates of the records that are trained on."""

_BOM = b"\xef\xbb\xbf"
_LONGEST_FIELD = (1 << 31) - 1  # of a CSV file, in characters; the module's own limit is 131072
_SCAN_BATCH = 10_000
_SHOWN = 5
_NOT_TEXT = {"images", "videos", "audios"}
_PREFERENCE = {"chosen", "rejected", "kto_tag"}


class DataError(UserError):
    """Data that cannot be used; the message names file, record and key."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where a record keeps its conversation: an entry of `dataset_info.json` with LLaMA-Factory's defaults."""

    formatting: str = "alpaca"
    prompt: str | None = "instruction"
    query: str | None = "input"
    response: str | None = "output"
    history: str | None = None
    messages: str | None = "conversations"
    system: str | None = None
    tools: str | None = None
    role_tag: str | None = "from"
    content_tag: str | None = "value"
    user_tag: str | None = "human"
    assistant_tag: str | None = "gpt"
    observation_tag: str | None = "observation"
    function_tag: str | None = "function_call"
    system_tag: str | None = "system"

    @classmethod
    def of(cls, name: str, entry: Mapping[str, Any]) -> "Layout":
        """The layout of data set `name`.

        Raises:
            UserError: a formatting, column or tag that is not known or not for supervised text.
        """
        known = [field.name for field in fields(cls)]
        values: dict[str, Any] = {"formatting": entry.get("formatting") or "alpaca"}
        if values["formatting"] not in ("alpaca", "sharegpt", "openai"):
            raise UserError(
                f"dataset {name!r}: formatting must be alpaca, sharegpt or openai, got {values['formatting']!r}"
            )
        if entry.get("ranking"):
            raise UserError(f"dataset {name!r}: ranking data is for preference training, which is not supported")
        for section in ("columns", "tags"):
            allowed = [key for key in known[1:] if key.endswith("_tag") == (section == "tags")]
            given = entry.get(section)
            if given is None:
                continue
            if not isinstance(given, Mapping):
                raise UserError(f"dataset {name!r}: {section} must be a section of key: value pairs, got {given!r}")
            for key in given:
                if section == "columns" and key in _NOT_TEXT | _PREFERENCE:
                    reason = "this model reads text only" if key in _NOT_TEXT else "preference data is not supported"
                    raise UserError(f"dataset {name!r}: columns.{key}: {reason}")
                if key not in allowed:
                    hint = did_you_mean(key, allowed)
                    raise UserError(
                        f"dataset {name!r}: unknown key {section}.{key}{hint} (known: {', '.join(allowed)})"
                    )
                if not isinstance(given[key], str | None):
                    raise UserError(f"dataset {name!r}: {section}.{key} must be text, got {given[key]!r}")
            # As in LLaMA-Factory: whoever names some columns names all.
            values |= {key: given.get(key) for key in allowed}
        return cls(**values)

    def conversation(self, record: Any) -> dict[str, Any]:
        """The conversation of one record.

        Returns:
            `messages` (roles `user`, `assistant`, `observation`, `function`), `system`, `tools` and
            `fate`: `WHOLE`, the reason why the record is left out, or `MALFORMED` and what is wrong.
        """
        try:
            if not isinstance(record, Mapping):
                raise _Malformed(f"a record must be an object with keys, got {_shown(record)}")
            read = self._alpaca if self.formatting == "alpaca" else self._turns
            messages, system = read(record)
            system = system or _text(record, self.system)
            tools = record.get(self.tools) if self.tools else None
            if tools is not None and not isinstance(tools, str):
                tools = json.dumps(tools, ensure_ascii=False)
            for text in (system, tools or "", *(message["content"] for message in messages)):
                if half_surrogate(text) is not None:
                    raise _Malformed("a text holds half of a surrogate pair, which is no character")
        except _Malformed as error:
            return {"messages": [], "system": "", "tools": "", "fate": f"{MALFORMED}{error}"}
        return {"messages": messages, "system": system, "tools": tools or "", "fate": _fate(messages)}

    def _alpaca(self, record: Mapping[str, Any]) -> tuple[list[dict[str, str]], str]:
        messages = []
        history = record.get(self.history) if self.history else None
        if not isinstance(history, Sequence | None) or isinstance(history, str):
            raise _Malformed(f"key {self.history!r} must be a list of [request, answer], got {_shown(history)}")
        for pair in history or ():
            is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
            if not is_pair or not all(isinstance(text, str) for text in pair):
                raise _Malformed(f"key {self.history!r} must hold [request, answer] pairs, got {_shown(pair)}")
            messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        for column in (self.prompt, self.response):
            if column is not None and column not in record:
                raise _Malformed(f"no key {column!r} (it has {_names(record)}){_columns_hint(record)}")
        request = "\n".join(filter(None, (_text(record, self.prompt), _text(record, self.query))))
        messages += [{"role": "user", "content": request}]
        return [*messages, {"role": "assistant", "content": _text(record, self.response)}], ""

    def _turns(self, record: Mapping[str, Any]) -> tuple[list[dict[str, str]], str]:
        if self.messages is None or self.messages not in record:
            raise _Malformed(
                f"no key {self.messages!r} (it has {_names(record)}); name the list of turns under columns.messages "
                "in dataset_info.json"
            )
        turns = record[self.messages]
        if not isinstance(turns, Sequence) or isinstance(turns, str):
            raise _Malformed(f"key {self.messages!r} must be a list of turns, got {_shown(turns)}")
        roles = {
            self.user_tag: "user", self.assistant_tag: "assistant", self.observation_tag: "observation",
            self.function_tag: "function", self.system_tag: "system",
        }  # fmt: skip
        messages: list[dict[str, str]] = []
        for number, turn in enumerate(turns):
            where = f"{self.messages}[{number}]"
            if not isinstance(turn, Mapping):
                raise _Malformed(f"{where} must be an object with keys, got {_shown(turn)}")
            for tag in (self.role_tag, self.content_tag):
                if tag not in turn:
                    raise _Malformed(f"{where} has no key {tag!r} (it has {_names(turn)}){_tags_hint(turn)}")
            role = turn[self.role_tag]
            if not isinstance(role, str) or role not in roles:
                allowed = ", ".join(repr(tag) for tag in roles if tag is not None)
                raise _Malformed(f"{where}.{self.role_tag} must be one of {allowed}, got {role!r}{_tags_hint(turn)}")
            kind, content = roles[role], turn[self.content_tag]
            if turn.get("tool_calls") and self.formatting == "openai":
                calls = turn["tool_calls"]
                if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
                    raise _Malformed(f"{where}.tool_calls must be a list of objects, got {_shown(calls)}")
                content = json.dumps([call.get("function", call) for call in calls], ensure_ascii=False)
                kind = "function"
            if content is not None and not isinstance(content, str):
                raise _Malformed(f"{where}.{self.content_tag} must be text, got {_shown(content)}")
            message = {"role": kind, "content": content or ""}
            if message["role"] == "observation" and messages and messages[-1]["role"] == "observation":
                messages[-1]["content"] += "\n</tool_response>\n<tool_response>\n" + message["content"]
            else:
                messages.append(message)
        if messages and messages[0]["role"] == "system":
            return messages[1:], messages[0]["content"]
        return messages, ""


class _Malformed(Exception):
    """What is wrong with a record."""


def _text(record: Mapping[str, Any], column: str | None) -> str:
    value = record.get(column) if column is not None else None
    if value is not None and not isinstance(value, str):
        raise _Malformed(f"key {column!r} must be text, got {_shown(value)}")
    return value or ""


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, record)) or "none"


def _columns_hint(record: Mapping[str, Any]) -> str:
    if any(isinstance(value, list) for value in record.values()):
        return '; for lists of turns write "formatting": "sharegpt" in dataset_info.json'
    return "; name them under 'columns' in dataset_info.json"


def _tags_hint(turn: Mapping[str, Any]) -> str:
    if {"role", "content"} <= turn.keys():
        return (
            '; write "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", '
            '"assistant_tag": "assistant", "system_tag": "system"} in dataset_info.json'
        )
    return "; name them under 'tags' in dataset_info.json"


def _fate(messages: Sequence[Mapping[str, str]]) -> str:
    """Whether a conversation can be learned from."""
    for number, message in enumerate(messages):
        if message["role"] not in (("user", "observation"), ("assistant", "function"))[number % 2]:
            return WRONG_TURNS
    if not messages or len(messages) % 2:
        return NO_ANSWER
    if any(message["role"] == "user" and not message["content"].strip() for message in messages):
        return NO_REQUEST
    return WHOLE


def data_files(path: Path, name: str) -> tuple[str, list[Path]]:
    """The loader and the files of a data set: a file, or a folder of files of one type in the order of their names.

    Hidden files are passed over; other files that are no data are named in the log.

    Raises:
        UserError: nothing there, or files of several types.
    """
    try:
        if not path.exists():
            raise UserError(f"dataset {name!r}: file not found: {path.absolute()}")
        listed = sorted(path.iterdir()) if path.is_dir() else [path]
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise UserError(f"dataset {name!r}: {error}") from error
    types: dict[str, list[Path]] = {}
    for file in listed:
        suffixes = [suffix.lstrip(".").lower() for suffix in file.suffixes]
        suffix = suffixes[-2] if suffixes[-1:] == ["gz"] and len(suffixes) > 1 else (suffixes or [""])[-1]
        if file.is_file() and suffix in FILE_TYPES and not file.name.startswith("."):
            types.setdefault(FILE_TYPES[suffix], []).append(file)
        elif path.is_dir() and not file.name.startswith("."):
            logger.warning("dataset %r: %s is no data file and passed over", name, file)
    if not types:
        raise UserError(
            f"dataset {name!r}: no file of type {', '.join(FILE_TYPES)} (or .gz of it) in {path.absolute()}"
        )
    if len(types) > 1:
        examples = ", ".join(str(files[0].name) for files in types.values())
        raise UserError(f"dataset {name!r}: {path.absolute()} holds files of several types ({examples}); keep one")
    ((loader, files),) = types.items()
    return loader, files


def read_records(file: Path) -> Iterator[tuple[str, str, str]]:
    """The records of a JSON, JSON Lines or CSV file, plain or `.gz`, with or without a byte order mark.

    All values of a CSV file are text: what looks like a number or like nothing (`None`, `NA`) is an answer too.

    Yields:
        place (`file:line`, or `file[index]` in an array), the record as JSON text, and what is wrong with it.
    """
    opener = gzip.open if file.suffix.lower() == ".gz" else open
    number = 0
    try:
        with opener(file, "rb") as lines:
            if ".csv" in map(str.lower, file.suffixes[-2:]):
                yield from _read_table(file, lines)
                return
            for number, line in enumerate(lines, 1):
                place = f"{file}:{number}"
                if number == 1 and line.startswith(LFS_POINTER):
                    yield place, "", "the file is a Git LFS pointer, not the data: fetch it (git lfs pull)"
                    return
                if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff"):
                    yield place, "", "the file is UTF-16; convert it to UTF-8"
                    return
                line = line.removeprefix(_BOM) if number == 1 else line
                if not line.strip():
                    continue
                if line.lstrip()[:1] == b"[":
                    yield from _read_array(file, line + lines.read())
                    return
                yield place, *_checked(line)
    except (OSError, EOFError, zlib.error) as error:  # a file that is cut or no gzip
        yield f"{file}:{number + 1}", "", f"cannot be read: {error}"


def _read_table(file: Path, lines: Iterable[bytes]) -> Iterator[tuple[str, str, str]]:
    csv.field_size_limit(_LONGEST_FIELD)
    texts = (line.removeprefix(b"" if number else _BOM).decode("utf-8") for number, line in enumerate(lines))
    rows = csv.DictReader(texts, strict=True)
    number = 1
    try:
        columns = rows.fieldnames or []
        if twice := [column for column, count in Counter(columns).items() if count > 1]:
            yield f"{file}:1", "", f"columns must have different names, got twice: {', '.join(map(repr, twice))}"
            return
        number = rows.line_num + 1
        for row in rows:
            record = {column: text for column, text in row.items() if text is not None}
            extra = record.pop(None, None)
            problem = f"{len(extra)} more values than columns ({', '.join(columns)})" if extra else ""
            yield f"{file}:{number}", json.dumps(record), problem
            number = rows.line_num + 1
    except UnicodeDecodeError as error:
        yield f"{file}:{rows.line_num + 1}", "", _not_utf8(error)
    except csv.Error as error:
        yield f"{file}:{number}", "", f"not CSV: {error}"


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} at {error.start + 1}); convert the file to UTF-8"


def _checked(line: bytes) -> tuple[str, str]:
    try:
        text = line.decode("utf-8")
        json.loads(text)
    except UnicodeDecodeError as error:
        return "", _not_utf8(error)
    except (ValueError, RecursionError) as error:
        return "", f"not JSON: {error}"
    return text, ""


def _read_array(file: Path, content: bytes) -> Iterator[tuple[str, str, str]]:
    text, problem = _checked(content)
    if problem:
        yield str(file), "", problem
        return
    for index, record in enumerate(json.loads(text)):
        yield f"{file}[{index}]", json.dumps(record), ""


def parse_record(layout: Layout, text: str, problem: str) -> dict[str, Any]:
    """The conversation of what `read_records` gave."""
    if problem:
        return {"messages": [], "system": "", "tools": "", "fate": f"{MALFORMED}{problem}"}
    return layout.conversation(json.loads(text))


def refuse_malformed(name: str, total: int, problems: Sequence[tuple[str, str]]) -> None:
    """Stop on malformed records.

    Args:
        name: the data set.
        total: how many records were looked at.
        problems: place and fate of each malformed record.

    Raises:
        DataError: there are any; the first are named.
    """
    if not problems:
        return
    shown = "\n".join(f"  {place}: {fate.removeprefix(MALFORMED)}" for place, fate in problems[:_SHOWN])
    more = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise DataError(f"dataset {name!r}: {len(problems)} of {total} records cannot be used:\n{shown}{more}")


def fates(dataset: Any) -> Iterator[tuple[str, str]]:
    """Fate and place of each row of a `datasets.Dataset` that has these columns."""
    columns = dataset.select_columns(["fate", "place"])
    for start in range(0, len(columns), _SCAN_BATCH):
        part = columns[start : start + _SCAN_BATCH]
        yield from zip(part["fate"], part["place"], strict=True)
