"""The Muon optimizer, and a pair of optimizers that act as one.

Muon (Keller Jordan 2024, https://kellerjordan.github.io/posts/muon/) is for the matrices inside the blocks. It replaces
the momentum of a matrix by the nearest orthogonal matrix, approximated by five Newton-Schulz steps. Queries, keys and
values share one matrix (c_attn) and are orthogonalised separately, as its author does. Every rank keeps all momenta, so
checkpoints do not depend on the number of processes; the Newton-Schulz work is divided and its results are gathered.
"""
from collections import defaultdict

import torch
import torch.distributed as dist

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)   # the quintic whose slope at 0 is steepest (the post above)


def make_muon(model, matrices, config, runtime):
    """Return the Muon for some of a GPT's matrices; its groups have their `peak_lr`."""
    pieces = {p: 3 for name, p in model.named_parameters() if name.endswith("attn.c_attn.weight")}
    dtype = torch.float32 if runtime.dtype == torch.float16 else runtime.dtype     # small updates vanish in fp16
    muon = Muon(matrices, lr=config.muon_lr, weight_decay=config.muon_weight_decay, pieces=pieces, dtype=dtype,
                rank=runtime.rank, world_size=runtime.world_size)
    for group in muon.param_groups:
        group["peak_lr"] = config.muon_lr
    return muon


class Muon(torch.optim.Optimizer):
    """Muon, for matrices: orthogonalised Nesterov momentum with decoupled weight decay."""
    # Computes what torch.optim.Muon does with adjust_lr_fn="original" (the rate times sqrt(max(1, rows / columns))),
    # but for all matrices of one shape at once. pieces: {parameter: number of equal blocks of its rows that are
    # orthogonalised separately}.

    def __init__(self, params, lr=0.02, momentum=0.95, weight_decay=0.01, ns_steps=5, pieces=None, dtype=torch.bfloat16,
                 rank=0, world_size=1):
        """dtype: of the Newton-Schulz steps. rank, world_size: this process' share of them."""
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, ns_steps=ns_steps))
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
