"""Compare the speed of evaluate.py --tasks with that of lm-evaluation-harness' own Hugging Face model.

    python -m bench.evaluate --data data/hellaswag/hellaswag_val.jsonl

Both answer the same requests of the same tasks with the same weights in one process, by turns, and the harness' whole
evaluation is timed. The tasks are made of HellaSwag's items, one of each kind: endings to choose from, last words,
whole texts, texts to continue. The peer gets the fastest of a few batch sizes, which costs it nothing here. In fp32
both must give the same scores.
"""
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.common import comparison_row, describe_machine, write_results
from bench.hellaswag import sample_evenly
from bench.sizes import SizeConfig
from exactgpt.config import UserError, flag, parse_config, require_packages, run_script
from exactgpt.device import DTYPES
from exactgpt.distributed import start
from exactgpt.documents import read_objects
from exactgpt.harness import make_lm
from exactgpt.huggingface import write_pretrained
from exactgpt.tokenizer import default_tokenizer
from hellaswag import DATA_FILE, fetch_hellaswag
from model import GPT, GPTConfig

BATCH_SIZES = (1, 4, 16, 64)
TASKS = {      # kind: the harness' definition, without the data
    "endings": dict(
        output_type="multiple_choice", doc_to_text="{{ctx}}", doc_to_choice="endings", doc_to_target="label",
        metric_list=[dict(metric="acc", aggregation="mean"), dict(metric="acc_norm", aggregation="mean")]),
    "last words": dict(
        output_type="loglikelihood", doc_to_text="{{ctx.split(' ')[:-1]|join(' ')}}",
        doc_to_target="{{' '+ctx.split(' ')[-1]}}", metric_list=[dict(metric="perplexity")]),
    "whole texts": dict(
        output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
        metric_list=[dict(metric="bits_per_byte")]),
    "continuations": dict(
        output_type="generate_until", doc_to_text="{{ctx}}", doc_to_target="", metric_list=[dict(metric="exact_match")],
        generation_kwargs=dict(until=["\n\n\n"], max_gen_toks=32, do_sample=False))}


@dataclass(kw_only=True)
class EvaluateBenchConfig(SizeConfig):
    """The flags of this benchmark."""
    data: str = flag("", f"JSON-lines file of HellaSwag examples (default: {DATA_FILE}, downloaded once)")
    limit: int = flag(48, "items of each kind, taken evenly from the file; a text joins ten of them", low=1)
    repeats: int = flag(3, "measurements of each way; the medians count", low=1)

    def check(self):
        """Raise UserError unless the harness is installed."""
        require_packages("lm_eval", "transformers", "accelerate")


def main(argv=None):
    """Time both ways in turn on each kind of task and write the comparison."""
    config = parse_config(EvaluateBenchConfig, argv, __doc__.split("\n\n")[0])
    with start(config) as runtime, tempfile.TemporaryDirectory() as folder:
        if runtime.world_size > 1:
            raise UserError("bench.evaluate compares two ways on one device; run it without torchrun")
        tokenizer = default_tokenizer(config.tokenizer)
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=tokenizer.n_vocab, **config.shape)).to(runtime.device).eval()
        items = sample_evenly([item for _, item in read_objects(config.data or fetch_hellaswag())], 10 * config.limit)
        rows = [dict(item, text=" ".join(other["ctx"] for other in items[10 * i:10 * i + 10]))
                for i, item in enumerate(sample_evenly(items, config.limit))]
        (Path(folder) / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        runtime.setup_done()
        ours, peer = make_lm(model, tokenizer, runtime), load_peer(model, tokenizer, runtime, folder)
        results = {kind: time_in_turns(make_task(kind, folder), ours, peer, config, runtime) for kind in TASKS}
    unit = "items/CPU s" if runtime.device.type == "cpu" else "items/s"
    rates = {kind: {way: config.limit / seconds for way, seconds in result["median_seconds"].items()}
             for kind, result in results.items()}
    write_results(f"evaluate_{runtime.device.type}_{config.name}_{runtime.dtype_name}", dict(
        machine=describe_machine(), dtype=runtime.dtype_name, threads=torch.get_num_threads(),
        load_average=os.getloadavg()[0], items=config.limit, kinds=results), [
            comparison_row(f"evaluate.py, {kind}, {runtime.dtype_name}, {config.name}, random weights", unit,
                           rates[kind]["ours"], "lm-eval's own model", rates[kind]["lm-eval"]) for kind in TASKS])


def make_task(kind, folder):
    """Return the harness' task of a kind on the rows in a folder."""
    from lm_eval.api.task import ConfigurableTask
    with quiet():
        task = ConfigurableTask(config=dict(
            TASKS[kind], task=kind, dataset_path="json", test_split="test", num_fewshot=0, dataset_kwargs=dict(
                data_files=dict(test=f"{folder}/rows.jsonl"), cache_dir=f"{folder}/cache")))
    return dict(tasks={kind: task}, groups={}, group_map={})


def load_peer(model, tokenizer, runtime, folder):
    """Return the harness' own model with our model's weights."""
    from lm_eval.models.huggingface import HFLM
    write_pretrained(Path(folder) / "peer", model.config_dict(), model.state_dict(), tokenizer)
    with quiet():
        return HFLM(pretrained=f"{folder}/peer", device=str(runtime.device), dtype=DTYPES[runtime.dtype_name])


def time_in_turns(task, ours, peer, config, runtime):
    """Time the ways in turn and print the comparison; return it as a dict."""
    [kind] = task["tasks"]
    warm_up = {size: timed(task, peer, runtime, size)[0] for size in BATCH_SIZES if size <= config.limit}
    best = min(warm_up, key=warm_up.get)
    timed(task, ours, runtime)
    seconds, scores = dict(ours=[], **{"lm-eval": []}), {}
    for repeat in range(config.repeats):
        for way in list(seconds)[::1 if repeat % 2 == 0 else -1]:
            took, scores[way] = timed(task, *((ours, runtime) if way == "ours" else (peer, runtime, best)))
            seconds[way].append(took)
            print(f"{kind:>14} {way:>8}  {took:8.2f} s  {str(scores[way])[:60]}", flush=True)
    if runtime.dtype_name == "fp32":
        for a, b in zip(*scores.values()):
            if (a != b) if isinstance(a, str) else abs(a - b) > 1e-4 * abs(a):
                raise UserError(f"{kind}: the answers differ, so the times do not compare ({a} and {b})")
    # The median of the ratios per round, because within a round the load of the machine is about the same for both.
    ratio = statistics.median(b / a for a, b in zip(*seconds.values()))
    print(f"{kind}: ours is {ratio:.2f} times as fast (the peer with batches of {best})")
    return dict(ratio=ratio, peer_batch_size=best, scores=scores, seconds=seconds,
                median_seconds={way: statistics.median(values) for way, values in seconds.items()})


def timed(task, lm, runtime, batch_size=0):
    """Evaluate once; return (seconds, on a CPU of its time, the scores or the texts that were written as a list)."""
    from lm_eval import evaluate
    if batch_size:
        lm.batch_size_per_gpu = batch_size
    clock = time.process_time if runtime.device.type == "cpu" else time.perf_counter
    begin = clock()
    with quiet():
        found = evaluate(lm=lm, task_dict=task, bootstrap_iters=0)
    seconds = clock() - begin
    [metrics], [samples] = found["results"].values(), found["samples"].values()
    if "exact_match,none" in metrics:
        return seconds, [answer for sample in samples for answer in sample["filtered_resps"]]
    return seconds, [value for key, value in metrics.items() if key.endswith(",none") and isinstance(value, float)]


@contextlib.contextmanager
def quiet():
    """Keep the harness' progress bars off the screen."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


if __name__ == "__main__":
    run_script(main)
