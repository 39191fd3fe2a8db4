import pytest

from coda_pretrain.config import OptimizerConfig, ScheduleConfig
from coda_pretrain.train.learning_rate import learning_rate


def rates(num_steps, **schedule):
    optimizer, schedule = OptimizerConfig(learning_rate=1.0), ScheduleConfig(**schedule)
    return [learning_rate(s, num_steps=num_steps, optimizer=optimizer, schedule=schedule) for s in range(num_steps)]


def test_linear_grows_over_the_warmup_and_falls_by_equal_steps():
    assert rates(8, name="linear", warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_cosine_passes_the_middle_at_half_of_the_way_to_its_floor():
    values = rates(12, name="cosine", warmup_steps=2, min_ratio=0.2)
    assert values[:3] == [0.5, 1.0, 1.0]
    assert values[7] == pytest.approx(0.6)
    assert values[-1] == pytest.approx(0.2 + 0.8 * 0.5 * (1 - 0.9510565162951535))


def test_constant_stays_at_the_peak():
    assert rates(5, name="constant", warmup_steps=2) == [0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 7, 50])
def test_no_step_has_a_rate_of_zero_or_above_the_peak(name, warmup_steps):
    values = rates(50, name=name, warmup_steps=warmup_steps)
    assert min(values) > 0
    assert max(values) <= 1


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"schedule\.warmup_steps must be at most the 3 steps of the run, got 4"):
        rates(3, warmup_steps=4)
