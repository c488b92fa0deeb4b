"""error_bars.py: standard errors equal independent estimates; false alarms and power are what theory says."""
import math

import numpy as np
import pytest

from bench.error_bars import ErrorBarsConfig, documents, found, items
from exactgpt.error_bars import FEW_UNITS, Comparison, compare, conclusion, ratio_stderr


@pytest.mark.slow
@pytest.mark.parametrize("draw, n", [(documents(heavy=True), FEW_UNITS), (items(0.2), 80)])
def test_of_2000_pairs_of_equal_models_about_5_in_100_seem_to_differ(draw, n):
    rng, alarms = np.random.default_rng(1), 0
    for seed in range(2000):
        differences, weights = draw(rng, n)
        c = compare(differences, np.zeros(n), weights, n_resamples=299, seed=seed)
        alarms += "more than noise" in conclusion(c, "a", "b")
    assert 0.035 <= alarms / 2000 <= 0.065


@pytest.mark.slow
def test_a_small_difference_is_found_as_often_as_theory_says():
    result = found(ErrorBarsConfig(pairs=500, resamples=499), n=200)
    assert 0.75 < result["theory"] < 0.85
    assert result["found"] == pytest.approx(result["theory"], abs=2.5 * math.sqrt(0.8 * 0.2 / 500))


def test_the_standard_error_equals_that_of_the_jackknife_and_of_plain_means():
    rng = np.random.default_rng(3)
    sums, weights = documents(heavy=False)(rng, 400)
    sums += 3 * weights
    mean, stderr = ratio_stderr(sums, weights)
    assert mean == pytest.approx(sums.sum() / weights.sum())
    without = (sums.sum() - sums) / (weights.sum() - weights)
    assert stderr == pytest.approx(math.sqrt(399 / 400 * ((without - without.mean()) ** 2).sum()), rel=0.02)
    assert ratio_stderr(sums, np.ones(400)) == pytest.approx((sums.mean(), sums.std(ddof=1) / 20))
    one = ratio_stderr(sums[:1], weights[:1])
    assert one[0] == sums[0] / weights[0] and math.isnan(one[1])
    assert np.isnan(ratio_stderr(sums, np.zeros(400))).all()      # a text without words


def test_an_interval_of_many_units_is_the_normal_one():
    rng = np.random.default_rng(4)
    ours, theirs, tokens = *rng.normal(3, 1, (2, 3000)), rng.integers(1, 50, 3000).astype(float)
    c = compare(ours * tokens, theirs * tokens, tokens)
    mean, stderr = ratio_stderr((ours - theirs) * tokens, tokens)
    assert c.difference == pytest.approx(mean)
    assert (c.low, c.high) == pytest.approx((mean - 1.96 * stderr, mean + 1.96 * stderr), abs=0.05 * stderr)
    assert (c.better, c.worse, c.n) == ((ours < theirs).sum(), (ours > theirs).sum(), 3000)
    assert compare(ours * tokens, theirs * tokens, tokens) == c      # the same each time


def test_what_is_compared_may_be_a_function_of_the_mean_and_more_may_be_better():
    ones = np.ones(40)
    c = compare(2 * ones, ones, ones, transform=np.exp, higher_is_better=True)
    assert (c.difference, c.low, c.high) == pytest.approx((math.e ** 2 - math.e,) * 3)
    assert (c.better, c.worse) == (40, 0)
    c = compare(2 * ones, ones, ones, transform=lambda x: np.exp(-x))      # a perplexity: the lower is better
    assert c.difference < 0 and (c.better, c.worse) == (40, 0)


def test_a_diverged_model_is_no_better_and_no_worse():
    sums, ones = np.ones(40), np.ones(40)
    sums[3] = np.nan
    c = compare(sums, ones, ones)
    assert math.isnan(c.difference) and math.isnan(c.low) and math.isnan(c.high) and (c.better, c.worse) == (0, 0)
    assert conclusion(c, "a", "b").startswith("No conclusion")


def test_the_sentence():
    def says(difference, low, high, n=100, better=4, worse=2, **options):
        return conclusion(Comparison(difference, low, high, better, worse, n), "A", "B", **options)
    assert says(-0.1, -0.2, -0.05) == "A is better than B: the difference is more than noise."
    assert says(0.1, 0.05, 0.2).startswith("B is better than A")
    assert says(0.1, 0.05, 0.2, higher_is_better=True).startswith("A is better than B")
    assert "may be noise" in says(0.1, 0.0, 0.2) and "may be noise" in says(0.1, -0.1, 0.2)
    assert says(0.0, 0.0, 0.0) == "No difference between A and B."
    assert says(0.1, 0.05, 0.2, n=FEW_UNITS - 1, unit="item").startswith("29 items are too few to tell")
    assert says(math.nan, math.nan, math.nan).startswith("No conclusion: A or B")
    assert says(0.1, math.nan, math.nan, n=1).startswith("1 document is too few to tell a difference")
    assert says(-0.1, -0.2, -0.05, better=5, worse=0).startswith("The models differ on 5 documents, too few")
