"""The report's pictures: loss curves, the three masking strategies, an answer being denoised."""

import html
import io
from collections.abc import Sequence

import matplotlib
import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from CoDALanguageModel.diffusion import IGNORE_INDEX, named_rng
from CoDALanguageModel.noise import CleanRows, DrawnRows, noise_rows

matplotlib.use("Agg")  # no display is needed or wanted

from matplotlib import pyplot as plt  # noqa: E402

LINE_OF_CODE = "for name, value in sorted(options.items()): result.append((name.strip(), int(value)))"
NEUTRAL = "#808890"  # readable on white and on black
COLORS = ("#3b7dd8", "#e0803a")
MASK_TEXT = "[M]"
SHOWN_STEPS = 9

Run = tuple[str, Sequence[tuple[int, float]], Sequence[tuple[int, float]]]


def loss_curves_svg(runs: Sequence[Run]) -> str:
    """Training and validation loss of each stage, side by side, on a transparent ground.

    Args:
        runs: (title, training points, validation points), a point being (step, loss in nats per token).
    """
    settings = {
        "axes.edgecolor": NEUTRAL,
        "axes.labelcolor": NEUTRAL,
        "xtick.color": NEUTRAL,
        "ytick.color": NEUTRAL,
        "text.color": NEUTRAL,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.size": 10,
        "svg.fonttype": "none",
        "svg.hashsalt": "coda",
    }
    with plt.rc_context(settings):
        figure, axes = plt.subplots(1, len(runs), figsize=(3.6 * len(runs), 2.9), layout="constrained")
        for axis, (title, training, validation) in zip(np.atleast_1d(axes), runs, strict=True):
            _plot_run(axis, title, training, validation)
        np.atleast_1d(axes)[0].set_ylabel("loss, nats per token")
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()


def _plot_run(axis, title: str, training: Sequence[tuple[int, float]], validation: Sequence[tuple[int, float]]) -> None:
    steps, losses = zip(*training, strict=True)
    axis.plot(steps, losses, color=COLORS[0], alpha=0.3, linewidth=1)
    smoothed = pd.Series(losses).ewm(alpha=0.2).mean()
    axis.plot(steps, smoothed, color=COLORS[0], linewidth=1.8, label="training")
    if validation:
        axis.plot(*zip(*validation, strict=True), color=COLORS[1], marker="o", markersize=4, label="validation")
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("step")
    axis.set_ylim(bottom=0)
    axis.grid(color=NEUTRAL, alpha=0.2, linewidth=0.6)
    axis.legend(frameon=False, fontsize=9)


def masking_examples(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, list[str], list[str]]]:
    """What the strategies do to one line: (name, token texts, state of each token).

    A state is "kept", "masked", "prefix" (S1: never masked) or "padding" (S2: replaced, never masked).
    """
    ids = tokenizer(LINE_OF_CODE, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    texts = [tokenizer.decode([token]) for token in ids[0].tolist()]
    t = torch.tensor([0.5])
    cut = length // 3
    variants = (
        ("plain: each token masked with probability t = 0.5", 0, length, 1),
        ("S1: a random prefix is never masked", cut, length, 1),
        ("S2: a random suffix becomes padding", 0, length - cut, 1),
        ("S3: masked in runs of k = 4, still half of the tokens", 0, length, 4),
    )
    examples = []
    for name, prefix, kept, span in variants:
        uniforms = torch.from_numpy(named_rng("picture", span).random((1, length + span - 1), dtype=np.float32))
        drawn = DrawnRows(*(torch.tensor([number]) for number in (prefix, kept, span)), uniforms)
        rows = CleanRows(ids, torch.ones_like(ids))
        labels = noise_rows(rows, t, drawn, mask_token_id=tokenizer.mask_token_id, pad_token_id=0).labels
        states = ["masked" if is_masked else "kept" for is_masked in (labels[0] != IGNORE_INDEX).tolist()]
        states[:prefix] = ["prefix"] * prefix
        states[kept:] = ["padding"] * (length - kept)
        examples.append((name, texts, states))
    return examples


def masking_html(tokenizer: PreTrainedTokenizerBase) -> str:
    """The examples as coloured tokens."""
    rows = []
    for name, texts, states in masking_examples(tokenizer):
        cells = "".join(
            f'<span class="t {state}">{html.escape(text) if state != "padding" else "pad"}</span>'
            for text, state in zip(texts, states, strict=True)
        )
        rows.append(f"<div class=line><div class=label>{html.escape(name)}</div><div class=tokens>{cells}</div></div>")
    return "\n".join(rows)


def masking_text(tokenizer: PreTrainedTokenizerBase) -> str:
    """The examples as plain text: [M] masked, [P] padding, | the end of an unmaskable prefix."""
    lines = []
    for name, texts, states in masking_examples(tokenizer):
        shown = {"masked": MASK_TEXT, "padding": "[P]"}
        pieces = [shown.get(state, text) for text, state in zip(texts, states, strict=True)]
        if "prefix" in states:
            pieces.insert(states.count("prefix"), "|")
        lines += [name, "  " + "".join(pieces)]
    return "\n".join(lines)


def shown_steps(num_steps: int) -> list[int]:
    """Which steps are drawn: at most nine, evenly spread, the last one included."""
    return sorted({round(x) for x in np.linspace(0, num_steps - 1, min(num_steps, SHOWN_STEPS))})


def commit_order(steps: Sequence[Sequence[str | None]]) -> list[int]:
    """The step at which each position was decided."""
    return [
        next((number for number, canvas in enumerate(steps) if canvas[position] is not None), len(steps))
        for position in range(len(steps[-1]))
    ]


def denoising_html(steps: Sequence[Sequence[str | None]]) -> str:
    """The canvas at some steps; a token's colour says when it was decided."""
    order = commit_order(steps)
    last = max(len(steps) - 1, 1)
    rows = []
    previous = -1
    for number in shown_steps(len(steps)):
        cells = []
        for text, decided in zip(steps[number], order, strict=True):
            if text is None:
                cells.append('<span class="t open"></span>')
                continue
            hue = 215 - 180 * decided / last
            new = " new" if decided > previous else ""
            shown = html.escape(text.replace("\n", "\u21b5\n")) or "&nbsp;"
            cells.append(f'<span class="t done{new}" style="--hue:{hue:.0f}">{shown}</span>')
        previous = number
        rows.append(
            f"<div class=line><div class=label>step {number + 1} of {len(steps)}</div>"
            f"<div class=tokens>{''.join(cells)}</div></div>"
        )
    return "\n".join(rows)


def denoising_text(steps: Sequence[Sequence[str | None]]) -> str:
    """The canvas at some steps, one line each; `_` is a token still masked."""
    return "\n".join(
        f"{number + 1:3d}  " + "".join("_" if text is None else text.replace("\n", "\\n") for text in steps[number])
        for number in shown_steps(len(steps))
    )
