"""Evaluate a model on any text, or on any task of lm-evaluation-harness, with error bars; compare it with another.

    python evaluate.py --text notes/ book.txt                              # the newest model below logs/
    python evaluate.py --data_dir data/edu_fineweb10B --compare gpt2
    python evaluate.py --tasks hellaswag,lambada_openai,arc_easy --checkpoint logs/model_19073.pt
    torchrun --nproc_per_node=8 evaluate.py --tasks hellaswag --checkpoint gpt2

A text gives the mean loss in nats, perplexity per token and per word, and bits per byte; the last two also compare
models with different vocabularies. A document, which is a file or a row of a table, is scored after one end-of-text
token, in windows of block_size tokens that move on by half of that: each token counts once. Tasks and their metrics are
the harness' own, and so are standard errors, where it has them.
"""
from exactgpt.launch import require_output  # first, see there

import itertools
import math
import os
import time
from collections import namedtuple
from dataclasses import dataclass
from numbers import Real

import numpy as np

from exactgpt.config import DeviceConfig, UserError, counted, flag, parse_config, require_packages, run_script
from exactgpt.distributed import StopRequested, start
from exactgpt.error_bars import ABOUT_SEEDS, compare, conclusion, format_with_stderr, ratio_stderr
from exactgpt.files import check_new, write_json
from exactgpt.open_model import open_on_device
from exactgpt.scoring import BATCH_TOKENS, CPU_BATCH_TOKENS, ending_losses, pack_window, text_windows
from exactgpt.shards import ShardFolder

CHUNK_TOKENS = 1 << 22     # of text whose windows are in memory at once
BELONGS_TO = dict(split="data_dir", separator="text", text_column="text", num_fewshot="tasks", include_path="tasks")
NAMES = {"loss": "nats per token", "perplexity": "per token", "word_perplexity": "per word", "bits_per_byte": ""}

# text: str; ids: its tokens in the shards, or None; n_bytes: of the text in UTF-8; n_words: separated by white space
Document = namedtuple("Document", "text ids n_bytes n_words")
# per document, arrays (n,): sum of the losses in nats, tokens scored
TextLosses = namedtuple("TextLosses", "losses n_tokens")


# ---- flags -------------------------------------------------------------------

@dataclass(kw_only=True)
class EvaluateConfig(DeviceConfig):
    """The command-line flags."""
    checkpoint: str = flag("", "model_XXXXX.pt, a Hugging Face folder or a name such as gpt2 "
                               "(default: the newest below logs/)", group="models")
    compare: str = flag("", "a second model, to say whether the two differ by more than noise")
    text: list[str] = flag([], ".txt, .md, .jsonl, .json, .csv, .tsv and .parquet files, or folders of them",
                           group="what to evaluate", many=True)
    data_dir: str = flag("", "folder of token shards, instead of --text")
    tasks: str = flag("", "tasks of lm-evaluation-harness, separated by commas, instead of --text")
    limit: int = flag(0, "only the first N documents, or items of each task (0: all)", low=0)
    split: str = flag("val", "split of --data_dir", group="text", choices=("val", "train"))
    separator: str = flag("", "string between the documents of a .txt or .md file, with \\n and \\t for newline and "
                              "tab (default: one document per file)")
    text_column: str = flag("text", "column of other files that holds the text")
    num_fewshot: int | None = flag(None, "examples before each question (default: as the task says)", group="tasks",
                                   low=0)
    include_path: str = flag("", "folder of your own tasks, .yaml files as lm-evaluation-harness reads them, and the "
                                 "Python code that they name")
    batch_tokens: int = flag(0, "tokens per forward pass; changes speed and memory, not the result "
                                f"(0: {BATCH_TOKENS}, on a CPU {CPU_BATCH_TOKENS})", group="output", low=0)
    json: str = flag("", "JSON file to write the result to")

    def check(self):
        """Raise UserError for flags that are missing or contradict each other."""
        given = [f"--{name}" for name in ("text", "data_dir", "tasks") if getattr(self, name)]
        if len(given) != 1:
            raise UserError("name what to evaluate: --text FILE_OR_FOLDER, --data_dir SHARDS or --tasks NAME,NAME" if
                            not given else f"{' and '.join(given)} cannot be combined; use one of them")
        for name, source in BELONGS_TO.items():
            if not getattr(self, source) and getattr(self, name) != getattr(EvaluateConfig, name):
                raise UserError(f"--{name} belongs to --{source}; leave it out")
        if self.tasks:
            require_packages("lm_eval")
            if not self.task_names:
                raise UserError(f"--tasks {self.tasks!r} names no task; write --tasks hellaswag,arc_easy")
            if self.include_path and not os.path.isdir(self.include_path):
                raise UserError(f"--include_path {self.include_path} is not a folder; name that of your .yaml files")
        if self.compare:
            require_packages("scipy")

    @property
    def task_names(self):
        """The names in --tasks, each once."""
        return list(dict.fromkeys(name.strip() for name in self.tasks.split(",") if name.strip()))


# ---- texts -------------------------------------------------------------------

def read_texts(config):
    """Return the Documents of --text. Raises UserError."""
    from exactgpt.documents import find_files, read_files
    texts = []
    for text, starts in read_files(find_files(config.text), config.text_column, config.separator):
        if starts:
            if len(texts) == config.limit > 0:
                break
            texts.append([])
        texts[-1].append(text)
    texts = ["".join(parts) for parts in texts]
    return [Document(text, None, len(text.encode("utf-8", "replace")), len(text.split())) for text in texts]


def read_shards(config):
    """Return (Documents of --data_dir, the name of their vocabulary): what is between end-of-text tokens."""
    shards = ShardFolder(config.data_dir)
    tokenizer = shards.tokenizer(config.tokenizer)
    shards.check_vocabulary(tokenizer.n_vocab)
    documents = []
    pieces = filter(len, _split_at(tokenizer.eot, getattr(shards, config.split)))
    for ids in itertools.islice(pieces, config.limit or None):
        data = tokenizer.decode_bytes(ids.tolist())
        text = data.decode("utf-8", "replace")
        documents.append(Document(text, ids, len(data), len(text.split())))
    return documents, tokenizer.name


def _split_at(eot, shards):
    """Yield what is between end-of-text tokens in a list of shards, as uint16 arrays; a document may span two."""
    pieces = []      # of the document that has no end yet
    for shard in shards:
        tokens = np.empty(shard.n_tokens, dtype="<u2")
        with shard.open() as file:
            shard.read_tokens(file, 0, tokens)
        first, *others = np.split(tokens, np.flatnonzero(tokens == eot) if eot is not None else [])
        pieces.append(first)
        for piece in others:
            yield np.concatenate(pieces)
            pieces = [piece[1:]]
    if pieces:
        yield np.concatenate(pieces)


def score_documents(opened, documents, shards_vocabulary, runtime, batch_tokens=0):
    """Return the TextLosses of an OpenedModel. Raises UserError for characters outside its vocabulary."""
    model, tokenizer = opened.model, opened.tokenizer
    tokens = []
    for document in documents:      # other tools may have made other ids of the same text, so those of shards stay
        stored = document.ids is not None and tokenizer.name == shards_vocabulary
        ids = document.ids if stored else tokenizer.encode_array(document.text)
        tokens.append(np.concatenate([[tokenizer.start], ids], dtype="<u2", casting="unsafe"))
    block_size = model.config.block_size
    windows = [(i, *window) for i, ids in enumerate(tokens) for window in text_windows(len(ids), block_size)]
    losses, size = np.zeros(len(documents)), max(1, CHUNK_TOKENS // block_size)
    runtime.setup_done()
    for first in range(0, len(windows), size):
        chunk = windows[first:first + size]
        packed = [[pack_window(tokens[i][begin:end], n_scored)] for i, begin, end, n_scored in chunk]
        title = "text" if len(windows) <= size else f"text, {first // size + 1} of {-(-len(windows) // size)}"
        np.add.at(losses, [i for i, *_ in chunk], ending_losses(model, packed, 1, runtime, batch_tokens, title))
    return TextLosses(losses, np.array([len(ids) - 1 for ids in tokens], dtype=np.float64))


def summarize(scored, documents):
    """Return {"loss": mean, "loss_stderr": ..., ...} of TextLosses, with the numbers of tokens, words and bytes."""
    n_words, n_bytes = (np.array([getattr(d, name) for d in documents], dtype=np.float64)
                        for name in ("n_words", "n_bytes"))
    loss, loss_stderr = ratio_stderr(*scored)
    per_word, per_word_stderr = ratio_stderr(scored.losses, n_words)
    bits, bits_stderr = (value / math.log(2) for value in ratio_stderr(scored.losses, n_bytes))
    with np.errstate(over="ignore"):
        perplexity, word_perplexity = np.exp([loss, per_word]).tolist()
    return dict(loss=loss, loss_stderr=loss_stderr, perplexity=perplexity, perplexity_stderr=perplexity * loss_stderr,
                word_perplexity=word_perplexity, word_perplexity_stderr=word_perplexity * per_word_stderr,
                bits_per_byte=bits, bits_per_byte_stderr=bits_stderr, tokens=int(scored.n_tokens.sum()),
                words=int(n_words.sum()), bytes=int(n_bytes.sum()), documents=len(documents))


def evaluate_texts(config, models, runtime):
    """Score the OpenedModels on the texts of the flags; print the result and return it as a dict."""
    documents, vocabulary = runtime.broadcast(
        lambda: read_shards(config) if config.data_dir else (read_texts(config), None))
    if not documents:
        raise UserError(f"there is no text in {config.data_dir or ' '.join(config.text)}; name other files")
    scored = [score_documents(opened, documents, vocabulary, runtime, config.batch_tokens) for opened in models]
    summaries = [summarize(losses, documents) for losses in scored]
    result = summaries[0]
    runtime.print(f"{counted(len(documents), 'document')}, {result['tokens']:,} tokens, {result['words']:,} words, "
                  f"{result['bytes']:,} bytes")
    if config.compare:
        runtime.print(f"  {'':<17}{'first':<23}second")
    for name, unit in NAMES.items():
        values = [format_with_stderr(summary[name], summary[f"{name}_stderr"]) for summary in summaries]
        runtime.print(f"  {name.replace('_', ' '):<17}{''.join(f'{v:<22} ' for v in values)}{unit}")
    if len(documents) == 1:
        runtime.print("one document has no error bars, which come from the differences between documents"
                      + "; --separator splits a file" * bool(config.text and config.limit != 1))
    if config.compare:
        names = [opened.source for opened in models]
        same = models[0].tokenizer.name == models[1].tokenizer.name
        metric = "loss" if same else "bits_per_byte"      # tokens of different lengths do not compare
        weights = scored[0].n_tokens if same else np.array([d.n_bytes for d in documents]) * math.log(2)
        comparison = compare(scored[0].losses, scored[1].losses, weights)
        sentence = conclusion(comparison, *names)
        runtime.print(f"{describe(metric.replace('_', ' '), comparison, 'document')}\n{sentence}\n{ABOUT_SEEDS}")
        result = dict(result, other=dict(summaries[1], checkpoint=names[1]), metric=metric, **comparison._asdict(),
                      conclusion=sentence)
    return result


def describe(name, comparison, unit):
    """Return a Comparison of a quantity as a line of text."""
    c = comparison
    interval = f", 95% interval {c.low:+.4f} to {c.high:+.4f}" if math.isfinite(c.low) else ""
    return (f"difference in {name}, first minus second: {c.difference:+.4f}{interval}; the first is better on "
            f"{counted(c.better, unit)}, the second on {c.worse:,}")


# ---- tasks -------------------------------------------------------------------

def evaluate_tasks(config, models, runtime):
    """Run the tasks of the flags with the OpenedModels; print the results and return them as a dict."""
    from exactgpt.harness import compare_tasks, load_tasks, make_lm, run_tasks
    loaded = load_tasks(config.task_names, config.include_path, config.num_fewshot, runtime)
    runtime.setup_done()
    ours, *theirs = [run_tasks(make_lm(opened.model, opened.tokenizer, runtime, config.batch_tokens), loaded, runtime,
                               config.limit) for opened in models]
    if not runtime.is_main:
        return {}
    comparisons, compared = compare_tasks(ours, theirs[0]) if theirs else {}, {}
    rows = [(name, key) for name, metrics in ours.results.items() for key, value in metrics.items()
            if "," in key and "_stderr," not in key and isinstance(value, Real)]
    widths = [max((len(row[i]) for row in rows), default=0) + 2 for i in (0, 1)]
    if theirs:
        print(f"  {'':<{sum(widths)}}{'first':<23}second")
    for name, key in rows:
        label, stderr = key.removesuffix(",none"), key.replace(",", "_stderr,")
        values = [format_with_stderr(found.results[name].get(key, math.nan), found.results[name].get(stderr))
                  for found in (ours, *theirs)]
        print(f"  {name:<{widths[0]}}{label:<{widths[1]}}{''.join(f'{v:<22} ' for v in values)}".rstrip())
        if (name, key) in comparisons:
            comparison = comparisons[name, key]
            sentence = conclusion(comparison, *(opened.source for opened in models), "item",
                                  ours.metrics[name, key].higher_is_better)
            print(f"    {describe(label, comparison, 'item')}\n    {sentence}")
            compared.setdefault(name, {})[key] = dict(comparison._asdict(), conclusion=sentence)
    result = dict(ours.more, results=ours.results)
    if theirs:
        if len(comparisons) > 1:
            print(f"Of {len(comparisons)} such comparisons of equal models, about {len(comparisons) / 20:.1f} would "
                  "seem more than noise.")
        print(ABOUT_SEEDS)
        result |= dict(compare=compared, other=dict(checkpoint=models[1].source, results=theirs[0].results))
    return result


# ---- main --------------------------------------------------------------------

def main(argv=None):
    """Evaluate as the flags (sys.argv, or argv) say. Raises UserError for user mistakes."""
    config = parse_config(EvaluateConfig, argv, __doc__.split("\n\n")[0])
    with start(config) as runtime:
        try:
            evaluate(config, runtime)
        except StopRequested:
            runtime.print("stopped; no result")
            raise SystemExit(130)


def evaluate(config, runtime):
    """Evaluate the model or the two models of the flags; print the result and write it to --json."""
    if config.json:
        runtime.broadcast(lambda: check_new(config.json))
    else:
        require_output()
    sources = [config.checkpoint, *[config.compare] * bool(config.compare)]
    models = open_on_device(sources, config.tokenizer, runtime)
    begin = time.perf_counter()
    result = (evaluate_tasks if config.tasks else evaluate_texts)(config, models, runtime)
    seconds = time.perf_counter() - begin
    runtime.print(f"{seconds:.1f} s")
    if config.json and runtime.is_main:
        write_json(config.json, dict(result, checkpoint=models[0].source, device=runtime.device.type,
                                     dtype=runtime.dtype_name, seconds=round(seconds, 3)))
        print(f"wrote {config.json}")


if __name__ == "__main__":
    run_script(main)
