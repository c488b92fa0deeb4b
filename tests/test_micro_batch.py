"""device.py: the search for a micro-batch size, with faked GPU memory."""
import functools
import gc
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.exc import BackendCompilerFailed
from torch._functorch.compilers import nop
from torch.nn.parallel import DistributedDataParallel

import train
from exactgpt import device
from exactgpt.classifier import Classifier
from exactgpt.config import UserError
from exactgpt.finetune import Objective, add_adapter
from finetune_instruct import InstructConfig
from model import GPT, GPTConfig
from tests.common import TINY, logged_losses


def fake_gpu(monkeypatch, rows_that_fit, kind="cuda"):
    """Return (a runtime on a device on which that many rows fit, the list of sizes that were tried)."""
    tried = []

    def fits(module, block_size, size, runtime):
        tried.append(size)
        return size <= rows_that_fit
    monkeypatch.setattr(device, "fits_in_memory", fits)
    return SimpleNamespace(device=torch.device(kind), sum=lambda *values: values), tried


RAW = SimpleNamespace()
RUNTIME = SimpleNamespace(device=torch.device("cpu"), autocast=lambda: torch.autocast("cpu", enabled=False))


def test_the_largest_divisor_that_fits_is_found_by_halving(monkeypatch):
    runtime, tried = fake_gpu(monkeypatch, 20)
    assert device.find_micro_batch_size(RAW, 1024, 0, 512, runtime) == 16
    assert tried == [64, 32, 16]                      # 64 x 1024 tokens already keep a GPU busy
    runtime, tried = fake_gpu(monkeypatch, 9)
    assert device.find_micro_batch_size(RAW, 1024, 0, 60, runtime) == 6   # 60, 30, 15, 6: each a divisor of 60


def test_a_size_fits_only_if_it_fits_on_every_rank(monkeypatch):
    runtime, tried = fake_gpu(monkeypatch, 64)
    runtime.sum = lambda too_large: (too_large + (tried[-1] > 8),)      # with another rank's answer
    assert device.find_micro_batch_size(RAW, 1024, 0, 512, runtime) == 8
    assert tried == [64, 32, 16, 8]                                    # the ranks try the same sizes


def test_a_size_that_does_not_fit_names_the_next_smaller_valid_one(monkeypatch):
    runtime, _ = fake_gpu(monkeypatch, 20)
    with pytest.raises(UserError, match="use --micro_batch_size 16, or 0"):
        device.find_micro_batch_size(RAW, 1024, 32, 512, runtime)
    assert device.find_micro_batch_size(RAW, 1024, 16, 512, runtime) == 16
    with pytest.raises(UserError, match="use --micro_batch_size 32, or 0"):
        device.find_micro_batch_size(RAW, 1024, 48, 96, runtime)


def test_a_size_found_on_a_larger_gpu_is_searched_again(monkeypatch):
    runtime, tried = fake_gpu(monkeypatch, 20)
    assert device.find_micro_batch_size(RAW, 1024, 64, 512, runtime, insist=False) == 16
    assert tried == [64, 32, 16]


def test_an_error_if_not_even_one_row_fits(monkeypatch):
    runtime, _ = fake_gpu(monkeypatch, 0)
    with pytest.raises(UserError, match="--recompute"):
        device.find_micro_batch_size(RAW, 1024, 0, 512, runtime)


def test_on_a_cpu_a_micro_batch_has_at_most_4096_tokens(monkeypatch):
    runtime, tried = fake_gpu(monkeypatch, 0, kind="cpu")
    assert device.find_micro_batch_size(RAW, 1024, 0, 512, runtime) == 4 and tried == []
    assert device.find_micro_batch_size(RAW, 8192, 0, 512, runtime) == 1


def test_a_trial_leaves_the_weights_bitwise_unchanged():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=8))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert device.fits_in_memory(model, 8, 2, RUNTIME)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


class Watched(GPT):
    """A GPT that records at each forward pass the batch's strides and if optimizer state and gradients exist."""

    def forward(self, x, y):
        p = self.transformer.wte.weight
        adam = next(o for o in gc.get_objects() if isinstance(o, torch.optim.AdamW) and p in o.state)
        self.seen.append((x.stride(), y.stride(), len(adam.state[p]), p.grad is not None))
        return super().forward(x, y)


def test_a_trial_holds_what_a_step_with_accumulation_holds(monkeypatch):
    """AdamW's state from the start, training's strides, a second micro-batch next to the first's gradients."""
    model = Watched(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=8))
    model.seen, steps = [], []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (steps.append(len(model.seen)), step(self)))
    assert device.fits_in_memory(model, 8, 2, RUNTIME)
    assert model.seen == [((9, 1), (9, 1), 3, False), ((9, 1), (9, 1), 3, True)]
    assert steps == [0, 2]                     # the first allocates the state, the second updates


def test_a_trial_in_ddp_reduces_nothing_and_keeps_gradients_next_to_the_buckets():
    """A rank that runs out of memory must not leave the others waiting in a collective."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model = GPT(GPTConfig(block_size=8, vocab_size=64, n_layer=1, n_head=2, n_embd=8))
        ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
        reduced, grads = [], []
        ddp.register_comm_hook(None, lambda _, bucket: reduced.append(bucket))
        model.transformer.wte.weight.register_post_accumulate_grad_hook(lambda p: grads.append(p.grad._is_view()))
        assert device.fits_in_memory(ddp, 8, 2, RUNTIME)
        assert reduced == [] and grads == [False, False]
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), BackendCompilerFailed(None, torch.OutOfMemoryError("full"), None),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Triton Error [CUDA]: out of memory"), RuntimeError("CUDNN_..._DEVICE_ALLOCATION_FAILED")])
def test_out_of_memory_means_that_a_size_does_not_fit(monkeypatch, error):
    """The code compiled for that size is dropped: each size compiles again, and after eight torch would run eager."""
    monkeypatch.setattr(torch._dynamo, "reset", lambda: forgotten.append(True))
    forgotten = []
    assert not device.fits_in_memory(Failing(error), 8, 2, RUNTIME) and forgotten


def test_any_other_error_is_raised():
    with pytest.raises(RuntimeError, match="illegal memory access"):
        device.fits_in_memory(Failing(RuntimeError("CUDA error: an illegal memory access")), 8, 2, RUNTIME)


class Failing(torch.nn.Linear):
    """A module whose forward pass raises."""

    def __init__(self, error):
        super().__init__(2, 2)
        self.error = error

    def forward(self, x, y):
        raise self.error


@pytest.mark.parametrize("problem", ["here", "on another rank"])
def test_a_compilation_failure_on_one_rank_is_raised_on_all(monkeypatch, problem):
    runtime, _ = fake_gpu(monkeypatch, 64)
    if problem == "here":
        def fits(*_):
            raise BackendCompilerFailed(None, ValueError("no ptxas\n here"), None)
        monkeypatch.setattr(device, "fits_in_memory", fits)
    else:
        runtime.sum = lambda value: (value + 1,)
    with pytest.raises(device.CompilationFailed, match="no ptxas here" if problem == "here" else problem) as caught:
        device.find_micro_batch_size(RAW, 1024, 0, 512, runtime, compiled=True)
    assert len(str(caught.value)) <= 160


def test_without_compilation_the_micro_batch_size_is_searched_again(monkeypatch, make_shards, tmp_path, capsys):
    """A size that fits compiled may not fit eager. With --compile on it is an error."""
    def find(module, *_, **options):
        tried.append(type(module).__name__)
        if len(tried) == 1:
            raise device.CompilationFailed("no ptxas")
        return 2
    monkeypatch.setattr(train.device, "find_micro_batch_size", find)
    monkeypatch.setattr(train.device, "choose_compile", lambda *_: (True, None))
    flags = ["--n_layer", "1", "--n_head", "1", "--n_embd", "8", "--block_size", "8", "--device", "cpu",
             "--total_batch_size", "32", "--max_steps", "1", "--hellaswag_every", "0", "--sample_every", "0",
             "--eval_every", "0", "--data_dir", str(make_shards([900])), "--log_dir", str(tmp_path / "logs")]
    tried = []
    train.main(flags)
    assert tried == ["OptimizedModule", "GPT"]
    out = capsys.readouterr().out
    assert "torch.compile is off: the model cannot be compiled here (no ptxas)" in out
    assert "compile off" in out and "2 micro-batches x 2 rows" in out
    tried = []
    with pytest.raises(UserError, match=r"--compile on: .*\(no ptxas\); use --compile off"):
        train.main([*flags, "--log_dir", str(tmp_path / "other"), "--compile", "on"])


@pytest.mark.parametrize("fails_in", ["forward", "backward", "validation"])
def test_a_model_that_cannot_be_compiled_trains_without_it(make_shards, tmp_path, monkeypatch, capsys, fails_in):
    """A small function could be compiled, but then the compiler fails with an error of its own."""
    def fail(graph, inputs):
        raise OSError("ptxas died\nwith signal 11")

    def backend(graph, inputs):
        keep = aot_autograd(fw_compiler=nop, bw_compiler=fail if fails_in == "backward" else nop)
        fails = fails_in == "forward" or (fails_in == "validation" and not torch.is_grad_enabled())
        return (fail if fails else keep)(graph, inputs)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(train.device, "choose_compile", lambda *_: (True, None))
    folder = make_shards([900], val_sizes=[100])

    def start(name, *more):
        train.main(list(map(str, (*TINY, "--total_batch_size", 32, "--max_steps", 3, "--eval_every", 2, "--val_tokens",
                                  64, "--data_dir", folder, "--log_dir", tmp_path / name, *more))))
        return capsys.readouterr().out
    out = start("auto")
    notice, = [line for line in out.splitlines() if line.startswith("torch.compile is off: the model cannot be")]
    assert "ptxas died with signal 11" in notice and "compile off" in out
    monkeypatch.setattr(train.device, "choose_compile", lambda *_: (False, None))
    start("off")
    assert logged_losses(tmp_path / "auto") == logged_losses(tmp_path / "off")
    monkeypatch.setattr(train.device, "choose_compile", lambda *_: (True, None))
    with pytest.raises(UserError, match=r"--compile on: the model cannot be compiled here .*use --compile off"):
        start("on", "--compile", "on")


@pytest.mark.parametrize("kind", ["full", "lora", "balanced", "head"])
def test_a_fine_tuning_trial_leaves_weights_and_frozen_parameters_unchanged(kind):
    model = GPT(GPTConfig(block_size=1024, vocab_size=64, n_layer=1, n_head=2, n_embd=16))
    if kind in ("balanced", "head"):
        model = Classifier.from_gpt(model, ["a", "b"])
    if kind == "head":
        model.requires_grad_(False).score.requires_grad_(True)
    if kind == "lora":
        add_adapter(model, InstructConfig(init_from="base", lora_r=2))
    objective = Objective(model, "score" if hasattr(model, "score") else "lm_head",
                          torch.ones(2) if kind == "balanced" else None)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    frozen = [not p.requires_grad for p in model.parameters()]
    runtime = SimpleNamespace(device=torch.device("cpu"), autocast=lambda: torch.autocast("cpu", torch.float16))
    assert device.fits_in_memory(objective, 1024, 64, runtime)      # 65,536 targets: their sum is beyond fp16
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert frozen == [not p.requires_grad for p in model.parameters()]


def test_divisors_are_complete_and_largest_first():
    for n in (1, 2, 7, 12, 64, 97, 360, 512):
        assert device.divisors(n) == [d for d in range(n, 0, -1) if n % d == 0]


def test_a_micro_batch_size_that_does_not_divide_names_those_that_do():
    for d in (1, 2, 3, 4, 6, 12):
        device.check_micro_batch_size(d, 12)
    with pytest.raises(UserError, match=r"5 does not divide the 12 rows .* use one of 12, 6, 4, 3, 2, 1, or 0"):
        device.check_micro_batch_size(5, 12)
    with pytest.raises(UserError, match="--micro_batch_size 24"):
        device.check_micro_batch_size(24, 12)
