"""What the ranks of a run come to together. As a script: run it on two ranks, each writes its findings to a file."""
import datetime
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

import train
from exactgpt import checkpoint, finetune
from exactgpt.config import UserError
from exactgpt.dataloader import TokenStream
from exactgpt.distributed import StopRequested
from exactgpt.optimizer import make_optimizer
from exactgpt.shards import ShardFolder
from finetune_instruct import InstructConfig
from model import GPT, GPTConfig
from tests.common import cpu_runtime
from tests.tuning_step import random_examples

ROWS = torch.arange(4 * 9).reshape(4, 9) * 37 % 61      # of a training step: 4 windows of 8 tokens and one more
VAL_TOKENS = 7 * 8 + 1                                  # 7 windows: one rank validates 4 of them, the other 3


def random_gpt():
    """Return a GPT with weights so large that the losses of two windows differ much."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=320, n_layer=2, n_head=2, n_embd=16))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10 if p.dim() > 1 else 1)
    return model


def validated(runtime, data_dir):
    """Return train.validate of random_gpt."""
    model, shards = random_gpt(), ShardFolder(data_dir)
    run = SimpleNamespace(val_stream=TokenStream(shards.val, 8), micro_batch_size=2, raw_model=model, compiled=model,
                          tokenizer=shards.tokenizer())
    return train.validate(run, train.TrainConfig(), runtime)


def trained(runtime, optimizer):
    """Return (StepResult, weights, whether to stop) of a step on ROWS, during which the last rank gets a signal."""
    model, config = random_gpt(), train.TrainConfig(optimizer=optimizer)
    run = SimpleNamespace(raw_model=model, ddp=runtime.data_parallel(model), scaler=runtime.grad_scaler(),
                          optimizer=make_optimizer(model, config, runtime), micro_batch_size=1)
    share = len(ROWS) // runtime.world_size
    runtime.stop_signal = "SIGTERM" * (runtime.rank == runtime.world_size - 1)
    result = train.train_step(run, config, runtime, ROWS[runtime.rank * share:(runtime.rank + 1) * share], 0)
    runtime.stop_signal = ""
    return result, {name: p.detach().clone() for name, p in model.named_parameters()}, runtime.stopping


def checked_for_stop(runtime):
    """Return for each rank whether this one hears of it if that rank is asked to stop, and if none is."""
    heard = []
    for rank in (*range(runtime.world_size), None):
        runtime.stop_signal = "SIGTERM" * (runtime.rank == rank)
        try:
            runtime.check_for_stop()
            heard.append(False)
        except StopRequested:
            heard.append(True)
    return heard


def refused(function, *args):
    """Return the UserError that the function raises, "" if it raises none."""
    try:
        function(*args)
    except UserError as error:
        return str(error)
    return ""


def refusals(runtime, data_dir, log_dir):
    """Return {what: the UserError} of set-ups in which the last rank has something else than the others."""
    last, found = runtime.rank == runtime.world_size - 1, {}
    flags = train.TrainConfig(data_dir=data_dir, log_dir=log_dir, total_batch_size=64, max_steps=1, n_layer=1, n_head=1,
                              n_embd=8, block_size=8, eval_every=0, device="cpu", dtype="fp32")
    tuning = InstructConfig(data="x", init_from="y", out="z", batch_size=9, max_lr=1e-3, micro_batch_size=1)
    examples = random_examples(9)

    def tune(config, examples):
        objective = finetune.Objective(random_gpt(), "lm_head")
        finetune.set_up(config, runtime, objective, examples, None, {}, None)
    found["flags"] = refused(train.set_up, replace(flags, seed=7) if last else flags, runtime)
    found["fine-tuning flags"] = refused(tune, replace(tuning, seed=7) if last else tuning, examples)
    found["examples"] = refused(tune, tuning, examples[:-1] if last else examples)
    for what, owner, name in (("code", checkpoint, "code_hash"), ("token shards", ShardFolder, "fingerprint")):
        real = getattr(owner, name)
        setattr(owner, name, (lambda *_: "other") if last else real)
        found[what] = refused(train.set_up, flags, runtime)
        setattr(owner, name, real)
    return found


if __name__ == "__main__":
    data_dir, out = sys.argv[1:]
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))
    runtime = cpu_runtime(dist.get_rank(), dist.get_world_size())
    findings = dict(validated=validated(runtime, data_dir), stops=checked_for_stop(runtime),
                    trained={name: trained(runtime, name) for name in ("adamw", "muon")},
                    refusals=refusals(runtime, data_dir, str(Path(out).parent)))
    torch.save(findings, f"{out}{runtime.rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
