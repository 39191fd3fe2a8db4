import numpy as np
import pytest

from CoDALanguageModel.intervals import bootstrap_interval, wilson_interval


def test_wilson_interval_equals_known_values_and_solves_its_equation():
    assert wilson_interval(0.5, 164) == pytest.approx((0.424357, 0.575643), abs=1e-6)
    assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.277533), abs=1e-6)
    for share, count in ((0.1, 20), (0.9, 378), (1.0, 3)):
        for bound in wilson_interval(share, count):
            distance = (share - bound) ** 2 * count
            assert distance == pytest.approx(1.959963984540054**2 * bound * (1 - bound), abs=1e-9)
    assert wilson_interval(0.81, 100) == pytest.approx((0.7222, 0.8749), abs=1e-4)
    with pytest.raises(ValueError, match="share must be in"):
        wilson_interval(1.5, 3)


def test_bootstrap_covers_as_it_says_and_is_the_same_each_time():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        values = rng.exponential(size=60).tolist()
        low, high = bootstrap_interval(values, resamples=400)
        inside += low <= 1.0 <= high
    assert 0.86 <= inside / 200 <= 0.99
    values = (rng.random(164) < 0.3).astype(float).tolist()
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    wide = bootstrap_interval(values, level=0.99)
    assert wide[0] < low < sum(values) / 164 < high < wide[1]
    assert [low, high] == pytest.approx(wilson_interval(sum(values) / 164, 164), abs=0.02)
    assert bootstrap_interval([1.0] * 5) == (1.0, 1.0)


@pytest.mark.parametrize(("values", "settings"), [([], {}), ([1.0], {"level": 1.0}), ([1.0], {"resamples": 0})])
def test_bootstrap_refuses_what_has_no_interval(values, settings):
    with pytest.raises(ValueError, match="resamples >= 1 are needed, got"):
        bootstrap_interval(values, **settings)
