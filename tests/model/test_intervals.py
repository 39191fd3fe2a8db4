import pytest

from CoDALanguageModel.intervals import wilson_interval


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
