"""checkpoint.py: a kill never costs the last checkpoint, damage never passes for weights, no file runs code."""
import itertools
import os
import pickle
import random
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import train
from exactgpt.checkpoint import (
    CheckpointError,
    check_disk,
    checkpoint_path,
    disk_bytes,
    list_checkpoints,
    newest_valid,
    read_checkpoint,
    save_checkpoint,
)
from exactgpt.config import UserError
from exactgpt.distributed import Runtime
from exactgpt.open_model import build_model, newest_model, open_model
from exactgpt.tokenizer import Tokenizer, gpt2_tokenizer
from model import GPT, GPTConfig
from tests.common import gpt_from_transformers, in_our_layout

IDS = torch.randint(65, (2, 32), generator=torch.Generator().manual_seed(0))


def entries(step=1, seed=0):
    """A checkpoint of a tiny model with everything that plain data may be."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(8, 65, 1, 2, 8))
    return dict(model=model.state_dict(), config=model.config_dict(), tokenizer={"name": "gpt2"}, step=step,
                val_loss=2.5, optimizer={"state": {0: {"step": torch.tensor(3.0)}}, "more": [1, 2.5, None, True, "a"]},
                scaler={}, train_config={}, resolved={}, data="", best_val_loss=2.5, finished=False)


def equal(a, b):
    """Whether two trees of plain data and tensors are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and a == b


def refusal(read, *args):
    """The message with which a file is refused, on one line."""
    with pytest.raises(UserError) as caught:
        read(*args)
    return " ".join(str(caught.value).split())


def test_a_checkpoint_comes_back_bit_for_bit_and_is_plain_data(tmp_path):
    path = checkpoint_path(tmp_path, 250)
    assert path.name == "model_00250.pt"
    save_checkpoint(path, entries())
    assert equal(read_checkpoint(path), entries())
    assert equal(torch.load(path, weights_only=True), entries())     # torch alone, nothing allowed besides
    assert [p.name for p in tmp_path.iterdir()] == ["model_00250.pt"]


@pytest.mark.slow
def test_kill_9_at_any_moment_of_a_save_leaves_a_whole_checkpoint(run, tmp_path):
    """A child saves checkpoint after checkpoint under one name; it is killed 12 times."""
    rc, out, err = run("-c", f"""
import os, random, signal, time, torch
from pathlib import Path
from exactgpt.checkpoint import read_checkpoint, save_checkpoint
from exactgpt.files import FolderLock
path, torn = Path({str(tmp_path / "model_00001.pt")!r}), 0
with FolderLock(path.parent, 0) as lock:
    lock.claim()
    save_checkpoint(path, dict(step=0, w=torch.zeros(4_000_000)))
for i in range(12):
    child = os.fork()
    if child == 0:
        lock = FolderLock(path.parent, 0)
        for n in range(1, 10**6):
            save_checkpoint(path, dict(step=n, w=torch.full((4_000_000,), float(n))))
    time.sleep(random.uniform(0.02, 0.12))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    torn += len(list(path.parent.glob("*.tmp")))
    stored = read_checkpoint(path)
    assert (stored["w"] == stored["step"]).all(), stored["step"]
FolderLock(path.parent, 0)
print(torn, sorted(p.name for p in path.parent.iterdir()))""")
    assert rc == 0, err
    torn, names = out.split(maxsplit=1)
    assert int(torn) >= 1 and names == "['.lock', 'model_00001.pt']\n"         # some kills hit a half-written file


def test_a_write_that_fails_leaves_the_old_checkpoint(run, tmp_path):
    """The kernel refuses to let files grow beyond 100 kB, as a full disk or a quota does."""
    rc, out, err = run("-c", f"""
import resource, torch
from pathlib import Path
from exactgpt.checkpoint import read_checkpoint, save_checkpoint
from exactgpt.config import UserError
path = Path({str(tmp_path / "model_00001.pt")!r})
save_checkpoint(path, dict(step=1))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(path, dict(step=2, w=torch.zeros(1_000_000)))
except UserError as error:
    print("UserError", len(str(error).splitlines()))
print(read_checkpoint(path), [p.name for p in path.parent.iterdir()])""")
    assert (rc, out) == (0, "UserError 1\n{'step': 1} ['model_00001.pt']\n"), err


def test_a_disk_without_room_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    path = tmp_path / "model_00001.pt"
    save_checkpoint(path, dict(step=1))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match=r"needs 4 MB, the disk has 1 kB left"):
        save_checkpoint(path, dict(w=torch.zeros(1_000_000)))
    assert read_checkpoint(path) == dict(step=1) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("flags, files, bests", [
    (dict(), 4, 2), (dict(checkpoint_every=0), 1, 2), (dict(checkpoint_every=0, eval_every=0), 1, 0),
    (dict(max_steps=3, checkpoint_every=2, eval_every=3), 2, 1), (dict(max_steps=0), 1, 0),
    (dict(max_steps=1000), 1, 2), (dict(max_steps=1001, keep_checkpoints=1), 2, 2)])
def test_the_disk_needs_room_for_the_files_that_a_run_will_write(flags, files, bests):
    """The newest few and the best, each beside the one that it replaces; what is written once replaces none."""
    config = train.TrainConfig(**flags)
    steps = train.MAX_STEPS if config.max_steps is None else config.max_steps
    assert disk_bytes(config, 1000, steps) == 4000 * (3 * files + bests)


def test_a_disk_of_64_gb_has_room_for_a_large_model_that_is_saved_once(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(64 * 10**9, 0, 60 * 10**9))
    runtime = SimpleNamespace(is_main=True, broadcast=lambda action: action())
    once = dict(model="gpt2-xl", log_dir=str(tmp_path), checkpoint_every=0)
    run = 1_557_611_200, 1000       # parameters, steps
    check_disk(train.TrainConfig(**once), *run, runtime)                          # 18.7 GB, and twice 6.2 of the best
    check_disk(train.TrainConfig(**once, eval_every=0), *run, runtime)
    with pytest.raises(UserError, match=r"the checkpoints need 87\.2 GB more, but the disk that holds .* has 60 GB"):
        check_disk(train.TrainConfig(model="gpt2-xl", log_dir=str(tmp_path), checkpoint_every=250), *run, runtime)


def test_the_optimizers_state_comes_to_the_other_ranks_last_and_onto_their_cards(monkeypatch, make_shards, tmp_path):
    """Else a node held the checkpoint in memory once a rank, and a card twice while the micro-batch is sought."""
    flags = ["--n_layer", "1", "--n_head", "1", "--n_embd", "8", "--block_size", "8", "--device", "cpu", "--dtype",
             "fp32", "--total_batch_size", "32", "--hellaswag_every", "0", "--sample_every", "0", "--eval_every", "0",
             "--schedule", "wsd", "--warmup_steps", "0", "--data_dir", str(make_shards([900])), "--log_dir",
             str(tmp_path / "logs"), "--max_steps"]
    train.main([*flags, "1"])
    sent, broadcast, find = [], Runtime.broadcast, train.device.find_micro_batch_size
    def note_what_goes_to_the_cards(self, action, **how):
        value = broadcast(self, action)
        sent.extend([(value, how)] * bool(how))
        return value
    monkeypatch.setattr(Runtime, "broadcast", note_what_goes_to_the_cards)
    monkeypatch.setattr(train.device, "find_micro_batch_size", lambda *args, **more: (sent.append("sought"),
                                                                                  find(*args, **more))[1])
    train.main([*flags, "20"])
    (checkpoint, first), sought, (state, last) = sent
    assert sought == "sought" and first == last == dict(on_device=True)
    assert checkpoint["step"] == 1 and checkpoint["optimizer"] is None
    assert state["model"] is None and state["optimizer"]["state"]


def test_no_flipped_bit_goes_unnoticed(tmp_path):
    """torch.load itself does not look at checksums: a flipped bit in a tensor would pass for a weight."""
    path, original = tmp_path / "model_00001.pt", entries()
    save_checkpoint(path, original)
    whole, noticed = path.read_bytes(), 0
    rng = random.Random(0)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert equal(read_checkpoint(path), original)            # it hit padding
        except CheckpointError:
            noticed += 1
    assert noticed > 150


def flip_a_weight(data):
    at = data.index(torch.tensor([[0.25] * 8]).numpy().tobytes()) + 5
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1:]


@pytest.mark.parametrize("damage", [
    lambda data: data[:len(data) // 2], lambda data: data[:-1], lambda data: b"", lambda data: os.urandom(5000),
    lambda data: b"\0" * len(data), lambda data: b"hello world, this is no checkpoint", lambda data: data[100:],
    flip_a_weight, lambda data: pickle.dumps([1, 2]),
], ids=["half", "last byte", "empty", "garbage", "zeros", "text", "no head", "flipped bit", "a list"])
def test_a_damaged_newest_checkpoint_is_skipped_with_one_line(tmp_path, damage):
    for step in (5, 10):
        save_checkpoint(checkpoint_path(tmp_path, step), dict(entries(step), w=torch.full((1, 8), 0.25)))
    newest = checkpoint_path(tmp_path, 10)
    newest.write_bytes(damage(newest.read_bytes()))
    notices = []
    assert newest_valid(tmp_path, notices.append)["step"] == 5
    assert len(notices) == 1 and notices[0].startswith("skipping a checkpoint: ") and "\n" not in notices[0]
    assert str(newest) in notices[0] and "run code" not in notices[0]
    newest_of_damaged = checkpoint_path(tmp_path, 5)
    newest_of_damaged.write_bytes(damage(newest_of_damaged.read_bytes()))
    assert "no checkpoint in" in refusal(newest_valid, tmp_path, notices.append)


def test_the_newest_is_the_highest_step_that_has_all_entries(tmp_path):
    for step in (99_999, 100_000, 7):
        save_checkpoint(checkpoint_path(tmp_path, step), entries(step))
    for other in ("model_best.pt", "model_00200.pt.tmp", "model_1.pt", "xmodel_00300.pt", "model_00400.pth"):
        (tmp_path / other).write_bytes(b"not looked at")
    (tmp_path / "model_200000.pt").mkdir()
    (tmp_path / "model_300000.pt").symlink_to(tmp_path / "nowhere")
    assert [step for step, _ in list_checkpoints(tmp_path)] == [100_000, 99_999, 7]
    assert newest_valid(tmp_path)["step"] == 100_000
    for step in (99_999, 100_000):
        save_checkpoint(checkpoint_path(tmp_path, step), dict(entries(step), optimizer=None))
    notices = []
    assert newest_valid(tmp_path, notices.append)["step"] == 7
    assert [n.split(": ")[1].rsplit("/", 1)[1] for n in notices] == ["model_100000.pt cannot be resumed",
                                                                     "model_99999.pt cannot be resumed"]


def test_a_folder_without_checkpoints_is_a_fresh_run(tmp_path):
    assert newest_valid(tmp_path) is None and newest_valid(tmp_path / "absent") is None


class Bomb:
    """Unpickled without care, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class AllowedName:
    """A class pickled under the name of build-nanogpt's config, which read_checkpoint lets in; its field is a bomb."""

    def __init__(self, bomb):
        self.n_layer = bomb


AllowedName.__module__, AllowedName.__qualname__ = "__main__", "GPTConfig"


@pytest.mark.parametrize("place", [
    lambda bomb: bomb, lambda bomb: dict(entries(), config=bomb), lambda bomb: dict(entries(), optimizer=[bomb]),
    lambda bomb: dict(entries(), config=AllowedName(bomb)),
], ids=["file", "config", "optimizer", "field of an allowed config"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_bomb_does_nothing_and_is_one_line(tmp_path, place, zipped, capfd, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "GPTConfig", AllowedName, raising=False)
    path = tmp_path / "model_00001.pt"
    torch.save(place(Bomb(tmp_path / "BOOM")), path, _use_new_zipfile_serialization=zipped)
    message = refusal(open_model, path)
    assert message.startswith(f"cannot load {path}: it would run code")
    assert not (tmp_path / "BOOM").exists() and capfd.readouterr() == ("", "")
    torch.load(path, weights_only=False)                             # the bomb is a live one
    assert (tmp_path / "BOOM").exists()


@pytest.mark.parametrize("stored, message", [
    ([1], "is damaged, or it is not a checkpoint (AttributeError)"), ([("a", 1)], "it is not a checkpoint"),
    (torch.ones(3, 2), "it is not a checkpoint"),
    ({"a": 1}, "holds no model: the entries 'config' and 'model' are missing"),
    (dict(entries(), config="gpt2"), "holds no model"), (dict(entries(), config={"n_layer": 1}), "weight"),
    (dict(entries(), config={"width": 1}), "not a GPT-2 config"), (dict(entries(), model=[1]), "holds no model"),
    (dict(entries(), config=dict(entries()["config"], n_head=3)), "n_embd (8) must be a multiple of n_head (3)"),
    (dict(entries(), model={}), "missing weight"), (dict(entries(), model={1: 2}), "unknown weight 1"),
    (dict(entries(), tokenizer="gpt2"), "tokenizer is damaged"),
    (dict(entries(), model_args=3), "holds no model"),
], ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_a_file_of_something_else_is_named(tmp_path, stored, message):
    torch.save(stored, tmp_path / "x.pt")
    assert message in refusal(open_model, tmp_path / "x.pt")


def test_a_file_that_is_not_there_is_named(tmp_path):
    missing = tmp_path / "x.pt"
    assert refusal(open_model, missing) == f"cannot read the checkpoint {missing}: No such file or directory"
    (tmp_path / "folder.pt").mkdir()
    assert "folder.pt: Is a directory" in refusal(read_checkpoint, tmp_path / "folder.pt")
    assert "no model_XXXXX.pt below" in refusal(open_model, tmp_path)


def test_prefixes_of_compile_and_ddp_go_in_any_chain_and_masks_with_them():
    model = GPT(GPTConfig(8, 65, 1, 2, 8))
    chains = itertools.cycle(["", "module.", "_orig_mod.module.", "module._orig_mod.", "module.module."])
    state = {prefix + key: tensor for prefix, (key, tensor) in zip(chains, model.state_dict().items())}
    masks = {"_orig_mod.transformer.h.0.attn.bias": 5, "transformer.h.0.attn.masked_bias": 6}
    assert equal(dict(build_model(model.config_dict(), {**state, **masks}, "").state_dict()), dict(model.state_dict()))
    with pytest.raises(CheckpointError, match=r"unknown weight transformer.module.d"):      # not at the front
        build_model(model.config_dict(), {**state, "transformer.module.d": 4}, "")


def test_our_checkpoint_opens_with_its_tokenizer_step_and_loss(tmp_path):
    trained = Tokenizer([("a", "b"), ("ab", "c")], "bpe-test")
    model = GPT(GPTConfig(8, 320, 1, 2, 8))
    save_checkpoint(tmp_path / "a.pt", dict(model=model.state_dict(), config=model.config_dict(), step=7, val_loss=1.5,
                                            tokenizer=trained.to_checkpoint(), base={"source": "gpt2"}))
    opened = open_model(tmp_path / "a.pt")
    assert (opened.step, opened.val_loss, opened.source) == (7, 1.5, str(tmp_path / "a.pt"))
    assert opened.tokenizer.merges == trained.merges and opened.tokenizer.encode("abcab") == trained.encode("abcab")
    assert opened.base == {"source": "gpt2"}
    assert equal(dict(opened.model.state_dict()), dict(model.state_dict()))


def test_a_hugging_face_folder_opens_without_a_tokenizer_of_its_own(gpt_nano):
    opened = open_model(gpt_nano)
    assert opened.tokenizer is None and opened.model.config.vocab_size == 3


def nano_state(theirs, bias):
    """The state dict that nanoGPT and build-nanogpt store for the weights of a GPT2LMHeadModel."""
    state = {}
    for name, tensor in theirs.state_dict().items():
        if bias or not name.endswith("bias"):
            state[name] = in_our_layout(theirs, name, tensor).contiguous().clone()
    return state


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_file_gives_its_logits_with_the_exact_gelu(tmp_path, tiny_gpt2, bias):
    theirs = tiny_gpt2(activation_function="gelu")                   # transformers' name of the exact GELU
    if not bias:
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if name.endswith("bias"):
                    parameter.zero_()
    state = {f"_orig_mod.{k}": v for k, v in nano_state(theirs, bias).items()}
    for i in range(2):
        state[f"_orig_mod.transformer.h.{i}.attn.bias"] = torch.ones(32, 32).tril().view(1, 1, 32, 32)
    args = dict(n_layer=2, n_head=3, n_embd=24, block_size=32, bias=bias, vocab_size=65, dropout=0.1)
    torch.save(dict(model=state, optimizer={"state": {}}, model_args=args, iter_num=2000,
                    best_val_loss=torch.tensor(1.47), config=dict(out_dir="out", device="cuda")), tmp_path / "ckpt.pt")
    opened = open_model(tmp_path / "ckpt.pt")
    torch.testing.assert_close(opened.model.eval()(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)
    assert (opened.step, opened.tokenizer) == (2000, None)           # 65 characters are not GPT-2's vocabulary
    assert opened.val_loss == pytest.approx(1.47)
    with torch.no_grad():
        tanh_logits = gpt_from_transformers(theirs)(IDS)
        assert (tanh_logits - theirs(IDS).logits).abs().max() > 1e-3   # the tanh GELU is told apart


BUILD_NANOGPT = """
import sys, torch
from dataclasses import dataclass
@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    {field}
source, target = sys.argv[1:]
config = GPTConfig(32, {vocab}, 2, 3, 24)
torch.save({{'model': torch.load(source), 'config': config, 'step': 19072, 'val_loss': 3.07}}, target)
"""


def test_build_nanogpts_file_with_its_pickled_config_gives_its_logits(run, tmp_path, tiny_gpt2):
    theirs = tiny_gpt2(vocab_size=50304)
    torch.save(nano_state(theirs, True), tmp_path / "state.pt")
    target = tmp_path / "model_19072.pt"
    rc, _, err = run("-c", BUILD_NANOGPT.format(field="", vocab=50304), tmp_path / "state.pt", target)
    assert rc == 0, err
    opened = open_model(target)
    torch.testing.assert_close(opened.model.eval()(IDS), theirs(IDS).logits, atol=1e-4, rtol=1e-4)
    assert (opened.step, opened.val_loss) == (19072, 3.07) and opened.model.config.activation == "gelu_tanh"
    assert opened.tokenizer is gpt2_tokenizer()
    with pytest.raises(pickle.UnpicklingError, match="GPTConfig"):
        torch.load(target, weights_only=True)                        # it is pickled, and the name does not stay allowed


def test_a_pickled_config_with_fields_that_we_do_not_know_is_refused(run, tmp_path, tiny_gpt2):
    torch.save(nano_state(tiny_gpt2(), True), tmp_path / "state.pt")
    code = BUILD_NANOGPT.format(field="rotary: bool = True", vocab=65)
    assert run("-c", code, tmp_path / "state.pt", tmp_path / "x.pt")[0] == 0
    assert "not a GPT-2 config" in refusal(open_model, tmp_path / "x.pt")


def test_the_newest_model_is_the_file_written_last_in_any_run(tmp_path):
    now = time.time()
    names = ("a/model_00500.pt", "b/c/model_00010.pt", "model_00900.pt", "a/model_best.pt", "a/model_00700.pt.tmp")
    for age, name in zip((30, 10, 20, 0, 0), names):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (now - age, now - age))
    assert newest_model(tmp_path) == tmp_path / "b/c/model_00010.pt"
    assert "no model_XXXXX.pt below" in refusal(newest_model, tmp_path / "empty")
    assert "a folder with a config.json" in refusal(newest_model, tmp_path / "empty")


def test_weights_in_half_precision_open_in_fp32(tmp_path):
    """From fp16 a GradScaler refuses to train, from bf16 training would have no fp32 master weights."""
    model = GPT(GPTConfig(8, 320, 1, 2, 8))
    halves = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save_checkpoint(tmp_path / "half.pt", dict(model=halves, config=model.config_dict()))
    opened = open_model(tmp_path / "half.pt").model.state_dict()
    assert all(tensor.dtype == torch.float32 and torch.equal(tensor, halves[name].float())
               for name, tensor in opened.items())
