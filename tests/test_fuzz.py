"""Whatever bytes a file holds: read as it was, or refused in one line; no traceback, no hang, no code that runs.

fuzz.py says what each kind of file is, how it is damaged and what counts as a fault; bench.fuzz tries 2,000 of each.
"""
import random

import pytest
from hypothesis import HealthCheck, given, settings, strategies

from tests.fuzz import TARGETS, Fuzzer

SLOW_SCRIPTS = 2


@pytest.mark.parametrize("name", TARGETS)
def test_no_mutant_of_a_file_is_more_than_refused(name, tmp_path):
    fuzzer = Fuzzer(name, tmp_path)

    @settings(max_examples=50, derandomize=True, deadline=None, database=None,
              suppress_health_check=list(HealthCheck))
    @given(strategies.randoms(use_true_random=False))
    def check(rng):
        assert not fuzzer.try_in_process(rng).startswith("fault")
    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_the_script_that_reads_it_says_one_line(name, tmp_path):
    fuzzer = Fuzzer(name, tmp_path)
    for seed in range(SLOW_SCRIPTS):
        outcome = fuzzer.try_script(random.Random(f"suite {name} {seed}"))
        assert outcome in ("read", "refused"), outcome
