"""How often evaluate.py --compare calls equal models different, beside other bootstrap intervals: 5 in 100 is right.

    python -m bench.error_bars

Draws pairs of equal models: the differences of their losses on documents of very different lengths, with and without
heavy tails, and of their answers to items of which few or many flip. Each interval of 95% that leaves 0 out is a false
alarm. Then the same with a true difference that theory says to find 4 times in 5.
"""
from dataclasses import dataclass

import numpy as np

from bench.common import comparison_row, describe_machine, write_results
from exactgpt.config import flag, parse_config, run_script
from exactgpt.error_bars import compare

SIZES = 10, 30, 100, 300
METHODS = "percentile", "BCa"      # scipy's, as they are


@dataclass(kw_only=True)
class ErrorBarsConfig:
    """The flags of this benchmark."""
    pairs: int = flag(2000, "pairs of equal models of each kind", low=1)
    resamples: int = flag(999, "resamples of each interval", low=99)


def documents(heavy):
    """Return a function (rng, n) -> (differences of the summed losses, tokens) of n documents."""
    def draw(rng, n):
        tokens = np.ceil(rng.lognormal(6, 1 if heavy else 0.8, n))
        of_document = 0.02 * (rng.standard_t(4, n) if heavy else rng.normal(size=n))
        return tokens * (of_document + rng.normal(0, 0.3, n) / np.sqrt(tokens)), tokens
    return draw


def items(share):
    """Return a function (rng, n) -> (differences of 0 and 1, ones) of n items, of which a share flips."""
    def draw(rng, n):
        at = rng.random(n)
        return (at < share / 2).astype(float) - (at > 1 - share / 2), np.ones(n)
    return draw


KINDS = {"documents": documents(False), "documents, heavy tails": documents(True), "items, 20% flip": items(0.2),
         "items, 5% flip": items(0.05)}


def main(argv=None):
    """Count false alarms and misses, print and write them."""
    config = parse_config(ErrorBarsConfig, argv, __doc__.split("\n\n")[0])
    alarms = {kind: {n: false_alarms(draw, n, config) for n in SIZES} for kind, draw in KINDS.items()}
    power = found(config, n=300)
    worst = {way: max(100 * rates[way] for by_size in alarms.values() for n, rates in by_size.items() if n >= 100)
             for way in ("ours", "BCa")}
    result = dict(machine=describe_machine(), config=vars(config), false_alarms=alarms, power=power)
    write_results("error_bars", result, [
        comparison_row("false alarms of --compare with 100 units or more, the worst kind", "in 100", worst["ours"],
                       "scipy's default, BCa", worst["BCa"])])


def false_alarms(draw, n, config):
    """Return {method: share of pairs of equal models whose interval leaves 0 out}."""
    from scipy import stats
    rng, outside = np.random.default_rng(n), dict.fromkeys(("ours", *METHODS), 0)
    for seed in range(config.pairs):
        differences, weights = draw(rng, n)
        if not differences.any():
            continue
        c = compare(differences, np.zeros(n), weights, n_resamples=config.resamples, seed=seed)
        outside["ours"] += c.low > 0 or c.high < 0
        for method in METHODS:
            low, high = stats.bootstrap(
                (differences, weights), lambda d, w, axis: d.sum(axis) / w.sum(axis), paired=True, vectorized=True,
                n_resamples=config.resamples, method=method, rng=np.random.default_rng(seed)).confidence_interval
            outside[method] += low > 0 or high < 0
    rates = {method: float(count) / config.pairs for method, count in outside.items()}
    print(f"{n:>4} units: " + ", ".join(f"{method} {100 * rate:.1f}" for method, rate in rates.items()), flush=True)
    return rates


def found(config, n):
    """Return the share of pairs with a difference of 2.8 standard errors that are found, and what theory says."""
    from scipy import stats
    rng, shift, count = np.random.default_rng(n), 2.8 * 0.3 / n ** 0.5, 0
    for seed in range(config.pairs):
        c = compare(rng.normal(shift, 0.3, n), np.zeros(n), np.ones(n), n_resamples=config.resamples, seed=seed)
        count += c.low > 0
    result = dict(units=n, found=float(count) / config.pairs,
                  theory=float(stats.nct.sf(stats.t.ppf(0.975, n - 1), n - 1, 2.8)))
    print(result)
    return result


if __name__ == "__main__":
    run_script(main)
