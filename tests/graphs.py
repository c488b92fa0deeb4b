"""train.py with a compiler that only counts. Prints, at the end of each rank, the graphs that torch.compile made.

Run as train.py is run. The micro-batch is tried as on a card (device.fits_in_memory), the embedding stays in the
graph as on a card, and DDP's buckets hold a megabyte, so that a small model fills several. With COMPILATION=fails in
the environment it does, after the first try.
"""
import functools
import os
import sys

import torch
import torch._dynamo.utils

import train
from exactgpt import config, device, distributed

graphs = []


def count(graph, inputs):
    """A backend for torch.compile that runs the graph as it is."""
    graphs.append(graph)
    return graph.forward


def as_on_a_card(module, block_size, wanted, local_windows, runtime, **options):
    """find_micro_batch_size, with a try."""
    size = device.find_micro_batch_size(module, block_size, wanted, local_windows, runtime, **options)
    assert device.fits_on_all_ranks(module, block_size, size, runtime)
    if os.environ.pop("COMPILATION", "") == "fails":
        raise device.CompilationFailed("no compiler")
    return size


if __name__ == "__main__":
    sys.argv[0] = "train.py"
    torch.compile = functools.partial(torch.compile, backend=count)
    torch.compiler.disable = lambda function: function
    train.choose_compile = lambda *_: (True, None)
    train.find_micro_batch_size = as_on_a_card
    distributed.BUCKET_MB = 1
    config.run_script(train.main)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    print(f"{len(graphs)} graphs, {breaks} breaks, {torch._dynamo.utils.counters['stats']['unique_graphs']} captured")
