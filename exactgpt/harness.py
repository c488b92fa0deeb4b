"""lm-evaluation-harness with our models: its tasks, metrics and standard errors, our scorer and decoder.

The harness asks a model for three things: the log-likelihood of a continuation (and whether it is what greedy decoding
would write), that of a whole text in windows, and a text that goes on until a stop. Every rank answers a share of the
requests and gets all answers, so that the harness itself need not know of other ranks. Needs lm-eval.
"""
import contextlib
import copy
import difflib
import logging
import math
import os
import random
import sys
from collections import namedtuple

import numpy as np

from exactgpt.config import UserError
from exactgpt.error_bars import compare, ratio_stderr
from exactgpt.generation import Continuation, generate_ids, make_decoder
from exactgpt.scoring import ending_losses, pack_question
from exactgpt.tokenizer import EOT_TEXT

HARNESS_SEEDS = 0, 1234  # of `random` and of NumPy, as its command line has them
BOOTSTRAPS = 10_000      # draws for the standard errors that the harness bootstraps; its own default is 100,000
GENERATION_ROWS = 32     # texts written at a time
# How the harness makes a metric of the mean over items, and its derivative, by the name of the metric's aggregation.
AGGREGATIONS = {"mean": (np.asarray, np.ones_like), "perplexity": (lambda x: np.exp(-x), lambda x: np.exp(-x)),
                "weighted_perplexity": (lambda x: np.exp(-x), lambda x: np.exp(-x)),
                "bits_per_byte": (lambda x: -x / math.log(2), lambda x: np.full_like(x, 1 / math.log(2)))}

# results: the harness' {task: {"acc,none": value, "acc_stderr,none": ...}}, more: the rest of what it reports
# items: {(task, "acc,none"): (2, n) array of its items' sums and weights}; higher_is_better: {the same keys: bool}
# kinds: {(task, "acc"): its aggregation}
TaskResults = namedtuple("TaskResults", "results items kinds higher_is_better more")


# ---- answering requests ------------------------------------------------------

def make_lm(model, tokenizer, runtime, batch_tokens=0):
    """Return a GPT, in eval mode and neither compiled nor wrapped, as a model of the harness."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class LanguageModel(TemplateLM):
        eot_token_id = tokenizer.start       # what an empty context is

        def tok_encode(self, string, add_special_tokens=None, **_):
            return tokenizer.encode(string)

        def loglikelihood(self, requests, disable_tqdm=True):
            return super().loglikelihood(requests, disable_tqdm)

        def _loglikelihood_tokens(self, requests, **_):
            return score_continuations(model, [request[1:] for request in requests], runtime, batch_tokens)

        def loglikelihood_rolling(self, requests, disable_tqdm=True):
            windows = [[make_disjoint_window(window) for window in get_rolling_token_windows(
                tokenizer.encode(request.args[0]), self.eot_token_id, model.config.block_size, 1)]
                for request in requests]
            scores = iter(score_continuations(model, [w for ws in windows for w in ws], runtime, batch_tokens))
            return [sum(next(scores)[0] for _ in ws) for ws in windows]

        def generate_until(self, requests, disable_tqdm=True):
            return continue_texts(model, tokenizer, [request.args for request in requests], runtime)
    return LanguageModel()


def score_continuations(model, pairs, runtime, batch_tokens):
    """Return [(log-likelihood, it is what greedy decoding writes)] of pairs (context, continuation) of token ids."""
    # The choices of an item follow each other with the same context: they are packed, as far as they fit the window.
    questions, n_endings, previous, size = [], [], None, 0
    for context, continuation in pairs:
        size += max(0, len(continuation) - 1)
        if context != previous or size > model.config.block_size:
            questions.append((context, []))
            previous, size = context, len(context) + max(0, len(continuation) - 1)
        questions[-1][1].append(continuation)
    packed = [pack_question(*question, model.config.block_size) for question in questions]
    n_endings = [len(endings) for _, endings in questions]
    losses, greedy = ending_losses(model, packed, n_endings, runtime, batch_tokens, "scoring", greedy=True)
    return list(zip((-losses).tolist(), greedy.tolist()))


def continue_texts(model, tokenizer, requests, runtime):
    """Return the continuations of requests (text, generation arguments), each up to its first stop text."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    groups = {}      # requests with the same arguments, whose texts have like lengths
    for i, (text, arguments) in enumerate(requests):
        groups.setdefault(repr(sorted(arguments.items())), []).append((len(text), i))
    batches = [group[first:first + GENERATION_ROWS] for group in map(sorted, groups.values())
               for first in range(0, len(group), GENERATION_ROWS)]
    # A decoder converts the weights, and packs them on a CPU, unless they are to stay fp32.
    copied = model if runtime.dtype_name == "fp32" else copy.deepcopy(model)
    decoder = make_decoder(copied, runtime.device, runtime.dtype)
    answers = {}
    for first in range(0, len(batches), runtime.world_size):
        for batch in batches[first + runtime.rank:first + runtime.rank + 1]:
            options = normalize_gen_kwargs(requests[batch[0][1]][1])
            stop = [s for s in handle_stop_sequences(options.pop("until"), EOT_TEXT) if s]
            prompts = [tokenizer.encode(requests[i][0]) for _, i in batch]
            texts = _generate(decoder, tokenizer, prompts, stop, options)
            answers |= {i: text for (_, i), text in zip(batch, texts)}
        runtime.check_for_stop()
    for theirs in runtime.gather(answers):
        answers |= theirs
    return [answers[i] for i in range(len(requests))]


def _generate(decoder, tokenizer, prompts, stop, options):
    """Return the continuations of prompts (lists of ids) for the harness' normalized generation arguments."""
    max_tokens = options.pop("max_gen_toks")
    sampled = options.pop("do_sample")
    known = dict(temperature=options.pop("temperature", 1.0 if sampled else 0.0), top_k=options.pop("top_k", 50),
                 top_p=options.pop("top_p", 1.0))
    if options:
        raise UserError(f"the task wants the generation arguments {', '.join(sorted(options))}, which evaluate.py does "
                        "not have; leave the task out")
    block_size = decoder.model.config.block_size
    longest = block_size - max_tokens       # as the harness does; in a smaller window than that, half of it
    longest = longest if longest > 0 else block_size // 2
    prompts = [prompt[-longest:] or [tokenizer.start] for prompt in prompts]
    continuations = [Continuation(tokenizer, stop) for _ in prompts]
    for step in generate_ids(decoder, prompts, n_vocab=tokenizer.n_vocab, eot=tokenizer.eot, max_tokens=max_tokens,
                             **known if sampled else dict(temperature=0.0)):
        for continuation, token in zip(continuations, step):
            continuation.add(token)
        if all(c.ended for c in continuations):
            break
    for continuation in continuations:
        continuation.add(None)
    return [c.text for c in continuations]


# ---- running tasks -----------------------------------------------------------

def load_tasks(names, include_path, num_fewshot, runtime):
    """Load tasks with their data, as the harness' `evaluate` takes them. num_fewshot: None leaves it to each task.

    Raises UserError for a task that the harness does not have, or whose data is out of reach.
    """
    from exactgpt import hub
    if not hub.reachable():      # use what is on this machine, or fail at once, without retries
        hub.work_offline()
    with _quiet(runtime):
        from lm_eval.tasks import TaskManager
        manager = TaskManager(include_path=include_path or None)
        for name in names:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, n=3)
                hint = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists them"
                raise UserError(f"lm-evaluation-harness has no task {name!r}; {hint}")

        def load():
            random.seed(HARNESS_SEEDS[0])      # some tasks shuffle
            np.random.seed(HARNESS_SEEDS[1])
            try:
                return manager.load(list(names))
            except Exception as error:      # of the network, a file, a task's own code: anything
                why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                raise UserError(f"cannot load {', '.join(names)} or its data ({why}); docs/evaluation.md says how to "
                                "bring the data to a machine without a network") from error
        # One process of a machine downloads; the others then find the data in the cache.
        first = runtime.local_rank == 0
        loaded = runtime.on_all_ranks(lambda: load() if first else None)
        loaded = runtime.on_all_ranks(lambda: loaded if first else load())
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise UserError(f"the task {name} runs code that a model writes, or needs images or sound; leave it out")
        own = task.get_config("num_fewshot")      # a task that says 0 means it
        task.set_config(key="num_fewshot", value=own or 0 if num_fewshot is None or own == 0 else num_fewshot)
        task.set_fewshot_seed(seed=HARNESS_SEEDS[1])
    return loaded


def run_tasks(lm, loaded, runtime, limit=0):
    """Return the TaskResults of a model of the harness on rank 0, None on other ranks. limit: items of each task."""
    from lm_eval import evaluate
    from lm_eval.api.registry import AGGREGATION_REGISTRY
    with _quiet(runtime):
        found = evaluate(lm=lm, task_dict=loaded, limit=limit or None, log_samples=True,
                         bootstrap_iters=BOOTSTRAPS if runtime.is_main else 0)
    if not runtime.is_main:
        return None
    kinds = {(name, metric): next((kind for kind, f in AGGREGATION_REGISTRY.items() if f is function), "")
             for name, task in loaded["tasks"].items() for metric, function in task.aggregation().items()}
    items = {}
    for name, samples in found["samples"].items():
        for sample in sorted(samples, key=lambda sample: sample["doc_id"]):
            for metric in sample["metrics"]:
                if kinds.get((name, metric)) in AGGREGATIONS:
                    value = sample[metric]
                    items.setdefault((name, f"{metric},{sample['filter']}"), []).append(
                        value if isinstance(value, tuple | list) else (value, 1))
    items = {key: np.array(values, dtype=np.float64).T for key, values in items.items()}
    results = found["results"]
    for (name, metric), (sums, weights) in items.items():      # for word and byte perplexity the harness has none
        stderr = metric.replace(",", "_stderr,")
        if results[name].get(stderr) == "N/A":
            mean, error = ratio_stderr(sums, weights)
            _, derivative = AGGREGATIONS[kinds[name, metric.split(",")[0]]]
            results[name][stderr] = float(derivative(mean) * error)
    higher = {key: found["higher_is_better"].get(key[0], {}).get(key[1].split(",")[0], True) for key in items}
    more = {key: found[key] for key in ("groups", "group_subtasks", "versions", "n-shot", "n-samples") if key in found}
    return TaskResults(results, items, kinds, higher, more)


def compare_tasks(ours, theirs):
    """Return {(task, metric): Comparison} of the TaskResults of two models on the same items."""
    comparisons = {}
    for (name, metric), (sums, weights) in ours.items.items():
        transform, _ = AGGREGATIONS[ours.kinds[name, metric.split(",")[0]]]
        comparisons[name, metric] = compare(sums, theirs.items[name, metric][0], weights, transform,
                                            ours.higher_is_better[name, metric])
    return comparisons


@contextlib.contextmanager
def _quiet(runtime):
    """Keep standard output for our results, and have only rank 0 show the harness' progress."""
    os.environ["DISABLE_MULTIPROC"] = "1"      # no forks for its bootstrap: this process has threads
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere:
        shown = sys.stderr if runtime.is_main and sys.stderr.isatty() else nowhere
        with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
            yield
