"""What a training run prints and logs: a line for every step, evaluation and event."""

from __future__ import annotations

from pathlib import Path

import torch

from nanochat.common import Compute, print0
from nanochat.hardware import peak_flops, peak_memory_bytes
from nanochat.run_log import RunLog, format_seconds
from scripts.run_state import Progress
from scripts.update_judge import Step


class TrainingLog(RunLog):
    """A `RunLog` of a run of `num_iterations` steps of `batch_tokens` tokens, `flops_per_token` operations each."""

    def __init__(
        self,
        num_iterations: int,
        batch_tokens: int,
        flops_per_token: float,
        folder: Path,
        config: dict,
        compute: Compute,
        *args,
        **options,
    ):
        """`folder` and what follows are those of `RunLog`."""
        super().__init__(folder, config, compute, *args, **options)
        self.num_iterations, self.batch_tokens = num_iterations, batch_tokens
        self.flops_per_token, self.device = flops_per_token, compute.device
        peak = peak_flops(torch.cuda.get_device_name(compute.device)) if compute.is_cuda else None
        self.peak_flops = peak and peak * compute.world_size

    def evaluated(self, step: int, **bpb: float) -> None:
        """Bits per byte after `step` steps, by name: `val_bpb` or `test_bpb`."""
        shown = " | ".join(f"{name} {value:.4f}" for name, value in bpb.items())
        print0(f"step {step:05d}/{self.num_iterations:05d} | {shown}")
        self.log(step=step, **bpb)

    def event(self, step: int, line: str, recoveries: int) -> None:
        """Something happened at `step` that makes `recoveries` so far."""
        self.log(step=step, event=line, recovery=recoveries)
        print0(line)

    def returned(self, step: int, back: int, why: str, recoveries: int) -> None:
        """The run has gone back from `step` to `back`, and so does the log."""
        self.rewind(back)
        self.event(back, f"{why}; back from step {step} to step {back}", recoveries)

    def step(self, made: Step, progress: Progress, warm_up: bool, left: float | None) -> None:
        """A step was made; so many seconds are `left`. What compiled (`warm_up`) is no measure of speed."""
        rate = None if warm_up else self.batch_tokens / made.seconds  # tokens/s
        mfu = self.flops_per_token * rate / self.peak_flops if rate and self.peak_flops else None
        memory, shown = peak_memory_bytes(self.device) / 1e6, made.multipliers.get("*", {})
        speed = "tok/s ? (compiling)"
        if rate:
            speed = f"tok/s {rate:,.0f} | tflops {self.flops_per_token * rate / 1e12:.3g}"
        print0(
            f"step {made.step:05d}/{self.num_iterations:05d} | loss {progress.smooth_loss:.4f} | "
            f"lr x{shown.get('lr', 1.0):.3g} wd x{shown.get('weight_decay', 1.0):.3g} | "
            f"dt {made.seconds * 1e3:.1f}ms | {speed} | {'' if mfu is None else f'mfu {mfu:.1%} | '}"
            f"mem {memory:,.0f}MB | left {format_seconds(left)}"
        )
        self.log(
            step=made.step,
            loss=made.loss,
            smooth_loss=progress.smooth_loss,
            multipliers=made.multipliers,
            dt=made.seconds,
            tokens_per_second=rate,
            mfu=mfu,
            peak_memory_mb=memory,
        )
