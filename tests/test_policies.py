"""What the loop does beside the ordinary step: gradients that are not finite, lengths, starting weights, compile."""
import math
import shutil
from types import SimpleNamespace

import pytest
import torch

import train
from exactgpt.config import UserError
from exactgpt.distributed import Runtime
from tests.common import HELLASWAG_FILE, TINY, logged_losses, read_metrics, signalled_during, torchrun
from tests.killed_runs import FLAGS, SCRIPT, SIZES


def test_an_infinite_gradient_on_one_rank_is_skipped_by_all(run_ranks, make_shards, tmp_path):
    flags = ("--dtype", "fp32", "--data_dir", make_shards(SIZES, val_sizes=[120]), "--log_dir", tmp_path / "logs")
    codes, out = run_ranks(2, SCRIPT, *FLAGS, *flags, env={"ACCIDENT": "inf:step:6:1"})   # compares the ranks' weights
    assert codes == [0, 0] and "step 6: update skipped on all ranks" in out, out
    skipped = [r for r in read_metrics(tmp_path / "logs") if "skipped" in r]
    assert [r["step"] for r in skipped] == [6] and len(skipped[0]["windows"]) == 8
    model = torch.load(tmp_path / "logs" / "model_00012.pt", weights_only=True)["model"]
    assert all(torch.isfinite(v).all() for v in model.values())


def test_ten_in_a_row_stop_with_advice_and_leave_the_checkpoints(run, make_shards, tmp_path):
    flags = ("--dtype", "fp32", "--max_steps", 40, "--data_dir", make_shards(SIZES, val_sizes=[120]), "--log_dir",
             tmp_path / "logs", "--checkpoint_every", 100)
    rc, _, err = run(SCRIPT, *FLAGS, *flags, env={"ACCIDENT": "infs:step:6"})
    assert rc == 1 and "--max_lr" in err and "Traceback" not in err and len(err.strip().splitlines()) == 1
    assert max(r["step"] for r in read_metrics(tmp_path / "logs")) == 15
    assert [p.name for p in (tmp_path / "logs").glob("model_0*.pt")] == []


GRADIENTS = """
import os, sys, torch
from types import SimpleNamespace
import train
from model import GPT, GPTConfig
from exactgpt.distributed import start
with start(SimpleNamespace(device="cpu", dtype="fp32")) as runtime:
    torch.manual_seed(0)
    raw = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=2, n_head=2, n_embd=16))
    ddp = raw
    if runtime.world_size > 1:
        ddp = torch.nn.parallel.DistributedDataParallel(raw, gradient_as_bucket_view=True)
    class Catch:
        param_groups = [dict(params=list(raw.parameters()))]
        def step(self):
            self.caught = {n: p.grad.clone() for n, p in raw.named_parameters()}
        def zero_grad(self, set_to_none):
            raw.zero_grad(set_to_none=set_to_none)
    rows = torch.arange(12 * 9).reshape(12, 9) * 37 % 61
    share = 12 // runtime.world_size
    run = SimpleNamespace(micro_batch_size=share // 3, ddp=ddp, raw_model=raw, optimizer=Catch(),
                          scaler=torch.amp.GradScaler("cpu", enabled=False))
    config = SimpleNamespace(seed=0, grad_clip=0.0)
    train.train_step(run, config, runtime, rows[runtime.rank * share:(runtime.rank + 1) * share], 0)
    torch.save(run.optimizer.caught, f"{os.environ['OUT']}_{runtime.world_size}_{runtime.rank}.pt")
    del ddp, run
"""


@pytest.mark.slow
def test_accumulated_gradients_are_equal_on_all_ranks_and_those_of_one_process(run, tmp_path):
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    env = {"OUT": str(tmp_path / "grads")}
    assert run("-c", GRADIENTS, env=env)[0] == 0
    rc, _, err = torchrun(run, 2, script=tmp_path / "gradients.py", env=env)
    assert rc == 0, err
    one, *two = (torch.load(tmp_path / f"grads_{name}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1"))
    for name, grad in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        assert torch.allclose(two[0][name], grad, atol=1e-6), name
    assert max(g.abs().max() for g in one.values()) > 1e-2


def start(make_shards, tmp_path, *flags, log_dir="logs", sizes=(3000,)):
    """Run train.py's main in this process."""
    folder = tmp_path / "shards" if (tmp_path / "shards").exists() else make_shards(list(sizes), val_sizes=[400])
    flags = (*TINY, "--data_dir", folder, "--total_batch_size", 64, "--log_dir", tmp_path / log_dir, *flags)
    train.main(list(map(str, flags)))
    return tmp_path / log_dir


def test_a_stop_is_saved_before_the_log_is_closed_which_may_wait_for_mlflow(make_shards, tmp_path, monkeypatch):
    happened, real = [], train.train_step

    def step_during_which_a_signal_comes(run, config, runtime, tokens, step):
        runtime.stop_signal = "SIGTERM" if step == 2 else ""
        return real(run, config, runtime, tokens, step)
    monkeypatch.setattr(train, "train_step", step_during_which_a_signal_comes)
    monkeypatch.setattr(train.checkpoint, "save",
                        lambda run, progress, *_, **__: happened.append(("saved", progress.step)))
    monkeypatch.setattr("exactgpt.metrics.Tracker.close",
                        lambda self, finished=True: happened.append("finished" if finished else "killed"))
    start(make_shards, tmp_path, "--max_steps", 5, "--checkpoint_every", 0)
    assert happened == [("saved", 3), "killed"]               # MLflow's word for a run that may be resumed
    start(make_shards, tmp_path, "--max_steps", 2, "--checkpoint_every", 0, log_dir="another")
    assert happened[2:] == [("saved", 2), "finished"]


def test_a_run_that_stop_loss_has_ended_ends_there_also_if_it_is_stopped_in_its_last_evaluation(
        make_shards, tmp_path, monkeypatch, capsys):
    real = train.validate

    def validate_until_a_signal_comes(run, config, runtime):
        if len(logged_losses(tmp_path / "logs")) > 1:
            runtime.stop_signal = "SIGTERM"
        return real(run, config, runtime)
    flags = ("--max_steps", 200, "--max_lr", 1e-2, "--eval_every", 100, "--stop_loss", 5.5)
    monkeypatch.setattr(train, "validate", validate_until_a_signal_comes)
    log_dir = start(make_shards, tmp_path, *flags)
    n_steps = len(logged_losses(log_dir))
    assert f"stopped before step {n_steps}, nothing is lost" in capsys.readouterr().out and n_steps < 200
    monkeypatch.setattr(train, "validate", real)
    start(make_shards, tmp_path, *flags)
    assert "finished" in capsys.readouterr().out and len(logged_losses(log_dir)) == n_steps


def test_a_stop_before_the_first_step_of_a_start_saves_nothing(make_shards, tmp_path, monkeypatch, capsys):
    def validate_as_a_signal_comes(run, config, runtime):
        runtime.stop_signal = "SIGTERM"
        runtime.check_for_stop()
    monkeypatch.setattr(train, "validate", validate_as_a_signal_comes)
    log_dir = start(make_shards, tmp_path, "--max_steps", 5, "--eval_every", 1)
    assert "stopped before step 0, nothing is lost" in capsys.readouterr().out and not list(log_dir.glob("*.pt"))


def test_a_stop_that_another_rank_was_asked_for_ends_this_one_too(make_shards, tmp_path, monkeypatch, capsys):
    real = train.train_step

    def step_during_which_another_rank_gets_a_signal(run, config, runtime, tokens, step):
        result = real(run, config, runtime, tokens, step)
        runtime.stopping = step == 2                              # as the all-reduce at its end has told this rank
        return result
    monkeypatch.setattr(train, "train_step", step_during_which_another_rank_gets_a_signal)
    log_dir = start(make_shards, tmp_path, "--max_steps", 5)
    assert "stopped before step 3, nothing is lost" in capsys.readouterr().out
    assert (log_dir / "model_00003.pt").exists() and len(logged_losses(log_dir)) == 3


def test_a_dry_run_that_is_stopped_says_so_and_nothing_else(make_shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "train_step", signalled_during(train.train_step))
    with pytest.raises(SystemExit) as ended:
        start(make_shards, tmp_path, "--max_steps", 5, "--dry_run")
    out = capsys.readouterr().out
    assert out.endswith("the dry run was stopped\n") and "full run" not in out and ended.value.code == 130


def test_the_weights_that_a_run_starts_with_are_no_best_model(make_shards, tmp_path, monkeypatch):
    losses = iter([5.0, 6.0])
    monkeypatch.setattr(train, "validate", lambda run, config, runtime: (next(losses), 10, 40))
    log_dir = start(make_shards, tmp_path, "--max_steps", 1, "--eval_every", 1)
    assert [path.name for path in log_dir.glob("*.pt")] == ["model_00001.pt"]


def test_the_time_left_counts_evaluations_too(monkeypatch):
    times = iter([0.0, 2.0, 0.0, 60.0])      # a step of 2 s, an evaluation of a minute
    monkeypatch.setattr("exactgpt.metrics.time", SimpleNamespace(monotonic=lambda: next(times),
                                                                 perf_counter=lambda: next(times)))
    log = train.RunLog(train.Progress(0, 101), None, SimpleNamespace(is_main=False), "logs", "train", tokens=0)
    log.start_clock()
    log.train(0, None, 0.0, 1)
    with log.timed("validation", 10):
        pass
    assert log.eta(0) == "13m20s"            # 100 steps and 10 evaluations


def test_a_stop_abandons_a_long_step_and_saves_the_state_before_it(make_shards, tmp_path, monkeypatch, capsys):
    step, real_seed, real_check = [None], train.seed_everything, Runtime.check_for_stop

    def seed(*key):
        step[0] = key[2] if key[1] == "step" else None
        real_seed(*key)

    def check_as_a_signal_comes(runtime):
        runtime.stop_signal = "SIGTERM" if step[0] == 2 else ""
        real_check(runtime)
    monkeypatch.setattr(train, "seed_everything", seed)
    monkeypatch.setattr(Runtime, "check_for_stop", check_as_a_signal_comes)
    monkeypatch.setattr(train, "SLOW_STEP_S", 0)
    log_dir = start(make_shards, tmp_path, "--max_steps", 5, "--micro_batch_size", 1)
    assert "stopped before step 2, nothing is lost" in capsys.readouterr().out
    assert len(logged_losses(log_dir)) == 2 and (log_dir / "model_00002.pt").exists()


def test_a_checkpoint_holds_the_validation_loss_of_its_own_weights_or_none(make_shards, tmp_path):
    log_dir = start(make_shards, tmp_path, "--max_steps", 4, "--checkpoint_every", 1, "--eval_every", 2,
                    "--keep_checkpoints", 9)
    losses = [torch.load(log_dir / f"model_{k:05d}.pt", weights_only=True)["val_loss"] for k in (1, 2, 3, 4)]
    assert losses[0] is losses[2] is None
    assert losses[1::2] == [row["val_loss"] for row in read_metrics(log_dir) if "val_loss" in row][1:]


def test_the_best_model_is_the_best_of_all_starts_and_never_one_whose_loss_is_nan(make_shards, tmp_path, monkeypatch):
    real = train.train_step

    def validated(losses, until):
        """The step of model_best.pt and the best loss in the checkpoint, after a start that ends before a step."""
        losses = iter(losses)

        def step_that_is_asked_to_stop(run, config, runtime, tokens, step):
            runtime.stop_signal = "SIGTERM" if step + 1 == until else ""
            return real(run, config, runtime, tokens, step)
        monkeypatch.setattr(train, "train_step", step_that_is_asked_to_stop)
        monkeypatch.setattr(train, "validate", lambda run, config, runtime: (next(losses), 10, 40))
        start(make_shards, tmp_path, "--max_steps", 9, "--eval_every", 1)
        last = torch.load(tmp_path / "logs" / f"model_{until:05d}.pt", weights_only=True)
        return torch.load(tmp_path / "logs" / "model_best.pt", weights_only=True)["step"], last["best_val_loss"]
    assert validated([9.0, 4.0, math.nan], until=3) == (1, 4.0)         # of the steps 0, 1, 2
    assert validated([5.0, math.nan], until=5) == (1, 4.0)              # 3, 4
    assert validated([5.0, 3.0, 3.5], until=8) == (6, 3.0)              # 5, 6, 7


def test_stop_loss_ends_the_run_evaluated_and_saved(make_shards, tmp_path, capsys):
    flags = ("--max_steps", 200, "--max_lr", 1e-2, "--eval_every", 100)
    log_dir = start(make_shards, tmp_path, *flags, "--stop_loss", 5.5)
    values = logged_losses(log_dir)
    assert values[-1] < 5.5 and all(v >= 5.5 for v in values[:-1]) and 1 < len(values) < 200
    checkpoint = torch.load(log_dir / f"model_{len(values):05d}.pt", weights_only=True)
    assert checkpoint["finished"] and checkpoint["val_loss"] is not None
    start(make_shards, tmp_path, *flags, "--stop_loss", 5.5)
    assert "is finished" in capsys.readouterr().out
    start(make_shards, tmp_path, *flags, "--stop_loss", 5.4)
    assert len(logged_losses(log_dir)) > len(values)                    # a lower stop_loss goes on


def test_num_epochs_is_that_many_passes(make_shards, tmp_path):
    log_dir = start(make_shards, tmp_path, "--num_epochs", 1, sizes=(1000,))
    assert len(logged_losses(log_dir)) == (999 // 16) // 4              # 62 windows, 4 a step


def test_a_wsd_run_may_grow_before_its_decay_and_not_after(make_shards, tmp_path, run):
    flags = ("--dtype", "fp32", "--schedule", "wsd", "--data_dir", make_shards(SIZES, val_sizes=[120]), "--log_dir",
             tmp_path / "logs")
    assert run(SCRIPT, *FLAGS, *flags, env={"ACCIDENT": "term:step:5"})[0] == 0
    rc, out, err = run(SCRIPT, *FLAGS, *flags, "--max_steps", 30, env={"ACCIDENT": "term:step:25"})
    assert rc == 0 and "resuming from step 6" in out, err
    rc, _, err = run(SCRIPT, *FLAGS, *flags, "--max_steps", 60)
    assert rc == 2 and "--init_from" in err


def test_init_from_takes_weights_and_shape_and_starts_afresh(make_shards, tmp_path, tiny_gpt2, capsys):
    log_dir = start(make_shards, tmp_path, "--max_steps", 20, "--max_lr", 1e-2, "--eval_every", 20)
    source = log_dir / "model_00020.pt"
    again = start(make_shards, tmp_path, "--max_steps", 5, "--eval_every", 5, "--init_from", source, log_dir="more")
    assert read_metrics(again)[0]["val_loss"] == pytest.approx(read_metrics(log_dir)[-1]["val_loss"], abs=1e-6)
    assert read_metrics(again)[1]["step"] == 0                         # a schedule and a count of its own
    cropped = start(make_shards, tmp_path, "--max_steps", 1, "--init_from", source, "--block_size", 8,
                    log_dir="cropped")
    assert torch.load(cropped / "model_00001.pt", weights_only=True)["config"]["block_size"] == 8
    with pytest.raises(UserError, match="n_embd 32"):
        start(make_shards, tmp_path, "--init_from", source, "--n_embd", 32, log_dir="other")
    tiny_gpt2(vocab_size=257, n_embd=16, n_head=2, n_positions=16).save_pretrained(tmp_path / "hf")
    flags = [f for f in map(str, TINY)]
    shape = flags.index("--n_layer")
    train.main([*flags[:shape], *flags[shape + 8:], "--data_dir", str(tmp_path / "shards"), "--total_batch_size", "64",
                "--max_steps", "1", "--init_from", str(tmp_path / "hf"), "--log_dir", str(tmp_path / "from_hf")])
    assert torch.load(tmp_path / "from_hf" / "model_00001.pt", weights_only=True)["config"]["vocab_size"] == 257


def test_recompute_gives_the_same_losses(make_shards, tmp_path):
    flags = ("--max_steps", 4, "--dropout", 0.1)
    plain = logged_losses(start(make_shards, tmp_path, *flags))
    assert logged_losses(start(make_shards, tmp_path, *flags, "--recompute", log_dir="again")) == plain


@pytest.mark.slow
def test_a_compiled_run_trains_evaluates_and_samples_with_few_graphs(make_shards, tmp_path, monkeypatch):
    import torch._dynamo
    (tmp_path / "data" / "hellaswag").mkdir(parents=True)
    shutil.copy(HELLASWAG_FILE, tmp_path / "data" / "hellaswag" / "hellaswag_val.jsonl")
    monkeypatch.chdir(tmp_path)
    flags = ("--max_steps", 6, "--eval_every", 3, "--hellaswag_every", 3, "--sample_every", 3, "--micro_batch_size", 2)
    eager = logged_losses(start(make_shards, tmp_path, *flags))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = logged_losses(start(make_shards, tmp_path, *flags, "--compile", "on", log_dir="compiled"))
    assert compiled == pytest.approx(eager, abs=1e-4)
    # A probe; training and validation in three parts each (the embedding stays outside on a CPU), some for no_grad too.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 9
    assert [r["step"] for r in read_metrics(tmp_path / "compiled") if "hella_acc" in r] == [0, 3, 6]
    saved = torch.load(tmp_path / "compiled" / "model_00006.pt", weights_only=True)["model"]
    assert not any(k.startswith("_orig_mod") for k in saved)


@pytest.mark.slow
def test_compile_on_without_a_compiler_is_one_line(run, make_shards, tmp_path):
    rc, _, err = run("train.py", *TINY, "--data_dir", make_shards([900]), "--total_batch_size", 64, "--max_steps", 1,
                     "--compile", "on", "--log_dir", tmp_path / "logs",
                     env={"PATH": str(tmp_path), "CXX": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert rc == 2 and "--compile off" in err and len(err.strip().splitlines()) == 1, err


@pytest.mark.slow
def test_muon_is_the_same_on_one_and_two_processes(run, make_shards, tmp_path):
    flags = (*TINY, "--data_dir", make_shards([3000]), "--total_batch_size", 256, "--micro_batch_size", 4,
             "--max_steps", 8, "--optimizer", "muon")
    assert run("train.py", *flags, "--log_dir", tmp_path / "one")[0] == 0
    rc, _, err = torchrun(run, 2, *flags, "--log_dir", tmp_path / "two")
    assert rc == 0, err
    assert logged_losses(tmp_path / "one") == pytest.approx(logged_losses(tmp_path / "two"), abs=1e-4)


def test_a_run_keeps_the_dtype_that_auto_chose_and_says_so_when_it_cannot(make_shards, tmp_path, run):
    flags = ("--data_dir", make_shards(SIZES, val_sizes=[120]), "--log_dir", tmp_path / "logs")
    assert run(SCRIPT, *FLAGS, *flags, "--dtype", "fp32", env={"ACCIDENT": "term:step:5"})[0] == 0
    rc, out, err = run(SCRIPT, *FLAGS, *flags, env={"ACCIDENT": "term:step:8"})   # auto: as it began
    assert rc == 0 and ", fp32," in out and "not bitwise" not in out, err
    rc, out, err = run(SCRIPT, *FLAGS, *flags, "--dtype", "bf16")
    assert rc == 0 and "dtype bf16 instead of fp32" in out, err
