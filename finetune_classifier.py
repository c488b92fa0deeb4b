"""Fine-tune a GPT-2 into a text classifier, from any file with a column of texts and one of labels.

    python finetune_classifier.py --data reviews.csv --init_from gpt2 --out logs/reviews
    python finetune_classifier.py --data sms.tsv --text_column SMS --label_column Label --init_from logs --out logs/spam
    torchrun --nproc_per_node=8 finetune_classifier.py ...
    python finetune_classifier.py --checkpoint logs/spam/classifier.pt --predict "You won a prize!"
    python finetune_classifier.py --checkpoint logs/spam/classifier.pt --predict_file new.csv --out labels.csv

If a run is killed or stopped, the same command continues it.
"""
from exactgpt.launch import require_output  # first, see there

import collections
import csv
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from exactgpt import finetune
from exactgpt.classifier import Classifier
from exactgpt.config import UserError, command, counted, flag, one_line, parse_config, run_script
from exactgpt.device import CPU_TOKENS, CUDA_TOKENS
from exactgpt.distributed import StopRequested, seed_everything, start
from exactgpt.documents import read_rows
from exactgpt.figures import save_figure, shorten
from exactgpt.files import atomic_write, check_new, read_text
from exactgpt.open_model import open_model
from model import IGNORED

LEARNING_RATES = dict(all=1e-4, last=3e-4, head=1e-2, lora=1e-3)     # the fewer weights are trained, the higher


@dataclass(kw_only=True)
class ClassifierTuneConfig(finetune.TuneConfig):
    """Every flag of this script."""
    data: str = flag("", "training examples: a .csv, .tsv, .jsonl, .json or .parquet file", group="data")
    val_data: str = flag("", "validation examples (default: val_fraction of --data)", group="data")
    test_data: str = flag("", "test examples (default: test_fraction of --data)", group="data")
    text_column: str = flag("text", "name of the column of texts", group="data")
    label_column: str = flag("label", "name of the column of labels", group="data", keep=True)
    test_fraction: float = flag(0.2, "share of the examples to test (0: none)", group="data", low=0, below=1, keep=True)
    out: str = flag("", "output folder; with --predict_file a .csv or .jsonl file", group="data")
    train: str = flag("all", "layers to train: all; last:N, the last N blocks and the score layer; head, the score "
                             "layer alone; or lora", group="model", keep=True)
    dropout: float = flag(0.1, "dropout probability in the model", group="model", low=0.0, below=1.0, keep=True)
    class_weights: str = flag("none", "balanced: give every label the same total weight in the loss",
                              group="training", choices=("none", "balanced"), keep=True)
    num_epochs: int = flag(5, "passes over the training examples", group="training", low=1, keep=True)
    patience: int = flag(2, "stop after so many epochs without a better macro-F1 (0: never)", group="training", low=0)

    checkpoint: str = flag("", "classifier to predict with: classifier.pt, or its export", group="prediction")
    predict: list[str] = flag([], "text to label; may be repeated", group="prediction", repeat=True)
    predict_file: str = flag("", "texts to label: a table, or a .txt file with one text per line", group="prediction")

    def __post_init__(self):
        if self.max_lr is None:      # state and MLflow record the rate, not "the default", which may change
            self.max_lr = LEARNING_RATES.get(self.train.split(":")[0])      # None: check() refuses --train

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
        super().check("sklearn", *["peft"] * (self.train == "lora"))


def main(argv=None):
    """Train or predict as the flags (sys.argv, or argv) say. Raises UserError for user mistakes."""
    config = parse_config(ClassifierTuneConfig, argv, __doc__.splitlines()[0])
    with start(config) as runtime:
        try:
            if config.predict or config.predict_file:
                predict(config, runtime)
            else:
                finetune.work_in_folder(config, runtime, tune)
        except StopRequested:      # in a prediction or the final test; train() handles a stop in training
            runtime.print("stopped before there was a result; run the same command again")
            raise SystemExit(130)


def tune(config, runtime, state):
    """Train a classifier, from its first step or from a state, and write the results to --out."""
    splits = runtime.on_all_ranks(lambda: read_splits(config))
    labels = sorted({label for _, label in splits["train"]})
    gpt, tokenizer, base = finetune.open_base_model(config, runtime)
    seed_everything(config.seed, "scores")
    model = Classifier.from_gpt(gpt, labels)
    wrapped = freeze_layers(model, config)
    block_size = model.config.block_size
    examples = {name: [encode_example(text, labels.index(label), tokenizer, block_size) for text, label in pairs]
                for name, pairs in splits.items()}
    for name, pairs in splits.items():
        counts = collections.Counter(label for _, label in pairs).most_common(10)
        full = sum(len(example) == block_size for example in examples[name])      # those may have been cut
        runtime.print(f"{name:>10}  {counted(len(pairs), 'example')}, {len(labels)} labels: "
                      f"{', '.join(f'{label} {n:,}' for label, n in counts)}; {full} at the limit of "
                      f"{block_size} tokens")
    if config.dry_run:
        finetune.print_examples(examples["train"], tokenizer, lambda ids: f"-> {labels[ids[0]]}", runtime.print)
    weights = None
    if config.class_weights == "balanced":      # all labels get the same total weight
        counts = np.bincount([example.targets[-1] for example in examples["train"]])
        weights = torch.tensor(len(examples["train"]) / (len(labels) * counts), dtype=torch.float32)
    objective = finetune.Objective(model, "score", weights)
    run, progress = finetune.set_up(config, runtime, objective, examples["train"], tokenizer, base, state)

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
        if not runtime.is_main:
            return None
        if wrapped:
            wrapped.merge_and_unload()
        path, picture = Path(config.out) / "classifier.pt", Path(config.out) / "confusion.png"
        finetune.save_model(path, run, progress)
        name = "test" if "test" in reports else "validation"
        save_figure(draw_confusion(reports[name]["confusion"], labels), picture)
        sizes = {name: len(split) for name, split in examples.items()}
        print(f"{name}: accuracy {reports[name]['accuracy']:.4f}, macro-F1 {reports[name]['macro_f1']:.4f} over "
              f"{counted(sizes[name], 'example')}, with the weights of epoch {progress.best['epoch']}, after "
              f"{progress.seconds:.0f} s")
        example = shorten(one_line(splits[name][0][0]), 60)
        return (dict(labels=labels, examples=sizes, **reports, train=config.train), [path, picture],
                command("finetune_classifier.py", "--checkpoint", path, "--predict", example))

    finetune.train(run, progress, config, runtime, evaluate, write_results)


# ---- examples ----------------------------------------------------------------

def read_splits(config):
    """Return {"train", "validation", "test": [(text, label)]}, without a test if none is wanted. Raises UserError."""
    from sklearn.model_selection import train_test_split
    splits = dict(train=read_labelled_texts(config.data, config))
    labels, n_all = {label for _, label in splits["train"]}, len(splits["train"])
    most = max(20, n_all // 4)
    if not 2 <= len(labels) <= most:
        raise UserError(f"--label_column {config.label_column!r} of {config.data} holds "
                        f"{counted(len(labels), 'different value')} in {counted(n_all, 'row')}, but a classifier needs "
                        f"2 to {most} labels; is it the column of labels?")
    for name, path, fraction in (("test", config.test_data, config.test_fraction),
                                 ("validation", config.val_data, config.val_fraction)):
        if path:
            splits[name] = read_labelled_texts(path, config, labels)
        elif fraction:
            rest, n = splits["train"], round(fraction * n_all)
            try:
                splits["train"], splits[name] = train_test_split(rest, test_size=n, random_state=config.seed % 2**32,
                                                                 stratify=[label for _, label in rest])
            except ValueError:      # a label that occurs once, or fewer rows than labels
                splits["train"] = []
            if {label for _, label in splits["train"]} != labels:
                label, count = collections.Counter(label for _, label in rest).most_common()[-1]
                raise UserError(f"{config.data}: cannot split {n} of {counted(len(rest), 'row')} off with every "
                                f"label on both sides; the rarest label, {label!r}, occurs {counted(count, 'time')}. "
                                "Add rows of it, or use smaller fractions, or --val_data and --test_data")
    return splits


def read_labelled_texts(path, config, labels=None):
    """Read [(text, label)] from a table; labels: those that are valid, None: any. Raises UserError naming the row."""
    pairs = [(text, label.strip()) for text, label in read_rows(path, [config.text_column, config.label_column])]
    if not pairs:
        raise UserError(f"{path} holds no rows")
    for number, (_, label) in enumerate(pairs, 1):
        if not label or label not in (labels or {label}):
            what = f"the label {label!r} is not in {config.data} ({', '.join(sorted(labels or [])[:20])})"
            raise UserError(f"{path}, row {number} (the header not counted): "
                            + (what if label else f"column {config.label_column!r} is empty"))
    return pairs


def encode_example(text, label, tokenizer, block_size):
    """Encode a text as an Example: its first block_size tokens, with the label (an int) as target of the last one."""
    tokens = tokenizer.encode(text)[:block_size] or [tokenizer.start]
    return finetune.Example(tokens, [IGNORED] * (len(tokens) - 1) + [label])


def freeze_layers(model, config):
    """Leave trainable only what --train names; return peft's wrapper if that is lora, else None. Raises UserError."""
    kind, _, n = config.train.partition(":")
    n, blocks = int(n or 0), model.transformer.h
    if n > len(blocks):
        raise UserError(f"--train {config.train}, but {config.init_from} has only {counted(len(blocks), 'block')}")
    wrapped = finetune.add_adapter(model, config) if kind == "lora" else None
    if kind in ("last", "head"):
        model.requires_grad_(False)
    for module in [model.score, *([*blocks[-n:], model.transformer.ln_f] if n else [])]:
        module.requires_grad_(True)
    return wrapped


# ---- metrics, results --------------------------------------------------------

@torch.no_grad()
def score_examples(model, runtime, examples, micro_batch_tokens):
    """Return the scores (examples, labels), fp32 on the CPU, the same on every rank. Raises StopRequested."""
    scores = torch.zeros(len(examples), len(model.config.labels), device=runtime.device)
    for members, x, y in finetune.evaluation_batches(examples, micro_batch_tokens, model.config.block_size, runtime):
        with runtime.autocast():
            scores[members] = model.score(model.hidden(x)[y != IGNORED]).float()      # of each text's last token
    if runtime.world_size > 1:
        torch.distributed.all_reduce(scores)      # the other ranks' examples are zeros here
    return scores.cpu()


def classification_metrics(true, predicted, labels):
    """Return accuracy, macro-F1, values per label and confusion matrix (a row per true label) of label indices (n,)."""
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
    ids = list(range(len(labels)))
    columns = precision_recall_fscore_support(true, predicted, labels=ids, zero_division=0)
    per_label = {label: dict(precision=float(p), recall=float(r), f1=float(f), n=int(n))
                 for label, p, r, f, n in zip(labels, *columns)}
    return dict(accuracy=float(accuracy_score(true, predicted)), macro_f1=float(np.mean(columns[2])),
                per_label=per_label, confusion=confusion_matrix(true, predicted, labels=ids).tolist())


def draw_confusion(matrix, labels):
    """Draw a confusion matrix of counts (n, n), rows true and columns predicted; the colours are shares of a row."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay
    matrix, n = np.array(matrix), len(labels)
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(0.55 * n, 3.0, 9.0)) + 1
    figure = Figure(figsize=(side + 0.8, side), dpi=160, layout="constrained")
    names = [shorten(str(label), 24).replace("$", r"\$") for label in labels]       # no formulas
    display = ConfusionMatrixDisplay(shares, display_labels=names)
    display.plot(ax=figure.subplots(), cmap="Blues", xticks_rotation=90 if n > 4 else 0, include_values=n <= 20,
                 im_kw=dict(vmin=0, vmax=1), text_kw=dict(fontsize=11 if n <= 5 else 8))
    display.ax_.tick_params(labelsize=9 if n <= 20 else max(3, 240 / n))
    display.im_.colorbar.set_label("share of the true label")
    for text, count in zip(display.text_.flat if n <= 20 else (), matrix.flat):
        text.set_text(f"{count:,}")
    return figure


# ---- prediction --------------------------------------------------------------

def predict(config, runtime):
    """Label --predict and print it, or the texts in --predict_file and write --out. Raises UserError, StopRequested."""
    if config.out:
        runtime.broadcast(lambda: check_new(config.out))
    else:
        require_output()
    opened = open_model(config.checkpoint, classifiers=True, tokenizer=config.tokenizer)
    if not isinstance(opened.model, Classifier):
        raise UserError(f"{config.checkpoint} is a language model, not a classifier; train one from it with "
                        "--init_from")
    opened.with_tokenizer()
    texts = config.predict
    if config.predict_file.lower().endswith(".txt"):
        text = read_text(config.predict_file)
        texts = text.removesuffix("\n").split("\n") if text else []
    elif config.predict_file:
        texts = [text for (text,) in read_rows(config.predict_file, [config.text_column])]
    model, labels = opened.model.to(runtime.device).eval(), opened.model.config.labels
    examples = [encode_example(text, 0, opened.tokenizer, model.config.block_size) for text in texts]    # any label
    micro_batch_tokens = CUDA_TOKENS if runtime.device.type == "cuda" else CPU_TOKENS
    probabilities = torch.softmax(score_examples(model, runtime, examples, micro_batch_tokens), dim=-1).tolist()
    predictions = [dict(text=text, label=labels[int(np.argmax(p))], probability=max(p),
                        probabilities=dict(zip(labels, p))) for text, p in zip(texts, probabilities)]
    if not config.predict_file:
        for item in predictions:
            others = ", ".join(f"{label} {p:.4f}" for label, p in item["probabilities"].items())
            runtime.print(f"{item['label']} ({others}): {item['text']}")
    elif runtime.is_main:
        with atomic_write(config.out, "w") as f:
            if config.out.lower().endswith(".jsonl"):
                f.writelines(json.dumps(item) + "\n" for item in predictions)
            else:
                table = csv.writer(f)
                table.writerow(["text", "label", "probability", *(f"p({label})" for label in labels)])
                table.writerows([item["text"], item["label"], item["probability"], *item["probabilities"].values()]
                                for item in predictions)
        counts = collections.Counter(item["label"] for item in predictions).most_common()
        print(f"wrote {config.out}: {', '.join(f'{label} {n:,}' for label, n in counts) or 'there are no texts'}")


if __name__ == "__main__":
    run_script(main)
