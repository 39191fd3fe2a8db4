"""A traced step, on the CPU: what it does with numbers that are not finite, with parts, and with other shapes."""

import copy

import numpy as np
import pytest
import torch

from coda_pretrain.config import OptimizerConfig
from coda_pretrain.devices.config import HardwareConfig
from coda_pretrain.devices.torch_backend import TorchBackend
from coda_pretrain.train.optim import build_optimizer, state_tensors
from coda_pretrain.train.step import StepFunctions
from CoDALanguageModel import CoDAConfig, CoDALanguageModel


class TracedOnCpu(TorchBackend):
    """Steps as the xla backend makes them, on the CPU. `graphs` is what it says it has compiled."""

    traces_steps = True
    graphs = 0

    def host_scalars(self, values):
        return [torch.tensor(value) for value in values]

    def clear_gradient(self, parameter):
        parameter.grad.zero_()

    def compile_count(self):
        return self.graphs


@pytest.fixture
def network():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    ids = {"mask_token_id": 3, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 2}
    # A configuration may ask for tuples: the step asks for names.
    return CoDALanguageModel(CoDAConfig(**sizes, **heads, **ids, return_dict=False)).train()


def batch_of(num_rows, seed, seq_len=12):
    rng = np.random.default_rng(seed)
    ids = rng.integers(4, 64, (num_rows, seq_len))
    masked = rng.random((num_rows, seq_len)) < 0.5
    masked[:, 0] = False
    return {
        "noised_ids": np.where(masked, 3, ids),
        "labels": np.where(masked, ids, -100),
        "loss_weights": np.full(num_rows, 0.1, dtype=np.float32),
        "position_ids": np.tile(np.arange(seq_len), (num_rows, 1)),
        "segment_ids": np.ones((num_rows, seq_len), dtype=np.int64),
    }


def built(model, backend=TracedOnCpu, ema_decay=None, **options):
    backend = backend(HardwareConfig())
    model = backend.prepare_model(model, z_loss=options.get("z_loss", 0.0))
    named = dict(model.named_parameters())
    config = OptimizerConfig(learning_rate=0.01, ema_decay=ema_decay, **options)
    optimizer = build_optimizer(config, named, backend)
    return StepFunctions(model, optimizer, max_grad_norm=1.0, ema_decay=ema_decay, backend=backend), named


def tensors_of(functions, named):
    tensors = {**named, **state_tensors(functions.optimizer, named)}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def halves(batch):
    return [{k: v[:2] for k, v in batch.items()}, {k: v[2:] for k, v in batch.items()}]


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
@pytest.mark.parametrize("split", [lambda batch: [batch], halves])
def test_a_traced_step_skips_itself_when_it_is_not_finite_and_equals_the_hosts_otherwise(network, name, split):
    reference, plain = built(copy.deepcopy(network), TorchBackend, name=name, ema_decay=0.9)
    functions, named = built(network, name=name, ema_decay=0.9)
    for number, spoiled in enumerate([False, True, False]):
        batch = batch_of(4, number)
        if spoiled:
            batch["loss_weights"] = batch["loss_weights"] * np.nan
        before = tensors_of(functions, named)
        count = 1 + (number == 2)
        results = [each.step(split(batch), learning_rate=0.01, count=count) for each in (functions, reference)]
        assert [result.is_finite for result in results] == [not spoiled] * 2
        after = tensors_of(functions, named)
        assert all(torch.equal(before[key], after[key]) for key in before) == spoiled
    for key, tensor in tensors_of(reference, plain).items():
        torch.testing.assert_close(after[key], tensor, rtol=1e-5, atol=1e-5)


def test_a_batch_of_another_shape_says_what_would_compile_again(network):
    functions, _ = built(network)
    functions.step([batch_of(4, 0)], learning_rate=0.01, count=1)
    message = (
        r"compile the train graph again, since it changes noised_ids from \[4, 12\] torch.int64 to \[4, 16\] torch"
    )
    with pytest.raises(ValueError, match=message):
        functions.step([batch_of(4, 0, seq_len=16)], learning_rate=0.01, count=2)
    functions.loss([batch_of(2, 0)])  # evaluation is a graph of its own
    with pytest.raises(ValueError, match="compile the evaluation graph again"):
        functions.loss([batch_of(4, 0)])


def test_a_compilation_after_the_first_step_is_reported(network, caplog):
    functions, _ = built(network)

    class Compiling(torch.nn.Module):
        def forward(self, *arguments, **inputs):
            functions._backend.graphs += 1
            return network(*arguments, **inputs)

    functions.step([batch_of(4, 0)], learning_rate=0.01, count=1)
    functions.model = Compiling()
    functions.step([batch_of(4, 1)], learning_rate=0.01, count=2)
    assert "compiled" not in caplog.text  # the first one is expected
    functions.step([batch_of(4, 1)], learning_rate=0.01, count=3)
    assert "update 3 compiled 1 more graph(s), although the batch has the shapes and types" in caplog.text


def test_z_loss_adds_the_square_of_the_log_of_the_sum(network):
    batch = batch_of(4, 0)
    plain, _ = built(copy.deepcopy(network))
    with torch.no_grad():
        arrays = {name: torch.from_numpy(batch[name]) for name in ("position_ids", "segment_ids")}
        logits = network(torch.from_numpy(batch["noised_ids"]), **arrays, return_dict=True).logits
        scored = torch.from_numpy(batch["labels"][:, 1:] != -100)
        extra = float((logits[:, :-1].logsumexp(-1).square() * scored).sum()) * 0.1 * 0.25
    functions, _ = built(network, z_loss=0.25)
    assert functions.loss([batch]) == pytest.approx(plain.loss([batch]) + extra, rel=1e-5)
