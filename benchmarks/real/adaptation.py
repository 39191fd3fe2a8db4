"""Some minutes of adaptation to diffusion, on a GPU: what `benchmarks/gpu.sh` does in its section of that name."""

import tempfile
from pathlib import Path

import torch

from .task import Task, say


def adaptation(task: Task) -> None:
    """Infilling of held-out lines before and after the minutes that the stage has."""
    if not torch.cuda.is_available():
        say(what="adaptation", skipped="no GPU: on a CPU minutes change nothing")
        return
    from gpu import adaptation as kit  # and the pre-training room
    from gpu.section import Section

    with tempfile.TemporaryDirectory() as scratch:
        section = Section(torch.device("cuda"), False, task.source.resolve(), task.deadline, Path(scratch))
        kit.adaptation(section)
