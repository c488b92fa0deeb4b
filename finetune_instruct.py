"""Fine-tune a GPT-2 to follow instructions, from a file of instructions, inputs and outputs.

    python finetune_instruct.py --data alpaca.json --init_from gpt2 --out logs/instruct           # a LoRA adapter
    python finetune_instruct.py --data alpaca.json --init_from gpt2 --out logs/instruct --merge   # and a merged model
    torchrun --nproc_per_node=8 finetune_instruct.py --full ...                                   # all weights
    python inference.py --checkpoint logs/instruct/adapter --instruction "Name three colors."

Only the answers count in the loss. If a run is killed or stopped, the same command continues it.
"""
import exactgpt.launch  # noqa: F401  before torch, see there

import math
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from exactgpt.checkpoint import checkpoint_path, provenance, save_checkpoint
from exactgpt.config import RunFailed, UserError, flag, human_bytes, parse_config, run_script, write_json
from exactgpt.distributed import start
from exactgpt.documents import read_objects
from exactgpt.finetune import (
    Objective,
    TuneConfig,
    add_lora,
    mean_loss,
    open_base_model,
    resume,
    set_up,
    train,
    work_in_folder,
)
from exactgpt.finetune_data import make_example, print_examples
from exactgpt.generation import alpaca_prompt, generate
from exactgpt.lora import merge_adapter, save_adapter
from exactgpt.metrics import track_results
from exactgpt.shards import permutation
from model import IGNORED

ROUNDING = 1e-4     # largest difference of merged logits, relative to the largest logit, that counts as rounding


@dataclass(kw_only=True)
class InstructConfig(TuneConfig):
    """Every flag of this script."""
    data: str = flag("", "training items: a .json list, or .jsonl lines, of objects with instruction, output and an "
                         "optional input", group="data")
    full: bool = flag(False, "train all weights instead of a LoRA adapter", group="model", keep=True)
    merge: bool = flag(False, "also write a model with the adapter merged into it", group="result")
    responses: int = flag(20, "answers to generate for validation items (0: none)", group="result", low=0)
    max_tokens: int = flag(128, "maximum tokens of a generated answer", group="result", low=1)

    def check(self):
        """Raise UserError for flags that are missing or contradict each other."""
        if self.full and self.merge:
            raise UserError("--merge needs an adapter, and --full trains none; leave --merge out")
        super().check()

    def default_lr(self):
        """Return the peak learning rate to use without --max_lr: LoRA works with a higher one."""
        return 5e-5 if self.full else 5e-4


def main(argv=None):
    """Train as the flags (sys.argv, or argv) say. Raises UserError for user mistakes."""
    config = parse_config(InstructConfig, argv, __doc__.splitlines()[0])
    with start(config) as runtime:
        work_in_folder(config, runtime, finetune)


def finetune(config, runtime, state):
    """Train on instructions, from the first step or from a state, and write the results to --out."""
    items = runtime.on_all_ranks(lambda: read_items(config.data))
    base = open_base_model(config, runtime)
    model, block_size = base.model, base.model.config.block_size
    train_items, val_items = split_items(items, config)
    train_examples, train_dropped = encode_items(train_items, base.tokenizer, block_size)
    val_examples, val_dropped = encode_items(val_items, base.tokenizer, block_size)
    n_dropped = train_dropped + val_dropped
    n_cut = sum(len(example) == block_size and example.targets[-1] != base.tokenizer.eot
                for example in train_examples + val_examples)
    runtime.print(f"{config.data}: {len(train_examples)} items to train on and {len(val_examples)} to validate; "
                  f"{n_cut} cut to {block_size} tokens, {n_dropped} left out (no answer within them)")
    if not train_examples or not val_examples:
        raise UserError(f"{config.data} leaves no item to {'train on' if val_examples else 'validate'}; use more "
                        "items, another --val_fraction or a larger --block_size")
    if config.dry_run:
        print_examples(train_examples, base.tokenizer, base.tokenizer.decode, runtime.print)
    wrapped = None if config.full else add_lora(model, config)
    run = set_up(config, runtime, base, Objective(model, "lm_head"), train_examples)
    progress = resume(run, runtime, state)

    def evaluate():
        loss = mean_loss(run, runtime, val_examples)
        return (-loss,), dict(val_loss=loss)

    def write_results():
        if runtime.is_main:
            counts = dict(train=len(train_examples), validation=len(val_examples), cut=n_cut, left_out=n_dropped)
            report = dict(items=counts, **training_summary(run, progress))
            write_model(config, run, progress, wrapped, base, val_items, report)

    train(run, progress, config, runtime, evaluate, write_results)


# -----------------------------------------------------------------------------
# items and examples

def read_items(path):
    """Read [(instruction, input, output)] from a .json or .jsonl file. Raises UserError that names the item."""
    if Path(path).suffix.lower() not in (".json", ".jsonl"):
        raise UserError(f"{path} must be a .json list or a .jsonl file with one object per line")
    items = [check_item(value, where) for where, value in read_objects(path)]
    if len(items) < 2:
        raise UserError(f"{path} holds {len(items)} items; two or more are needed, to train on and to validate")
    return items


def check_item(item, where):
    """Return (instruction, input, output) of an object, in which the input may be missing. Raises UserError.

    where: the place of the item, for the message.
    """
    texts = [item.get("instruction"), item.get("input") or "", item.get("output")]
    for name, text in zip(("instruction", "input", "output"), texts):
        if not isinstance(text, str):
            has = f"is a {type(text).__name__}, not text" if name in item else f"is missing (it has {', '.join(item)})"
            raise UserError(f"{where}: {name!r} {has}")
    if not texts[0].strip():
        raise UserError(f"{where}: 'instruction' is empty")
    return tuple(texts)


def split_items(items, config):
    """Split items at random into (train items, validation items), at least one each; the seed decides."""
    order = permutation(len(items), config.seed, "split").tolist()
    n_val = min(max(1, round(config.val_fraction * len(items))), len(items) - 1)
    return [items[i] for i in order[n_val:]], [items[i] for i in order[:n_val]]


def encode_items(items, tokenizer, block_size):
    """Encode items; return (Examples, number of items dropped for having no answer within block_size tokens)."""
    examples = [encode_item(item, tokenizer, block_size) for item in items]
    kept = [example for example in examples if (example.targets != IGNORED).any()]
    return kept, len(examples) - len(kept)


def encode_item(item, tokenizer, block_size):
    """Encode an item as an Example: prompt, answer, end-of-text. Only the answer and the end-of-text are targets."""
    instruction, input, output = item
    prompt = tokenizer.encode(alpaca_prompt(instruction, input))
    answer = [*tokenizer.encode(output), tokenizer.eot] if output.strip() else []
    tokens = [*prompt, *answer][:block_size + 1]
    targets = [IGNORED] * (len(prompt) - 1) + answer
    return make_example(tokens[:-1], targets[:len(tokens) - 1])


# -----------------------------------------------------------------------------
# results

def training_summary(run, progress):
    """Return losses, counts and the origin of a trained model, as plain data."""
    before, after = progress.baseline["val_loss"], progress.best.metrics["val_loss"]
    return dict(val_loss_before=before, val_loss_after=after, val_loss_falls_by=1 - after / before,
                best_epoch=progress.best.epoch, steps=progress.step, tokens=progress.tokens,
                seconds=round(progress.seconds, 1), base=run.base, provenance=provenance())


def write_model(config, run, progress, wrapped, base, val_items, report):
    """Write responses, adapter, merged model and metrics to --out, on rank 0.

    wrapped: peft's wrapper of the model, None with --full. report: the metrics without the adapter's.
    Raises UserError, OSError; RunFailed if merging changed the model.
    """
    out, model = Path(config.out), run.model
    answers = generate_responses(config, run, base.tokenizer, val_items)
    write_json(out / "responses.json", answers)
    adapter = None
    if wrapped:
        adapter = out / "adapter"
        shutil.rmtree(adapter, ignore_errors=True)          # left by a process that was killed here
        save_adapter(wrapped, adapter, base.record)
        size = sum(p.stat().st_size for p in adapter.iterdir())
        full = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
        report |= dict(adapter_bytes=size, adapter_share=size / full)
        print(f"adapter: {human_bytes(size)}, {100 * size / full:.2f}% of the model")
        if config.merge:
            report |= dict(merged_logits_differ_by=merge_and_check(wrapped, model))
    step = progress.best.epoch * run.plan.steps_per_epoch       # the step of the weights, not the last one
    path = checkpoint_path(out, step)
    if config.full or config.merge:
        save_checkpoint(path, dict(model=model.state_dict(), config=model.config_dict(), step=step,
                                   val_loss=progress.best.metrics["val_loss"], tokenizer=base.tokenizer.to_checkpoint(),
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
    """Generate the model's greedy answers to the first --responses items."""
    items = items[:1 if config.dry_run else config.responses]
    if not items:
        return []
    texts, _ = generate(run.model, tokenizer, [alpaca_prompt(i, x) for i, x, _ in items], temperature=0.0,
                        max_tokens=config.max_tokens)
    return [dict(instruction=i, input=x, output=y, response=text[len(alpaca_prompt(i, x)):])
            for (i, x, y), text in zip(items, texts)]


@torch.no_grad()
def merge_and_check(wrapped, model):
    """Merge the adapter into the model; return the largest change of a logit, in fp32.

    Raises RunFailed if it is more than rounding.
    """
    n = min(64, model.config.block_size)
    ids = torch.randint(model.config.vocab_size, (2, n), generator=torch.Generator().manual_seed(0))
    model.to("cpu")                                         # where fp32 is not computed in TF32
    before = model(ids)
    merge_adapter(wrapped)
    largest = (before - model(ids)).abs().max().item()
    if not largest <= ROUNDING * max(1.0, before.abs().max().item()) or math.isnan(largest):
        raise RunFailed(f"merging changed the model's logits by {largest:.1e}, more than rounding; no merged model was "
                        "written")
    return largest


if __name__ == "__main__":
    run_script(main)
