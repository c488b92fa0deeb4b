"""train.py: the loop against an independent one, over processes and micro-batches; a run's plan; mistakes."""
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from exactgpt.config import UserError
from exactgpt.dataloader import TokenStream
from exactgpt.shards import ShardFolder
from exactgpt.tokenizer import CharacterTokenizer, Tokenizer, gpt2_tokenizer
from model import GPT, GPTConfig
from tests.common import TINY, brute_force_order, cpu_runtime, logged_losses, read_metrics, torchrun


def brute_force_windows(folder, block_size, seed, windows_per_step, n_steps):
    """The token windows of each step: int64 (n_steps, windows_per_step, block_size + 1)."""
    shards = [np.load(p) for p in sorted(folder.glob("*_train_*.npy"))]
    stream = np.concatenate(shards).astype(np.int64)
    order = brute_force_order(list(map(len, shards)), block_size, seed, windows_per_step * n_steps)
    rows = [stream[k * block_size:(k + 1) * block_size + 1] for k in order]
    return np.stack(rows).reshape(n_steps, windows_per_step, block_size + 1)


def transformers_twin(path):
    """A GPT2LMHeadModel of transformers with the weights of our checkpoint."""
    from transformers import GPT2Config, GPT2LMHeadModel
    checkpoint = torch.load(path, weights_only=True)
    c = checkpoint["config"]
    shape = {name: c[name] for name in ("n_layer", "n_head", "n_embd", "vocab_size")}
    twin = GPT2LMHeadModel(GPT2Config(**shape, n_positions=c["block_size"], resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
                                      bos_token_id=0, eos_token_id=0))
    matrices = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    twin.load_state_dict({k: v.t() if k.endswith(matrices) else v for k, v in checkpoint["model"].items()})
    return twin


def test_thirty_steps_equal_a_plain_loop_with_transformers_and_torch(run, make_shards, tmp_path):
    folder = make_shards([700, 900, 10, 1200])
    flags = (*TINY, "--data_dir", folder, "--total_batch_size", 128, "--micro_batch_size", 2, "--max_lr", 3e-3,
             "--min_lr", 3e-4, "--warmup_steps", 5)
    assert run("train.py", *flags, "--max_steps", 0, "--log_dir", tmp_path / "start")[0] == 0
    rc, out, err = run("train.py", *flags, "--max_steps", 30, "--log_dir", tmp_path / "run")
    assert rc == 0, err

    twin = transformers_twin(tmp_path / "start" / "model_00000.pt").train()
    decay = [p for p in twin.parameters() if p.dim() >= 2]
    rest = [p for p in twin.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW([dict(params=decay, weight_decay=0.1), dict(params=rest, weight_decay=0.0)],
                                  betas=(0.9, 0.95), eps=1e-8, foreach=False)
    expected = []
    for step, windows in enumerate(brute_force_windows(folder, 16, 1337, 8, 30)):
        progress = (step - 5) / 25
        lr = 3e-3 * (step + 1) / 5 if step < 5 else 3e-4 + (3e-3 - 3e-4) * (1 + math.cos(math.pi * progress)) / 2
        batch = torch.from_numpy(windows)
        logits = twin(batch[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    assert np.allclose(logged_losses(tmp_path / "run"), expected, atol=1e-4), out
    assert expected[-1] < expected[0] - 0.05          # the comparison is of a loop that learns


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(run, make_shards, tmp_path):
    flags = (*TINY, "--data_dir", make_shards([3000]), "--total_batch_size", 256, "--max_steps", 8, "--max_lr", 3e-3)
    rc, _, err = run("train.py", *flags, "--micro_batch_size", 4, "--log_dir", tmp_path / "one")
    assert rc == 0, err
    rc, _, err = torchrun(run, 2, *flags, "--micro_batch_size", 2, "--log_dir", tmp_path / "two")
    assert rc == 0, err
    assert np.allclose(logged_losses(tmp_path / "one"), logged_losses(tmp_path / "two"), atol=1e-4)
    assert len(logged_losses(tmp_path / "two")) == 8


def test_micro_batch_size_changes_neither_losses_nor_tokens(run, make_shards, tmp_path):
    folder, found = make_shards([3000]), []
    for size in (1, 4, 8):
        rc, _, err = run("train.py", *TINY, "--data_dir", folder, "--total_batch_size", 128, "--max_steps", 6,
                         "--micro_batch_size", size, "--log_dir", tmp_path / str(size))
        assert rc == 0, err
        found.append(logged_losses(tmp_path / str(size)))
    assert np.allclose(found[0], found[1], atol=1e-5) and np.allclose(found[0], found[2], atol=1e-5)


def tiny_run(vocab_size=64, micro_batch_size=2, **more):
    """What train_step and validate read of a run: a model with dropout, and SGD at rate 1."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=vocab_size, n_layer=1, n_head=2, n_embd=16, dropout=0.5)).train()
    return SimpleNamespace(raw_model=model, compiled=model, ddp=model, micro_batch_size=micro_batch_size,
                           optimizer=torch.optim.SGD(model.parameters(), lr=1.0), scaler=cpu_runtime().grad_scaler(),
                           **more)


def test_validation_is_without_dropout_and_training_goes_on_with_it(make_shards):
    folder = make_shards([100], val_sizes=[5 * 8 + 1], tokens=[k * 37 % 61 for k in range(141)])
    run = tiny_run(val_stream=TokenStream(ShardFolder(folder).val, 8), tokenizer=Tokenizer([], "bytes"))
    loss, n_tokens, _ = train.validate(run, train.TrainConfig(), cpu_runtime())
    x, tokens = torch.arange(40).view(5, 8) * 37 % 61, torch.arange(41) * 37 % 61
    assert not torch.equal(run.raw_model(x), run.raw_model(x))      # dropout is on again
    logits = run.raw_model.eval()(x)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[1:]).item()
    assert (loss, n_tokens) == (pytest.approx(expected, abs=1e-6), 40)


@pytest.mark.parametrize("vocabulary", [gpt2_tokenizer, lambda: Tokenizer([("Ã", "©"), ("Ã©", "t")], "own"),
                                        lambda: CharacterTokenizer("té 日本語😀")])
def test_the_bytes_of_all_targets_are_counted_for_any_micro_batch(make_shards, vocabulary):
    """Five windows: with 2 or 3 to a micro-batch the last is padded. End-of-text is a target with no bytes.

    Nor has a row of padding, which the checks of shards, made at samples, may overlook.
    """
    tokenizer = vocabulary()
    document = [*([] if tokenizer.eot is None else [tokenizer.eot]), *tokenizer.encode("été 日本語😀")]
    stream = (document * 20)[:141]
    stream[7] = tokenizer.n_vocab if tokenizer.n_vocab % 64 else stream[7]
    folder = make_shards([100], val_sizes=[5 * 8 + 1], tokens=stream)
    targets = stream[1:41]
    text = tokenizer.decode_bytes([token for token in targets if token != tokenizer.eot])
    found = []
    for size in (1, 2, 3, 5):
        run = tiny_run(-(-tokenizer.n_vocab // 64) * 64, size, tokenizer=tokenizer,
                       val_stream=TokenStream(ShardFolder(folder).val, 8))
        loss, *counts = train.validate(run, train.TrainConfig(), cpu_runtime())
        assert counts == [40, len(text)] and len(text) > 40
        found.append(loss)
    assert found == pytest.approx([found[0]] * 4, abs=1e-6)


def test_an_update_is_clipped_to_the_norm_that_the_flag_gives():
    """Plain gradient descent at rate 1: what the weights moved by is the gradient."""
    for clip, moved_by in ((0.05, 0.05), (0.0, None), (100.0, None)):      # None: by the whole gradient
        run = tiny_run()
        before = [p.detach().clone() for p in run.raw_model.parameters()]
        result = train.train_step(run, train.TrainConfig(grad_clip=clip), cpu_runtime(), torch.arange(36).view(4, 9), 0)
        moved = [old - p.detach() for old, p in zip(before, run.raw_model.parameters())]
        assert 0.5 < result.grad_norm < 100
        norm = math.hypot(*(part.norm().item() for part in moved))
        assert norm == pytest.approx(moved_by or result.grad_norm, rel=1e-3)


def test_a_run_writes_what_the_contract_says(run, make_shards, tmp_path):
    folder, log_dir = make_shards([3000], val_sizes=[400]), tmp_path / "logs"
    rc, out, err = run("train.py", *TINY[:-6], "--data_dir", folder, "--total_batch_size", 64, "--max_steps", 10,
                       "--eval_every", 5, "--sample_every", 10, "--checkpoint_every", 3, "--keep_checkpoints", 2,
                       "--log_dir", log_dir)
    assert rc == 0, err
    assert sorted(p.name for p in log_dir.glob("*.pt")) == ["model_00009.pt", "model_00010.pt", "model_best.pt"]
    text = [line.split() for line in (log_dir / "log.txt").read_text().splitlines()]
    assert [(int(a), b) for a, b, _ in text if b != "train"] == [(0, "val"), (5, "val"), (10, "val")]
    assert [int(a) for a, b, _ in text if b == "train"] == list(range(10))
    rows = read_metrics(log_dir)
    trained = [r for r in rows if "loss" in r]
    assert set(trained[0]) == {"step", "tokens", "loss", "lr", "grad_norm", "ms", "tok_per_sec", "mfu", "data_wait_ms",
                               "peak_mem_gb"}
    assert trained[-1]["tokens"] == 640 and trained[-1]["mfu"] is None
    validated, [shard] = [r for r in rows if "val_loss" in r], folder.glob("*_val_*.npy")
    targets = np.load(shard)[1:24 * 16 + 1].tolist()
    n_bytes = sum(target != 256 for target in targets)      # of one byte each, but for end-of-text
    assert set(validated[0]) == {"step", "tokens", "val_loss", "val_bpb"} and 0 < n_bytes < len(targets)
    for row in validated:
        assert row["val_bpb"] == pytest.approx(row["val_loss"] * len(targets) / n_bytes / math.log(2))
    checkpoint = torch.load(log_dir / "model_00010.pt", weights_only=True)
    assert checkpoint["step"] == 10 and checkpoint["finished"] and checkpoint["tokenizer"]["name"] != "gpt2"
    assert not any("_orig_mod" in k or "module." in k for k in checkpoint["model"])
    assert checkpoint["val_loss"] == pytest.approx([r["val_loss"] for r in rows if "val_loss" in r][-1])
    best = torch.load(log_dir / "model_best.pt", weights_only=True)
    assert set(best) == {"run_id", "model", "config", "tokenizer", "step", "val_loss"}
    assert GPT.from_state(best["config"], best["model"]).config.vocab_size == 320    # 257 padded to a multiple of 64
    assert "eta" in out and "tok/s" in out and "10/10" not in out and "finished" in out


# -----------------------------------------------------------------------------
# a run's plan: lengths, warm-up, batches

def plan_flags(**changes):
    """What make_plan reads of train.py's flags."""
    defaults = dict(total_batch_size=524288, max_steps=None, num_epochs=None, warmup_steps=None)
    return SimpleNamespace(**{**defaults, **changes})


def plan_refusal(*args, **changes):
    with pytest.raises(UserError) as caught:
        train.make_plan(plan_flags(**changes), *args)
    return str(caught.value)


def test_the_default_run_is_build_nanogpts():
    windows = (9_900_000_000 - 1) // 1024                           # 99 train shards of 100M tokens
    plan = train.make_plan(plan_flags(), 1024, windows, 8)
    assert (plan.max_steps, plan.warmup_steps) == (19073, 715)
    assert (plan.windows_per_step, plan.local_windows, plan.tokens_per_step) == (512, 64, 524288)
    assert plan.epochs == pytest.approx(1.01, abs=0.001)


@pytest.mark.parametrize("max_steps, given, expected", [
    (19073, None, 715), (7150, None, 715), (7149, None, 714), (100, None, 10), (9, None, 0), (0, None, 0),
    (100, 0, 0), (100, 100, 100), (0, 5, 5),
])
def test_warm_up_is_a_tenth_of_a_short_run_unless_given(max_steps, given, expected):
    assert train.make_plan(plan_flags(max_steps=max_steps, warmup_steps=given), 1024, 10**6, 1).warmup_steps == expected


def test_a_warm_up_longer_than_the_run_is_refused():
    message = plan_refusal(1024, 10**6, 1, max_steps=100, warmup_steps=101)
    assert "--warmup_steps 101 exceeds the 100 steps of the run" in message


@pytest.mark.parametrize("epochs, n_windows, n, steps", [
    (1, 100, 8, 12), (2, 100, 8, 25), (0.5, 100, 8, 6), (1, 96, 8, 12), (3, 95, 8, 35), (0.08, 100, 8, 1),
    (10, 1, 8, 1),
    (0.29, 100, 1, 29),                                             # 0.29 * 100 is 28.999... in floating point
])
def test_epochs_become_the_whole_steps_that_they_hold(epochs, n_windows, n, steps):
    plan = train.make_plan(plan_flags(total_batch_size=n * 16, num_epochs=epochs), 16, n_windows, 1)
    assert plan.max_steps == steps
    assert plan.epochs == pytest.approx(steps * n / n_windows)


def test_epochs_too_few_for_a_step_name_the_largest_batch_that_works():
    message = plan_refusal(16, 100, 2, total_batch_size=2048, num_epochs=1)
    assert "--num_epochs 1 of 1,600 tokens is less than one step of 2,048 tokens" in message
    assert "use --total_batch_size 1600 at most" in message
    assert train.make_plan(plan_flags(total_batch_size=1600, num_epochs=1), 16, 100, 2).max_steps == 1
    message = plan_refusal(16, 101, 2, total_batch_size=2048, num_epochs=1)
    assert "use --total_batch_size 1600" in message         # 1616 is no multiple of 2 processes x 16
    assert "use more text or more epochs" in plan_refusal(16, 1, 2, total_batch_size=32, num_epochs=1)


@pytest.mark.parametrize("total, block_size, world_size, nearest", [
    (1000, 16, 1, "992 or 1008"), (524288, 1000, 8, "520000 or 528000"), (100, 128, 1, "use 128"),
    (100, 16, 8, "use 128"),
])
def test_a_total_batch_that_does_not_divide_names_the_nearest_that_do(total, block_size, world_size, nearest):
    message = plan_refusal(block_size, 10**6, world_size, total_batch_size=total)
    assert nearest in message
    assert f"is not a multiple of block_size x processes = {block_size} x {world_size}" in message
    for value in map(int, nearest.removeprefix("use ").split(" or ")):
        train.make_plan(plan_flags(total_batch_size=value), block_size, 10**6, world_size)


def test_a_train_split_without_a_window_is_refused():
    assert "shorter than one window of 1,024 tokens" in plan_refusal(1024, 0, 1)


# -----------------------------------------------------------------------------
# mistakes

BAD = {
    "no shards": (["--data_dir", "nowhere"], "make them with prepare_fineweb.py"),
    "not divisible": (["--total_batch_size", 100], "use 96 or 112"),
    "unknown flag": (["--max_step", 5], "did you mean --max_steps?"),
    "the end of a flag": (["--lr", 1], "--lr; did you mean --max_lr or --min_lr or --muon_lr?"),
    "the beginning of many": (["--m", 1], "unknown argument --m ("),
    "abbreviated flag": (["--learn", 5], "unknown argument --learn"),
    "not a number": (["--max_lr", "fast"], "--max_lr"),
    "not finite": (["--max_lr", "nan"], "--max_lr"),
    "micro-batch": (["--micro_batch_size", 3], "use one of 4, 2, 1, or 0"),
    "heads": (["--n_head", 3], "n_embd (16) must be a multiple of n_head (3)"),
    "shape twice": (["--model", "gpt2"], "cannot be combined"),
    "warm-up": (["--warmup_steps", 50], "exceeds the 2 steps of the run"),
    "two lengths": (["--num_epochs", 1], "cannot be combined"),
    "attention": (["--attention", "cudnn"], "--attention auto"),
    "val too short": (["--eval_every", 1, "--block_size", 64], "--val_fraction"),
    "no weights": (["--init_from", "nothing.pt"], "cannot read the checkpoint nothing.pt"),
    "no file to resume": (["--resume", "nothing.pt"], "cannot read the checkpoint nothing.pt"),
    "no GPU": (["--device", "cuda"], "--device auto"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_mistake_is_one_line_that_says_what_to_do(make_shards, tmp_path, monkeypatch, case):
    flags, expected = BAD[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        train.main(list(map(str, [*TINY, "--data_dir", make_shards([200], val_sizes=[32]), "--total_batch_size", 64,
                                  "--max_steps", 2, "--log_dir", tmp_path / "logs", *flags])))
    assert expected in str(caught.value)
    assert not list(tmp_path.glob("logs/model_*"))


def test_a_mistake_exits_with_status_2_and_no_traceback(run, make_shards, tmp_path):
    rc, _, err = run("train.py", *TINY, "--data_dir", make_shards([200]), "--total_batch_size", 100)
    assert rc == 2 and err.startswith("train.py: error: --total_batch_size 100") and len(err.splitlines()) == 1


@pytest.mark.slow
def test_a_mistake_under_torchrun_is_said_once(run, make_shards, tmp_path):
    rc, out, err = torchrun(run, 2, *TINY, "--data_dir", make_shards([200]), "--total_batch_size", 48, "--log_dir",
                            tmp_path / "logs", timeout=60)
    assert rc != 0
    assert (out + err).count("train.py: error:") == 1 and "use 32 or 64" in err


def test_a_log_dir_of_another_run_is_left_alone(run, make_shards, tmp_path):
    flags = (*TINY, "--data_dir", make_shards([900]), "--total_batch_size", 64, "--max_steps", 2, "--log_dir",
             tmp_path / "logs")
    assert run("train.py", *flags)[0] == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "logs").iterdir()}
    for more, expected in ((["--max_lr", 1e-3], "--max_lr 0.001 (it has 0.0006)"),
                           (["--n_embd", 32], "n_embd 32 (it has 16)"),
                           (["--resume", "never"], "use another --log_dir"), (["--max_steps", 3], "--init_from")):
        with pytest.raises(UserError) as caught:
            train.main(list(map(str, [*flags, *more])))
        assert expected in str(caught.value)
    # of another size; of the same size with other tokens; with other hashes, as where the samples happen to be equal
    others = [make_shards([n], name=name, seed=seed) for n, name, seed in ((901, "a", 0), (900, "b", 1), (900, "c", 0))]
    (others[1] / "manifest.json").unlink()
    manifest = others[2] / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"sha256": "', '"sha256": "x'))
    for other in others:
        with pytest.raises(UserError, match="other token shards"):
            train.main(list(map(str, [*flags, "--data_dir", other])))
    assert {p.name: p.read_bytes() for p in (tmp_path / "logs").iterdir()} == before
    rc, out, _ = run("train.py", *flags)
    assert rc == 0 and "finished" in out                # the same command: nothing left to do


# -----------------------------------------------------------------------------
# dry runs

def test_dry_run_leaves_nothing_behind(run, make_shards, tmp_path):
    folder = make_shards([900], val_sizes=[100])
    rc, out, err = run("train.py", *TINY[:-6], "--data_dir", folder, "--total_batch_size", 64, "--max_steps", 50,
                       "--log_dir", tmp_path / "logs", "--dry_run", env={"TMPDIR": str(tmp_path)})
    assert rc == 0, err
    assert "full run of 50 steps, 3.2k tokens, takes about" in out
    assert "finished" not in out and "next:" not in out
    assert [p.name for p in tmp_path.iterdir()] == ["shards"]


def test_a_dry_run_knows_what_share_of_a_validation_it_did(make_shards, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(train.RunLog, "forecast", lambda log, n, disk, dollars, **shares: found.append((n, shares)))
    train.main([str(word) for word in (*TINY, "--eval_every", 5, "--data_dir", make_shards([900], val_sizes=[200]),
                                       "--total_batch_size", 64, "--max_steps", 50, "--log_dir", tmp_path / "logs",
                                       "--dry_run")])
    [(n_steps, shares)] = found
    assert n_steps == 50 and shares["validation"] == 4 / 12      # windows of 16 tokens
    assert shares["HellaSwag"] == 200 / 10042


@pytest.mark.slow
def test_a_dry_run_that_is_stopped_forecasts_nothing(run, make_shards, tmp_path):
    rc, out, err = run("tests/accidents.py", *TINY, "--total_batch_size", 64, "--eval_every", 1, "--data_dir",
                       make_shards([900], val_sizes=[100]), "--log_dir", tmp_path / "logs", "--dry_run",
                       env={"ACCIDENT": "term:validate:2"})
    assert rc == 130 and "the dry run was stopped" in out and "takes about" not in out, err
    assert [p.name for p in tmp_path.iterdir()] == ["shards"]
