"""Losses that are not trained on: validation, test, probes, and the gradient's norm. All of it is collective."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator

import torch

from nanochat.common import Compute
from nanochat.dataloader import DataLoader, fixed_batches
from nanochat.divergence_guard import DivergenceGuard, Verdict
from nanochat.gpt import GPT
from nanochat.loss_eval import bits_per_byte
from nanochat.schedule_free import ScheduleFreeMuon
from nanochat.token_cache import TokenCache
from nanochat.tokenizer import Tokenizer
from scripts.run_state import Cost, Progress

PROBE_BATCHES = 4  # fixed ones, whose mean loss a controller may observe


class Evaluator:
    """Losses that are not trained on, under the weights that are meant to be evaluated. Their tokens go into `cost`."""

    def __init__(
        self,
        args: argparse.Namespace,
        forward: Callable,
        optimizer,
        cache: TokenCache,
        tokenizer: Tokenizer,
        compute: Compute,
        cost: Cost,
    ):
        self.args, self.forward, self.optimizer, self.cache = args, forward, optimizer, cache
        self.compute, self.cost = compute, cost
        self.token_bytes = torch.as_tensor(tokenizer.token_bytes(), device=compute.device)
        self.batch_tokens = args.device_batch_size * args.max_seq_len * compute.world_size
        self._probes: list | None = None

    @contextlib.contextmanager
    def weights_to_evaluate(self) -> Iterator[None]:
        """Schedule-free keeps one version of the weights for training and another for evaluation."""
        free = isinstance(self.optimizer, ScheduleFreeMuon)
        if free:
            self.optimizer.eval()
        with torch.no_grad(), self.compute.autocast():
            yield
        if free:
            self.optimizer.train()

    def bits_per_byte(self, split: str) -> float:
        """Over --eval-tokens of `val`, or --test-tokens of `test`."""
        a, c = self.args, self.compute
        steps = max(1, (a.test_tokens if split == "test" else a.eval_tokens) // self.batch_tokens)
        rows = DataLoader(self.cache, split, a.device_batch_size, a.max_seq_len, c.device, c.rank, c.world_size)
        with self.weights_to_evaluate():
            bpb = bits_per_byte(self.forward, (rows.get(i) for i in range(steps)), self.token_bytes, c.world_size)
        rows.close()
        self.cost.forward_tokens += steps * self.batch_tokens
        return bpb

    def probe_loss(self) -> float:
        """Mean loss over fixed batches of the probe split; the same batches on every rank."""
        a = self.args
        if self._probes is None:
            shape = a.device_batch_size, a.max_seq_len, PROBE_BATCHES
            self._probes = fixed_batches(self.cache, "probe", *shape, self.compute.device)
        self.cost.forward_tokens += PROBE_BATCHES * self.batch_tokens
        with self.weights_to_evaluate():  # the mean over ranks: they must not decide apart by a last bit
            losses = [self.forward(x, y).double() for x, y in self._probes]
            return mean_over_ranks(sum(losses) / len(losses), self.compute)

    def training_loss(self, batches) -> float:
        """Mean loss of some training batches under the present training weights."""
        self.cost.forward_tokens += len(batches) * self.batch_tokens
        with torch.no_grad(), self.compute.autocast():
            losses = [self.forward(x, y) for x, y in batches]
        return mean_over_ranks(sum(losses) / len(losses), self.compute)


class UpdateJudge:
    """Asks the guard, once the gradients of a step are in place, whether its update is taken.

    Call it with the step's mean loss on this rank. It leaves the `loss` over all ranks and the guard's `verdict`, and
    writes what was seen of an update that is taken into `progress`: the gradient's norm only for `observes_norm`.
    """

    def __init__(
        self,
        guard: DivergenceGuard,
        model: GPT,
        evaluator: Evaluator,
        loader: DataLoader,
        progress: Progress,
        observes_norm: bool,
    ):
        self.guard, self.model, self.evaluator, self.loader = guard, model, evaluator, loader
        self.progress, self.observes_norm, self.compute = progress, observes_norm, evaluator.compute
        self.step, self.loss, self.verdict = 0, math.nan, Verdict.TAKE

    def __call__(self, loss: torch.Tensor) -> bool:
        norm = gradient_norm(self.model, self.compute, over_ranks=self.observes_norm)
        # NaN if a gradient is not finite, else 0: a broken gradient counts as a broken loss
        self.loss = mean_over_ranks(loss + 0.0 * norm, self.compute)
        self.verdict = self.guard.judge(self.step, self.loss, self._loss_of)
        if self.verdict is not Verdict.TAKE:
            return False
        self.progress.took(self.loss)
        if self.observes_norm:
            self.progress.grad_norm = norm.item()
        return True

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


def mean_over_ranks(loss: torch.Tensor, compute: Compute) -> float:
    """The mean of a loss () over the ranks."""
    if compute.world_size > 1:
        torch.distributed.all_reduce(loss)
        loss = loss / compute.world_size
    return loss.item()
