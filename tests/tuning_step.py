"""One step of fine-tuning over made-up rows. As a script: on two ranks, what they found into the file named."""
import datetime
import sys

import torch
import torch.distributed as dist

from exactgpt.finetune import Objective, Tuning, make_example, train_step
from finetune_instruct import InstructConfig
from model import GPT, IGNORED, GPTConfig
from tests.common import cpu_runtime


def random_rows(n):
    """Examples of a vocabulary of 65, of uneven lengths, from 1 target to all."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(n):
        length = int(torch.randint(2, 30, (), generator=generator))
        tokens, targets = torch.randint(65, (2, length), generator=generator).tolist()
        rows.append(make_example(tokens, [IGNORED] * min(length - 1, i * 3) + targets[min(length - 1, i * 3):]))
    return rows


def one_step(rows, budget, rank=0, world_size=1, weights=None):
    """(gradients, StepResult) of this rank's part of a step over all rows; the optimizer does not move."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 65, 1, 2, 16))
    objective = Objective(model, "lm_head", weights)
    ddp = torch.nn.parallel.DistributedDataParallel(objective) if world_size > 1 else objective
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run = Tuning(model, objective, ddp, optimizer, torch.amp.GradScaler("cpu", enabled=False), rows, {}, "", budget, 1,
                 1, 0, 1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    config = InstructConfig(batch_size=len(rows), grad_clip=0.0)
    result, _ = train_step(run, config, cpu_runtime(rank, world_size))
    return {name: before[name] - p.detach() for name, p in model.named_parameters()}, result


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank = dist.get_rank()
    results = [(n, one_step(random_rows(n), 64, rank, 2)) for n in (9, 1)]     # of one row a rank has none
    if rank == 0:
        torch.save([(n, gradients, result.loss) for n, (gradients, result) in results], sys.argv[1])
    dist.barrier()
    dist.destroy_process_group()
