import subprocess
import sys

import numpy as np
import pytest

from coda_pretrain.noise.strategies import MaskingConfig

TABLE_3 = ((0.01, 0.01, 0.05), (0.05, 0.05, 0.10), (0.10, 0.10, 0.15), (0.15, 0.15, 0.20), (0.20, 0.20, 0.25))


def test_schedules():
    constant = MaskingConfig(prefix_probability=0.1, span_probability=0.2)
    assert constant.at(0.0, 0) == constant.at(1.0, 7) == (0.1, 0.0, 0.2)
    linear = MaskingConfig(schedule="linear", prefix_probability=0.1, linear_end=(0.3, 0.2, 0.5))
    assert linear.at(0.0, 0) == (0.1, 0.0, 0.0)
    np.testing.assert_allclose(linear.at(0.5, 3), (0.2, 0.1, 0.25))
    np.testing.assert_allclose(linear.at(1.0, 5), (0.3, 0.2, 0.5))
    per_epoch = MaskingConfig(schedule="per_epoch", per_epoch=TABLE_3)
    assert tuple(per_epoch.at(0.9, epoch) for epoch in range(5)) == TABLE_3
    assert per_epoch.at(0.0, 99) == TABLE_3[-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prefix_probability": 25}, r"must be three probabilities \(S1, S2, S3\) in \[0, 1\], got \(25,"),
        ({"prefix_probability": 0.6, "truncate_probability": 0.6}, r"S1 \+ S2 must be <= 1"),
        ({"schedule": "cosine"}, "must be constant, linear or per_epoch, got 'cosine'"),
        ({"schedule": "linear"}, "masking.linear_end must be given with masking.schedule linear"),
        ({"linear_end": (0, 0, 0)}, "masking.linear_end must be given with masking.schedule linear and only with it"),
        ({"schedule": "per_epoch"}, "masking.per_epoch must be given with masking.schedule per_epoch"),
        ({"per_epoch": ((0, 0, 0),)}, "only with it, got schedule 'constant'"),
        ({"schedule": "per_epoch", "per_epoch": ((0, 0, 0),), "span_probability": 0.1}, "have no effect"),
        ({"schedule": "per_epoch", "per_epoch": ((0, 0, 0), (0, 1.5, 0))}, r"masking.per_epoch\[1\] must be three"),
        ({"schedule": "per_epoch", "per_epoch": ((0, 0),)}, "must be three probabilities"),
        ({"span_lengths": ()}, "masking.span_lengths must list lengths of at least 1"),
        ({"span_lengths": (0,)}, "masking.span_lengths must list lengths of at least 1"),
        ({"t_min": 0.0}, r"masking.t_min must be in \(0, 1\), got 0.0"),
    ],
)
def test_bad_masking_config_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        MaskingConfig(**options)


def test_a_configuration_is_checked_without_torch():
    code = "import sys, coda_pretrain.config; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
