"""Facts of the schedule of commits."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from CoDALanguageModel.schedule import MOST_STEPS, commit_counts, even_counts, kept_counts, plan_commits

EPS = 1e-3


def whole_plan(num_masked, *, block_length, **options):
    """The plan of all blocks of one length."""
    length = block_length or num_masked
    sizes = [min(length, num_masked - first) for first in range(0, num_masked, length or 1)]
    return tuple(itertools.chain.from_iterable(plan_commits(sizes, **options)))


def published_counts(num_masked, steps, eps):
    """The published sampler's counts for one row, as it computes them: float32 times, tensor arithmetic, int()."""
    timesteps = torch.linspace(1, eps, steps + 1)
    mask_index = torch.ones(1, num_masked, dtype=torch.bool)
    counts = []
    for i in range(steps):
        t, s = timesteps[i], timesteps[i + 1]
        num_mask_token = mask_index.sum() / mask_index.shape[0]
        counts.append(int(num_mask_token * (1 - s / t)) if i < steps - 1 else int(num_mask_token))
        mask_index = mask_index[:, counts[-1] :]
    return tuple(counts)


@pytest.mark.parametrize("eps", [1e-3, 1e-2, 1e-5])
def test_counts_are_those_of_the_published_schedule(eps):
    for steps in (1, 2, 3, 5, 8, 16, 33, 64, 128):
        for num_masked in (1, 2, 7, 16, 31, 32, 33, 64, 100, 128):
            assert commit_counts(num_masked, steps, eps) == published_counts(num_masked, steps, eps)


def test_one_token_a_step_of_the_published_table_commits_all_768():
    counts = commit_counts(768, 768, EPS)
    assert sum(counts) == 768
    assert max(counts[:-1]) == 1


def test_the_even_schedule_commits_one_token_a_step_where_the_published_one_pauses_and_catches_up():
    options = {"block_length": None, "eps": EPS, "keeps_deciding": False}
    for size in (8, 32, 100):
        counts = [c.count for c in whole_plan(size, steps=size, schedule="even", **options)]
        assert counts == [1] * size
    published = commit_counts(8, 8, EPS)
    assert (published[0], published[-1]) == (0, 2)
    assert even_counts(10, 4) == (3, 3, 2, 2)
    assert [c.count for c in whole_plan(3, steps=600, schedule="even", **options)] == [1, 1, 1]


@pytest.mark.parametrize("schedule", ["published", "even"])
@pytest.mark.parametrize("keeps_deciding", [False, True])
def test_a_plan_commits_in_every_forward_and_fills_each_block(keeps_deciding, schedule):
    for num_masked in (1, 5, 12, 33):
        for block_length in (None, 1, 4, 12, 50):
            num_blocks = math.ceil(num_masked / (block_length or num_masked))
            for steps in (num_blocks, num_blocks + 3, 64):
                options = {"eps": EPS, "keeps_deciding": keeps_deciding, "schedule": schedule}
                plan = whole_plan(num_masked, steps=steps, block_length=block_length, **options)
                assert [commit.step for commit in plan] == sorted({commit.step for commit in plan})
                assert plan[-1].step < steps
                assert [commit.block for commit in plan] == sorted(commit.block for commit in plan)
                for block in range(num_blocks):
                    counts = [commit.count for commit in plan if commit.block == block]
                    size = min(block_length or num_masked, num_masked - block * (block_length or 0))
                    gains = np.diff([0, *counts]) if keeps_deciding else np.array(counts)
                    assert gains.min() >= 1
                    assert gains.sum() == size


def test_steps_are_shared_evenly_between_blocks_the_first_getting_more():
    plan = whole_plan(12, steps=14, block_length=4, eps=EPS, keeps_deciding=False)
    shares = (5, 5, 4)
    want, first = [], 0
    for block, share in enumerate(shares):
        counts = published_counts(4, share, EPS)
        want += [(first + i, block, count) for i, count in enumerate(counts) if count]
        first += share
    assert [tuple(commit) for commit in plan] == want


def test_p2_keeps_the_share_of_the_steps_done_in_exact_integers():
    for size in (1, 3, 10, 49):
        for steps in (1, 3, 7, 49, 60):
            plan = whole_plan(size, steps=steps, block_length=None, eps=EPS, keeps_deciding=True)
            kept = {i: size - math.floor(size * (1 - Fraction(i + 1, steps))) for i in range(steps)}
            want = [(i, kept[i]) for i in range(steps) if kept[i] > kept.get(i - 1, 0)]
            assert [(commit.step, commit.count) for commit in plan] == want


@pytest.mark.parametrize("keeps_deciding", [False, True])
def test_a_plan_costs_no_more_for_more_steps_and_commits_one_token_a_step(keeps_deciding):
    for num_masked, block_length in ((8, None), (600, None), (70, 32)):
        options = {"block_length": block_length, "eps": EPS, "keeps_deciding": keeps_deciding}
        enough = whole_plan(num_masked, steps=3 * max(num_masked, MOST_STEPS), **options)
        for steps in (10**6, 2**62, 10**30):
            assert whole_plan(num_masked, steps=steps, **options) == enough
        length = block_length or num_masked  # one step a token
        published = whole_plan(num_masked, steps=length * math.ceil(num_masked / length), **options)
        assert [(c.block, c.count) for c in enough] == [(c.block, c.count) for c in published]


def test_blocks_of_any_sizes_are_planned_as_they_are_reached():
    sizes = [3, 4, 4, 1]
    plan = plan_commits(sizes, steps=10**9, eps=EPS, keeps_deciding=False)
    assert [commit.count for commit in next(plan)] == [c for c in commit_counts(3, MOST_STEPS, EPS) if c]
    assert [sum(commit.count for commit in block) for block in plan] == sizes[1:]
    long = plan_commits(range(1, 10**9), steps=10**9, eps=EPS, keeps_deciding=False)
    assert [[commit.block for commit in next(long)] for _ in range(2)] == [[0], [1]]


def test_plans_that_are_kept_are_few():
    for function in (commit_counts, even_counts, kept_counts):
        assert function.cache_info().maxsize <= 64


def test_more_blocks_than_steps_are_refused():
    with pytest.raises(ValueError, match="12 masked tokens in blocks of block_length=4 are 3 blocks, got steps=2"):
        whole_plan(12, steps=2, block_length=4, eps=EPS, keeps_deciding=False)
    assert whole_plan(0, steps=2, block_length=4, eps=EPS, keeps_deciding=False) == ()
