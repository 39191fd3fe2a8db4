"""The command `run`: everything that can be known is checked before a model loads, then one task after the other.

The arguments are lm-eval's, and lm-eval runs each task and writes its results. Here is what stands around that: the
refusals, the folder that no two runs share, one model for all tasks, and the account of those that failed.
"""

import argparse
import contextlib
import dataclasses
import glob
import json
import logging
import numbers
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval.models  # noqa: F401  registers lm-eval's own, which it does only while nothing is registered
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import get_model, model_registry
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.loggers import EvaluationTracker, TrackioLogger, WandbLogger
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table, set_torch_seed

from coda_eval import session
from coda_eval.programs import Answer, Judged
from coda_eval.records import Record, write_records
from coda_eval.report import write_scores
from CoDALanguageModel.errors import UserError

logger = logging.getLogger(__name__)

OURS = {
    "coda": "coda_eval.harness:CoDAEvalModel",
    "diffllm": "coda_eval.harness:CoDAEvalModel",
    "coda_hf": "coda_eval.autoregressive:AutoregressiveModel",
}
"""Our models, which fill gaps and write their answers themselves. They are imported, and torch with them, when one is
about to be loaded: what is wrong with a command is said in a fraction of that time."""

for _name, _place in OURS.items():
    if _name not in model_registry:
        model_registry.register(_name, target=_place)

AUTOREGRESSIVE = {"hf": "coda_hf", "hf-auto": "coda_hf", "huggingface": "coda_hf"}
"""lm-eval's names of Hugging Face models, and the model of ours that runs them."""

SCORES = "scores.json"
"""The score cards in a run's folder."""

NO_SEEDS = (None, None, None, None)


def run(args: argparse.Namespace) -> None:
    """Check the command, load the model, then run the tasks one by one.

    Args:
        args: lm-eval's parsed arguments of `run`.

    Raises:
        UserError: something is wrong that can be known before a model is loaded, or the model refuses its settings.
        SystemExit: tasks failed; the message names them, and the others are scored.
    """
    config = read_config(args)
    output = claim_folder(config.output_path)
    manager, names = check_tasks(config)
    run_tasks(config, output, manager, names, load_model(config))


def read_config(args: argparse.Namespace) -> EvaluatorConfig:
    """What lm-eval's arguments of `run` ask for.

    Raises:
        UserError: lm-eval or `refuse_caches` refuses it.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as lm-eval's own command
    try:
        config = EvaluatorConfig.from_cli(args)
    except ValueError as error:  # lm-eval's own checks
        raise UserError(str(error)) from error
    config.model = AUTOREGRESSIVE.get(config.model, config.model)
    refuse_caches(config)
    return config


def load_model(config: EvaluatorConfig) -> LM:
    """The model, loaded.

    Raises:
        UserError: it cannot be loaded, or refuses its settings.
    """
    sizes = {"batch_size": config.batch_size, "max_batch_size": config.max_batch_size, "device": config.device}
    if config.seed:
        set_torch_seed(config.seed[2])  # rows that a tokenizer adds to the embeddings are drawn
    try:
        return get_model(config.model).create_from_arg_obj(config.model_args, sizes)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # a name that is neither a folder nor on the Hub, or a broken file
        raise UserError(f"the model could not be loaded: {error}") from error


def run_tasks(
    config: EvaluatorConfig, output: Path | None, manager: TaskManager, names: Sequence[str], model: LM
) -> None:
    """Run tasks one by one, in the folder that was claimed for them.

    Raises:
        SystemExit: tasks failed; the message names them, and the others are scored.
    """
    if config.model not in OURS:
        keep_answers(model)
    failed: dict[str, str] = {}
    with _answers_folder(output) as folder, session.opened(session.Session(folder=folder)) as state:
        for name in names:
            try:
                run_task(config, manager, name, model)
            except Exception as error:  # of any kind: the other tasks are still to be scored
                if os.environ.get("WORLD_SIZE", "1") != "1" and not isinstance(error, session.TaskFailed):
                    raise  # the other ranks do not know of it: going on alone would leave them waiting
                expected = isinstance(error.__cause__ or error, (UserError, session.TaskFailed))
                if speaks() or not expected:
                    logger.error("%s failed: %s", name, error, exc_info=not expected)
                failed[name] = f"{type(error).__name__}: {error}"
        if failed:
            session.wait()
            if not speaks():
                raise SystemExit(1)
            account = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
            kept = f"; {state.answers} answers are kept in {state.file()}" if state.answers else ""
            raise SystemExit(f"coda_eval: error: {len(failed)} of {len(names)} tasks failed: {account}{kept}")


def refuse_caches(config: EvaluatorConfig) -> None:
    """Refuse lm-eval's caches, whose keys leave out what answers and prompts depend on.

    Raises:
        UserError: one is asked for.
    """
    if config.use_cache:
        raise UserError(f"--use_cache is refused: {session.CACHE_LIES}")
    requests = config.cache_requests
    if requests.get("cache_requests") if isinstance(requests, dict) else requests:
        raise UserError(
            "--cache_requests is refused: lm-eval keeps whole requests under the name of the task, so that other "
            "--gen_kwargs, gap lengths, problem files, or another chat template at the same path would get the old ones"
        )


def results_in(output: Path) -> list[Path]:
    """The results files of finished runs at an `--output_path`."""
    if output.suffix == ".json":
        return sorted(output.parent.glob(f"{glob.escape(output.stem)}_*.json"))
    return sorted(output.rglob("results_*.json"))


def claim_folder(output_path: str | None) -> Path | None:
    """The `--output_path`: its folder is made, and holds no results yet.

    Raises:
        UserError: it holds results or answers of an earlier run, or nothing can be written there.
    """
    if not output_path:
        return None
    output = Path(output_path)
    folder = _folder_of(output)
    if not speaks():
        return output  # the first process looks for all: its answers may already be there
    if found := [*results_in(output), *sorted(folder.glob("answers_rank*.jsonl"))]:
        raise UserError(
            f"--output_path {output_path!r} holds results of an earlier run ({found[0]}), which could not be told from "
            "the new ones: give another folder, or remove them"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"nothing can be written to --output_path {output_path!r}: {error}") from error
    return output


def check_tasks(config: EvaluatorConfig) -> tuple[TaskManager, list[str]]:
    """Load every task with its problems, which also tries the sandbox that answers will run in.

    Returns:
        lm-eval's index of tasks, and the tasks and groups to run by name or file.

    Raises:
        UserError: a task is unknown, or cannot be run; every such task is named with its reason.
    """
    tasks = [config.tasks] if isinstance(config.tasks, str) else config.tasks
    given = [name for task in tasks for name in task.split(",")]
    # lm-eval's own thousands of files take seconds to index: they are looked at only where a task is not ours.
    manager = TaskManager(include_path=config.include_path, include_defaults=False, metadata=config.metadata)
    if not all(name in manager.all_tasks for name in given):
        manager = config.process_tasks(config.metadata)
    names = dict.fromkeys(name for task in given for name in (manager.match_tasks([task]) or _files(task)))
    fills_gaps = config.model in OURS
    if not fills_gaps:
        get_model(config.model)  # refuses an unknown name
    reasons = {}
    for name in names:
        try:
            loaded = manager.load([name])["tasks"].values()
        except (ValueError, OSError, ImportError) as error:  # its files, its data set on the Hub, or what it needs
            reasons[name] = str(error)
            continue
        if not fills_gaps and any(map(_has_gaps, loaded)):
            reasons[name] = f"the model {config.model!r} would see the text before a gap only; coda and hf fill gaps"
    if reasons:
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UserError(f"{len(reasons)} of {len(names)} tasks cannot be run: {told}")
    return manager, list(names)


def keep_answers(model: LM) -> None:
    """Have the answers of a model of lm-eval's written when it has made them."""
    from coda_eval.hosted import answer_record  # and torch

    generate = model.generate_until

    def keeping(requests: list[Instance], *args: Any, **kwargs: Any) -> list[str]:
        answers = generate(requests, *args, **kwargs)
        repeats: Counter[int] = Counter()
        records = []
        for request, answer in zip(requests, answers, strict=True):
            records.append(answer_record(request, repeats[id(request)], answer))
            repeats[id(request)] += 1
        session.save_answers(records)
        return answers

    model.generate_until = keeping


def run_task(config: EvaluatorConfig, manager: TaskManager, name: str, model: LM) -> None:
    """Run a task or group and write its results, as lm-eval's own command does.

    Raises:
        OSError: lm-eval could not write the results.
    """
    settings = dict(config.hf_hub_log_args)
    settings |= {"output_path": config.output_path} if config.output_path else {}
    settings |= {"token": os.environ["HF_TOKEN"]} if os.environ.get("HF_TOKEN") else {}
    tracker = EvaluationTracker(**settings)
    loggers: list[Any] = [WandbLogger(config.wandb_args, config.wandb_config_args)] if config.wandb_args else []
    loggers += [TrackioLogger(config.trackio_args)] if config.trackio_args else []
    seeds = config.seed or NO_SEEDS
    results = simple_evaluate(
        model=model,
        model_args=config.model_args,
        tasks=[name],
        num_fewshot=config.num_fewshot,
        batch_size=config.batch_size,
        max_batch_size=config.max_batch_size,
        device=config.device,
        delete_requests_cache=config.cache_requests.get("delete_requests_cache", False),
        limit=config.limit,
        samples=config.samples,
        check_integrity=config.check_integrity,
        write_out=config.write_out,
        log_samples=True,  # the records are made of them
        evaluation_tracker=tracker,
        system_instruction=config.system_instruction,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.fewshot_as_multiturn,
        gen_kwargs=config.gen_kwargs,
        task_manager=manager,
        predict_only=config.predict_only,
        random_seed=seeds[0],
        numpy_random_seed=seeds[1],
        torch_random_seed=seeds[2],
        fewshot_random_seed=seeds[3],
        confirm_run_unsafe_code=config.confirm_run_unsafe_code,
        metadata=config.metadata,
    )
    if results is None:  # another rank writes
        return
    results["config"]["model"] = tracker.general_config_tracker.model_source = config.model
    samples = results.pop("samples")
    if config.show_config:
        print(json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False))
    folder = _folder_of(Path(config.output_path)) if config.output_path else None
    if folder:
        write_records(folder, [r for task, of_task in samples.items() for r in records_of(task, of_task)])
    _write(config, tracker, results, samples)  # lm-eval changes the samples
    if folder:
        write_scores(results_in(Path(config.output_path)), folder / SCORES)
    for host in loggers:
        host.post_init(results)
        host.log_eval_result()
        if config.log_samples:
            host.log_eval_samples(samples)
        host.run.finish() if isinstance(host, WandbLogger) else host.finish()
    print(f"{config.model} ({config.model_args}), gen_kwargs: ({config.gen_kwargs}), limit: {config.limit}")
    print(make_table(results))
    if "groups" in results:
        print(make_table(results, "groups"))


def _write(
    config: EvaluatorConfig, tracker: EvaluationTracker, results: dict[str, Any], samples: dict[str, Any] | None
) -> None:
    """Write results and samples; lm-eval only warns where it cannot."""
    before = results_in(Path(config.output_path)) if config.output_path else []
    tracker.save_results_aggregated(results=results, samples=samples if config.log_samples else None)
    if config.output_path and results_in(Path(config.output_path)) == before:
        raise OSError(f"lm-eval could not write the results to {config.output_path!r}; its log says why")
    for task in results["configs"] if config.log_samples else ():
        tracker.save_results_samples(task_name=task, samples=samples[task])
        if config.output_path and _count_samples(Path(config.output_path), f"{task}_{tracker.date_id}") != len(
            samples[task]
        ):
            raise OSError(f"lm-eval could not write all samples of {task} to {config.output_path!r}; its log says why")
    if tracker.push_results_to_hub or tracker.push_samples_to_hub:
        tracker.recreate_metadata_card()


def _count_samples(output: Path, name: str) -> int:
    """Lines of the samples files of a task and date."""
    return sum(
        path.read_bytes().count(b"\n") for path in _folder_of(output).rglob(f"samples_{glob.escape(name)}.jsonl")
    )


def _folder_of(output: Path) -> Path:
    """The run's folder: the output itself, or where it is to lie."""
    return output.parent if output.suffix == ".json" else output


def speaks() -> bool:
    """Whether this process writes the results."""
    return os.environ.get("RANK", "0") == "0"


def _files(task: str) -> list[str]:
    """The task files that a path, a pattern or a folder names."""
    if task.endswith(".yaml"):
        return sorted(glob.glob(str(Path(task).absolute())))
    return sorted(str(path) for path in Path(task).absolute().glob("*.yaml"))


def _has_gaps(task: Any) -> bool:
    split = task.dataset.get(task.config.test_split) if isinstance(task.dataset, dict) else None
    return split is not None and "infill_prefix" in split.column_names


@contextlib.contextmanager
def _answers_folder(output: Path | None) -> Iterator[Path]:
    """The folder for answers: that of the output, or a temporary one that stays where a task failed."""
    if output is not None:
        yield _folder_of(output)
        return
    folder = Path(tempfile.mkdtemp(prefix="coda-eval-answers-"))
    try:
        yield folder
    except BaseException:
        if not any(folder.iterdir()):
            folder.rmdir()
        raise
    shutil.rmtree(folder)


def records_of(task: str, samples: Iterable[dict[str, Any]]) -> list[Record]:
    """The records of a task from lm-eval's samples; of several filters the first one counts."""
    samples = list(samples)
    of_first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    return [r for sample in sorted(of_first, key=lambda s: s["doc_id"]) for r in _records_of_document(task, sample)]


def _records_of_document(task: str, sample: dict[str, Any]) -> Iterable[Record]:
    document = sample["doc"] if isinstance(sample["doc"], dict) else {}
    prompt = str(sample["arguments"][0][0])
    where = {"task": task, "task_id": document.get("task_id", sample["doc_id"]), "doc_id": sample["doc_id"]}
    nothing = {field.name: None for field in dataclasses.fields(Record)}
    score = next((sample[name] for name in sample["metrics"] if isinstance(sample[name], numbers.Real)), None)
    score = None if score is None else float(score)
    if not isinstance(sample["resps"][0][0], str):  # likelihoods: a request for each choice
        yield Record(**nothing | where | {"prompt": prompt, "repeat": 0, "score": score})
        return
    answers = [answer for answer in sample["resps"][0] if not getattr(answer, "surplus", False)]
    entries = sample["filtered_resps"][0]
    for repeat, answer in enumerate(answers):
        entry = entries[repeat] if isinstance(entries, list) and len(entries) == len(answers) else None
        facts = nothing | {"score": score}
        if isinstance(entry, Judged):
            facts |= {name: entry.fields.get(name) for name in ("status", "error", "seconds", "cpu_seconds")}
            facts |= {"program": entry.program, "score": float(entry.fields["status"] == "passed")}
        spent = Answer.cost_of(answer)
        cost = None if spent["cost"] is None else {**spent["cost"], "generation_s": spent["generation_s"]}
        facts |= {"new_tokens": spent["new_tokens"], "forwards": spent["forwards"], "cost": cost}
        facts |= {"seed": getattr(answer, "seed", None), "answer": str(answer), "prompt": prompt, "repeat": repeat}
        yield Record(**facts | where)
