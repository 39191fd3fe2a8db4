"""Attention that widens from causal to full."""

import pytest
import torch

from coda_pretrain.config import RunConfig
from coda_pretrain.plain_data import from_dict, merge
from coda_pretrain.train.annealing import visible_ahead, widened_mask
from coda_pretrain.train.trainer import Trainer
from coda_pretrain.watch.metrics import read_rows


def trained(tmp_path, run_config, name, **model):
    config = merge(run_config, {"model": model, "output_dir": str(tmp_path / name), "micro_batch_size": 4})
    trainer = Trainer(from_dict(RunConfig, config))
    trainer.train()
    trainer.close()
    return trainer, read_rows(tmp_path / name / "metrics.jsonl")


def test_attention_is_causal_at_first_full_at_last_and_never_crosses_segments():
    segments = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [1] * 7])
    same = segments[:, None, :, None] == segments[:, None, None, :]
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    assert torch.equal(widened_mask(segments, torch.tensor([0, 0])), same & causal)
    assert torch.equal(widened_mask(segments, torch.tensor([7, 6])), same)
    two = widened_mask(segments, torch.tensor([0, 2]))[1, 0]
    assert two.sum(dim=1).tolist() == [3, 4, 5, 6, 7, 7, 7]


def test_the_window_grows_linearly_and_then_goes():
    assert [visible_ahead(step, num_steps=4, seq_len=32) for step in range(6)] == [0, 8, 16, 24, None, None]
    assert visible_ahead(0, num_steps=None, seq_len=32) is None


def test_a_run_widens_step_by_step_whatever_its_parts_and_kernel(tmp_path, run_config):
    _, rows = trained(tmp_path, run_config, "sdpa", attention_annealing_steps=4)
    assert [row.get("visible_ahead") for row in rows] == [0, 8, 16, 24, None, None]
    _, eager = trained(tmp_path, run_config, "eager", attention_annealing_steps=4, attn_implementation="eager")
    assert [row["loss"] for row in eager] == pytest.approx([row["loss"] for row in rows], abs=1e-5)
    full, other = trained(tmp_path, run_config, "full")
    assert rows[0]["loss"] != pytest.approx(other[0]["loss"], abs=1e-5)
    first = full.batches.make(0)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(array) for name, array in first.items()}
        causal = widened_mask(tensors["segment_ids"], torch.zeros(8, dtype=torch.long))
        start = Trainer(from_dict(RunConfig, merge(run_config, {"output_dir": str(tmp_path / "start")})))
        names = ("labels", "loss_weights", "position_ids")
        inputs = {name: tensors[name] for name in names}
        loss = start.functions.model(tensors["noised_ids"], attention_mask=causal, **inputs).loss
        start.close()
    assert float(loss) == pytest.approx(rows[0]["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"attention_annealing_steps": 0}}, "model.attention_annealing_steps must be >= 1, got 0"),
        (
            {"model": {"attention_annealing_steps": 4}, "hardware": {"backend": "xla"}},
            "needs model.attn_implementation sdpa or eager on hardware.backend cpu or cuda.* got 'sdpa' on 'xla'",
        ),
        (
            {
                "model": {"attention_annealing_steps": 4, "attn_implementation": "flex_attention"},
                "hardware": {"backend": "cuda", "compile": True},
            },
            "needs model.attn_implementation sdpa or eager .* got 'flex_attention' on 'cuda'",
        ),
        (
            {
                "model": {"attention_annealing_steps": 4, "attn_implementation": "flash_attention_2"},
                "hardware": {"backend": "cuda", "precision": "bf16"},
            },
            "needs model.attn_implementation sdpa or eager .* got 'flash_attention_2' on 'cuda'",
        ),
    ],
)
def test_where_the_kernel_sees_only_segments_it_is_refused(run_config, changes, message):
    with pytest.raises(ValueError, match=message):
        from_dict(RunConfig, merge(run_config, changes))
