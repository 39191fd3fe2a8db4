"""Sampling from the shell: `python -m CoDALanguageModel sample --model M --prompt "..." [--infill FILE] [any option]`.

Shows the canvas being denoised, prints the answer and what it cost. Decoding settings are options, e.g.
`--steps 64 --kv_cache dual --threshold 0.9`. `--history F` writes the steps: JSON lines (.jsonl), or a picture that
moves (.svg, .gif). In a file for `--infill` a gap is written `<gap>`, or `<gap:12>` for 12 tokens.
"""

import argparse
import itertools
import json
import re
import sys
import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from ..answers import AnswerReader, end_ids
from ..decoding_settings import Setting, offered, parse_settings, refuse_unknown
from ..errors import UserError
from ..infilling import GappedText, lay_out
from ..prompts import Codec
from .folder import load

GAP = re.compile(r"<gap(?::(\d+))?>")
MASK_SIGN = "\u2591"
CHARACTER_WIDTH, LINE_HEIGHT, FRAME_S = 8, 18, 0.25


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
            texts.append("" if text.endswith("\ufffd") else text)
            pending = pending if text.endswith("\ufffd") else []
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
        writers = {".jsonl": self._save_jsonl, ".svg": self._save_svg, ".gif": self._save_gif}
        if path.suffix not in writers:
            raise UserError(f"--history must end in {', '.join(writers)}, got {path.name!r}")
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


def read_gaps(text: str, default_length: int) -> tuple[list[str], list[int]]:
    """Split a text at its `<gap>` marks.

    Raises:
        UserError: there is no mark.
    """
    marks = list(GAP.finditer(text))
    if not marks:
        raise UserError("the text for --infill holds no <gap> or <gap:LENGTH>")
    borders = [0, *itertools.chain.from_iterable(mark.span() for mark in marks), len(text)]
    pieces = [text[borders[i] : borders[i + 1]] for i in range(0, len(borders), 2)]
    return pieces, [int(mark[1]) if mark[1] else default_length for mark in marks]


def build_canvas(options: argparse.Namespace, codec: Codec, model: Any) -> tuple[GappedText, list[str]]:
    """The ids to decode from, and the pieces of a text with gaps; a prompt is a text without."""
    start = model.config.document_start_id
    if options.infill is not None:
        pieces, lengths = read_gaps(options.infill.read_bytes().decode(), options.gap_length)
        return lay_out(codec.encode_pieces(pieces), lengths, model.config.mask_token_id, start), pieces
    if options.raw or not codec.has_chat_template:
        return lay_out([codec.encode_text(options.prompt)], [], model.config.mask_token_id, start), []
    return GappedText(codec.encode_chat([{"role": "user", "content": options.prompt}]), []), []


def _told(row: Setting) -> str:
    text = f"{row.name}: {row.says}; {row.allowed} ({row.default})"
    return textwrap.fill(text, 110, initial_indent="  ", subsequent_indent="      ")


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Our own options, and the decoding settings among the others."""
    parser = argparse.ArgumentParser(
        prog="python -m CoDALanguageModel sample",
        description=__doc__,
        epilog="decoding settings, each as --name value:\n" + "\n".join(map(_told, offered("shell"))),
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder of a CoDA model with its tokenizer")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="a request, put into the chat template if the tokenizer has one")
    source.add_argument("--infill", type=Path, help="a file with <gap> marks")
    parser.add_argument("--raw", action="store_true", help="continue the prompt as it is, without chat template")
    parser.add_argument("--gap_length", type=int, default=16, help="tokens of a <gap> without a number")
    parser.add_argument("--history", type=Path, help="write the steps to this .jsonl, .svg or .gif")
    parser.add_argument("--dtype", default="float32", help="precision of the weights")
    parser.add_argument("--device", default="cpu", help="device of the model")
    parser.add_argument("--quiet", action="store_true", help="do not show the canvas, print the answer only")
    options, rest = parser.parse_known_args(arguments)
    words = []
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected word {word!r}: options are given as --name value")
        refuse_unknown([word[2:].partition("=")[0]], "shell")  # before the next word is taken for its value
        words.append(word[2:] if "=" in word else f"{word[2:]}={rest.pop(0) if rest else ''}")
    return options, parse_settings(words)


def main(arguments: list[str] | None = None) -> None:
    """Decode one prompt or one text with gaps, live."""
    try:
        options, settings = parse(arguments)
        run(options, settings, *load(options.model, dtype=options.dtype, device=options.device))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")


def run(options: argparse.Namespace, settings: dict[str, Any], tokenizer: Any, model: Any) -> None:
    """Decode, show, print and record."""
    config = model.generation_config.merged(settings)
    codec = Codec(tokenizer)
    (ids, places), pieces = build_canvas(options, codec, model)
    if pieces:
        settings["max_new_tokens"] = 0
    ends = end_ids(model.config, config)
    new = settings.get("max_new_tokens", config.max_new_tokens)
    first = list(ids) + [model.config.mask_token_id] * new
    recording = Recording(codec, first, model.config.mask_token_id, set(ends))
    console = Console(stderr=True)

    def panel() -> Panel:
        return Panel(recording.view(), title=f"pass {len(recording.frames) - 1}", title_align="left")

    shown = not options.quiet and console.is_terminal
    with Live(panel(), console=console, refresh_per_second=20, transient=True) if shown else _Silent() as live:

        def on_step(canvas: torch.Tensor, step: int) -> None:
            recording.add(canvas[0].tolist())
            if shown:
                live.update(panel())

        output = model.diffusion_generate(
            torch.tensor([ids]), step_callback=on_step, return_dict_in_generate=True, tokenizer=tokenizer, **settings
        )
    final = output.sequences[0].tolist()
    recording.add(final)

    def read(where: slice) -> str:
        return (
            AnswerReader(
                decode=codec.decode,
                mask_token_id=model.config.mask_token_id,
                eos_token_ids=ends,
                prompt_ids=final[: where.start],
            )
            .read(final[where])
            .text
        )

    if pieces:
        filled = [*map(read, places), ""]
        print("".join(itertools.chain.from_iterable(zip(pieces, filled, strict=True))))
    else:
        print(read(slice(len(ids), None)))
    cost = output.cost.as_dict()
    console.print(
        Text(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in cost.items()), style="dim")
    )
    if options.history is not None:
        recording.save(options.history)
        console.print(f"steps written to {options.history}")


class _Silent:
    """Stands in for the live display where there is no terminal."""

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *exception: object) -> None:
        return None
