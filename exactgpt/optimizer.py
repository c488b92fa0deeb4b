"""The optimizer, learning-rate schedules, and the end of a step: clip, reduce, update or skip. muon.py has Muon."""
import math
from dataclasses import dataclass

import torch

from exactgpt.config import RunFailed

MAX_SKIPPED = 10         # skipped updates in a row that end the run
DECAY_FRACTION = 0.3     # share of a wsd run in which the learning rate decays


def parameter_groups(model, weight_decay):
    """Return two parameter groups: matrices with weight decay, vectors (biases, LayerNorms) without."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [dict(params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),
            dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]


def make_optimizer(model, config, runtime):
    """Return the optimizer that --optimizer names, over every parameter once. Each group has its `peak_lr`."""
    matrices = []
    if config.optimizer == "muon":
        matrices = [p for p in model.transformer.h.parameters() if p.dim() == 2]
    rest = [dict(group, params=[p for p in group["params"] if not any(p is m for m in matrices)], peak_lr=config.max_lr)
            for group in parameter_groups(model, config.weight_decay)]
    adamw = torch.optim.AdamW([g for g in rest if g["params"]], lr=config.max_lr, betas=(config.beta1, config.beta2),
                              eps=config.adam_eps, fused=True)
    if not matrices:
        return adamw
    from exactgpt.muon import OptimizerPair, make_muon
    return OptimizerPair(make_muon(model, matrices, config, runtime), adamw)


# ---- learning-rate schedules -------------------------------------------------

def learning_rate_factor(step, plan, schedule, min_factor):
    """Return the learning rate at a step (from 0) as a fraction of its peak.

    First a linear warm-up, (step + 1) / warmup_steps. Then "cosine" falls to min_factor at max_steps (GPT-3 paper,
    appendix B); "wsd" stays constant and falls linearly to min_factor over the last DECAY_FRACTION of the run (Hu et
    al. 2024, MiniCPM). plan: anything with max_steps and warmup_steps.
    """
    # To add a schedule: a branch here, and its name in --schedule (train.py). If its runs may be made longer, also
    # check_same_run in checkpoint.py.
    if step < plan.warmup_steps:
        return (step + 1) / plan.warmup_steps
    if schedule == "cosine":
        progress = (step - plan.warmup_steps) / max(1, plan.max_steps - plan.warmup_steps)
        return min_factor + 0.5 * (1 + math.cos(math.pi * min(1.0, progress))) * (1 - min_factor)
    start = decay_start(plan)
    progress = max(0.0, (step - start) / max(1, plan.max_steps - start))
    return 1 + min(1.0, progress) * (min_factor - 1)


def decay_start(plan):
    """Return the step at which a wsd schedule begins to decay."""
    return max(plan.warmup_steps, plan.max_steps - round(DECAY_FRACTION * plan.max_steps))


# ---- the end of a step -------------------------------------------------------

@dataclass(frozen=True)
class StepResult:
    """The result of one training step, the same on all ranks."""
    loss: float        # mean over the targets of all ranks, in nats
    grad_norm: float   # of the averaged gradient, before clipping
    finite: bool       # False: loss or gradient norm was inf or NaN, and the update was skipped


def finish_step(model, optimizer, scaler, grad_clip, loss, runtime):
    """Clip the gradients, update the weights or skip the update, zero the gradients; return a StepResult.

    loss: a scalar tensor in nats whose mean over ranks is the loss of the step. All ranks must call it; it sets
    runtime.stopping.
    """
    # Clip. Without --grad_clip the norm is measured all the same.
    scaler.unscale_(optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)

    # One all-reduce carries both the loss and the stop signals: a small collective costs its latency, not its bytes.
    # The norm needs none, since DDP has averaged the gradients: it is the same on all ranks already.
    sums = runtime.reduce(loss, bool(runtime.stop_signal))
    facts = torch.cat([sums, grad_norm.to(sums.dtype)[None]])              # (3,): loss, stop signals, norm

    # Skip the update if anything is inf or NaN. All ranks have the same three numbers, so all of them skip or none:
    # if each decided by its own loss, their weights would drift apart. Fused AdamW skips by itself if found_inf is 1
    # (the attribute that GradScaler sets), so the GPU need not wait until the CPU has read the numbers.
    kernel_skips = isinstance(optimizer, torch.optim.AdamW) and not scaler.is_enabled() and runtime.device.type != "mps"
    if kernel_skips:
        optimizer.found_inf = (~facts.isfinite().all()).float()
        optimizer.step()
        del optimizer.found_inf
    loss_sum, signals, norm = runtime.read(facts)                           # waits for the device, once a step
    finite = math.isfinite(loss_sum) and math.isfinite(norm)
    if not kernel_skips:
        if finite:
            scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    runtime.stopping = signals > 0
    # Ranks have equally many targets (fine-tuning divides by the targets of all), so the mean of their means is right.
    return StepResult(loss_sum / runtime.world_size, norm, finite)


@dataclass
class SkippedSteps:
    """Count of the updates skipped in a row."""
    in_a_row: int = 0
    scale_found: bool = False    # fp16: there was an update, so the loss scale is about right

    def record(self, result, scaler):
        """Record a StepResult; return why its update was skipped, "" if it was not."""
        if result.finite:
            self.in_a_row, self.scale_found = 0, True
            return ""
        # In fp16 the first skips do not count: the GradScaler is still searching for its scale.
        if scaler.is_enabled() and not self.scale_found and scaler.get_scale() >= 1:
            return "the loss scale was too high and is halved"
        self.in_a_row += 1
        return "loss or gradient is not finite"

    def check(self):
        """Raise RunFailed after MAX_SKIPPED in a row: further steps are unlikely to succeed."""
        if self.in_a_row >= MAX_SKIPPED:
            raise RunFailed(f"{MAX_SKIPPED} steps in a row had no finite loss and gradient: start a new run in another "
                            "folder, with a lower --max_lr or another --seed. The checkpoints are unchanged; resuming "
                            "from them with --dtype fp32 (train.py: or --attention math) may work")
