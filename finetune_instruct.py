"""Teach a GPT-2 to follow instructions, from a file of instruction, input and output.

    python finetune_instruct.py --data alpaca.json --init_from gpt2 --out logs/instruct           # a LoRA adapter
    python finetune_instruct.py --data alpaca.json --init_from gpt2 --out logs/instruct --merge   # and a model with it
    torchrun --nproc_per_node=8 finetune_instruct.py --full ...                                   # all weights
    python inference.py --checkpoint logs/instruct/adapter --instruction "Name three colors."

Only the answers count in the loss. Killed or stopped: the same command continues.
"""
import json
import math
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from exactgpt.checkpoint import checkpoint_path, provenance, save_checkpoint
from exactgpt.config import RunFailed, UserError, flag, human_bytes, parse_config, read_json, run_script, write_json
from exactgpt.distributed import start
from exactgpt.finetune import (
    TuneConfig,
    add_lora,
    make_example,
    mean_loss,
    open_base_model,
    print_examples,
    save_state,
    set_up,
    train,
    work_in_folder,
    writing_results,
)
from exactgpt.generation import alpaca_prompt, generate
from exactgpt.lora import merge_adapter, save_adapter
from exactgpt.metrics import track_results
from exactgpt.shards import permutation
from model import IGNORED

ROUNDING = 1e-4     # of logits, relative to the largest: more is no rounding


@dataclass(kw_only=True)
class InstructConfig(TuneConfig):
    """Every flag of this script."""
    data: str = flag("", "a .json list, or .jsonl lines, of objects with instruction, output and perhaps input",
                     group="data")
    full: bool = flag(False, "train all weights, not a LoRA adapter", group="model", keep=True)
    merge: bool = flag(False, "write a model with the adapter merged into it, besides the adapter", group="result")
    responses: int = flag(20, "answers to write for validation items", group="result", low=0)
    max_tokens: int = flag(128, "tokens of an answer at most", group="result", low=1)

    def check(self):
        """Raise UserError for flags that are missing or contradict each other."""
        if self.full and self.merge:
            raise UserError("--merge is about an adapter, and --full trains without one; leave --merge out")
        super().check()

    def default_lr(self):
        """The peak learning rate where none is given: LoRA bears a larger one."""
        return 5e-5 if self.full else 5e-4


def main(argv=None):
    """Tune as the flags (sys.argv, or argv) say. Raises UserError for user mistakes."""
    config = parse_config(InstructConfig, argv, __doc__.splitlines()[0])
    with start(config) as runtime:
        work_in_folder(config, runtime, lambda c, state: finetune(c, state, runtime))


def finetune(config, state, runtime):
    """One run, from its first step or from where it was left, and its results in --out."""
    items = runtime.on_all_ranks(lambda: read_items(config.data))
    base = open_base_model(config, runtime)
    model, block_size = base.model, base.model.config.block_size
    train_items, val_items = split_items(items, config)
    train_rows, dropped = encode_items(train_items, base.tokenizer, block_size)
    val_rows, val_dropped = encode_items(val_items, base.tokenizer, block_size)
    cut = sum(len(row) == block_size and row.targets[-1] != base.tokenizer.eot for row in train_rows + val_rows)
    runtime.print(f"{config.data}: {len(train_rows)} items to train on and {len(val_rows)} to validate; {cut} cut to "
                  f"{block_size} tokens, {dropped + val_dropped} left out (no answer within them)")
    if not train_rows or not val_rows:
        raise UserError(f"{config.data} leaves no item to {'train on' if val_rows else 'validate'}; use more items, "
                        "another --val_fraction or a larger --block_size")
    if config.dry_run:
        print_examples(train_rows, base.tokenizer, base.tokenizer.decode, runtime.print)
    wrapped = None if config.full else add_lora(model, config)
    run = set_up(config, runtime, state, base, model, "lm_head", train_rows)

    def evaluate():
        loss = mean_loss(run, runtime, val_rows)
        return (-loss,), dict(val_loss=loss)

    if train(run, config, runtime, evaluate):
        if runtime.is_main:
            report = dict(items=dict(train=len(train_rows), validation=len(val_rows), cut=cut,
                                     left_out=dropped + val_dropped), **training_summary(run))
            with writing_results(config):
                write_results(config, run, wrapped, base, val_items, report)
        save_state(run, config, runtime, finished=True)


# -----------------------------------------------------------------------------
# items and rows

def read_items(path):
    """[(instruction, input, output)] of a .json or .jsonl file. Raises UserError that names the item."""
    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        values = ((f"item {i}", value) for i, value in enumerate(read_json(path, list), 1))
    elif suffix == ".jsonl":
        values = read_lines(path)
    else:
        raise UserError(f"{path} must be a .json list or a .jsonl file with an object a line")
    items = [check_item(value, f"{path}, {where}") for where, value in values]
    if len(items) < 2:
        raise UserError(f"{path} holds {len(items)} items; one to train on and one to validate are the least")
    return items


def read_lines(path):
    """Yield (where, value) of the lines of a .jsonl file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error


def check_item(item, where):
    """(instruction, input, output) of a JSON value; an input may be absent. Raises UserError."""
    if not isinstance(item, dict):
        raise UserError(f"{where} must be an object with instruction, input and output, but is a "
                        f"{type(item).__name__}")
    texts = [item.get("instruction"), item.get("input") or "", item.get("output")]
    for name, text in zip(("instruction", "input", "output"), texts):
        if not isinstance(text, str):
            has = f"is a {type(text).__name__}, not text" if name in item else f"is missing (it has {', '.join(item)})"
            raise UserError(f"{where}: {name!r} {has}")
    if not texts[0].strip():
        raise UserError(f"{where}: 'instruction' is empty")
    return tuple(texts)


def split_items(items, config):
    """(items to train on, items to validate), drawn with the seed."""
    order = permutation(len(items), config.seed, "split").tolist()
    n_val = min(max(1, round(config.val_fraction * len(items))), len(items) - 1)
    return [items[i] for i in order[n_val:]], [items[i] for i in order[:n_val]]


def encode_items(items, tokenizer, block_size):
    """(the Examples of items, how many had no answer within block_size tokens and are left out)."""
    rows = [encode_item(item, tokenizer, block_size) for item in items]
    kept = [row for row in rows if (row.targets != IGNORED).any()]
    return kept, len(rows) - len(kept)


def encode_item(item, tokenizer, block_size):
    """The Example of an item: prompt, answer, end-of-text; the targets are the answer and the end-of-text alone."""
    instruction, input, output = item
    prompt = tokenizer.encode(alpaca_prompt(instruction, input))
    answer = [*tokenizer.encode(output), tokenizer.eot] if output.strip() else []
    tokens = [*prompt, *answer][:block_size + 1]
    targets = [IGNORED] * (len(prompt) - 1) + answer
    return make_example(tokens[:-1], targets[:len(tokens) - 1])


# -----------------------------------------------------------------------------
# results

def training_summary(run):
    """What training did, in plain values."""
    before, after = run.first["val_loss"], run.best.facts["val_loss"]
    return dict(val_loss_before=before, val_loss_after=after, val_loss_falls_by=1 - after / before,
                best_epoch=run.best.epoch, steps=run.step, tokens=run.tokens,
                seconds=round(run.seconds, 1), base=run.base, provenance=provenance())


def write_results(config, run, wrapped, base, val_items, report):
    """Responses, adapter, merged model and metrics into --out, on rank 0."""
    out, model = Path(config.out), run.model
    answers = generate_responses(config, run, base.tokenizer, val_items)
    write_json(out / "responses.json", answers)
    adapter = None
    if wrapped:
        adapter = out / "adapter"
        shutil.rmtree(adapter, ignore_errors=True)          # of a start that was killed right here
        save_adapter(wrapped, adapter, base.record)
        size = sum(p.stat().st_size for p in adapter.iterdir())
        full = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
        report |= dict(adapter_bytes=size, adapter_share=size / full)
        print(f"adapter: {human_bytes(size)}, {100 * size / full:.2f}% of the model")
        if config.merge:
            report |= dict(merged_logits_differ_by=merge_and_check(wrapped, model))
    step = run.best.epoch * run.steps_per_epoch       # whose weights these are
    path = checkpoint_path(out, step)
    if config.full or config.merge:
        save_checkpoint(path, dict(model=model.state_dict(), config=model.config_dict(), step=step,
                                   val_loss=run.best.facts["val_loss"], tokenizer=base.tokenizer.to_checkpoint(),
                                   base=base.record, provenance=report["provenance"]))
    write_json(out / "metrics.json", report)
    track_results(config, adapter or path, [out / "responses.json", out / "metrics.json"])
    for answer in answers[:3]:
        print(f"> {answer['instruction']}\n  {answer['response']}")
    print(f"validation loss {report['val_loss_before']:.4f} -> {report['val_loss_after']:.4f} "
          f"({-100 * report['val_loss_falls_by']:+.1f}%)")
    if not config.dry_run:
        written = [*([adapter] if adapter else []), *([path] if path.exists() else []), out / "metrics.json",
                   out / "responses.json"]
        print(f"wrote {', '.join(map(str, written))}\n"
              f"next: python inference.py --checkpoint {adapter or path} --temperature 0 --num_seq 1 --instruction "
              f"{shlex.quote(val_items[0][0])}")


def generate_responses(config, run, tokenizer, items):
    """The model's likeliest answers to items it was not trained on."""
    items = items[:1 if config.dry_run else config.responses]
    if not items:
        return []
    texts, _ = generate(run.model, tokenizer, [alpaca_prompt(i, x) for i, x, _ in items], temperature=0.0,
                        max_tokens=config.max_tokens)
    return [dict(instruction=i, input=x, output=y, response=text[len(alpaca_prompt(i, x)):])
            for (i, x, y), text in zip(items, texts)]


@torch.no_grad()
def merge_and_check(wrapped, model):
    """Merge the adapter into the model; the largest difference that this makes to logits, in fp32.

    Raises RunFailed where it is more than rounding.
    """
    n = min(64, model.config.block_size)
    ids = torch.randint(model.config.vocab_size, (2, n), generator=torch.Generator().manual_seed(0))
    model.to("cpu")                                         # where fp32 is no TF32
    before = model(ids)
    merge_adapter(wrapped)
    largest = (before - model(ids)).abs().max().item()
    if not largest <= ROUNDING * max(1.0, before.abs().max().item()) or math.isnan(largest):
        raise RunFailed(f"the merged model's logits differ from the adapter's by {largest:.1e}; nothing was merged")
    return largest


if __name__ == "__main__":
    run_script(main)
