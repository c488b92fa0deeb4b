"""Simulate a CUDA GPU: torch.compile generates the GPU's program, which then runs on shapes without data.

    with fake_gpu():
        compiled = compile_for_gpu(model)         # the model and its inputs are FakeTensors on the CPU
        compiled(x, y).backward()

Inductor sees FakeTensors on a CUDA device and generates the Python program that a GPU would run: which buffers it
allocates, overwrites and frees, and which kernels it launches. No kernel is built. The program then runs here on
FakeTensors, and its buffers are allocated and freed as on a GPU. Autograd cannot run on CUDA tensors without a GPU, so
the model and its gradients are traced on the CPU, with the CPU's autocast (for this model the same as CUDA's). The
graph is moved to the GPU before inductor splits it into forward and backward.

This patches internals of torch, which change between versions; it is made for version TORCH. Use it in a separate
process: torch caches what it learns about the GPU in many places.
"""
import os

os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"     # before inductor is imported: start no compile workers

import ast
import builtins
import contextlib
from types import SimpleNamespace
from unittest import mock

import torch
import torch._functorch.config
import torch._functorch.partitioners
import torch._inductor.config
import torch._inductor.scheduler
import torch.utils._triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import compile_fx
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_cache
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from exactgpt.config import UserError

TORCH = "2.13"
DEVICE = torch.device("cuda", 0)
GPU = SimpleNamespace(      # an H100 or H200, as torch.cuda.get_device_properties describes it
    name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 * 10**9, warp_size=32,
    max_threads_per_block=1024, max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20, gcnArchName="")


@contextlib.contextmanager
def fake_gpu():
    """Return a context in which torch sees a CUDA GPU and torch.compile generates its program but no kernels.

    Raises UserError if this version of torch does not have the internals that are patched.
    """
    properties = lambda device=None: GPU
    patches = [
        (torch.cuda, dict(is_available=lambda: True, current_device=lambda: 0, set_device=lambda device: None,
                          get_device_properties=properties, _exchange_device=lambda device: 0,
                          _maybe_exchange_device=lambda device: 0, set_rng_state=lambda *state: None,
                          get_rng_state=lambda *device: torch.zeros(16, dtype=torch.uint8))),
        (CudaInterface, dict(get_device_properties=staticmethod(properties))),
        (torch._inductor.scheduler, dict(has_triton=lambda: True)),
        (torch.utils._triton, dict(triton_hash_with_backend=lambda: "none")),
        (torch._inductor.config, dict(joint_custom_post_pass=_move_graph, graph_partition=False, fx_graph_cache=False)),
        (torch._functorch.config, dict(enable_autograd_cache=False)),
        # Without dropout there are no random numbers that a recomputed block would have to draw again.
        (torch._functorch.partitioners, dict(functionalize_rng_ops=lambda joint, forward, backward, n: (
            forward, backward))),
        # Every node of the graph already has a FakeTensor; propagating them again on CUDA would need a GPU.
        (compile_fx, dict(fake_tensor_prop=lambda graph, inputs, *flags: _fake_mode(inputs))),
        (GraphLowering, dict(compile_to_module=_keep_program)),
        (F, dict(scaled_dot_product_attention=cudnn_attention))]
    with contextlib.ExitStack() as stack, fresh_cache():     # inductor's cache of generated code
        try:
            for owner, names in patches:
                for name, value in names.items():
                    stack.enter_context(mock.patch.object(owner, name, value))
            yield
        except Exception as error:
            if torch.__version__.startswith(TORCH):
                raise
            raise UserError(f"bench/fake_cuda.py needs torch {TORCH}, but this is {torch.__version__}: "
                            f"{str(error)[:200]}") from error


def cudnn_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False):
    """Run cuDNN attention, as F.scaled_dot_product_attention does on a GPU, for FakeTensors of any device."""
    assert attn_mask is None, "training uses no mask"
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, dropout_p, is_causal)[0]


def compile_for_gpu(model, launch=lambda kernel, *tensors: None):
    """Return torch.compile(model) for the fake GPU: its forward and backward run inductor's programs.

    launch: called in place of each kernel, with the kernel's name and its input and output tensors.
    """
    def compile_program(graph, inputs, **options):
        with mock.patch.object(GraphLowering, "program", None, create=True):
            compile_fx.compile_fx_inner(graph, _to_gpu(list(inputs)), **options)
            return _make_runnable(GraphLowering.program, launch)
    return torch.compile(model, dynamic=False, fullgraph=True, backend=lambda graph, inputs: compile_fx.compile_fx(
        graph, inputs, inner_compile=compile_program))


def _keep_program(lowering):
    """Replace GraphLowering.compile_to_module: keep the source of the program and build nothing."""
    GraphLowering.program = lowering.codegen()[0].value
    return SimpleNamespace(call=None)


def _fake_mode(tensors):
    return next(t.fake_mode for t in tensors if isinstance(t, torch.Tensor))


def _to_gpu(tree):
    """Return the tree with its FakeTensors on the fake GPU."""
    def move(tensor):
        with tensor.fake_mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE)
    return tree_map_only(torch.Tensor, move, tree)


def _move_graph(graph):
    """Move a joint graph of forward and backward from the CPU to the fake GPU, in place."""
    for node in graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": DEVICE}
        if "val" in node.meta:
            node.meta["val"] = _to_gpu(node.meta["val"])


class _Kernel:
    """Stand-in for a kernel, or for a namespace of kernels; calling it only calls `launch`."""

    def __init__(self, name, launch):
        self.name, self.launch = name, launch

    def __getattr__(self, name):
        return _Kernel(f"{self.name}.{name}", self.launch)

    def __call__(self, *args, out=None, **options):
        assert self.name.endswith(".run") or out is not None, f"{self.name} allocates its output"
        self.launch(self.name.removesuffix(".run"), *(a for a in (*args, out) if isinstance(a, torch.Tensor)))


class _Globals(dict):
    """The global names of a program: the given ones; all others are kernels."""

    def __init__(self, launch, **names):
        super().__init__(names)
        self.launch = launch

    def __missing__(self, name):
        if not name.startswith(("triton_", "extern_kernels")):
            raise KeyError(name)
        return _Kernel(name, self.launch)


def _make_runnable(source, launch):
    """Return the function `call` of a program's source, which takes a list of tensors and empties it."""
    function = next(node for node in ast.walk(ast.parse(source))
                    if isinstance(node, ast.FunctionDef) and node.name == "call")
    nothing = lambda *args: None
    names = _Globals(launch, __builtins__=builtins, torch=torch, get_raw_stream=nothing, assert_size_stride=nothing,
                     assert_alignment=nothing, copy_if_misaligned=lambda tensor: tensor,
                     empty_strided_cuda=lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype),
                     reinterpret_tensor=lambda tensor, size, stride, offset=0: tensor.as_strided(
                         size, stride, tensor.storage_offset() + offset))
    exec(compile(ast.Module([function], []), "<program>", "exec"), names)
    run = names["call"]
    run._boxed_call = True       # tells torch that it takes one list and may empty it
    return run
