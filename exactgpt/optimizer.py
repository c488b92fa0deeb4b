"""AdamW and Muon, the learning rate of each step, and the end of a step: clip, agree, update or skip.

Muon (Keller Jordan 2024, https://kellerjordan.github.io/posts/muon/) is for the matrices inside the blocks. It replaces
a matrix' momentum by the nearest orthogonal matrix, found with five Newton-Schulz steps. Queries, keys and values share
one matrix (c_attn) and are orthogonalised apart, as the author does. Every rank keeps all momenta, so checkpoints do
not depend on the number of processes; the Newton-Schulz work is divided and the results gathered.
"""
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.distributed as dist

from exactgpt.config import RunFailed

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)   # the quintic whose slope at 0 is steepest (the post above)
MAX_SKIPPED = 10                            # steps in a row: then the run ends
DECAY_FRACTION = 0.3                        # of a wsd run: the linear decay at its end


def parameter_groups(model, weight_decay):
    """Two groups for an optimizer: matrices, which decay, and vectors (biases, LayerNorms), which do not."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [dict(params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),
            dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]


def make_optimizer(model, config, runtime):
    """The optimizer that --optimizer names; each parameter group carries its `peak_lr`. Covers every parameter once."""
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
    dtype = torch.float32 if runtime.dtype == torch.float16 else runtime.dtype     # fp16 would lose small updates
    muon = Muon(matrices, lr=config.muon_lr, weight_decay=config.muon_weight_decay, pieces=pieces, dtype=dtype,
                rank=runtime.rank, world_size=runtime.world_size)
    for group in muon.param_groups:
        group["peak_lr"] = config.muon_lr
    return OptimizerPair(muon, adamw)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by Newton-Schulz steps, with decoupled weight decay; for matrices only.

    Computes what torch.optim.Muon does (Nesterov, adjust_lr_fn="original": the rate times sqrt(max(1, rows /
    columns))), but for all matrices of one shape at once. pieces: {parameter: number of equal blocks of its rows}.
    Raises ValueError for a parameter that is no matrix.
    """

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.01, ns_steps=5, pieces=None, dtype=torch.bfloat16,
                 rank=0, world_size=1):
        """dtype: of the Newton-Schulz steps; rank, world_size: which share of them is this process'."""
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps))
        if any(p.dim() != 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon takes matrices only")
        self._pieces = pieces or {}
        self._dtype, self._rank, self._world_size = dtype, rank, world_size

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)    # (rows, columns) -> [(rows of a parameter, their update)]
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
        """newton_schulz of a batch (n, rows, columns), each rank doing its share."""
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
    """Matrices (n, rows, columns), each with its singular values moved near 1: U V^T of its U S V^T, about."""
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
    """Two optimizers that step and are saved as one."""

    def __init__(self, first, second):
        """first and second are of different classes and cover different parameters."""
        self._both = (first, second)

    @property
    def param_groups(self):
        """The groups of both, the first one's first: the schedule sets their "lr"."""
        return [group for optimizer in self._both for group in optimizer.param_groups]

    def step(self):
        """One update of every parameter that has a gradient."""
        for optimizer in self._both:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        """Drop all gradients, or set them to zero."""
        for optimizer in self._both:
            optimizer.zero_grad(set_to_none)

    def state_dict(self):
        """Both states, {name of the optimizer's class: its state}."""
        return {type(optimizer).__name__: optimizer.state_dict() for optimizer in self._both}

    def load_state_dict(self, state):
        """Put both states back. Raises KeyError where one is missing, ValueError where one does not fit."""
        for optimizer in self._both:
            optimizer.load_state_dict(state[type(optimizer).__name__])


# -----------------------------------------------------------------------------
# learning rate

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


# -----------------------------------------------------------------------------
# the end of a step

@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave, the same on all ranks."""
    loss: float        # mean over all ranks' targets, nats
    grad_norm: float   # of the mean gradient, before clipping
    finite: bool       # False: loss or gradient was inf or NaN, and the update was skipped


def finish_step(model, optimizer, scaler, grad_clip, loss, runtime):
    """Clip the gradients, step, drop them: a StepResult. loss: this rank's, a scalar tensor in nats; the mean over
    ranks is the step's.

    The one small collective of a step carries the loss and the stop flag. The norm is of gradients that DDP has
    averaged, so all ranks decide alike whether to skip.
    """
    scaler.unscale_(optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    grad_norm = torch.nn.utils.clip_grad_norm_(trained, grad_clip or math.inf)
    sums = runtime.reduce(loss, bool(runtime.stop_signal))
    facts = torch.cat([sums, grad_norm.to(sums.dtype)[None]])              # (3,): loss, stop signals, norm
    # Where the kernel itself can skip, it decides: a card that waited for this process to look would idle meanwhile.
    kernel_skips = isinstance(optimizer, torch.optim.AdamW) and not scaler.is_enabled() and runtime.device.type != "mps"
    if kernel_skips:
        optimizer.found_inf = (~facts.isfinite().all()).float()             # 1: the fused kernel leaves all as it is
        optimizer.step()
        del optimizer.found_inf
    loss_sum, signals, norm = runtime.read(facts)
    finite = math.isfinite(loss_sum) and math.isfinite(norm)
    if not kernel_skips:
        if finite:
            scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    runtime.stopping = signals > 0
    return StepResult(loss_sum / runtime.world_size, norm, finite)


@dataclass
class Skipped:
    """Updates that were skipped in a row."""
    in_a_row: int = 0
    scale_found: bool = False    # fp16: some update was made, so the loss scale is about right

    def count(self, result, scaler):
        """Count a step: why its update was skipped, "" where it was not.

        The first steps of fp16, in which the GradScaler looks for its scale, do not count.
        """
        if result.finite:
            self.in_a_row, self.scale_found = 0, True
            return ""
        if scaler.is_enabled() and not self.scale_found and scaler.get_scale() >= 1:
            return "the loss scale is too high, halved"
        self.in_a_row += 1
        return "loss or gradient is not finite"

    def check(self):
        """Raise RunFailed after MAX_SKIPPED in a row: the weights are past saving."""
        if self.in_a_row >= MAX_SKIPPED:
            raise RunFailed(f"{MAX_SKIPPED} steps in a row gave no finite gradient: begin anew in another folder, with "
                            "a smaller --max_lr or another --seed. What was saved before is as it was; --dtype fp32 "
                            "(train.py: or --attention math) may go on from it")
