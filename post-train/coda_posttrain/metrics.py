"""The log of a run: `metrics.jsonl` in its output folder, one JSON object a line, exact across a resume.

Keys: `step, epoch, loss, learning_rate, grad_norm, tokens, tokens_per_s, time_s` and the curriculum's values on
training lines; `step, epoch, eval_loss, time_s` on evaluation lines. Not here: W&B or TensorBoard (`report_to`).
"""

import json
import math
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from CoDALanguageModel.run_files import read_rows, write_whole

METRICS_FILE = "metrics.jsonl"
CURRICULUM_KEYS = ("t_min", "span_probability", "conditioned_share")


class TrainingDiverged(RuntimeError):
    """The loss is not finite."""


class MetricsLog(TrainerCallback):
    """Writes `metrics.jsonl` on the main process."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.time_before_s = 0.0  # of the run that is resumed
        self.last_tokens = 0
        self.last_time_s = 0.0
        self.last_evaluation: dict[str, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start a new file, or drop the lines behind the step that is resumed from."""
        args.logging_nan_inf_filter = False  # it reports an average of earlier steps in the place of a loss that is NaN
        self.started = time.perf_counter()
        self.last_tokens = state.num_input_tokens_seen
        if not state.is_world_process_zero:
            return
        path = Path(args.output_dir) / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = read_rows(path) if state.global_step and path.exists() else []
        kept = [line for line in lines if line["step"] <= state.global_step]
        self.time_before_s = self.last_time_s = max((line["time_s"] for line in kept), default=0.0)
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append one line for a training or an evaluation report; other reports are not metrics of a step.

        Raises:
            TrainingDiverged: the training loss is not finite, so the weights are lost.
        """
        logs = logs or {}
        if not math.isfinite(logs.get("loss", 0.0)):
            raise TrainingDiverged(
                f"the loss up to step {state.global_step} is {logs['loss']}: the run has diverged, its weights are "
                "lost; take an earlier checkpoint, a lower learning_rate, or bf16 in the place of fp16"
            )
        time_s = self.time_before_s + time.perf_counter() - self.started
        line: dict[str, Any] = {"step": state.global_step, "epoch": logs.get("epoch")}
        losses = {key: value for key, value in logs.items() if key.startswith("eval_") and key.endswith("_loss")}
        if "loss" in logs:
            tokens = state.num_input_tokens_seen
            line |= {key: logs[key] for key in ("loss", "learning_rate", "grad_norm", *CURRICULUM_KEYS) if key in logs}
            speed = (tokens - self.last_tokens) / max(time_s - self.last_time_s, 1e-9)
            line |= {"tokens": tokens, "tokens_per_s": round(speed, 1)}
            self.last_tokens, self.last_time_s = tokens, time_s
        elif losses:
            line |= losses
            if line == self.last_evaluation:  # LLaMA-Factory evaluates once more after the last step
                return
            self.last_evaluation = dict(line)
            self.last_time_s += logs.get("eval_runtime", 0.0)  # the evaluation is no training time
        else:
            return
        line["time_s"] = round(time_s, 3)
        if state.is_world_process_zero:
            with (Path(args.output_dir) / METRICS_FILE).open("a") as file:
                file.write(json.dumps(line) + "\n")
