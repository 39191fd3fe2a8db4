"""A profile of chosen steps: a Chrome trace of torch's profiler on cpu and cuda, an XPlane trace on xla."""

from pathlib import Path
from typing import Any

from ..devices.config import HardwareConfig

PROFILE_FOLDER = "profile"


class StepProfiler:
    """Records steps `first` to `last` of a run, of this process, into `folder`; without steps it does nothing.

    A run that ends or resumes inside the range records the part that it makes.
    """

    def __init__(
        self, steps: tuple[int, int] | None, folder: Path, *, hardware: HardwareConfig, rank: int, finished_steps: int
    ) -> None:
        """Prepare to record; `finished_steps` were made before this process."""
        self._folder, self._hardware, self._rank = folder, hardware, rank
        self._last = steps[1] if steps is not None else 0
        self._first = max(steps[0], finished_steps + 1) if steps is not None and steps[1] > finished_steps else None
        self._profile: Any = None

    def before(self, step: int) -> None:
        """Note that step number `step`, from 1, begins."""
        if step != self._first:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._hardware.backend == "xla":
            import torch_xla.debug.profiler as xp

            xp.start_trace(str(self._folder))
            self._profile = xp
            return
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if self._hardware.backend == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.start()

    def after(self, step: int) -> None:
        """Note that step number `step` is finished."""
        if self._profile is not None and step >= self._last:
            self.close()

    def close(self) -> None:
        """Write what is being recorded, if anything."""
        profile, self._profile = self._profile, None
        if profile is None:
            return
        if self._hardware.backend == "xla":
            profile.stop_trace()
            return
        profile.stop()
        profile.export_chrome_trace(str(self._folder / f"steps-{self._first}-{self._last}-rank{self._rank}.json.gz"))
