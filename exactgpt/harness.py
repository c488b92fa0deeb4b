"""lm-evaluation-harness with our models: its tasks, metrics and standard errors, our scorer and decoder.

The harness asks a model for three things: the log-likelihood of a continuation (and whether it is what greedy decoding
would write), that of a whole text in windows, and a text that goes on until a stop. Every rank answers a share of the
requests and gets all answers, so that the harness itself need not know of other ranks. Needs lm-eval.
"""
import contextlib
import copy
import difflib
import io
import logging
import math
import os
import random
import sys
import threading
from collections import namedtuple
from numbers import Real

import numpy as np

from exactgpt.config import RunFailed, UserError
from exactgpt.error_bars import compare, ratio_stderr
from exactgpt.generation import Continuation, generate_ids, make_decoder
from exactgpt.scoring import ending_losses, pack_question
from exactgpt.tokenizer import EOT_TEXT

HARNESS_SEEDS = 0, 1234  # of `random` and of NumPy, as its command line has them
BOOTSTRAPS = 10_000      # draws for the standard errors that the harness bootstraps; its own default is 100,000
GENERATION_ROWS = 32     # texts written at a time
GENERATION_ARGUMENTS = {"until", "do_sample", "temperature", "top_k", "top_p", "max_gen_toks", "max_new_tokens",
                        "max_tokens", "max_completion_tokens"}
PERPLEXITY = (lambda x: np.exp(-x),) * 2      # but for its sign, its own derivative
# How the harness makes a metric of the mean over items, and how steeply, by the name of the metric's aggregation.
AGGREGATIONS = {"mean": (np.asarray, np.ones_like), "perplexity": PERPLEXITY, "weighted_perplexity": PERPLEXITY,
                "bits_per_byte": (lambda x: -x / math.log(2), lambda x: np.full_like(x, 1 / math.log(2)))}

# results: the harness' {task: {"acc,none": value, "acc_stderr,none": ...}}, more: the rest of what it reports
# metrics: {(task or group, "acc,none"): Metric}
TaskResults = namedtuple("TaskResults", "results metrics more")


class Metric(namedtuple("Metric", "values aggregation higher_is_better")):
    """One metric of a task's items. values: {item: (sum, weight)}; aggregation: a key of AGGREGATIONS."""

    def compute(self, pairs):
        """Return the metric of pairs (n, 2), of sums and weights."""
        sums, weights = pairs.sum(axis=0)
        return float(AGGREGATIONS[self.aggregation][0](sums / weights))


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
    """Return [(log-likelihood, it is what greedy decoding writes)] of pairs (context, continuation) of token ids.

    Raises RunFailed if a loss is not finite, since the harness would take its first answer for the likeliest.
    """
    # The choices of an item follow each other with the same context: they are packed, as far as they fit the window.
    questions, previous, size = [], None, 0
    scored = [(context, continuation) for context, continuation in pairs if continuation]
    for context, continuation in scored:
        size += len(continuation) - 1
        if context != previous or size > model.config.block_size:
            questions.append((context, []))
            previous, size = context, len(context) + len(continuation) - 1
        questions[-1][1].append(continuation)
    packed = [pack_question(*question, model.config.block_size) for question in questions]
    n_endings = [len(endings) for _, endings in questions]
    losses, greedy = ending_losses(model, packed, n_endings, runtime, batch_tokens, "scoring", greedy=True)
    if not np.isfinite(losses).all():
        raise RunFailed("the model gives losses that are not finite numbers, so its answers mean nothing: it has "
                        "diverged, or needs --dtype fp32")
    answers = zip((-losses).tolist(), greedy.tolist())
    return [next(answers) if continuation else (0.0, True) for _, continuation in pairs]


def continue_texts(model, tokenizer, requests, runtime):
    """Return the continuations of requests (text, generation arguments), each up to its first stop text."""
    groups = {}      # requests with the same arguments, the texts of a batch of similar lengths
    for i, (text, arguments) in enumerate(requests):
        groups.setdefault(repr(sorted(arguments.items())), []).append((len(text), i))
    batches = [group[first:first + GENERATION_ROWS] for group in map(sorted, groups.values())
               for first in range(0, len(group), GENERATION_ROWS)]
    prompts = [tokenizer.encode(text) for text, _ in requests]      # on every rank, as it may raise
    # A decoder converts the weights, and packs them on a CPU, unless they are to stay fp32.
    copied = model if runtime.dtype_name == "fp32" else copy.deepcopy(model)
    decoder = make_decoder(copied, runtime.device, runtime.dtype)
    answers = {}
    for number in range(runtime.rank, -(-len(batches) // runtime.world_size) * runtime.world_size, runtime.world_size):
        if number < len(batches):
            indices = [i for _, i in batches[number]]
            texts = _generate(decoder, tokenizer, [prompts[i] for i in indices], requests[indices[0]][1], number)
            answers |= dict(zip(indices, texts))
        runtime.check_for_stop()      # every rank, equally often
    for theirs in runtime.gather(answers):
        answers |= theirs
    return [answers[i] for i in range(len(requests))]


def _generate(decoder, tokenizer, prompts, arguments, number):
    """Return the continuations of prompts (lists of ids) for the harness' arguments. number: of the batch."""
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
    options = normalize_gen_kwargs(arguments)
    max_tokens = options["max_gen_toks"]
    stop = [s for s in handle_stop_sequences(options["until"], EOT_TEXT) if s]
    sampling = dict(temperature=options.get("temperature", 1.0), top_k=options.get("top_k", 50),      # transformers'
                    top_p=options.get("top_p", 1.0)) if options["do_sample"] else dict(temperature=0.0)
    block_size = decoder.model.config.block_size
    longest = block_size - max_tokens       # as the harness does; in a smaller window than that, half of it
    longest = longest if longest > 0 else block_size // 2
    prompts = [prompt[-longest:] or [tokenizer.start] for prompt in prompts]
    continuations = [Continuation(tokenizer, stop) for _ in prompts]
    for step in generate_ids(decoder, prompts, n_vocab=tokenizer.n_vocab, eot=tokenizer.eot, max_tokens=max_tokens,
                             seed=(HARNESS_SEEDS[1], number), **sampling):
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
                left_out = f" (a .yaml file in {include_path} that cannot be read is left out)" * bool(include_path)
                raise UserError(f"lm-evaluation-harness has no task {name!r}; {hint}{left_out}")

        def load():
            seed_harness()      # some tasks shuffle
            try:
                return manager.load(list(names))
            except Exception as error:      # of the network, a file, a task's own code: anything
                why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                advice = "; docs/evaluation.md says how to bring the data to a machine without a network"
                raise UserError(f"cannot load {', '.join(names)} or its data ({why})"
                                + advice * isinstance(error, OSError)) from error
        # One process of a machine downloads; the others then find the data in the cache.
        first = runtime.local_rank == 0
        loaded = runtime.on_all_ranks(lambda: load() if first else None)
        loaded = runtime.on_all_ranks(lambda: loaded if first else load())
        for name, task in loaded["tasks"].items():
            own = task.get_config("num_fewshot")      # a task that says 0 means it
            n = own or 0 if num_fewshot is None or own == 0 else num_fewshot
            task.set_config(key="num_fewshot", value=n)
            require_supported(name, task, n)
    return loaded


def require_supported(name, task, num_fewshot):
    """Raise UserError if a task needs what we cannot do."""
    if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
        raise UserError(f"the task {name} runs code that a model writes, or needs images or sound; leave it out")
    arguments = dict(task.get_config("generation_kwargs") or {}) if task.OUTPUT_TYPE == "generate_until" else {}
    unknown = [f"{key} = {value!r}" for key, value in arguments.items()
               if key not in GENERATION_ARGUMENTS and (key, value) != ("num_beams", 1)]
    if unknown:
        raise UserError(f"the task {name} uses {', '.join(unknown)} to generate, which evaluate.py does not support; "
                        "leave it out")
    examples = task.fewshot_docs() if num_fewshot else None
    if examples is not None and len(examples) <= num_fewshot:
        raise UserError(f"the task {name} has only {len(examples)} examples, too few for --num_fewshot {num_fewshot}; "
                        "use a smaller number")


def seed_harness():
    """Seed the generators that tasks draw from, as the harness' command line does."""
    random.seed(HARNESS_SEEDS[0])
    np.random.seed(HARNESS_SEEDS[1])


def run_tasks(lm, loaded, runtime, limit=0):
    """Return the TaskResults of a model of the harness on rank 0, None on other ranks. limit: items of each task."""
    from lm_eval import evaluate
    seed_harness()
    for task in loaded["tasks"].values():      # each model gets the same examples before a question
        task.set_fewshot_seed(seed=HARNESS_SEEDS[1])
    with _quiet(runtime):
        found = evaluate(lm=lm, task_dict=loaded, limit=limit or None, log_samples=True,
                         bootstrap_iters=BOOTSTRAPS if runtime.is_main else 0)
    if not runtime.is_main:
        return None
    results, metrics = found["results"], {}
    for name, samples in found["samples"].items():
        for sample in samples:
            for metric in sample["metrics"]:
                metrics.setdefault((name, f"{metric},{sample['filter']}"), {})[sample["doc_id"]] = sample[metric]
    metrics = {key: metric for key, values in metrics.items()
               if (metric := make_metric(*key, values, loaded["tasks"][key[0]]))}
    for (name, key), metric in metrics.items():      # for word and byte perplexity the harness has none
        stderr = key.replace(",", "_stderr,")
        if results[name].get(stderr) == "N/A":
            mean, error = ratio_stderr(*np.array(list(metric.values.values())).T)
            results[name][stderr] = float(AGGREGATIONS[metric.aggregation][1](mean) * error)
    for group in found.get("groups", {}):
        leaves = _leaves(group, found["group_subtasks"])
        for key in {key for name, key in metrics if name in leaves}:
            parts = {leaf: metrics.get((leaf, key)) for leaf in leaves}
            # A group may also average its tasks, or leave some out; then it is not compared.
            if all(parts.values()) and isinstance(results[group].get(key), float):
                pooled = {(leaf, i): value for leaf, part in parts.items() for i, value in part.values.items()}
                whole = parts[leaves[0]]._replace(values=pooled)
                if abs(whole.compute(np.array(list(pooled.values()))) - results[group][key]) < 1e-6:
                    metrics[group, key] = whole
    more = {key: found[key] for key in ("groups", "group_subtasks", "versions", "n-shot", "n-samples") if key in found}
    return TaskResults(results, metrics, more)


def make_metric(name, key, values, task):
    """Return the Metric of the values {doc_id: value} of a task's items, None for a kind that we do not compare."""
    from lm_eval.api.registry import AGGREGATION_REGISTRY
    metric = key.split(",")[0]
    function, higher = task.aggregation().get(metric), task.higher_is_better().get(metric)
    kind = next((kind for kind, f in AGGREGATION_REGISTRY.items() if f is function), "")
    pairs = {i: value if isinstance(value, tuple | list) else (value, 1) for i, value in values.items()}
    numeric = all(len(pair) == 2 and all(isinstance(x, Real) for x in pair) for pair in pairs.values())
    known = kind in AGGREGATIONS and higher is not None and numeric
    return Metric(pairs, kind, bool(higher)) if known else None


def _leaves(group, children):
    """Return the names of the tasks of a group and of the groups in it."""
    return [leaf for child in children.get(group, []) for leaf in (_leaves(child, children) or [child])]


def compare_tasks(ours, theirs):
    """Return {(task or group, metric): Comparison} of the TaskResults of two models on the same items."""
    comparisons = {}
    for key in ours.metrics.keys() & theirs.metrics.keys():
        mine, other = ours.metrics[key], theirs.metrics[key]
        shared = [i for i in mine.values if i in other.values]      # a task may leave an item out
        if shared:
            (sums, weights), (other_sums, other_weights) = (
                np.array([metric.values[i] for i in shared], dtype=np.float64).T for metric in (mine, other))
            if (weights == other_weights).all():
                comparisons[key] = compare(sums, other_sums, weights, AGGREGATIONS[mine.aggregation][0],
                                           mine.higher_is_better)
    return comparisons


@contextlib.contextmanager
def _quiet(runtime):
    """Keep standard output for our results, and have only rank 0 show the harness' progress, on a terminal."""
    os.environ["DISABLE_MULTIPROC"] = "1"      # no forks for its bootstrap: this process has threads
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    shown = sys.stderr if runtime.is_main and sys.stderr.isatty() else _OtherThreads(sys.stderr)
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        yield


class _OtherThreads(io.TextIOBase):
    """A stream that only shows what threads other than the main one print, such as the watch that reports a hang."""

    def __init__(self, stream):
        self._stream = stream

    def write(self, text):
        return len(text) if threading.current_thread() is threading.main_thread() else self._stream.write(text)

    def flush(self):
        self._stream.flush()
