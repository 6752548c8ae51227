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
from scripts.run_state import Progress

PROBE_BATCHES = 4  # fixed ones, whose mean loss a controller may observe


class Evaluator:
    """Losses that are not trained on, under the weights that are meant to be evaluated."""

    def __init__(
        self,
        args: argparse.Namespace,
        forward: Callable,
        optimizer,
        cache: TokenCache,
        tokenizer: Tokenizer,
        compute: Compute,
    ):
        self.args, self.forward, self.optimizer, self.cache, self.compute = args, forward, optimizer, cache, compute
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

    def bits_per_byte(self, split: str, progress: Progress) -> float:
        """Over --eval-tokens of `val`, or --test-tokens of `test`."""
        a, c = self.args, self.compute
        steps = max(1, (a.test_tokens if split == "test" else a.eval_tokens) // self.batch_tokens)
        rows = DataLoader(self.cache, split, a.device_batch_size, a.max_seq_len, c.device, c.rank, c.world_size)
        with self.weights_to_evaluate():
            bpb = bits_per_byte(self.forward, (rows.get(i) for i in range(steps)), self.token_bytes, c.world_size)
        rows.close()
        progress.forward_tokens += steps * self.batch_tokens
        return bpb

    def probe_loss(self, progress: Progress) -> float:
        a = self.args
        if self._probes is None:
            shape = a.device_batch_size, a.max_seq_len, PROBE_BATCHES
            self._probes = fixed_batches(self.cache, "probe", *shape, self.compute.device)
        progress.forward_tokens += PROBE_BATCHES * self.batch_tokens
        with self.weights_to_evaluate():  # the mean over ranks: they must not decide apart by a last bit
            losses = [self.forward(x, y).double() for x, y in self._probes]
            return mean_over_ranks(sum(losses) / len(losses), self.compute)

    def training_loss(self, batches) -> float:
        """Of some batches under the present training weights."""
        with torch.no_grad(), self.compute.autocast():
            losses = [self.forward(x, y) for x, y in batches]
        return mean_over_ranks(sum(losses) / len(losses), self.compute)


class UpdateJudge:
    """Asks the guard, once the gradients of `step` are there, whether its update is taken."""

    def __init__(self, guard: DivergenceGuard, model: GPT, evaluator: Evaluator, loader: DataLoader, compute: Compute):
        self.guard, self.model, self.evaluator, self.loader, self.compute = guard, model, evaluator, loader, compute
        self.step, self.loss, self.verdict = 0, math.nan, Verdict.TAKE

    def __call__(self, loss: torch.Tensor) -> bool:
        # NaN if a gradient is not finite, else 0: a broken gradient counts as a broken loss
        broken = 0.0 * torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters()])
        self.loss = mean_over_ranks(loss + broken, self.compute)
        self.verdict = self.guard.judge(self.step, self.loss, self._loss_of)
        return self.verdict is Verdict.TAKE

    def _loss_of(self, step: int) -> float:
        return self.evaluator.training_loss([self.loader.get(step, i) for i in range(self.loader.micro_steps)])


def global_grad_norm(model: GPT, compute: Compute) -> float:
    """L2 norm of the gradient averaged over ranks; the average stays in `.grad`."""
    gradients = [p.grad for p in model.parameters()]
    if compute.world_size > 1:
        for gradient in gradients:
            torch.distributed.all_reduce(gradient)
            gradient.div_(compute.world_size)
    return torch.nn.utils.get_total_norm([g.float() if g.element_size() < 4 else g for g in gradients]).item()


def mean_over_ranks(loss: torch.Tensor, compute: Compute) -> float:
    if compute.world_size > 1:
        torch.distributed.all_reduce(loss)
        loss = loss / compute.world_size
    return loss.item()
