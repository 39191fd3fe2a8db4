"""`python -m coda_pretrain plot RUN`: the curves of a run, and its masking strategies on rows of its own data."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import torch
import yaml

from CoDALanguageModel.diffusion import IGNORE_INDEX
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.noise import Blocks
from CoDALanguageModel.run_files import read_rows

from ..config import RunConfig
from ..data.mixture import Mixture
from ..noise.masking import TokenFacts, noise_samples, noise_samples_by_blocks
from ..noise.strategies import MaskingConfig
from ..plain_data import from_dict

matplotlib.use("Agg")  # no display is needed or wanted

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import ListedColormap  # noqa: E402

FORMATS = (".png", ".svg", ".html")
STRATEGIES = {
    "no strategy": {},
    "S1: a prefix stays clean": {"prefix_probability": 1.0},
    "S2: a suffix becomes padding": {"truncate_probability": 1.0},
    "S3: masked in runs": {"span_probability": 1.0},
}
SHOWN_ROWS = 12
SHOWN_POSITIONS = 256  # where single tokens have to be told apart
CLEAN, MASKED, PADDING = 0, 1, 2
STATE_COLORS = ("#dbe6f5", "#2f5fa8", "#f2f2f2")
SMOOTHED_SHARE = 0.03  # of the records, the length of the average that curves are drawn with

Records = list[dict[str, Any]]
"""Lines of `metrics.jsonl`."""


def series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the records that have a number under `key`."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps), np.array(values, dtype=float)


def draw_run(run: Path) -> plt.Figure:
    """The whole picture of a run folder.

    Raises:
        UserError: the folder holds no metrics or no configuration.
    """
    metrics, settings = run / "metrics.jsonl", run / "config.yaml"
    if not metrics.is_file() or not settings.is_file():
        raise UserError(f"RUN must be the output_dir of a run, with metrics.jsonl and config.yaml; got {str(run)!r}")
    records = read_rows(metrics)
    if not records:
        raise UserError(f"{metrics} holds no rows yet")
    config = from_dict(RunConfig, yaml.safe_load(settings.read_text(encoding="utf-8")))
    style = {
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "font.size": 9,
    }
    with plt.rc_context(style):
        figure = plt.figure(figsize=(12, 10), layout="constrained")
        figure.suptitle(f"{run.resolve().name}: step {records[-1]['step']:,}", fontsize=13, fontweight="bold")
        grid = figure.add_gridspec(3, 12)
        curves = [figure.add_subplot(grid[0, 4 * i : 4 * i + 4]) for i in range(3)]
        curves += [figure.add_subplot(grid[1, 4 * i : 4 * i + 4]) for i in range(3)]
        draw = (_draw_loss, _draw_loss_by_level, _draw_rate, _draw_speed, _draw_strategies, _draw_step_time)
        for axis, function in zip(curves, draw, strict=True):
            function(axis, records)
            axis.set_xlabel("step")
        sizes = [record["block_size"] for record in records if "block_size" in record]
        panels = [figure.add_subplot(grid[2, 3 * i : 3 * i + 3]) for i in range(4)]
        _draw_masks(panels, config, sizes[-1] if sizes else None)
    return figure


def _line(axis: Axes, records: Records, key: str, label: str | None = None, **style: Any) -> bool:
    steps, values = series(records, key)
    if len(steps):
        axis.plot(steps, values, label=label, marker="." if len(steps) < 12 else None, **style)
    return bool(len(steps))


def _draw_loss(axis: Axes, records: Records) -> None:
    steps, losses = series(records, "loss")
    axis.plot(steps, losses, color="C0", alpha=0.25, linewidth=0.8)
    smoothed = pd.Series(losses).ewm(alpha=1 / max(1.0, SMOOTHED_SHARE * len(losses))).mean()
    axis.plot(steps, smoothed, color="C0", label="training")
    _line(axis, records, "eval_loss", "validation", color="C1", linewidth=2)
    axis.set_title("loss, nats per token")
    axis.legend(frameon=False)


def _draw_loss_by_level(axis: Axes, records: Records) -> None:
    keys = sorted({key for record in records for key in record if re.fullmatch(r"eval_loss_t[\d.]+-[\d.]+", key)})
    for key, color in zip(keys, plt.get_cmap("viridis")(np.linspace(0, 0.9, max(len(keys), 1))), strict=False):
        _line(axis, records, key, key.removeprefix("eval_loss_t"), color=color)
    axis.set_title("validation loss by noise level t")
    _legend_or_note(axis, bool(keys), "no evaluation by noise level", ncols=2)


def _draw_rate(axis: Axes, records: Records) -> None:
    _line(axis, records, "learning_rate", color="C2")
    axis.set_title("learning rate")
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))


def _draw_speed(axis: Axes, records: Records) -> None:
    _line(axis, records, "tokens_per_s", "tokens/s", color="C3")
    axis.set_title("tokens per second")
    axis.set_ylim(bottom=0)
    if any(record.get("mfu") is not None for record in records):
        right = axis.twinx()
        _line(right, records, "mfu", "MFU", color="C4", linestyle="--")
        right.set_ylim(0, None)
        right.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        right.grid(False)
        right.spines["right"].set_visible(True)
        handles = [*axis.get_lines(), *right.get_lines()]
        axis.legend(handles, [line.get_label() for line in handles], frameon=False, loc="upper right")
        axis.set_title("tokens per second, MFU")


def _draw_strategies(axis: Axes, records: Records) -> None:
    for name, key in (("S1", "prefix"), ("S2", "truncate"), ("S3", "span")):
        style = "--" if name == "S2" else "-"
        _line(axis, records, f"{key}_probability", name, drawstyle="steps-post", linestyle=style)
    axis.set_title("share of rows with each strategy")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)


def _draw_step_time(axis: Axes, records: Records) -> None:
    _line(axis, records, "step_s", "step", color="C5")
    _line(axis, records, "data_wait_s", "waiting for data", color="C6")
    axis.set_title("seconds per step")
    axis.set_ylim(bottom=0)
    axis.legend(frameon=False)


def _legend_or_note(axis: Axes, has_lines: bool, note: str, **options: Any) -> None:
    if has_lines:
        axis.legend(frameon=False, fontsize=7, **options)
    else:
        axis.text(0.5, 0.5, note, ha="center", va="center", transform=axis.transAxes, color="gray")


def states_of_rows(config: RunConfig, strategy: dict[str, float], block_size: int | None = None) -> np.ndarray:
    """(rows, positions) of CLEAN, MASKED and PADDING: the first rows of the data, noised with one strategy alone.

    Row i has the noise level (i + 1) / (rows + 1), from nearly clean to nearly masked; by blocks that is where the
    levels of its blocks start, and shown is the noisy copy.

    Raises:
        UserError: the data cannot be read.
    """
    mixture = Mixture(config.data, seq_len=config.seq_len, seed=config.seed)
    ids = list(range(min(SHOWN_ROWS, mixture.num_samples)))
    samples, t = [mixture.sample(i) for i in ids], torch.arange(1, len(ids) + 1) / (len(ids) + 1)
    settings = {
        "seed": config.seed,
        "strategies": MaskingConfig(**strategy).at(0.0, 0),
        "span_lengths": config.masking.span_lengths,
        "tokens": TokenFacts(mask_token_id=-1, pad_token_id=0),  # only where masked tokens are is shown
    }
    if block_size is None:
        rows = noise_samples(samples, ids, t, **settings)
        segment_ids, labels = rows.segment_ids, rows.labels
    else:
        t_min = config.masking.t_min
        doubled = noise_samples_by_blocks(samples, ids, t, blocks=Blocks(block_size), t_min=t_min, **settings)
        segment_ids, labels = doubled.visibility.segment[:, : config.seq_len], doubled.labels
    unmasked = torch.where(segment_ids > 0, CLEAN, PADDING)
    return torch.where(labels != IGNORE_INDEX, MASKED, unmasked).numpy()


def _draw_masks(axes: list[Axes], config: RunConfig, block_size: int | None) -> None:
    for axis, (title, strategy) in zip(axes, STRATEGIES.items(), strict=True):
        axis.set_title(title, fontsize=9)
        axis.grid(False)
        axis.set_yticks([])
        try:
            states = states_of_rows(config, strategy, block_size)
        except (OSError, UserError):
            axis.text(0.5, 0.5, "the data is not here", ha="center", va="center", transform=axis.transAxes)
            continue
        axis.imshow(
            states if title.startswith(("S1", "S2")) else states[:, :SHOWN_POSITIONS],
            cmap=ListedColormap(STATE_COLORS),
            vmin=0,
            vmax=2,
            aspect="auto",
            interpolation="nearest",
        )
        axis.set_xlabel(f"position (of {config.seq_len})")
    by_blocks = f"rows, noisy copy, blocks of {block_size}"
    axes[0].set_ylabel("rows, t grows downwards" if block_size is None else by_blocks)
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in STATE_COLORS]
    # Below the panel: inside it would cover rows.
    axes[-1].legend(
        handles,
        ("clean", "masked", "padding"),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.16),
        ncols=3,
        fontsize=7,
        frameon=False,
    )


def save(figure: plt.Figure, output: Path) -> None:
    """Write the picture; an .html page holds it as SVG, with nothing to load."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".html":
        import io

        text = io.StringIO()
        figure.savefig(text, format="svg")
        svg = text.getvalue()
        title = f"<!doctype html><meta charset=utf-8><title>{output.stem}</title>"
        output.write_text(f"{title}<style>svg{{max-width:100%;height:auto}}</style>{svg[svg.index('<svg') :]}")
    else:
        figure.savefig(output, dpi=130)


def main(argv: Sequence[str]) -> int:
    """Run the command line.

    Returns:
        0, or 2 for bad input, whose message is the last line on stderr.
    """
    parser = argparse.ArgumentParser(prog="python -m coda_pretrain plot", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN", type=Path, help="output_dir of a run")
    parser.add_argument("--output", type=Path, help="a .png, .svg or .html file (default: RUN/curves.png)")
    arguments = parser.parse_args(argv)
    output = arguments.output or arguments.run / "curves.png"
    try:
        if output.suffix not in FORMATS:
            raise UserError(f"--output must end in {', '.join(FORMATS)}, got {str(output)!r}")
        figure = draw_run(arguments.run)
    except UserError as error:
        sys.stderr.write(f"coda_pretrain plot: error: {error}\n")
        return 2
    save(figure, output)
    plt.close(figure)
    print(output)
    return 0
