"""The stages of the loop as command lines of the rooms, with the files that connect them."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from coda_quickstart.runner import Stage
from CoDALanguageModel.errors import UserError

SOURCES = ("corpus", "functions", "validation")
HUMANEVAL_PROBLEMS = (0, 1, 2)
BLOCKS = "blocks"
"""Folder in a run's, and ending of the names of stages, of the model that attends by blocks."""


@dataclass(frozen=True)
class Variant:
    """Another model that is trained on a run's data, in a folder of its own there."""

    name: str
    """Of the folder, and ending of the names of stages."""
    by: str
    """Ending of the titles of stages."""
    shape: tuple[str, ...] = ()
    """What changes the settings of pre-training."""
    training: tuple[str, ...] = ()
    """What changes those of pre- and mid-training."""
    tuning: tuple[str, ...] = ()
    """What changes those of fine-tuning."""


def read_settings(path: Path, *needed: str) -> dict[str, Any]:
    """The settings in a YAML file.

    Args:
        path: the file.
        *needed: keys that it must have.

    Raises:
        UserError: it is missing, is no YAML, or holds no such keys.
    """
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} cannot be read as YAML: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"--config {path} must hold key: value lines, got {settings!r}")
    if missing := [key for key in needed if key not in settings]:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    return settings


def of_seed(seed: int) -> Variant:
    """The model of the loop from another seed: of its first weights, of noise and of the order of rows."""
    return Variant(f"seed_{seed}", f", seed {seed}", training=(f"seed={seed}",), tuning=(f"seed={seed}",))


def of_blocks(size: int) -> Variant:
    """The model that attends by blocks."""
    shape = ("model.config.attention=block_causal", f"model.config.block_size={size}")
    return Variant(BLOCKS, f" by blocks of {size}", shape, ("objective=block",), ("diffusion.objective=block",))


def build_stages(
    repository: Path,
    run_dir: Path,
    configs: Path,
    evaluation: Mapping[str, Any],
    *,
    compare: bool = False,
    seeds: Sequence[int] = (),
) -> list[Stage]:
    """All stages of the loop, in order.

    Args:
        repository: root of the checkout.
        run_dir: the run folder, absolute.
        configs: folder with the stages' settings.
        evaluation: settings of decoding and batching, from eval.yaml there.
        compare: whether the same data also make a model that attends by blocks, in a folder of its own in the run's,
            and both are scored with several tokens a step too.
        seeds: each also makes a model of the loop's own kind from the same data, in a folder of its own.
    """
    python = sys.executable
    tokenizer = run_dir / "tokenizer" / "tokenizer.json"
    sources = [run_dir / "data" / f"{name}.jsonl" for name in SOURCES]
    manifests = {name: run_dir / "shards" / name / "manifest.json" for name in SOURCES}
    model = (run_dir / "model" / "model.safetensors", run_dir / "model" / "config.json")
    benchmarks = [run_dir / "benchmarks" / f"quickstart_{name}.jsonl" for name in ("problems", "infill")]
    instructions = [run_dir / "data" / "instructions" / f"{name}.jsonl" for name in ("train", "validation")]
    data = (tokenizer, *manifests.values())
    makers = sorted(Path(__file__).parent.glob("*.py"))
    data_makers = [path for path in makers if path.stem in ("grammar", "problems", "corpus", "tokenizer", "prepare")]

    def evaluate(name: str, variant: Variant | None, tasks: str, **settings: Any) -> Stage:
        generation = {**evaluation["generation"], **settings}
        return _evaluation_stage(run_dir, name, variant, tasks, configs, evaluation["batch_size"], generation)

    def record(name: str, title: str, output: str, inputs: Sequence[Path]) -> Stage:
        command = (python, "-m", "coda_quickstart", name, "--run_dir", str(run_dir))
        return Stage(
            name=name,
            title=title,
            commands=((*command, "--config", str(configs / "eval.yaml")),),
            inputs=(*inputs, configs / "eval.yaml", Path(__file__).with_name("denoise.py")),
            outputs=(run_dir / output,),
        )

    *pretraining, convert, tune = _training_stages(repository, run_dir, None, configs, data, instructions)
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
        *pretraining,
        record(
            "first",
            "First answer: a gap filled by the mid-trained model",
            "first_answer.json",
            (*pretraining[-1].outputs[:2], benchmarks[1]),
        ),
        convert,
        tune,
        evaluate("evaluation", None, "quickstart_problems,quickstart_infill,coda_humaneval_instruct"),
        record("denoise", "One answer, step by step", "denoise.json", (*model, benchmarks[0])),
        Stage(
            name="serve",
            title="Server: one chat request, one infill request",
            commands=((python, "-m", "coda_quickstart", "chat", "--run_dir", str(run_dir)),),
            inputs=(*model, *benchmarks, Path(__file__).with_name("chat.py")),
            outputs=(run_dir / "answers.json",),
        ),
    ]
    for variant in map(of_seed, seeds):
        stages += [
            *_training_stages(repository, run_dir, variant, configs, data, instructions),
            evaluate("evaluation", variant, "quickstart_problems,quickstart_infill"),
        ]
    if compare:
        by_blocks, parallel = of_blocks(evaluation["block_size"]), {"threshold": evaluation["threshold"]}
        stages += [
            *_training_stages(repository, run_dir, by_blocks, configs, data, instructions),
            evaluate("evaluation", by_blocks, "quickstart_problems"),
            evaluate("parallel", None, "quickstart_problems", **parallel),
            evaluate("parallel", by_blocks, "quickstart_problems", **parallel),
        ]
    return stages


def _training_stages(
    repository: Path,
    run_dir: Path,
    variant: Variant | None,
    configs: Path,
    data: tuple[Path, ...],
    instructions: list[Path],
) -> list[Stage]:
    """From token shards to a fine-tuned model: the loop's own, or a variant."""
    python = sys.executable
    folder, suffix = (run_dir / variant.name, f"_{variant.name}") if variant else (run_dir, "")
    changed = variant or Variant("", "")
    pretrained, midtrained, base, model = (
        (folder / name / "model.safetensors", folder / name / "config.json")
        for name in ("pretrain_export", "midtrain_export", "base", "model")
    )
    base += (folder / "base" / "generation_config.json",)  # which fine-tuning hands on

    def trainer(name: str, *overrides: str) -> tuple[tuple[str, ...], ...]:
        config = str(configs / f"{name}.yaml")
        train = (python, "-m", "coda_pretrain", "--config", config, f"output_dir={folder / name}")
        common = (f"model.tokenizer={run_dir / 'tokenizer'}", f"data.root={run_dir / 'shards'}")
        common += (f"evaluation.data.root={run_dir / 'shards'}",)
        export = ("--export_dir", str(folder / f"{name}_export"))
        return ((*train, *common, *changed.training, *overrides, *export),)

    return [
        Stage(
            name=f"pretrain{suffix}",
            title=f"Pre-training{changed.by}",
            commands=trainer("pretrain", *changed.shape),
            inputs=(configs / "pretrain.yaml", *data),
            outputs=(*pretrained, folder / "pretrain" / "metrics.jsonl"),
            replaces=(folder / "pretrain", folder / "pretrain_export"),
        ),
        Stage(
            name=f"midtrain{suffix}",
            title=f"Mid-training{changed.by}",
            commands=trainer("midtrain", f"model.init_from={folder / 'pretrain_export'}"),
            inputs=(configs / "midtrain.yaml", *data, *pretrained),
            outputs=(*midtrained, folder / "midtrain" / "metrics.jsonl"),
            replaces=(folder / "midtrain", folder / "midtrain_export"),
        ),
        Stage(
            name=f"convert{suffix}",
            title=f"Hugging Face folder{changed.by}",
            commands=(
                (python, str(repository / "save_hf_model.py"), "--checkpoint_dir", str(folder / "midtrain_export"))
                + ("--output_dir", str(folder / "base")),
                (python, "-m", "coda_quickstart", "settings", "--folder", str(folder / "base"))
                + ("--config", str(configs / "eval.yaml")),
            ),
            inputs=(configs / "eval.yaml", *midtrained),
            outputs=base,
            replaces=(folder / "base",),
        ),
        Stage(
            name=f"sft{suffix}",
            title=f"Fine-tuning{changed.by}",
            commands=(
                ("bash", str(repository / "run_sft.sh"), str(configs / "sft.yaml"))
                + (f"model_name_or_path={folder / 'base'}", f"dataset_dir={run_dir / 'data' / 'instructions'}")
                + (f"output_dir={folder / 'model'}", *changed.tuning),
            ),
            inputs=(configs / "sft.yaml", *base, *instructions),
            outputs=(*model, folder / "model" / "metrics.jsonl"),
            replaces=(folder / "model",),
            environment={"PYTHON": python},
        ),
    ]


def _evaluation_stage(
    run_dir: Path,
    name: str,
    variant: Variant | None,
    tasks: str,
    configs: Path,
    batch_size: int,
    generation: Mapping[str, Any],
) -> Stage:
    """A model scored into the folder `name` beside it, and the cards of it beside that."""
    folder = run_dir / variant.name if variant else run_dir
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
    return Stage(
        name=("evaluate" if name == "evaluation" else name) + (f"_{variant.name}" if variant else ""),
        title=f"Evaluation{variant.by if variant else ''}{', several tokens a step' * (name != 'evaluation')}",
        commands=(score, cards),
        inputs=(configs / "eval.yaml", *model, *benchmarks),
        outputs=(card,),
        replaces=(results, card),
        environment={"CODA_EVAL_DATA": str(run_dir / "benchmarks")},
    )
