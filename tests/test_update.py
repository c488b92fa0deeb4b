"""update.py: what a skipped update means. That it is skipped on all ranks: test_policies.py."""
from types import SimpleNamespace

import pytest

from config import RunFailed
from update import MAX_SKIPPED, Skipped, StepResult


def test_the_search_for_a_loss_scale_is_no_row_of_bad_steps():
    scaler = SimpleNamespace(is_enabled=lambda: True, get_scale=lambda: 2.0)
    bad, good = StepResult(2.0, float("inf"), False, False), StepResult(2.0, 1.0, True, False)
    skipped = Skipped()
    for _ in range(3 * MAX_SKIPPED):
        assert "loss scale" in skipped.count(bad, scaler)
    skipped.check()
    assert skipped.count(good, scaler) == ""
    for _ in range(MAX_SKIPPED - 1):
        assert "not finite" in skipped.count(bad, scaler)
    skipped.check()
    skipped.count(bad, scaler)
    with pytest.raises(RunFailed, match="steps in a row"):
        skipped.check()
