"""The steps of one row as texts of tokens: for the terminal, as JSON lines, or as a picture that moves."""

import itertools
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.text import Text

from ..answers import INCOMPLETE
from ..errors import UserError

MASK_SIGN = "\u2591"
CHARACTER_WIDTH, LINE_HEIGHT, FRAME_S = 8, 18, 0.25


FORMATS = (".jsonl", ".svg", ".gif")


def check_format(path: Path) -> None:
    """Refuse a file of steps that `Recording.save` could not write.

    Raises:
        UserError: with the endings that there are.
    """
    if path.suffix not in FORMATS:
        raise UserError(f"--history must end in {', '.join(FORMATS)}, got {path.name!r}")


def token_texts(codec: Any, ids: Sequence[int], mask_token_id: int, hidden: set[int]) -> list[str]:
    """The text that each token adds; masks as a shade, tokens of `hidden` as nothing.

    Bytes of a character that is spread over tokens show up with its last one.
    """
    texts, pending = [], []
    for place, token in enumerate(ids):
        if token == mask_token_id:
            texts.append(MASK_SIGN)
            pending = []
        elif token in hidden:
            texts.append("")
        else:
            pending.append(token)
            text = codec.decode(pending, ids[: place + 1 - len(pending)])
            texts.append("" if text.endswith(INCOMPLETE) else text)
            pending = pending if text.endswith(INCOMPLETE) else []
    return texts


def render(texts: Sequence[str], is_new: Sequence[bool], filled_now: Sequence[bool]) -> Text:
    """A canvas for the terminal: masks dim, tokens of this step bright, filled ones green, the prompt plain."""
    view = Text()
    for text, new, now in zip(texts, is_new, filled_now, strict=True):
        style = "dim" if text == MASK_SIGN else "bold black on green" if now else "green" if new else ""
        view.append(text, style=style)
    return view


class Recording:
    """The steps of one row: what the canvas held after each pass."""

    def __init__(self, codec: Any, first: Sequence[int], mask_token_id: int, hidden: set[int]):
        self.codec, self.mask_token_id, self.hidden = codec, mask_token_id, hidden
        self.frames = [list(first)]
        self.is_new = [token == mask_token_id for token in first]

    def add(self, ids: Sequence[int]) -> None:
        """Append the canvas after a pass."""
        self.frames.append(list(ids))

    def texts(self, frame: int) -> list[str]:
        """Text of each token of a frame."""
        return token_texts(self.codec, self.frames[frame], self.mask_token_id, self.hidden)

    def filled_now(self, frame: int) -> list[bool]:
        """Tokens that the pass of a frame changed."""
        previous = self.frames[max(frame - 1, 0)]
        return [a != b for a, b in zip(self.frames[frame], previous, strict=True)]

    def view(self, frame: int = -1) -> Text:
        """A frame for the terminal."""
        frame %= len(self.frames)
        return render(self.texts(frame), self.is_new, self.filled_now(frame))

    def save(self, path: Path) -> None:
        """Write the steps as `.jsonl`, `.svg` or `.gif`.

        Raises:
            UserError: another ending.
        """
        check_format(path)
        writers = dict(zip(FORMATS, (self._save_jsonl, self._save_svg, self._save_gif), strict=True))
        path.parent.mkdir(parents=True, exist_ok=True)
        writers[path.suffix](path)

    def _save_jsonl(self, path: Path) -> None:
        rows = (
            {
                "step": i,
                "ids": ids,
                "text": "".join(self.texts(i)),
                "masks_left": sum(token == self.mask_token_id for token in ids),
            }
            for i, ids in enumerate(self.frames)
        )
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def _cells(self, frame: int) -> list[tuple[int, int, str, str]]:
        """(line, column, text, colour) of each run of characters of a frame."""
        cells, line, column = [], 0, 0
        for text, new, now in zip(self.texts(frame), self.is_new, self.filled_now(frame), strict=True):
            colour = "#9aa0a6" if text == MASK_SIGN else "#d93025" if now else "#188038" if new else "#202124"
            for i, part in enumerate(text.split("\n")):
                if i:
                    line, column = line + 1, 0
                if part:
                    cells.append((line, column, part, colour))
                    column += len(part)
        return cells

    def _size(self, frames: list[list[tuple[int, int, str, str]]]) -> tuple[int, int]:
        cells = list(itertools.chain.from_iterable(frames)) or [(0, 0, " ", "")]
        width = max(column + len(text) for _, column, text, _ in cells) * CHARACTER_WIDTH + 24
        return width, (max(line for line, *_ in cells) + 1) * LINE_HEIGHT + 24

    def _save_svg(self, path: Path) -> None:
        frames = [self._cells(i) for i in range(len(self.frames))]
        width, height = self._size(frames)
        share = 100 / len(frames)
        lines = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="monospace" font-size="13">',
            "<style>g{visibility:hidden;animation:show "
            f"{len(frames) * FRAME_S:.2f}s steps(1) infinite}}"
            f"@keyframes show{{0%{{visibility:visible}}{share:.4f}%{{visibility:hidden}}}}</style>",
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        ]
        for i, cells in enumerate(frames):
            lines.append(f'<g style="animation-delay:{i * FRAME_S:.2f}s">')
            for line, column, text, colour in cells:
                x, y = 12 + column * CHARACTER_WIDTH, 24 + line * LINE_HEIGHT
                lines.append(f'<text xml:space="preserve" x="{x}" y="{y}" fill="{colour}">{escape(text)}</text>')
            lines.append("</g>")
        path.write_text("\n".join([*lines, "</svg>"]) + "\n")

    def _save_gif(self, path: Path) -> None:
        from PIL import Image, ImageDraw  # only this format needs it

        frames = [self._cells(i) for i in range(len(self.frames))]
        font = monospace_font(13)
        images = []
        for cells in frames:
            image = Image.new("RGB", self._size(frames), "white")
            draw = ImageDraw.Draw(image)
            for line, column, text, colour in cells:
                for i, character in enumerate(text):  # a grid, whatever the widths of the font
                    x = 12 + (column + i) * CHARACTER_WIDTH
                    drawn = "_" if character == MASK_SIGN else character
                    draw.text((x, 10 + line * LINE_HEIGHT), drawn, font=font, fill=colour)
            images.append(image)
        images[0].save(path, save_all=True, append_images=images[1:], duration=int(FRAME_S * 1000), loop=0)


def monospace_font(size: int) -> Any:
    """A font of the machine in which all characters are equally wide, or Pillow's own, which is proportional."""
    from PIL import ImageFont

    for name in ("DejaVuSansMono.ttf", "LiberationMono-Regular.ttf", "NotoSansMono-Regular.ttf", "Menlo.ttc"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue  # not installed: the next one
    return ImageFont.load_default(size=size)
