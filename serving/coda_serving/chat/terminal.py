"""Text of others on its way to the terminal."""

from rich.console import Console

_SHOWN = dict.fromkeys([*range(0x20), *range(0x7F, 0xA0), *range(0xD800, 0xE000)], "\ufffd")
_SHOWN |= {ord("\n"): "\n", ord("\t"): "\t", ord("\r"): None}


def harmless(text: str) -> str:
    """A text that a terminal only shows: its control characters would move the cursor, or do what the terminal can."""
    return text.translate(_SHOWN)


def note(console: Console, text: str, style: str = "dim") -> None:
    """Tell something beside the answer, as it is: servers, files and people may have a part in its words."""
    console.print(harmless(text), style=style, markup=False, highlight=False, soft_wrap=True)
