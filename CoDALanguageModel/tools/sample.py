"""Sampling from the shell: `python -m CoDALanguageModel sample --model M --prompt "..." [--infill FILE] [any option]`.

Shows the canvas being denoised, prints the answer and what it cost. Decoding settings are options, e.g.
`--steps 64 --kv_cache dual --threshold 0.9`. `--history F` writes the steps: JSON lines (.jsonl), or a picture that
moves (.svg, .gif). In a file for `--infill` a gap is written `<gap>`, or `<gap:12>` for 12 tokens.
"""

import argparse
import itertools
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from ..answers import AnswerReader, Reading, end_ids
from ..decoding_settings import Setting, offered, parse_settings, refuse_unknown
from ..errors import UserError
from ..infilling import GappedText, lay_out
from ..prompts import Codec
from .folder import load
from .gap_marks import read_gaps
from .recording import Recording, check_format


def build_canvas(options: argparse.Namespace, codec: Codec, model: Any) -> tuple[GappedText, list[str]]:
    """The ids to decode from, and the pieces of a text with gaps; a prompt is a text without."""
    start = model.config.document_start_id
    if options.infill is not None:
        try:
            text = options.infill.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise UserError(f"--infill {options.infill} is not UTF-8: {error.reason} at byte {error.start}") from error
        if options.gap_length < 1:
            raise UserError(f"--gap_length must be an integer >= 1, got {options.gap_length}")
        pieces, lengths = read_gaps(text, options.gap_length)
        if sum(lengths) > model.config.max_position_embeddings:
            raise UserError(
                f"gaps of {sum(lengths)} tokens do not fit in the context of {model.config.max_position_embeddings}"
            )
        return lay_out(codec.encode_pieces(pieces), lengths, model.config.mask_token_id, start), pieces
    if options.raw or not codec.has_chat_template:
        return lay_out([codec.encode_text(options.prompt)], [], model.config.mask_token_id, start), []
    return GappedText(codec.encode_chat([{"role": "user", "content": options.prompt}]), []), []


def _told(setting: Setting) -> str:
    text = f"{setting.name}: {setting.says}; {setting.allowed} ({setting.default})"
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
    if options.history is not None:
        check_format(options.history)
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
    new = min(config.max_new_tokens if not pieces else 0, model.config.max_position_embeddings)  # more is refused
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

    def read(where: slice) -> Reading:
        reader = AnswerReader(
            decode=codec.decode,
            mask_token_id=model.config.mask_token_id,
            eos_token_ids=ends,
            prompt_ids=final[: where.start],
            stop=config.stop_strings or (),
        )
        return reader.read(final[where])

    readings = [read(where) for where in (places if pieces else [slice(len(ids), None)])]
    texts = [reading.text for reading in readings]
    print("".join(itertools.chain.from_iterable(zip(pieces, [*texts, ""], strict=True))) if pieces else texts[0])
    cost = replace(output.cost, answer_tokens=sum(reading.num_tokens for reading in readings)).as_dict()
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
