"""The log of a run."""

from types import SimpleNamespace

import pytest

from coda_posttrain.metrics import MetricsLog, TrainingDiverged
from CoDALanguageModel.run_files import read_rows


def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_averaged_away(tmp_path):
    arguments = SimpleNamespace(output_dir=str(tmp_path), logging_nan_inf_filter=True)
    state = SimpleNamespace(global_step=0, num_input_tokens_seen=0, is_world_process_zero=True)
    log = MetricsLog()
    log.on_train_begin(arguments, state, None)
    assert arguments.logging_nan_inf_filter is False
    state.global_step = 1
    log.on_log(arguments, state, None, {"loss": 2.0})
    for loss in (float("nan"), float("inf")):
        with pytest.raises(TrainingDiverged, match=f"the loss up to step 1 is {loss}: the run has diverged"):
            log.on_log(arguments, state, None, {"loss": loss})
    assert [line["loss"] for line in read_rows(tmp_path / "metrics.jsonl")] == [2.0]
