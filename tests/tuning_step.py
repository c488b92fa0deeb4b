"""One step of fine-tuning over random examples. As a script: run it on two ranks, write the gradients to a file."""
import datetime
import sys

import torch
import torch.distributed as dist

from exactgpt.finetune import Example, Objective, Run, train_step
from finetune_instruct import InstructConfig
from model import GPT, IGNORED, GPTConfig
from tests.common import cpu_runtime


def random_examples(n):
    """Return examples of uneven lengths over a vocabulary of 65, from 1 target to all."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for i in range(n):
        length = int(torch.randint(2, 30, (), generator=generator))
        tokens, targets = torch.randint(65, (2, length), generator=generator).tolist()
        examples.append(Example(tokens, [IGNORED] * min(length - 1, i * 3) + targets[min(length - 1, i * 3):]))
    return examples


def one_step(examples, micro_batch_tokens, rank=0, world_size=1, weights=None, grad_clip=0.0):
    """Return (gradients, StepResult) of a step over all examples, of which this rank does its share."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 65, 1, 2, 16))
    objective = Objective(model, "lm_head", weights)
    ddp = torch.nn.parallel.DistributedDataParallel(objective) if world_size > 1 else objective
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run = Run(objective, model, ddp, optimizer, torch.amp.GradScaler("cpu", enabled=False), None, examples,
              micro_batch_tokens, steps_per_epoch=1, max_steps=1, warmup_steps=0, data_hash="", base={}, provenance={})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = InstructConfig(batch_size=len(examples), grad_clip=grad_clip)
    result, _ = train_step(run, config, cpu_runtime(rank, world_size), 0)
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}, result


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank = dist.get_rank()
    results = [(n, one_step(random_examples(n), 64, rank, 2)) for n in (9, 1)]     # of one example a rank has none
    if rank == 0:
        torch.save([(n, gradients, result.loss) for n, (gradients, result) in results], sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
