"""The canvas in the terminal while it is denoised, from the events of a stream."""

from types import TracebackType

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from .parts import AnswerFault, Canvas, Cell

STYLES = {"masked": "dim", "committed": "green", "given": ""}


class CanvasDisplay:
    """Draws the canvas of one answer in place, and takes it away at the end.

    Args:
        console: where; nothing is drawn where it is no terminal that can.
    """

    def __init__(self, console: Console) -> None:
        self._mask_sign = "\u2591" if console.encoding.lower().startswith("utf") else "."
        self._cells: list[Cell] = []
        self._step = 0
        self._is_shown = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(self, console=console, auto_refresh=False, transient=True, vertical_overflow="crop")

    def __enter__(self) -> "CanvasDisplay":
        if self._is_shown:
            self._live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._is_shown:
            self._live.stop()

    def show(self, canvas: Canvas) -> None:
        """Take in what has changed, and draw.

        Raises:
            AnswerFault: it is not of this canvas.
        """
        if canvas.length is not None:
            self._cells = [Cell(place, "", "masked", None) for place in range(canvas.length)]
        for cell in canvas.cells:
            if not 0 <= cell.position < len(self._cells):
                raise AnswerFault(f"cell {cell.position} of a canvas of {len(self._cells)}")
            self._cells[cell.position] = cell
        self._step = canvas.step
        if self._is_shown:
            self._live.update(self, refresh=True)

    def text(self) -> Text:
        """The canvas: masks as shades, drafts in italics and the brighter the surer, what is committed in green."""
        text = Text()
        for _, token, state, confidence in self._cells:
            if state == "masked":
                text.append(self._mask_sign, "dim")
            elif token is None:
                text.append("\u00b7" if self._mask_sign != "." else "$", "dim")
            else:
                style = STYLES.get(state) if state in STYLES else _draft_style(confidence)
                text.append("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in token), style)
        return text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A line about the step, and as much of the canvas as the terminal has room for, around its first mask."""
        lines = self.text().wrap(console, options.max_width, overflow="fold", tab_size=4)
        is_open = [self._mask_sign in line.plain for line in lines]
        room = max(1, console.height - 3)
        first = is_open.index(True) if True in is_open else len(lines)
        start = max(0, min(first - room // 2, len(lines) - room))
        num_open = sum(cell.state in ("masked", "provisional") for cell in self._cells)
        yield Text(f"step {self._step}, {num_open} of {len(self._cells)} open", "dim", no_wrap=True, overflow="crop")
        yield from lines[start : start + room]


def _draft_style(confidence: float | None) -> str:
    return "italic yellow" if (confidence or 0.0) >= 0.5 else "italic dim yellow"
