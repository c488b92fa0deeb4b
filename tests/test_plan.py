"""plan.py against hand-computed learning rates, steps and batches."""
import math
from types import SimpleNamespace

import pytest

from exactgpt.config import UserError
from exactgpt.device import check_micro_batch_size, divisors
from exactgpt.optimizer import decay_start, learning_rate_factor
from train import Plan, make_plan


def flags(**changes):
    """What make_plan reads of train.py's flags."""
    defaults = dict(total_batch_size=524288, max_steps=None, num_epochs=None, warmup_steps=None)
    return SimpleNamespace(**{**defaults, **changes})


def schedule(max_steps, warmup_steps):
    return Plan(max_steps, warmup_steps, 8, 8, 128, 1.0)


def rate(step, max_steps=19073, warmup_steps=715, kind="cosine", max_lr=6e-4, min_lr=6e-5):
    return max_lr * learning_rate_factor(step, schedule(max_steps, warmup_steps), kind, min_lr / max_lr)


def refusal(*args, **changes):
    with pytest.raises(UserError) as caught:
        make_plan(flags(**changes), *args)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("step, shown", [(0, "6.00e-07"), (100, "6.06e-05"), (500, "3.01e-04"), (999, "6.00e-04")])
def test_the_warm_up_is_the_second_seed_projects_table(kind, step, shown):
    assert f"{rate(step, warmup_steps=1000, kind=kind):.2e}" == shown


@pytest.mark.parametrize("step, expected", [
    (715, 6e-4),                                                    # the peak, where the cosine begins
    (715 + 9179, 6e-5 + 0.5 * 5.4e-4),                              # half way: the mean of both ends
    (715 + 9179 // 2, 6e-5 + 0.5 * (1 + math.cos(math.pi * 4589 / 18358)) * 5.4e-4),
    (19073, 6e-5), (25000, 6e-5),
])
def test_cosine_goes_from_peak_to_min_lr(step, expected):
    assert rate(step) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("step, expected", [
    (9, 1.0), (10, 1.0), (69, 1.0), (70, 1.0), (71, 1 - 0.9 / 30), (85, 0.55), (99, 1 - 0.9 * 29 / 30), (100, 0.1),
    (120, 0.1),
])
def test_wsd_is_constant_and_then_linear_over_the_last_three_tenths(step, expected):
    assert learning_rate_factor(step, schedule(100, 10), "wsd", 0.1) == pytest.approx(expected, rel=1e-12)


def test_decay_begins_after_the_warm_up_at_the_earliest():
    assert decay_start(schedule(100, 10)) == 70 and decay_start(schedule(100, 90)) == 90
    assert decay_start(schedule(0, 0)) == 0


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize("max_steps, warmup_steps", [(0, 0), (1, 0), (1, 1), (10, 10), (10, 0), (1000, 715)])
def test_the_rate_rises_to_its_peak_and_never_again(kind, max_steps, warmup_steps):
    factors = [learning_rate_factor(s, schedule(max_steps, warmup_steps), kind, 0.1) for s in range(max_steps + 1)]
    assert all(0 < f <= 1 for f in factors)
    assert factors[:warmup_steps] == sorted(factors[:warmup_steps])
    assert factors[warmup_steps:] == sorted(factors[warmup_steps:], reverse=True)
    if warmup_steps < max_steps > 1:
        assert factors[warmup_steps] == 1 and factors[-1] == pytest.approx(0.1)


def test_the_default_run_is_build_nanogpts():
    windows = (9_900_000_000 - 1) // 1024                           # 99 train shards of 100M tokens
    plan = make_plan(flags(), 1024, windows, 8)
    assert (plan.max_steps, plan.warmup_steps) == (19073, 715)
    assert (plan.windows_per_step, plan.local_windows, plan.tokens_per_step) == (512, 64, 524288)
    assert plan.epochs == pytest.approx(1.01, abs=0.001)


@pytest.mark.parametrize("max_steps, given, expected", [
    (19073, None, 715), (7150, None, 715), (7149, None, 714), (100, None, 10), (9, None, 0), (0, None, 0),
    (100, 0, 0), (100, 100, 100), (0, 5, 5),
])
def test_warm_up_is_a_tenth_of_a_short_run_unless_given(max_steps, given, expected):
    assert make_plan(flags(max_steps=max_steps, warmup_steps=given), 1024, 10**6, 1).warmup_steps == expected


def test_a_warm_up_longer_than_the_run_is_refused():
    message = refusal(1024, 10**6, 1, max_steps=100, warmup_steps=101)
    assert "--warmup_steps 101 is longer than the run of 100 steps" in message


@pytest.mark.parametrize("epochs, n_windows, n, steps", [
    (1, 100, 8, 12), (2, 100, 8, 25), (0.5, 100, 8, 6), (1, 96, 8, 12), (3, 95, 8, 35), (0.08, 100, 8, 1),
    (10, 1, 8, 1),
    (0.29, 100, 1, 29),                                             # 0.29 * 100 is 28.999... in floating point
])
def test_epochs_become_the_whole_steps_that_they_hold(epochs, n_windows, n, steps):
    plan = make_plan(flags(total_batch_size=n * 16, num_epochs=epochs), 16, n_windows, 1)
    assert plan.max_steps == steps
    assert plan.epochs == pytest.approx(steps * n / n_windows)


def test_epochs_too_few_for_a_step_name_the_largest_batch_that_works():
    message = refusal(16, 100, 2, total_batch_size=2048, num_epochs=1)
    assert "--num_epochs 1 of 1,600 tokens holds no step of 2,048 tokens" in message
    assert "the largest --total_batch_size is 1600" in message
    assert make_plan(flags(total_batch_size=1600, num_epochs=1), 16, 100, 2).max_steps == 1
    message = refusal(16, 101, 2, total_batch_size=2048, num_epochs=1)
    assert "is 1600" in message                                     # 1616 is no multiple of 2 processes x 16
    assert "use more text or more epochs" in refusal(16, 1, 2, total_batch_size=32, num_epochs=1)


@pytest.mark.parametrize("total, block_size, world_size, nearest", [
    (1000, 16, 1, "992 or 1008"), (524288, 1000, 8, "520000 or 528000"), (100, 128, 1, "use 128"),
    (100, 16, 8, "use 128"),
])
def test_a_total_batch_that_does_not_divide_names_the_nearest_that_do(total, block_size, world_size, nearest):
    message = refusal(block_size, 10**6, world_size, total_batch_size=total)
    assert nearest in message
    assert f"is not a multiple of block_size x processes = {block_size} x {world_size}" in message
    for value in map(int, nearest.removeprefix("use ").split(" or ")):
        make_plan(flags(total_batch_size=value), block_size, 10**6, world_size)


def test_a_train_split_without_a_window_is_refused():
    assert "no full window of 1024 tokens" in refusal(1024, 0, 1)


def test_divisors_are_all_there_largest_first():
    for n in (1, 2, 7, 12, 64, 97, 360, 512):
        assert divisors(n) == [d for d in range(n, 0, -1) if n % d == 0]


def test_a_micro_batch_that_does_not_divide_names_those_that_do():
    for d in (1, 2, 3, 4, 6, 12):
        check_micro_batch_size(d, 12)
    with pytest.raises(UserError, match=r"5 does not divide the 12 rows .* use one of 12, 6, 4, 3, 2, 1, or 0"):
        check_micro_batch_size(5, 12)
    with pytest.raises(UserError, match="--micro_batch_size 24"):
        check_micro_batch_size(24, 12)
