"""The control tokens with which left-to-right models are asked to fill a gap, and the gap that a prompt of them means.

Here no model needs them: a gap is a run of masks (`infilling`).
"""

import re
from typing import NamedTuple

from .errors import UserError


class FillTokens(NamedTuple):
    """The control tokens of one kind of model, in the order prefix, suffix, middle."""

    prefix: str
    suffix: str
    middle: str
    lead: str = ""
    """Text that stands between the first token and the prefix."""


FILL_TOKENS = (
    FillTokens("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    FillTokens("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    FillTokens("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    FillTokens("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),
    FillTokens("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>", lead=" "),
)
"""Qwen2.5-Coder and CodeGemma; StarCoder and Granite; SantaCoder; DeepSeek-Coder; Code Llama. As each model card shows
them, prefix first."""

FILL_ENDS = ("<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>", "<file_sep>", "\u2581<EOT>")
"""Tokens besides the end of text after which such models go on with something else."""

REPO_NAMES = ("<|repo_name|>", "<repo_name>", "<reponame>")
"""Before the name of the repository that files come from: Qwen2.5-Coder, StarCoder2, StarCoder."""

FILE_SEPARATORS = ("<|file_sep|>", "<|file_separator|>", "<file_sep>")
"""Before the path of a file, whose text begins in the next line: Qwen2.5-Coder, CodeGemma, StarCoder2."""

_FILE = re.compile("|".join(map(re.escape, (*REPO_NAMES, *FILE_SEPARATORS))))


class Gap(NamedTuple):
    """A text with one gap."""

    before: str
    after: str


def file_text(name: str, text: str) -> str:
    """A file that stands before another one, as plain text: a line with its name, and its lines."""
    return f"--- {name} ---\n{text}" + ("" if text.endswith("\n") or not text else "\n")


def read_fill_prompt(prompt: str) -> Gap | None:
    """The gap that a prompt of control tokens means; None for a prompt that does not hold all three of one kind.

    The tokens may stand in any order in which the middle is last; text behind it is the beginning of the middle. What
    stands before them are other files (`<|repo_name|>`, `<|file_sep|>`), whose names become lines of their own.

    Raises:
        UserError: a token of such a prompt stands there twice, or in no known order, so that it is not sure which are
            tokens and which are text.
    """
    for kind in FILL_TOKENS:
        names = [name.removeprefix("\u2581") for name in kind[:3]]
        if all(name in prompt for name in names):
            return _read(prompt, kind, names)
    return None


def _read(prompt: str, kind: FillTokens, names: list[str]) -> Gap:
    space = "[ \u2581]?" if kind.prefix.startswith("\u2581") else ""  # it belongs to the token
    token = re.compile(f"{space}({'|'.join(map(re.escape, names))})")
    head, *rest = token.split(prompt)
    order, texts = rest[::2], dict(zip(rest[::2], rest[1::2], strict=True))
    if len(order) != 3 or order[2] != names[2]:
        raise UserError(
            f"prompt must hold {', '.join(names)} once each and the last of them last, to mean a gap, got "
            f"{', '.join(order[:6])}; text that spells such tokens can be sent with suffix, where it stays text"
        )
    prefix, suffix, middle = (texts[name] for name in names)
    return Gap(_read_files(head) + prefix.removeprefix(kind.lead) + middle.removeprefix(kind.lead), suffix)


def _read_files(head: str) -> str:
    """Text before the tokens of a gap, in which the names of files are lines of their own."""
    first, *files = _FILE.split(head)
    parts = (part.partition("\n") for part in files)
    return first + "".join(file_text(name.strip(), text) for name, _, text in parts)
