"""Fine-tune a GPT-2 into a text classifier, from any file with a column of texts and one of labels.

    python finetune_classifier.py --data reviews.csv --init_from gpt2 --out logs/reviews
    python finetune_classifier.py --data sms.tsv --text_column SMS --label_column Label --init_from logs --out logs/spam
    torchrun --nproc_per_node=8 finetune_classifier.py ...
    python finetune_classifier.py --checkpoint logs/spam/classifier.pt --predict "You won a prize!"
    python finetune_classifier.py --checkpoint logs/spam/classifier.pt --predict_file new.csv --out labels.csv

If a run is killed or stopped, the same command continues it.
"""
import collections
import csv
import importlib.util
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from exactgpt.checkpoint import provenance, save_checkpoint
from exactgpt.classifier import Classifier
from exactgpt.config import (
    UserError,
    atomic_write,
    check_new,
    flag,
    parse_config,
    read_text,
    run_script,
    write_json,
)
from exactgpt.device import CPU_TOKENS, CUDA_TOKENS
from exactgpt.distributed import StopRequested, seed_everything, start
from exactgpt.documents import read_rows
from exactgpt.figures import GREY, INK, save_figure, shorten
from exactgpt.finetune import (
    Objective,
    TuneConfig,
    add_lora,
    open_base_model,
    resume,
    set_up,
    train,
    work_in_folder,
)
from exactgpt.finetune_data import evaluation_batches, make_example, print_examples
from exactgpt.lora import merge_adapter
from exactgpt.metrics import track_results
from exactgpt.open_model import open_model
from model import IGNORED

LEARNING_RATES = dict(all=1e-4, last=3e-4, head=1e-2, lora=1e-3)
DUMMY_LABEL = 0        # the target in Examples whose label is to be predicted


@dataclass(kw_only=True)
class ClassifierTuneConfig(TuneConfig):
    """Every flag of this script."""
    data: str = flag("", "training examples: a .csv, .tsv, .jsonl, .json or .parquet file; validation and test "
                         "examples are split off unless --val_data and --test_data are given", group="data")
    val_data: str = flag("", "validation examples (default: val_fraction of --data)", group="data")
    test_data: str = flag("", "test examples (default: test_fraction of --data)", group="data")
    text_column: str = flag("text", "name of the column of texts", group="data")
    label_column: str = flag("label", "name of the column of labels", group="data", keep=True)
    test_fraction: float = flag(0.2, "fraction of the examples used for the test (0: no test)", group="data", low=0,
                                below=1, keep=True)
    out: str = flag("", "output folder; with --predict_file a .csv or .jsonl file", group="data")
    train: str = flag("all", "layers to train: all; last:N, the last N blocks and the score layer; head, the score "
                             "layer alone; or lora", group="model", keep=True)
    dropout: float = flag(0.1, "dropout probability in the model", group="model", low=0.0, below=1.0, keep=True)
    class_weights: str = flag("none", "balanced: give every label the same total weight in the loss",
                              group="training", choices=("none", "balanced"), keep=True)
    num_epochs: int = flag(5, "passes over the training examples", group="training", low=1, keep=True)
    patience: int = flag(2, "stop after this many epochs without a better validation macro-F1 (0: never)",
                         group="training", low=0)

    checkpoint: str = flag("", "classifier to predict with: classifier.pt, or its export", group="prediction")
    predict: list[str] = flag([], "text to label; may be repeated", group="prediction", repeat=True)
    predict_file: str = flag("", "texts to label: a table with --text_column, or a .txt file with one text per line",
                             group="prediction")

    def check(self):
        """Raise UserError for flags that are missing or contradict each other."""
        if self.predict or self.predict_file:
            if not self.checkpoint:
                raise UserError("--checkpoint is missing: the classifier.pt to predict with")
            if bool(self.predict_file) != bool(self.out):
                raise UserError("--predict_file FILE and --out FILE must be used together")
            if self.out and Path(self.out).suffix.lower() not in (".csv", ".jsonl"):
                raise UserError(f"--out {self.out} must end in .csv or .jsonl")
            return
        if self.checkpoint:
            raise UserError("--checkpoint is for --predict and --predict_file; name a model to train with --init_from")
        if not re.fullmatch(r"all|head|lora|last:[1-9]\d*", self.train):
            raise UserError(f"--train must be all, last:N, head or lora, but is {self.train!r}")
        if importlib.util.find_spec("sklearn") is None:
            raise UserError("training a classifier needs scikit-learn: pip install -r requirements-extras.txt")
        super().check()

    def default_lr(self):
        """Return the peak learning rate to use without --max_lr: the fewer weights are trained, the higher."""
        return LEARNING_RATES[self.train.split(":")[0]]


def main(argv=None):
    """Train or predict as the flags (sys.argv, or argv) say. Raises UserError for user mistakes."""
    config = parse_config(ClassifierTuneConfig, argv, __doc__.splitlines()[0])
    with start(config) as runtime:
        try:
            if config.predict or config.predict_file:
                predict(config, runtime)
            else:
                work_in_folder(config, runtime, finetune)
        except StopRequested:      # in a prediction or the final test; train() handles a stop in training
            runtime.print("stopped before there was a result; run the same command again")
            raise SystemExit(130)


def finetune(config, runtime, state):
    """Train a classifier, from its first step or from a state, and write the results to --out."""
    splits = runtime.on_all_ranks(lambda: read_splits(config))
    labels = sorted({label for _, label in splits["train"]})
    base = open_base_model(config, runtime)
    seed_everything(config.seed, "scores")
    model = Classifier.from_gpt(base.model, labels)
    wrapped = freeze_layers(model, config)
    block_size = model.config.block_size
    examples = {name: [encode_example(text, labels.index(label), base.tokenizer, block_size) for text, label in pairs]
                for name, pairs in splits.items()}
    print_splits(splits, examples, labels, block_size, runtime)
    if config.dry_run:
        print_examples(examples["train"], base.tokenizer, lambda ids: f"-> {labels[ids[0]]}", runtime.print)
    weights = balanced_weights(examples["train"], len(labels)) if config.class_weights == "balanced" else None
    run = set_up(config, runtime, base, Objective(model, "score", weights), examples["train"])
    progress = resume(run, runtime, state)

    def measure(name):
        scores = score_examples(model, runtime, examples[name], run.micro_batch_tokens)
        true = torch.tensor([int(example.targets[-1]) for example in examples[name]])
        metrics = classification_metrics(true, scores.argmax(dim=-1), labels)
        return dict(loss=F.cross_entropy(scores, true).item(), **metrics)

    def evaluate():
        metrics = measure("validation")
        logged = dict(val_loss=metrics["loss"], accuracy=metrics["accuracy"], macro_f1=metrics["macro_f1"])
        return (metrics["macro_f1"], -metrics["loss"]), logged       # ties: the lower loss

    def write_results():
        reports = {name: measure(name) for name in examples if name != "train"}
        if runtime.is_main:
            if wrapped:
                merge_adapter(wrapped)
            sizes = {name: len(split) for name, split in examples.items()}
            write_classifier(config, run, progress, base, reports, sizes)

    train(run, progress, config, runtime, evaluate, write_results)


# -----------------------------------------------------------------------------
# examples

def read_splits(config):
    """Return {"train", "validation", "test": [(text, label)]}, without a test if none is wanted. Raises UserError."""
    splits = dict(train=read_labelled_texts(config.data, config))
    labels = check_labels(splits["train"], config)
    for name, path, fraction in (("test", config.test_data, config.test_fraction),
                                 ("validation", config.val_data, config.val_fraction)):
        if path:
            splits[name] = read_labelled_texts(path, config, labels)
        elif fraction:
            n_all = len(splits["train"]) + (len(splits["test"]) if "test" in splits and not config.test_data else 0)
            splits["train"], splits[name] = stratified_split(splits["train"], round(fraction * n_all), config)
    missing = labels - {label for _, label in splits["train"]}
    if missing:
        raise UserError(f"no example of the label {min(missing)!r} is left to train on; add rows, or use a smaller "
                        "--val_fraction and --test_fraction")
    return splits


def read_labelled_texts(path, config, labels=None):
    """Read [(text, label)] from a table.

    labels: the set of valid labels; None: any. Raises UserError that names the row of an empty or unknown label.
    """
    try:
        pairs = list(read_rows(path, [config.text_column, config.label_column]))
    except UserError as error:
        hint = "; name yours with --text_column and --label_column" if "no column" in str(error) else ""
        raise UserError(f"{error}{hint}") from error
    if not pairs:
        raise UserError(f"{path} holds no rows")
    pairs = [(text, label.strip()) for text, label in pairs]
    for number, (_, label) in enumerate(pairs, 1):
        where = f"{path}, row {number} (the header not counted)"
        if not label:
            raise UserError(f"{where}: column {config.label_column!r} is empty")
        if labels and label not in labels:
            raise UserError(f"{where}: the label {label!r} is not in {config.data} ({', '.join(sorted(labels)[:20])})")
    return pairs


def stratified_split(pairs, n, config):
    """Split (text, label) pairs into (the rest, n of them), each with its share of every label.

    Raises UserError if a label is too rare for that.
    """
    from sklearn.model_selection import train_test_split
    try:
        return train_test_split(pairs, test_size=n, random_state=config.seed % 2**32,
                                stratify=[label for _, label in pairs])
    except ValueError as error:
        label, count = collections.Counter(label for _, label in pairs).most_common()[-1]
        raise UserError(f"{config.data}: cannot split {n} of {len(pairs)} rows off with every label on both sides; the "
                        f"rarest label, {label!r}, occurs {count} time{'s' * (count > 1)}. Add rows, or use "
                        "--val_data and --test_data") from error


def check_labels(pairs, config):
    """Return the set of labels. Raises UserError if there is only one, or so many that the column holds no labels."""
    labels, column = {label for _, label in pairs}, f"column {config.label_column!r} of {config.data}"
    if len(labels) < 2:
        raise UserError(f"{column} holds one label only, {pairs[0][1]!r}; a classifier needs two or more")
    if len(labels) > max(20, len(pairs) // 4):
        raise UserError(f"{column} holds {len(labels)} different values in {len(pairs)} rows; is it the column of "
                        "labels? Name it with --label_column")
    return labels


def encode_example(text, label, tokenizer, block_size):
    """Encode a text as an Example: its first block_size tokens, with the label (an int) as target of the last one."""
    tokens = tokenizer.encode(text)[:block_size] or [tokenizer.eot]
    return make_example(tokens, [IGNORED] * (len(tokens) - 1) + [label])


def print_splits(splits, examples, labels, block_size, runtime):
    """Print the size of each split, its labels, and how many examples fill the block size: those may have been cut."""
    for name, pairs in splits.items():
        counts = collections.Counter(label for _, label in pairs)
        shown = ", ".join(f"{label} {counts[label]:,}" for label in labels[:10])
        more = f" and {len(labels) - 10} more labels" if len(labels) > 10 else ""
        full = sum(len(example) == block_size for example in examples[name])
        runtime.print(f"{name:>10}  {len(pairs):,} examples: {shown}{more}; {full} fill all {block_size} tokens")


def balanced_weights(examples, n_labels):
    """Return weights (n_labels,) that give all labels the same total weight."""
    counts = np.bincount([example.targets[-1] for example in examples])
    return torch.tensor(len(examples) / (n_labels * counts), dtype=torch.float32)


def freeze_layers(model, config):
    """Leave trainable only what --train names; return peft's wrapper of the model if that is lora, else None.

    Raises UserError if --train asks for more blocks than the model has.
    """
    if config.train == "all":
        return None
    wrapped = add_lora(model, config) if config.train == "lora" else None
    if not wrapped:
        model.requires_grad_(False)
    model.score.requires_grad_(True)
    if config.train.startswith("last:"):
        n, blocks = int(config.train[5:]), model.transformer.h
        if n > len(blocks):
            raise UserError(f"--train {config.train}, but {config.init_from} has only {len(blocks)} blocks")
        for module in [*blocks[len(blocks) - n:], model.transformer.ln_f]:
            module.requires_grad_(True)
    return wrapped


# -----------------------------------------------------------------------------
# metrics, results

@torch.no_grad()
def score_examples(model, runtime, examples, micro_batch_tokens):
    """Return the scores (examples, labels), fp32 on the CPU, on every rank; each rank computes its share.

    Raises StopRequested.
    """
    scores = torch.zeros(len(examples), len(model.config.labels), device=runtime.device)
    for members, x, _ in evaluation_batches(examples, micro_batch_tokens, model.config.block_size, runtime):
        lengths = torch.tensor([len(examples[i]) for i in members], device=runtime.device)
        with runtime.autocast():
            scores[members] = model(x, lengths).float()
    if runtime.world_size > 1:
        torch.distributed.all_reduce(scores)      # the other ranks' examples are zeros here
    return scores.cpu()


def classification_metrics(true, predicted, labels):
    """Return scikit-learn's accuracy, macro-F1, values per label and confusion matrix, as plain data.

    true, predicted: (n,) indices of labels. The matrix has a row per true and a column per predicted label.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
    ids = list(range(len(labels)))
    columns = precision_recall_fscore_support(true, predicted, labels=ids, zero_division=0)
    per_label = {label: dict(precision=float(p), recall=float(r), f1=float(f), n=int(n))
                 for label, p, r, f, n in zip(labels, *columns)}
    return dict(accuracy=float(accuracy_score(true, predicted)), macro_f1=float(np.mean(columns[2])),
                per_label=per_label, confusion=confusion_matrix(true, predicted, labels=ids).tolist())


def write_classifier(config, run, progress, base, reports, sizes):
    """Write the classifier, its metrics and the confusion plot to --out, on rank 0.

    reports, sizes: {split: its metrics} and {split: number of examples}. Raises UserError, OSError.
    """
    out, best, model = Path(config.out), progress.best, run.model
    labels, record = model.config.labels, provenance()
    save_checkpoint(out / "classifier.pt", dict(
        model=model.state_dict(), config=model.config_dict(), step=best.epoch * run.plan.steps_per_epoch,
        val_loss=best.metrics["val_loss"], tokenizer=base.tokenizer.to_checkpoint(), base=base.record,
        provenance=record))
    write_json(out / "metrics.json", dict(
        labels=labels, examples=sizes, **reports, best_epoch=best.epoch, steps=progress.step,
        seconds=round(progress.seconds, 1), train=config.train, base=base.record, provenance=record))
    name = "test" if "test" in reports else "validation"
    save_figure(draw_confusion(reports[name]["confusion"], labels), out / "confusion.png")
    track_results(config, out / "classifier.pt", [out / "confusion.png", out / "metrics.json"])
    print(f"{name}: accuracy {reports[name]['accuracy']:.4f}, macro-F1 {reports[name]['macro_f1']:.4f} over "
          f"{sizes[name]:,} examples, with the weights of epoch {best.epoch}, after {progress.seconds:.0f} s")
    if not config.dry_run:
        print(f"wrote {out / 'classifier.pt'}, {out / 'metrics.json'}, {out / 'confusion.png'}\n"
              f"next: python finetune_classifier.py --checkpoint {out / 'classifier.pt'} --predict \"...\"")


def draw_confusion(matrix, labels):
    """Draw a confusion matrix of counts (n, n), rows true and columns predicted; the colours are shares of a row."""
    from matplotlib.figure import Figure
    matrix = np.asarray(matrix)
    n = len(labels)
    side = float(np.clip(0.55 * n, 3.0, 9.0)) + 1
    figure = Figure(figsize=(side + 0.8, side), dpi=160, facecolor="white", layout="constrained")
    ax = figure.subplots()
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    if n <= 20:  # with more labels the numbers would be too small to read
        for i, j in np.ndindex(n, n):
            ax.text(j, i, f"{matrix[i, j]:,}", ha="center", va="center", color="white" if shares[i, j] > 0.6 else INK,
                    fontsize=11 if n <= 5 else 8)
    names = [shorten(str(label), 24) for label in labels]
    size = 9 if n <= 20 else max(3, 240 / n)
    ax.set_xticks(range(n), names, rotation=0 if n <= 4 else 45, ha="center" if n <= 4 else "right",
                  rotation_mode="anchor", fontsize=size, parse_math=False)
    ax.set_yticks(range(n), names, fontsize=size, parse_math=False)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("predicted", color=GREY)
    ax.set_ylabel("true", color=GREY)
    bar = figure.colorbar(image, ax=ax, fraction=0.04, format=lambda share, _: f"{share:.0%}")
    bar.set_label("share of the true class", color=GREY)
    bar.ax.tick_params(colors=GREY, labelsize=8.5, length=0)
    bar.outline.set_visible(False)
    return figure


# -----------------------------------------------------------------------------
# prediction

def predict(config, runtime):
    """Label the texts of --predict and print them, or those of --predict_file and write them to --out.

    Raises UserError, StopRequested.
    """
    if config.out:
        runtime.broadcast(lambda: check_new(config.out))
    opened = open_model(config.checkpoint, classifiers=True, tokenizer=config.tokenizer)
    if not isinstance(opened.model, Classifier):
        raise UserError(f"{config.checkpoint} is a language model, not a classifier; train one from it with "
                        "--init_from")
    opened.with_tokenizer()
    texts = read_texts(config) if config.predict_file else config.predict
    model, labels = opened.model.to(runtime.device).eval(), opened.model.config.labels
    examples = [encode_example(text, DUMMY_LABEL, opened.tokenizer, model.config.block_size) for text in texts]
    micro_batch_tokens = CUDA_TOKENS if runtime.device.type == "cuda" else CPU_TOKENS
    probabilities = torch.softmax(score_examples(model, runtime, examples, micro_batch_tokens), dim=-1).tolist()
    predictions = [dict(text=text, label=labels[int(np.argmax(p))], probability=max(p),
                        probabilities=dict(zip(labels, p))) for text, p in zip(texts, probabilities)]
    if not config.predict_file:
        for item in predictions:
            others = ", ".join(f"{label} {p:.4f}" for label, p in item["probabilities"].items())
            runtime.print(f"{item['label']} ({others}): {item['text']}")
        return
    if runtime.is_main:
        write_predictions(config.out, labels, predictions)
        counts = collections.Counter(item["label"] for item in predictions)
        print(f"wrote {config.out}: {', '.join(f'{label} {n:,}' for label, n in counts.most_common())}")


def read_texts(config):
    """Read the texts of --predict_file: a column of a table, or the lines of a .txt file. Raises UserError."""
    path = Path(config.predict_file)
    if path.suffix.lower() != ".txt":
        return [text for (text,) in read_rows(path, [config.text_column])]
    text = read_text(path)
    return text.removesuffix("\n").split("\n") if text else []


def write_predictions(path, labels, predictions):
    """Write one line per text, as JSON or as CSV with a column of probabilities per label. Raises UserError."""
    with atomic_write(path, "w") as f:
        if Path(path).suffix.lower() == ".jsonl":
            f.writelines(json.dumps(item) + "\n" for item in predictions)
            return
        table = csv.writer(f)
        table.writerow(["text", "label", "probability", *(f"p({label})" for label in labels)])
        table.writerows([item["text"], item["label"], item["probability"], *item["probabilities"].values()]
                        for item in predictions)


if __name__ == "__main__":
    run_script(main)
