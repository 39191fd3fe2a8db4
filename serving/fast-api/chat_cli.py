#!/usr/bin/env python
"""Chat with a CoDA server, or any OpenAI-compatible one, from the terminal.

    python serving/fast-api/chat_cli.py --base-url http://127.0.0.1:8000 --model NAME --stream --show-meta
    python serving/fast-api/chat_cli.py --infill prog.py --canvas

Each line is a message; lines between two lines of three double quotes, and what is pasted, are one message. What is
piped is one message, too (`cat prog.py | chat_cli.py ...`), unless it begins with a command: then it is read line by
line, as if it were typed. Text is printed as it comes: nothing is reformatted. With --infill the gaps of a file,
written <gap> or <gap:TOKENS>, are filled, and the whole text is printed.
"""

import argparse
import contextlib
import io
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from rich.console import Console

from coda_serving.chat.canvas import CanvasDisplay
from coda_serving.chat.commands import COMMANDS, is_command, read_setting, run_command
from coda_serving.chat.conversation import Conversation
from coda_serving.chat.files import replace
from coda_serving.chat.parts import Part, Usage
from coda_serving.chat.terminal import harmless, note
from CoDALanguageModel.cost import tokens_per_forward
from CoDALanguageModel.decoding_settings import Setting, offered
from CoDALanguageModel.errors import INTERRUPTED, UserError
from CoDALanguageModel.tools.gap_marks import read_gaps

QUOTES = '"""'


def describe(usage: Usage | None, seconds: float, first_text_s: float | None) -> str:
    """One line about the cost of an answer."""
    parts = [f"{seconds:.2f} s"]
    if first_text_s is not None:
        parts.append(f"first text after {first_text_s:.2f} s")
    if usage is not None:
        tokens = usage.completion_tokens
        parts += [f"{usage.prompt_tokens} prompt tokens", f"{tokens} tokens", f"{tokens / seconds:.1f} tokens/s"]
        if (per_forward := tokens_per_forward(tokens, usage.forwards)) is not None:
            parts.append(f"{usage.forwards} forwards ({per_forward:.2f} tokens each)")
    return "[" + ", ".join(parts) + "]"


# -- what is asked ---------------------------------------------------------------------------------------------------


class PrivateHistory(FileHistory):
    """What was typed, in a file that only its owner may read."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):  # /dev/null belongs to all
            os.fchmod(descriptor, 0o600)
        os.close(descriptor)
        super().__init__(str(path))

    def store_string(self, string: str) -> None:
        """Keep a line, unless it is no text."""
        with contextlib.suppress(UnicodeEncodeError):
            string.encode()
            super().store_string(string)


def open_history(arguments: argparse.Namespace, notes: Console) -> History:
    """The history that is asked for; without a place for it, one that ends with the client."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        if not arguments.no_history:
            return PrivateHistory((arguments.history or Path(state) / "coda/chat_history").expanduser())
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        note(notes, f"the history is not kept: {error}")
    return InMemoryHistory()


def read_messages(session: PromptSession | None) -> Iterator[str]:
    """Messages from the terminal, or without a session from standard input, until it ends."""
    if session is None:
        yield from _piped_messages()
        return
    while True:
        try:
            line = session.prompt("> ", multiline=False)
            if line.strip() == QUOTES:
                line = _block(lambda: session.prompt("... "))
            elif line.strip() == "/multi":
                line = session.prompt("Esc Enter sends it, Ctrl-C drops it:\n", multiline=True)
        except EOFError:
            return
        except KeyboardInterrupt:
            continue
        if line.strip():
            yield line


def _piped_messages() -> Iterator[str]:
    try:
        text = sys.stdin.buffer.read().decode("utf-8")  # the decoding of sys.stdin depends on the locale
    except UnicodeDecodeError as error:
        raise SystemExit(f"error: the input is not UTF-8: {error.reason} at byte {error.start}") from error
    if not is_command(text.lstrip().partition("\n")[0]):
        if text.strip():
            yield text.replace("\r\n", "\n").removesuffix("\n")
        return
    lines = iter([line.removesuffix("\n").removesuffix("\r") for line in io.StringIO(text, newline="\n")])
    for line in lines:
        if line.strip() in (QUOTES, "/multi"):
            line = _block(lambda: next(lines, QUOTES))
        if line.strip():
            yield line


def _block(next_line: Any) -> str:
    """Lines up to one of three double quotes."""
    return "\n".join(iter(lambda: QUOTES if (line := next_line()).strip() == QUOTES else line, QUOTES))


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


def gapped_text(arguments: argparse.Namespace) -> tuple[list[str], list[int] | None]:
    """The pieces of the file around its gaps, and the lengths of these where they have one.

    Raises:
        UserError: the file cannot be read, or its gaps make no sense.
    """
    path = arguments.infill
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = content.decode()
    except OSError as error:
        raise UserError(f"--infill {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--infill {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    if arguments.lines is not None:
        first, last = arguments.lines
        lines = list(io.StringIO(text, newline=""))  # as editors count them: str.splitlines knows more line ends
        if last > len(lines):
            raise UserError(f"--lines must be within 1-{len(lines)}, got {first}-{last}")
        ending = lines[last - 1][len(lines[last - 1].rstrip("\r\n")) :]
        return ["".join(lines[: first - 1]), ending + "".join(lines[last:])], None
    pieces, lengths = read_gaps(text, None)
    if None not in lengths:
        return pieces, lengths
    if any(lengths):
        raise UserError("every gap needs a length, or none: <gap> and <gap:LENGTH> cannot stand in one text")
    return pieces, None


def line_range(text: str) -> tuple[int, int]:
    """First and last line, from `12` or `12-15`.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= first <= last:
        raise argparse.ArgumentTypeError(f"must be a line, or FIRST-LAST, counted from 1; got {text!r}")
    return first, last


# -- what comes back -------------------------------------------------------------------------------------------------


def show(parts: Iterator[Part], conversation: Conversation, notes: Console, before: str = "") -> tuple[str, str]:
    """Write an answer to standard output as it comes, or at its end where the canvas is shown.

    Args:
        parts: of the answer.
        conversation: says whether the canvas is shown.
        notes: where it is drawn.
        before: what stands before the answer.

    Returns:
        The text, and a line about its cost.
    """
    started = time.monotonic()
    first_text_s = usage = None
    pieces: list[str] = []
    if not conversation.shows_canvas:
        write(before)
    with contextlib.closing(parts), contextlib.ExitStack() as stack:
        canvas = stack.enter_context(CanvasDisplay(notes)) if conversation.shows_canvas else None
        for part in parts:
            usage = part.usage or usage
            if part.text and first_text_s is None:
                first_text_s = time.monotonic() - started
            pieces.append(part.text)
            if canvas is None:
                write(part.text)
                sys.stdout.flush()
            elif part.canvas is not None:
                canvas.show(part.canvas)
    if conversation.shows_canvas:
        write(before + "".join(pieces))
    cost = describe(usage, time.monotonic() - started, first_text_s if conversation.stream else None)
    return "".join(pieces), cost


def write(text: str) -> None:
    """Write text of the model or of a file to standard output: whole, but for a terminal without control characters."""
    sys.stdout.write(harmless(text) if sys.stdout.isatty() else text)


def answer(text: str, conversation: Conversation, arguments: argparse.Namespace, notes: Console, again: bool) -> None:
    """Ask, and show the answer."""
    _, cost = show(conversation.ask(text, again=again), conversation, notes)
    sys.stdout.write("\n")
    sys.stdout.flush()
    if arguments.show_meta:
        note(notes, cost)


def fill(conversation: Conversation, arguments: argparse.Namespace, notes: Console) -> None:
    """Fill the gaps of a file; print the whole text, or put it into the file's place.

    Raises:
        UserError: the file cannot be read or written, or its gaps make no sense.
    """
    path = Path(arguments.infill)
    before = path.read_bytes() if arguments.write and path.is_file() else None
    pieces, lengths = gapped_text(arguments)
    if arguments.write:
        conversation.stream = conversation.shows_canvas
        with contextlib.redirect_stdout(io.StringIO()):
            filled, cost = show(conversation.fill(pieces, lengths), conversation, notes)
        try:
            if path.read_bytes() != before:
                raise UserError(f"--write {path}: the file has changed in the meantime, and stays as it is now")
            replace(path, (pieces[0] + filled + pieces[-1]).encode())
        except OSError as error:
            raise UserError(f"--write {path}: {error.strerror}") from error
    else:
        _, cost = show(conversation.fill(pieces, lengths), conversation, notes, pieces[0])
        write(pieces[-1])
        sys.stdout.flush()
    if arguments.show_meta:
        note(notes, cost)


def explain(error: Exception, base_url: str) -> str:
    """What went wrong, and what to do, in a line."""
    if isinstance(error, openai.APITimeoutError | httpx.TimeoutException):
        return f"the server at {base_url} did not answer in time; see --timeout"
    if isinstance(error, openai.APIConnectionError | httpx.HTTPError):
        cause = error.__cause__ or error
        if type(cause).__name__ == "ConnectError":  # of whichever library the official client has inside
            return f"no server answers at {base_url}; start one with: bash serving/fast-api/start_server.sh"
        return f"the connection to {base_url} broke: {cause}"
    text = str(error)
    if isinstance(error, openai.APIStatusError):
        body = error.body if isinstance(error.body, dict) else {}
        text = f"the server answered {error.status_code}: {body.get('message', error.message)}"
    return " ".join(text.split())[:1000]


# -- the command line ------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000", help="server, with or without /v1")
    parser.add_argument("--model", help="served name; by default the only one that the server has")
    parser.add_argument("--stream", action="store_true", help="print text as it becomes final")
    parser.add_argument("--canvas", action="store_true", help="show the canvas while it is denoised, on a terminal")
    parser.add_argument("--show-meta", action="store_true", help="print latency, tokens, forwards and tokens/s")
    parser.add_argument("--system", type=utf8_text, help="system message")
    parser.add_argument("--api-key", help="key of the server; by default the variable API_KEY")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for an answer")
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--history", type=Path, help="file of what was typed (~/.local/state/coda/chat_history)")
    kept.add_argument("--no-history", action="store_true", help="forget what was typed at the end")
    group = parser.add_argument_group("filling gaps")
    group.add_argument("--infill", metavar="FILE", help="fill the gaps of this file; - is standard input")
    group.add_argument("--lines", type=line_range, metavar="A-B", help="these lines of it are the gap")
    group.add_argument("--write", action="store_true", help="put the filled text into the file, and print nothing")
    group = parser.add_argument_group("decoding settings", "by default the server's; none turns one off that can be")
    for setting in offered("server"):
        flag = f"--{setting.api.replace('_', '-')}"
        kind = setting.kind.__name__.upper()
        group.add_argument(flag, type=partial(setting_value, setting), metavar=kind, help=setting.says)
    known = parser.parse_args(arguments)
    if known.infill is None and (known.lines is not None or known.write):
        parser.error("--lines and --write are for --infill FILE")
    if known.infill == "-" and known.write:
        parser.error("--write needs a file, and --infill - is none")
    if known.infill is not None and known.system is not None:
        parser.error("--system is for a conversation, and --infill is none")
    return known


def setting_value(setting: Setting, text: str) -> object:
    """A setting's value as the request wants it; the server checks what may hold.

    Raises:
        argparse.ArgumentTypeError: the text is no number, or no JSON where the setting takes no word.
    """
    try:
        return read_setting(setting, text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid {setting.kind.__name__} value: {text!r}") from error


def talk(conversation: Conversation, arguments: argparse.Namespace, notes: Console, base_url: str) -> int:
    """Answer one message after the other; returns the exit status."""
    session = None
    if sys.stdin.isatty():
        session = PromptSession(history=open_history(arguments, notes))
        hello = f"{conversation.model} at {base_url}; /help lists the commands"
        note(notes, hello)
    failed = False
    for text in read_messages(session):
        try:
            utf8_text(text)
            ask, again = text, False
            word = text.split(maxsplit=1)[0]
            if word in COMMANDS or (re.fullmatch(r"/\w*", word) and "\n" not in text):
                outcome = run_command(text, conversation)
                if outcome.is_end:
                    break
                if outcome.says:
                    note(notes, outcome.says)
                ask, again = outcome.ask_again, True
            if ask is not None:
                answer(ask, conversation, arguments, notes, again)
        except (argparse.ArgumentTypeError, UserError) as error:
            failed = failed or not isinstance(error, UserError)
            note(notes, f"error: {error}", "red")
        except (openai.OpenAIError, httpx.HTTPError) as error:
            failed = True
            note(notes, f"error: {explain(error, base_url)}", "red")
        except KeyboardInterrupt:
            note(notes, "\ninterrupted")
            if session is None:
                return INTERRUPTED
    return 1 if failed and session is None else 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 1 when a message could not be answered, 2 for a file that is no use."""
    args = parse_arguments(arguments)
    base_url = args.base_url.rstrip("/")
    base_url = base_url if base_url.endswith("/v1") else base_url + "/v1"
    notes = Console(stderr=True)
    client = openai.OpenAI(
        base_url=base_url,
        api_key=args.api_key or os.environ.get("API_KEY") or "none",
        timeout=args.timeout,
        max_retries=0,
    )
    names = [setting.api for setting in offered("server")]
    try:
        model = args.model or served_model(client)
        conversation = Conversation(
            client=client,
            model=model,
            stream=args.stream or args.canvas,
            settings={name: getattr(args, name) for name in names if getattr(args, name) is not None},
            system=args.system,
            shows_canvas=args.canvas,
        )
        if args.infill is None:
            return talk(conversation, args, notes, base_url)
        fill(conversation, args, notes)
        return 0
    except (openai.OpenAIError, httpx.HTTPError) as error:
        note(notes, f"error: {explain(error, base_url)}", "red")
        return 1
    except UserError as error:
        note(notes, f"error: {error}", "red")
        return 2
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the answer is gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def served_model(client: openai.OpenAI) -> str:
    """The name of the model that a server has.

    Raises:
        UserError: what answers is no such server.
    """
    try:
        name = next(iter(client.models.list())).id
    except (StopIteration, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"what answers at {client.base_url} lists no models: is it a server of this API?") from error
    if not isinstance(name, str):
        raise UserError(f"what answers at {client.base_url} has a model whose name is no text: {name!r}")
    return name


if __name__ == "__main__":
    sys.exit(main())
