"""The command `run`: everything that can be known is checked before a model loads, then one task after the other.

The arguments are lm-eval's, and lm-eval runs each task and writes its results. Here is what stands around that: the
refusals, the folder that no two runs share, one model for all tasks, and the account of those that failed.
"""

import argparse
import contextlib
import dataclasses
import glob
import importlib.util
import json
import logging
import math
import numbers
import os
import re
import shutil
import tempfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import lm_eval.evaluator
import lm_eval.models  # registers lm-eval's own, which it does only while nothing is registered
import lm_eval.tasks
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.model import LM
from lm_eval.api.registry import get_model, model_registry
from lm_eval.config.evaluate_config import EvaluatorConfig
from lm_eval.loggers import EvaluationTracker, TrackioLogger, WandbLogger
from lm_eval.loggers.utils import add_env_info
from lm_eval.tasks import TaskManager
from lm_eval.utils import handle_non_serializable, make_table, set_torch_seed

from coda_eval import session
from coda_eval.data import DATA_VARIABLE, problem
from coda_eval.journal import (
    COMMAND,
    FILES,
    Journal,
    code_version,
    digest,
    hash_tokenizer,
    hash_weights,
    known_likelihood,
)
from coda_eval.programs import PROGRAMS, SCORES_ALL, Answer, Judged, Overlap, ks_of, score_programs
from coda_eval.records import Record, write_records
from coda_eval.report import num_cut, write_scores
from CoDALanguageModel.decoding_settings import offered
from CoDALanguageModel.errors import UserError, did_you_mean, half_surrogate
from CoDALanguageModel.intervals import bootstrap_interval
from CoDALanguageModel.run_files import read_json, write_whole

logger = logging.getLogger(__name__)

OURS = {
    "coda": "coda_eval.harness:CoDAEvalModel",
    "diffllm": "coda_eval.harness:CoDAEvalModel",
    "coda_hf": "coda_eval.autoregressive:AutoregressiveModel",
}
"""Our models, which fill gaps and keep their answers themselves. They are imported, and torch with them, when one is
about to be loaded: what is wrong with a command is said in a fraction of that time."""

for _name, _place in {**OURS, "coda_samples": "coda_eval.samples:SamplesLM"}.items():
    if _name not in model_registry:
        model_registry.register(_name, target=_place)


@cache
def _environment() -> dict[str, Any]:
    """What lm-eval says of the machine and of what is installed there."""
    found: dict[str, Any] = {}
    add_env_info(found)
    return found


# It asks pip and others for each task, which takes a second or more.
lm_eval.evaluator.add_env_info = lambda results: results.update(_environment())

AUTOREGRESSIVE = {"hf": "coda_hf", "hf-auto": "coda_hf", "huggingface": "coda_hf"}
"""lm-eval's names of Hugging Face models, and the model of ours that runs them."""

SCORES = "scores.json"
"""The score cards in a run's folder."""

MAX_REPEATS = 1000
"""Most answers to a problem."""
_COVERED = {"pretrained", "revision", "subfolder", "peft", "delta", "gguf_file", "tokenizer", "dtype", "mc_num", "seed"}
_COVERED |= {"batch_size", "max_batch_size", "device", "device_map", "parallelize", "trust_remote_code"}
"""Names in model_args that an identity has in another form, or that no answer depends on."""

_HOSTS = ("wandb_args", "wandb_config_args", "trackio_args", "hf_hub_log_args")
"""Settings of a command that say where results are published, keys to these places among them."""

_ASKED = ("tasks", "data", "versions", "identity", "generation_config", "chat_template", "code")
"""Facts in `command.json` that, beside the arguments, decide which answers are asked for."""

NO_SEEDS = (None, None, None, None)

LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the length of an answer in the order in which one goes before another; tasks have the first one."""


def run(args: argparse.Namespace) -> None:
    """Check the command, load the model, then run the tasks one by one.

    Args:
        args: lm-eval's parsed arguments of `run`, and `resume`: whether to go on with what is in the folder.

    Raises:
        UserError: something is wrong that can be known before a model is loaded, or the model refuses its settings.
        SystemExit: tasks failed; the message names them, and the others are scored.
    """
    resume = vars(args).pop("resume", False)
    config = read_config(args)
    output = claim_folder(config.output_path, resume, model=config.model)
    tasks = check_tasks(config)
    with (
        _answers_folder(output) as folder,
        contextlib.closing(Journal(folder, rank(), resume=resume)) as journal,  # refused before a model is loaded
    ):
        evaluate(config, tasks, load_model(config), journal, resume)


def read_config(args: argparse.Namespace) -> EvaluatorConfig:
    """What lm-eval's arguments of `run` ask for.

    Raises:
        UserError: it is refused, by lm-eval, by `refuse_caches` or by `with_one_length`.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as lm-eval's own command
    if args.output_path == "":  # which lm-eval takes for none
        raise UserError("--output_path must name a folder, got ''")
    repeats, args.samples = read_repeats(args.samples)  # lm-eval would not have it beside --limit
    try:
        config = EvaluatorConfig.from_cli(args)
    except (ValueError, TypeError, OSError) as error:  # lm-eval's own checks, also of a --config file
        raise UserError(str(error)) from error
    told = json.dumps(dataclasses.asdict(config) | {"output_path": None}, ensure_ascii=False, default=str)
    if (at := half_surrogate(told)) is not None:  # lm-eval could not write its results
        raise UserError(f"arguments must be UTF-8, got {told[max(0, at - 40) : at + 20]!r}")
    config.model = AUTOREGRESSIVE.get(config.model, config.model)
    config.gen_kwargs = with_one_length(config.gen_kwargs)
    refuse_caches(config)
    check_limit(config.limit)
    if not repeats:
        repeats, config.samples = read_repeats(config.samples)  # of a --config file
    config.samples = repeats or config.samples
    return config


def check_limit(limit: float | None) -> None:
    """Refuse a `--limit` that is none.

    Raises:
        UserError: it is not in (0, 1e15].
    """
    if limit is not None and not 0 < limit <= 1e15:
        raise UserError(f"--limit must be above 0 (documents, or below 1 a share of them), got {str(limit)[:20]}")


def with_one_length(settings: Mapping[str, Any] | None) -> dict[str, Any]:
    """`--gen_kwargs` with the length of answers by the name that goes before the one of any task.

    Raises:
        UserError: two names of it have different values.
    """
    settings = settings or {}
    given = {name: settings[name] for name in LENGTHS if name in settings}
    if len(set(map(str, given.values()))) > 1:
        raise UserError(
            f"--gen_kwargs: {' and '.join(given)} are the same setting, got {', '.join(map(str, given.values()))}"
        )
    others = {name: value for name, value in settings.items() if name not in given}
    return others | ({LENGTHS[0]: next(iter(given.values()))} if given else {})


def load_model(config: EvaluatorConfig) -> LM:
    """The model of a command, loaded.

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


def evaluate(
    config: EvaluatorConfig,
    tasks: tuple[TaskManager, list[str], dict[str, Any]],
    model: LM,
    journal: Journal,
    resume: bool,
) -> None:
    """Run the tasks of a command on its model.

    Args:
        config: the command.
        tasks: what `check_tasks` gave.
        model: its model.
        journal: of the run's folder, or of a temporary one where the command has no `--output_path`.
        resume: whether to go on with what is in the journal.

    Raises:
        UserError: the run cannot be gone on with.
        SystemExit: tasks failed; the message names them, and the others are scored.
    """
    manager, names, versions = tasks
    if isinstance(config.samples, int) and config.samples > 1:
        refuse_greedy(model, manager, names, config.gen_kwargs)
    keep_answers(model)
    facts = facts_of(model, config, journal.folder if config.output_path else None)
    if resume and facts["identity"]["weights"] is None:
        raise UserError(f"--resume is for coda and hf: the weights of {config.model!r} are not known by their hash")
    command = {"arguments": dataclasses.asdict(config) | dict.fromkeys(_HOSTS, {}), "tasks": names}
    command |= {"data": os.environ.get(DATA_VARIABLE), "versions": versions, "code": code_version()}
    said = json.loads(json.dumps({**command, **facts}, default=str))
    name = session.agreed(resumed_name(journal.folder, said) if resume and speaks() else uuid.uuid4().hex)
    if config.output_path and speaks():
        write_whole(journal.folder / COMMAND, json.dumps({"name": name, **said}, indent=1) + "\n")
    with Overlap() as overlap:
        state = session.Session(
            journal=journal,
            name=name,
            model=facts["identity"],
            versions=versions,
            code=code_version(),
            judge=overlap.judge,
        )
        with session.opened(state):
            if resume:
                logger.info("%d answers are in %s", journal.found, journal.folder)
            run_tasks(config, manager, names, model, facts)
            if resume:
                unused = journal.found - journal.used
                logger.info("%d of these answers were used by this process and %d not", journal.used, unused)


def resumed_name(folder: Path, said: dict[str, Any]) -> str:
    """The name that the last command in a folder has, if it asked for the same answers; else a new one.

    What a resumption that was killed has not come to is then still there to be judged.
    """
    try:
        last = read_json(folder / COMMAND)
    except (OSError, UserError):  # it is written anew
        last = {}

    def asked(command: dict[str, Any]) -> Any:
        arguments = {k: v for k, v in command["arguments"].items() if k not in ("batch_size", "max_batch_size")}
        return [command.get(fact) for fact in _ASKED], arguments

    is_same = isinstance(last.get("arguments"), dict) and asked(last) == asked(said)
    return str(last["name"]) if is_same and "name" in last else uuid.uuid4().hex


def run_tasks(
    config: EvaluatorConfig, manager: TaskManager, names: Sequence[str], model: LM, facts: Mapping[str, Any]
) -> None:
    """Run the tasks one by one in the present session.

    Raises:
        SystemExit: tasks failed; the message names them, and the others are scored.
    """
    failed: dict[str, str] = {}
    for name in names:
        try:
            run_task(config, manager, name, model, facts)
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
        journal = session.current().journal
        kept = f"; {journal.made} answers are kept in {journal.path}" if journal.made else ""
        raise SystemExit(f"coda_eval: error: {len(failed)} of {len(names)} tasks failed: {account}{kept}")


def facts_of(model: LM, config: EvaluatorConfig, folder: Path | None) -> dict[str, Any]:
    """What is known of a model: its `identity`, on which answers depend, and what else a score card says of it.

    Args:
        model: the loaded model.
        config: the command.
        folder: of the run; without one nothing is cited, and the weights are not hashed.
    """
    import torch

    from coda_eval.hosted import HostedLM

    given = dict(config.model_args)
    if not isinstance(model, HostedLM):
        identity = {"class": config.model, "arguments": given, "weights": None, "tokenizer": None}
        return {"identity": identity, "info": {}, "chat_template": "", "world_size": model.world_size}
    covered = {setting.name for setting in offered("evaluation")} | _COVERED
    identity = {
        "class": type(model).__name__,
        "weights": hash_weights(given, folder) if folder is not None else None,
        "tokenizer": hash_tokenizer(model.tokenizer),
        "dtype": str(model.model.dtype),
        "device": model.device.type,
        "arguments": {name: value for name, value in given.items() if name not in covered},
    }
    is_gpu = model.device.type == "cuda"
    return {
        "identity": identity,
        "generation_config": digest(model.model.generation_config.to_dict()),
        "info": model.get_model_info(),
        "chat_template": model.chat_template(config.apply_chat_template) if config.apply_chat_template else "",
        "device": torch.cuda.get_device_name(model.device) if is_gpu else model.device.type,
        "world_size": model.world_size,
    }


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


def claim_folder(output_path: str | None, resume: bool = False, *, model: str = "") -> Path | None:
    """The `--output_path`: its folder is made, and holds no results yet, unless a run there is gone on with.

    Args:
        output_path: as given.
        resume: whether a run there is gone on with.
        model: the command's, of which it depends whether it could be.

    Raises:
        UserError: it holds results or answers of an earlier run, or nothing can be written there.
    """
    if not output_path:
        if resume:
            raise UserError("--resume needs --output_path: the folder of the run to go on with")
        return None
    output = Path(output_path)
    folder = _folder_of(output)
    mend = "give another folder, or remove them"
    if model in OURS or model in AUTOREGRESSIVE:  # of others no weights are known, and `import` has no --resume
        mend = "give another folder, remove them, or go on with that run by --resume"
    # The first process looks for all: its answers may already be there.
    if speaks() and not resume and (found := [*results_in(output), *sorted(folder.glob(FILES))]):
        raise UserError(
            f"--output_path {output_path!r} holds results of an earlier run ({found[0]}), which could not be told from "
            f"the new ones: {mend}"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if speaks():
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"nothing can be written to --output_path {output_path!r}: {error}") from error
    return output


def check_tasks(config: EvaluatorConfig) -> tuple[TaskManager, list[str], dict[str, Any]]:
    """Load every task with its problems, which also tries the sandbox that answers will run in.

    Returns:
        lm-eval's index of tasks, the tasks and groups to run by name or file, and the versions of the tasks.

    Raises:
        UserError: there is none, or one is unknown or cannot be run; every such task is named with its reason.
    """
    tasks = [config.tasks] if isinstance(config.tasks, str) else config.tasks
    given = [name for task in tasks for name in task.split(",") if name]
    # lm-eval's own thousands of files take seconds to index: they are looked at only where a task is not ours.
    manager = TaskManager(include_path=config.include_path, include_defaults=False, metadata=config.metadata)
    if others := [name for name in given if name not in manager.all_tasks]:
        refuse_unknown_tasks(others, manager.all_tasks)
        try:
            manager = config.process_tasks(config.metadata)
        except ValueError as error:
            raise UserError(f"--tasks: {error} (`ls tasks` lists them)") from error
    if isinstance(config.samples, int):
        set_repeats(manager, config.samples)
    names = dict.fromkeys(name for task in given for name in (manager.match_tasks([task]) or _files(task)))
    if not names:
        raise UserError("--tasks names no task, so that nothing would be run (`ls tasks` lists them)")
    try:
        fills_gaps = config.model in OURS or getattr(get_model(config.model), "fills_gaps", False)
    except ValueError as error:
        known = model_registry.keys()
        raise UserError(f"unknown model {config.model!r}{did_you_mean(config.model, known)}") from error
    reasons, versions = {}, {}
    for name in names:
        try:
            loaded = manager.load([name])["tasks"].values()
            versions |= {task.task_name: task.VERSION for task in loaded}
        except (ValueError, OSError, ImportError) as error:  # its files, its data set on the Hub, or what it needs
            reasons[name] = str(error)
            continue
        if not fills_gaps and any(map(_has_gaps, loaded)):
            reasons[name] = f"the model {config.model!r} would see the text before a gap only; coda and hf fill gaps"
    if reasons:
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UserError(f"{len(reasons)} of {len(names)} tasks cannot be run: {told}")
    return manager, list(names), versions


def refuse_unknown_tasks(names: Sequence[str], ours: Iterable[str]) -> None:
    """Refuse names of tasks that no task file of lm-eval holds: its index, which would say so, takes ten seconds.

    Args:
        names: of tasks; patterns, files and folders among them are left alone.
        ours: the names that one may have meant.

    Raises:
        UserError: one is in no file.
    """
    plain = [name for name in names if re.fullmatch(r"\w[\w-]*", name) and not os.path.exists(name)]
    left = {name: re.compile(rb"(?<![\w-])" + re.escape(name.encode()) + rb"(?![\w-])") for name in plain}
    for folder, _, files in os.walk(Path(lm_eval.tasks.__file__).parent):
        for file in files:
            if left and not file.endswith(".py"):
                text = Path(folder, file).read_bytes()
                left = {name: pattern for name, pattern in left.items() if not pattern.search(text)}
    if left:
        told = ", ".join(f"{name!r}{did_you_mean(name, ours)}" for name in left)
        raise UserError(f"--tasks: unknown {'task' if len(left) == 1 else 'tasks'} {told} (`ls tasks` lists them)")


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
    from coda_eval.hosted import HostedLM

    for name, task in manager.load(names)["tasks"].items():
        settings = {**(task.config.generation_kwargs or {}), **(gen_kwargs or {})}
        if not getattr(model, "draws", HostedLM.draws)(settings):
            raise UserError(
                f"--samples with temperature 0 would give {name} the same answer each time: set a temperature, for "
                "coda in --model_args (temperature=0.8), for others in --gen_kwargs (do_sample=True,temperature=0.8)"
            )


def keep_answers(model: LM) -> None:
    """Have the answers of a model of lm-eval's written when it has made them; ours write their own, batch by batch."""
    from coda_eval.hosted import HostedLM, known  # and torch, which the model has brought

    if isinstance(model, HostedLM):
        return

    def keeping(compute: Callable[..., list[Any]], told: Callable[[Any], dict[str, Any]]) -> Callable[..., list[Any]]:
        def computed(requests: list[Instance], *args: Any, **kwargs: Any) -> list[Any]:
            answers = compute(requests, *args, **kwargs)
            repeats: Counter[int] = Counter()
            kept = []
            for request, answer in zip(requests, answers, strict=True):
                kept.append((session.Asked(request=request, repeat=repeats[id(request)]), told(answer)))
                repeats[id(request)] += 1
            session.keep(kept)
            return answers

        return computed

    model.generate_until = keeping(model.generate_until, known)
    model.loglikelihood = keeping(model.loglikelihood, known_likelihood)
    model.loglikelihood_rolling = keeping(model.loglikelihood_rolling, known_likelihood)


def run_task(config: EvaluatorConfig, manager: TaskManager, name: str, model: LM, facts: Mapping[str, Any]) -> None:
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
        samples=None if isinstance(config.samples, int) else config.samples,
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
        records = {task: list(records_of(task, of_task)) for task, of_task in samples.items()}
        write_records(folder, list(chain.from_iterable(records.values())))
        for task, of_task in records.items():
            if cut := num_cut(of_task):
                said = (
                    "%s: %d of %d answers are as long as they could be, and may have been cut; more tokens let them end"
                )
                logger.warning(said, task, cut, len(of_task))
        results["coda_eval"] = card_facts(results, samples, facts)
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


def rank() -> int:
    """Which of the processes this is."""
    return int(os.environ.get("RANK", "0"))


def speaks() -> bool:
    """Whether this process writes the results."""
    return rank() == 0


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


def card_facts(
    results: Mapping[str, Any], samples: Mapping[str, list[dict[str, Any]]], facts: Mapping[str, Any]
) -> dict[str, Any]:
    """What a results file says besides lm-eval's own facts, for the score cards."""
    state = session.current()
    taken = state.journal.taken.get(state.name, ())
    ran = [m[key] for m in results["results"].values() for key in m if key.startswith("isolation,")]
    levels = {level for levels in ran for level in levels.split("+")}
    of_tasks = {}
    for task, of_task in samples.items():
        errors = [e for r in records_of(task, of_task) for _, e in r.likelihoods or ()]
        of_tasks[task] = {
            "settings": state.settings.get(task),
            "data": digest([_whole(s["doc"]) for s in sorted(of_task, key=lambda s: s["doc_id"])]),
            "bootstrap95": _bootstraps(results["results"][task], of_task),
            "likelihood_stderr": _error_of(errors) if errors else None,
        }
    return {
        **{name: facts["identity"].get(name) for name in ("weights", "tokenizer", "dtype")},
        **{name: facts.get(name) for name in ("device", "world_size")},
        "code": sorted({line["code"] for key, line in state.journal.answers.items() if key in taken}) or [state.code],
        "selfcheck": _selfcheck(levels),
        "tasks": of_tasks,
    }


def _whole(document: Any) -> Any:
    """A document with its tests, where they are kept apart."""
    is_ours = isinstance(document, dict) and document.get("benchmark") in PROGRAMS
    return [{k: v for k, v in document.items() if k != "data_dir"}, problem(document)] if is_ours else document


def _bootstraps(metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """Bootstrap intervals of those scores of a task that are means over its documents."""
    found = {}
    for key, score in metrics.items():
        name, _, stage = key.partition(",")
        values = [s[name] for s in samples if s["filter"] == stage and isinstance(s.get(name), numbers.Real)]
        if isinstance(score, numbers.Real) and values and math.isclose(sum(values) / len(values), score):
            found[key] = [round(bound, 6) for bound in bootstrap_interval(values)]
    return found


def _error_of(errors: Sequence[float | None]) -> dict[str, Any]:
    """Mean and largest of the known standard errors of likelihoods, in nats, and how many are not known."""
    known_ones = [error for error in errors if error is not None]
    mean, largest = (sum(known_ones) / len(known_ones), max(known_ones)) if known_ones else (None, None)
    return {"mean": mean, "largest": largest, "unknown": len(errors) - len(known_ones)}


def _selfcheck(levels: Iterable[str]) -> Any:
    """What the self-check said last of the isolation levels that ran; None where it has not run."""
    if importlib.util.find_spec("coda_eval.selfcheck") is None:
        return None
    last_result = importlib.import_module("coda_eval.selfcheck").last_result
    return {level: last_result(level.split()[0]) for level in sorted(levels)} or None


def records_of(task: str, samples: Iterable[dict[str, Any]]) -> list[Record]:
    """The records of a task from lm-eval's samples; of several filters the first one counts."""
    samples = list(samples)
    of_first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    return [r for sample in sorted(of_first, key=lambda s: s["doc_id"]) for r in _records_of_document(task, sample)]


def _records_of_document(task: str, sample: dict[str, Any]) -> Iterable[Record]:
    document = sample["doc"] if isinstance(sample["doc"], dict) else {}
    prompt = str(sample["arguments"][0][0])
    own = document.get("task_id")
    task_id = own if isinstance(own, str | int) else sample["doc_id"]
    where = {"task": task, "task_id": task_id, "doc_id": sample["doc_id"]}
    nothing = {field.name: None for field in dataclasses.fields(Record)}
    score = next((sample[name] for name in sample["metrics"] if isinstance(sample[name], numbers.Real)), None)
    score = None if score is None else float(score)
    if not isinstance(sample["resps"][0][0], str):  # likelihoods: a request for each choice
        values = [sample["resps"][choice][0] for choice in range(len(sample["resps"]))]
        known_ones = [known_likelihood(value) for value in values]
        likelihoods = [[value["nats"], value["stderr"]] for value in known_ones]
        facts = {"prompt": prompt, "repeat": 0, "score": score, "likelihoods": likelihoods}
        yield Record(**nothing | where | facts)
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
        facts["finish_reason"] = getattr(answer, "finish_reason", None)
        yield Record(**facts | where)
