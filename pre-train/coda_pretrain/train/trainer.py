"""The one training loop for CPU, GPU and TPU. The backend places tensors; noise comes from the host in the batch."""

import logging
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from types import FrameType

import numpy as np
from torch import Tensor

from CoDALanguageModel.diffusion import IGNORE_INDEX
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.run_files import claimed

from ..checkpoints.checkpoint import (
    TrainState,
    checkpoint_to_resume,
    load_checkpoint,
    set_aside_later_checkpoints,
)
from ..checkpoints.resume_check import check_same_model, check_same_run, record_of_data
from ..checkpoints.saver import Saver, Snapshot, check_folder, snapshot
from ..config import RunConfig
from ..data.mixture import Mixture
from ..devices import create_backend
from ..devices.backend import Backend
from ..noise.masking import TokenFacts
from ..places import Place, is_url, place_of
from ..plain_data import to_yaml
from ..watch.metrics import Reporter, UtilizationMeter, peak_flops
from ..watch.profiling import PROFILE_FOLDER, StepProfiler
from ..watch.trackers import check_trackers, start_trackers
from .assembly import assemble
from .batches import Batch, Batches, split_rows
from .learning_rate import learning_rate
from .optim import set_step_count, state_tensors
from .start import blocks_of, check_shards, initial_model
from .step import StepResult
from .validation import Evaluation, held_out_identities

logger = logging.getLogger(__name__)


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


class Trainer:
    """One run: built from its configuration alone, continued from its folder."""

    def __init__(self, config: RunConfig, *, accept_changed_data: bool = False) -> None:
        """Reach the devices, build model and optimizer, and restore the checkpoint to continue from, if any.

        Args:
            config: everything that defines the run.
            accept_changed_data: continue although the token shards are not those of before; it is recorded.

        Raises:
            UserError: the configuration does not fit the devices, the data, the model or the checkpoint.
        """
        # 1 the machine, and whether the rows of a step can be dealt to it
        self.config = config
        self.output_dir, self.checkpoints = run_folders(config)
        check_trackers(config)
        self.backend: Backend = create_backend(config.hardware)
        rows_name = "global_batch_size" if config.micro_batch_size is None else "micro_batch_size"
        self.backend.check_rows(rows_name, config.rows_per_micro_batch)
        # 2 the data and the length of the run; all that can be refused without a model is refused here
        mixture = Mixture(config.data, seq_len=config.seq_len, seed=config.seed)
        self.num_steps = number_of_steps(config, mixture.num_samples)
        self._rate(0)  # the schedule is checked before a model is built
        resume_from = checkpoint_to_resume(config.checkpoint.resume, self.checkpoints)
        if resume_from is not None:
            check_same_run(config, resume_from)
        sources = {"data": mixture.identities()} | held_out_identities(config)
        self._data = record_of_data(sources, resume_from, accept_changed=accept_changed_data)
        check_folder(self.checkpoints, backend=self.backend)
        # 3 the model, on the CPU: shape and tokens must fit the data and the checkpoint before anything is placed
        self.backend.prepare_kernel(config.model.attn_implementation)
        model = initial_model(config.model, seed=config.seed)
        blocks = blocks_of(config, model.config)
        self.model_config = model.config
        if resume_from is not None:
            check_same_model(model.config.to_dict(), resume_from)
        if config.seq_len > model.config.max_position_embeddings:
            raise UserError(
                f"seq_len must be at most the model's max_position_embeddings "
                f"{model.config.max_position_embeddings}, got {config.seq_len}"
            )
        check_shards(mixture.tokenizer, model.config, config.model.tokenizer)
        # 4 placed, with its update rule; a checkpoint then fills weights and averages where they lie
        self.parameters, self.optimizer, self.functions = assemble(config, model, self.backend)
        self.state = TrainState()
        if resume_from is not None:
            self.state = load_checkpoint(resume_from, self._tensors(), backend=self.backend)
            set_step_count(self.optimizer, self.state.optimizer_steps)
        # 5 what the loop asks of others at each step: batches, validation, saves, profiles, MFU
        num_parts = config.global_batch_size // config.rows_per_micro_batch
        rows = self.backend.rows_for_process(config.global_batch_size, num_parts)
        tokens = TokenFacts(model.config.mask_token_id, model.config.pad_token_id, model.config.logits_shift)
        self.batches = Batches(config, mixture, rows=rows, num_steps=self.num_steps, tokens=tokens, blocks=blocks)
        self.evaluation = None
        if config.evaluation.every is not None:
            self.evaluation = Evaluation(config, rows=rows, tokens=tokens, blocks=blocks)
        keep, asynchronous = config.checkpoint.keep, config.checkpoint.asynchronous
        self._saver = Saver(self.checkpoints, backend=self.backend, keep=keep, asynchronous=asynchronous)
        self._saved_step = self.state.step  # of the newest checkpoint; 0 needs none
        self.stopped_by: int | None = None
        """The signal that asked this process to stop."""
        self._profiler = StepProfiler(
            config.metrics.profile_steps,
            self.output_dir / PROFILE_FOLDER,
            hardware=config.hardware,
            rank=self.backend.rank,
            finished_steps=self.state.step,
        )
        step_rows = config.global_batch_size * config.rows_per_sample
        self._utilization = UtilizationMeter(peak_flops(self.backend), model.config, step_rows)

    def train(self) -> TrainState:
        """Train to the last step, or until SIGTERM or Ctrl-C comes; a checkpoint of the last complete step is saved.

        Launchers kill what still runs some seconds after SIGTERM (torchrun: 30), and a step of many parts or an
        evaluation takes longer: they are given up at the next part or batch.

        Raises:
            CheckpointError: a checkpoint could not be saved.
            TrainingDiverged: `max_skipped_steps` steps in a row were not finite.
            UserError: another run writes to the folder.
        """
        if not self.backend.is_main:
            return self._train()
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with claimed(self.output_dir):
            return self._train()

    def _train(self) -> TrainState:
        config, state = self.config, self.state
        if state.step >= self.num_steps:
            logger.info("all %d steps are done already", self.num_steps)
            return state
        if self.backend.is_main:
            (self.output_dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            set_aside_later_checkpoints(self.checkpoints, state.step)
        with self._stop_noted(), self._reporter() as reporter, closing(self._profiler):
            while state.step < self.num_steps:
                self._profiler.before(state.step + 1)
                stop = self._step(reporter)
                self._profiler.after(state.step)
                last = state.step == self.num_steps
                if self.evaluation is not None and not stop and (last or self._is_due(config.evaluation.every)):
                    stop = self._evaluate(reporter, self.evaluation)
                if (last or stop or self._is_due(config.checkpoint.every)) and state.step != self._saved_step:
                    self.save()
                if stop and not last:
                    logger.warning("%s: stopped after step %d of %d", self._cause, state.step, self.num_steps)
                    break
            self._saver.wait()
        return state

    def save(self) -> None:
        """Copy the state of the current step and start to write its checkpoint.

        Raises:
            CheckpointError: an earlier one could not be written, or this one if saving is not asynchronous.
        """
        self._saver.save(self._snapshot)
        self._saved_step = self.state.step

    def _snapshot(self) -> Snapshot:
        return snapshot(
            self._tensors(),
            self.state,
            run_config=to_yaml(self.config),
            model_config=self.model_config.to_dict(),
            data=self._data,
            backend=self.backend,
        )

    def close(self) -> None:
        """Let a save end, stop reading ahead and leave the devices."""
        self._saver.close()
        self.batches.close()
        self.backend.close()

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that a checkpoint holds as tensors, by flat name."""
        tensors: dict[str, Tensor] = {f"model.{name}": parameter for name, parameter in self.parameters.items()}
        state = state_tensors(self.optimizer, self.parameters)
        return tensors | {f"optim.{name}": tensor for name, tensor in state.items()}

    def _rate(self, step: int) -> float:
        config = self.config
        return learning_rate(step, num_steps=self.num_steps, optimizer=config.optimizer, schedule=config.schedule)

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    def _parts(self, batch: Batch) -> list[Batch]:
        return split_rows(batch, self.config.global_batch_size // self.config.rows_per_micro_batch)

    def _step(self, reporter: Reporter | None) -> bool:
        """One optimizer step, unless it is given up; whether some process was asked to stop."""
        config, state = self.config, self.state
        started = time.perf_counter()
        batch = self.batches.get(state.step)
        data_wait_s = time.perf_counter() - started
        rate = self._rate(state.step)
        parts = self._parts(batch)
        result = self.functions.step(
            parts, learning_rate=rate, count=state.optimizer_steps + 1, interrupted=self._asked_to_stop
        )
        if result is None:
            logger.warning(
                "%s: step %d is given up between two of its %d parts", self._cause, state.step + 1, len(parts)
            )
            return True
        stop, save_failed = self.backend.all_reduce_any([self.stopped_by is not None, self._saver.failed])
        if save_failed:
            self._saver.wait()  # raises: a failed save fails on every process
        if state.step == 0 and config.model.init_from is not None:
            logger.info("loss of the weights that the run starts from: %.4f", result.loss)
            if reporter is not None:
                reporter.row({"step": 0, "initial_loss": result.loss})
        if result.is_finite:
            state.optimizer_steps += 1
            state.skipped_in_a_row = 0
        else:
            self._skip(result)
        state.step += 1
        state.tokens += config.global_batch_size * config.seq_len
        seconds = time.perf_counter() - started
        state.add_to_row(
            loss=result.loss,
            masked_share=float(np.mean(batch["labels"][:, : config.seq_len] != IGNORE_INDEX)),
            seconds=seconds,
            data_wait_s=data_wait_s,
        )
        self._utilization.add(batch, seconds, self.batches.blocks(state.step - 1))
        if reporter is not None:
            reporter.step(state.step)
        if self._is_due(config.metrics.every) or state.step == self.num_steps:
            row = self._row(rate, result.norm)
            if reporter is not None:
                reporter.row(row)
        return stop

    def _skip(self, result: StepResult) -> None:
        """Count a step that was not finite; weights, optimizer state and its count are as they were."""
        state, limit = self.state, self.config.max_skipped_steps
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        logger.warning("step %d is skipped: loss %g, gradient norm %g", state.step + 1, result.loss, result.norm)
        if state.skipped_in_a_row >= limit:
            raise TrainingDiverged(
                f"{limit} steps in a row, up to step {state.step + 1}, had a loss or gradient that is not finite "
                "(max_skipped_steps); continue from an earlier checkpoint with a lower optimizer.learning_rate"
            )

    def _row(self, rate: float, grad_norm: float) -> dict[str, float | int | None]:
        """The metrics of the steps since the last row; starts a new row."""
        state, step = self.state, self.state.step - 1
        epoch = self.batches.epoch(step)
        probabilities = self.config.masking.at(self.batches.progress(step), epoch)
        row: dict[str, float | int | None] = {
            "step": state.step,
            "loss": state.row_loss / state.row_steps,
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "tokens": state.tokens,
            "tokens_per_s": state.row_steps * self.config.global_batch_size * self.config.seq_len / state.row_seconds,
            "mfu": self._utilization.mfu(),
            "time_s": state.seconds,
            "step_s": state.row_seconds / state.row_steps,
            "data_wait_s": state.row_data_wait_s / state.row_steps,
            "epoch": epoch,
            "masked_share": state.row_masked_share / state.row_steps,
            **{f"{name}_probability": value for name, value in probabilities._asdict().items()},
            "skipped_steps": state.skipped_steps,
        }
        blocks = self.batches.blocks(step)
        if blocks is not None:
            row["block_size"] = blocks.size
        ahead = self.batches.visible_ahead(step)
        if ahead is not None:
            row["visible_ahead"] = ahead
        compiled = self.backend.compile_count()
        if compiled is not None:
            row["compile_count"] = compiled
        state.start_row()
        return row

    def _asked_to_stop(self) -> bool:
        """Whether some process was asked to stop; the same answer on each of them."""
        return self.backend.all_reduce_any([self.stopped_by is not None])[0]

    def _evaluate(self, reporter: Reporter | None, evaluation: Evaluation) -> bool:
        """Report the validation loss; whether some process was asked to stop, which gives it up."""
        started = time.perf_counter()
        losses = []
        for i in range(evaluation.num_batches):
            if self._asked_to_stop():
                logger.warning("%s: the evaluation after step %d is given up", self._cause, self.state.step)
                return True
            losses.append(self.functions.loss(self._parts(evaluation.batch(i))))
        if reporter is not None:
            seconds = time.perf_counter() - started
            reporter.row({"step": self.state.step, **evaluation.losses(losses), "eval_s": seconds})
        return False

    def _reporter(self) -> AbstractContextManager[Reporter | None]:
        if not self.backend.is_main:
            return nullcontext()
        path = self.output_dir / "metrics.jsonl"
        trackers = start_trackers(self.config, finished_steps=self.state.step)
        return Reporter(path, finished_steps=self.state.step, num_steps=self.num_steps, trackers=trackers)

    @contextmanager
    def _stop_noted(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            self.stopped_by = number
            if number == signal.SIGINT:
                signal.signal(number, signal.default_int_handler)  # who presses Ctrl-C again does not want to wait

        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def _cause(self) -> str:
        """What asked to stop: here, or else at another process."""
        return "another process" if self.stopped_by is None else signal.Signals(self.stopped_by).name


def run_folders(config: RunConfig) -> tuple[Path, Place]:
    """The local folder of a run and the place of its checkpoints.

    Raises:
        UserError: `output_dir` is a URL, or the one of the checkpoints cannot be served.
    """
    if is_url(config.output_dir):
        raise UserError(
            f"output_dir must be a local folder, since rows are appended to its metrics.jsonl; got {config.output_dir}:"
            f" put the checkpoints there with checkpoint.folder={config.output_dir}"
        )
    folder = config.checkpoint.folder
    return Path(config.output_dir), place_of(folder) if folder else Path(config.output_dir) / "checkpoints"


def number_of_steps(config: RunConfig, samples_per_epoch: int) -> int:
    """Optimizer steps of the whole run.

    Raises:
        UserError: `num_epochs` is less than one step.
    """
    if config.max_steps is not None:
        return config.max_steps
    assert config.num_epochs is not None, "RunConfig holds max_steps or num_epochs"
    steps = int(config.num_epochs * samples_per_epoch / config.global_batch_size)
    if steps < 1:
        raise UserError(
            f"num_epochs {config.num_epochs:g} of {samples_per_epoch} samples is less than one step of "
            f"global_batch_size {config.global_batch_size}"
        )
    return steps
