"""The stages of the loop as command lines of the rooms, with the files that connect them."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coda_quickstart.runner import Stage

SOURCES = ("corpus", "functions", "validation")
HUMANEVAL_PROBLEMS = (0, 1, 2)


def build_stages(repository: Path, run_dir: Path, configs: Path, evaluation: Mapping[str, Any]) -> list[Stage]:
    """All stages of the loop, in order.

    Args:
        repository: root of the checkout.
        run_dir: the run folder, absolute.
        configs: folder with the stages' settings.
        evaluation: settings of decoding and batching, from eval.yaml there.
    """
    python = sys.executable
    tokenizer = run_dir / "tokenizer" / "tokenizer.json"
    manifests = {name: run_dir / "shards" / name / "manifest.json" for name in SOURCES}
    pretrained, midtrained, base, model = (
        (run_dir / name / "model.safetensors", run_dir / name / "config.json")
        for name in ("pretrain_export", "midtrain_export", "base", "model")
    )
    benchmarks = [run_dir / "benchmarks" / f"quickstart_{name}.jsonl" for name in ("problems", "infill")]
    instructions = [run_dir / "data" / "instructions" / f"{name}.jsonl" for name in ("train", "validation")]
    makers = sorted(Path(__file__).parent.glob("*.py"))
    data_makers = [path for path in makers if path.stem in ("grammar", "problems", "corpus", "tokenizer", "prepare")]

    def trainer(name: str, *overrides: str) -> tuple[tuple[str, ...], ...]:
        config = str(configs / f"{name}.yaml")
        train = (python, "-m", "coda_pretrain", "--config", config, f"output_dir={run_dir / name}")
        common = (f"model.tokenizer={run_dir / 'tokenizer'}", f"data.root={run_dir / 'shards'}")
        common += (f"evaluation.data.root={run_dir / 'shards'}",)
        export = (python, "-m", "coda_pretrain", "export", "--checkpoint_dir", str(run_dir / name))
        return (*train, *common, *overrides), (*export, "--output_dir", str(run_dir / f"{name}_export"))

    def shard(name: str) -> tuple[str, ...]:
        paths = ("--input", str(run_dir / "data" / f"{name}.jsonl"), "--output", str(run_dir / "shards" / name))
        return (python, "-m", "coda_pretrain", "data", *paths, "--tokenizer", str(run_dir / "tokenizer"))

    pretrain = Stage(
        name="pretrain",
        title="Pre-training",
        commands=trainer("pretrain"),
        inputs=(configs / "pretrain.yaml", tokenizer, *manifests.values()),
        outputs=(*pretrained, run_dir / "pretrain" / "metrics.jsonl"),
        replaces=(run_dir / "pretrain", run_dir / "pretrain_export"),
    )
    midtrain = Stage(
        name="midtrain",
        title="Mid-training",
        commands=trainer("midtrain", f"model.init_from={run_dir / 'pretrain_export'}"),
        inputs=(configs / "midtrain.yaml", tokenizer, *manifests.values(), *pretrained),
        outputs=(*midtrained, run_dir / "midtrain" / "metrics.jsonl"),
        replaces=(run_dir / "midtrain", run_dir / "midtrain_export"),
    )
    return [
        Stage(
            name="data",
            title="Corpus, tokenizer, instruction set and held-out problems",
            commands=(
                (python, "-m", "coda_quickstart", "data", "--config", str(configs / "data.yaml"))
                + ("--output_dir", str(run_dir)),
            ),
            inputs=(configs / "data.yaml", *data_makers),
            outputs=(tokenizer, *(run_dir / "data" / f"{name}.jsonl" for name in SOURCES), *benchmarks, *instructions),
            replaces=(run_dir / "data", run_dir / "tokenizer", run_dir / "benchmarks"),
        ),
        Stage(
            name="shards",
            title="Token shards",
            commands=tuple(shard(name) for name in SOURCES),
            inputs=(tokenizer, *(run_dir / "data" / f"{name}.jsonl" for name in SOURCES)),
            outputs=tuple(manifests.values()),
            replaces=(run_dir / "shards",),
        ),
        pretrain,
        midtrain,
        Stage(
            name="convert",
            title="Hugging Face folder",
            commands=(
                (python, str(repository / "save_hf_model.py"), "--checkpoint_dir", str(run_dir / "midtrain_export"))
                + ("--output_dir", str(run_dir / "base")),
            ),
            inputs=midtrained,
            outputs=base,
            replaces=(run_dir / "base",),
        ),
        Stage(
            name="sft",
            title="Fine-tuning",
            commands=(
                ("bash", str(repository / "run_sft.sh"), str(configs / "sft.yaml"))
                + (f"model_name_or_path={run_dir / 'base'}", f"dataset_dir={run_dir / 'data' / 'instructions'}")
                + (f"output_dir={run_dir / 'model'}",),
            ),
            inputs=(configs / "sft.yaml", *base, *instructions),
            outputs=(*model, run_dir / "model" / "metrics.jsonl"),
            replaces=(run_dir / "model",),
            environment={"PYTHON": python},
        ),
        _evaluation_stage(run_dir, python, configs, evaluation, (*model, *benchmarks)),
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


def _evaluation_stage(
    run_dir: Path, python: str, configs: Path, evaluation: Mapping[str, Any], inputs: tuple[Path, ...]
) -> Stage:
    # As JSON: a path with a comma would end there in lm-eval's own key=value form.
    arguments = json.dumps({"pretrained": str(run_dir / "model"), **evaluation["generation"]})
    results = run_dir / "evaluation"
    score = (python, "-m", "coda_eval", "run", "--model", "coda", "--apply_chat_template")
    score += ("--model_args", arguments)
    score += ("--tasks", "quickstart_problems,quickstart_infill,coda_humaneval_instruct")
    score += ("--samples", f'{{"coda_humaneval_instruct": {list(HUMANEVAL_PROBLEMS)}}}')
    score += ("--batch_size", str(evaluation["batch_size"]), "--output_path", str(results), "--log_samples")
    cards = (python, "-m", "coda_eval.report", str(results), "--output", str(run_dir / "scores.json"))
    return Stage(
        name="evaluate",
        title="Evaluation",
        commands=(score, cards),
        inputs=(configs / "eval.yaml", *inputs),
        outputs=(run_dir / "scores.json",),
        replaces=(results, run_dir / "scores.json"),
        environment={"CODA_EVAL_DATA": str(run_dir / "benchmarks")},
    )
