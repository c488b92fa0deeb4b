"""Evaluate a model on HellaSwag: which of four endings of a text does it find likeliest?

    python hellaswag.py                                                    # the newest model below logs/
    python hellaswag.py --checkpoint gpt2 --style lm_eval
    torchrun --nproc_per_node=8 hellaswag.py --checkpoint logs/model_19073.pt --overlap data/edu_fineweb10B

There are two styles; their scores are not comparable:

    karpathy   build-nanogpt's: the context unchanged, each ending tokenized alone after a space; acc compares the
               summed losses of the endings, acc_norm their mean losses per token
    lm_eval    lm-evaluation-harness': the topic before the context, WikiHow's [brackets] removed, context and ending
               tokenized together; acc compares the summed losses, acc_norm the losses per character
"""
from exactgpt.launch import require_output  # first, see there

import contextlib
import itertools
import json
import re
import time
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exactgpt.config import DeviceConfig, UserError, command, counted, flag, parse_config, run_script
from exactgpt.device import keep_freed_memory
from exactgpt.distributed import StopRequested, start
from exactgpt.error_bars import format_with_stderr, ratio_stderr
from exactgpt.files import atomic_write, check_new, write_json
from exactgpt.open_model import newest_model, open_on_device
from exactgpt.overlap import RUN, find_overlaps
from exactgpt.scoring import BATCH_TOKENS, CPU_BATCH_TOKENS, ending_losses, pack_question
from exactgpt.shards import ShardFolder

DATASET, N_EXAMPLES = "Rowan/hellaswag", 10042   # of its validation split
DATA_FILE = "data/hellaswag/hellaswag_val.jsonl"
STYLES = ("karpathy", "lm_eval")
N_ENDINGS = 4

# Published (model, acc, acc_norm) over all examples; "-": not published in this style.
REFERENCES = {
    # 124M and 1558M: build-nanogpt's hellaswag.py; 350M and 774M: its play.ipynb; GPT-3: its paper, table H.1
    "karpathy": [("GPT-2 124M", "0.2859", "0.2955"), ("GPT-2 350M", "-", "0.3752"), ("GPT-2 774M", "-", "0.4320"),
                 ("GPT-2 1558M", "0.3842", "0.4893"), ("GPT-3 124M", "-", "0.3370")],
    # lm-evaluation-harness' scores, as build-nanogpt's hellaswag.py quotes them
    "lm_eval": [("GPT-2 124M", "0.2892", "0.3114"), ("GPT-2 1558M", "0.4004", "0.5089")],
}

PARTS = {"activitynet": "ActivityNet", "wikihow": "WikiHow"}      # what source_id begins with -> the name to print

# context: text; endings: N_ENDINGS texts, without the space before them; label: the index of the right one; source: one
# of PARTS, or "" if the data do not say
Example = namedtuple("Example", "context endings label source")
# over n examples: acc by the summed loss, acc_norm by the loss per length
HellaSwagScore = namedtuple("HellaSwagScore", "acc acc_norm n")
# the PackedSequences of each example; (n,) indices of the right endings; (n, 4) divisors of the losses for acc_norm;
# number of examples whose context was cut to fit the window; the Examples
PreparedHellaSwag = namedtuple("PreparedHellaSwag", "questions labels lengths n_cut examples")


@dataclass(kw_only=True)
class HellaSwagConfig(DeviceConfig):
    """The command-line flags."""
    checkpoint: str = flag("", "model_XXXXX.pt, a Hugging Face folder or a name such as gpt2 "
                               "(default: the newest below logs/)", group="model")
    data: str = flag("", f".jsonl or .json file of examples (default: {DATA_FILE}, downloaded once)", group="data")
    limit: int = flag(0, "score only the first N examples (0: all)", low=0)
    download: bool = flag(False, f"only download {DATA_FILE}")
    overlap: str = flag("", "folder of training shards: score also without the examples whose context has "
                            f"{RUN} tokens in a row in common with them")
    style: str = flag("karpathy", "prompt and scoring convention", group="scoring", choices=STYLES)
    batch_tokens: int = flag(0, "tokens per forward pass; changes speed and memory, not the score "
                                f"(0: {BATCH_TOKENS}, on a CPU {CPU_BATCH_TOKENS})", low=0)
    json: str = flag("", "JSON file to write the result to")

    def check(self):
        """Raise UserError for flags that contradict each other."""
        if self.download and self.data:
            raise UserError(f"--download writes {DATA_FILE}; leave out --data")


def main(argv=None):
    """Score a model or download the data, as the flags (sys.argv, or argv) say. Raises UserError for user mistakes."""
    config = parse_config(HellaSwagConfig, argv, __doc__.split("\n\n")[0])
    with start(config) as runtime:
        try:
            if config.download:
                path = runtime.broadcast(fetch_hellaswag)
                runtime.print(f"{DATASET} is in {path}")
                with contextlib.suppress(UserError):      # there is no model yet
                    runtime.print("next: " + command("hellaswag.py", "--checkpoint", newest_model()))
            else:
                score_checkpoint(config, runtime)
        except StopRequested:
            runtime.print("stopped; no result")
            raise SystemExit(130)


def score_checkpoint(config, runtime):
    """Score the model that the flags name; print the result and write it to --json."""
    if config.json:
        runtime.broadcast(lambda: check_new(config.json))
    else:
        require_output()
    [opened] = open_on_device([config.checkpoint], config.tokenizer, runtime)
    model = opened.model
    hellaswag = prepare_hellaswag(runtime, opened.tokenizer, model.config.block_size, config.style, config.data,
                                  config.limit)
    overlap = None
    if config.overlap:      # before setup_done(): until then a stop signal ends the process, whatever it does
        overlap = runtime.broadcast(lambda: measure_overlap(hellaswag.examples, config.overlap, config.tokenizer))
    runtime.setup_done()
    begin = time.perf_counter()
    right = score_items(model, hellaswag, runtime, config.batch_tokens)
    seconds = time.perf_counter() - begin
    result = result_of(right, hellaswag.examples, overlap)
    print_result(result, config.style, runtime)
    if hellaswag.n_cut:
        runtime.print(f"the beginning of {counted(hellaswag.n_cut, 'example')} was cut off to fit the model's window")
    runtime.print(f"{seconds:.1f} s, {result['n'] / seconds:,.1f} examples/s")
    if config.json and runtime.is_main:
        write_json(config.json, dict(
            result, style=config.style, n_cut=hellaswag.n_cut, checkpoint=opened.source, data=config.data or DATA_FILE,
            device=runtime.device.type, dtype=runtime.dtype_name, seconds=round(seconds, 3)))
        print(f"wrote {config.json}")


def measure_overlap(examples, shards, tokenizer=""):
    """Compare the contexts of Examples with a folder of shards; return which share a run, and the facts for --json.

    tokenizer: the folder of a vocabulary, for shards without one. Raises UserError.
    """
    folder = ShardFolder(shards)
    if not folder.train:
        raise UserError(f"--overlap {shards} has no train shards; name the folder that the model was trained on")
    tokenizer = folder.tokenizer(tokenizer)
    if tokenizer.eot is None:
        raise UserError(f"--overlap looks for {RUN} tokens in a row, but the tokens of {shards} are characters; name a "
                        "folder with a byte-pair vocabulary")
    contexts = [tokenizer.encode(example.context) for example in examples]
    shared = find_overlaps(contexts, folder)
    return shared, dict(shards=shards, run=RUN, items=int(shared.sum()), too_short=sum(len(c) < RUN for c in contexts))


def result_of(right, examples, overlap=None):
    """Return the accuracies as a dict: of all Examples, of each part, and of those without overlap; NaN if unknown.

    right: what score_items returned. overlap: what measure_overlap returned.
    """
    def accuracies(chosen):
        n = int(chosen.sum())
        acc, acc_norm = (ratio_stderr(values[chosen], np.ones(n)) for values in right)
        return dict(n=n, acc=acc[0], acc_stderr=acc[1], acc_norm=acc_norm[0], acc_norm_stderr=acc_norm[1])
    sources = np.array([example.source for example in examples])
    result = accuracies(np.full(len(examples), True))
    result["parts"] = {part: accuracies(sources == part) for part in PARTS if part in sources}
    if overlap:
        shared, facts = overlap
        result["overlap"] = facts | accuracies(~shared)
    return result


def print_result(result, style, runtime):
    """Print what result_of returned as a table, with the published scores of the style."""
    n, overlap = result["n"], result.get("overlap", dict(n=0))
    of = "" if n == N_EXAMPLES else f" (published numbers: {N_EXAMPLES:,})"
    runtime.print(f"HellaSwag, {style} style, {counted(n, 'example')}{of}")
    ours = {"this model": result, **{PARTS[part]: scores for part, scores in result["parts"].items()}}
    if overlap["n"]:
        ours["no overlap"] = overlap
    rows = [("", "acc", "acc_norm")]
    for name, scores in ours.items():
        acc, acc_norm = (format_with_stderr(scores[key], scores[f"{key}_stderr"]) for key in ("acc", "acc_norm"))
        rows.append((name, acc, acc_norm + f"  {counted(scores['n'], 'example')}" * (scores is not result)))
    rows += [*REFERENCES[style], ("guessing", "0.2500", "0.2500")]
    runtime.print("\n".join(f"  {name:<13}{acc:<17}{acc_norm}" for name, acc, acc_norm in rows))
    if "overlap" in result:
        runtime.print(f"{overlap['items']:,} of {counted(n, 'context')} have {RUN} tokens in a row in common with "
                      f"{overlap['shards']}; {overlap['too_short']:,} are too short to be found")


def fetch_hellaswag():
    """Return the path of the data set, after downloading it if it is missing. Raises UserError if that fails."""
    if Path(DATA_FILE).exists():
        return DATA_FILE
    from exactgpt import hub
    if hub.reachable():
        print(f"downloading {DATASET} to {DATA_FILE}", flush=True)
    else:      # use the hub's cache or fail at once, without retries
        hub.work_offline()
    try:
        from datasets import load_dataset
        rows = load_dataset(DATASET, split="validation")
        if len(rows) != N_EXAMPLES:
            raise ValueError(f"got {counted(len(rows), 'example')}, expected {N_EXAMPLES}")
        with atomic_write(DATA_FILE, "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    except Exception as error:  # no network, no `datasets`, a full disk: each library raises its own errors
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(f"{DATA_FILE} is missing and cannot be downloaded ({reason}); run python "
                        "hellaswag.py --download on a machine with a network and copy the file") from error
    return DATA_FILE


def load_hellaswag(path, style="karpathy", limit=0):
    """Load the first `limit` Examples (0: all) of a .jsonl or .json file, rendered in a style. Raises UserError."""
    from exactgpt.documents import read_objects
    examples = [parse_example(item, style, where)
                for where, item in itertools.islice(read_objects(path), limit or None)]
    if not examples:
        raise UserError(f"{path} is empty; it must contain one JSON example per line")
    return examples


def parse_example(item, style, where):
    """Make an Example of an item (a dict of the file's fields). Raises UserError that begins with `where`."""
    # In lm_eval style texts are cleaned exactly as preprocess() in lm_eval/tasks/hellaswag/utils.py does.
    def text(key):
        if not isinstance(item.get(key), str):
            raise UserError(f"{where}: {key!r} is missing or not a string")
        return item[key]

    def without_markup(text):      # WikiHow's
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    endings, label = item.get("endings"), item.get("label")
    if not (isinstance(endings, list) and len(endings) == N_ENDINGS and all(isinstance(e, str) for e in endings)):
        raise UserError(f"{where}: 'endings' must be a list of {N_ENDINGS} strings")
    if style == "karpathy":
        context = text("ctx")
    else:
        if "ctx_a" in item and "ctx_b" in item:
            ctx_a, ctx_b = text("ctx_a"), text("ctx_b")
        else:      # ctx_b is what follows the last sentence end, if it starts in lower case
            split = re.fullmatch(r"(.*[.!?][\"')\]]*)\s+(.*)", text("ctx"), re.DOTALL)
            ctx_a, ctx_b = split.groups() if split and split[2][:1].islower() else (text("ctx"), "")
        context = without_markup(f"{text('activity_label')}: {ctx_a} {ctx_b.capitalize()}")
        endings = [without_markup(e) for e in endings]
    if not all(part.strip() for part in (context, *endings)):
        raise UserError(f"{where}: the context or an ending is empty")
    if str(label) not in map(str, range(N_ENDINGS)):  # strings on the hub, and '' in its test split
        raise UserError(f"{where}: 'label' must be 0 to {N_ENDINGS - 1}, but is {label!r}")
    source = next((part for part in PARTS if str(item.get("source_id")).startswith(f"{part}~")), "")
    return Example(context, tuple(endings), int(label), source)


def prepare_hellaswag(runtime, tokenizer, block_size, style="karpathy", path="", limit=0):
    """Return the examples in a file (default: the data set) as a PreparedHellaSwag. A collective; rank 0 reads it."""
    examples = runtime.broadcast(lambda: load_hellaswag(path or fetch_hellaswag(), style, limit))
    try:
        return tokenize_examples(examples, tokenizer, block_size, style)
    except UserError as error:      # a vocabulary of characters
        raise UserError(f"this model cannot be scored on HellaSwag: {error}") from error


def tokenize_examples(examples, tokenizer, block_size, style):
    """Tokenize and pack Examples that were rendered in a style; return a PreparedHellaSwag."""
    # lm_eval encodes context and ending together and cuts after as many ids as the context alone has. Spaces at the end
    # of the context move to the endings (lm_eval/api/model.py, TemplateLM._encode_pair).
    questions, lengths, n_cut = [], [], 0
    for example in examples:
        if style == "karpathy":
            context = tokenizer.encode(example.context)
            endings = [tokenizer.encode(f" {ending}") for ending in example.endings]
            lengths.append([min(len(ending), block_size) for ending in endings])
        else:
            context = tokenizer.encode(example.context.rstrip())
            endings = [tokenizer.encode(f"{example.context} {e}")[len(context):] for e in example.endings]
            lengths.append([len(ending) for ending in example.endings])
        questions.append(pack_question(context, endings, block_size))
        n_cut += any(len(context) + len(ending) - 1 > block_size for ending in endings)
    return PreparedHellaSwag(questions, np.array([e.label for e in examples]), np.array(lengths), n_cut, examples)


def evaluate_hellaswag(model, hellaswag, runtime, batch_tokens=0):
    """Score a raw GPT, neither compiled nor wrapped, on a PreparedHellaSwag; return a HellaSwagScore."""
    right, right_norm = score_items(model, hellaswag, runtime, batch_tokens)
    return HellaSwagScore(right.mean().item(), right_norm.mean().item(), len(right))


def score_items(model, hellaswag, runtime, batch_tokens=0):
    """Return which examples a raw GPT gets right, by summed loss and by loss per length: two arrays (n,) of bool."""
    # A collective: each rank scores its share, all return the same, which depends on neither batch_tokens nor the
    # number of ranks. The model keeps its training or eval mode. The rest is as in ending_losses.
    was_training = model.training
    model.eval()
    keep_freed_memory(runtime.device, keep=False)      # on a CPU, while the shapes vary
    try:
        losses = ending_losses(model, hellaswag.questions, N_ENDINGS, runtime, batch_tokens).reshape(-1, N_ENDINGS)
    finally:
        keep_freed_memory(runtime.device)
        model.train(was_training)
    finite = np.isfinite(losses).all(axis=1)           # argmin would take a NaN of a diverged model
    return [(divided.argmin(axis=1) == hellaswag.labels) & finite for divided in (losses, losses / hellaswag.lengths)]


if __name__ == "__main__":
    run_script(main)
