"""Fine-tune a GPT-2 to follow instructions, from a file of instructions, inputs and outputs.

    python finetune_instruct.py --data alpaca.json --init_from gpt2 --out logs/instruct           # a LoRA adapter
    python finetune_instruct.py --data alpaca.json --init_from gpt2 --out logs/instruct --merge   # and a merged model
    torchrun --nproc_per_node=8 finetune_instruct.py --full ...                                   # all weights
    python inference.py --checkpoint logs/instruct/adapter --instruction "Name three colors."

Only the answers count in the loss. If a run is killed or stopped, the same command continues it.
"""
import exactgpt.launch  # noqa: F401  first, see there

from dataclasses import dataclass
from pathlib import Path

import torch

from exactgpt import finetune
from exactgpt.checkpoint import checkpoint_path
from exactgpt.config import (
    RunFailed,
    UserError,
    command,
    counted,
    flag,
    human_bytes,
    one_line,
    parse_config,
    run_script,
)
from exactgpt.distributed import start
from exactgpt.documents import read_objects
from exactgpt.files import new_folder, write_json
from exactgpt.generation import alpaca_prompt, generate
from exactgpt.huggingface import BASE
from exactgpt.open_model import ADAPTER_CONFIG
from exactgpt.shards import permutation
from exactgpt.tokenizer import require_end_of_text
from model import IGNORED

ROUNDING = 1e-4     # largest difference of merged logits, relative to the largest logit, that counts as rounding


@dataclass(kw_only=True)
class InstructConfig(finetune.TuneConfig):
    """Every flag of this script."""
    data: str = flag("", "training items: a .json list, or .jsonl lines, of objects with instruction, output and an "
                         "optional input", group="data")
    full: bool = flag(False, "train all weights instead of a LoRA adapter", group="model", keep=True)
    merge: bool = flag(False, "also write a model with the adapter merged into it", group="result")
    responses: int = flag(20, "answers to generate for validation items (0: none)", group="result", low=0)
    max_tokens: int = flag(128, "maximum tokens of a generated answer", group="result", low=1)

    def __post_init__(self):
        if self.max_lr is None:      # state and MLflow record the rate, not "the default", which may change
            self.max_lr = 5e-5 if self.full else 5e-4      # LoRA works with a higher one

    def check(self):
        """Raise UserError for flags that are missing or contradict each other."""
        if self.full and self.merge:
            raise UserError("--merge needs an adapter, and --full trains none; leave --merge out")
        super().check(*["peft"] * (not self.full))


def main(argv=None):
    """Train as the flags (sys.argv, or argv) say. Raises UserError for user mistakes."""
    config = parse_config(InstructConfig, argv, __doc__.splitlines()[0])
    with start(config) as runtime:
        finetune.work_in_folder(config, runtime, tune)


def tune(config, runtime, state):
    """Train on instructions, from the first step or from a state, and write the results to --out."""
    items = runtime.on_all_ranks(lambda: read_items(config.data))
    model, tokenizer, base = finetune.open_base_model(config, runtime)
    require_end_of_text(tokenizer, "an answer")
    block_size = model.config.block_size
    order = permutation(len(items), config.seed, "split").tolist()
    n_val = min(max(1, round(config.val_fraction * len(items))), len(items) - 1)
    train_items, val_items = [items[i] for i in order[n_val:]], [items[i] for i in order[:n_val]]
    splits = [[encode_item(item, tokenizer, block_size) for item in part] for part in (train_items, val_items)]
    train_examples, val_examples = ([e for e in split if (e.targets != IGNORED).any()] for split in splits)
    examples = train_examples + val_examples
    counts = dict(train=len(train_examples), validation=len(val_examples),
                  cut=int(sum(len(e) == block_size and e.targets[-1] != tokenizer.eot for e in examples)),
                  left_out=len(items) - len(examples))
    runtime.print(f"{config.data}: {counted(counts['train'], 'item')} to train on and {counts['validation']} to "
                  f"validate; {counts['cut']} cut to {block_size} tokens, {counts['left_out']} left out (no answer)")
    if not train_examples or not val_examples:
        raise UserError(f"{config.data} leaves no item to {'train on' if val_examples else 'validate'}; use more "
                        "items, another --val_fraction or a larger --block_size")
    if config.dry_run:
        finetune.print_examples(train_examples, tokenizer, tokenizer.decode, runtime.print)
    wrapped = None if config.full else finetune.add_adapter(model, config)
    objective = finetune.Objective(model, "lm_head")
    run, progress = finetune.set_up(config, runtime, objective, train_examples, tokenizer, base, state)

    def evaluate():
        loss = torch.zeros((), device=runtime.device)
        for _, x, y in finetune.evaluation_batches(val_examples, run.micro_batch_tokens, block_size, runtime):
            with runtime.autocast():
                loss = loss + run.objective(x, y)
        loss = runtime.sum(loss)[0] / run.objective.total_weight(val_examples)
        return (-loss,), dict(val_loss=loss)

    finetune.train(run, progress, config, runtime, evaluate,
                   lambda: runtime.is_main and write_results(config, run, progress, wrapped, val_items, counts))


# ---- items and examples ------------------------------------------------------

def read_items(path):
    """Read [(instruction, input, output)] from a .json or .jsonl file. Raises UserError that names the item."""
    if Path(path).suffix.lower() not in (".json", ".jsonl"):
        raise UserError(f"{path} must be a .json list or a .jsonl file with one object per line")
    items = []
    for where, item in read_objects(path):
        values = [item.get("instruction"), item.get("input") or "", item.get("output")]      # there may be no input
        for name, value in zip(("instruction", "input", "output"), values):
            if not isinstance(value, str) or (name == "instruction" and not value.strip()):
                raise UserError(f"{where}: {name!r} must be text, but is {value!r:.40}; the item has {', '.join(item)}")
        items.append(tuple(values))
    if len(items) < 2:
        raise UserError(f"{path} holds {counted(len(items), 'item')}; it needs two or more, to train and to validate")
    return items


def encode_item(item, tokenizer, block_size):
    """Encode an item as an Example: prompt, answer, end-of-text. The last two are the targets, cut to block_size."""
    instruction, input, output = item
    prompt = tokenizer.encode(alpaca_prompt(instruction, input))
    answer = [*tokenizer.encode(output), tokenizer.eot] if output.strip() else []
    tokens = [*prompt, *answer][:block_size + 1]
    targets = [IGNORED] * (len(prompt) - 1) + answer
    return finetune.Example(tokens[:-1], targets[:len(tokens) - 1])


# ---- results -----------------------------------------------------------------

def write_results(config, run, progress, wrapped, val_items, counts):
    """Write answers and model; return (metrics, paths, the next command). Raises UserError, RunFailed."""
    # wrapped: peft's wrapper of the model, None with --full
    before, after = progress.first["val_loss"], progress.best["facts"]["val_loss"]
    report = dict(items=counts, val_loss_before=before, val_loss_after=after, val_loss_falls_by=1 - after / before,
                  tokens=progress.tokens)
    answers, asked = [], val_items[:1 if config.dry_run else config.responses]
    if asked:
        prompts = [alpaca_prompt(instruction, input) for instruction, input, _ in asked]
        texts, _ = generate(run.model, run.tokenizer, prompts, temperature=0.0, max_tokens=config.max_tokens)
        answers = [dict(instruction=instruction, input=input, output=output, response=text[len(prompt):])
                   for (instruction, input, output), prompt, text in zip(asked, prompts, texts)]
    out, paths = Path(config.out), []
    if wrapped:
        paths.append(out / "adapter")
        save_adapter(wrapped, paths[0], run.base)
        size = sum(p.stat().st_size for p in paths[0].iterdir())
        share = size / sum(p.numel() * p.element_size() for p in run.model.parameters() if not p.requires_grad)
        report.update(adapter_bytes=size, adapter_share=share)
        print(f"adapter: {human_bytes(size)}, {100 * share:.2f}% of the model")
    if config.merge:
        report.update(merged_logits_differ_by=merge_and_check(wrapped, run.model))
    if config.full or config.merge:
        paths.append(checkpoint_path(out, progress.best["epoch"] * run.steps_per_epoch))
        finetune.save_model(paths[-1], run, progress)
    paths.append(out / "responses.json")
    write_json(paths[-1], answers)
    for item in answers[:3]:
        print(f"> {item['instruction']}\n  {item['response']}")
    print(f"validation loss {before:.4f} -> {after:.4f} ({100 * (after / before - 1):+.1f}%)")
    return report, paths, command("inference.py", "--checkpoint", paths[0], "--temperature", 0, "--num_seq", 1,
                                  "--instruction", one_line(val_items[0][0]))


def save_adapter(wrapped, folder, base):
    """Write an adapter in peft's format, and the record of its base ({"source", "sha256"}). Raises UserError."""
    from safetensors import SafetensorError
    # A process that was killed after this has left one.
    with new_folder(folder, replaces=(ADAPTER_CONFIG, "adapter_model.safetensors", BASE)) as temporary:
        try:
            wrapped.save_pretrained(temporary, save_embedding_layers=False)
        except SafetensorError as error:
            raise OSError(f"{error}") from error               # new_folder makes a UserError of it
        (temporary / "README.md").unlink(missing_ok=True)      # peft's model card, an empty template
        write_json(temporary / BASE, base)
        mode = (temporary / BASE).stat().st_mode
        (temporary / "adapter_model.safetensors").chmod(mode)  # safetensors makes it readable by the owner only


@torch.no_grad()
def merge_and_check(wrapped, model):
    """Merge the adapter into the model; return the largest change of a logit, in fp32. Raises RunFailed if large."""
    shape, generator = (2, min(64, model.config.block_size)), torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    model.to("cpu")                                         # where fp32 is not computed in TF32
    before = model(ids)
    wrapped.merge_and_unload()
    largest = (before - model(ids)).abs().max().item()
    if not largest <= ROUNDING * max(1.0, before.abs().max().item()):      # or if it is NaN
        raise RunFailed(f"merging changed the model's logits by {largest:.1e}, more than rounding; no merged model was "
                        "written")
    return largest


if __name__ == "__main__":
    run_script(main)
