#!/usr/bin/env python
"""Chat with a CoDA server, or any OpenAI-compatible one, from the terminal.

    python serving/fast-api/chat_cli.py --base-url http://127.0.0.1:8000 --model NAME --stream --show-meta

Each line is a message; lines between two lines of three double quotes are one message. Piped input works the same, so
that `echo "..." | chat_cli.py ...` prints the answer and ends. Text is printed as it comes: nothing is reformatted.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import openai
from prompt_toolkit import PromptSession
from prompt_toolkit.history import InMemoryHistory
from rich.console import Console

from CoDALanguageModel.decoding_settings import Setting, offered

COMMANDS = """/exit           leave
/reset          forget the conversation
/system [TEXT]  show, or replace, the system message (forgets the conversation)
/help           this list"""
QUOTES = '"""'


@dataclass
class Conversation:
    """The messages so far, and how the next ones are asked."""

    client: openai.OpenAI
    model: str
    stream: bool
    settings: dict[str, object]
    """Fields of the request, those that OpenAI's schema has not included."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def messages(self) -> list[dict[str, str]]:
        """System message and turns."""
        return [{"role": "system", "content": self.system}, *self.turns] if self.system else list(self.turns)

    def ask(self, text: str) -> Iterator[tuple[str, object | None]]:
        """Send `text`; yield pieces of the answer and, in the last pair, the usage. A failed turn is forgotten."""
        self.turns.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            for piece, usage in self._stream() if self.stream else self._whole():
                pieces.append(piece)
                yield piece, usage
        except BaseException:
            self.turns.pop()
            raise
        self.turns.append({"role": "assistant", "content": "".join(pieces)})

    def _whole(self) -> Iterator[tuple[str, object | None]]:
        answer = self.client.chat.completions.create(
            model=self.model, messages=self.messages(), extra_body=self.settings
        )
        yield answer.choices[0].message.content or "", answer.usage

    def _stream(self) -> Iterator[tuple[str, object | None]]:
        events = self.client.chat.completions.create(
            model=self.model,
            messages=self.messages(),
            stream=True,
            stream_options={"include_usage": True},
            extra_body=self.settings,
        )
        with events:
            for event in events:
                yield (event.choices[0].delta.content or "" if event.choices else ""), event.usage


def describe(usage: object | None, seconds: float, first_text_s: float | None) -> str:
    """One line about the cost of an answer."""
    parts = [f"{seconds:.2f} s"]
    if first_text_s is not None:
        parts.append(f"first text after {first_text_s:.2f} s")
    if usage is not None:
        tokens = usage.completion_tokens
        parts += [f"{usage.prompt_tokens} prompt tokens", f"{tokens} tokens", f"{tokens / seconds:.1f} tokens/s"]
        forwards = (usage.model_extra or {}).get("forwards")
        if forwards:
            parts.append(f"{forwards} forwards ({tokens / forwards:.2f} tokens each)")
    return "[" + ", ".join(parts) + "]"


def read_messages(is_terminal: bool) -> Iterator[str]:
    """Messages from the terminal or from standard input, until it ends."""
    session = PromptSession(history=InMemoryHistory()) if is_terminal else None
    while True:
        try:
            line = session.prompt("> ") if session else _next_line()
            if line.strip() == QUOTES:
                block = []
                while (more := session.prompt("... ") if session else _next_line()).strip() != QUOTES:
                    block.append(more)
                line = "\n".join(block)
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise SystemExit(f"error: the input is not UTF-8: {error.reason} at byte {error.start}") from error
        except KeyboardInterrupt:
            continue
        if line.strip():
            yield line


def utf8_text(text: str) -> str:
    """`text`, unless it holds bytes that are no UTF-8, which the terminal and the shell pass on in disguise.

    Raises:
        argparse.ArgumentTypeError: it does; says which and where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else f"code point U+{code:04X}"
        raise argparse.ArgumentTypeError(f"the text is not UTF-8: {what} at character {error.start}") from error
    return text


def _next_line() -> str:
    line = sys.stdin.buffer.readline()  # the decoding of sys.stdin depends on the locale
    if not line:
        raise EOFError
    return line.decode("utf-8").removesuffix("\n").removesuffix("\r")


def run_command(text: str, conversation: Conversation, console: Console) -> bool:
    """Carry out a /command; False for /exit."""
    name, _, argument = text.strip().partition(" ")
    if name == "/exit":
        return False
    if name == "/reset":
        conversation.turns.clear()
        console.print("the conversation is forgotten", style="dim")
    elif name == "/system":
        if argument.strip():
            conversation.system = argument.strip()
            conversation.turns.clear()
        console.print(f"system: {conversation.system or '(none)'}", style="dim", markup=False)
    elif name == "/help":
        console.print(COMMANDS, style="dim", markup=False)
    else:
        console.print(f"unknown command {name}\n{COMMANDS}", style="red", markup=False)
    return True


def answer(text: str, conversation: Conversation, show_meta: bool, notes: Console) -> None:
    """Ask, and write the answer to standard output as it comes."""
    started = time.monotonic()
    first_text_s = usage = None
    for piece, usage_so_far in conversation.ask(text):
        usage = usage_so_far or usage
        if piece and first_text_s is None:
            first_text_s = time.monotonic() - started
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()
    if show_meta:
        seconds = time.monotonic() - started
        line = describe(usage, seconds, first_text_s if conversation.stream else None)
        notes.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def explain(error: openai.OpenAIError, base_url: str) -> str:
    """What went wrong, and what to do."""
    if isinstance(error, openai.APITimeoutError):
        return f"the server at {base_url} did not answer in time; see --timeout"
    if isinstance(error, openai.APIConnectionError):
        return f"no server answers at {base_url}; start one with: bash serving/fast-api/start_server.sh"
    if isinstance(error, openai.APIStatusError):
        body = error.body if isinstance(error.body, dict) else {}
        return f"the server answered {error.status_code}: {body.get('message', error.message)}"
    return str(error)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="server, with or without /v1")
    parser.add_argument("--model", help="served name; by default the only one that the server has")
    parser.add_argument("--stream", action="store_true", help="print text as it becomes final")
    parser.add_argument("--show-meta", action="store_true", help="print latency, tokens, forwards and tokens/s")
    parser.add_argument("--system", type=utf8_text, help="system message")
    parser.add_argument("--api-key", help="key of the server; by default the variable API_KEY")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for an answer")
    group = parser.add_argument_group("decoding settings", "by default the server's; none turns one off that can be")
    for setting in offered("server"):
        flag = f"--{setting.api.replace('_', '-')}"
        kind = setting.kind.__name__.upper()
        group.add_argument(flag, type=partial(read_setting, setting), metavar=kind, help=setting.says)
    return parser.parse_args(arguments)


def read_setting(setting: Setting, text: str) -> object:
    """A setting's value as the request wants it; the server checks what may hold.

    Raises:
        argparse.ArgumentTypeError: the text is no number, or no JSON where the setting takes no word.
    """
    if setting.read(text) is None or setting.kind is str:
        return text.lower() if setting.read(text) is None else text
    try:
        return setting.kind(text) if setting.kind in (int, float) else json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid {setting.kind.__name__} value: {text!r}") from error


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 when a message could not be answered."""
    args = parse_arguments(arguments)
    base_url = args.base_url.rstrip("/")
    base_url = base_url if base_url.endswith("/v1") else base_url + "/v1"
    notes = Console(stderr=True)
    is_terminal = sys.stdin.isatty()
    client = openai.OpenAI(
        base_url=base_url,
        api_key=args.api_key or os.environ.get("API_KEY") or "none",
        timeout=args.timeout,
        max_retries=0,
    )

    names = [setting.api for setting in offered("server")]
    failed = False
    try:
        model = args.model or next(iter(client.models.list())).id
        conversation = Conversation(
            client=client,
            model=model,
            stream=args.stream,
            settings={name: getattr(args, name) for name in names if getattr(args, name) is not None},
            system=args.system,
        )
    except openai.OpenAIError as error:
        notes.print(f"error: {explain(error, base_url)}", style="red", markup=False, soft_wrap=True)
        return 1
    if is_terminal:
        notes.print(f"{model} at {base_url}; /help lists the commands", style="dim", markup=False)
    for text in read_messages(is_terminal):
        try:
            utf8_text(text)
        except argparse.ArgumentTypeError as error:
            failed = True
            notes.print(f"error: {error}", style="red", markup=False, soft_wrap=True)
            continue
        if text.startswith("/"):
            if not run_command(text, conversation, notes):
                break
            continue
        try:
            answer(text, conversation, args.show_meta, notes)
        except openai.OpenAIError as error:
            failed = True
            notes.print(f"error: {explain(error, base_url)}", style="red", markup=False, soft_wrap=True)
        except KeyboardInterrupt:
            notes.print("\ninterrupted", style="dim")
    return 1 if failed and not is_terminal else 0


if __name__ == "__main__":
    sys.exit(main())
