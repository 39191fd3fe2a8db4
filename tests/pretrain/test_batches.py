"""Batches: the same rows and noise for any number of readers, and each strategy as often as it is asked for."""

from pathlib import Path

import numpy as np
import pytest

from coda_pretrain.config import RunConfig, load_config
from coda_pretrain.data.mixture import Mixture
from coda_pretrain.noise.masking import TokenFacts
from coda_pretrain.noise.strategies import MaskingConfig
from coda_pretrain.plain_data import from_dict, merge
from coda_pretrain.train.batches import Batches
from CoDALanguageModel import noise
from CoDALanguageModel.noise import deal_levels

MIDTRAIN = Path(__file__).resolve().parents[2] / "pre-train/configs/midtrain.yaml"
TOKENS = TokenFacts(259, 256)


def reader(config, rows):
    return Batches(
        config, Mixture(config.data, seq_len=config.seq_len, seed=config.seed), rows=rows, num_steps=6, tokens=TOKENS
    )


def test_one_two_and_four_readers_make_the_same_global_batch(run_config):
    config = from_dict(RunConfig, run_config)
    whole = reader(config, range(8))
    for num_readers in (2, 4):
        share = 8 // num_readers
        readers = [reader(config, range(i * share, (i + 1) * share)) for i in range(num_readers)]
        for step in (0, 1, 5, 9, 50):  # also in later epochs
            parts = [part.make(step) for part in readers]
            for name, array in whole.make(step).items():
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), array)


def test_reading_ahead_leaves_no_trace(run_config):
    config = from_dict(RunConfig, run_config)
    ahead, fresh = reader(config, range(8)), reader(config, range(8))
    for step in (0, 1, 4, 5, 2, 2):  # steps that were prepared, that were not, and one again
        for name, array in ahead.get(step).items():
            np.testing.assert_array_equal(array, fresh.make(step)[name])
    ahead.close()
    fresh.close()


def test_an_error_of_reading_ahead_reaches_the_step_that_needs_the_batch(run_config):
    batches = reader(from_dict(RunConfig, run_config), range(8))
    make = batches.make
    batches.make = lambda step: make(step) if step < 1 else 1 / 0
    batches.get(0)
    with pytest.raises(ZeroDivisionError):
        batches.get(1)
    batches.close()


def test_each_epoch_reaches_the_probabilities_of_table_3(run_config, monkeypatch):
    published = load_config(
        ["pre-train/configs/midtrain.yaml"], ["output_dir=x", "model.init_from=x", "model.tokenizer=x"]
    )
    table = published.masking.per_epoch
    assert len(table) == 5
    size, steps = 100, 40  # 4,000 rows an epoch
    data = {**run_config["data"], "epoch_samples": size * steps}
    changes = {"global_batch_size": size, "seq_len": 8, "max_steps": 5 * steps, "data": data}
    masked = {"schedule": "per_epoch", "per_epoch": table, "span_lengths": [2, 4, 8]}
    config = from_dict(RunConfig, {**run_config, **changes, "masking": masked})
    batches, plans = reader(config, range(size)), []
    plan_row = noise.plan_row

    def noted(rng, num_real, *arguments):
        plans.append((num_real, plan_row(rng, num_real, *arguments)))
        return plans[-1][1]

    monkeypatch.setattr(noise, "plan_row", noted)
    for epoch, expected in enumerate(table):
        plans.clear()
        for step in range(epoch * steps, (epoch + 1) * steps):
            batches.make(step)
        drawn = [plan for num_real, plan in plans if num_real >= 3]
        assert len(drawn) > 3900
        shares = [
            np.mean([plan.prefix_length > 0 for plan in drawn]),
            np.mean([plan.kept_length < 8 for plan in drawn]),
            np.mean([plan.span > 1 for plan in drawn]),
        ]
        for share, probability in zip(shares, expected, strict=True):
            deviation = (probability * (1 - probability) / len(drawn)) ** 0.5
            assert abs(share - probability) < 4 * deviation, (epoch, shares)
        assert not any(plan.prefix_length and plan.kept_length < 8 for plan in drawn)
        lengths = [plan.span for plan in drawn if plan.span > 1]
        for length in (2, 4, 8):
            deviation = (2 / 9 / len(lengths)) ** 0.5
            assert abs(lengths.count(length) / len(lengths) - 1 / 3) < 4 * deviation
    batches.close()


def test_noise_levels_fall_one_into_each_stratum_of_the_global_batch():
    t_min = MaskingConfig().t_min
    for step in range(20):
        levels = deal_levels(5, step, 64, t_min).numpy()
        strata = np.floor((levels - t_min) / (1 - t_min) * 64 + 1e-4)
        assert sorted(np.clip(strata, 0, 63).tolist()) == list(range(64))


def test_rows_behind_a_url_are_those_of_the_folder(run_config, shards_dir, tmp_path):
    local = reader(from_dict(RunConfig, run_config), range(8))
    url = {"root": f"file://{shards_dir.parent}", "sources": [{"path": shards_dir.name}]}
    for cache in (None, str(tmp_path / "cache")):
        remote = reader(from_dict(RunConfig, merge(run_config, {"data": {**url, "cache": cache}})), range(8))
        for step in (0, 7):
            for name, array in local.make(step).items():
                np.testing.assert_array_equal(remote.make(step)[name], array)
