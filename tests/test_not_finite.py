"""Inf and NaN in weights or optimizer state displace nothing finite: not by rotation, not as best, not as newest."""
import math

import pytest
import torch

import finetune_classifier
import train
from exactgpt import checkpoint, finetune
from exactgpt.checkpoint import checkpoint_path, list_checkpoints, newest_valid, read_checkpoint, save_checkpoint
from exactgpt.config import RunFailed, UserError
from tests.common import TINY, logged_losses
from tests.killed_runs import checkpoint_differences


def start(folder, log_dir, *flags):
    """Train 20 steps and save after each."""
    train.main(list(map(str, (*TINY, "--data_dir", folder, "--total_batch_size", 64, "--max_steps", 20, "--log_dir",
                              log_dir, "--checkpoint_every", 1, "--keep_checkpoints", 2, *flags))))


def damaged_after(step, damage, module=train):
    """Return train_step with damage(model, optimizer) after a step."""
    original = module.train_step

    def train_step(run, config, runtime, *more):
        result = original(run, config, runtime, *more)
        if more[-1] == step:
            damage(getattr(run, "raw_model", None) or run.model, run.optimizer)
        return result
    return train_step


def spoil_a_weight(model, optimizer):
    """Make one weight NaN: the next loss will be, too."""
    with torch.no_grad():
        next(p for p in model.parameters() if p.dim() == 1 and p.requires_grad)[0] = math.nan


def spoil_a_moment(model, optimizer):
    """Make one of AdamW's second moments infinite: the losses stay finite, but this weight never moves again."""
    next(iter(optimizer.state.values()))["exp_avg_sq"].view(-1)[0] = math.inf


def steps_of(log_dir):
    return [step for step, _ in list_checkpoints(log_dir)]


@pytest.mark.parametrize("damage", [spoil_a_weight, spoil_a_moment])
def test_a_run_whose_numbers_are_damaged_ends_and_goes_on_from_its_last_good_checkpoint(
        make_shards, tmp_path, monkeypatch, capsys, damage):
    folder = make_shards([3000], val_sizes=[400])
    with monkeypatch.context() as patch, pytest.raises(RunFailed, match=r"step 6 the weights or .* contain inf or NaN"):
        patch.setattr(train, "train_step", damaged_after(5, damage))
        start(folder, tmp_path / "logs", "--eval_every", 1, "--val_tokens", 160)
    assert steps_of(tmp_path / "logs") == [5, 4]
    files = [*(tmp_path / "logs").glob("*.pt")]
    assert len(files) == 3 and all(checkpoint.is_finite(read_checkpoint(path)) for path in files)
    start(folder, tmp_path / "logs", "--eval_every", 1, "--val_tokens", 160)
    assert "resuming from step 5" in capsys.readouterr().out
    start(folder, tmp_path / "straight", "--eval_every", 1, "--val_tokens", 160)
    assert not checkpoint_differences(tmp_path / "logs", tmp_path / "straight", 20)
    assert logged_losses(tmp_path / "logs") == logged_losses(tmp_path / "straight")


def test_nothing_is_rotated_while_updates_are_skipped(make_shards, tmp_path, monkeypatch):
    original = train.train_step

    def train_step(run, config, runtime, tokens, step):
        factor = math.inf if step in (4, 5) else 1.0
        hook = run.raw_model.transformer.ln_f.weight.register_hook(lambda grad: grad * factor)
        result = original(run, config, runtime, tokens, step)
        hook.remove()
        return result
    monkeypatch.setattr(train, "train_step", train_step)
    flags = make_shards([3000]), tmp_path / "logs", "--keep_checkpoints", 1, "--max_steps"
    start(*flags, 6)
    assert steps_of(tmp_path / "logs") == [6, 5, 4]      # those of 5 and 6 have the weights of 4
    start(make_shards([3000], name="b"), tmp_path / "on", "--keep_checkpoints", 1, "--max_steps", 8)
    assert steps_of(tmp_path / "on") == [8]


@pytest.mark.parametrize("where", ["model", "optimizer"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_run_does_not_resume_from_what_is_not_finite(tmp_path, where, value):
    entries = dict(model={}, config={}, optimizer={}, scaler={}, train_config={}, resolved={}, data="",
                   best_val_loss=math.inf, finished=False)      # no validation yet: this one is no damage
    for step in (5, 10, 15):
        numbers = {"w": torch.tensor([[1.0, value if step > 5 else 2.0]]), "n": torch.tensor([step])}
        save_checkpoint(checkpoint_path(tmp_path, step), dict(entries, step=step, **{where: numbers}))
    notices = []
    assert newest_valid(tmp_path, notices.append)["step"] == 5
    assert len(notices) == 2 and all("contain inf or NaN" in notice for notice in notices)
    checkpoint_path(tmp_path, 5).unlink()
    with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint in .* can be resumed .*inf or NaN"):
        newest_valid(tmp_path, notices.append)


def test_fine_tuning_keeps_its_last_good_state_and_its_best_epoch(classifier_flags, tmp_path, monkeypatch, capsys):
    """The damaged classifier gives every text the first label, which happens to be the more frequent one."""
    flags = list(map(str, (*classifier_flags(tmp_path / "out"), "--num_epochs", 3, "--patience", 0, "--max_lr", 1e-9)))
    original = finetune_classifier.classification_metrics
    monkeypatch.setattr(finetune_classifier, "classification_metrics", lambda true, predicted, labels: dict(
        original(true, predicted, labels), macro_f1=1.0 - 0.5 * float(predicted.sum() > 0)))
    with monkeypatch.context() as patch, pytest.raises(RunFailed, match=r"step 14 the weights or .* inf or NaN"):
        patch.setattr(finetune, "train_step", damaged_after(9, spoil_a_weight, finetune))
        finetune_classifier.main(flags)
    assert capsys.readouterr().out.count("(the best so far)") == 1
    assert [path.name for path in (tmp_path / "out").glob("*.pt")] == ["state_00007.pt"]
    assert checkpoint.is_finite(read_checkpoint(tmp_path / "out" / "state_00007.pt"))
    finetune_classifier.main(flags)
    assert "resuming from step 7" in capsys.readouterr().out
    assert checkpoint.is_finite(read_checkpoint(tmp_path / "out" / "classifier.pt"))


def test_weights_to_start_from_are_refused(byte_model, classifier_flags, make_shards, tmp_path):
    stored = read_checkpoint(byte_model[0])
    stored["model"]["transformer.wte.weight"][7, 0] = math.nan
    save_checkpoint(byte_model[0], stored)
    with pytest.raises(UserError, match=r"the weights in .*base\.pt contain inf or NaN: they cannot be trained"):
        finetune_classifier.main(list(map(str, classifier_flags(tmp_path / "out"))))
    flags = ["--init_from", byte_model[0], "--data_dir", make_shards([3000], vocab=256), "--total_batch_size", 64,
             "--log_dir", tmp_path / "logs", "--device", "cpu", "--hellaswag_every", 0]
    with pytest.raises(UserError, match=r"the weights in .*base\.pt contain inf or NaN: they cannot be trained"):
        train.main(list(map(str, flags)))


def test_a_large_number_is_finite_although_the_sum_of_all_is_not():
    numbers = torch.full((4,), torch.finfo(torch.float32).max)
    assert checkpoint.is_finite({"a": [numbers, torch.arange(3), torch.tensor([True])]})
    assert not checkpoint.is_finite({"a": numbers, "b": {"c": torch.tensor([1.0, -math.inf, math.inf])}})
