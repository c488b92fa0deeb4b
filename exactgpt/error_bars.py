"""How sure a number is: standard errors of means over documents, and intervals for the difference of two models.

A unit is a document or an item of a task. A mean is a ratio of sums over units, such as the losses of all documents
over their tokens: a long document counts for more. For an accuracy each item weighs 1.
"""
import math
from collections import namedtuple
from numbers import Real

import numpy as np

from exactgpt.config import counted

N_RESAMPLES = 9999       # scipy's default
BATCH_NUMBERS = 10**7    # numbers in memory at once while resampling
FEW_UNITS = 30           # of fewer no conclusion is drawn
FEW_DIFFERENT = 6        # so many must differ: five of five the same way happen to equal models in 6% of the cases
CONFIDENCE = 0.95
ABOUT_SEEDS = ("This is about these two checkpoints. Whether one recipe is better than another takes several runs of "
               "each, with other seeds.")

# difference: f(this model's mean) - f(the other's); low, high: its 95% interval, NaN for a single unit
# better, worse: on how many units this model is better, and worse, than the other; n: units
Comparison = namedtuple("Comparison", "difference low high better worse n")


def ratio_stderr(sums, weights):
    """Return (mean, standard error) of sum(sums) / sum(weights) over n units, two arrays (n,); NaN if unknown."""
    # The delta method: to first order the ratio's error is the mean of the residuals sums - mean * weights.
    n, total = len(sums), weights.sum()
    if not total:
        return math.nan, math.nan
    mean = sums.sum() / total
    residuals = sums - mean * weights
    return float(mean), math.sqrt(n / (n - 1) * (residuals ** 2).sum()) / float(total) if n > 1 else math.nan


def format_with_stderr(value, stderr):
    """Return a number with its standard error, if that is a number: "0.2955 ± 0.0046"."""
    digits = 4 if abs(value) < 100 else 1
    error = f" ± {stderr:,.{digits}f}" if isinstance(stderr, Real) and math.isfinite(stderr) else ""
    return f"{value:,.{digits}f}{error}"


def compare(ours, theirs, weights, transform=np.asarray, higher_is_better=False, n_resamples=N_RESAMPLES, seed=0):
    """Return the Comparison of two models on the same n units: arrays (n,) of each one's sums, and of the weights.

    transform: f, from a mean to what is compared, for example np.exp for a perplexity; elementwise. Needs scipy.
    """
    from scipy import stats

    def difference(a, b, w, axis=-1):
        total = w.sum(axis)
        return transform(a.sum(axis) / total) - transform(b.sum(axis) / total)
    n = len(weights)
    ahead = np.sign(transform(ours / weights) - transform(theirs / weights)) * (1 if higher_is_better else -1)
    low = high = math.nan
    if n > 1 and np.isfinite(ours).all() and np.isfinite(theirs).all():
        # A plain bootstrap of few units is too narrow: it neither corrects their variance by n / (n - 1) nor knows
        # Student's t. Its percentiles are moved outwards by both (Hesterberg 2015, "What teachers should know about
        # the bootstrap", expanded percentile interval). Units of different weights count as fewer (Kish's effective
        # sample size). BCa, scipy's default, gives more false alarms here: bench/results/error_bars.json.
        effective = max(2.0, weights.sum() ** 2 / (weights ** 2).sum())
        t = stats.t.ppf(0.5 + CONFIDENCE / 2, effective - 1) * math.sqrt(effective / (effective - 1))
        low, high = stats.bootstrap(
            (ours, theirs, weights), difference, paired=True, vectorized=True, method="percentile",
            n_resamples=n_resamples, batch=max(1, BATCH_NUMBERS // n), confidence_level=1 - 2 * stats.norm.sf(t),
            rng=np.random.default_rng(seed)).confidence_interval
    return Comparison(float(difference(ours, theirs, weights)), float(low), float(high), int((ahead > 0).sum()),
                      int((ahead < 0).sum()), n)


def conclusion(comparison, ours, theirs, unit="document", higher_is_better=False):
    """Return a sentence that says whether the difference is more than noise. ours, theirs: names of the models."""
    c, names = comparison, (ours, theirs)
    if not math.isfinite(c.difference):
        return f"No conclusion: {ours} or {theirs} gives numbers that are not finite."
    if c.difference == c.low == c.high == 0:
        return f"No difference between {ours} and {theirs}."
    if c.n < FEW_UNITS:
        too_few = f"{counted(c.n, unit)} {'is' if c.n == 1 else 'are'} too few"
        return f"{too_few} to tell a difference from noise: use {FEW_UNITS} or more."
    if c.better + c.worse < FEW_DIFFERENT:
        return f"The models differ on {counted(c.better + c.worse, unit)}, too few to tell a difference from noise."
    if c.low <= 0 <= c.high:
        return f"The difference between {ours} and {theirs} may be noise: the interval contains 0."
    better, worse = names if (c.difference > 0) == higher_is_better else names[::-1]
    return f"{better} is better than {worse}: the difference is more than noise."

