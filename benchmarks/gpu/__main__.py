"""Deals the time among the sections, runs each in a process of its own, and writes the report as it grows."""

import argparse
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from CoDALanguageModel.errors import UserError
from gpu.report import Report

HERE = Path(__file__).resolve().parent
SECTIONS = {
    "kernels": ("gpu.kernels:kernels", 16),
    "invariance": ("gpu.invariance:invariance", 13),
    "decoding": ("gpu.decoding:decoding", 20),
    "blocks": ("gpu.decoding:blocks", 11),
    "sft_step": ("gpu.training:sft_step", 8),
    "pretrain_step": ("gpu.training:pretrain_step", 20),
    "adaptation": ("gpu.adaptation:adaptation", 20),
}
"""Function, and share of the time, of each section; the most valuable come first. What one leaves, the later share."""

STOPS_BEFORE = 3.0
"""Seconds before it is killed at which a section stops by itself, if it looks."""


READY = "@ready"
"""A section's process has loaded its modules."""

LONGEST_START = 60.0
"""Seconds in which it must."""


class Worker:
    """A section's process. It loads its modules while the section before it works, and starts when it is told to."""

    def __init__(self, name: str, command: list[str], report: Report) -> None:
        """Start the process.

        Args:
            name: of the section.
            command: says `READY`, reads the time at which it must end, of `time.monotonic`, and writes log and
                measurements.
            report: takes them.
        """
        self.name = name
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            process_group=0,  # what it starts is ended with it
        )
        self.report, self.ready = report, threading.Event()
        self.tail: deque[str] = deque(maxlen=40)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def run(self, seconds: float) -> None:
        """Let it work, and take what it measures; it is killed when its time is up."""
        start = time.monotonic()
        try:
            self.process.stdin.write(f"{start + seconds}\n")
            self.process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended already; its status tells
        try:
            status = self.process.wait(timeout=seconds)
            outcome = "done" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            outcome = f"killed after {seconds:.0f} s"
        self.kill()
        self._reader.join(timeout=10)
        failed = outcome != "done"
        self.report.finish(self.name, outcome, time.monotonic() - start, list(self.tail) if failed else [])

    def _read(self) -> None:
        for line in self.process.stdout:
            line = line.rstrip("\n")
            if line == READY:
                self.ready.set()
            elif not self.report.take(self.name, line):
                self.tail.append(line)
        self.ready.set()

    def kill(self) -> None:
        """End it and what it started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()


def command_of(name: str, options: argparse.Namespace) -> list[str]:
    """What runs a section."""
    command = [sys.executable, "-m", "gpu", "--worker", name]
    command += ["--tiny"] if options.tiny else []
    return command + (["--weights", str(options.weights)] if options.weights else [])


def run_all(commands: dict[str, list[str]], seconds: float, report: Report) -> None:
    """Run the sections one after another, each with its share of the time that is left."""
    end, names = time.monotonic() + seconds, list(commands)
    workers = [Worker(names[0], commands[names[0]], report)]

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        for place, name in enumerate(names):
            worker = workers[-1]
            if place + 1 < len(names):
                workers.append(Worker(names[place + 1], commands[names[place + 1]], report))
            worker.ready.wait(LONGEST_START)
            shares = [SECTIONS[later][1] for later in names[place:]]
            limit = max((end - time.monotonic()) * shares[0] / sum(shares), 1.0)
            report.start(name, limit)
            worker.run(limit)
    finally:
        for worker in workers:
            worker.kill()
        signal.signal(signal.SIGTERM, before)


def when_told(work: Callable[[float], None]) -> None:
    """The side of a `Worker`'s process: it is ready, gets its time and ends with its work, whatever that raised.

    Args:
        work: is given the time of `time.monotonic` at which it is to stop by itself.
    """
    print(READY, flush=True)
    line = sys.stdin.readline()
    if not line:
        return  # the parent has gone
    status = 1
    try:
        work(float(line) - STOPS_BEFORE)
        status = 0
    except UserError as error:
        print(f"error: {error}")
    except Exception:
        traceback.print_exc()  # the status alone would not say what
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # compilers and readers keep threads that may not end by themselves


def work(name: str, options: argparse.Namespace) -> None:
    """Run a section in this process until the time of `time.monotonic` that stands on the standard input."""
    module, _, function = SECTIONS[name][0].partition(":")
    run = getattr(importlib.import_module(module), function)
    import torch

    from gpu.section import Section, emit, environment

    def measure(deadline: float) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(1)
            torch.compiler.set_stance("force_eager")  # compiled code for a CPU is not what is asked about
        emit({"environment": environment(device)})
        with tempfile.TemporaryDirectory() as folder:
            run(Section(device, options.tiny, options.weights, deadline, Path(folder)))

    gc.collect()
    gc.freeze()  # or each look for garbage goes through all modules: 0.3 s, twice a measurement
    when_told(measure)


def main() -> int:
    """Run the sections; the status is 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("--seconds", type=float, default=540.0, help="for all sections together")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="comma-separated")
    parser.add_argument("--output", type=Path, default=HERE.parent / "gpu_results")
    parser.add_argument("--weights", type=Path, help="folder of SmolLM2-135M")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, as a dry run")
    parser.add_argument("--worker", choices=list(SECTIONS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, options)
        return 0
    names = options.sections.split(",")
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"--sections must be some of {','.join(SECTIONS)}, got {','.join(unknown)}")
    if options.weights and not (options.weights / "config.json").is_file():
        parser.error(f"--weights must be a folder with a config.json, got {options.weights}")
    try:
        report = Report(options.output, {name: str(value) for name, value in vars(options).items()})
    except OSError as error:
        parser.error(f"--output must be a folder that can be written, got {options.output}: {error}")
    run_all({name: command_of(name, options) for name in names}, options.seconds, report)
    print(json.dumps({name: section["outcome"] for name, section in report.sections.items()}))
    return int(any(section["outcome"] != "done" for section in report.sections.values()))


if __name__ == "__main__":
    sys.exit(main())
