"""The commands of the chat client, each a line that begins with a slash."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from CoDALanguageModel.decoding_settings import Setting, offered
from CoDALanguageModel.errors import UserError, did_you_mean

from .conversation import Conversation

SETTINGS = {setting.api: setting for setting in offered("server")}

HELP = """/help            this list
/reset           forget the conversation
/system [TEXT]   show, or replace, the system message (forgets the conversation)
/set [NAME [VALUE]]   show the settings of requests, or change one; default leaves it to the server
/retry           ask the last message again
/undo            forget the last message and its answer
/multi           write a message of several lines
/save FILE       write the conversation to a file
/load FILE       go on with a saved one
/exit, /quit     leave
Lines between two lines of three double quotes are one message, and so is what is pasted. Ctrl-C ends an answer."""


@dataclass
class Outcome:
    """What a command leads to."""

    says: str = ""
    ask_again: str | None = None
    """The last message, to be sent again."""
    is_end: bool = False


def is_command(line: str) -> bool:
    """Whether a line is one of the commands, with or without an argument."""
    return line.strip().partition(" ")[0] in COMMANDS


def run_command(line: str, conversation: Conversation) -> Outcome:
    """Carry out a command.

    Raises:
        UserError: there is no such command, or it cannot be carried out; nothing has changed.
    """
    name, _, argument = line.strip().partition(" ")
    if name not in COMMANDS:
        raise UserError(f"unknown command {name}{did_you_mean(name, COMMANDS, str)}; /help lists them")
    try:
        return COMMANDS[name](argument.strip(), conversation)
    except OSError as error:
        raise UserError(f"{name}: {error.filename}: {error.strerror}") from error
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def read_setting(setting: Setting, text: str) -> object:
    """A setting's value as the request wants it, from a command line.

    Raises:
        ValueError: the text is no number, or no JSON where the setting takes no word.
    """
    if setting.read(text) is None or setting.kind is str:
        return text.lower() if setting.read(text) is None else text
    return setting.kind(text) if setting.kind in (int, float) else json.loads(text)


def _reset(argument: str, conversation: Conversation) -> Outcome:
    conversation.turns.clear()
    return Outcome("the conversation is forgotten")


def _system(argument: str, conversation: Conversation) -> Outcome:
    if argument:
        conversation.system = argument
        conversation.turns.clear()
    return Outcome(f"system: {conversation.system or '(none)'}")


def _set(argument: str, conversation: Conversation) -> Outcome:
    name, _, text = argument.partition(" ")
    if not name:
        told = [f"{name} = {json.dumps(value)}" for name, value in conversation.settings.items()]
        return Outcome("\n".join(told) or f"all as the server has them (known: {', '.join(SETTINGS)})")
    if name not in SETTINGS:
        raise UserError(f"unknown setting {name!r}{did_you_mean(name, SETTINGS, str)} (known: {', '.join(SETTINGS)})")
    setting = SETTINGS[name]
    if not text:
        held = conversation.settings.get(name, "the server's default")
        return Outcome(f"{name} = {held}: {setting.says}; {setting.allowed}")
    if text == "default":
        conversation.settings.pop(name, None)
        return Outcome(f"{name} is left to the server")
    try:
        value = read_setting(setting, text)
    except ValueError as error:
        raise UserError(f"{name} must be {setting.allowed}, got {text!r}") from error
    try:
        setting.checked(setting.read(value))
    except UserError as error:
        raise UserError(str(error).replace(setting.name, name, 1)) from error
    conversation.settings[name] = value
    return Outcome(f"{name} = {json.dumps(value)}")


def _retry(argument: str, conversation: Conversation) -> Outcome:
    if not conversation.turns:
        raise UserError("nothing was asked yet")
    return Outcome(ask_again=conversation.turns[-2]["content"])


def _undo(argument: str, conversation: Conversation) -> Outcome:
    message = conversation.take_back()
    if message is None:
        raise UserError("nothing was asked yet")
    first, _, rest = message.partition("\n")
    return Outcome(f"taken back: {first[:60]}{'...' if rest or len(first) > 60 else ''}")


def _file(argument: str) -> Path:
    if not argument or "\0" in argument:
        raise UserError("needs the name of a file")
    try:
        return Path(argument).expanduser()
    except RuntimeError as error:  # ~NAME of nobody
        raise UserError(f"{argument}: {error}") from error


def _save(argument: str, conversation: Conversation) -> Outcome:
    conversation.save(_file(argument))
    return Outcome(f"{len(conversation.turns)} messages are in {argument}")


def _load(argument: str, conversation: Conversation) -> Outcome:
    conversation.load(_file(argument))
    return Outcome(f"{len(conversation.turns)} messages; system: {conversation.system or '(none)'}")


COMMANDS: dict[str, Callable[[str, Conversation], Outcome]] = {
    "/help": lambda argument, conversation: Outcome(HELP),
    "/reset": _reset,
    "/system": _system,
    "/set": _set,
    "/retry": _retry,
    "/undo": _undo,
    "/multi": lambda argument, conversation: Outcome(),  # `chat_cli.read_messages` reads the lines
    "/save": _save,
    "/load": _load,
    "/exit": lambda argument, conversation: Outcome(is_end=True),
    "/quit": lambda argument, conversation: Outcome(is_end=True),
}
