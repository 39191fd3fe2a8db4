"""`python -m coda_quickstart`: the whole loop, or one of the steps that the loop runs as separate processes."""

import argparse
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from coda_quickstart.runner import StageFailed
from CoDALanguageModel.errors import INTERRUPTED, UserError

REPOSITORY = Path(__file__).resolve().parents[2]

LARGEST_SEED = 2**32 - 1
"""That every room takes."""


def build_parser() -> argparse.ArgumentParser:
    """The command line: `run` is the loop, the others are its steps."""
    parser = argparse.ArgumentParser(prog="python -m coda_quickstart", description="The small CoDA loop on two cores.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="all stages; those that are done and valid are skipped")
    run.add_argument(
        "--run_dir",
        type=Path,
        default=REPOSITORY / "runs" / "quickstart",
        help="default: runs/quickstart in this repository",
    )
    run.add_argument("--config_dir", type=Path, help="settings of the stages (default: quickstart/configs)")
    run.add_argument("--fresh", action="store_true", help="remove the run folder and start over")
    run.add_argument("--serve", action="store_true", help="leave the server running at the end")
    run.add_argument(
        "--demo", action="store_true", help="show a chat and an infilling as soon as fine-tuning has ended"
    )
    run.add_argument("--compare", action="store_true", help="also train and score a model that attends by blocks")
    run.add_argument(
        "--seeds",
        type=_seeds,
        default=(),
        metavar="0,1,2",
        help="also train and score with these seeds, on the same data",
    )
    data = commands.add_parser("data", help="corpus, tokenizer, instruction set and held-out problems")
    data.add_argument("--config", type=Path, required=True)
    data.add_argument("--output_dir", type=Path, required=True)
    data.add_argument("--corpus_dir", type=Path, help="folder of Python files (default: the standard library)")
    denoise = commands.add_parser("denoise", help="record one answer step by step")
    denoise.add_argument("--run_dir", type=Path, required=True)
    denoise.add_argument("--config", type=Path, required=True)
    first = commands.add_parser("first", help="fill one gap by the mid-trained model, step by step")
    first.add_argument("--run_dir", type=Path, required=True)
    first.add_argument("--config", type=Path, required=True)
    settings = commands.add_parser("settings", help="write the decoding settings into a model's folder")
    settings.add_argument("--folder", type=Path, required=True)
    settings.add_argument("--config", type=Path, required=True)
    chat = commands.add_parser("chat", help="start the server, ask twice, stop it")
    chat.add_argument("--run_dir", type=Path, required=True)
    report = commands.add_parser("report", help="write report.html, report.md and summary.json")
    report.add_argument("--run_dir", type=Path, required=True)
    for command in commands.choices.values():
        command.set_defaults(refuse=command.error)  # shows its own options
    return parser


def _seeds(text: str) -> tuple[int, ...]:
    words = text.split(",")
    seeds = [int(word) for word in words if word.isdecimal() and int(word) <= LARGEST_SEED]
    if len(set(seeds)) < len(words):
        allowed = f"different whole numbers in [0, {LARGEST_SEED}]"
        raise argparse.ArgumentTypeError(f"must be {allowed}, such as 0,1,2, got {text!r}")
    return tuple(seeds)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 1 when a stage failed, 2 when the input is at fault."""
    arguments, unknown = build_parser().parse_known_args(argv)
    if unknown:
        arguments.refuse(f"unrecognized arguments: {' '.join(unknown)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # As an exception, so that the processes of a command that starts any end with it. Others end at once, also where no
    # exception comes to them: the tokenizer's training hears none for its 15 seconds.
    numbers = (signal.SIGTERM, signal.SIGHUP) if arguments.command in ("run", "chat") else ()
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _end)
    try:
        does = {"run": _run, "data": _data, "first": _first, "settings": _settings, "denoise": _denoise}
        does |= {"chat": _chat, "report": _report}
        return does[arguments.command](arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StageFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run again to go on with the stage that was running", file=sys.stderr)
        return INTERRUPTED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(signal_number: int, frame: object) -> None:
    raise SystemExit(128 + signal_number)


def _run(arguments: argparse.Namespace) -> int:
    from coda_quickstart.runner import Runner, start_over
    from coda_quickstart.stages import build_stages, read_settings

    started = time.monotonic()
    run_dir = arguments.run_dir.resolve()
    try:
        if arguments.fresh:
            start_over(run_dir)
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--run_dir {run_dir} cannot be used: {error}") from error
    configs = (arguments.config_dir or REPOSITORY / "quickstart" / "configs").resolve()
    # Room processes are single and share no cores; the tokenizers' own threads would fight with the workers.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    own = read_settings(configs / "sft.yaml").get("seed")
    stages = build_stages(
        REPOSITORY,
        run_dir,
        configs,
        read_settings(configs / "eval.yaml", "generation", "batch_size", "block_size", "threshold"),
        compare=arguments.compare,
        seeds=[seed for seed in arguments.seeds if seed != own],
    )
    after = {"first": partial(_show_first, run_dir, started)}
    if arguments.demo:
        after["sft"] = partial(_demonstrate, run_dir)
    seconds = Runner(run_dir, REPOSITORY, show=_show).run(stages, after=after)
    (run_dir / "times.json").write_text(json.dumps(seconds, indent=2) + "\n")
    for answer in json.loads((run_dir / "answers.json").read_text()):
        _show(f"\n{answer['kind']} request:\n{answer['question'].rstrip()}\nanswer:\n{answer['answer'].rstrip()}")
    from coda_quickstart.report import write_report  # it takes seconds, for which no stage is to wait

    _show(f"\n{write_report(run_dir)}")
    _show(f"report: {run_dir / 'report.html'}")
    _show(f"this call: {time.monotonic() - started:.0f} s; all stages together: {sum(seconds.values()):.0f} s")
    if arguments.serve:
        _leave_serving(run_dir)
    return 0


def _show_first(run_dir: Path, started: float) -> None:
    first = json.loads((run_dir / "first_answer.json").read_text())
    _show(f"\nfirst answer, after {time.monotonic() - started:.0f} s: a gap in a function that was never trained on.")
    _show("It is the mid-trained model's, which is often wrong; at the end the server asks\nthe fine-tuned one.\n")
    _show(f"{first['prefix']}[...]{first['suffix']}\n{first['canvas']}\n")
    verdict = "right" if first["answer"] == first["middle"] else "another text"
    _show(f"filled: {first['answer']}   was: {first['middle']}   ({verdict})\n")


def _demonstrate(run_dir: Path) -> None:
    from coda_quickstart.chat import demonstrate

    demonstrate(REPOSITORY, run_dir, _show)


def _leave_serving(run_dir: Path) -> None:
    from coda_quickstart.chat import MODEL_NAME, QUESTION, free_port, start_server

    port = free_port()
    server = start_server(REPOSITORY, run_dir / "model", port, run_dir / "logs" / "server.log")
    address = f"http://127.0.0.1:{port}"
    _show(f"server: {address}/v1 (model {MODEL_NAME}), process {server.pid}; stop it: kill {server.pid}")
    _show(f"page: {address}/")
    client = (sys.executable, str(REPOSITORY / "serving" / "fast-api" / "chat_cli.py"), "--base-url", address)
    _show(f"chat: {shlex.join(client)}")
    _show(f"ask it in the words of its instruction set, each time in a new chat (/reset), such as:\n{QUESTION}")


def _data(arguments: argparse.Namespace) -> int:
    from coda_quickstart.prepare import load_settings, prepare

    summary = prepare(load_settings(arguments.config), arguments.output_dir, arguments.corpus_dir)
    _show(json.dumps(summary))
    return 0


def _first(arguments: argparse.Namespace) -> int:
    from coda_quickstart.denoise import record_infilling
    from coda_quickstart.pictures import denoising_text
    from coda_quickstart.stages import read_settings

    record = record_infilling(arguments.run_dir, read_settings(arguments.config, "generation")["generation"])
    record["canvas"] = denoising_text(record["steps"])
    (arguments.run_dir / "first_answer.json").write_text(json.dumps(record) + "\n")
    return 0


def _settings(arguments: argparse.Namespace) -> int:
    """Give a folder the settings that its model was made for, so that whoever loads or serves it gets them."""
    from coda_quickstart.stages import read_settings
    from CoDALanguageModel.decoding_settings import refuse_unknown
    from CoDALanguageModel.run_files import read_json, write_whole

    generation = dict(read_settings(arguments.config, "generation")["generation"])
    refuse_unknown(generation, "folder")
    generation.pop("steps", None)  # the folder's own are one for each token of any length
    config = read_json(arguments.folder / "config.json")
    if config["attention"] == "full":  # the whole canvas at once, as in evaluation: where nothing is said, a server
        generation.setdefault("block_length", config["max_position_embeddings"])  # takes blocks of its own
    file = arguments.folder / "generation_config.json"
    write_whole(file, json.dumps({**read_json(file), **generation}, indent=2, sort_keys=True) + "\n")
    return 0


def _denoise(arguments: argparse.Namespace) -> int:
    from coda_quickstart.denoise import record_denoising
    from coda_quickstart.stages import read_settings

    record = record_denoising(arguments.run_dir, read_settings(arguments.config, "generation")["generation"])
    (arguments.run_dir / "denoise.json").write_text(json.dumps(record) + "\n")
    return 0


def _chat(arguments: argparse.Namespace) -> int:
    from coda_quickstart.chat import ask, running_server

    run_dir = arguments.run_dir
    with running_server(REPOSITORY, run_dir / "model", run_dir / "logs" / "server.log") as base_url:
        answers = ask(base_url, run_dir)
    (run_dir / "answers.json").write_text(json.dumps(answers, indent=2) + "\n")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from coda_quickstart.report import write_report

    _show(write_report(arguments.run_dir.resolve()))
    return 0


def _show(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
