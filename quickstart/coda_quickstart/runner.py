"""Runs stages one after another: skips what is done and still valid, shows progress, remembers times.

A stage is done when its stamp holds the hash of the present commands and input files, and its output files are those
that it wrote. Not here: what the stages are (stages.py).
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from CoDALanguageModel.errors import UserError
from CoDALanguageModel.run_files import claimed, write_whole

PROGRESS_WIDTH = 100
POLL_S = 0.5
CLEARED_LINE = "\r\033[K"
LOG_PREFIX = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ [\w.]+: ")
"""Of a line of a room's log; half of a terminal's width."""


class StageFailed(RuntimeError):
    """A command of a stage ended with an error; the message names its log."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Commands that turn input files into output files."""

    name: str
    title: str
    commands: tuple[tuple[str, ...], ...]
    inputs: tuple[Path, ...]
    """Files whose content decides, with the commands, whether the stage must run again."""
    outputs: tuple[Path, ...]
    """Files that the stage leaves behind and later stages read."""
    replaces: tuple[Path, ...] = ()
    """Folders and files to remove before the stage runs."""
    environment: Mapping[str, str] = field(default_factory=dict)

    def key(self) -> str:
        """Hash of the commands, the environment and the content of the inputs."""
        description = [self.commands, sorted(self.environment.items()), [file_hash(path) for path in self.inputs]]
        return hashlib.sha256(json.dumps(description).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Runner:
    """Runs stages in one run folder.

    Args:
        run_dir: where stamps/ and logs/ go.
        repository: working directory of the commands.
        show: writes one line for the user; prints by default.
        progress_every_s: seconds between progress lines where there is no terminal.
    """

    def __init__(self, run_dir: Path, repository: Path, *, show=print, progress_every_s: float = 15.0) -> None:
        self.run_dir = run_dir
        self.repository = repository
        self.show = show
        self.progress_every_s = 1.0 if sys.stdout.isatty() else progress_every_s

    def is_done(self, stage: Stage) -> bool:
        """Whether the stage ran with the same commands and inputs, and its outputs are still what it wrote."""
        stamp = self._read_stamp(stage)
        if not stamp or not all(path.is_file() for path in stage.inputs) or stamp["key"] != stage.key():
            return False
        return all(path.is_file() and stamp["outputs"].get(str(path)) == file_hash(path) for path in stage.outputs)

    def run(self, stages: Sequence[Stage], after: Mapping[str, Callable[[], None]] | None = None) -> dict[str, float]:
        """Run what is not done; seconds of each stage, remembered ones included.

        Args:
            stages: in their order.
            after: what else is to be done after a stage, by its name, also if that had been done already.

        Raises:
            StageFailed: a command failed, or an output is missing after the stage.
            UserError: another run has the folder.
        """
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with claimed(self.run_dir) as self._claim:
            return self._run(stages, after)

    def _run(self, stages: Sequence[Stage], after: Mapping[str, Callable[[], None]] | None) -> dict[str, float]:
        seconds = {}
        for number, stage in enumerate(stages, 1):
            label = f"[{number}/{len(stages)}] {stage.title}"
            if self.is_done(stage):
                seconds[stage.name] = self._read_stamp(stage)["seconds"]
                self.show(f"{label}: already done ({seconds[stage.name]:.0f} s then)")
            else:
                self.show(label)
                seconds[stage.name] = self._run_stage(stage)
                self.show(f"{label}: {seconds[stage.name]:.0f} s")
            if after and stage.name in after:
                after[stage.name]()
        return seconds

    def _run_stage(self, stage: Stage) -> float:
        stamp_path = self._stamp_path(stage)
        stamp_path.unlink(missing_ok=True)
        for path in stage.replaces:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        log_path = self.run_dir / "logs" / f"{stage.name}.log"
        log_path.parent.mkdir(parents=True, exist_ok=True)
        key = stage.key()
        started = time.monotonic()
        with log_path.open("w", encoding="utf-8") as log:
            for command in stage.commands:
                log.write(f"$ {' '.join(command)}\n")
                log.flush()
                self._run_command(command, stage, log, log_path, started)
        missing = [str(path) for path in stage.outputs if not path.is_file()]
        if missing:
            raise StageFailed(f"{stage.title}: finished without writing {', '.join(missing)}; see {log_path}")
        seconds = time.monotonic() - started
        stamp = {"key": key, "seconds": seconds, "outputs": {str(path): file_hash(path) for path in stage.outputs}}
        stamp_path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(stamp_path, json.dumps(stamp, indent=2) + "\n")
        return seconds

    def _run_command(self, command: Sequence[str], stage: Stage, log, log_path: Path, started: float) -> None:
        process = subprocess.Popen(
            command,
            cwd=self.repository,
            env={**os.environ, **stage.environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(self._claim,),
        )
        shown = time.monotonic()
        try:
            while process.returncode is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
                if process.returncode is None and time.monotonic() - shown >= self.progress_every_s:
                    shown = time.monotonic()
                    self._show_progress(shown - started, log_path)
        except BaseException:  # also the user's Ctrl-C: no command outlives its stage
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()
            raise
        finally:
            if sys.stdout.isatty():
                sys.stdout.write(CLEARED_LINE)
                sys.stdout.flush()
        if process.returncode:
            tail = "\n".join(log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-25:])
            raise StageFailed(f"{tail}\n{stage.title}: exit status {process.returncode}; see {log_path}")

    def _show_progress(self, elapsed_s: float, log_path: Path) -> None:
        line = f"  {elapsed_s:4.0f} s  {last_line(log_path)}"[:PROGRESS_WIDTH]
        if sys.stdout.isatty():  # a line that wraps could not be taken back
            sys.stdout.write(f"{CLEARED_LINE}{line[: shutil.get_terminal_size().columns - 1]}\r")
            sys.stdout.flush()
        else:
            self.show(line)

    def _stamp_path(self, stage: Stage) -> Path:
        return self.run_dir / "stamps" / f"{stage.name}.json"

    def _read_stamp(self, stage: Stage) -> dict | None:
        path = self._stamp_path(stage)
        return json.loads(path.read_text()) if path.is_file() else None


def last_line(path: Path, num_bytes: int = 4000) -> str:
    """The last line of a log that holds text, without time and place; a progress bar's returns count as line ends."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - num_bytes))
        text = file.read().decode("utf-8", errors="replace")
    lines = [LOG_PREFIX.sub("", line.strip(), count=1) for line in text.replace("\r", "\n").split("\n")]
    return next((line for line in reversed(lines) if line), "")


def start_over(run_dir: Path) -> None:
    """Remove a run folder.

    Raises:
        UserError: the folder holds other things than a run of ours, which are not to be deleted.
    """
    if not run_dir.exists():
        return
    if any(run_dir.iterdir()) and not (run_dir / "logs").is_dir():
        raise UserError(f"--fresh would delete {run_dir}, which is no quickstart run (it has no logs folder)")
    with claimed(run_dir):
        shutil.rmtree(run_dir)
