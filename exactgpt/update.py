"""The end of an optimizer step: clip the gradients, agree on whether they are finite, update or skip."""
import math
from dataclasses import dataclass

import torch

from exactgpt.config import RunFailed

MAX_SKIPPED = 10    # steps in a row: then the run ends


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave, the same on all ranks."""
    loss: float        # mean over all ranks' targets, nats
    grad_norm: float   # of the mean gradient, before clipping
    finite: bool       # False: loss or gradient was inf or NaN, and the update was skipped
    stop: bool         # some rank was asked to stop


def update(model, optimizer, scaler, grad_clip, loss, runtime):
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
    return StepResult(loss_sum / runtime.world_size, norm, finite, signals > 0)


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
