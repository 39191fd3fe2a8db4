"""How far a decoding regime is from the exact one: `python -m CoDALanguageModel agreement --model M --prompts F ...`.

Every prompt is decoded twice, by the stepwise sampler and with the options of the regime; what is printed is the share
of equal tokens, the edit distance, and the speed-up in forward passes and in time. The exact regime prints 1.0.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..decoding_settings import SETTINGS, parse_settings
from ..errors import UserError
from ..prompts import Codec
from .folder import load


def edit_distance(a: list[int], b: list[int]) -> int:
    """Levenshtein distance between two lists of tokens."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def token_agreement(a: list[int], b: list[int]) -> float:
    """Share of positions with the same token, the longer answer being 1; two empty answers agree."""
    longest = max(len(a), len(b))
    return sum(x == y for x, y in zip(a, b, strict=False)) / longest if longest else 1.0


def compare(
    model: Any, prompts: list[list[int]], settings: dict[str, Any], tokenizer: Any = None
) -> list[dict[str, float]]:
    """Decode each prompt in the exact regime and with `settings`.

    Args:
        model: a `CoDALanguageModel`.
        prompts: token ids.
        settings: decoding settings; those of another regime than the exact one are left out of the exact run, also
            where the model's own generation config has them.
        tokenizer: of the model; needed where the settings or its generation config have stop strings or a shape.

    Returns:
        For each prompt `agreement` in [0, 1], `edit_distance` in tokens, `forwards`, `exact_forwards`,
        `tokens_evaluated`, `exact_tokens_evaluated`, `time_s` and `exact_time_s`.
    """
    exact = {key: setting.default for key, setting in SETTINGS.items() if setting.regime != "exact"}
    exact |= {key: value for key, value in settings.items() if SETTINGS[key].regime == "exact"}
    results = []
    for prompt in track(prompts, description="comparing", console=Console(stderr=True), transient=True):
        answers, outputs, times = [], [], []
        for chosen in (exact, settings):
            start = time.perf_counter()
            inputs = torch.tensor([prompt])
            output = model.diffusion_generate(inputs, tokenizer=tokenizer, return_dict_in_generate=True, **chosen)
            times.append(time.perf_counter() - start)
            new = output.sequences[0, len(prompt) :].tolist()
            while new and new[-1] == model.config.pad_token_id:
                new.pop()
            answers.append(new)
            outputs.append(output)
        results.append(
            {
                "agreement": token_agreement(*answers),
                "edit_distance": edit_distance(*answers),
                "exact_forwards": outputs[0].cost.forwards,
                "forwards": outputs[1].cost.forwards,
                "exact_tokens_evaluated": outputs[0].cost.tokens_evaluated,
                "tokens_evaluated": outputs[1].cost.tokens_evaluated,
                "exact_time_s": times[0],
                "time_s": times[1],
            }
        )
    return results


def summarise(results: list[dict[str, float]]) -> dict[str, float]:
    """Means over the prompts, and ratios of the sums."""

    def total(name: str) -> float:
        return sum(result[name] for result in results)

    return {
        "prompts": len(results),
        "token_agreement": statistics.fmean(result["agreement"] for result in results),
        "identical_answers": statistics.fmean(result["edit_distance"] == 0 for result in results),
        "edit_distance": statistics.fmean(result["edit_distance"] for result in results),
        "speedup_forwards": total("exact_forwards") / total("forwards"),
        "speedup_tokens_evaluated": total("exact_tokens_evaluated") / total("tokens_evaluated"),
        "speedup_time": total("exact_time_s") / total("time_s"),
    }


def read_prompts(path: Path, tokenizer: Any, *, chat: bool) -> list[list[int]]:
    """Prompts from a file: JSON lines with `prompt`, or one text per line.

    Raises:
        UserError: the file holds no prompt, or a JSON line has none, or it is not UTF-8.
    """
    prompts, codec = [], Codec(tokenizer)
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts {path} is not UTF-8: {error.reason} at byte {error.start}") from error
    for line in filter(str.strip, content.split("\n")):  # JSON and texts may hold other line ends of Unicode
        text = line.removesuffix("\r")
        if path.suffix == ".jsonl":
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UserError(f"each line of {path} must be JSON: {error}, in {line[:80]!r}") from error
            if not isinstance(row, dict) or "prompt" not in row:
                got = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise UserError(f"each line of {path} must have the key 'prompt', got {got}")
            text = row["prompt"]
            if not isinstance(text, str):
                raise UserError(f"each line of {path} must have a text as 'prompt', got {text!r:.80}")
        prompts.append(codec.encode_chat([{"role": "user", "content": text}]) if chat else codec.encode_text(text))
    if not prompts:
        raise UserError(f"{path} holds no prompt")
    return prompts


def main(arguments: list[str] | None = None) -> None:
    """Compare a regime with the exact one, and print the result as a table or as JSON."""
    parser = argparse.ArgumentParser(prog="python -m CoDALanguageModel agreement", description=__doc__)
    parser.add_argument("--model", required=True, help="folder of a CoDA model with its tokenizer")
    parser.add_argument("--prompts", required=True, type=Path, help="a .jsonl file with 'prompt', or a text per line")
    parser.add_argument("--chat", action="store_true", help="put each prompt into the chat template")
    parser.add_argument("--dtype", default="float32", help="precision of the weights")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--regime", nargs="*", default=[], metavar="KEY=VALUE", help="decoding settings")
    options = parser.parse_args(arguments)
    try:
        settings = parse_settings(options.regime)
        tokenizer, model = load(options.model, dtype=options.dtype)
        prompts = read_prompts(options.prompts, tokenizer, chat=options.chat)
        summary = summarise(compare(model, prompts, settings, tokenizer))
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    console = Console()
    if options.json:
        console.print_json(json.dumps({"settings": settings, **summary}))
        return
    table = Table("measure", "value", title=" ".join(options.regime) or "exact")
    for name, value in summary.items():
        table.add_row(name, f"{value:.4g}" if isinstance(value, float) else str(value))
    console.print(table)
