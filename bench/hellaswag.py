"""Compare the speed of our packed HellaSwag evaluation with build-nanogpt's, which scores one example at a time.

    python -m bench.hellaswag                          # 2,000 of the 10,042 examples on a GPU, 96 on a CPU
    python -m bench.hellaswag --limit 32 --repeats 5

Both score the same examples with the same model in one process. One at a time means, for each example, a forward pass
of its four rows, all logits, .item(). Here autocast is entered once around all examples, which favours that way:
build-nanogpt casts the weights for each example.
"""
import os
import statistics
import time
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from bench.common import comparison_row, describe_machine, write_results
from bench.sizes import SizeConfig
from exactgpt.config import UserError, flag, parse_config, run_script
from exactgpt.distributed import start
from exactgpt.open_model import open_model
from exactgpt.tokenizer import default_tokenizer
from hellaswag import DATA_FILE, evaluate_hellaswag, fetch_hellaswag, load_hellaswag, tokenize_examples
from model import GPT, GPTConfig

CPU_LIMIT, GPU_LIMIT = 96, 2000
WARM_UP_EXAMPLES = 32     # for the slow way


@dataclass(kw_only=True)
class HellaSwagBenchConfig(SizeConfig):
    """The flags of this benchmark."""
    checkpoint: str = flag("", "checkpoint file, Hugging Face folder or model name (default: random weights)")
    data: str = flag("", f"JSON-lines file of HellaSwag examples (default: {DATA_FILE}, downloaded once)")
    limit: int | None = flag(None, f"number of examples, taken evenly from the file (0: all; default: {GPU_LIMIT:,} on "
                             f"a GPU, {CPU_LIMIT} on a CPU)", low=0)
    repeats: int = flag(3, "measurements of each way; the medians count", low=1)
    batch_tokens: int = flag(0, "tokens per forward pass of the packed way (0: as in hellaswag.py)", low=0)


def main(argv=None):
    """Time both ways in turn and write the comparison."""
    config = parse_config(HellaSwagBenchConfig, argv, __doc__.split("\n\n")[0])
    with start(config) as runtime:
        if runtime.world_size > 1:
            raise UserError("bench.hellaswag compares two ways on one device; run it without torchrun")
        model, tokenizer = make_model(config, runtime.device)
        name = config.checkpoint or f"{config.name}, random weights"
        limit = config.limit if config.limit is not None else CPU_LIMIT if runtime.device.type == "cpu" else GPU_LIMIT
        examples = sample_evenly(load_hellaswag(config.data or fetch_hellaswag()), limit)
        prepared = tokenize_examples(examples, tokenizer, model.config.block_size, "karpathy")
        runtime.setup_done()
        # Warm up: load kernels and fill caches. Packing has few shapes, so it meets all of them; one at a time has a
        # shape per example, and a few must do.
        score_packed(model, prepared, runtime, config.batch_tokens)
        score_one_at_a_time(model, sample_evenly(examples, WARM_UP_EXAMPLES), tokenizer, runtime)
        result = time_in_turns({
            "packed": lambda: score_packed(model, prepared, runtime, config.batch_tokens),
            "one at a time": lambda: score_one_at_a_time(model, examples, tokenizer, runtime),
        }, len(examples), config, runtime)
        on_cpu = runtime.device.type == "cpu"
        rates = {way: len(examples) / seconds
                 for way, seconds in result["median_cpu_seconds" if on_cpu else "median_seconds"].items()}
        kind = "" if config.checkpoint or config.name == "gpt2" else f"_{config.name}"
        result = dict(machine=describe_machine(), model=name, **result)
        write_results(f"hellaswag_{runtime.device.type}{kind}", result, [
            comparison_row(f"HellaSwag, {len(examples):,} items, {name}", "items/CPU s" if on_cpu else "items/s",
                           rates["packed"], "one item at a time", rates["one at a time"])])


def make_model(config, device):
    """Return the model to score and its tokenizer."""
    if config.checkpoint:
        opened = open_model(config.checkpoint, tokenizer=config.tokenizer).with_tokenizer()
        return opened.model.to(device).eval(), opened.tokenizer
    torch.manual_seed(0)
    with device:
        return GPT(GPTConfig(**config.shape)).eval(), default_tokenizer(config.tokenizer)


def sample_evenly(examples, limit):
    """Return `limit` examples (0: all), taken evenly from the list, because the file begins with short ones."""
    limit = min(limit or len(examples), len(examples))
    return [examples[i * len(examples) // limit] for i in range(limit)]


def score_packed(model, prepared, runtime, batch_tokens):
    """Score the examples our way; return (acc, acc_norm)."""
    score = evaluate_hellaswag(model, prepared, runtime, batch_tokens)
    return score.acc, score.acc_norm


@torch.no_grad()
def score_one_at_a_time(model, examples, tokenizer, runtime):
    """Score the examples build-nanogpt's way; return (acc, acc_norm)."""
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


def time_in_turns(ways, n, config, runtime):
    """Time the ways in turn and print the comparison; return it as a dict. n: number of examples."""
    seconds, cpu_seconds, scores = ({name: [] for name in ways} for _ in range(3))
    for repeat in range(config.repeats):
        for name, way in list(ways.items())[::1 if repeat % 2 == 0 else -1]:
            start_time, cpu_start = time.perf_counter(), time.process_time()
            scores[name] = way()
            seconds[name].append(time.perf_counter() - start_time)
            cpu_seconds[name].append(time.process_time() - cpu_start)
            print(f"{name:>14}  {seconds[name][-1]:8.2f} s  {n / seconds[name][-1]:8.1f} examples/s  acc, acc_norm "
                  f"{scores[name][0]:.4f}, {scores[name][1]:.4f}", flush=True)
    # The median of the ratios per round, because within a round the load of the machine is about the same for both.
    ratio, cpu_ratio = (statistics.median(slow / fast for slow, fast in zip(s["one at a time"], s["packed"]))
                        for s in (seconds, cpu_seconds))
    medians, cpu_medians = ({name: statistics.median(s[name]) for name in ways} for s in (seconds, cpu_seconds))
    print(f"packed is {ratio:.2f} times as fast in wall time, {cpu_ratio:.2f} times in CPU time (medians)")
    return dict(dtype=runtime.dtype_name, threads=torch.get_num_threads(),
                load_average=os.getloadavg()[0] if hasattr(os, "getloadavg") else None, examples=n,
                batch_tokens=config.batch_tokens, scores=scores, ratio=ratio, cpu_ratio=cpu_ratio,
                median_seconds=medians, median_cpu_seconds=cpu_medians, seconds=seconds, cpu_seconds=cpu_seconds)


if __name__ == "__main__":
    run_script(main)
