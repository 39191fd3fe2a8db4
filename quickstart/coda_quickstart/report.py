"""The report of a run: report.html (self-contained), report.md and summary.json, from the files of the stages.

Not here: the pictures (pictures.py) and the numbers' own files, which the rooms write.
"""

import html
import json
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

import pandas
import torch
import transformers
import yaml

from coda_quickstart.pictures import denoising_html, denoising_text, loss_curves_svg, masking_html, masking_text
from coda_quickstart.stages import BLOCKS
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.intervals import wilson_interval
from CoDALanguageModel.run_files import read_rows

STAGES = (("pretrain", "Pre-training"), ("midtrain", "Mid-training"), ("model", "Fine-tuning"))
BENCHMARKS = {
    "quickstart": "held-out problems, pass@1",
    "reserved": "reserved problems, pass@1",
    "composition": "infilling, held-out generated functions, exact match",
    "reserved_composition": "infilling, reserved generated functions, exact match",
    "stdlib": "infilling, held-out standard library lines, exact match",
    "HumanEval": "HumanEval, first 3 problems, pass@1 (0 % expected at this size)",
}
"""What a task's id begins with, and what its score is called."""
RESERVED = (
    "Held-out compositions occur in no training file. Settings were chosen while looking at the held-out problems; the "
    "reserved ones are of other compositions, and no setting was chosen on them."
)
VALIDATION = (
    "Validation loss: pre- and mid-training are validated on held-out standard library files, fine-tuning on held-out "
    "instructions. Mid-training sees generated functions mostly, which are easier to guess than that library, so its "
    "training loss is far below its validation loss."
)
TIME_TITLES = {
    "data": "corpus, tokenizer, instruction set, held-out problems",
    "shards": "token shards",
    "pretrain": "pre-training and export",
    "midtrain": "mid-training and export",
    "first": "first answer: a gap, step by step",
    "convert": "Hugging Face folder",
    "sft": "fine-tuning",
    "evaluate": "evaluation",
    "parallel": "evaluation, several tokens a step",
    "denoise": "one answer step by step",
    "serve": "server and two requests",
}


def curves(rows: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(step, loss) of training and of validation; the validation key may carry the data set's name."""
    training = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    validation = [
        (row["step"], value)
        for row in rows
        for key, value in row.items()
        if key.startswith("eval_") and key.endswith("loss")
    ]
    return training, validation


def read_scores(run_dir: Path) -> list[dict[str, Any]]:
    """One row per benchmark (split by where problems and gaps come from): name, passed, count, interval.

    Raises:
        UserError: the evaluation left no samples.
    """
    groups: dict[str, list[bool]] = {}
    samples = sorted((run_dir / "evaluation").rglob("samples_*.jsonl"))
    if not samples:
        raise UserError(f"no samples_*.jsonl below {run_dir / 'evaluation'}; run the evaluation first")
    for path in samples:
        for row in read_rows(path):
            group = row["doc"]["task_id"].split("/")[0]
            passed = row["exact_match"] if "exact_match" in row else row["pass@1"]
            groups.setdefault(group, []).append(bool(passed))
    rows = []
    for group, name in BENCHMARKS.items():
        if group in groups:
            passed, count = sum(groups[group]), len(groups[group])
            share = passed / count
            low, high = wilson_interval(share, count)
            rows.append({"name": name, "passed": passed, "count": count, "share": share, "low": low, "high": high})
    return rows


def read_seeds(run_dir: Path, scores: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Scores of the run's own model and of those of other seeds: rows of seed and scores; none without other seeds.

    Args:
        run_dir: the run folder.
        scores: of its own model.
    """
    others = {int(card.parent.name.removeprefix("seed_")): card.parent for card in run_dir.glob("seed_*/scores.json")}
    if not others:
        return []
    own = yaml.safe_load((run_dir / "model" / "run_config.yaml").read_text()).get("seed")
    rows = [{"seed": seed, "scores": read_scores(folder)} for seed, folder in sorted(others.items())]
    return [{"seed": own, "scores": [row for row in scores if row["name"] != BENCHMARKS["HumanEval"]]}, *rows]


def training_table(run_dir: Path) -> list[dict[str, Any]]:
    """Per stage: steps, tokens seen, tokens per second, last training and validation loss.

    Raises:
        UserError: a stage logged no loss.
    """
    rows = []
    for folder, title in STAGES:
        metrics = read_rows(run_dir / folder / "metrics.jsonl")
        logged = [row for row in metrics if "loss" in row]
        training, validation = curves(metrics)
        if not training:
            raise UserError(
                f"{run_dir / folder / 'metrics.jsonl'} holds no training loss: the stage's logging interval must be at "
                "most its number of steps"
            )
        speeds = sorted(row["tokens_per_s"] for row in logged if row.get("tokens_per_s"))
        rows.append(
            {
                "stage": title,
                "steps": training[-1][0],
                "tokens": logged[-1]["tokens"],
                "tokens_per_s": speeds[len(speeds) // 2] if speeds else 0.0,
                "loss": training[-1][1],
                "validation_loss": validation[-1][1] if validation else None,
            }
        )
    return rows


def read_comparison(run_dir: Path, times: Mapping[str, float]) -> list[dict[str, Any]]:
    """Full attention and attention by blocks on the held-out problems, by one and by several tokens a step.

    Returns:
        A row for each: model, decoding, score, n, low, high, tokens_per_forward, seconds_per_answer, training_s. None
        without the model by blocks.

    Raises:
        FileNotFoundError: it was trained and not yet scored.
    """
    rows: list[dict[str, Any]] = []
    if not (run_dir / BLOCKS / "model" / "config.json").is_file():
        return rows
    for model, folder, suffix in (("full attention", run_dir, ""), ("by blocks", run_dir / BLOCKS, f"_{BLOCKS}")):
        for decoding, file in (("one token a step", "scores.json"), ("several", "parallel.json")):
            cards = json.loads((folder / file).read_text())
            card = next(c for c in cards if (c["task"], c["metric"]) == ("quickstart_problems", "pass@1"))
            cost, (low, high) = card["cost"], card["wilson95"]
            rows.append(
                {
                    "model": model,
                    "decoding": decoding,
                    "score": card["score"],
                    "n": card["n"],
                    "low": low,
                    "high": high,
                    "tokens_per_forward": card["tokens_per_forward"],
                    "seconds_per_answer": cost["generation_s"] / cost["answers"],
                    "training_s": sum(times.get(f"{name}{suffix}", 0.0) for name in ("pretrain", "midtrain", "sft")),
                }
            )
    return rows


def write_report(run_dir: Path) -> str:
    """Write report.html, report.md and summary.json.

    Returns:
        The score and time tables as Markdown.

    Raises:
        UserError: a stage's file is missing.
    """
    try:
        scores, training = read_scores(run_dir), training_table(run_dir)
        times = json.loads((run_dir / "times.json").read_text())
        denoised = json.loads((run_dir / "denoise.json").read_text())
        answers = json.loads((run_dir / "answers.json").read_text())
        config = json.loads((run_dir / "model" / "config.json").read_text())
        data = json.loads((run_dir / "data" / "summary.json").read_text())
        comparison, seeds = read_comparison(run_dir, times), read_seeds(run_dir, scores)
    except FileNotFoundError as error:
        raise UserError(f"the report needs all stages; missing: {error.filename}") from error
    config["parameters"] = num_parameters(run_dir / "model" / "model.safetensors")
    summary = {"scores": scores, "training": training, "times_s": times, "data": data, "comparison": comparison}
    summary["seeds"] = seeds
    summary |= {"parameters": config["parameters"], "machine": machine()}
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    tables = markdown_tables(summary)
    runs = [(title, *curves(read_rows(run_dir / folder / "metrics.jsonl"))) for folder, title in STAGES]
    tokenizer = transformers.AutoTokenizer.from_pretrained(run_dir / "tokenizer")
    svg = loss_curves_svg(runs)
    (run_dir / "losses.svg").write_text(svg, encoding="utf-8")
    page = Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8")).substitute(
        scores=_score_rows(scores),
        reserved=html.escape(RESERVED),
        seeds=_seeds_html(seeds),
        comparison=_comparison_html(comparison),
        headline=f"{100 * scores[0]['share']:.1f} %",
        headline_detail=f"{scores[0]['passed']} of {scores[0]['count']} held-out problems",
        total_minutes=f"{sum(times.values()) / 60:.1f} min",
        parameters=f"{config['parameters'] / 1e6:.1f} M",
        tokens=f"{sum(row['tokens'] for row in training) / 1e6:.1f} M",
        losses=svg[svg.index("<svg") :],
        masking=masking_html(tokenizer),
        prompt=html.escape(denoised["prompt"].rstrip()),
        denoising=denoising_html(denoised["steps"]),
        answers=_answer_blocks(answers),
        training=_training_rows(training),
        validation=html.escape(VALIDATION),
        times=_time_rows(times),
        settings=html.escape(json.dumps({"model": _shape(config), "data": data, "machine": machine()}, indent=2)),
    )
    (run_dir / "report.html").write_text(page, encoding="utf-8")
    sections = [
        "# CoDA quickstart",
        tables,
        "## Losses\n\n![loss curves](losses.svg)",
        f"## Masking strategies\n\n```text\n{masking_text(tokenizer)}\n```",
        f"## One answer, step by step\n\n```python\n{denoised['prompt'].rstrip()}\n```\n\n"
        f"```text\n{denoising_text(denoised['steps'])}\n```",
        "## Server\n\n" + "\n\n".join(_answer_markdown(answer) for answer in answers),
        f"## Settings\n\n```json\n{json.dumps({'model': _shape(config), 'data': data}, indent=2)}\n```",
    ]
    (run_dir / "report.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return tables


def markdown_tables(summary: Mapping[str, Any]) -> str:
    """Scores, training and times as Markdown tables."""
    lines = ["| benchmark | score | 95 % interval | n |", "|---|---:|---|---:|"]
    for row in summary["scores"]:
        lines.append(f"| {row['name']} | {100 * row['share']:.1f} % | {_interval(row)} | {row['count']} |")
    lines += ["", RESERVED]
    if summary["seeds"]:
        names, rows = _seeds_cells(summary["seeds"])
        lines += ["", f"| {' | '.join(names)} |", f"|---|{'---|' * (len(names) - 1)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    if summary["comparison"]:
        lines += ["", f"| {' | '.join(COMPARED)} |", "|---|---|---:|---|---:|---:|---:|"]
        lines += [f"| {' | '.join(_compared_cells(row))} |" for row in summary["comparison"]]
    lines += ["", "| training | steps | tokens | tokens/s | loss | validation loss |", "|---|---:|---:|---:|---:|---:|"]
    lines += [f"| {' | '.join(_training_cells(row))} |" for row in summary["training"]]
    lines += ["", VALIDATION, "", "| stage | seconds |", "|---|---:|"]
    lines += [f"| {_time_title(name)} | {seconds:.0f} |" for name, seconds in summary["times_s"].items()]
    lines += [f"| **all** | **{sum(summary['times_s'].values()):.0f}** |"]
    lines += ["", f"{summary['parameters'] / 1e6:.2f} M parameters; {summary['machine']}."]
    return "\n".join(lines)


def num_parameters(weights: Path) -> int:
    """Parameters stored in a safetensors file."""
    from safetensors import safe_open

    with safe_open(weights, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def machine() -> str:
    """The machine and the versions, in words."""
    return (
        f"{torch.get_num_threads()} CPU threads, {platform.machine()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}"
    )


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    names = ("parameters", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return {name: config[name] for name in (*names, "num_key_value_heads", "head_dim", "vocab_size")}


def _interval(row: Mapping[str, Any]) -> str:
    return f"{100 * row['low']:.1f} - {100 * row['high']:.1f} %"


def _score_rows(scores: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        f"<tr><td>{html.escape(row['name'])}</td><td class=n>{100 * row['share']:.1f} %</td>"
        f"<td><span class=range><i style='left:{100 * row['low']:.1f}%;width:{100 * (row['high'] - row['low']):.1f}%'>"
        f"</i><b style='left:{100 * row['share']:.1f}%'></b></span></td>"
        f"<td class=n>{_interval(row)}</td>"
        f"<td class=n>{row['passed']} / {row['count']}</td></tr>"
        for row in scores
    )


def _seeds_cells(seeds: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the table of seeds: each score with its interval, and the mean of all."""
    names = ["seed", *(row["name"] for row in seeds[0]["scores"])]
    cells = [[str(s["seed"]), *(f"{100 * r['share']:.1f} % ({_interval(r)})" for r in s["scores"])] for s in seeds]
    columns = zip(*([row["share"] for row in seed["scores"]] for seed in seeds), strict=True)
    return names, [*cells, ["mean", *(f"{100 * sum(shares) / len(seeds):.1f} %" for shares in columns)]]


def _seeds_html(seeds: Sequence[Mapping[str, Any]]) -> str:
    if not seeds:
        return ""
    names, rows = _seeds_cells(seeds)
    table = pandas.DataFrame(rows, columns=names).to_html(index=False, border=0)
    return f"<h2>Seeds</h2>\n<p>The same data, models trained from other seeds.</p>\n<div class=panel>{table}</div>"


COMPARED = ("model", "decoding", "pass@1", "95 % interval", "tokens/forward", "seconds/answer", "training, s")


def _compared_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    numbers = (f"{row['tokens_per_forward']:.2f}", f"{row['seconds_per_answer']:.3f}", f"{row['training_s']:.0f}")
    return row["model"], row["decoding"], f"{100 * row['score']:.1f} %", _interval(row), *numbers


def _comparison_html(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    table = pandas.DataFrame([_compared_cells(row) for row in rows], columns=COMPARED)
    return (
        "<h2>Full attention and attention by blocks</h2>\n<p>Two models of the same shape, data and number of training "
        "tokens, on the problems of both held-out sets. Rows by blocks hold every text twice, so their training takes "
        "longer.</p>\n"
        f"<div class=panel>{table.to_html(index=False, border=0)}</div>"
    )


def _training_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    validation = "" if row["validation_loss"] is None else f"{row['validation_loss']:.2f}"
    numbers = (str(row["steps"]), f"{row['tokens']:,}", f"{row['tokens_per_s']:,.0f}", f"{row['loss']:.2f}", validation)
    return row["stage"], *numbers


def _training_rows(training: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(f"<tr><td>{'</td><td class=n>'.join(_training_cells(row))}</td></tr>" for row in training)


def _time_title(name: str) -> str:
    stage, _, variant = name.partition("_")
    whose = {"": "", BLOCKS: ", by blocks"}.get(variant, f", {variant.replace('_', ' ')}")
    return f"{TIME_TITLES.get(stage, stage)}{whose}"


def _time_rows(times: Mapping[str, float]) -> str:
    longest = max(times.values(), default=1.0) or 1.0
    return "\n".join(
        f"<tr><td>{_time_title(name)}</td><td class=n>{seconds:.0f} s</td>"
        f"<td class=wide><span class=bar style='width:{100 * seconds / longest:.1f}%'></span></td></tr>"
        for name, seconds in times.items()
    )


def _answer_blocks(answers: Sequence[Mapping[str, Any]]) -> str:
    return "\n".join(
        f"<h3>{answer['kind']} request, {answer['seconds']:.1f} s</h3><pre>{html.escape(answer['question'].rstrip())}"
        f"</pre><pre class=answer>{html.escape(answer['answer'].strip(chr(10)))}</pre>"
        for answer in answers
    )


def _answer_markdown(answer: Mapping[str, Any]) -> str:
    question, text = answer["question"].rstrip(), answer["answer"].strip("\n")
    return f"{answer['kind']} request:\n\n```text\n{question}\n```\n\nanswer:\n\n```python\n{text}\n```"
