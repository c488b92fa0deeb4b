"""Run train.py with a compiler backend that only counts; each rank prints how many graphs torch.compile made.

Use it like train.py. As on a GPU, the micro-batch size is tried out (device.fits_in_memory) and the embedding stays in
the graph. DDP's buckets hold one megabyte, so that a small model fills several. With COMPILATION=fails in the
environment, compilation fails after the first trial step; with COMPILATION=differs only rank 0 can compile at all.
"""
import functools
import os
import sys

import torch
import torch._dynamo.utils

import train
from exactgpt import config, device, distributed

graphs = []


def counting_backend(graph, inputs):
    """Record the graph and return its eager forward: a backend for torch.compile."""
    graphs.append(graph)
    return graph.forward


find_micro_batch_size = device.find_micro_batch_size      # before it is patched below


def find_micro_batch_size_by_trial(module, block_size, wanted, local_windows, runtime, **options):
    """Find the micro-batch size and try it out, which on a CPU find_micro_batch_size does not do."""
    size = find_micro_batch_size(module, block_size, wanted, local_windows, runtime, **options)
    assert device.fits_in_memory(module, block_size, size, runtime)
    if os.environ.pop("COMPILATION", "") == "fails":
        raise device.CompilationFailed("no compiler")
    return size


if __name__ == "__main__":
    sys.argv[0] = "train.py"
    torch.compile = functools.partial(torch.compile, backend=counting_backend)
    torch.compiler.disable = lambda function: function
    compiles = os.environ.get("COMPILATION") != "differs" or os.environ["RANK"] == "0"
    device.choose_compile = lambda *_: (compiles, None)
    device.find_micro_batch_size = find_micro_batch_size_by_trial
    distributed.BUCKET_MB = 1
    config.run_script(train.main)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    print(f"{len(graphs)} graphs, {breaks} breaks, {torch._dynamo.utils.counters['stats']['unique_graphs']} captured")
