"""nanochat pretraining as an episode: the full model, short sequences, small batches (paper 4.1).

The episodes of a group run as one batched program (`GPT(config, runs=e)`). They share their initialisation and their
data, so that what differs between their returns is what their actions did and nothing else (common random numbers; our
reading, `shared=False` gives each its own). e episodes, B batch, T time.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from jel.actions import apply_multipliers
from nanochat.common import Compute, derive_seed, keep_freed_memory
from nanochat.dataloader import DataLoader, fixed_batches
from nanochat.gpt import GPT, GPTConfig
from nanochat.lr_schedule import base_hparams, set_momentum
from nanochat.token_cache import TokenCache


class PretrainTask:
    """An `EpisodeTask` (see jel/learn/rollout.py). `base_lr` and `base_wd` are every group's, as in the suboptimal baseline."""

    def __init__(
        self,
        config: GPTConfig,
        cache: TokenCache,
        compute: Compute,
        *,
        num_steps: int,
        batch_size: int,
        probe_batches: int,
        base_lr: float,
        base_wd: float,
        schedule: dict,
        seed: int,
        shared: bool = True,
    ):
        self.config, self.cache, self.compute, self.num_steps = config, cache, compute, num_steps
        self.batch_size, self.base_lr, self.base_wd = batch_size, base_lr, base_wd
        self.schedule, self.seed, self.shared = schedule, seed, shared
        if compute.device.type == "cpu":
            keep_freed_memory()  # again where this process has done it, but it may be a worker
        self.probes = fixed_batches(cache, "probe", batch_size, config.sequence_len, probe_batches, compute.device)
        self.loaders: list[DataLoader] = []  # one for all if shared, else one per episode
        self._episodes = 0

    def reset(self, group: int, episodes: range) -> None:
        if len(episodes) != self._episodes:
            self._build(len(episodes))
        self.optimizer.reset()
        with torch.no_grad():
            for i, episode in enumerate(episodes):
                if i == 0 or not self.shared:
                    self._single.init_weights(self._generator(group, None if self.shared else episode))
                for name, p in self.model.named_parameters():
                    p[i].copy_(self._single.get_parameter(name))
        self.first_batch = (
            [group * self.num_steps]
            if self.shared
            else [derive_seed(self.seed, "data", group, episode) % 2**32 for episode in episodes]
        )

    def train(self, first_step: int, steps: int, factors: dict[str, Tensor]) -> None:
        groups = self.optimizer.param_groups
        factors = {"*": {name: f.to(self.compute.device) for name, f in factors.items()}}
        for step in range(first_step, first_step + steps):
            inputs, targets = self._batch(step)
            self.model.zero_grad(set_to_none=True)  # before, not after: grad_norm reads what the last step left
            with self.compute.autocast():
                loss = self.forward(inputs, targets)  # (e,)
            loss.sum().backward()
            apply_multipliers(groups, base_hparams(groups, step, self.num_steps, **self.schedule), factors)
            set_momentum(groups, step)
            self.optimizer.step()

    @torch.no_grad()
    def probe_loss(self) -> Tensor:
        with self.compute.autocast():
            return torch.stack([self.forward(x, y) for x, y in self.probes]).mean(0)

    def grad_norm(self) -> Tensor:
        return sum(
            p.grad.flatten(1).to(torch.promote_types(p.dtype, torch.float32)).square().sum(1)
            for p in self.model.parameters()
        ).sqrt()

    def close(self) -> None:
        for loader in self.loaders:
            loader.close()

    def _build(self, e: int) -> None:
        """The batched model, its optimizer and its loader, for e episodes side by side."""
        self.close()
        self.model = self._single = self.forward = self.optimizer = None  # freed before the next ones are made
        device = self.compute.device
        with torch.device("meta"):
            self.model, self._single = GPT(self.config, runs=e), GPT(self.config)
        for model in (self.model, self._single):
            model.to_empty(device=device)
        self.model.init_weights()
        self.forward = self.model.prepare()
        self.optimizer = self.model.setup_optimizer()
        for group in self.optimizer.param_groups:
            group["initial_lr"], group["initial_wd"] = self.base_lr, self.base_wd
        self.loaders = [
            DataLoader(self.cache, "train", self.batch_size, self.config.sequence_len, device)
            for _ in range(1 if self.shared else e)
        ]
        self._episodes = e

    def _generator(self, *names) -> torch.Generator:
        return torch.Generator(device=self.compute.device).manual_seed(derive_seed(self.seed, "episode", *names))

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(B, T) for all episodes, or (e, B, T) with data of their own."""
        batches = [loader.get(first + step) for loader, first in zip(self.loaders, self.first_batch, strict=True)]
        return batches[0] if self.shared else tuple(torch.stack(t) for t in zip(*batches))


# -----------------------------------------------------------------------------
# memory


def episode_bytes(config: GPTConfig, batch_size: int) -> int:
    """Device memory of one episode, roughly (an estimate from shapes, checked against measurements in the README).

    Weights, gradients, two moments and the optimizer's work space; per token and layer the activations that backward
    needs; the logits and their gradient.
    """
    with torch.device("meta"):
        parameters = GPT(config).num_params()
    tokens = batch_size * config.sequence_len
    return 4 * (6 * parameters + tokens * (40 * config.n_embd * config.n_layer + 4 * config.vocab_size))


def free_bytes(device: torch.device) -> int:
    """Memory that is free now: the GPU's, or the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
