"""nanochat pretraining as an episode: the full model, short sequences, small batches (paper 4.1).

The episodes of a group run as one batched program (`GPT(config, runs=e)`). They share their initialisation and their
data, so that what differs between their returns is what their actions did and nothing else (common random numbers; our
reading, `shared=False` gives each its own). An episode trains by the same function as `scripts.base_train`: with the
same length, data, initialisation and multipliers both end with the same weights. e episodes, B batch, T time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from jel.contract import Contract
from jel.errors import JelError
from jel.features import WATCHED
from jel.knobs import Multipliers, apply_multipliers
from jel.observer import Observer
from nanochat.common import Compute, derive_seed, keep_freed_memory
from nanochat.dataloader import DataLoader, fixed_batches
from nanochat.gpt import GPT, GPTConfig
from nanochat.lr_schedule import base_hparams
from nanochat.optim import MuonAdamW
from nanochat.token_cache import TokenCache
from nanochat.train_step import train_step


def uniform_base(model: GPT, lr: float, weight_decay: float) -> MuonAdamW:
    """The paper's conservative base (4.1): one learning rate and one weight decay for every param group, unscaled."""
    optimizer = model.setup_optimizer()
    for group in optimizer.param_groups:
        group["initial_lr"], group["initial_wd"] = lr, weight_decay
    return optimizer


def tuned_base(model: GPT, **settings: float) -> MuonAdamW:
    """A base with a rate for every group, as `GPT.setup_optimizer` makes it from these settings."""
    return model.setup_optimizer(**settings)


# Param groups that may want another learning rate than the block matrices': corrections around the shared multiplier.
CORRECTIONS = {
    "embeddings": ("wte", "value_embeds"),
    "head": ("lm_head",),
    "scalars": ("resid_lambdas", "x0_lambdas"),
}


def group_names(config: GPTConfig) -> tuple[str, ...]:
    """The names of the param groups of a model of this shape."""
    with torch.device("meta"):
        return tuple(group["name"] for group in GPT(config).setup_optimizer().param_groups)


def contract_of(config: GPTConfig, make_optimizer: Callable[[GPT], MuonAdamW], steps: int, schedule: str) -> Contract:
    """What multipliers learned on this base over runs of so many steps are for; `schedule` names the base schedule."""
    with torch.device("meta"):
        return Contract.of(make_optimizer(GPT(config)), steps, schedule)


class PretrainTask:
    """A `Task` (see jel/tasks/base.py): training runs of one model shape, all of `num_steps` steps.

    `make_optimizer(model)` gives the base that multipliers act on: param groups with `initial_lr` and `initial_wd`.
    `schedule` holds the ratios of `base_hparams`. `probe_batches` batches of the probe split measure the loss.
    `cuda_graphs`: on CUDA a step is replayed from a graph (see `nanochat.gpt.replayed`). An episode's steps have one
    micro-batch, and training and probes one shape; the gradients, which the next forward pass overwrites, are measured
    and let go as training pauses. It changes no number.
    """

    model: GPT
    forward: Callable[[Tensor, Tensor], Tensor]
    optimizer: MuonAdamW

    def __init__(
        self,
        config: GPTConfig,
        cache: TokenCache,
        compute: Compute,
        *,
        num_steps: int,
        batch_size: int,
        probe_batches: int,
        make_optimizer: Callable[[GPT], MuonAdamW],
        schedule: dict[str, float],
        seed: int,
        shared: bool = True,
        cuda_graphs: bool = False,
    ):
        self.config, self.cache, self.compute, self.steps = config, cache, compute, num_steps
        self.batch_size, self.make_optimizer, self.schedule = batch_size, make_optimizer, schedule
        self.seed, self.shared, self.cuda_graphs = seed, shared, cuda_graphs
        self._observer: Observer | None = None
        self.groups = group_names(config)
        if compute.device.type == "cpu":
            keep_freed_memory()  # this process may be a worker, in which nobody has done it yet
        self.probes = fixed_batches(cache, "probe", batch_size, config.sequence_len, probe_batches, compute.device)
        self.loaders: list[DataLoader] = []  # one for all if shared, else one per episode
        self._episodes = 0

    def num_steps(self, group: int) -> int:
        return self.steps

    def reset(self, group: int, episodes: range) -> None:
        first_steps = [
            group * self.steps if self.shared else derive_seed(self.seed, "start", group, i) % 2**32 for i in episodes
        ]
        self.start(
            [derive_seed(self.seed, "episode", group, None if self.shared else i) for i in episodes], first_steps
        )

    def start(self, init_seeds: list[int], first_steps: list[int]) -> None:
        """Start episodes from the initialisation of each seed; `first_steps`: where in the data each begins, in steps.

        With `shared` all of them have the first one's.
        """
        if len(init_seeds) != self._episodes:
            self._build(len(init_seeds))
        self.optimizer.reset()
        with torch.no_grad():
            for i, seed in enumerate(init_seeds):
                if i == 0 or not self.shared:
                    self._single.init_weights(torch.Generator(device=self.compute.device).manual_seed(seed))
                for name, p in self.model.named_parameters():
                    p[i].copy_(self._single.get_parameter(name))
        self._first_steps = first_steps[:1] if self.shared else first_steps
        self._train_loss = torch.full((len(init_seeds),), float("nan"), device=self.compute.device)
        self._last_norm: Tensor | None = None
        self.optimizer.zero_grad(set_to_none=True)
        self._slots: dict[int, list[Tensor]] = {}
        self._steps_taken = 0
        if self._observer is not None:
            self._observer.close()
            self._observer = None

    def train(self, first_step: int, steps: int, multipliers: Multipliers) -> None:
        groups, device = self.optimizer.param_groups, self.compute.device
        multipliers = {
            g: {key: torch.as_tensor(m).to(device) for key, m in own.items()} for g, own in multipliers.items()
        }
        for step in range(first_step, first_step + steps):
            apply_multipliers(groups, base_hparams(groups, step, self.steps, **self.schedule), multipliers)
            self._train_loss = train_step(self.forward, self.optimizer, [self._batch(step)], self.compute)
            if self._observer is not None:
                self._observer.observe(self._train_loss)
        self._steps_taken = first_step + steps
        if self.cuda_graphs:  # a probe would overwrite the gradients
            self._last_norm = self._grad_norm()
            self.optimizer.zero_grad(set_to_none=True)

    def observe(self, names: Collection[str]) -> dict[str, Tensor]:
        known = {"probe_loss": self._probe_loss, "train_loss": lambda: self._train_loss, "grad_norm": self._grad_norm}
        watched = set(names).intersection(WATCHED)
        if unknown := set(names) - known.keys() - watched:
            raise JelError(f"episodes of pretraining do not measure {', '.join(sorted(unknown))}")
        found = {name: known[name]() for name in names if name in known}
        if watched:
            if self._observer is None:  # asked for at the start, as an environment does: watch from there on
                if self._steps_taken:
                    raise JelError("episodes are watched from their start, or not at all")
                self._observer = Observer(self.optimizer, runs=self._episodes)
            statistics = self._observer.statistics(self._steps_taken / self.steps)  # once a decision
            found |= {name: statistics[name] for name in watched}
        return found

    def save(self, slot: int, episodes: Tensor) -> None:
        kept = self._slots.setdefault(slot, [t.clone() for t, _ in self._state()])
        self._copy([t for t, _ in self._state()], kept, episodes)

    def load(self, slot: int, episodes: Tensor) -> None:
        """The optimizer's count of steps, which its bias corrections use, goes on: it is one for all episodes."""
        if slot not in self._slots:
            raise JelError(f"nothing was saved in slot {slot} of this episode")
        self._copy(self._slots[slot], [t for t, _ in self._state()], episodes)

    def close(self) -> None:
        for loader in self.loaders:
            loader.close()

    def _probe_loss(self) -> Tensor:
        with torch.no_grad(), self.compute.autocast():
            return torch.stack([self.forward(x, y) for x, y in self.probes]).mean(0)

    def _grad_norm(self) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if not gradients and self._last_norm is not None:
            return self._last_norm
        if not gradients:  # before the first step
            return torch.full_like(self._train_loss, float("nan"))
        squares = [g.flatten(1).to(torch.promote_types(g.dtype, torch.float32)).square().sum(1) for g in gradients]
        return torch.stack(squares).sum(0).sqrt()

    def _state(self) -> list[tuple[Tensor, int]]:
        """Everything an episode has learnt: (tensor, which of its axes is e)."""
        weights = [(p.data, 0) for p in self.model.parameters()]
        return weights + [(t, axis) for t, axis in self.optimizer.run_states()]

    def _copy(self, source: list[Tensor], target: list[Tensor], episodes: Tensor) -> None:
        index = episodes.nonzero().flatten().to(self.compute.device)
        for (_, axis), a, b in zip(self._state(), source, target, strict=True):
            b.index_copy_(axis, index, a.index_select(axis, index))

    def _build(self, e: int) -> None:
        """The batched model, its optimizer and its loader, for e episodes side by side."""
        self.close()
        for name in ("model", "_single", "forward", "optimizer"):
            vars(self).pop(name, None)  # freed before the next ones are made
        device = self.compute.device
        with torch.device("meta"):
            self.model, self._single = GPT(self.config, runs=e), GPT(self.config)
        for model in (self.model, self._single):
            model.to_empty(device=device)
        self.model.init_weights()
        self.forward = self.model.prepare(rows=self.batch_size, cuda_graphs=self.cuda_graphs)
        self.optimizer = self.make_optimizer(self.model)
        seed = derive_seed(self.seed, "data")
        self.loaders = [
            DataLoader(self.cache, "train", self.batch_size, self.config.sequence_len, device, seed=seed)
            for _ in range(1 if self.shared else e)
        ]
        self._episodes = e

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """(B, T) for all episodes, or (e, B, T) with data of their own."""
        batches = [loader.get(first + step) for loader, first in zip(self.loaders, self._first_steps, strict=True)]
        if self.shared:
            return batches[0]
        inputs, targets = zip(*batches)
        return torch.stack(inputs), torch.stack(targets)


# -----------------------------------------------------------------------------
# what an episode costs


def episode_flops(config: GPTConfig, train_tokens: int, probe_tokens: int) -> float:
    """Floating-point operations: forward and backward in training; forward in probes, a third as much a token."""
    with torch.device("meta"):
        per_token = GPT(config).flops_per_token()
    return per_token * (train_tokens + probe_tokens / 3)


def episode_bytes(config: GPTConfig, batch_size: int) -> int:
    """Device memory of one episode, roughly (an estimate from shapes alone).

    Weights, gradients, two moments and the optimizer's work space; per token and layer the activations that backward
    needs; the logits and their gradient.
    """
    with torch.device("meta"):
        parameters = GPT(config).num_params()
    tokens = batch_size * config.sequence_len
    return 4 * (6 * parameters + tokens * (40 * config.n_embd * config.n_layer + 4 * config.vocab_size))
