"""Command line: `python -m coda_posttrain train|export|get|identity`.

    train CONFIG.yaml [key=value ...]       fine-tune; `diffusion.` keys are ours, the others LLaMA-Factory's
    export CONFIG.yaml [key=value ...]      merge a LoRA adapter into a folder that loads by itself
    get KEY CONFIG.yaml [key=value ...]     print one setting, for scripts
    identity CONFIG.yaml [key=value ...]    print a hash of settings, model and data: what a run is made of

With several GPUs, or FORCE_TORCHRUN=1, training relaunches itself under torchrun. LLaMA-Factory's variables choose
the processes: NPROC_PER_NODE, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, MAX_RESTARTS, RDZV_ID.
"""

import hashlib
import json
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from CoDALanguageModel.errors import UserError, run_program

from .arguments import (
    PATHS,
    check_datasets,
    check_export,
    check_host_keys,
    check_model_folder,
    check_weights,
    load_config,
    run_parts,
    split_config,
)
from .checkpoints import is_finished, refuse_other_run, resolve_start

logger = logging.getLogger("coda_posttrain")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status, 2 for settings that cannot be used."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    commands = {"train": _train, "export": _export, "get": _get, "identity": _identity}
    if not argv or argv[0] not in commands or len(argv) < (3 if argv[0] == "get" else 2):
        print(__doc__)
        return 0 if argv in (["-h"], ["--help"]) else 2
    # With torch_xla installed, transformers would otherwise train on an XLA device. Read at its first import.
    os.environ.setdefault("USE_TORCH_XLA", "0")
    try:
        return commands[argv[0]](argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _train(argv: list[str]) -> int:
    config = load_config(argv[0], argv[1:])
    host, diffusion = split_config(config)
    check_host_keys(host)
    check_model_folder(host, diffusion)
    check_weights(host)
    check_datasets(host)
    if not host.get("output_dir"):
        raise UserError("output_dir is required: the folder for checkpoints and the trained model")
    parts = run_parts(host, diffusion) if host.get("do_train") and os.environ.get("RANK", "0") == "0" else {}
    if parts and not host.get("overwrite_output_dir") and is_finished(Path(host["output_dir"]), parts, config):
        logger.info("this run has already finished in %s; overwrite_output_dir=true repeats it", host["output_dir"])
        return 0
    host = resolve_start(host)
    if parts and host.get("resume_from_checkpoint"):
        refuse_other_run(Path(host["resume_from_checkpoint"]), parts, config, diffusion.accept_changes)
    if "TORCHELASTIC_RUN_ID" not in os.environ and "LOCAL_RANK" not in os.environ and _wants_processes():
        _relaunch(argv)
    if os.environ.get("RANK", "0") == "0":
        logger.info("settings: %s", json.dumps(config))
    from .trainer import run_training  # LLaMA-Factory takes seconds to import: settings are checked first

    run_training(host, diffusion, config, parts)
    return 0


def _export(argv: list[str]) -> int:
    host = load_config(argv[0], argv[1:])
    check_host_keys(host)
    check_model_folder(host)
    check_weights(host)
    check_export(host)
    from .trainer import run_export

    run_export(host)
    return 0


def _get(argv: list[str]) -> int:
    value = load_config(argv[1], argv[2:]).get(argv[0])
    print("" if value is None else value)
    return 0


def _identity(argv: list[str]) -> int:
    config = load_config(argv[0], argv[1:])
    host, diffusion = split_config(config)
    check_model_folder(host, diffusion)
    check_datasets(host)
    parts = run_parts(host, diffusion)
    # Where the model and the data lie and where the run goes is not what it is made of.
    settings = {key: value for key, value in config.items() if key not in PATHS}
    print(hashlib.blake2b(json.dumps([parts, settings], sort_keys=True).encode(), digest_size=16).hexdigest())
    return 0


def _wants_processes() -> bool:
    """Whether the run needs several processes: asked for, or more than one GPU."""
    if os.environ.get("FORCE_TORCHRUN", "0").lower() in ("1", "true", "y"):
        return True
    import torch

    return torch.accelerator.device_count() > 1


def _relaunch(argv: list[str]) -> NoReturn:
    """Run the same command under torchrun; LLaMA-Factory's own launcher would start its own trainer instead."""
    import torch

    environment = os.environ
    num_processes = environment.get("NPROC_PER_NODE", str(max(1, torch.accelerator.device_count())))
    num_nodes = environment.get("NNODES", "1")
    address, port = environment.get("MASTER_ADDR", "127.0.0.1"), environment.get("MASTER_PORT", str(_free_port()))
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_processes}"]
    command += [f"--log-dir={os.devnull}"]  # else it leaves a folder in TMPDIR; nothing is logged there
    command += [f"--max-restarts={environment.get('MAX_RESTARTS', '0')}"]
    if "RDZV_ID" in environment:
        if {"MIN_NNODES", "MAX_NNODES"} <= environment.keys():
            num_nodes = f"{environment['MIN_NNODES']}:{environment['MAX_NNODES']}"
        command += [f"--rdzv-id={environment['RDZV_ID']}", "--rdzv-backend=c10d", f"--rdzv-endpoint={address}:{port}"]
    else:
        command += [f"--node-rank={environment.get('NODE_RANK', '0')}"]
        command += [f"--master-addr={address}", f"--master-port={port}"]
    command += [f"--nnodes={num_nodes}", "-m", "coda_posttrain", "train", *argv]
    logger.info("starting %s processes: %s", num_processes, " ".join(command))
    sys.stdout.flush()
    os.execv(command[0], command)  # in the place of this process, so that a signal to it reaches them


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    run_program(main)
