"""What is asked of the server: the turns so far, the settings of the next answer, and texts with gaps."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from CoDALanguageModel.errors import UserError, half_surrogate

from .files import replace
from .parts import AnswerFault, Part, read_part


@dataclass
class Conversation:
    """The messages so far, and how the next ones are asked."""

    client: openai.OpenAI
    model: str
    stream: bool
    settings: dict[str, object]
    """Fields of the request, those that OpenAI's schema has not included."""

    system: str | None = None
    shows_canvas: bool = False
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """System message and turns."""
        return [{"role": "system", "content": self.system}, *self.turns] if self.system else list(self.turns)

    def ask(self, text: str, *, again: bool = False) -> Iterator[Part]:
        """Send `text`, or the last message `again`; yield the parts of the answer, in the last one the usage.

        A turn that fails, or is left, changes nothing.
        """
        before = list(self.turns)
        if again:
            del self.turns[-2:]
        self.turns.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            create = self.client.chat.completions.create
            for part in self._parts(create, messages=self.messages()):
                pieces.append(part.text)
                yield part
        except BaseException:
            self.turns = before
            raise
        self.turns.append({"role": "assistant", "content": "".join(pieces)})

    def fill(self, pieces: list[str], lengths: list[int] | None) -> Iterator[Part]:
        """The parts of what stands between the first and the last of `pieces`, of gaps of unknown length if None."""
        infill = {"pieces": pieces, "lengths": lengths or "auto"}
        return self._parts(self.client.completions.create, extra={"infill": infill}, prompt=None)

    def take_back(self) -> str | None:
        """Forget the last message and its answer; returns the message, or None if there is none."""
        if not self.turns:
            return None
        message = self.turns[-2]["content"]
        del self.turns[-2:]
        return message

    def save(self, path: Path) -> None:
        """Write the conversation as JSON.

        Raises:
            UserError: the file is there and is something else.
            OSError: it cannot be written.
        """
        told = {"model": self.model, "system": self.system, "settings": self.settings, "messages": self.turns}
        content = (json.dumps(told, indent=1) + "\n").encode()
        if not path.exists():
            path.write_bytes(content)
            return
        try:
            _read(path)
        except UserError as error:
            raise UserError(f"{path} is no saved conversation, and stays as it is") from error
        replace(path, content)

    def load(self, path: Path) -> None:
        """Go on with a saved conversation; the model and the settings stay those of now.

        Raises:
            UserError: the file holds none.
            OSError: it cannot be read.
        """
        saved = _read(path)
        self.system, self.turns = saved.get("system"), saved["messages"]

    def _parts(self, create: Any, *, extra: dict[str, Any] | None = None, **fields: Any) -> Iterator[Part]:
        asked = {"model": self.model, "extra_body": self.settings | (extra or {}), **fields}
        try:
            if not self.stream:
                yield read_part(create(**asked))
                return
            options: dict[str, Any] = {"include_usage": True} | ({"include_canvas": True} if self.shows_canvas else {})
            with create(**asked, stream=True, stream_options=options) as events:
                yield from map(read_part, events)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:  # the official client lets them pass
            raise AnswerFault(str(error)) from error


def _read(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():  # a pipe could be waited for, and a device has no end
        raise UserError(f"{path} is no saved conversation: it is no file")
    try:
        saved = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no saved conversation: {error}") from error
    turns = saved.get("messages") if isinstance(saved, dict) else None
    is_right = isinstance(turns, list) and all(
        isinstance(turn, dict)
        and turn.keys() == {"role", "content"}
        and turn["role"] == ("user", "assistant")[place % 2]
        and isinstance(turn["content"], str)
        for place, turn in enumerate(turns)
    )
    if not is_right or len(turns) % 2 or not isinstance(saved.get("system"), str | None):
        raise UserError(f"{path} is no saved conversation: needs messages of user and assistant in turn, and system")
    if any(half_surrogate(text) is not None for text in (saved.get("system") or "", *(t["content"] for t in turns))):
        raise UserError(f"{path} is no saved conversation: it holds half of a surrogate pair, which is no character")
    return saved
