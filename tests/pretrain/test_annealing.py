"""Attention that widens from causal to full."""

import pytest
import torch

from coda_pretrain.config import RunConfig
from coda_pretrain.plain_data import from_dict, merge
from coda_pretrain.train.annealing import visible_ahead
from coda_pretrain.train.trainer import Trainer
from coda_pretrain.watch.metrics import read_rows
from CoDALanguageModel.attention_coda import causal


def trained(tmp_path, run_config, name, **model):
    config = merge(run_config, {"model": model, "output_dir": str(tmp_path / name), "micro_batch_size": 4})
    trainer = Trainer(from_dict(RunConfig, config))
    trainer.train()
    trainer.close()
    return trainer, read_rows(tmp_path / name / "metrics.jsonl")


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
        mask = causal(tensors["segment_ids"]).mask()
        start = Trainer(from_dict(RunConfig, merge(run_config, {"output_dir": str(tmp_path / "start")})))
        names = ("labels", "loss_weights", "position_ids")
        inputs = {name: tensors[name] for name in names}
        loss = start.functions.model(tensors["noised_ids"], attention_mask=mask, **inputs).loss
        start.close()
    assert float(loss) == pytest.approx(rows[0]["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"attention_annealing_steps": 0}}, "model.attention_annealing_steps must be >= 1, got 0"),
        (
            {
                "model": {"attention_annealing_steps": 4, "attn_implementation": "splash"},
                "hardware": {"backend": "xla"},
            },
            "needs model.attn_implementation sdpa, eager or flex_attention: 'splash' knows segments alone",
        ),
        (
            {
                "model": {"attention_annealing_steps": 4, "attn_implementation": "flash_attention_2"},
                "hardware": {"backend": "cuda", "precision": "bf16"},
            },
            "needs model.attn_implementation sdpa, eager or flex_attention: 'flash_attention_2' knows segments alone",
        ),
    ],
)
def test_where_the_kernel_sees_only_segments_it_is_refused(run_config, changes, message):
    with pytest.raises(ValueError, match=message):
        from_dict(RunConfig, merge(run_config, changes))
