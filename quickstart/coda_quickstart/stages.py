"""The stages of the loop as command lines of the rooms, with the files that connect them."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coda_quickstart.runner import Stage

SOURCES = ("corpus", "functions", "validation")
HUMANEVAL_PROBLEMS = (0, 1, 2)
BLOCKS = "blocks"
"""Folder in a run's, and ending of the names of stages, of the model that attends by blocks."""


def build_stages(
    repository: Path, run_dir: Path, configs: Path, evaluation: Mapping[str, Any], *, compare: bool = False
) -> list[Stage]:
    """All stages of the loop, in order.

    Args:
        repository: root of the checkout.
        run_dir: the run folder, absolute.
        configs: folder with the stages' settings.
        evaluation: settings of decoding and batching, from eval.yaml there.
        compare: whether the same data also make a model that attends by blocks, in a folder of its own in the run's,
            and both are scored with several tokens a step too.
    """
    python = sys.executable
    tokenizer = run_dir / "tokenizer" / "tokenizer.json"
    sources = [run_dir / "data" / f"{name}.jsonl" for name in SOURCES]
    manifests = {name: run_dir / "shards" / name / "manifest.json" for name in SOURCES}
    model = (run_dir / "model" / "model.safetensors", run_dir / "model" / "config.json")
    benchmarks = [run_dir / "benchmarks" / f"quickstart_{name}.jsonl" for name in ("problems", "infill")]
    instructions = [run_dir / "data" / "instructions" / f"{name}.jsonl" for name in ("train", "validation")]
    makers = sorted(Path(__file__).parent.glob("*.py"))
    data_makers = [path for path in makers if path.stem in ("grammar", "problems", "corpus", "tokenizer", "prepare")]

    def evaluate(name: str, folder: Path, tasks: str, **settings: Any) -> Stage:
        generation = {**evaluation["generation"], **settings}
        return _evaluation_stage(run_dir, name, folder, tasks, configs, evaluation["batch_size"], generation)

    stages = [
        Stage(
            name="data",
            title="Corpus, tokenizer, instruction set and held-out problems",
            commands=(
                (python, "-m", "coda_quickstart", "data", "--config", str(configs / "data.yaml"))
                + ("--output_dir", str(run_dir)),
            ),
            inputs=(configs / "data.yaml", *data_makers),
            outputs=(tokenizer, *sources, *benchmarks, *instructions),
            replaces=(run_dir / "data", run_dir / "tokenizer", run_dir / "benchmarks"),
        ),
        Stage(
            name="shards",
            title="Token shards",
            commands=(
                (python, "-m", "coda_pretrain", "data", "--each", "--input", *map(str, sources))
                + ("--output", str(run_dir / "shards"), "--tokenizer", str(run_dir / "tokenizer")),
            ),
            inputs=(tokenizer, *sources),
            outputs=tuple(manifests.values()),
            replaces=(run_dir / "shards",),
        ),
        *_training_stages(repository, run_dir, run_dir, configs, (tokenizer, *manifests.values()), instructions),
        evaluate("evaluation", run_dir, "quickstart_problems,quickstart_infill,coda_humaneval_instruct"),
        Stage(
            name="denoise",
            title="One answer, step by step",
            commands=(
                (python, "-m", "coda_quickstart", "denoise", "--run_dir", str(run_dir))
                + ("--config", str(configs / "eval.yaml")),
            ),
            inputs=(*model, benchmarks[0], configs / "eval.yaml", Path(__file__).with_name("denoise.py")),
            outputs=(run_dir / "denoise.json",),
        ),
        Stage(
            name="serve",
            title="Server: one chat request, one infill request",
            commands=((python, "-m", "coda_quickstart", "chat", "--run_dir", str(run_dir)),),
            inputs=(*model, *benchmarks, Path(__file__).with_name("chat.py")),
            outputs=(run_dir / "answers.json",),
        ),
    ]
    if compare:
        by_blocks, parallel = run_dir / BLOCKS, {"threshold": evaluation["threshold"]}
        data = (tokenizer, *manifests.values())
        stages += [
            *_training_stages(repository, run_dir, by_blocks, configs, data, instructions, evaluation["block_size"]),
            evaluate("evaluation", by_blocks, "quickstart_problems"),
            evaluate("parallel", run_dir, "quickstart_problems", **parallel),
            evaluate("parallel", by_blocks, "quickstart_problems", **parallel),
        ]
    return stages


def _training_stages(
    repository: Path,
    run_dir: Path,
    folder: Path,
    configs: Path,
    data: tuple[Path, ...],
    instructions: list[Path],
    block_size: int | None = None,
) -> list[Stage]:
    """From token shards to a fine-tuned model in `folder`, of full attention or by blocks."""
    python = sys.executable
    pretrained, midtrained, base, model = (
        (folder / name / "model.safetensors", folder / name / "config.json")
        for name in ("pretrain_export", "midtrain_export", "base", "model")
    )
    suffix, by, attention, objective, tuned = "", "", (), (), ()
    if block_size is not None:
        suffix, by = f"_{BLOCKS}", f" by blocks of {block_size}"
        attention = ("model.config.attention=block_causal", f"model.config.block_size={block_size}")
        objective, tuned = ("objective=block",), ("diffusion.objective=block",)

    def trainer(name: str, *overrides: str) -> tuple[tuple[str, ...], ...]:
        config = str(configs / f"{name}.yaml")
        train = (python, "-m", "coda_pretrain", "--config", config, f"output_dir={folder / name}")
        common = (f"model.tokenizer={run_dir / 'tokenizer'}", f"data.root={run_dir / 'shards'}")
        common += (f"evaluation.data.root={run_dir / 'shards'}",)
        export = (python, "-m", "coda_pretrain", "export", "--checkpoint_dir", str(folder / name))
        return (*train, *common, *objective, *overrides), (*export, "--output_dir", str(folder / f"{name}_export"))

    return [
        Stage(
            name=f"pretrain{suffix}",
            title=f"Pre-training{by}",
            commands=trainer("pretrain", *attention),
            inputs=(configs / "pretrain.yaml", *data),
            outputs=(*pretrained, folder / "pretrain" / "metrics.jsonl"),
            replaces=(folder / "pretrain", folder / "pretrain_export"),
        ),
        Stage(
            name=f"midtrain{suffix}",
            title=f"Mid-training{by}",
            commands=trainer("midtrain", f"model.init_from={folder / 'pretrain_export'}"),
            inputs=(configs / "midtrain.yaml", *data, *pretrained),
            outputs=(*midtrained, folder / "midtrain" / "metrics.jsonl"),
            replaces=(folder / "midtrain", folder / "midtrain_export"),
        ),
        Stage(
            name=f"convert{suffix}",
            title=f"Hugging Face folder{by}",
            commands=(
                (python, str(repository / "save_hf_model.py"), "--checkpoint_dir", str(folder / "midtrain_export"))
                + ("--output_dir", str(folder / "base")),
            ),
            inputs=midtrained,
            outputs=base,
            replaces=(folder / "base",),
        ),
        Stage(
            name=f"sft{suffix}",
            title=f"Fine-tuning{by}",
            commands=(
                ("bash", str(repository / "run_sft.sh"), str(configs / "sft.yaml"))
                + (f"model_name_or_path={folder / 'base'}", f"dataset_dir={run_dir / 'data' / 'instructions'}")
                + (f"output_dir={folder / 'model'}", *tuned),
            ),
            inputs=(configs / "sft.yaml", *base, *instructions),
            outputs=(*model, folder / "model" / "metrics.jsonl"),
            replaces=(folder / "model",),
            environment={"PYTHON": python},
        ),
    ]


def _evaluation_stage(
    run_dir: Path, name: str, folder: Path, tasks: str, configs: Path, batch_size: int, generation: Mapping[str, Any]
) -> Stage:
    """The model in `folder` scored into `folder / name`, and the cards of it beside that."""
    # As JSON: a path with a comma would end there in lm-eval's own key=value form.
    arguments = json.dumps({"pretrained": str(folder / "model"), **generation})
    results, card = folder / name, folder / ("scores.json" if name == "evaluation" else f"{name}.json")
    score = (sys.executable, "-m", "coda_eval", "run", "--model", "coda", "--apply_chat_template")
    score += ("--model_args", arguments, "--tasks", tasks)
    if "coda_humaneval_instruct" in tasks:
        score += ("--samples", f'{{"coda_humaneval_instruct": {list(HUMANEVAL_PROBLEMS)}}}')
    score += ("--batch_size", str(batch_size), "--output_path", str(results), "--log_samples")
    cards = (sys.executable, "-m", "coda_eval.report", str(results), "--output", str(card))
    model = (folder / "model" / "model.safetensors", folder / "model" / "config.json")
    benchmarks = [run_dir / "benchmarks" / f"quickstart_{name}.jsonl" for name in ("problems", "infill")]
    where = "" if folder == run_dir else f"_{folder.name}"
    return Stage(
        name=("evaluate" if name == "evaluation" else name) + where,
        title=f"Evaluation{' by blocks' * bool(where)}{', several tokens a step' * (name != 'evaluation')}",
        commands=(score, cards),
        inputs=(configs / "eval.yaml", *model, *benchmarks),
        outputs=(card,),
        replaces=(results, card),
        environment={"CODA_EVAL_DATA": str(run_dir / "benchmarks")},
    )
