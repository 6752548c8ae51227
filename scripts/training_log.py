"""What a training run prints and logs: a line for every step, evaluation and event."""

from __future__ import annotations

from nanochat.common import print0
from nanochat.run_log import RunLog, format_seconds
from scripts.run_state import Progress


class TrainingLog(RunLog):
    """A `RunLog` of a run of `num_iterations` steps of `batch_tokens` tokens, `flops_per_token` operations each."""

    def __init__(self, num_iterations: int, batch_tokens: int, flops_per_token: float, *args, **options):
        """`args` and `options` are those of `RunLog`."""
        super().__init__(*args, **options)
        self.num_iterations, self.batch_tokens = num_iterations, batch_tokens
        self.flops_per_token = flops_per_token

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

    def step(
        self, step: int, loss: float, progress: Progress, multipliers: dict, seconds: float, left: float | None
    ) -> None:
        """A step was made in so many seconds; so many are `left`."""
        tokens_per_second = self.batch_tokens / seconds
        shown = multipliers.get("*", {})
        print0(
            f"step {step:05d}/{self.num_iterations:05d} | loss {progress.smooth_loss:.4f} | "
            f"lr x{shown.get('lr', 1.0):.3g} wd x{shown.get('weight_decay', 1.0):.3g} | "
            f"dt {seconds * 1e3:.1f}ms | tok/s {tokens_per_second:,.0f} | "
            f"tflops {self.flops_per_token * tokens_per_second / 1e12:.3g} | left {format_seconds(left)}"
        )
        self.log(
            step=step,
            loss=loss,
            smooth_loss=progress.smooth_loss,
            multipliers=multipliers,
            dt=seconds,
            tokens_per_second=tokens_per_second,
        )
