"""`python -m coda_pretrain plan --config FILE --device v5p-64`: memory, speed and days of a run before it is rented.

Everything is computed from the configuration and tables; nothing is measured. The speed is what `--mfu` assumes.
"""

import argparse
import copy
import dataclasses
import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from CoDALanguageModel.errors import UserError

from ..config import RunConfig, read_settings
from ..devices.chips import CHIPS
from ..devices.config import HardwareConfig
from ..noise.strategies import MaskingConfig
from ..plain_data import from_dict, merge
from ..watch.flops import BlockShape, Work, doubled_pairs, forward_flops, training_flops
from .compilation import GIB, compile_step, print_compilation

logger = logging.getLogger(__name__)

UNNAMED = "not named"
PLACEHOLDERS = {"output_dir": UNNAMED, "model": {"tokenizer": UNNAMED}}
"""Settings that a run needs and a plan does not."""

TPU_UNITS = {"v4": 2, "v5p": 2, "v5e": 1, "v5litepod": 1, "v6e": 1}
"""What a chip adds to the number in the name of a slice: v4 and v5p count cores, of which a chip has two."""

NO_IDS = {"mask_token_id": 0, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
"""A network costs the same whatever its special tokens are; a configuration has a mask token."""

DEFAULT_MFU = 0.4
DATA_ROWS = 32  # read to learn how long documents are


class Device(NamedTuple):
    """A machine that can be rented."""

    name: str
    chip: str
    chips: int


def parse_device(name: str) -> Device:
    """Read `v5p-64` (a TPU slice as its vendor names it) or `8xH100`.

    Raises:
        UserError: another form, an unknown chip, or a slice of less than a chip.
    """
    known = f"TPU slices {', '.join(f'{n}-N' for n in TPU_UNITS)}; GPUs NxA100, NxH100, NxH200"
    tpu, gpu = re.fullmatch(r"(v\w+)-(\d+)", name), re.fullmatch(r"(\d+)x(\w+)", name)
    if tpu and tpu[1] in TPU_UNITS:
        chips, rest = divmod(int(tpu[2]), TPU_UNITS[tpu[1]])
        if chips and not rest:
            return Device(name, {"v5litepod": "v5e"}.get(tpu[1], tpu[1]), chips)
    elif gpu and gpu[2] in CHIPS and CHIPS[gpu[2]].kind == "gpu" and int(gpu[1]):
        return Device(name, gpu[2], int(gpu[1]))
    raise UserError(f"--device must be one of {known}, got {name!r}")


def device_of_config(hardware: HardwareConfig) -> Device:
    """The machine that `hardware` describes.

    Raises:
        UserError: it names no chip, or leaves the number of devices open.
    """
    sizes = (hardware.mesh.data, hardware.mesh.fsdp, hardware.mesh.tensor)
    if hardware.chip is None or -1 in sizes:
        raise UserError(
            "the configuration must name hardware.chip and every size of hardware.mesh, or --device the machine; "
            f"got chip {hardware.chip!r} and mesh {sizes}"
        )
    return Device(f"{int(np.prod(sizes))} x {hardware.chip}", hardware.chip, int(np.prod(sizes)))


class RowWork(NamedTuple):
    """What an average row asks of the network, and how that is known."""

    work: Work
    masked_share: float
    source: str


def expected_row(config: RunConfig, document_tokens: int | None, blocks: BlockShape | None = None) -> RowWork:
    """The work of an average row of data: from `document_tokens`, else from rows of it, else one document a row.

    By blocks it is the work of the doubled row, or of both with complementary masks, with the blocks that a run ends
    with.
    """
    length = config.seq_len

    def pairs_of(document: int) -> float:
        return float(document**2 if blocks is None else doubled_pairs(document, blocks))

    pairs, source = pairs_of(length), "one document per row (the data cannot be read)"
    if document_tokens is not None:
        document = min(document_tokens, length)
        pairs, source = length / document * pairs_of(document), f"documents of {document_tokens} tokens"
    else:
        try:
            pairs = _pairs_of_data(config, pairs_of)
            source = f"documents as in {DATA_ROWS} rows of the data"
        except (OSError, UserError) as error:
            logger.info("the data cannot be read: %s", error)
    prefix, truncate = _mean_strategies(config.masking)
    maskable = 1 - prefix / 2 - truncate / 2
    level = 1.0 if blocks is not None and blocks.size == 1 else (1 + config.masking.t_min) / 2
    masked = maskable * (0.5 if config.blocks.complementary else level)
    copies = 2 if config.by_blocks else 1
    scored = masked + (maskable if config.objective == "joint" else 0.0)
    work = Work(copies * length * (1 - truncate / 2), pairs * (1 - truncate * 2 / 3), length * scored)
    return RowWork(work.scaled(config.rows_per_sample), masked, source)


def _pairs_of_data(config: RunConfig, pairs_of: Callable[[int], float]) -> float:
    from ..data.mixture import Mixture

    mixture = Mixture(config.data, seq_len=config.seq_len, seed=config.seed)
    rows = [mixture.sample(i).segment_ids for i in range(min(DATA_ROWS, mixture.num_samples))]
    return sum(pairs_of(int(length)) for row in rows for length in np.bincount(row)[1:]) / len(rows)


def _mean_strategies(masking: MaskingConfig) -> tuple[float, float]:
    """(S1, S2) on average over a run that gives each epoch of its schedule the same number of steps."""
    epochs = max(len(masking.per_epoch), 1)
    points = [masking.at((i + 0.5) / (8 * epochs), i // 8) for i in range(8 * epochs)]
    return float(np.mean([p.prefix for p in points])), float(np.mean([p.truncate for p in points]))


def number_of_tokens(config: RunConfig) -> int:
    """Positions of the whole run.

    Raises:
        UserError: the run is as long as its data, which cannot be read.
    """
    from ..data.mixture import Mixture

    if config.max_steps is not None:
        return config.max_steps * config.global_batch_size * config.seq_len
    assert config.num_epochs is not None, "RunConfig holds max_steps or num_epochs"
    samples = config.data.epoch_samples
    if samples is None:
        samples = Mixture(config.data, seq_len=config.seq_len, seed=config.seed).num_samples
    return int(config.num_epochs * samples / config.global_batch_size) * config.global_batch_size * config.seq_len


def model_shape(config: RunConfig) -> tuple[Any, str]:
    """The `CoDAConfig` of the run and where it comes from; folders that are not here fall back to the published one.

    Raises:
        UserError: the fields or the folder do not describe a model.
    """
    from transformers import AutoConfig

    from CoDALanguageModel import CoDAConfig
    from CoDALanguageModel.config_fields import check_fields
    from CoDALanguageModel.configuration_coda import reading_config
    from CoDALanguageModel.conversion import coda_config_of
    from CoDALanguageModel.run_files import read_json

    from ..train.start import change_facts, coda_config, load_tokenizer_folder

    model = config.model
    if model.config is not None:
        if Path(model.tokenizer).is_dir():
            return coda_config(model.config, load_tokenizer_folder(model.tokenizer)), "model.config"
        return CoDAConfig(**{**model.config, **NO_IDS}), "model.config (no tokenizer here: its vocab_size as given)"
    shape, source = CoDAConfig(), "the published 1.7B model (no model.init_from here)"
    if (Path(model.init_from or "") / "config.json").is_file():
        source = f"model.init_from {model.init_from}"
        check_fields(read_json(Path(model.init_from, "config.json")))
        with reading_config():
            own = AutoConfig.from_pretrained(model.init_from)
        shape = own if isinstance(own, CoDAConfig) else CoDAConfig(**{**coda_config_of(own), **NO_IDS})
    change_facts(shape, model.changed_facts)
    return shape, source


def make_plan(
    config: RunConfig, device: Device, *, mfu: float = DEFAULT_MFU, document_tokens: int | None = None
) -> dict[str, Any]:
    """The plan as plain data; sizes in bytes, rates per second.

    Raises:
        UserError: the mesh, the rows or the model do not fit the machine.
    """
    from ..train.start import blocks_of
    from .memory import memory_per_chip

    shape, shape_source = model_shape(config)
    blocks = blocks_of(config, shape)
    try:
        mesh = config.hardware.mesh.shape(device.chips)
    except UserError as error:
        raise UserError(f"{error}; hardware.mesh.data=1 hardware.mesh.fsdp=-1 would fit {device.name}") from error
    row = expected_row(config, document_tokens, blocks)
    memory = {}
    for name, remat in (("remat", True), ("no_remat", False)):
        changed = dataclasses.replace(config, hardware=dataclasses.replace(config.hardware, remat=remat))
        parts = memory_per_chip(changed, shape, mesh, masked_share=row.masked_share)
        memory[name] = {**parts._asdict(), "total": parts.total}
    configured = "remat" if config.hardware.remat else "no_remat"
    step_flops = training_flops(shape, row.work.scaled(config.global_batch_size))
    peak_tflops = config.hardware.peak_tflops or CHIPS[device.chip].peak_tflops
    step_s = step_flops / (mfu * peak_tflops * 1e12 * device.chips)
    step_tokens, tokens = config.global_batch_size * config.seq_len, number_of_tokens(config)
    capacity = int(CHIPS[device.chip].memory_gib * GIB)
    return {
        "device": device.name,
        "chip": device.chip,
        "chips": device.chips,
        "mesh": dict(zip(("data", "fsdp", "tensor"), mesh, strict=True)),
        "model": shape_source,
        "documents": row.source,
        "precision": config.hardware.precision,
        "optimizer": config.optimizer.name,
        "micro_batches": config.global_batch_size // config.rows_per_micro_batch,
        "objective": config.objective,
        "block_size": None if blocks is None else blocks.size,
        "row_length": config.seq_len * (2 if config.by_blocks else 1),
        "rows_at_a_time": config.rows_per_micro_batch * config.rows_per_sample // (mesh[0] * mesh[1]),
        "memory": memory,
        "configured": configured,
        "memory_of_chip": capacity,
        "fits": memory[configured]["total"] <= capacity,
        "flops_per_step": step_flops,
        "flops_share": _shares(forward_flops(shape, row.work)),
        "peak_tflops_per_chip": peak_tflops,
        "assumed_mfu": mfu,
        "step_s": step_s,
        "tokens_per_s": step_tokens / step_s,
        "tokens": tokens,
        "steps": tokens // step_tokens,
        "days": tokens / step_tokens * step_s / 86400,
    }


def _shares(parts: dict[str, float]) -> dict[str, float]:
    return {name: value / sum(parts.values()) for name, value in parts.items()}


def print_plan(plan: dict[str, Any], console: Console) -> None:
    """Show a plan as two tables."""
    mesh = " x ".join(f"{name} {size}" for name, size in plan["mesh"].items())
    table = Table(title=f"Memory per chip, GiB: {plan['device']}, {plan['precision']}, {plan['optimizer']}")
    table.add_column("")
    columns = {"remat": "with remat", "no_remat": "without"}
    for name, title in columns.items():
        table.add_column(title + (" (configured)" if name == plan["configured"] else ""), justify="right")
    for part in plan["memory"]["remat"]:
        values = [plan["memory"][name][part] for name in columns]
        if isinstance(values[0], dict):
            for state in values[0]:
                table.add_row(f"optimizer: {state}", *(f"{value[state] / GIB:.2f}" for value in values))
        else:
            style = "bold" if part == "total" else None
            table.add_row(part.replace("_", " "), *(f"{value / GIB:.2f}" for value in values), style=style)
    room = [(plan["memory_of_chip"] - plan["memory"][name]["total"]) / GIB for name in columns]
    table.add_row(
        f"of {plan['memory_of_chip'] / GIB:.0f} GiB",
        *(f"[green]{free:.2f} left[/]" if free >= 0 else f"[red]{-free:.2f} too much[/]" for free in room),
    )
    console.print(table)
    speed = Table(title="The run", show_header=False)
    shares = ", ".join(f"{name} {share:.0%}" for name, share in plan["flops_share"].items())
    tensor = plan["mesh"]["tensor"]
    together = "chip" if tensor == 1 else f"{tensor} chips"
    for name, value in {
        "model": plan["model"],
        "mesh": f"{mesh} = {plan['chips']} chips of {plan['chip']}",
        "objective": plan["objective"] + (f", blocks of {plan['block_size']}" if plan["block_size"] else ""),
        "rows": f"{plan['rows_at_a_time']:g} of {plan['row_length']} positions per {together} at a time, "
        f"{plan['micro_batches']} parts per step",
        "work": f"{plan['flops_per_step']:.3g} operations per step ({shares}); {plan['documents']}",
        "assumed MFU": f"{plan['assumed_mfu']:.0%} of {plan['peak_tflops_per_chip']:g} TFLOP/s per chip (--mfu)",
        "speed": f"{plan['tokens_per_s']:,.0f} tokens/s, {plan['step_s']:.2f} s per step",
        "length": f"{plan['steps']:,} steps, {plan['tokens'] / 1e9:,.2f} B tokens",
        "days": f"[bold]{plan['days']:.2f}[/]",
    }.items():
        speed.add_row(name, value)
    console.print(speed)
    console.print("Memory is that of eager torch; a compiler needs less. Nothing here is measured.", highlight=False)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m coda_pretrain plan", description=__doc__.splitlines()[0])
    parser.add_argument("--config", action="append", required=True, help="YAML file; several are merged in order")
    parser.add_argument("--device", help="such as v5p-64 or 8xH100; by default that of the configuration")
    parser.add_argument("--mfu", type=float, default=DEFAULT_MFU, help="assumed MFU (default: %(default)s)")
    parser.add_argument("--document_tokens", type=int, help="average length of a document; by default read from data")
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="also compile the step for the mesh on virtual devices, without running it, and print XLA's memory report",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the files")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the command line.

    Returns:
        0; 2 for bad input, whose message is the last line on stderr.
    """
    arguments = build_parser().parse_intermixed_args(argv)
    try:
        if not 0 < arguments.mfu <= 1:
            raise UserError(f"--mfu must be in (0, 1], got {arguments.mfu}")
        settings = merge(copy.deepcopy(PLACEHOLDERS), read_settings(arguments.config, arguments.overrides))
        if not {"init_from", "config"} & settings["model"].keys():
            settings["model"]["init_from"] = UNNAMED
        config = from_dict(RunConfig, settings)
        device = device_of_config(config.hardware) if arguments.device is None else parse_device(arguments.device)
        plan = make_plan(config, device, mfu=arguments.mfu, document_tokens=arguments.document_tokens)
        if arguments.compile_only:
            plan["compiled"] = compile_step(config, model_shape(config)[0].to_dict(), device.chips)
    except UserError as error:
        sys.stderr.write(f"coda_pretrain plan: error: {error}\n")
        return 2
    if arguments.json:
        print(json.dumps(plan, indent=2))
    else:
        print_plan(plan, Console())
        if arguments.compile_only:
            print_compilation(plan["compiled"], Console())
    return 0
