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
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.model import LM
from lm_eval.api.registry import get_model
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.loggers import EvaluationTracker, TrackioLogger, WandbLogger
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table, set_torch_seed

from coda_eval import session
from coda_eval.hosted import CACHE_LIES, HostedLM, answer_record
from coda_eval.programs import SCORES_ALL, Answer, Judged, ks_of, score_programs
from coda_eval.records import Record, write_records
from coda_eval.report import write_scores
from CoDALanguageModel.errors import UserError

logger = logging.getLogger(__name__)

AUTOREGRESSIVE = {"hf": "coda_hf", "hf-auto": "coda_hf", "huggingface": "coda_hf"}
"""lm-eval's names of Hugging Face models, and the model of ours that runs them."""

SCORES = "scores.json"
"""The score cards in a run's folder."""

MAX_REPEATS = 1000
"""Most answers to a problem."""

NO_SEEDS = (None, None, None, None)


def run(args: argparse.Namespace) -> None:
    """Check the command, load the model, then run the tasks one by one.

    Args:
        args: lm-eval's parsed arguments of `run`.

    Raises:
        UserError: something is wrong that can be known before a model is loaded, or the model refuses its settings.
        SystemExit: tasks failed; the message names them, and the others are scored.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as lm-eval's own command
    repeats, args.samples = read_repeats(args.samples)
    try:
        config = EvaluatorConfig.from_cli(args)
    except ValueError as error:  # lm-eval's own checks
        raise UserError(str(error)) from error
    config.model = AUTOREGRESSIVE.get(config.model, config.model)
    refuse_caches(config)
    output = claim_folder(config.output_path)
    manager, names = check_tasks(config, repeats)
    sizes = {"batch_size": config.batch_size, "max_batch_size": config.max_batch_size, "device": config.device}
    if config.seed:
        set_torch_seed(config.seed[2])  # rows that a tokenizer adds to the embeddings are drawn
    try:
        model = get_model(config.model).create_from_arg_obj(config.model_args, sizes)
    except UserError:
        raise
    except (OSError, ValueError) as error:  # a name that is neither a folder nor on the Hub, or a broken file
        raise UserError(f"the model could not be loaded: {error}") from error
    if repeats > 1:
        refuse_greedy(model, manager, names, config.gen_kwargs)
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
                if _speaks() or not expected:
                    logger.error("%s failed: %s", name, error, exc_info=not expected)
                failed[name] = f"{type(error).__name__}: {error}"
        if failed:
            session.wait()
            if not _speaks():
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
        raise UserError(f"--use_cache is refused: {CACHE_LIES}")
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
    if not _speaks():
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


def check_tasks(config: EvaluatorConfig, repeats: int = 0) -> tuple[TaskManager, list[str]]:
    """Load every task with its problems, which also tries the sandbox that answers will run in.

    Args:
        config: what was asked for.
        repeats: answers to each problem; 0 leaves that to the tasks.

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
    if repeats:
        set_repeats(manager, repeats)
    names = dict.fromkeys(name for task in given for name in (manager.match_tasks([task]) or _files(task)))
    fills_gaps = issubclass(get_model(config.model), HostedLM)
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


def read_repeats(samples: Any) -> tuple[int, Any]:
    """`--samples` apart: answers to each problem where it is a number, else 0 and lm-eval's own meaning of it.

    Raises:
        UserError: it is a number that is not positive.
    """
    text = str(samples).strip()
    if not re.fullmatch(r"[+-]?\d+", text):
        return 0, samples
    if not 0 < int(text) <= MAX_REPEATS:
        raise UserError(f"--samples must be in [1, {MAX_REPEATS}] (answers to each problem), got {text}")
    return int(text), None


def set_repeats(manager: TaskManager, repeats: int) -> None:
    """Have every task that the manager loads ask for `repeats` answers to a problem and score them all."""
    load = manager.load

    def with_repeats(*arguments: Any, **named: Any) -> Any:
        loaded = load(*arguments, **named)
        for name, task in loaded["tasks"].items():
            if repeats > 1 and task.config.process_results not in SCORES_ALL:
                raise UserError(f"--samples {repeats}: {name} scores one answer to each problem; leave --samples out")
            task.set_config("repeats", repeats)
            if task.config.process_results is score_programs:
                for metric in (f"pass@{k}" for k in ks_of(repeats)):
                    task._aggregation_list[metric], task._higher_is_better[metric] = mean, True
        return loaded

    manager.load = with_repeats


def refuse_greedy(model: LM, manager: TaskManager, names: list[str], gen_kwargs: Any) -> None:
    """Refuse more than one answer to a problem where all would be the same.

    Raises:
        UserError: a task would be answered at temperature 0.
    """
    for name, task in manager.load(names)["tasks"].items():
        settings = {**(task.config.generation_kwargs or {}), **(gen_kwargs or {})}
        if not (model.draws if isinstance(model, HostedLM) else HostedLM.draws)(settings):
            raise UserError(
                f"--samples with temperature 0 would give {name} the same answer each time: set a temperature, for "
                "coda in --model_args (temperature=0.8), for others in --gen_kwargs (do_sample=True,temperature=0.8)"
            )


def keep_answers(model: LM) -> None:
    """Have the answers of a model of lm-eval's written when it has made them; ours write their own, batch by batch."""
    if isinstance(model, HostedLM):
        return
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


def _speaks() -> bool:
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
