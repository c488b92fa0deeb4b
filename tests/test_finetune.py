"""finetune.py: the loop around the epochs of both fine-tuning scripts. What it trains on: test_finetune_instruct.py."""
import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from exactgpt import finetune
from exactgpt.checkpoint import read_checkpoint
from finetune_instruct import InstructConfig
from model import GPT, GPTConfig
from tests.common import cpu_runtime
from tests.tuning_step import one_step, random_examples


def tuned(folder, scores, **flags):
    """Fine-tune in one step an epoch, with evaluations that give these scores, the first of the untrained model.

    Returns the Progress and what was noted: `evaluated` and `written`, a list each of (training mode, weights) of the
    model when it was evaluated and when the results were written; `trained_in`, its modes when it trained.
    """
    torch.manual_seed(0)
    model, runtime, scores = GPT(GPTConfig(32, 65, 1, 2, 16)), cpu_runtime(), list(scores)
    config = InstructConfig(data="x", init_from="y", out=str(folder), batch_size=9, max_lr=1e-2,
                            num_epochs=len(scores) - 1, **flags)
    run, progress = finetune.set_up(config, runtime, finetune.Objective(model, "lm_head"), random_examples(9), None, {},
                                    None)
    noted = SimpleNamespace(progress=progress, evaluated=[], written=[], trained_in=[])
    model.transformer.wte.register_forward_pre_hook(lambda *_: noted.trained_in.append(model.training))

    def note(where):
        where.append((model.training, {name: p.detach().clone() for name, p in model.named_parameters()}))

    def evaluate():
        note(noted.evaluated)
        score = scores[len(noted.evaluated) - 1]
        return (score, -score), dict(val_loss=-score)

    def write_results():
        note(noted.written)
        return {}, [Path(folder) / "model.pt"], "use it"
    finetune.train(run, progress, config, runtime, evaluate, write_results)
    return noted


@pytest.mark.parametrize("scores, best", [
    ([9, 1, 3, 2, 3], 2),                    # not the untrained model, and the first of equals
    ([0, 1, 2, 3], 3), ([0, 3, 2, 1], 1), ([0, math.nan, 1, math.nan], 2),
    ([0, 1, math.inf, 2], 3),                # as the F1 of a classifier whose loss is NaN may be the highest
])
def test_the_results_are_those_of_the_best_epoch(tmp_path, scores, best):
    found = tuned(tmp_path, scores)
    [(training, weights)] = found.written
    assert not training and len(found.evaluated) == len(scores)
    for epoch, (_, then) in enumerate(found.evaluated):
        assert all(torch.equal(then[name], weights[name]) for name in weights) == (epoch == best)
    assert json.loads((tmp_path / "metrics.json").read_text())["best_epoch"] == best


def test_the_model_is_evaluated_without_dropout_and_trained_with_it(tmp_path):
    found = tuned(tmp_path, [0, 1, 2])
    assert [training for training, _ in found.evaluated] == [False] * 3 and set(found.trained_in) == {True}


@pytest.mark.parametrize("patience, scores, epochs", [
    (1, [0, 3, 2, 9, 9], 2), (2, [0, 3, 2, 1, 9], 3), (2, [0, 1, 0, 2, 0, 0, 9], 5), (2, [9, 1, 2, 3, 4], 4),
    (0, [0, 3, 2, 1, 0], 4),
])
def test_patience_is_the_number_of_epochs_without_a_better_one(tmp_path, capsys, patience, scores, epochs):
    found = tuned(tmp_path, scores, patience=patience)
    assert len(found.evaluated) == epochs + 1 and found.progress.step == epochs
    assert (f"no better epoch in the last {patience}," in capsys.readouterr().out) == (epochs < len(scores) - 1)


def test_a_stop_that_another_rank_was_asked_for_saves_the_state_after_the_step(tmp_path, monkeypatch, capsys):
    real = finetune.train_step

    def step_during_which_another_rank_gets_a_signal(run, config, runtime, step):
        result = real(run, config, runtime, step)
        runtime.stopping = step == 1                        # as the all-reduce at its end has told this rank
        return result
    monkeypatch.setattr(finetune, "train_step", step_during_which_another_rank_gets_a_signal)
    found = tuned(tmp_path, [0, 1, 2, 3, 4])
    assert "stopped before step 2, nothing is lost" in capsys.readouterr().out and not found.written
    state = max((read_checkpoint(path) for path in tmp_path.glob("state*.pt")), key=lambda state: state["step"])
    assert state["step"] == 2 and not state["finished"]


def test_an_update_of_fine_tuning_is_clipped():
    """Plain gradient descent at rate 1: what the weights moved by is the gradient."""
    moved, result = one_step(random_examples(9), 64, grad_clip=0.05)
    assert result.grad_norm > 0.5
    assert math.hypot(*(p.norm().item() for p in moved.values())) == pytest.approx(0.05, rel=1e-3)
