import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from coda_pretrain.devices.chips import CHIPS, chip_of_gpu
from coda_pretrain.watch.flops import Work, forward_flops, training_flops, work_of_batch
from CoDALanguageModel import CoDAConfig, CoDALanguageModel
from CoDALanguageModel.attention_coda import block_starts, doubled, places
from CoDALanguageModel.noise import Blocks

SHAPE = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mask_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
}


def test_the_count_is_that_of_torch_for_whole_rows_and_masked_rows_of_the_head():
    config = CoDAConfig(**SHAPE, attn_implementation="eager")  # torch has no count for its fused kernel of the CPU
    model = CoDALanguageModel(config)
    rows, length = 3, 40
    ids = torch.randint(2, 320, (rows, length))
    segment_ids = torch.ones_like(ids)
    labels = torch.full_like(ids, -100)
    labels[:, 5:17] = ids[:, 5:17]
    with FlopCounterMode(display=False) as counter:
        model(ids, segment_ids=segment_ids, labels=labels, loss_weights=torch.ones(rows)).loss.backward()
    work = work_of_batch(segment_ids.numpy(), labels.numpy())
    assert work == Work(rows * length, rows * length**2, rows * 12)
    rotary = 2 * rows * length * 16 // 2  # the angles are a product too, of one inner dimension and without a gradient
    assert counter.get_total_flops() - rotary == training_flops(config, work)
    assert (
        forward_flops(config, work)["head"] == counter.get_flop_counts()["CoDALanguageModel.lm_head"][torch.ops.aten.mm]
    )


def test_documents_attend_to_themselves_and_padding_is_no_work():
    segment_ids = np.array([[1, 1, 1, 2, 2, 0], [1, 2, 3, 4, 5, 6]])
    labels = np.array([[-100, 7, -100, -100, 7, -100], [-100] * 6])
    assert work_of_batch(segment_ids, labels) == Work(5 + 6, 9 + 4 + 6, 2)


def test_by_blocks_every_pair_that_may_attend_is_counted_once():
    halves = torch.tensor([[1] * 7 + [2] * 4 + [0], [1] * 12])
    place = places(halves)
    for blocks in (Blocks(4), Blocks(4, True, 0.5), Blocks(1), Blocks(16)):
        rule = doubled(halves, place, block_starts(place, blocks.size), causal_context=blocks.is_joint)
        labels = torch.full_like(rule.segment, -100)
        labels[:, 3] = 7
        real = rule.segment > 0
        pairs = int((rule.mask()[:, 0] & real[:, :, None] & real[:, None]).sum())
        assert work_of_batch(rule.segment.numpy(), labels.numpy(), blocks) == Work(2 * 23, pairs, 2)


def test_the_published_model_needs_six_operations_a_weight_and_twelve_a_pair():
    config = CoDAConfig()
    layers = 28 * 2048 * (2 * 2048 + 2 * 1024 + 3 * 6144)
    assert training_flops(config, Work(1, 0, 0)) == 6 * layers
    assert training_flops(config, Work(0, 1, 0)) == 12 * 28 * 2048
    assert training_flops(config, Work(0, 0, 1)) == 6 * 2048 * 151_936


def test_peaks_are_those_of_the_vendors():
    peaks = {"v4": 275, "v5e": 197, "v5p": 459, "v6e": 918, "A100": 312, "H100": 989, "H200": 989}
    assert {name: chip.peak_tflops for name, chip in CHIPS.items()} == peaks


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA L4", None),
    ],
)
def test_a_gpu_is_known_by_its_name_unless_its_board_is_slower(name, chip):
    assert chip_of_gpu(name) == chip
