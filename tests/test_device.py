"""device.py: how "auto" is resolved on made-up hardware, and what this CPU really does."""
import platform

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

from exactgpt import device
from exactgpt.config import UserError
from exactgpt.device import Hardware, attention_backend, choose_compile, choose_device, choose_dtype, probe_hardware
from model import GPTConfig

P100 = Hardware("cuda", "Tesla P100-PCIE-16GB", (6, 0))
V100 = Hardware("cuda", "Tesla V100-SXM2-16GB", (7, 0))
T4 = Hardware("cuda", "Tesla T4", (7, 5))
A100 = Hardware("cuda", "NVIDIA A100-SXM4-80GB", (8, 0))
H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", (9, 0))
MPS = Hardware("mps", "Apple GPU")
NEW_CPU, OLD_CPU = Hardware("cpu", cpu_bf16=True), Hardware("cpu")


@pytest.mark.parametrize("hardware, dtype", [
    (P100, "fp16"), (V100, "fp16"), (T4, "fp16"), (A100, "bf16"), (H100, "bf16"), (MPS, "fp32"), (NEW_CPU, "bf16"),
    (OLD_CPU, "fp32"),
], ids=lambda value: getattr(value, "name", value))
def test_auto_dtype_is_supported_by_the_hardware(hardware, dtype):
    assert choose_dtype("auto", hardware) == dtype


@pytest.mark.parametrize("hardware", [P100, V100, T4], ids=lambda h: h.name)
def test_emulated_bf16_is_refused(hardware):
    with pytest.raises(UserError, match=f"--dtype bf16: {hardware.name} would only emulate it; use --dtype fp16"):
        choose_dtype("bf16", hardware)


def test_a_supported_dtype_is_used_as_requested():
    for hardware in (A100, H100, NEW_CPU, OLD_CPU):
        assert [choose_dtype(d, hardware) for d in ("bf16", "fp16", "fp32")] == ["bf16", "fp16", "fp32"]
    assert choose_dtype("fp16", T4) == "fp16" and choose_dtype("bf16", MPS) == "bf16"
    with pytest.raises(UserError, match="--dtype fp16 is not supported on mps"):
        choose_dtype("fp16", MPS)


@pytest.mark.parametrize("hardware", [MPS, NEW_CPU, OLD_CPU], ids=["mps", "cpu with bf16", "cpu"])
def test_auto_compiles_on_cuda_only(hardware):
    assert choose_compile("auto", hardware, torch.device("cpu")) == (False, None)


@pytest.mark.parametrize("hardware", [P100, V100, T4, A100, H100], ids=lambda h: h.name)
def test_auto_compile_is_on_if_and_only_if_a_compiled_function_runs(monkeypatch, hardware):
    def compile_without_triton(function):
        raise BackendCompilerFailed(None, RuntimeError("no\nTriton"), None)
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert choose_compile("auto", hardware, torch.device("cpu")) == (True, None)
    monkeypatch.setattr(torch, "compile", compile_without_triton)
    compiled, notice = choose_compile("auto", hardware, torch.device("cpu"))
    assert not compiled and "it does not work here (backend='?' raised: RuntimeError: no Triton)" in notice
    assert choose_compile("off", hardware, torch.device("cpu")) == (False, None)
    with pytest.raises(UserError, match=r"--compile on: .*no Triton\).*--compile off"):
        choose_compile("on", hardware, torch.device("cpu"))


@pytest.mark.slow
def test_a_missing_compiler_is_reported_in_one_line(run, tmp_path):
    code = ("import torch; from exactgpt import device; "
            "print(device.choose_compile('auto', device.Hardware('cuda'), torch.device('cpu')))")
    env = {"CC": "/none/cc", "CXX": "/none/c++", "PATH": "/none", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    rc, out, _ = run("-c", code, env=env)
    assert rc == 0 and "C++ compiler" in out and len(out.splitlines()) == 1


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_each_process_gets_its_own_gpu(two_gpus):
    assert [choose_device("auto", rank, 2) for rank in (0, 1)] == [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert choose_device("cuda", 1, 2) == torch.device("cuda", 1)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    assert choose_device("cpu", 1, 8).type == "cpu"                 # any number of processes


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_more_processes_than_gpus_is_an_error(two_gpus, requested):
    with pytest.raises(UserError, match=r"8 CUDA devices \(processes: 8\), but torch sees 2 here; use .*processes"):
        choose_device(requested, 0, 8)


def test_a_missing_gpu_is_an_error(two_gpus):
    with pytest.raises(UserError, match=r"--device cuda:2 needs 3 CUDA devices .*, but torch sees 2 here"):
        choose_device("cuda:2")


def test_without_gpus_auto_is_the_cpu_and_cuda_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto", 3, 4) == torch.device("cpu")
    with pytest.raises(UserError, match="torch sees 0 here; use --device auto"):
        choose_device("cuda")
    with pytest.raises(UserError, match="no Apple GPU"):
        choose_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto").type == "mps"


@pytest.mark.parametrize("requested", ["gpu", "", "xpu", "meta", "cuda:x", "cuda:-1"])
def test_an_unknown_device_is_an_error(requested):
    with pytest.raises(UserError, match="--device must be auto, cpu, cuda, cuda:N or mps"):
        choose_device(requested)


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True)])
def test_a_cpu_supports_bf16_with_avx512_bf16_or_amx(monkeypatch, flags):
    for feature, has in zip(("avx512_bf16", "amx_tile"), flags):
        monkeypatch.setattr(torch.cpu, f"_is_{feature}_supported", lambda has=has: has)
    assert probe_hardware(torch.device("cpu")) == Hardware("cpu", device.cpu_name(), cpu_bf16=any(flags))


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989), ("NVIDIA A100-PCIE-40GB", 312),
    ("NVIDIA GH200 480GB", 989), ("NVIDIA A10", 125), ("NVIDIA A10G", 70), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
    ("Tesla V100-SXM2-16GB", 125), ("Tesla T4", 65), ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA RTX A6000", 155),
])
def test_known_gpus_have_their_peak(name, tflops):
    assert Hardware("cuda", name, (8, 0)).peak_flops() == tflops * 1e12


@pytest.mark.parametrize("name", [
    "NVIDIA RTX A4000", "NVIDIA RTX A1000", "NVIDIA T400", "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA GeForce RTX 4080 SUPER", "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 4090 D", "NVIDIA H20", "NVIDIA A2", "AMD Instinct MI300X",
])
def test_an_unknown_gpu_has_no_mfu_rather_than_a_wrong_one(name):
    assert Hardware("cuda", name, (8, 0)).peak_flops() is None


def test_only_cuda_gpus_have_a_peak():
    assert OLD_CPU.peak_flops() is None and MPS.peak_flops() is None


@pytest.fixture
def restored_attention():
    yield
    device.enable_attention("auto")


@pytest.mark.parametrize("requested, used", [("auto", "flash"), ("flash", "flash"), ("math", "math")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_has_flash_and_math_attention(restored_attention, requested, used, dtype):
    assert attention_backend(requested, torch.device("cpu"), dtype, GPTConfig(16, 64, 1, 2, 16)) == used
    with torch.profiler.profile() as profile:
        q = torch.randn(1, 2, 16, 8, dtype=dtype)
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert any(f"{used}" in event.key for event in profile.key_averages())   # later calls use it too


@pytest.mark.parametrize("requested", ["efficient", "cudnn"])
def test_a_cpu_does_not_have_the_other_attention_backends(restored_attention, requested):
    with pytest.raises(UserError, match=f"--attention {requested}: cpu has no such backend for float32 and heads of 8"):
        attention_backend(requested, torch.device("cpu"), torch.float32, GPTConfig(16, 64, 1, 2, 16))


@pytest.mark.parametrize("requested, left", [
    ("auto", ["flash", "efficient", "math"]), ("flash", ["flash", "efficient", "math"]),
    ("math", ["efficient", "math"]), ("cudnn", ["efficient", "math"])])
def test_attention_without_cudnn_uses_flash_only_if_it_was_enabled(restored_attention, requested,
                                                                                       left):
    device.enable_attention(requested)
    c = torch.backends.cuda
    with device.attention_without_cudnn():
        enabled = dict(flash=c.flash_sdp_enabled(), efficient=c.mem_efficient_sdp_enabled(), math=c.math_sdp_enabled(),
                       cudnn=c.cudnn_sdp_enabled())
    assert [name for name, is_on in enabled.items() if is_on] == left
    assert c.cudnn_sdp_enabled() == (requested in ("auto", "cudnn"))


def test_mps_has_one_attention_backend(restored_attention):
    shape = GPTConfig(16, 64, 1, 2, 16)
    assert attention_backend("auto", torch.device("mps"), torch.float32, shape) == "mps"
    with pytest.raises(UserError, match="--attention flash: mps has no such backend"):
        attention_backend("flash", torch.device("mps"), torch.float32, shape)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_except_while_shapes_vary(run):
    code = """
import resource, torch
from exactgpt.device import keep_freed_memory
cpu = torch.device("cpu")
def kept_of_a_block():
    rss = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20
    before = rss()
    block = torch.ones(50 * 2**20)
    del block
    return rss() - before
keep_freed_memory(cpu)
keep_freed_memory(cpu, keep=False)
inside = kept_of_a_block()
keep_freed_memory(cpu)
print(inside, kept_of_a_block())
"""
    rc, out, err = run("-c", code, env={"LD_PRELOAD": ""})      # no preloaded allocator
    assert rc == 0, err
    inside, after = map(float, out.split())
    assert inside < 20 and after > 180, out      # MB, of 200
