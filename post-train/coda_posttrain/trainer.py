"""LLaMA-Factory's supervised trainer with the masked-diffusion objective in place of the causal one.

One class and the function that runs it. Everything else of a run (arguments, templates, tokenised data, model
loading, LoRA, optimizer, checkpoints) is LLaMA-Factory's. Not here: what is noised and when (`curriculum`).
"""

import contextlib
import functools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import torch
import transformers
import yaml
from llamafactory.data import loader
from llamafactory.third_party.muon import muon
from llamafactory.train import tuner
from llamafactory.train.sft import workflow
from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput
from transformers.utils import cached_file

import CoDALanguageModel.modeling_coda  # noqa: F401 (registers the model: the code here wins over a checkpoint's copy)
from CoDALanguageModel import CoDAConfig
from CoDALanguageModel.attention_coda import RULE_KERNELS, Visibility
from CoDALanguageModel.diffusion import IGNORE_INDEX
from CoDALanguageModel.errors import UserError
from CoDALanguageModel.noise import Blocks, DoubledRows, NoisedRows, blocks_to_train, deal_levels
from CoDALanguageModel.run_files import claimed
from CoDALanguageModel.weight_files import open_to_readers, read_tokenizer, refuse_not_finite

from . import curriculum
from .arguments import CUTOFF_LEN, DiffusionArguments, check_length, check_model_objective
from .batches import EpochOrder, NumberedRows, RowCollator, report_fates
from .checkpoints import (
    FINISHED,
    RUNNING,
    STAGING,
    TRAINER_STATE,
    keep_newest,
    put_in_place,
    remove,
    write_marker,
    write_run,
)
from .metrics import CURRICULUM_KEYS, MetricsLog
from .records import KEPT, fates
from .rows import align, describe, load_conversations, processors
from .templates import template_for_collation

logger = logging.getLogger(__name__)

GENERATION_CONFIG = "generation_config.json"
RUN_CONFIG = "run_config.yaml"
EVAL_T_MIN = 0.001
TOKEN_ID_NAMES = ("bos_token_id", "eos_token_id", "pad_token_id")


def _stay_on_cpu(storage: torch.UntypedStorage, location: str) -> torch.UntypedStorage | None:
    """The storage itself for a numbered CPU; None hands other devices on to torch's own ways."""
    return storage if location.startswith("cpu:") else None


# Each of several processes on the CPU resumes with the device "cpu:0", to which torch.load cannot restore by itself.
torch.serialization.register_package(15, lambda storage: None, _stay_on_cpu)


def run_training(
    host: dict[str, Any], diffusion: DiffusionArguments, config: dict[str, Any], parts: dict[str, Any]
) -> None:
    """Train as LLaMA-Factory does, with our trainer.

    Args:
        host: LLaMA-Factory's settings.
        diffusion: our settings.
        config: both together as the user gave them, saved beside every checkpoint.
        parts: what the run is made of, saved there too; empty on all but the main process and without training.

    Raises:
        UserError: from LLaMA-Factory's or our checks of settings, model and data; or another run writes to the folder.
    """
    if not torch.accelerator.is_available():
        host = {"use_cpu": True, **host}  # or bf16 and the choice of the backend would fail
        if host.get("deepspeed") and "LOCAL_RANK" in os.environ:
            import deepspeed

            deepspeed.init_distributed("gloo")  # accelerate does so for GPUs only; else there seems to be one process
    if host["disable_tqdm"]:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    trainer_class = functools.partial(
        DiffusionTrainer,
        diffusion=diffusion,
        source=host["model_name_or_path"],
        cutoff_len=host.get("cutoff_len", CUTOFF_LEN),
        run_config=config,
        run_parts=parts,
    )
    if Path(host["model_name_or_path"]).is_dir():
        read_tokenizer(host["model_name_or_path"])  # the host would say no more than that it cannot be loaded
    output_dir = Path(host["output_dir"])
    with contextlib.ExitStack() as replaced:  # the names that are replaced in LLaMA-Factory
        if parts:
            output_dir.mkdir(parents=True, exist_ok=True)
            replaced.enter_context(claimed(output_dir))
            write_run(output_dir, RUNNING, parts, config)
        for module, name, ours in (
            (workflow, "CustomSeq2SeqTrainer", trainer_class),
            (loader, "SupervisedDatasetProcessor", processors(diffusion.overlong, diffusion.other_template)),
            (workflow, "get_template_and_fix_tokenizer", template_for_collation),
            (muon, "zeropower_via_newtonschulz5", functools.partial(orthogonalize, muon.zeropower_via_newtonschulz5)),
            (workflow, "get_dataset", functools.partial(dataset_with_rows, workflow.get_dataset)),
            (loader, "get_dataset_list", describe),
            (loader, "_load_single_dataset", load_conversations),
            (loader, "align_dataset", align),
        ):
            replaced.enter_context(mock.patch.object(module, name, ours))
        tuner.run_exp(args=host, callbacks=[MetricsLog()])
        if parts:
            write_run(output_dir, FINISHED, parts, config)


def orthogonalize(in_bfloat16: Callable[[Tensor, int], Tensor], gradient: Tensor, steps: int) -> Tensor:
    """The nearest matrix with orthogonal rows or columns, about: the update of Muon (`use_muon: true`).

    Takes the place of LLaMA-Factory's function, which it leaves to accelerators: a CPU without bfloat16 products takes
    many times as long for them as for those of float32. Newton-Schulz iteration of degree five with the coefficients
    of https://kellerjordan.github.io/posts/muon.

    Args:
        in_bfloat16: LLaMA-Factory's function.
        gradient: (N, M), with momentum.
        steps: iterations.
    """
    if gradient.device.type != "cpu":
        return in_bfloat16(gradient, steps)
    is_tall = gradient.shape[0] > gradient.shape[1]
    x = gradient.T if is_tall else gradient  # the products below are of the shorter side
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.T if is_tall else x


def dataset_with_rows(get_dataset: Callable[..., dict[str, Any]], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What LLaMA-Factory's `get_dataset` gives; data of which nothing is left is refused before a model is loaded.

    Raises:
        DataError: a data set has no row that can be trained on.
    """
    found = get_dataset(*args, **kwargs)
    for setting, rows in found.items():
        for name, part in rows.items() if isinstance(rows, dict) else [("", rows)]:
            if not any(fate in KEPT for fate, _ in fates(part)):
                report_fates(f"{setting.removeprefix('train_')} {name}".strip(), list(fates(part)), args[2].cutoff_len)
    return found


def run_export(host: dict[str, Any]) -> None:
    """Merge a LoRA adapter into its base model and write a folder that loads by itself."""
    source, folder = host["model_name_or_path"], Path(host["export_dir"])
    litter = [folder / name for name in ("Modelfile",) if not (folder / name).exists()]
    with mock.patch.object(tuner, "get_template_and_fix_tokenizer", template_for_collation):
        tuner.export_model({**host, "infer_dtype": host.get("infer_dtype") or source_dtype(source)})
    restore_generation_config(source, folder)
    open_to_readers(folder)
    for file in litter:  # instructions for a runtime that cannot run this model
        file.unlink(missing_ok=True)


def restore_generation_config(source: str, folder: Path) -> None:
    """Put the source's decoding settings into a saved folder, byte for byte.

    LLaMA-Factory and the Trainer adjust the loaded ones to what causal models need.
    """
    found = cached_file(
        source, GENERATION_CONFIG, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_gated_repo=False
    )
    if found is None:
        (folder / GENERATION_CONFIG).unlink(missing_ok=True)
    else:
        shutil.copyfile(found, folder / GENERATION_CONFIG)


class DiffusionTrainer(CustomSeq2SeqTrainer):
    """Noises the rows of each optimizer step and lets the model compute the loss.

    Noise is drawn when all micro-batches of an optimizer step are there (`get_batch_samples`), so noise levels are
    stratified over the global batch and the loss is divided by the count of the global batch: the same rows give the
    same loss and gradient however they are split into micro-batches and processes.

    Args:
        diffusion: noise and loss settings.
        source: folder or Hub name of the model that training starts from.
        cutoff_len: longest row, in tokens.
        run_config: saved beside every checkpoint.
        run_parts: what the run is made of, saved beside every checkpoint.
        **kwargs: what LLaMA-Factory passes to its own trainer.

    Raises:
        UserError: the model is not a CoDA model or has weights that are not finite, its tokenizer lacks the mask token,
            or a data set is unusable.
    """

    def __init__(
        self,
        *,
        diffusion: DiffusionArguments,
        source: str,
        cutoff_len: int,
        run_config: dict[str, Any],
        run_parts: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        model_config, tokenizer = kwargs["model"].config, kwargs["tokenizer"]
        check_model(model_config, tokenizer, source)
        refuse_not_finite(kwargs["model"].named_parameters(), f"model_name_or_path={source!r}")
        check_model_objective(diffusion, model_config.attention, model_config.logits_shift)
        check_length(cutoff_len, getattr(model_config, "max_position_embeddings", None))
        self.diffusion = diffusion
        self.source = source
        self.cutoff_len = cutoff_len
        self.run_config = run_config
        self.run_parts = run_parts
        self.staging: Path | None = None  # where a checkpoint is being written
        self.save_dtype = source_dtype(source) if diffusion.save_dtype == "source" else diffusion.save_dtype
        self.token_facts = {
            "mask_token_id": model_config.mask_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "logits_shift": model_config.logits_shift,
            "from_answer": model_config.block_origin == "answer",
        }
        self.blocks = blocks_of(
            model_config, diffusion, is_adapter=kwargs["finetuning_args"].finetuning_type in ("lora", "oft")
        )
        self.tail_token_id = tokenizer.pad_token_id if diffusion.tail == "pad" else tokenizer.eos_token_id
        # The Trainer overwrites these with the tokenizer's, which has one end token where the model may have several.
        self.model_token_ids = {name: getattr(model_config, name, None) for name in TOKEN_ID_NAMES}
        number = functools.partial(NumberedRows, cutoff_len=cutoff_len)
        if kwargs.get("train_dataset") is not None:
            kwargs["train_dataset"] = number(kwargs["train_dataset"], name="dataset")
        evaluated = kwargs.get("eval_dataset")
        if isinstance(evaluated, dict):
            kwargs["eval_dataset"] = {key: number(rows, name=f"eval_dataset {key}") for key, rows in evaluated.items()}
        elif evaluated is not None:
            kwargs["eval_dataset"] = number(evaluated, name="eval_dataset")
        kwargs["data_collator"] = RowCollator(kwargs["data_collator"])
        if not kwargs["args"].accelerator_config.even_batches:
            raise UserError(
                "accelerator_config.even_batches=false would give some processes fewer batches than others, which "
                "then wait for each other forever: leave it true; rows that fill the last batches are not counted"
            )
        super().__init__(**kwargs)
        # The loss of each micro-batch is already its share of the step; without this the Trainer would not divide by
        # the number of micro-batches, which `_weights` multiplies by.
        self.model_accepts_loss_kwargs = False
        num_epochs = self.args.num_train_epochs
        for name in ("t_min", "span_probability"):
            values = getattr(diffusion, name)
            if self.args.max_steps <= 0 and len(values) > num_epochs:
                logger.warning(
                    "diffusion.%s has %d values, but the run only %s epochs: the last values are never used",
                    name, len(values), num_epochs,
                )  # fmt: skip

    # -- data -----------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        strategy = str(self.args.train_sampling_strategy)
        if self.finetuning_args.disable_shuffling or strategy == "sequential":
            return super()._get_train_sampler(*args, **kwargs)
        return EpochOrder(
            self.train_dataset.lengths,
            batch_size=self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            grouped=strategy == "group_by_length",
            current_epoch=lambda: int(self.state.epoch or 0),
        )

    def _get_eval_sampler(self, eval_dataset: NumberedRows) -> Sampler | None:
        # Always in order: the duplicates that even out the last batches are told by their place.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _rows(self, batch: dict[str, Tensor], tail_tokens: int) -> curriculum.Rows:
        """The clean rows of a collated batch, with their tail."""
        present = batch["attention_mask"].bool()
        prompt_mask = (batch["labels"] == IGNORE_INDEX) & present
        input_ids, present, tail = curriculum.add_tail(
            batch["input_ids"],
            present,
            complete=batch["ended"],
            num_tokens=tail_tokens,
            tail_token_id=self.tail_token_id,
            max_length=self.cutoff_len,
        )
        width = input_ids.shape[1]
        prompt_mask = torch.nn.functional.pad(prompt_mask, (0, max(0, width - prompt_mask.shape[1])))[:, :width]
        return curriculum.Rows(input_ids, present, prompt_mask, tail, batch["sample_id"])

    # -- training -------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Tensor]], None]:
        """Collect the micro-batches of an optimizer step and noise them together."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return (self._noise_step(batches) if batches else batches), None

    def _noise_step(self, batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Turn collated micro-batches of one optimizer step into what the model's forward takes."""
        settings, seed, step = self.diffusion, self.args.seed, self.state.global_step
        epoch, epochs_done = self._epochs_done()
        share = curriculum.conditioned_share(epochs_done, settings.prompt_annealing_epochs)
        tail_tokens = {
            "eos": curriculum.tail_length(seed, step, settings.tail_tokens),
            "pad": self.cutoff_len,
            "none": 0,
        }[settings.tail]
        probability = curriculum.epoch_value(settings.span_probability, epoch)
        places, num_rows = self._global_places([len(batch["input_ids"]) for batch in batches])
        t_min = curriculum.epoch_value(settings.t_min, epoch)
        self.last_curriculum = dict(zip(CURRICULUM_KEYS, (t_min, probability, share), strict=True))
        levels = deal_levels(seed, step, num_rows, t_min)
        noised, levels_of, fresh_of = [], [], []
        for batch, place in zip(batches, places, strict=True):
            rows = self._rows(batch, tail_tokens)
            fresh = place < num_rows  # the others fill up the last batches of the epoch
            device = rows.input_ids.device
            t, fresh = levels[place.clamp(max=num_rows - 1)].to(device), fresh.to(device)
            sample_ids = rows.sample_ids + epoch * len(self.train_dataset)  # each epoch has noise of its own
            result = curriculum.noise(
                rows,
                t,
                share=share,
                seed=seed,
                sample_ids=sample_ids.tolist(),
                t_min=t_min,
                blocks=self.blocks,
                span_probability=probability,
                span_lengths=settings.span_lengths,
                **self.token_facts,
            )
            noised.append((result, rows))
            levels_of.append(t)
            fresh_of.append(fresh)
        counted = [counted_tokens(result, rows) for result, rows in noised]
        if self.blocks:  # whose 1/t stands in the weights of the positions already
            levels_of = [torch.ones_like(t) for t in levels_of]
        weights = self._weights(counted, levels_of, fresh_of, num_rows)
        return [
            model_inputs(result, rows.present, result.labels, weight)
            for (result, rows), weight in zip(noised, weights, strict=True)
        ]

    def _epochs_done(self) -> tuple[int, float]:
        """The present epoch and the epochs done, counted in optimizer steps: micro-batches do not tell."""
        batches = len(self.callback_handler.train_dataloader)
        steps = max(1, -(-batches // self.args.gradient_accumulation_steps))
        epoch, step = divmod(self.state.global_step, steps)
        return epoch, epoch + step / steps

    def _global_places(self, counts: list[int]) -> tuple[list[Tensor], int]:
        """Where the rows of each micro-batch lie in the global batch, and its number of rows.

        The order is micro-batch, process, row: the one in which a single process would meet the same rows. At the end
        of an epoch processes get rows a second time, which even out their last batches. They come last: their places
        lie behind the number of rows.
        """
        gathered = torch.tensor([counts], device=self.args.device)
        if self.args.world_size > 1:
            gathered = self.accelerator.gather(gathered)  # (processes, micro-batches)
        in_order = gathered.T.flatten()  # micro-batch by micro-batch
        starts = (in_order.cumsum(0) - in_order).reshape(len(counts), -1)[:, self.args.process_index].tolist()
        places = [torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)]
        return places, int(gathered.sum()) - self._repeated_rows(int(gathered[:, -1].sum()))

    def _repeated_rows(self, rows_of_last: int) -> int:
        """How many rows of the last global micro-batch were met before in this epoch, given its number of rows."""
        at_end = self.accelerator.gradient_state.end_of_dataloader and not self.args.dataloader_drop_last
        return -len(self.train_dataset) % rows_of_last if at_end and self.args.world_size > 1 else 0

    def _weights(self, counted: list[Tensor], levels: list[Tensor], fresh: list[Tensor], num_rows: int) -> list[Tensor]:
        """Weight of each row's summed cross-entropy: 1/t over the denominator of the step, 0 for repeated rows.

        The Trainer divides by the micro-batches and averages over processes afterwards, so both are multiplied in.
        """
        averaged_over = len(counted) * self.args.world_size
        if self.diffusion.normalize == "row":
            weights = [averaged_over / (num_rows * t * n.clamp(min=1)) for n, t in zip(counted, levels, strict=True)]
        else:
            if self.diffusion.normalize == "padded":
                total = torch.tensor(float(num_rows * self.cutoff_len))
            else:
                total = torch.stack([(n * f).sum() for n, f in zip(counted, fresh, strict=True)]).sum()
                if self.args.world_size > 1:
                    total = self.accelerator.gather(total.reshape(1)).sum()
                total = total.clamp(min=1)
            weights = [averaged_over / (t * total.to(t.device)) for t in levels]
        return [weight * f for weight, f in zip(weights, fresh, strict=True)]

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The model's own chunked, weighted cross-entropy; a 0-d float32 tensor."""
        if "group" in inputs:
            # A rule is put together here: what moves inputs to a device knows no named tuples.
            rule = Visibility(*(inputs[name] for name in Visibility._fields))
            others = {name: x for name, x in inputs.items() if name not in (*Visibility._fields, "attention_mask")}
            inputs = {**others, "visibility": rule, "doubled": True}
        outputs = model(**inputs, return_dict=True)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the curriculum's values at the reported step to training reports."""
        if "loss" in logs:
            logs |= self.last_curriculum
        super().log(logs, *args, **kwargs)

    # -- evaluation -----------------------------------------------------------------------------------------------

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Mean cross-entropy bound of the answers, in nats per token, with noise that never changes.

        The result depends neither on the batch size nor on the number of processes.
        """
        num_rows = len(dataloader.dataset)
        self._eval_levels = deal_levels(self.diffusion.eval_seed, 0, num_rows, EVAL_T_MIN)
        self._eval_sums = torch.zeros(2, dtype=torch.float64, device="cpu")  # weighted loss, counted tokens
        self._eval_batches = 0
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        sums = self._eval_sums.to(self.args.device)
        if self.args.world_size > 1:
            sums = self.accelerator.gather(sums[None]).sum(dim=0)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = float(sums[0] / sums[1])
        return output

    def prediction_step(
        self, model: torch.nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None, None]:
        """Loss of one evaluation batch under its fixed noise; the tail is masked too but not counted."""
        inputs = self._prepare_inputs(inputs)
        settings, seed = self.diffusion, self.diffusion.eval_seed
        rows = self._rows(inputs, {"eos": settings.tail_tokens // 2, "pad": self.cutoff_len, "none": 0}[settings.tail])
        device = rows.input_ids.device
        t = self._eval_levels[rows.sample_ids.cpu()].to(device)
        # Each row once, and the diffusion's loss alone; the context is seen as in training.
        blocks = self.blocks and self.blocks._replace(
            complementary=False, autoregressive_weight=0.0 if self.blocks.is_joint else None
        )
        result = curriculum.noise(
            rows,
            t,
            share=1.0,
            seed=seed,
            sample_ids=rows.sample_ids.tolist(),
            t_min=EVAL_T_MIN,
            blocks=blocks,
            **self.token_facts,
        )
        first = (self._eval_batches * self.args.world_size + self.args.process_index) * self.args.eval_batch_size
        self._eval_batches += 1
        fresh = rows.sample_ids == torch.arange(first, first + len(t), device=device)  # no duplicates
        labels = result.labels.masked_fill(rows.tail, IGNORE_INDEX)
        with torch.no_grad(), self.compute_loss_context_manager():
            batch = model_inputs(result, rows.present, labels, fresh.float() if blocks else fresh / t)
            loss = self.compute_loss(model, batch).float()
        count = (counted_tokens(result, rows) * fresh).sum()
        self._eval_sums += torch.stack([loss.double(), count.double()]).cpu()
        return loss / count.clamp(min=1), None, None

    # -- saving ---------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.staging) if self.staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint aside and rename it when it is whole, so that a stop at any point leaves the one before.

        Where processes have disks of their own, each machine renames its own part.
        """
        output_dir = Path(self.args.output_dir)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = output_dir / STAGING
        if self.args.local_process_index == 0:
            remove(staging)
            staging.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        self.staging = staging
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.staging = None
        if self.state.best_model_checkpoint == str(staging / name):
            self.state.best_model_checkpoint = str(output_dir / name)
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / TRAINER_STATE))
        if self.is_world_process_zero():
            write_run(staging / name, RUNNING, self.run_parts, self.run_config)
        self.accelerator.wait_for_everyone()
        for renames in (self.is_world_process_zero(), self.args.local_process_index == 0):
            if renames and (staging / name).is_dir():
                write_marker(staging / name)
                put_in_place(staging / name, output_dir / name)
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            keep_newest(output_dir, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        final = folder == Path(self.args.output_dir)  # else a checkpoint, which keeps what a resume needs
        written = folder / STAGING if final else folder
        if final:
            remove(written)
        model_config = self.accelerator.unwrap_model(self.model).config
        for name, value in self.model_token_ids.items():
            setattr(model_config, name, value)
        if final and self.finetuning_args.finetuning_type != "lora":
            state_dict = cast_weights(
                state_dict if state_dict is not None else self.model.state_dict(), self.save_dtype
            )
        super()._save(str(written), state_dict)
        open_to_readers(written)
        if self.finetuning_args.finetuning_type != "lora":
            restore_generation_config(self.source, written)
            if final:
                config_file = written / "config.json"
                saved = json.loads(config_file.read_text())
                config_file.write_text(json.dumps({**saved, "dtype": self.save_dtype}, indent=2) + "\n")
        (written / RUN_CONFIG).write_text(yaml.safe_dump(self.run_config, sort_keys=False))
        if final:
            for file in sorted(written.iterdir()):
                if file.is_dir():
                    remove(folder / file.name)
                os.replace(file, folder / file.name)
            remove(written)


def blocks_of(model_config: CoDAConfig, diffusion: DiffusionArguments, *, is_adapter: bool) -> Blocks | None:
    """How rows are noised by blocks; None for a model of full attention.

    Args:
        model_config: of the model; objective `joint` makes its context causal.
        diffusion: our settings.
        is_adapter: whether an adapter is trained, whose base keeps its configuration.

    Raises:
        UserError: the model's attention kernel knows no rules, or an adapter would need another configuration.
    """
    if not model_config.has_blocks:
        return None
    kernel = model_config._attn_implementation
    if kernel not in RULE_KERNELS:
        raise UserError(
            f"diffusion.objective {diffusion.objective!r} needs an attention kernel that knows who may attend to whom, "
            f"one of {', '.join(sorted(RULE_KERNELS))} (flash_attn: sdpa), got {kernel!r}"
        )
    if diffusion.objective == "joint" and is_adapter and not model_config.causal_context:
        raise UserError(
            "diffusion.objective 'joint' makes a causal context a fact of the model's configuration, which an adapter "
            "does not carry: tune all weights (finetuning_type: full), or take objective 'block'"
        )
    return blocks_to_train(
        model_config,
        complementary=diffusion.complementary,
        autoregressive_weight=diffusion.autoregressive_weight,
    )


def counted_tokens(noised: NoisedRows | DoubledRows, rows: curriculum.Rows) -> Tensor:
    """Tokens of each row that its loss is divided by, (B,) int64: those that could be masked, without the tail."""
    copies = len(noised.maskable) // len(rows.tail)  # 2 with complementary masks
    return (noised.maskable[::copies] & ~rows.tail).sum(dim=1)


def model_inputs(
    noised: NoisedRows | DoubledRows, present: Tensor, labels: Tensor, weights: Tensor
) -> dict[str, Tensor]:
    """What `compute_loss` is given of a noised batch.

    Args:
        noised: rows, with or without their clean copy.
        present: (B, T) bool, False at padding; what the Trainer counts tokens by.
        labels: those of `noised`, or fewer.
        weights: (B,) float32, weight of each row's summed cross-entropy; of rows by blocks their positions have their
            own beside it.
    """
    inputs = {"attention_mask": present.long(), "labels": labels}
    if isinstance(noised, NoisedRows):
        return {**inputs, "input_ids": noised.noised_ids, "loss_weights": weights}
    copies = len(labels) // len(weights)
    return {
        **inputs,
        "input_ids": noised.input_ids,
        "position_ids": noised.position_ids,
        "loss_weights": noised.weights * weights.repeat_interleave(copies)[:, None],
        **noised.visibility._asdict(),
    }


def source_dtype(source: str) -> str:
    """Precision of the weights that training starts from, as `config.json` has it; float32 if it does not say."""
    return str(CoDAConfig.from_pretrained(source).dtype or torch.float32).removeprefix("torch.")


def cast_weights(state_dict: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The same weights in another precision; tensors that share their memory still do."""
    cast: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    result = {}
    for name, weight in state_dict.items():
        if weight.is_floating_point():
            key = (weight.data_ptr(), tuple(weight.shape))
            if key not in cast:
                cast[key] = weight.detach().to(getattr(torch, dtype))
            result[name] = cast[key]
        else:
            result[name] = weight
    return result


def check_model(model_config: Any, tokenizer: Any, source: str) -> None:
    """Refuse a model or tokenizer that the objective cannot use.

    Raises:
        UserError: not a CoDA model, no such mask token, or no end or padding token.
    """
    if model_config.model_type != CoDAConfig.model_type:
        raise UserError(
            f"model_name_or_path={source!r} is a {model_config.model_type!r} model, not a CoDA one: "
            "convert it with save_hf_model.py first"
        )
    if model_config.mask_token_id >= len(tokenizer):
        raise UserError(
            f"the tokenizer of {source!r} has {len(tokenizer)} tokens and lacks the model's "
            f"mask_token_id={model_config.mask_token_id}: add the token with save_hf_model.py"
        )
    for name in ("eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is None:
            raise UserError(f"the tokenizer of {source!r} has no {name}")
