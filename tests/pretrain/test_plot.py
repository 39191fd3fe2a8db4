import json
from pathlib import Path

import numpy as np
import pytest

from coda_pretrain.__main__ import main
from coda_pretrain.config import RunConfig
from coda_pretrain.plain_data import from_dict, merge
from coda_pretrain.train.trainer import Trainer

pytest.importorskip("matplotlib")
from coda_pretrain.watch.plot import CLEAN, MASKED, PADDING, series, states_of_rows


def test_a_run_is_drawn_with_its_loss_by_level_its_utilization_and_masks(tmp_path, run_config, shards_dir, capsys):
    held_out = {"every": 2, "batches": 2, "data": {"sources": [{"path": str(shards_dir / "validation")}]}}
    config = merge(run_config, {"evaluation": held_out, "hardware": {"peak_tflops": 1.0}})
    trainer = Trainer(from_dict(RunConfig, config))
    trainer.train()
    trainer.close()
    run = config["output_dir"]
    assert main(["plot", run]) == 0
    assert (Path(run) / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = tmp_path / "page.html"
    assert main(["plot", run, "--output", str(page)]) == 0
    assert page.read_text().count("<svg") == 1
    assert capsys.readouterr().out.splitlines() == [f"{run}/curves.png", str(page)]


def test_a_picture_needs_a_run_and_a_known_format(tmp_path, capsys):
    assert main(["plot", str(tmp_path)]) == 2
    assert "RUN must be the output_dir of a run" in capsys.readouterr().err
    assert main(["plot", str(tmp_path), "--output", "x.pdf"]) == 2
    assert "--output must end in .png, .svg, .html, got 'x.pdf'" in capsys.readouterr().err


def test_the_masks_shown_are_those_of_the_strategies(run_config):
    config = from_dict(RunConfig, run_config)
    plain = states_of_rows(config, {})
    assert (plain == MASKED).mean(axis=1)[-3:].mean() > (plain == MASKED).mean(axis=1)[:3].mean() + 0.4
    assert set(np.unique(plain)) <= {CLEAN, MASKED, PADDING}
    truncated = states_of_rows(config, {"truncate_probability": 1.0})
    assert (truncated[:, -1] == PADDING).all()
    prefixed = states_of_rows(config, {"prefix_probability": 1.0})
    assert (prefixed == MASKED).mean() < (plain == MASKED).mean()
    by_blocks = states_of_rows(config, {}, 8)
    assert by_blocks.shape == plain.shape
    assert ((by_blocks == PADDING) == (plain == PADDING)).all()
    masked = (by_blocks == MASKED).mean(axis=1)  # each row has levels of all kinds
    assert masked.max() < (plain == MASKED).mean(axis=1).max()


def test_unknown_numbers_are_left_out_of_a_curve():
    rows = [json.loads(line) for line in ('{"step": 1, "mfu": null}', '{"step": 2, "mfu": 0.5}', '{"step": 3}')]
    steps, values = series(rows, "mfu")
    assert (steps.tolist(), values.tolist()) == ([2], [0.5])
