"""AdamW and Muon, learning-rate schedules, and the end of a step: clip, reduce, update or skip.

Muon (Keller Jordan 2024, https://kellerjordan.github.io/posts/muon/) is for the matrices inside the blocks. It replaces
the momentum of a matrix by the nearest orthogonal matrix, approximated by five Newton-Schulz steps. Queries, keys and
values share one matrix (c_attn) and are orthogonalised separately, as its author does. Every rank keeps all momenta, so
checkpoints do not depend on the number of processes; the Newton-Schulz work is divided and its results are gathered.
"""
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist

from exactgpt.config import RunFailed

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)   # the quintic whose slope at 0 is steepest (the post above)
MAX_SKIPPED = 10                            # skipped updates in a row that end the run
DECAY_FRACTION = 0.3                        # share of a wsd run in which the learning rate decays


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
    pieces = {p: 3 for name, p in model.named_parameters() if name.endswith("attn.c_attn.weight")}
    dtype = torch.float32 if runtime.dtype == torch.float16 else runtime.dtype     # small updates vanish in fp16
    muon = Muon(matrices, lr=config.muon_lr, weight_decay=config.muon_weight_decay, pieces=pieces, dtype=dtype,
                rank=runtime.rank, world_size=runtime.world_size)
    for group in muon.param_groups:
        group["peak_lr"] = config.muon_lr
    return OptimizerPair(muon, adamw)


class Muon(torch.optim.Optimizer):
    """Muon, for matrices: orthogonalised Nesterov momentum with decoupled weight decay.

    Computes what torch.optim.Muon does with adjust_lr_fn="original" (the rate times sqrt(max(1, rows / columns))), but
    for all matrices of one shape at once. pieces: {parameter: number of equal blocks of its rows that are
    orthogonalised separately}. Raises ValueError for a parameter that is not a matrix.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.01, ns_steps=5, pieces=None, dtype=torch.bfloat16,
                 rank=0, world_size=1):
        """dtype: of the Newton-Schulz steps. rank, world_size: this process' share of them."""
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps))
        if any(p.dim() != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon takes matrices only")
        self._pieces = pieces or {}
        self._dtype, self._rank, self._world_size = dtype, rank, world_size

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)    # (rows, columns) -> [(block of a parameter, its update)]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum_buffer"]
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                n = self._pieces.get(p, 1)
                for target, piece in zip(p.chunk(n), update.chunk(n)):
                    by_shape[piece.shape].append((target, piece))
            for (rows, columns), entries in by_shape.items():
                directions = self._orthogonalize(torch.stack([piece for _, piece in entries]), group["ns_steps"])
                for (target, _), direction in zip(entries, directions):
                    target.add_(direction, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _orthogonalize(self, batch, steps):
        """Return newton_schulz of a batch (n, rows, columns); each rank computes its share."""
        if self._world_size == 1:
            return newton_schulz(batch, steps, self._dtype)
        share = -(-len(batch) // self._world_size)
        mine = batch[self._rank * share:(self._rank + 1) * share]
        done = torch.zeros(share, *batch.shape[1:], dtype=self._dtype, device=batch.device)
        if len(mine):
            done[:len(mine)] = newton_schulz(mine, steps, self._dtype)
        gathered = torch.empty(self._world_size * share, *batch.shape[1:], dtype=self._dtype, device=batch.device)
        dist.all_gather(list(gathered.chunk(self._world_size)), done)
        return gathered[:len(batch)]


def newton_schulz(batch, steps, dtype):
    """Move the singular values of matrices (n, rows, columns) near 1: from U S V^T to about U V^T."""
    a, b, c = NEWTON_SCHULZ
    x = batch.to(dtype)
    if x.size(1) > x.size(2):
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)   # (aI + bG + cG^2) X
    return x.mT if batch.size(1) > batch.size(2) else x


class OptimizerPair:
    """Two optimizers that step as one and are saved as one."""

    def __init__(self, first, second):
        """first and second must be of different classes and have different parameters."""
        self._both = (first, second)

    @property
    def param_groups(self):
        """The parameter groups of both, in order; the schedule sets their "lr"."""
        return [group for optimizer in self._both for group in optimizer.param_groups]

    def step(self):
        """Update every parameter that has a gradient."""
        for optimizer in self._both:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        """Set all gradients to None, or to zero."""
        for optimizer in self._both:
            optimizer.zero_grad(set_to_none)

    def state_dict(self):
        """Return {name of the optimizer's class: its state}."""
        return {type(optimizer).__name__: optimizer.state_dict() for optimizer in self._both}

    def load_state_dict(self, state):
        """Load both states. Raises KeyError if one is missing, ValueError if one does not fit."""
        for optimizer in self._both:
            optimizer.load_state_dict(state[type(optimizer).__name__])


# -----------------------------------------------------------------------------
# learning-rate schedules

def learning_rate_factor(step, plan, schedule, min_factor):
    """Return the learning rate at a step (from 0) as a fraction of its peak.

    First a linear warm-up, (step + 1) / warmup_steps. Then "cosine" falls to min_factor at max_steps (GPT-3 paper,
    appendix B); "wsd" stays constant and falls linearly to min_factor over the last DECAY_FRACTION of the run (Hu et
    al. 2024, MiniCPM). plan: anything with max_steps and warmup_steps.
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
    """Return the step at which a wsd schedule begins to decay."""
    return max(plan.warmup_steps, plan.max_steps - round(DECAY_FRACTION * plan.max_steps))


# -----------------------------------------------------------------------------
# the end of a step

@dataclass(frozen=True)
class StepResult:
    """The result of one training step, the same on all ranks."""
    loss: float        # mean over the targets of all ranks, in nats
    grad_norm: float   # of the averaged gradient, before clipping
    finite: bool       # False: loss or gradient norm was inf or NaN, and the update was skipped


def finish_step(model, optimizer, scaler, grad_clip, loss, runtime):
    """Clip the gradients, update the weights or skip the update, zero the gradients; return a StepResult.

    loss: this rank's mean, a scalar tensor in nats. All ranks must call it; it sets runtime.stopping.
    """
    # clip
    scaler.unscale_(optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)

    # One all-reduce carries both the loss and the stop signals: a small collective costs its latency, not its bytes.
    # The norm needs none, since DDP has averaged the gradients: it is the same on all ranks already.
    sums = runtime.reduce(loss, bool(runtime.stop_signal))
    facts = torch.cat([sums, grad_norm.to(sums.dtype)[None]])              # (3,): loss, stop signals, norm

    # Skip the update if anything is inf or NaN. All ranks have the same three numbers, so all of them skip or none:
    # if they decided by their own loss, their weights would drift apart. The fused AdamW kernel can skip by itself,
    # which spares the card a wait for this process to look at the numbers.
    kernel_skips = isinstance(optimizer, torch.optim.AdamW) and not scaler.is_enabled() and runtime.device.type != "mps"
    if kernel_skips:
        optimizer.found_inf = (~facts.isfinite().all()).float()             # 1: the kernel changes nothing
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
    return StepResult(loss_sum / runtime.world_size, norm, finite)


@dataclass
class SkippedSteps:
    """Count of the updates skipped in a row."""
    in_a_row: int = 0
    scale_found: bool = False    # fp16: there was an update, so the loss scale is about right

    def count(self, result, scaler):
        """Count a step's StepResult; return why its update was skipped, "" if it was not.

        In fp16 the first skips do not count: the GradScaler is still searching for its scale.
        """
        if result.finite:
            self.in_a_row, self.scale_found = 0, True
            return ""
        if scaler.is_enabled() and not self.scale_found and scaler.get_scale() >= 1:
            return "the loss scale was too high and is halved"
        self.in_a_row += 1
        return "loss or gradient is not finite"

    def check(self):
        """Raise RunFailed after MAX_SKIPPED in a row: the weights are beyond saving."""
        if self.in_a_row >= MAX_SKIPPED:
            raise RunFailed(f"{MAX_SKIPPED} steps in a row had no finite loss and gradient: start a new run in another "
                            "folder, with a lower --max_lr or another --seed. The checkpoints are unchanged; resuming "
                            "from them with --dtype fp32 (train.py: or --attention math) may work")
