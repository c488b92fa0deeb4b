"""The arithmetic of a run, without torch: steps, batches, learning rates."""
import math
from dataclasses import dataclass
from fractions import Fraction

from exactgpt.config import UserError

TOKENS_PER_STEP = 524288   # 2^19: the 0.5M of the GPT-3 paper's smallest model
MAX_STEPS = 19073          # 10B tokens in steps of 524,288
WARMUP_STEPS = 715         # 375M tokens (GPT-3 paper)
DECAY_FRACTION = 0.3       # of a wsd run: the linear decay at its end


@dataclass(frozen=True)
class Plan:
    """How many of what. A window is a row of block_size tokens with its targets."""
    max_steps: int
    warmup_steps: int
    windows_per_step: int      # n, over all ranks
    local_windows: int         # n / world_size
    tokens_per_step: int
    epochs: float              # passes over the train split in max_steps


def make_plan(config, block_size, n_windows, world_size):
    """The Plan of a run over a train split of n_windows. Raises UserError that names numbers that work."""
    unit = block_size * world_size
    total = config.total_batch_size
    if total % unit:
        below, above = total // unit * unit, (total // unit + 1) * unit
        nearest = " or ".join(f"{v:,}".replace(",", "") for v in (below, above) if v)
        raise UserError(f"--total_batch_size {total} is not a multiple of block_size x processes = {block_size} x "
                        f"{world_size}; use {nearest}")
    if n_windows < 1:
        raise UserError(f"the train split holds no full window of {block_size} tokens; use more text, or a smaller "
                        "--block_size")
    n = total // block_size
    max_steps = config.max_steps if config.max_steps is not None else MAX_STEPS
    if config.num_epochs is not None:
        exact = Fraction(str(config.num_epochs)) * n_windows  # as typed: in floating point 0.29 of 100 is less than 29
        max_steps = math.floor(exact / n)
        if max_steps < 1:
            largest = math.floor(exact / world_size) * unit
            advice = f"the largest --total_batch_size is {largest}" if largest else "use more text or more epochs"
            raise UserError(f"--num_epochs {config.num_epochs:g} of {n_windows * block_size:,} tokens holds no step of "
                            f"{total:,} tokens; {advice}")
    warmup_steps = config.warmup_steps
    if warmup_steps is None:
        warmup_steps = min(WARMUP_STEPS, max_steps // 10)
    elif max_steps and warmup_steps > max_steps:
        raise UserError(f"--warmup_steps {warmup_steps} is longer than the run of {max_steps} steps")
    return Plan(max_steps, warmup_steps, n, n // world_size, total, max_steps * n / n_windows)


def learning_rate_factor(step, plan, schedule, min_factor):
    """The learning rate at a step (from 0) as a fraction of its peak.

    Linear warm-up (s + 1) / warmup_steps, then "cosine" to min_factor at max_steps (GPT-3 paper, appendix B), or
    "wsd": constant, then linear to min_factor over the last DECAY_FRACTION of the run (Hu et al. 2024, MiniCPM).
    """
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    if schedule == "cosine":
        progress = (step - plan.warmup_steps) / max(1, plan.max_steps - plan.warmup_steps)
        return min_factor + 0.5 * (1 + math.cos(math.pi * min(1.0, progress))) * (1 - min_factor)
    start = decay_start(plan)
    progress = max(0.0, (step - start) / max(1, plan.max_steps - start))
    return 1 + min(1.0, progress) * (min_factor - 1)


def decay_start(plan):
    """The step at which a wsd schedule begins to decay."""
    return max(plan.warmup_steps, plan.max_steps - round(DECAY_FRACTION * plan.max_steps))


def divisors(n):
    """The divisors of n, the largest first."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)}, reverse=True)


def check_micro_batch_size(micro_batch_size, local_windows):
    """Raise UserError unless the micro-batches make up a rank's share of the step exactly."""
    if local_windows % micro_batch_size:
        valid = ", ".join(map(str, divisors(local_windows)[:12]))
        raise UserError(f"--micro_batch_size {micro_batch_size} does not divide the {local_windows} rows that a "
                        f"process has per step (total_batch_size / block_size / processes); use one of {valid}, or 0")
