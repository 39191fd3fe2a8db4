"""Two processes whose rows have unlike numbers of labels train alike, however weights are sharded over them.

A collective that one process calls more often than the other never returns, so the processes have a deadline. All
strategies run in one launch; each test reads what one of them gave.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from CoDALanguageModel import CoDAConfig, CoDALanguageModel, diffusion

REPO = Path(__file__).resolve().parents[2]
LABELS = [[11, 5], [0, 9], [9, 0]]
"""Labelled positions of each process, step by step: 3 and 2 chunks, then none and 3, then 3 and none."""
CHUNK_ROWS = 4
SHAPE = {
    "vocab_size": 72,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "bos_token_id": 64,
    "eos_token_id": 65,
    "pad_token_id": 66,
    "mask_token_id": 67,
    "num_token_ids": 68,
}
DEEPSPEED = Path(sys.prefix) / "deepspeed"
"""Where test.sh installs it."""
STRATEGIES = ["fsdp", "fsdp2", "zero2", "zero3"]
HEADS = ["own", "tied", "lora", "frozen"]
"""`lora`: an adapter on the head itself; `frozen`: one on the layers only."""
LEARNING_RATE = 0.01
CASES = [(strategy, head) for strategy in STRATEGIES for head in (HEADS[:1] if strategy == "zero2" else HEADS)]
SECONDS = 240


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """Train in two processes, with every strategy and head; results are kept up to a deadlock."""
    folder = tmp_path_factory.mktemp("sharded")
    environment = {**os.environ, "PYTHONPATH": f"{REPO}:{DEEPSPEED}", "DS_ACCELERATOR": "cpu", "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=(folder / f"log-{rank}").open("w"), stderr=subprocess.STDOUT,
        )
        for rank in range(2)
    ]  # fmt: skip
    deadline = time.monotonic() + SECONDS
    try:
        for process in processes:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # the tests of what did not finish fail
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return folder


@pytest.mark.parametrize(("strategy", "head"), CASES)
def test_unlike_numbers_of_labels_give_the_losses_and_weights_of_ddp(strategy, head, results):
    if strategy.startswith("zero") and not DEEPSPEED.is_dir():
        pytest.skip(f"no DeepSpeed in {DEEPSPEED}: test.sh installs it")
    for rank in range(2):
        want, got = (results / f"{name}-{head}-{rank}.json" for name in ("ddp", strategy))
        assert got.exists(), f"{strategy} did not finish: {(results / f'log-{rank}').read_text()[-3000:]}"
        want, got = json.loads(want.read_text()), json.loads(got.read_text())
        assert got["losses"] == pytest.approx(want["losses"], rel=1e-5)
        assert torch.allclose(torch.tensor(got["weights"]), torch.tensor(want["weights"]), rtol=1e-5, atol=1e-6)


def test_layers_shared_out_by_the_plan_of_the_configuration_score_as_one(results):
    for rank in range(2):
        file = results / f"tensor-parallel-{rank}.pt"
        assert file.exists(), f"it did not finish: {(results / f'log-{rank}').read_text()[-3000:]}"
        seen = torch.load(file)
        assert seen["local"] == [32, 32]  # half of 4 heads of 16
        torch.testing.assert_close(seen["logits"], seen["whole"])
        torch.testing.assert_close(seen["loss"], seen["whole_loss"])


# ---- what each process does


def built(head: str) -> nn.Module:
    torch.manual_seed(0)
    model = CoDALanguageModel(CoDAConfig(**SHAPE, initializer_range=0.3, tie_word_embeddings=head == "tied"))
    if head in ("lora", "frozen"):
        from peft import LoraConfig, get_peft_model

        adapted = ["lm_head"] if head == "lora" else ["q_proj"]
        model = get_peft_model(model, LoraConfig(r=2, target_modules=adapted, init_lora_weights=False))
    return model


def batch(step: int, rank: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(64, (2, 10), generator=torch.Generator().manual_seed(10 * step + rank))
    count = LABELS[step][rank]
    labels = torch.full_like(ids, -100)
    scored = torch.zeros(18, dtype=torch.bool)
    scored[torch.randperm(18, generator=torch.Generator().manual_seed(step))[:count]] = True
    scored = torch.cat([torch.zeros(2, 1, dtype=torch.bool), scored.view(2, 9)], dim=1)
    return {
        "input_ids": ids.masked_fill(scored, 67),
        "labels": labels.where(~scored, ids),
        "loss_weights": torch.tensor([0.1, 0.3]),
    }


def trained(strategy: str, head: str, rank: int) -> dict[str, object]:
    """Losses of this process step by step, and the weights after the last one."""
    model = built(head)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE)
    layers = [m for m in model.modules() if type(m).__name__ == "CoDALayer"]
    engine = None
    if strategy == "ddp":
        run = nn.parallel.DistributedDataParallel(model)
    elif strategy == "fsdp":
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import CustomPolicy

        units = layers if head == "tied" else [*layers, head_of(model)]
        policy = CustomPolicy(lambda module: module in units)
        run = FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=True, device_id=torch.device("cpu")
        )
        optimizer = torch.optim.SGD([p for p in run.parameters() if p.requires_grad], lr=LEARNING_RATE)
    elif strategy == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        for unit in layers if head == "tied" else [*layers, head_of(model)]:
            fully_shard(unit)
        run = fully_shard(model)
        optimizer = torch.optim.SGD([p for p in run.parameters() if p.requires_grad], lr=LEARNING_RATE)
    else:
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo alone: the other would be compiled here
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": int(strategy[-1]), "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        run = engine
    losses = []
    for step in range(len(LABELS)):
        loss = run(**batch(step, rank)).loss
        losses.append(loss.item())
        if engine is not None:
            engine.backward(loss)
            engine.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return {"losses": losses, "weights": weights(run, model, strategy)}


def head_of(model: nn.Module) -> nn.Module:
    return model.get_base_model().lm_head if hasattr(model, "get_base_model") else model.lm_head


def weights(run: nn.Module, model: nn.Module, strategy: str) -> list[list[float]]:
    """Mean and size of every trained weight."""
    if strategy == "zero3":
        import deepspeed

        rows = []  # one by one: of several gathers DeepSpeed waits for the last alone, and gloo finishes in any order
        for parameter in model.parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                rows.append([parameter.double().mean().item(), parameter.double().norm().item()])
        return rows
    if strategy == "fsdp":
        from torch.distributed.fsdp import FullyShardedDataParallel

        with FullyShardedDataParallel.summon_full_params(run):
            return summary(run)
    return summary(model)


def summary(model: nn.Module) -> list[list[float]]:
    full = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return [[p.double().mean().item(), p.double().norm().item()] for p in full]


def work(rank: int, folder: Path) -> None:
    """Every strategy in turn, results written as they come."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    diffusion.LOSS_CHUNK_ELEMENTS = CHUNK_ROWS * SHAPE["vocab_size"]
    for strategy, head in [("ddp", head) for head in HEADS] + CASES:
        if strategy.startswith("zero") and not DEEPSPEED.is_dir():
            continue
        result = trained(strategy, head, rank)
        (folder / f"{strategy}-{head}-{rank}.json").write_text(json.dumps(result))
    share_out_layers(rank, folder)
    dist.barrier()


def share_out_layers(rank: int, folder: Path) -> None:
    """Load a model with its layers shared out, and score with it and with the whole one."""
    whole, inputs = built("own").eval(), batch(0, 0)
    if rank == 0:
        whole.save_pretrained(folder / "model")
    dist.barrier()
    shared = CoDALanguageModel.from_pretrained(folder / "model", tp_plan="auto").eval()
    ids = {"input_ids": inputs["input_ids"]}
    with torch.no_grad():
        seen = {
            "logits": shared(**ids).logits,
            "whole": whole(**ids).logits,
            "loss": shared(**inputs).loss,
            "whole_loss": whole(**inputs).loss,
        }
    weight = shared.model.layers[0].self_attn.q_proj.weight
    seen["local"] = list((weight.to_local() if hasattr(weight, "to_local") else weight).shape)
    torch.save(seen, folder / f"tensor-parallel-{rank}.pt")


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
