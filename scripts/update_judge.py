"""Whether the update of a step is taken: asked at once on a CPU, one step late on a GPU, which then never waits.

At once, the loss is read before the optimizer's step. Late, the loss stays on the device: there it is compared with the
guard's limit, and a gradient that must not count is set to 0 before the optimizer's step. The host reads the loss while
the device works on the next step, and then asks the guard as ever. Two things differ from asking at once: the limit
does not know the loss of the step before, and an update that is left out still moves the weights by its momentum.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nanochat.common import Compute
from nanochat.dataloader import DataLoader
from nanochat.divergence_guard import DivergenceGuard, Verdict
from nanochat.gpt import GPT
from scripts.evaluation import Evaluator, mean_over_ranks
from scripts.run_state import Progress


@dataclass
class Step:
    """A step that was made: its multipliers, those of the step before (`held`), and what was seen of it."""

    step: int
    multipliers: dict
    held: dict
    loss: float = float("nan")  # over all ranks
    verdict: Verdict = Verdict.TAKE
    seconds: float = 0.0
    host: torch.Tensor | None = None  # (2,) loss and gradient norm, on their way to the host
    arrived: torch.cuda.Event | None = None


class UpdateJudge:
    """`expect` a step, pass the judge itself to `train_step` as `accept`, then `look` at the steps that are known.

    A look writes what was seen of an update that is taken into `progress`: the gradient's norm only for
    `observes_norm`. `late`: see above; anything that depends on `progress` or the guard needs `look(everything=True)`
    first. Collective.
    """

    def __init__(
        self,
        guard: DivergenceGuard,
        model: GPT,
        evaluator: Evaluator,
        loader: DataLoader,
        progress: Progress,
        observes_norm: bool,
        late: bool,
    ):
        self.guard, self.model, self.evaluator, self.loader = guard, model, evaluator, loader
        self.progress, self.observes_norm, self.compute = progress, observes_norm, evaluator.compute
        self.late = late
        self._made: deque[Step] = deque()  # expected or made, not looked at
        self._clock = 0.0

    def start_clock(self) -> None:
        """A step begins: its seconds count from here, or from when the one before it was over."""
        if not self._made:
            self.compute.synchronize()
            self._clock = time.perf_counter()

    def expect(self, step: int, multipliers: dict, held: dict) -> None:
        self._made.append(Step(step, multipliers, held))

    def __call__(self, loss: torch.Tensor) -> bool:
        made = self._made[-1]
        norm = gradient_norm(self.model, self.compute, over_ranks=self.observes_norm)
        # NaN if a gradient is not finite, else 0: a broken gradient counts as a broken loss
        loss = loss + 0.0 * norm
        if self.late:
            self._leave_to_device(made, loss, norm)
            return made.step not in self.guard.skipped
        self._judge(made, mean_over_ranks(loss, self.compute), norm.item() if self.observes_norm else 0.0)
        return made.verdict is Verdict.TAKE

    def look(self, everything: bool) -> Iterator[Step]:
        """The steps that are known: at once, the one just made; late, the one before it too, or only that."""
        while self._made and (everything or not self.late or len(self._made) > 1):
            made = self._made.popleft()
            if made.host is not None:
                if made.arrived is not None:
                    made.arrived.synchronize()
                self._judge(made, *made.host.tolist())
            if not self._made:  # else the device goes on with the next step
                self.compute.synchronize()
            now = time.perf_counter()
            made.seconds, self._clock = now - self._clock, now
            yield made

    def forget(self) -> None:
        """The run goes back: steps that were not looked at have never been."""
        self._made.clear()

    def _leave_to_device(self, made: Step, loss: torch.Tensor, norm: torch.Tensor) -> None:
        """Set the gradients to 0 unless the loss is finite and within the limit; nothing here waits for the device."""
        if self.compute.world_size > 1:
            torch.distributed.all_reduce(loss)
            loss = loss / self.compute.world_size
        bad = ~(loss.isfinite() & (loss <= self.guard.spike_limit()))
        # an optimizer that sends gradients during the backward pass holds what has come back by now
        sent = getattr(self.evaluator.optimizer, "sent_gradients", list)()
        for gradient in [*(p.grad for p in self.model.parameters()), *sent]:
            gradient.masked_fill_(bad, 0.0)  # not a product: NaN x 0 is NaN
        seen = torch.stack([loss, norm.to(loss.dtype)])
        if seen.is_cuda:
            made.host = torch.empty_like(seen, device="cpu", pin_memory=True)
            made.host.copy_(seen, non_blocking=True)
            made.arrived = torch.cuda.Event()
            made.arrived.record()
        else:
            made.host = seen

    def _judge(self, made: Step, loss: float, norm: float) -> None:
        made.loss, made.verdict = loss, self.guard.judge(made.step, loss, self._loss_of)
        if made.verdict is Verdict.TAKE:
            self.progress.took(loss)
            if self.observes_norm:
                self.progress.grad_norm = norm

    def _loss_of(self, step: int) -> float:
        return self.evaluator.training_loss([self.loader.get(step, i) for i in range(self.loader.micro_steps)])


def gradient_norm(model: GPT, compute: Compute, over_ranks: bool) -> torch.Tensor:
    """L2 norm (), fp32 or wider, of this rank's gradient, or of the average over ranks, which then stays in `.grad`."""
    gradients = [p.grad for p in model.parameters()]
    if over_ranks and compute.world_size > 1:
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient.div_(compute.world_size)
    return torch.nn.utils.get_total_norm([g.float() if g.element_size() < 4 else g for g in gradients])
