"""Losses that are not trained on: validation, test, probes. All of it is collective."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator

import torch

from nanochat.common import Compute
from nanochat.dataloader import DataLoader, fixed_batches
from nanochat.loss_eval import bits_per_byte
from nanochat.schedule_free import ScheduleFreeMuon
from nanochat.token_cache import TokenCache
from nanochat.tokenizer import Tokenizer
from scripts.run_state import Cost

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


def mean_over_ranks(loss: torch.Tensor, compute: Compute) -> float:
    """The mean of a loss () over the ranks."""
    if compute.world_size > 1:
        torch.distributed.all_reduce(loss)
        loss = loss / compute.world_size
    return loss.item()
