"""HellaSwag, ours against one example at a time, on the same model and examples in one process.

    python -m bench.hellaswag                          # 2,000 of 10,042 on a GPU, spread over them; 96 on a CPU
    python -m bench.hellaswag --limit 32 --repeats 5

One at a time is build-nanogpt's way: for each example a forward pass of its four rows, all logits, .item(). Its
autocast context is opened once around all examples, which favours it: build-nanogpt casts the weights each time.
"""
import os
import statistics
import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from bench.common import compared, machine, write_results
from bench.sizes import SizeConfig
from exactgpt.config import UserError, flag, parse_config, run_script
from exactgpt.distributed import start
from exactgpt.open_model import open_model
from exactgpt.tokenizer import default_tokenizer
from hellaswag import DATA_FILE, evaluate_hellaswag, fetch_hellaswag, load_hellaswag, tokenize_examples
from model import GPT, GPTConfig

CPU_LIMIT, GPU_LIMIT = 96, 2000
WARM_UP = 32     # examples, one at a time


@dataclass(kw_only=True)
class BenchConfig(SizeConfig):
    """The flags of this benchmark."""
    checkpoint: str = flag("", "instead of random weights: a file, a Hugging Face folder or a name")
    data: str = flag("", f"JSON-lines file (default: {DATA_FILE}, downloaded once)")
    limit: int | None = flag(None, f"examples, spread evenly over the file; 0: all (default: {GPU_LIMIT:,}, on a CPU "
                             f"{CPU_LIMIT})", low=0)
    repeats: int = flag(3, "how often each way runs, in turns; the medians count", low=1)
    batch_tokens: int = flag(0, "see hellaswag.py", low=0)


def main(argv=None):
    """Time both by turns, and write the comparison."""
    config = parse_config(BenchConfig, argv, __doc__.split("\n\n")[0])
    with start(config) as runtime:
        if runtime.world_size > 1:
            raise UserError("this compares two ways on one device; run it without torchrun")
        model, tokenizer = make_model(config, runtime.device)
        name = config.checkpoint or f"{config.name}, random weights"
        limit = config.limit if config.limit is not None else CPU_LIMIT if runtime.device.type == "cpu" else GPU_LIMIT
        examples = spread(load_hellaswag(config.data or fetch_hellaswag()), limit)
        prepared = tokenize_examples(examples, tokenizer, model.config.block_size, "karpathy")
        runtime.setup_done()
        # Kernels load and caches fill. Ours has few shapes, which all come; the other way has one for each example.
        packed(model, prepared, runtime, config.batch_tokens)
        one_at_a_time(model, spread(examples, WARM_UP), tokenizer, runtime)
        result = compare({
            "packed": lambda: packed(model, prepared, runtime, config.batch_tokens),
            "one at a time": lambda: one_at_a_time(model, examples, tokenizer, runtime),
        }, len(examples), config, runtime)
        rates = {name: len(examples) / seconds for name, seconds in result["median_cpu_seconds" if
                 runtime.device.type == "cpu" else "median_seconds"].items()}
        kind = "" if config.checkpoint or config.name == "gpt2" else f"_{config.name}"
        write_results(f"hellaswag_{runtime.device.type}{kind}", dict(machine=machine(), model=name, **result), [
            compared(f"HellaSwag, {len(examples):,} items, {name}", "items/CPU s" if runtime.device.type == "cpu" else
                     "items/s", rates["packed"], "one item at a time", rates["one at a time"])])


def make_model(config, device):
    """The model to score, and its tokenizer."""
    if config.checkpoint:
        opened = open_model(config.checkpoint, tokenizer=config.tokenizer).with_tokenizer()
        return opened.model.to(device).eval(), opened.tokenizer
    torch.manual_seed(0)
    with device:
        return GPT(GPTConfig(**config.shape)).eval(), default_tokenizer(config.tokenizer)


def spread(examples, limit):
    """`limit` examples (0: all), evenly over the list: the file begins with short ones."""
    limit = min(limit or len(examples), len(examples))
    return [examples[i * len(examples) // limit] for i in range(limit)]


def packed(model, prepared, runtime, batch_tokens):
    """Ours: (acc, acc_norm)."""
    score = evaluate_hellaswag(model, prepared, runtime, batch_tokens)
    return score.acc, score.acc_norm


@torch.no_grad()
def one_at_a_time(model, examples, tokenizer, runtime):
    """build-nanogpt's way: (acc, acc_norm)."""
    right = right_norm = 0
    with runtime.autocast():
        for example in examples:
            context = tokenizer.encode(example.context)
            endings = [tokenizer.encode(" " + ending) for ending in example.endings]
            T = len(context) + max(map(len, endings))
            tokens, scored = torch.zeros((2, 4, T), dtype=torch.long)
            for k, ending in enumerate(endings):
                tokens[k, :len(context) + len(ending)] = torch.tensor(context + ending)
                scored[k, len(context):len(context) + len(ending)] = 1
            tokens, scored = tokens.to(runtime.device), scored.to(runtime.device)
            logits = model(tokens)                                                     # (4, T, V)
            losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
            losses = losses.view(4, T - 1) * scored[:, 1:]
            sums = losses.sum(1)
            right += sums.argmin().item() == example.label
            right_norm += (sums / scored[:, 1:].sum(1)).argmin().item() == example.label
    return right / len(examples), right_norm / len(examples)


def compare(ways, n, config, runtime):
    """Time each way in turns; the record of the comparison, which is printed too."""
    seconds, cpu_seconds, scores = ({name: [] for name in ways} for _ in range(3))
    for repeat in range(config.repeats):
        for name, way in list(ways.items())[::1 if repeat % 2 == 0 else -1]:
            begin, cpu_begin = time.perf_counter(), time.process_time()
            scores[name] = way()
            seconds[name].append(time.perf_counter() - begin)
            cpu_seconds[name].append(time.process_time() - cpu_begin)
            print(f"{name:>14}  {seconds[name][-1]:8.2f} s  {n / seconds[name][-1]:8.1f} examples/s  acc, acc_norm "
                  f"{scores[name][0]:.4f}, {scores[name][1]:.4f}", flush=True)
    # The median of the rounds' ratios: the two ways of a round meet the same load of the machine, more or less.
    ratio, cpu_ratio = (statistics.median(slow / fast for slow, fast in zip(s["one at a time"], s["packed"]))
                        for s in (seconds, cpu_seconds))
    medians, cpu_medians = ({name: statistics.median(s[name]) for name in ways} for s in (seconds, cpu_seconds))
    print(f"packed is {ratio:.2f} times as fast by the clock, {cpu_ratio:.2f} times by CPU time (medians)")
    return dict(dtype=runtime.dtype_name, threads=torch.get_num_threads(),
                load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None, examples=n,
                batch_tokens=config.batch_tokens, scores=scores, ratio=ratio, cpu_ratio=cpu_ratio,
                median_seconds=medians, median_cpu_seconds=cpu_medians, seconds=seconds, cpu_seconds=cpu_seconds)


if __name__ == "__main__":
    run_script(main)
